"""Section 5.2 and the loop: what an update sees, the average, exact resume, and a run through the command line."""

import os
import pickle
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import equal_tensors, make_tiny_model, newest_checkpoint
from PIL import Image
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

import train
from data import TABLE_4_1, open_letters, rows_of_update
from fid import kernel_distance, letters_features
from ldm import load_model
from sample import generate
from train import EMA, Letters, LettersStage, Log, Means, complete, draw_losses, learning_rate

TINY = ("--stage", "letters", "--device", "cpu", "--precision", "float32", "--batch", 16, "--channels", 16)
SMALL = (*TINY, "--multipliers", 1, 1, "--T", 5, "--overfit", 64)
SHORT = (*SMALL, "--updates", 12, "--save-every", 4, "--validate-every", 4, "--preview-every", 100)


def stage(**changes):
    settings = Letters(channels=16, multipliers=(1, 1), batch=8, precision="float32", device="cpu", **changes)
    complete(settings)
    return LettersStage(settings)


# ---------------------------------------------------------------------------------------------------- pieces


def test_every_epoch_sees_every_row_once_in_another_order():
    rows = np.concatenate([rows_of_update(0, n, 8, 50) for n in range(50)])  # eight epochs of 50 rows
    epochs = rows.reshape(8, 50)
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert np.array_equal(rows_of_update(0, 17, 8, 50), rows[17 * 8 : 18 * 8])  # a function of (seed, n) alone
    assert not np.array_equal(rows_of_update(1, 17, 8, 50), rows[17 * 8 : 18 * 8])


def test_balanced_draws_every_label_equally_often():
    s = stage(balanced=True)
    keep = [np.flatnonzero(s.train_labels == label)[:count] for label, count in enumerate((300, 30, 3, 1))]
    s.train_rows = s.train_rows[np.concatenate(keep)]
    s.train_labels = s.data.labels[s.train_rows]
    rows = np.concatenate([s.rows(n) for n in range(50)])
    assert np.isin(rows, s.train_rows).all() and np.bincount(s.data.labels[rows]).tolist() == [25 * s.settings.batch // 2] * 4


def seen_by(stage, n):
    """What update n gives the model: x_0, y, t, noise."""
    seen = {}

    def loss(x_0, y, t, noise):
        seen.update(x_0=x_0, y=y, t=t, noise=noise)
        return torch.zeros(len(y))

    stage.model.loss = loss
    stage.loss(n)
    return seen


def test_t_is_uniform_on_1_to_T_and_labels_are_dropped():
    s = stage(T=4, p_uncond=0.5)
    updates = [seen_by(s, n) for n in range(300)]
    t = torch.cat([u["t"] for u in updates])
    assert t.unique().tolist() == [1, 2, 3, 4]
    assert (torch.bincount(t)[1:] / len(t) - 0.25).abs().max() < 0.04
    y = torch.cat([u["y"] for u in updates])
    assert abs((y == 26).double().mean() - 0.5) < 0.04
    again = seen_by(s, 299)
    assert all(torch.equal(again[k], updates[299][k]) for k in again)
    assert abs(torch.cat([u["noise"].flatten() for u in updates]).std() - 1) < 0.01


def test_flip_mirrors_half_of_the_images_and_is_off_by_default():
    """E41: a mirrored letter does not fit its label."""
    plain, flipped = stage(p_uncond=0.0), stage(p_uncond=0.0, flip=True)
    mirrored = 0
    for n in range(40):
        a, b = seen_by(plain, n)["x_0"], seen_by(flipped, n)["x_0"]
        for one, two in zip(a, b):
            assert torch.equal(one, two) or torch.equal(one.flip(-1), two)
            mirrored += not torch.equal(one, two)
    assert 0.3 < mirrored / 320 < 0.6  # symmetric letters hide a few


def test_validation_loss_is_the_same_every_time_and_uses_no_dropped_label():
    s = stage(overfit=20)
    assert s.validate() == s.validate()
    seen = []
    s.model.loss = lambda x_0, y, t, noise: seen.append((y, t)) or torch.ones(len(y))
    assert s.validate() == {"validation_loss": 1}
    y, t = (torch.cat(values) for values in zip(*seen))
    assert y.max() < 26 and t.min() == 1 and t.max() > 900


def test_ema_averages_parameters_with_warm_up_and_leaves_tables_alone():
    s = stage()
    ema = EMA(s.model, 0.9)
    first = [p.clone() for p in s.model.parameters()]
    table = s.model.diffusion.alpha_bar.clone()
    for p in s.model.parameters():
        p.data += 1
    ema.update(1)  # decay min(0.9, 2/11)
    for start, average in zip(first, ema.average):
        torch.testing.assert_close(average, start + 9 / 11)
    for _ in range(200):
        ema.update(1000)  # decay 0.9
    with ema.averaged():
        torch.testing.assert_close(next(s.model.parameters()), first[0] + 1)
        assert torch.equal(s.model.diffusion.alpha_bar, table)
    assert set(ema.state_dict()) == {name for name, _ in s.model.named_parameters()}


def test_e62_averaging_does_not_train():
    """5.2: "further trained using a copy of the weight". The copy follows; what is trained, and its loss, stay as they are."""
    s = stage(overfit=8)
    ema = EMA(s.model, 0.9)
    for p in s.model.parameters():
        p.data += 0.01  # as an optimiser would: now the average is elsewhere
    before, raw = s.loss(0).item(), [p.clone() for p in s.model.parameters()]
    for n in range(20):
        ema.update(n)
    assert all(torch.equal(a, b) for a, b in zip(raw, s.model.parameters())) and s.loss(0).item() == before


def test_e62_an_epoch_of_small_batches_is_more_updates():
    """5.3.1 compares two models at epoch 14: the one with batch 12 has had 5.3 times the updates of the one with batch 64."""
    images = sum(TABLE_4_1)
    assert (images // 64, images // 12) == (308, 1647) and images // 12 / (images // 64) == pytest.approx(5.3, abs=0.05)
    assert 300 * (images // 64) == 92_400  # updates of the thesis's run


def test_averaged_weights_are_really_used_under_autocast():
    """Autocast caches the casts of weights: a second evaluation inside one context would see the first one's weights."""
    s = stage(overfit=8)
    s.settings.precision = "bf16"
    for p in s.model.parameters():
        p.data += 0.05
    ema = EMA(s.model, 0.9)
    for average in ema.average:
        average.zero_()
    with train.mixed_precision(s.settings):
        raw = s.validate()
        with ema.averaged():
            averaged = s.validate()
    with train.mixed_precision(s.settings), ema.averaged():
        assert s.validate() == averaged
    assert averaged != raw


def test_learning_rate_is_the_one_typed_with_warm_up_and_decay():
    s = Letters(lr=1e-3, warmup=10, updates=110)
    rates = [learning_rate(s, n) for n in range(110)]
    assert rates[0] == pytest.approx(1e-4) and max(rates) == rates[9] == pytest.approx(1e-3)
    assert rates[60] == pytest.approx(5e-4) and 0 < rates[-1] < 2e-5


def test_previews_have_the_scale_that_the_thesis_chose():
    assert stage().scale == 2 and stage(p_uncond=0.0).scale == 1


def test_log_keeps_interruptions_apart(tmp_path):
    log = Log(tmp_path / "log.csv", 1, 0)
    for n in (10, 20, 30):
        log.write({"run": 1, "update": n, "train_loss": 1.0 / n})
    log = Log(tmp_path / "log.csv", 2, 20)  # resumed from update 20: the line past it goes
    log.write({"run": 2, "update": 30, "train_loss": 0.5, "validation_loss": 0.25})
    rows = log.rows()
    assert [(r["run"], r["update"]) for r in rows] == [("1", "10"), ("1", "20"), ("2", "30")]
    draw_losses(log.rows(), tmp_path / "loss.png", "mean squared error")
    assert np.asarray(Image.open(tmp_path / "loss.png")).std() > 5


def test_5_2_the_chart_of_a_log(run, refused, tmp_path, monkeypatch):
    """--chart draws what the loop draws; of a half written last line nothing. Without a run it says which command makes it."""
    log = Log(tmp_path / "log.csv", 1, 0)
    for n in (10, 20, 30):
        log.write({"run": 1, "update": n, "train_loss": 1.0 / n})
    draw_losses(log.rows(), tmp_path / "loss.png", train.LatentStage.loss_name)
    with log.path.open("a") as file:
        file.write("1,40,0.1,9")
    code, _, err = run("train", "--stage", "ldm", "--out", tmp_path, "--chart", tmp_path / "figures" / "losses.png")
    assert code == 0, err
    assert (tmp_path / "figures" / "losses.png").read_bytes() == (tmp_path / "loss.png").read_bytes()
    monkeypatch.chdir(tmp_path)
    assert "python train.py --stage ldm makes it" in refused("train", "--stage", "ldm", "--chart", "losses.png")
    assert "python train.py --stage ldm makes it" in refused("sample", "--run", "runs/ldm", "--grid")
    assert "--out runs/other" in refused("sample", "--run", "runs/other", "--grid")
    assert "not the name of a picture" in refused("train", "--stage", "ldm", "--out", tmp_path, "--chart", "losses")


def test_means_are_over_the_updates_that_had_the_number():
    means = Means()
    for n in range(4):
        means.add({"loss": torch.tensor(float(n))} | ({"codes_used": torch.tensor(9.0)} if n == 2 else {}))
    assert means.take() == {"loss": 1.5, "codes_used": 9.0}
    assert means.take() == {}


# ---------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Twelve updates without interruption."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train.train(*train.parse([*map(str, SHORT), "--out", str(out)]))
    return out


def test_an_update_is_adamw_on_the_clipped_gradient(tmp_path, monkeypatch):
    """Two updates by hand, against those of the loop; clipping and decay are large enough to matter."""
    shown = []
    monkeypatch.setattr(LettersStage, "preview", lambda s, path, final: shown.append(next(s.model.parameters()).clone()) or {})
    how = ("--updates", 2, "--lr", 0.01, "--clip", 0.05, "--weight-decay", 0.5, "--warmup", 2, "--ema", 0.5)
    train.train(*train.parse([*map(str, (*SMALL, *how, "--out", tmp_path / "run"))]))
    progress, found = newest_checkpoint(tmp_path / "run")
    s = LettersStage(Letters(**progress["settings"]))
    names, parameters = zip(*s.model.named_parameters())
    average = [p.detach().clone() for p in parameters]
    m, v = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for n in range(2):
        gradients = torch.autograd.grad(s.loss(n), parameters)
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        assert norm > 0.1  # so that it is clipped
        rate, keep = 0.01 * (n + 1) / 2, (2 + n) / (11 + n)
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(parameters, gradients)):
                g = g * 0.05 / norm
                m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.99 * v[i] + 0.01 * g * g
                step = m[i] / (1 - 0.9 ** (n + 1)) / ((v[i] / (1 - 0.99 ** (n + 1))).sqrt() + 1e-8)
                p.copy_(p - rate * 0.5 * p - rate * step)
                average[i] = keep * average[i] + (1 - keep) * p
    for name, p, a in zip(names, parameters, average):
        torch.testing.assert_close(found[f"train.{name}"], p.detach(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found[f"ema.{name}"], a, rtol=1e-3, atol=1e-5)
    assert torch.equal(shown[-1], found[f"ema.{names[0]}"])  # the last preview is of the averaged weights
    weights = torch.load(tmp_path / "run" / "model.pt", weights_only=True)["weights"]
    assert all(torch.equal(weights["raw"][name], found[f"train.{name}"]) for name in names)
    assert all(torch.equal(weights["ema"][name], found[f"ema.{name}"]) for name in names)
    row = train.log_rows(tmp_path / "run" / "log.csv")[-1]
    for column, kind in (("validation_loss", "raw"), ("validation_loss_ema", "ema")):
        s.model.load_state_dict(weights[kind])
        assert float(row[column]) == pytest.approx(s.validate()["validation_loss"], rel=1e-4)
    assert row["validation_loss"] != row["validation_loss_ema"]


def test_a_tiny_run_learns_and_samples(run, tmp_path):
    out = tmp_path / "run"
    code, text, err = run(
        "train",
        *TINY,
        "--multipliers",
        1,
        2,
        "--T",
        15,
        "--overfit",
        16,
        "--updates",
        80,
        "--lr",
        3e-3,
        "--warmup",
        10,
        "--out",
        out,
    )
    assert code == 0, err
    rows = list(train.csv.DictReader((out / "log.csv").open()))
    first, final = float(rows[0]["train_loss"]), float(rows[-1]["validation_loss"])
    assert first > 0.8 and final < 0.5, (first, final)
    assert "sample.py" in text
    for name in ("grid.png", "loss.png"):
        Image.open(out / name).verify()
    code, _, err = run("sample", "--run", out, "--text", "HI", "--steps", 5, "--out", tmp_path / "hi.png")
    assert code == 0, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_and_resumed_equals_undisturbed_bit_for_bit(run, undisturbed, tmp_path, monkeypatch, number):
    out = tmp_path / "run"
    update = EMA.update

    def interrupt(self, n):
        update(self, n)
        if n == 6:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(EMA, "update", interrupt)
    code, text, _ = run("train", *SHORT, "--out", out)
    assert code == 128 + number and f"--resume --out {out}" in text
    assert newest_checkpoint(out)[0]["update"] == 6
    monkeypatch.setattr(EMA, "update", update)
    code, *_ = run("train", "--stage", "letters", "--resume", "--out", out)
    assert code == 0
    (one, tensors), (two, others) = newest_checkpoint(undisturbed), newest_checkpoint(out)
    assert one["update"] == two["update"] == 12 and one["best"] == two["best"]
    assert equal_tensors(tensors, others)
    assert {r["run"] for r in train.csv.DictReader((out / "log.csv").open())} == {"1", "2"}


def test_a_signal_during_validation_still_saves_before_it_stops(run, tmp_path, monkeypatch):
    validate = LettersStage.validate

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return validate(self)

    monkeypatch.setattr(LettersStage, "validate", interrupted)
    code, *_ = run("train", *SHORT, "--validate-every", 3, "--save-every", 5, "--out", tmp_path / "run")
    assert code == 128 + signal.SIGTERM and newest_checkpoint(tmp_path / "run")[0]["update"] == 4


def contents(run):
    return {path.relative_to(run): path.read_bytes() for path in [*run.glob("*.pt"), *run.glob("checkpoint_*/*")]}


def test_a_run_is_not_overwritten_and_settings_do_not_drift(refused, undisturbed):
    before = contents(undisturbed)
    assert "--resume goes on with it" in refused("train", *SHORT, "--out", undisturbed)
    assert "--lr was" in refused("train", "--stage", "letters", "--resume", "--lr", 1, "--out", undisturbed)
    for other in ("vqgan", "ldm", "classifier"):
        assert "is one of --stage letters" in refused("train", "--stage", other, "--resume", "--out", undisturbed)
    assert contents(undisturbed) == before


def test_5_4_1_kernel_distance_during_training(run, tmp_path, monkeypatch):
    """It is the distance of two generated images a letter from the validation fonts, and following it changes no weight."""
    monkeypatch.setattr(LettersStage, "preview", lambda *arguments, **more: {})
    whole = [*SMALL[: SMALL.index("--overfit")], "--T", 5, "--updates", 4, "--preview-every", 3, "--validate-every", 4]
    rows = {}
    for n in (0, 52):
        code, _, err = run("train", *whole, "--kernel-distance", n, "--out", tmp_path / str(n))
        assert code == 0, err
        rows[n] = list(train.csv.DictReader((tmp_path / str(n) / "log.csv").open()))
    assert equal_tensors(newest_checkpoint(tmp_path / "0")[1], newest_checkpoint(tmp_path / "52")[1])
    assert not any("kernel" in name for name in rows[0][0]) and [row["update"] for row in rows[0]] == ["3", "4"]
    assert [row["update"] for row in rows[52] if row["kernel_distance"]] == ["3", "4"]

    letters, features = open_letters(), letters_features()
    model = load_model(tmp_path / "52")
    real = torch.from_numpy(letters.images[letters.split()[1]])
    fake = torch.from_numpy(generate(model, np.arange(26).repeat(2), np.arange(52), steps=5, progress=False))
    expected = kernel_distance(features(fake), features(real))
    found = [float(rows[52][-1][name]) for name in ("kernel_distance", "kernel_distance_error")]
    assert found == pytest.approx(expected, rel=1e-3)


def test_features_stay_in_float32_in_the_loop():
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = letters_features()
    with torch.autocast("cpu", torch.bfloat16):
        inside = features(images)
    assert inside.dtype == torch.float32 and torch.equal(inside, features(images))


def test_4_4_2_classifier_learns_its_images_and_resumes_bit_for_bit(run, refused, tiny_model, tmp_path, monkeypatch):
    """Sixteen letters are named surely where there is little noise; the table and the chart say how surely at every level."""
    how = ("--stage", "classifier", "--run", tiny_model, *TINY[2:], "--multipliers", 1, 2, "--overfit", 16, "--lr", 3e-3)
    how = (*how, "--warmup", 5, "--validate-every", 20, "--updates", 60)
    code, text, err = run("train", *how, "--out", tmp_path / "whole")
    assert code == 0, err
    accuracies = [float(line.split()[1]) for line in text.splitlines() if line.endswith(" %")]
    assert len(accuracies) == 11 and accuracies[0] > 90 > accuracies[-1]
    final = list(train.csv.DictReader((tmp_path / "whole" / "log.csv").open()))[-1]
    assert float(final["validation_loss"]) < 3 and float(final["validation_accuracy_ema"]) > 0.3
    assert np.asarray(Image.open(tmp_path / "whole" / "accuracy.png")).std() > 5
    classifier = load_model(tmp_path / "whole")
    assert (classifier.stage, classifier.shape, classifier.diffusion.T) == ("classifier", (3, 32, 32), 1000)

    with monkeypatch.context() as patch:
        update = EMA.update
        patch.setattr(EMA, "update", lambda ema, n: update(ema, n) or (n == 30 and os.kill(os.getpid(), signal.SIGTERM)))
        assert run("train", *how, "--out", tmp_path / "stopped")[0] == 128 + signal.SIGTERM
    assert run("train", "--stage", "classifier", "--resume", "--out", tmp_path / "stopped")[0] == 0
    assert equal_tensors(newest_checkpoint(tmp_path / "whole")[1], newest_checkpoint(tmp_path / "stopped")[1])
    error = refused("train", *how, "--run", tmp_path / "whole", "--out", tmp_path / "other")
    assert "is a classifier" in error


def test_4_4_2_the_loss_is_the_cross_entropy_at_every_t(tmp_path):
    run = str(make_tiny_model(tmp_path / "model.pt", T=4))
    settings = train.Classifier(run=run, channels=16, multipliers=(1, 1), batch=8, precision="float32", device="cpu")
    complete(settings)
    s, seen = train.ClassifierStage(settings), []
    loss = s.model.loss
    s.model.loss = lambda x, y, t, noise: seen.append(t) or loss(x, y, t, noise)
    with torch.no_grad():
        for n in range(20):
            s.loss(n)
        assert torch.cat(seen).unique().tolist() == [1, 2, 3, 4] and not torch.equal(seen[0], seen[1])
        (x, y), noise = s.examples(s.rows(0)), torch.randn((8, 3, 32, 32), generator=torch.Generator().manual_seed(0))
        t = torch.tensor([1, 2, 3, 4] * 2)
        logits = s.model.network(s.model.diffusion.q_sample(x, t, noise), t - 1)
        expected = torch.nn.functional.cross_entropy(logits, y, reduction="none")
        torch.testing.assert_close(loss(x, y, t, noise), expected)
    s.by_noise_level = lambda rows: [(1, 0.5, 0.25), (4, 1.5, 0.75)] if rows is s.validation_rows else None
    assert s.validate() == {"validation_loss": 1.0, "validation_accuracy": 0.5}


def test_not_a_number_stops_before_anything_is_saved(refused, tmp_path):
    out = tmp_path / "run"
    error = refused("train", *SHORT, "--lr", 1e30, "--warmup", 0, "--clip", 1e30, "--out", out)
    assert "no longer finite" in error
    assert not list(out.glob("checkpoint_*")) and not (out / "model.pt").exists()
    error = refused("train", *SMALL, "--updates", 1, "--lr", 1e20, "--warmup", 0, "--out", out)  # only validation can tell
    assert "no longer finite" in error and not list(out.glob("checkpoint_*")) and not (out / "model.pt").exists()
    for flag in ("--lr", "--clip", "--weight-decay"):
        assert f"{flag} nan" in refused("train", *SHORT, flag, "nan", "--out", out)
    assert "below 2^62" in refused("train", *SHORT, "--seed", 2**70, "--out", out)


def test_full_disk_keeps_the_previous_checkpoint(refused, undisturbed):
    before = contents(undisturbed)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        error = refused("train", "--stage", "letters", "--resume", "--updates", 14, "--out", undisturbed)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write" in error and "nothing was changed" in error
    assert contents(undisturbed) == before
    assert [p.name for p in undisturbed.iterdir() if p.name.startswith(".")] == []


@pytest.fixture
def copied(undisturbed, tmp_path):
    """A finished run that may be damaged."""
    return Path(shutil.copytree(undisturbed, tmp_path / "copy"))


def test_a_model_without_checkpoints_is_not_overwritten(refused, copied):
    for path in train.checkpoints(copied):
        shutil.rmtree(path)
    before = contents(copied)
    assert "already holds a model" in refused("train", *SHORT, "--out", copied)
    assert contents(copied) == before


def test_the_two_newest_checkpoints_are_kept_and_the_older_one_helps_out(run, undisturbed, copied):
    """A run whose newest checkpoint is damaged goes on from the one before, and comes to the same weights."""
    newest, older = train.checkpoints(copied)
    assert (newest.name, older.name) == ("checkpoint_00000012", "checkpoint_00000008")
    tensors = newest / "__0_0.distcp"
    for damage in (lambda: (newest / ".metadata").unlink(), lambda: tensors.write_bytes(tensors.read_bytes()[:5000])):
        damage()
        code, text, err = run("train", "--stage", "letters", "--resume", "--out", copied)
        assert code == 0, err
        assert "trying the one before" in text
        assert equal_tensors(newest_checkpoint(copied)[1], newest_checkpoint(undisturbed)[1])


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("file", [".metadata", "as bytes", "run.pt", "__0_0.distcp"])
def test_a_checkpoint_that_would_run_code_is_refused(refused, copied, monkeypatch, file):
    monkeypatch.chdir(copied)
    for path in train.checkpoints(copied):
        if file == ".metadata":
            (path / file).write_bytes(pickle.dumps(Harmful()))
        elif file == "as bytes":  # DCP would unpickle whatever stands where a tensor should
            metadata = train.Reader(path).read_metadata()
            metadata.state_dict_metadata = dict.fromkeys(metadata.state_dict_metadata, BytesStorageMetadata())
            (path / ".metadata").write_bytes(pickle.dumps(metadata))
            (path / "__0_0.distcp").write_bytes(pickle.dumps(Harmful()) * 1000)
        elif file == "run.pt":
            torch.save({"settings": Harmful()}, path / file)
        else:
            with (path / file).open("r+b") as tensors:
                torch.save(Harmful(), tensors)
    assert "can be read" in refused("train", "--stage", "letters", "--resume", "--out", copied)
    assert not (copied / "harm").exists()


def test_leftovers_of_killed_saves_go(run, copied):
    (copied / ".checkpoint_00000016").mkdir()
    (copied / ".old-checkpoint_00000004").mkdir()
    (copied / ".123-model.pt").write_bytes(b"half")
    assert run("train", "--stage", "letters", "--resume", "--out", copied)[0] == 0
    assert not list(copied.glob(".*"))


@pytest.mark.parametrize(
    "words, message",
    [
        (("--batch", 5), "an update of this run has 16 images; 1 processes x --accumulate 1 x --batch 5 are 5"),
        (("--accumulate", 3), "an update of this run has 16 images; 1 processes x --accumulate 3 x --batch 5 are 15"),
        (("--strategy", "fsdp"), "--strategy fsdp: for --stage ldm"),
    ],
)
def test_a_resumed_run_keeps_its_images_an_update(refused, copied, words, message):
    assert message in refused("train", "--stage", "letters", "--resume", "--out", copied, *words)


def test_accumulated_batches_are_one_update(run, undisturbed, tmp_path):
    """Four batches of 4 images give the losses of one of 16, and a run may change from one to the other."""
    how = ("--batch", 4, "--accumulate", 4, "--updates", 12, "--out", tmp_path / "run")
    code, text, err = run("train", *SMALL, "--save-every", 4, "--validate-every", 4, "--preview-every", 100, *how)
    assert code == 0, err
    assert "updates of 16 = 4 batches x 4 images" in text
    one, two = (list(train.csv.DictReader((out / "log.csv").open())) for out in (undisturbed, tmp_path / "run"))
    for a, b in zip(one, two):
        for column in ("train_loss", "train_grad_norm", "validation_loss"):
            assert float(a[column] or 0) == pytest.approx(float(b[column] or 0), rel=1e-4)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--data", "nowhere"), "nowhere: no such file or folder"),
        (("--resume",), "no checkpoint there to go on from"),
        (("--batch", 0), "--batch 0: must be more than 0"),
        (("--p-uncond", 2), "--p-uncond 2.0: must be between 0 and 1"),
        (("--channels", 20), "multiple of 16"),
        (("--kernel-distance", 2), "--kernel-distance 2: must be 0 (none) or at least 3"),
        (("--device", "cuda:99"), "not there on this machine"),
    ],
)
def test_bad_flags_are_one_clear_line(refused, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused("train", "--stage", "letters", "--precision", "float32", *arguments)
    assert list(tmp_path.iterdir()) == []
