"""Section 5.2 and the loop: what an update sees, the average, exact resume, and runs by command."""

import csv
import os
import pathlib
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import equal_tensors, make_tiny_model, newest_checkpoint
from PIL import Image

import ldm
import train
from data import TABLE_4_1, UserError
from ldm import load_model
from plots import draw_losses, log_rows
from train import EMA, Letters, LettersStage, Log, learning_rate, settle
from vqgan import PerceptualLoss

TINY = ("--stage", "letters", "--device", "cpu", "--precision", "float32", "--batch", 8)
TINY += ("--channels", 16, "--model", "small")
SMALL = (*TINY, "--multipliers", 1, 1, "--T", 5, "--overfit", 32)
OFTEN = ("--save-every", 4, "--validate-every", 4, "--preview-every", 100)
SHORT = (*SMALL, "--updates", 12, *OFTEN)


def stage(**changes):
    fixed = {"channels": 16, "multipliers": (1, 1), "batch": 8, "device": "cpu", "predict": "v"}
    return LettersStage(settle(Letters(**fixed, precision="float32", **changes)))


# ------------------------------------------------------------------------------------------- pieces


def test_balanced_draws_every_label_equally_often():
    s = stage(balanced=True)
    rare = enumerate((300, 30, 3, 1))
    keep = [np.flatnonzero(s.train_labels == label)[:count] for label, count in rare]
    s.train_rows = s.train_rows[np.concatenate(keep)]
    s.train_labels = s.data.labels[s.train_rows]
    rows = np.concatenate([s.rows(n) for n in range(50)])
    assert np.isin(rows, s.train_rows).all()
    assert np.bincount(s.data.labels[rows]).tolist() == [25 * s.settings.batch // 2] * 4


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


def test_two_views_mirror_half_of_the_images_and_one_is_the_default():
    """E41: a mirrored letter does not fit its label."""
    plain, flipped = stage(p_uncond=0.0), stage(p_uncond=0.0, views=2)
    mirrored = 0
    for n in range(40):
        for one, two in zip(seen_by(plain, n)["x_0"], seen_by(flipped, n)["x_0"]):
            assert torch.equal(one, two) or torch.equal(one.flip(-1), two)
            mirrored += not torch.equal(one, two)
    assert 0.3 < mirrored / 320 < 0.6  # symmetric letters hide a few


def test_validation_is_the_same_every_time_drops_no_label_and_is_in_eval_mode():
    s = stage(overfit=20)
    assert s.validate() == s.validate()
    seen = []

    def loss(x_0, y, t, noise):
        seen.append((y, t, s.model.training))
        return torch.ones(len(y))

    s.model.loss = loss
    row = train.validation(s, EMA(s.model, 0.9))
    assert row == {"validation_loss": 1, "validation_loss_ema": 1} and s.model.training
    y, t, training = zip(*seen)
    assert torch.cat(y).max() < 26 and torch.cat(t).min() == 1 and torch.cat(t).max() > 900
    assert not any(training)  # B12
    assert train.validation(s, EMA(s.model, 0.0)) == {"validation_loss": 1}  # no average, one pass


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
    """5.2: "further trained using a copy of the weight". The copy follows; nothing is trained."""
    s = stage(overfit=8)
    ema = EMA(s.model, 0.9)
    for p in s.model.parameters():
        p.data += 0.01  # as an optimiser would: now the average is elsewhere
    before, raw = s.loss(0).item(), [p.clone() for p in s.model.parameters()]
    for n in range(20):
        ema.update(n)
    assert all(torch.equal(a, b) for a, b in zip(raw, s.model.parameters()))
    assert s.loss(0).item() == before


def test_e62_an_epoch_of_small_batches_is_more_updates():
    """5.3.1 compares two models at epoch 14; the one with batch 12 had 5.3 times the updates.

    This checks the printed numbers, and no function of the project."""
    images = sum(TABLE_4_1)
    assert (images // 64, images // 12) == (308, 1647)
    assert images // 12 / (images // 64) == pytest.approx(5.3, abs=0.05)
    assert 300 * (images // 64) == 92_400  # updates of the thesis's run


def test_averaged_weights_are_really_used_under_autocast():
    """With autocast's cache, a second evaluation would see the casts of the first one's weights."""
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


def test_learning_rate_is_the_one_typed_with_warm_up_and_decay_or_constant():
    s = Letters(lr=1e-3, warmup=10, updates=110)
    rates = [learning_rate(s, n) for n in range(110)]
    assert rates[0] == pytest.approx(1e-4) and max(rates) == rates[9] == pytest.approx(1e-3)
    assert rates[60] == pytest.approx(5e-4) and 0 < rates[-1] < 2e-5
    s.constant_lr = True  # B11: the rate that was typed, until the end
    assert [learning_rate(s, n) for n in (0, 9, 60, 109)] == pytest.approx([1e-4, *[1e-3] * 3])


def test_previews_have_the_scale_that_the_thesis_chose():
    assert stage().scale == 2 and stage(p_uncond=0.0).scale == 1


def test_log_keeps_interruptions_apart(tmp_path):
    log = Log(tmp_path / "log.csv", 1, 0)
    for n in (10, 20, 30):
        log.write({"update": n, "train_loss": 1.0 / n}, 5.0)
    log = Log(tmp_path / "log.csv", 2, 20)  # resumed from update 20: the row after it goes
    log.write({"update": 30, "train_loss": 0.5, "validation_loss": 0.25}, 6.0)
    rows = log_rows(tmp_path / "log.csv")
    assert [(r["run"], r["update"]) for r in rows] == [("1", "10"), ("1", "20"), ("2", "30")]
    draw_losses(rows, tmp_path / "loss.png", "mean squared error")
    assert np.asarray(Image.open(tmp_path / "loss.png")).std() > 5


def test_the_log_has_means_over_the_updates_that_had_the_number(tmp_path):
    log, settings = Log(tmp_path / "log.csv", 1, 0), Letters()
    for n in range(4):
        log.add({"loss": torch.tensor(float(n))})
        log.add({"codes_used": torch.tensor(9.0)} if n == 2 else {})
    row = log.row(settings, 4, 0.5)
    assert (row["loss"], row["codes_used"], row["update"], row["epoch"]) == (1.5, 9.0, 4, 0.5)
    assert not {"loss", "codes_used"} & log.row(settings, 8, 1.0).keys()


@pytest.mark.parametrize("bf16, precision", [(0.5, "bf16"), (1.0, "float32"), (2.0, "float32")])
def test_a_cpu_trains_in_bf16_where_that_is_faster(monkeypatch, bf16, precision):
    monkeypatch.setattr(train.data, "convolution_seconds", lambda: (1.0, bf16))
    assert settle(Letters(device="cpu")).precision == precision


# --------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Twelve updates without interruption."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train.train(*train.parse([*map(str, SHORT), "--out", str(out)]))
    return out


def rows_of(out):
    return list(csv.DictReader((out / "log.csv").open()))


def stop_at(monkeypatch, update, number=signal.SIGTERM):
    """Send this process a signal right after an update."""
    average = EMA.update

    def interrupt(self, n):
        average(self, n)
        if n == update:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(EMA, "update", interrupt)


def by_hand(s, updates, clip, decay):
    """AdamW on clipped gradients, and the averaged weights, without the loop."""
    names, parameters = zip(*s.model.named_parameters())
    average = [p.detach().clone() for p in parameters]
    m, v = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for n in range(updates):
        gradients = torch.autograd.grad(s.loss(n), parameters)
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        assert norm > clip  # so that it is clipped
        rate, keep = 0.01 * (n + 1) / updates, (2 + n) / (11 + n)
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(parameters, gradients)):
                g = g * clip / norm
                m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.99 * v[i] + 0.01 * g * g
                step = m[i] / (1 - 0.9 ** (n + 1)) / ((v[i] / (1 - 0.99 ** (n + 1))).sqrt() + 1e-8)
                p.copy_(p - rate * decay * p - rate * step)
                average[i] = keep * average[i] + (1 - keep) * p
    return names, parameters, average


def test_a_run_of_another_version_is_one_clear_line():
    saved = vars(Letters()) | {"guide_above": 8.0}
    with pytest.raises(UserError, match="does not know: guide_above. Resume it with the version"):
        train.resumed_settings(Letters, saved, {})


def test_an_update_is_adamw_on_the_clipped_gradient(tmp_path, monkeypatch):
    """Two updates by hand, against those of the loop; clipping and decay are large."""
    shown = []

    def preview(s, path, final):
        shown.append(next(s.model.parameters()).clone())
        return {}

    monkeypatch.setattr(LettersStage, "preview", preview)
    how = ("--updates", 2, "--lr", 0.01, "--grad-clip", 0.05, "--weight-decay", 0.5, "--warmup", 2)
    how = (*SMALL, "--optimizer", "adamw", *how, "--ema", 0.5, "--out", tmp_path / "run")
    train.train(*train.parse([*map(str, how)]))
    progress, found = newest_checkpoint(tmp_path / "run")
    s = LettersStage(Letters(**progress["settings"]))
    names, parameters, average = by_hand(s, 2, clip=0.05, decay=0.5)
    for name, p, a in zip(names, parameters, average):
        torch.testing.assert_close(found[f"train.{name}"], p.detach(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found[f"ema.{name}"], a, rtol=1e-3, atol=1e-5)
    assert torch.equal(shown[-1], found[f"ema.{names[0]}"])  # previews are of averaged weights
    weights = torch.load(tmp_path / "run" / "model.pt", weights_only=True)["weights"]
    assert all(torch.equal(weights["raw"][name], found[f"train.{name}"]) for name in names)
    assert all(torch.equal(weights["ema"][name], found[f"ema.{name}"]) for name in names)
    row = rows_of(tmp_path / "run")[-1]
    for column, kind in (("validation_loss", "raw"), ("validation_loss_ema", "ema")):
        s.model.load_state_dict(weights[kind])
        assert float(row[column]) == pytest.approx(s.validate()["validation_loss"], rel=1e-4)
    assert row["validation_loss"] != row["validation_loss_ema"]


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (8, 8)])
def test_orthogonal_keeps_the_directions_and_makes_them_equally_long(shape):
    m = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, before, v = torch.linalg.svd(m, full_matrices=False)
    inside = u.T @ train.orthogonal(m) @ v.T  # diagonal: the same singular vectors
    after = inside.diagonal()
    assert before.max() / before.min() > 3 and after.min() > 0.6 and after.max() < 1.3
    assert (inside - after.diag()).abs().max() < 0.05  # bf16
    assert train.orthogonal(m.double()).dtype == torch.float64


def test_muon_moves_matrices_by_their_orthogonal_momentum_and_the_rest_by_adamw():
    s = stage(optimizer="muon", lr=0.01, weight_decay=0.5)
    (player,) = s.players()
    player.parameters = list(s.model.parameters())
    optimizer = train.make_optimizer(player, s.settings)
    named = dict(s.model.named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    others = [p for name, p in named.items() if p.ndim < 2 or "label_emb" in name]
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in others]
    name = "input_blocks.1.0.in_layers.2.weight"
    name = next(n for n in named if n.endswith(name))
    for p in named.values():
        p.grad = torch.ones_like(p)
    draw = torch.Generator().manual_seed(0)
    gradients = torch.randn((2, *named[name].shape), generator=draw)
    for gradient in gradients:
        named[name].grad = gradient.clone()
        optimizer.step()
    momentum, w = torch.zeros_like(gradients[0]), before[name]
    for gradient in gradients:
        momentum = 0.95 * momentum + gradient
        step = train.orthogonal((gradient + 0.95 * momentum).flatten(1)).view_as(w)
        w = w * (1 - 0.01 * 0.5) - 0.01 * max(w.flatten(1).shape) ** 0.5 * step
    torch.testing.assert_close(named[name].detach(), w)
    bias = next(n for n in named if n.endswith("input_blocks.1.0.in_layers.2.bias"))
    by_adamw = before[bias] * (1 - 0.005) - 0.01  # the first step of AdamW has length lr
    by_adamw = by_adamw * (1 - 0.005) - 0.01
    torch.testing.assert_close(named[bias].detach(), by_adamw, rtol=1e-4, atol=1e-6)
    optimizer.zero_grad()
    assert all(p.grad is None for p in named.values())


def test_a_run_with_muon_resumes_bit_for_bit(run, tmp_path):
    how = (*SMALL, "--optimizer", "muon", "--save-every", 2, "--constant-lr")
    for name, updates in (("whole", 4), ("parts", 2)):
        assert run("train", *how, "--updates", updates, "--out", tmp_path / name)[0] == 0
    more = ("--stage", "letters", "--resume", "--updates", 4, "--out", tmp_path / "parts")
    assert run("train", *more)[0] == 0
    one, two = (newest_checkpoint(tmp_path / name)[1] for name in ("whole", "parts"))
    assert one.keys() == two.keys() and any(name.endswith(".momentum") for name in one)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_tiny_run_learns_and_samples(run, tmp_path):
    out = tmp_path / "run"
    how = ("--multipliers", 1, 2, "--T", 15, "--overfit", 8, "--updates", 80, "--lr", 3e-3)
    code, text, err = run("train", *TINY, *how, "--warmup", 10, "--out", out)
    assert code == 0, err
    first, final = float(rows_of(out)[0]["train_loss"]), float(rows_of(out)[-1]["validation_loss"])
    assert first > 0.7 and final < 0.55, (first, final)
    assert "sample.py" in text
    for name in ("grid.png", "loss.png"):
        Image.open(out / name).verify()
    word = ("--text", "HI", "--steps", 5, "--out", tmp_path / "hi.png")
    assert run("sample", "--run", out, *word)[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_and_resumed_equals_undisturbed_bit_for_bit(
    run, undisturbed, tmp_path, monkeypatch, number
):
    """--resume is typed in another folder: paths are kept whole (A13)."""
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        stop_at(patch, 6, number)
        code, text, _ = run("train", *SHORT, "--out", "run")
    assert code == 128 + number and "add --resume" in text
    assert newest_checkpoint(tmp_path / "run")[0]["update"] == 6
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert run("train", "--stage", "letters", "--resume", "--out", "../run")[0] == 0
    (one, tensors), (two, others) = (newest_checkpoint(p) for p in (undisturbed, tmp_path / "run"))
    assert one["update"] == two["update"] == 12 and one["best"] == two["best"]
    assert equal_tensors(tensors, others)
    assert {r["run"] for r in rows_of(tmp_path / "run")} == {"1", "2"}


def test_a_signal_in_the_last_update_leaves_a_finished_run(run, undisturbed, tmp_path, monkeypatch):
    """A8: the last validation and the grid are made; --resume says that the run is finished."""
    out = tmp_path / "my run"  # A20: the printed command can be pasted
    with monkeypatch.context() as patch:
        stop_at(patch, 12)
        code, text, _ = run("train", *SHORT, "--out", out)
    assert code == 0 and "grid.png shows" in text and (out / "grid.png").exists()
    assert f"--run '{out}' --text HELLO" in text
    assert rows_of(out)[-1]["validation_loss_ema"]
    assert equal_tensors(newest_checkpoint(out)[1], newest_checkpoint(undisturbed)[1])
    code, text, _ = run("train", "--stage", "letters", "--resume", "--out", out)
    assert code == 0 and "finished after 12 updates; --updates N trains it longer" in text


def test_a_signal_during_validation_still_saves_before_it_stops(run, tmp_path, monkeypatch):
    validate = LettersStage.validate

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return validate(self)

    monkeypatch.setattr(LettersStage, "validate", interrupted)
    how = (*SHORT, "--validate-every", 3, "--save-every", 5, "--out", tmp_path / "run")
    assert run("train", *how)[0] == 128 + signal.SIGTERM
    assert newest_checkpoint(tmp_path / "run")[0]["update"] == 4


def contents(run):
    return {path.relative_to(run): path.read_bytes() for path in run.glob("*.pt")}


def test_a_run_is_not_overwritten_and_settings_do_not_drift(refused, undisturbed, tmp_path):
    """A18: nor is a run that has not saved yet."""
    before, resume = contents(undisturbed), ("--resume", "--out", undisturbed)
    assert "--resume continues it" in refused("train", *SHORT, "--out", undisturbed)
    assert "--lr was" in refused("train", "--stage", "letters", *resume, "--lr", 1)
    assert "--batch was 8" in refused("train", "--stage", "letters", *resume, "--batch", 5)
    fsdp = refused("train", "--stage", "letters", *resume, "--strategy", "fsdp")
    assert "--strategy fsdp: only for --stage ldm" in fsdp
    for other in ("vqgan", "ldm", "classifier"):
        assert "has --stage letters" in refused("train", "--stage", other, *resume)
    assert contents(undisturbed) == before
    (tmp_path / "log.csv").write_text("run,update\n")  # another run has just begun
    error = refused("train", *SHORT, "--out", tmp_path)
    assert "has not saved yet" in error and (tmp_path / "log.csv").read_text() == "run,update\n"


def test_the_same_images_at_another_path_are_the_same_set(run, refused, tmp_path, monkeypatch):
    """A13: the data folder may move; other images are refused."""
    for label, name in enumerate(("one", "two")):
        (tmp_path / "old" / name).mkdir(parents=True)
        for i in range(20):
            Image.new("L", (32, 32), 100 * label + i).save(tmp_path / "old" / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    how = (*SHORT, "--data", "old", "--overfit", 0, "--out", "run")
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        assert run("train", *how)[0] == 128 + signal.SIGTERM
    shutil.move("old", "new")
    shutil.rmtree("old.packed32")
    assert "old: no such file" in refused("train", *how, "--resume")
    shutil.copytree("new", "other")
    (tmp_path / "other" / "one" / "7.png").unlink()
    error = refused("train", *how, "--resume", "--data", "other")
    assert "not the images with which this run began" in error
    assert run("train", *how, "--resume", "--data", "new")[0] == 0


def test_4_4_2_classifier_learns_its_images(run, refused, tiny_model, tmp_path):
    """Eight letters are named surely at little noise; a table says how surely at every level."""
    how = ("--stage", "classifier", "--run", tiny_model, *TINY[2:], "--multipliers", 1, 2)
    more = ("--overfit", 8, "--lr", 3e-3, "--warmup", 5, "--validate-every", 20, "--updates", 60)
    code, text, err = run("train", *how, *more, "--out", tmp_path / "run")
    assert code == 0, err
    accuracies = [line.split()[1] for line in text.splitlines() if line.endswith("%")]
    accuracies = [float(text.rstrip("%")) for text in accuracies]
    assert len(accuracies) == 11 and accuracies[0] > 90 > accuracies[-1]
    final = rows_of(tmp_path / "run")[-1]
    assert float(final["validation_loss"]) < 3 and float(final["validation_accuracy_ema"]) > 0.3
    assert np.asarray(Image.open(tmp_path / "run" / "accuracy.png")).std() > 5
    classifier = load_model(tmp_path / "run")
    assert (classifier.stage, classifier.shape) == ("classifier", (3, 32, 32))
    assert classifier.diffusion.T == 1000
    error = refused("train", *how, "--run", tmp_path / "run", "--out", tmp_path / "other")
    assert "a classifier" in error


def test_4_4_2_a_classifier_resumes_bit_for_bit(run, tiny_model, tmp_path, monkeypatch):
    how = ("--stage", "classifier", "--run", tiny_model, *TINY[2:], "--multipliers", 1, 1)
    how += ("--overfit", 8, "--updates", 4)
    assert run("train", *how, "--out", tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert run("train", *how, "--out", tmp_path / "stopped")[0] == 128 + signal.SIGTERM
    resume = ("--stage", "classifier", "--resume", "--out", tmp_path / "stopped")
    assert run("train", *resume)[0] == 0
    one, two = (newest_checkpoint(tmp_path / name)[1] for name in ("whole", "stopped"))
    assert equal_tensors(one, two)


def test_4_4_2_the_loss_is_the_cross_entropy_at_every_t(tmp_path):
    run = str(make_tiny_model(tmp_path / "model.pt", T=4))
    tiny = {"run": run, "channels": 16, "multipliers": (1, 1), "batch": 8, "device": "cpu"}
    s = train.ClassifierStage(train.new_settings(train.Classifier, tiny | {"precision": "float32"}))
    seen, loss = [], s.model.loss
    s.model.loss = lambda x, y, t, noise: seen.append((t, y)) or loss(x, y, t, noise)
    with torch.no_grad():
        for n in range(20):
            s.loss(n)
        t, y = zip(*seen)
        assert torch.cat(t).unique().tolist() == [1, 2, 3, 4] and not torch.equal(t[0], t[1])
        assert torch.cat(y).max() < 26  # no label is dropped
        x, y = s.examples(s.rows(0))
        noise = torch.randn((8, 3, 32, 32), generator=torch.Generator().manual_seed(0))
        t = torch.tensor([1, 2, 3, 4] * 2)
        logits = s.model.network(s.model.diffusion.q_sample(x, t, noise), t - 1)
        expected = torch.nn.functional.cross_entropy(logits, y, reduction="none")
        torch.testing.assert_close(loss(x, y, t, noise), expected)
    table = [(1, 0.5, 0.25), (4, 1.5, 0.75)]
    s.by_noise_level = lambda rows: table if rows is s.validation_rows else None
    assert s.validate() == {"validation_loss": 1.0, "validation_accuracy": 0.5}


def test_the_classifier_of_the_shipped_model_trains_on_the_embedded_letters(monkeypatch, tmp_path):
    """Its file was written when None meant the embedded letters; so do published models."""
    monkeypatch.chdir(tmp_path)
    assert train.new_settings(train.Classifier, {"device": "cpu"}).data == "letters"


def test_the_perceptual_loss_is_loaded_once(tmp_path, monkeypatch):
    """B12; without its files the weight is 0."""
    loads = []

    def load(files):
        loads.append(files)
        if files is None:
            raise UserError("vgg.pth is not there")
        return PerceptualLoss()

    monkeypatch.setattr(ldm, "load_perceptual", load)
    tiny = {"data": "letters", "size": 32, "channels": 8, "device": "cpu", "model": "small"}
    for files, weight in (("folder", 1.0), (None, 0.0)):
        settings = train.new_settings(train.FirstStage, tiny | {"perceptual_files": files})
        stage = train.AutoencoderStage(settings)
        assert settings.perceptual == weight and (stage.perceptual is not None) == bool(weight)
    assert loads == ["folder", None]


def test_not_a_number_stops_before_anything_is_saved(refused, tmp_path):
    """In the second run only the validation can tell."""
    for name, how in (("a", ("--grad-clip", 1e30)), ("b", ("--updates", 1))):
        out = tmp_path / name
        error = refused("train", *SHORT, "--lr", 1e30, "--warmup", 0, *how, "--out", out)
        assert "is not finite at update" in error and not list(out.glob("*.pt"))


@pytest.fixture
def copied(undisturbed, tmp_path):
    """A run at its end that may be damaged. It may go on for two updates."""
    return Path(shutil.copytree(undisturbed, tmp_path / "copy"))


def test_full_disk_keeps_the_previous_checkpoint(refused, copied):
    before = contents(copied)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        resume = ("--resume", "--updates", 14, "--out", copied)
        error = refused("train", "--stage", "letters", *resume)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write" in error and "nothing was changed" in error
    assert contents(copied) == before
    assert [p.name for p in copied.iterdir() if p.name.startswith(".")] == []


def test_a_model_without_checkpoints_is_not_overwritten(refused, copied):
    for path in train.checkpoints(copied):
        path.unlink()
    before = contents(copied)
    assert "holds a run" in refused("train", *SHORT, "--out", copied)
    assert contents(copied) == before


def test_the_two_newest_checkpoints_are_kept_and_the_older_one_helps_out(run, undisturbed, copied):
    """A run whose newest checkpoint is damaged goes on from the one before, to the same weights."""
    newest, older = train.checkpoints(copied)
    assert (newest.name, older.name) == ("checkpoint_00000012.pt", "checkpoint_00000008.pt")
    newest.write_bytes(newest.read_bytes()[:5000])
    (copied / ".123-model.pt").write_bytes(b"half written by a killed process")
    code, text, err = run("train", "--stage", "letters", "--resume", "--out", copied)
    assert code == 0, err
    assert "trying the one before" in text and not list(copied.glob(".*"))
    assert equal_tensors(newest_checkpoint(copied)[1], newest_checkpoint(undisturbed)[1])


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_a_checkpoint_that_would_run_code_is_refused(refused, copied, monkeypatch):
    monkeypatch.chdir(copied)
    for path in train.checkpoints(copied):
        torch.save(torch.load(path, weights_only=True) | {"update": Harmful()}, path)
    error = refused("train", "--stage", "letters", "--resume", "--out", copied)
    assert "no checkpoint that can be read" in error and not (copied / "harm").exists()


def test_a_checkpoint_holds_only_tensors_and_plain_values(undisturbed):
    """A1: no path and no class of another library, whose name may change with Python."""
    content, tensors = newest_checkpoint(undisturbed)
    assert all(type(value) is torch.Tensor for value in tensors.values())
    plain = [*content.values(), *content["settings"].values()]
    kinds = (int, float, str, bool, tuple, list, dict, type(None))
    assert all(type(value) in kinds for value in plain)
    assert content["held_out"] and {type(row) for row in content["held_out"]} == {int}
    assert not any(isinstance(value, pathlib.PurePath) for value in plain)
    assert (
        torch.serialization.get_unsafe_globals_in_checkpoint(train.checkpoints(undisturbed)[0])
        == []
    )


def test_accumulated_parts_are_one_update(run, undisturbed, tmp_path):
    """Four parts of 2 images give the losses of a batch of 8."""
    how = (*SHORT, "--accumulate", 4, "--out", tmp_path / "run")
    code, text, err = run("train", *how)
    assert code == 0, err
    assert "12 updates of 8 images, 4 parts by 1 processes" in text
    for a, b in zip(rows_of(undisturbed), rows_of(tmp_path / "run")):
        for column in ("train_loss", "train_grad_norm", "validation_loss"):
            assert float(a[column] or 0) == pytest.approx(float(b[column] or 0), rel=1e-4)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--data", "nowhere"), "nowhere: no such file or folder"),
        (("--resume",), "no checkpoint that can be read"),
        (("--batch", 0), "--batch 0: must be more than 0"),
        (("--batch", 30, "--accumulate", 4), "must be a multiple of 1 processes x --accumulate 4"),
        (("--p-uncond", 2), "--p-uncond 2.0: must be at most 1"),
        (("--lr", "nan"), "--lr nan: must be more than 0"),
        (("--weight-decay", "inf"), "--weight-decay inf: must be at least 0"),
        (("--seed", 2**70), f"--seed {2**70}: must be below {2**62}"),
        (("--channels", 20), "multiple of 16"),
        (("--device", "cuda:99"), "not there on this machine"),
    ],
)
def test_bad_flags_are_one_clear_line(refused, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused("train", "--stage", "letters", "--precision", "float32", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_help_shows_the_value_of_every_setting_of_both_sizes(run):
    code, text, _ = run("train", "--stage", "ldm", "--help")
    text = " ".join(text.split())
    for words in ("(default 6.4e-05; small model 0.002)", "(default 88000; small model 3600)"):
        assert code == 0 and words in text


# ----------------------------------------------------- faults that were found by trying the product


def test_every_image_has_noise_of_its_own_and_flips_and_drops_are_independent():
    noise = seen_by(stage(), 0)["noise"]
    assert not torch.allclose(noise[0], noise[1])
    flipping, plain = stage(p_uncond=0.5, views=2), stage(p_uncond=0.5)
    pairs = [(seen_by(flipping, n), seen_by(plain, n)) for n in range(60)]
    flipped = torch.cat([(a["x_0"] != b["x_0"]).flatten(1).any(1) for a, b in pairs]).double()
    dropped = torch.cat([a["y"] == 26 for a, _ in pairs]).double()
    assert abs(torch.corrcoef(torch.stack([flipped, dropped]))[0, 1]) < 0.2


def test_a14_a_preview_has_at_most_forty_labels(tmp_path, monkeypatch):
    s = stage()
    s.classes = [f"class {i}" for i in range(150)]
    asked = []

    def draw(model, columns, labels, **how):
        asked.extend(labels)
        return np.zeros((len(labels) + 1, columns, 32, 32, 3), np.uint8)

    monkeypatch.setattr(train, "images_by_label", draw)
    s.preview(tmp_path / "grid.png", final=True)
    assert len(asked) == 40 and asked[0] < 4 and asked[-1] > 145
    assert Image.open(tmp_path / "grid.png").height < 2 * 41 * 34 + 10


@pytest.mark.parametrize(
    "device, memory, speed, size, line",
    [
        ("cpu", 0, 1.0, "small", "no NVIDIA or AMD GPU here; its 2,500 updates take about 42 min."),
        ("mps", 0, 0.1, "small", "no NVIDIA or AMD GPU here; its 2,500 updates take about 4 min."),
        (
            "cuda",
            4,
            0.05,
            "small",
            "does not fit into this GPU; its 2,500 updates take about 2 min.",
        ),
        ("cuda", 24, 5.0, "small", "the thesis's would take 28 hours here; its 2,500"),
        ("cuda:0", 24, 0.9, "thesis", "it fits into this GPU; its 20,000 updates take about 5.0 h"),
        ("cuda:1", 80, 0.2, "thesis", "it fits into this GPU; its 20,000 updates take about 1.1 h"),
    ],
)
def test_the_thesis_s_size_if_it_fits_and_ends_within_a_day(
    monkeypatch, capsys, device, memory, speed, size, line
):
    def seconds(name, settings):
        if memory * 2**30 < 10 * 2**20 * settings.batch:  # as if an image needed 10 MiB
            raise torch.OutOfMemoryError("CUDA out of memory")
        return speed

    monkeypatch.setattr(train.data, "check_device", lambda device: device)
    monkeypatch.setattr(train, "settle", lambda settings: settings)
    if device in ("cpu", "mps"):
        monkeypatch.setattr(train, "seconds_per_update", lambda name, settings: speed)
    else:
        monkeypatch.setattr(train, "seconds_per_update", seconds)
    assert train.choose_size("letters", {"device": device}) == size
    out = capsys.readouterr().out
    assert out.startswith(f"--model {size}: ") and line in out and out.count("\n") == 1


def test_a_gpu_that_holds_neither_size_is_out_of_memory(monkeypatch):
    def seconds(name, settings):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train.data, "check_device", lambda device: device)
    monkeypatch.setattr(train, "settle", lambda settings: settings)
    monkeypatch.setattr(train, "seconds_per_update", seconds)
    with pytest.raises(torch.OutOfMemoryError):
        train.choose_size("letters", {"device": "cuda"})


def test_the_chosen_run_is_that_of_the_size_typed_and_its_time_is_measured(
    tmp_path, monkeypatch, capsys
):
    """The updates that are timed leave no trace: same weights, and nothing is printed twice."""
    seen, measure = [], train.seconds_per_update
    monkeypatch.setattr(
        train, "seconds_per_update", lambda *a: seen.append(measure(*a)) or seen[-1]
    )
    tiny = {"device": "cpu", "precision": "float32", "channels": 16, "multipliers": (1, 1)}
    tiny |= {"updates": 2, "batch": 4, "overfit": 27, "T": 2}
    lines = {}
    for size in ("auto", "small"):
        train.train("letters", tiny | {"model": size, "out": str(tmp_path / size)}, resume=False)
        lines[size] = capsys.readouterr().out.replace(f"/{size}", "").splitlines()
    assert len(seen) == 1 and 0 < seen[0] < 60
    assert lines["auto"][0].startswith("--model small: ") and lines["auto"][1:] == lines["small"]
    one, two = (newest_checkpoint(tmp_path / size)[1] for size in ("auto", "small"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a5_latents_that_predict_eps_refuse_the_cosine_schedule(refused, tmp_path):
    how = ("--stage", "ldm", "--first-stage", tmp_path / "x.pt", "--schedule", "cosine")
    assert "latents need --predict v" in refused("train", *how, "--predict", "eps")


def test_the_thesis_and_the_published_values_are_the_defaults():
    """4.4.3, 4.4.5, 4.5, 5.2; the discriminator's and the code-book's as published."""
    letters, latent, first = Letters(), train.Latent(), train.FirstStage()
    assert (letters.p_uncond, latent.p_uncond) == (0.2, 0.2)
    assert (letters.T, letters.schedule, letters.predict, letters.batch) == (
        1000,
        "linear",
        "eps",
        512,
    )
    assert (latent.T, latent.schedule, latent.predict) == (1000, "sqrt_linear", "eps")
    assert (latent.lr, latent.ema, latent.updates, latent.batch) == (6.4e-5, 0.9999, 88_000, 64)
    assert (latent.channels, latent.multipliers, latent.context_channels) == (256, (1, 2, 4), 512)
    assert (first.beta, first.kl_weight, first.adaptive, first.released) == (
        0.25,
        1e-4,
        True,
        False,
    )
    assert (first.codes, first.z_channels, first.adversarial_loss) == (16384, 4, "hinge")
    assert (first.disc_layers, first.disc_channels, first.adversarial) == (2, 64, 0.6)


def test_best_is_chosen_by_the_averaged_weights(tmp_path, monkeypatch):
    """Averaged losses 3, 1, 2 beside raw ones of 1, 2, 3: the best is the second."""
    losses = iter([(1.0, 3.0), (2.0, 1.0), (3.0, 2.0)])

    def validation(stage, ema):
        return dict(zip(("validation_loss", "validation_loss_ema"), next(losses)))

    monkeypatch.setattr(train, "validation", validation)
    monkeypatch.setattr(LettersStage, "best_from", 1)
    how = (*SHORT[:-4], "--validate-every", 4, "--out", tmp_path)
    monkeypatch.setattr(train, "claim", lambda out, run: None)
    train.train(*train.parse([str(word) for word in how]))
    assert load_model(tmp_path / "best.pt").update == 8


def test_5_8_the_other_way_of_conditioning_trains_samples_and_draws(run, tmp_path):
    """4.4.5: cross-attention to one token, instead of a sum with the time embedding."""
    how = (*SMALL, "--channels", 32, "--condition", "attention", "--updates", 2)
    code, _, err = run("train", *how, "--out", tmp_path / "run")
    assert code == 0, err
    model = load_model(tmp_path / "run")
    assert not hasattr(model.unet, "label_emb") and model.context.weight.shape == (27, 128)
    for p in model.parameters():
        p.data += 0.05
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        a, b = (model.eps(x, 3, torch.tensor([y])) for y in (0, 1))
    assert not torch.allclose(a, b)
    word = ("--text", "HI", "--steps", 2, "--out", tmp_path / "hi.png")
    assert run("sample", "--run", tmp_path / "run", *word)[0] == 0


def test_e68_the_split_is_stored_and_a_resumed_run_keeps_it(
    run, undisturbed, tmp_path, monkeypatch
):
    """Even if another version of the code would divide the set in another way."""
    split = torch.load(undisturbed / "model.pt", weights_only=True)["split"]
    s = stage()
    assert split == {"data": s.data.fingerprint(), "held_out": s.data.split()[1].tolist()}
    shutil.copytree(undisturbed, tmp_path / "run")
    monkeypatch.setattr(train.data.ImageSet, "split", lambda self: (np.arange(5), np.arange(5, 9)))
    monkeypatch.setattr(train, "loop", lambda stage, *a: seen.append(stage) or 0)
    seen = []
    code, _, err = run(
        "train", "--stage", "letters", "--resume", "--updates", 13, "--out", tmp_path / "run"
    )
    assert code == 0, err
    assert seen[0].held_out.tolist() == split["held_out"]


def test_a2_no_file_call_that_windows_forbids(run, tmp_path, monkeypatch):
    """Windows flushes only files that are open to write. It neither renames nor removes a file that
    is open or mapped. A folder is packed, trained on, resumed, compared, and packed again."""
    proc = Path("/proc/self")
    if not proc.exists():
        pytest.skip("the simulation reads /proc")

    def refuse_open(*paths):
        held = [os.path.realpath(link) for link in (proc / "fd").iterdir()]
        held += [line.split()[-1] for line in (proc / "maps").read_text().splitlines()]
        for path in map(os.path.realpath, paths):
            if any(name == path or name.startswith(path + os.sep) for name in held):
                raise PermissionError(13, "in use by another process", path)

    def wrapped(function, count):
        return lambda *paths, **how: refuse_open(*paths[:count]) or function(*paths, **how)

    fsync = os.fsync

    def flush(number):
        flags = (proc / "fdinfo" / str(number)).read_text().split("flags:")[1].split()[0]
        if int(flags, 8) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        fsync(number)

    monkeypatch.setattr(os, "fsync", flush)
    for module, name, count in (
        (os, "replace", 2),
        (os, "unlink", 1),
        (shutil, "rmtree", 1),
        (Path, "unlink", 1),
    ):
        monkeypatch.setattr(module, name, wrapped(getattr(module, name), count))
    with (tmp_path / "file").open("w") as file, pytest.raises(PermissionError):
        os.replace(tmp_path / "file", tmp_path / "other")
    with (tmp_path / "file").open() as file, pytest.raises(OSError, match="Bad file descriptor"):
        os.fsync(file.fileno())
    g = np.random.default_rng(0)
    for i in range(12):
        folder = tmp_path / "set" / "AB"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(g.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i}.png")
    tiny = (*TINY, "--multipliers", 1, 1, "--T", 2, "--data", tmp_path / "set", "--save-every", 1)
    commands = [("train", *tiny, "--updates", 3, "--out", tmp_path / "run")]
    commands += [("train", *TINY[:2], "--resume", "--updates", 4, "--out", tmp_path / "run")]
    commands += [("sample", "--run", tmp_path / "run", "--per-label", 2, "--steps", 1)]
    commands[-1] += ("--out", tmp_path / "many")
    commands += [("fid", "--real", tmp_path / "set", "--fake", tmp_path / "many", "--size", 32)]
    commands[-1] += ("--features", "paintings", "--out", tmp_path / "evaluation")
    for command in commands:
        code, _, err = run(*command)
        assert code == 0, err
    Image.new("RGB", (32, 32)).save(tmp_path / "set" / "A" / "new.png")  # so it is packed again
    code, _, err = run("train", *tiny, "--updates", 1, "--out", tmp_path / "run_2")
    assert code == 0, err


def test_the_log_has_the_epoch_and_the_rate_of_its_update(undisturbed):
    s, row = Letters(**newest_checkpoint(undisturbed)[0]["settings"]), rows_of(undisturbed)[-1]
    assert float(row["epoch"]) == 12 * 8 / 32  # updates, images per update, images
    rate = learning_rate(s, 11)
    assert float(row["lr"]) == pytest.approx(rate, rel=1e-5) and rate > 0


def test_the_seed_decides_weights_images_and_noise():
    one, two = (stage(seed=seed, balanced=True) for seed in (0, 1))
    assert not torch.equal(*(next(s.model.parameters()) for s in (one, two)))
    assert set(one.rows(0)) != set(two.rows(0))
    a, b = seen_by(one, 0), seen_by(two, 0)
    assert not any(torch.equal(a[name], b[name]) for name in ("t", "noise", "x_0"))
    one.settings.balanced = two.settings.balanced = False
    assert set(one.rows(0)) != set(two.rows(0))


def test_a_preview_has_the_scale_of_its_stage_and_fewer_steps_before_the_end(tmp_path, monkeypatch):
    asked = []

    def draw(model, columns, labels, **how):
        asked.append((columns, how["scale"], how["steps"]))
        return np.zeros((len(labels) + 1, columns, 32, 32, 3), np.uint8)

    monkeypatch.setattr(train, "images_by_label", draw)
    for p_uncond, T, final in ((0.2, 1000, False), (0.2, 1000, True), (0.0, 5, True)):
        stage(p_uncond=p_uncond, T=T).preview(tmp_path / "grid.png", final)
    assert asked == [(4, 2.0, 20), (6, 2.0, 50), (6, 1.0, 5)]
