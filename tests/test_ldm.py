"""Sections 3.6, 4.4.4, 4.4.7 and 4.5: the latent model, its stage in train.py, published files, and what sample.py draws."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import equal_tensors, lightning_file, newest_checkpoint
from PIL import Image

import train
from data import COLOURS, UserError, open_paintings, to_tensor
from ddpm import SCHEDULES, drop_labels
from fid import mean_colour_distances, variety
from ldm import LatentDiffusion, PixelDiffusion, build_first_stage, build_latent, load_model, save_model
from sample import denoise, generate, images_by_label
from train import (
    EMA,
    SIZES,
    Classifier,
    ClassifierStage,
    FirstStage,
    Latent,
    LatentStage,
    checkpoint_activations,
    complete,
    encoded,
    first_stage_for,
)
from unet import latent_unet
from vqgan import VQGAN, Codebook

FIRST = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "attention_levels": (), "z_channels": 4, "groups": 2}
FIRST |= {"bottleneck": "vq", "codes": 16, "beta": 0.25, "released": False, "size": 16, "quantise_from": 0, "updates": 1}
TINY = {"channels": 32, "multipliers": (1, 2), "blocks": 1, "attention_levels": None, "groups": 2, "context_channels": 12}
TINY |= {"schedule": "sqrt_linear", "T": 1000, "predict": "eps", "latent_scale": 0.5, "size": 16, "p_uncond": 0.2}
TINY |= {"first_stage_settings": FIRST}
COLOUR_NAMES = list(COLOURS)


def stir(module, seed=0):
    """Nothing stays zero, so that every path matters."""
    torch.manual_seed(seed)
    for p in module.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return module


def tiny(**changes):
    torch.manual_seed(0)
    return stir(build_latent(TINY | changes, COLOUR_NAMES)).eval()


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def equal_states(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------------- the model


def test_the_loss_of_v_is_the_squared_error_of_v():
    model = tiny(predict="v")
    z, noise, y, t = (
        randn(3, *model.shape),
        randn(3, *model.shape, seed=1),
        torch.tensor([0, 3, 8]),
        torch.tensor([1, 400, 990]),
    )
    a = model.diffusion.alpha_bar[t].float().view(3, 1, 1, 1)
    with torch.no_grad():
        v = model.unet(a.sqrt() * z + (1 - a).sqrt() * noise, t - 1, **model.condition(y))
        target = a.sqrt() * noise - (1 - a).sqrt() * z
        torch.testing.assert_close(model.loss(z, y, t, noise), (v - target).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-5)


def test_decoded_pictures_stay_in_range():
    far = 9 * randn(2, 3, 32, 32)
    letters = PixelDiffusion(torch.nn.Identity(), SCHEDULES["linear"](), ["A"], (3, 32, 32))
    assert torch.equal(letters.decode(far), far.clamp(-1, 1))
    model = tiny()
    z = 50 * randn(1, *model.shape)
    torch.testing.assert_close(model.decode(z), model.first_stage.decode(z / 0.5).clamp(-1, 1))


def test_latent_model_has_the_thesis_shapes():
    """4.5.1: 4 x 32 x 32 latents of 256 x 256 images, a 9 x 512 label table, sqrt(beta) linear from 0.0015 to 0.0195."""
    settings = TINY | SIZES[Latent]["thesis"] | {"attention_levels": None, "size": 256}
    settings["first_stage_settings"] = FIRST | SIZES[FirstStage]["thesis"]
    with torch.device("meta"):
        model = build_latent(settings, COLOUR_NAMES)
    assert model.shape == (4, 32, 32) and model.context.weight.shape == (9, 512) and model.zero_label == 8
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 394_984_196 + 9 * 512
    beta = SCHEDULES["sqrt_linear"]()
    assert (beta[0].item(), beta[-1].item()) == (pytest.approx(0.0015), pytest.approx(0.0195))


def test_output_depends_on_the_label_and_on_each_of_three_tokens():
    model, x = tiny(), randn(1, 4, 8, 8)
    with torch.no_grad():
        one = [model.eps(x, 500, torch.tensor([label])) for label in range(9)]
        three = model.eps(x, 500, torch.tensor([[0, 1, 2]]))
        others = [model.eps(x, 500, torch.tensor([tokens])) for tokens in ([8, 1, 2], [0, 8, 2], [0, 1, 8])]
    assert all((a - b).abs().max() > 1e-4 for i, a in enumerate(one) for b in one[:i])
    assert all((three - other).abs().max() > 1e-4 for other in others)
    torch.testing.assert_close(model.eps(x, 500, torch.tensor([[3]])), one[3])  # (B, 1) is (B,)


def test_labels_of_an_image_are_dropped_together():
    y = torch.arange(6).view(2, 3)
    assert drop_labels(y, 8, 0.5, torch.tensor([0.4, 0.6])).tolist() == [[8, 8, 8], [3, 4, 5]]


def test_images_of_several_labels_can_be_generated():
    images = generate(tiny(), np.array([[0, 1], [2, 3]]), [0, 1], steps=2, progress=False)
    assert images.shape == (2, 16, 16, 3)


def test_first_stage_is_frozen_and_stays_in_eval_mode():
    model = tiny().train()
    assert model.unet.training and not any(module.training for module in model.first_stage.modules())
    assert not any(p.requires_grad for p in model.first_stage.parameters())


def test_e54_latents_are_scaled_and_quantised_by_the_decoder_alone():
    model, x = tiny(), randn(10, 3, 16, 16).clamp(-1, 1)
    z = model.encode(x)
    first = model.first_stage
    with torch.no_grad():
        torch.testing.assert_close(z, 0.5 * first.encode(x))
        assert (first.quantize.project(z / 0.5) - z / 0.5).abs().max() > 0.01
        torch.testing.assert_close(model.decode(z), first.decode(first.encode(x)).clamp(-1, 1))
    assert model.decode(torch.zeros(1, 4, 24, 24)).shape == (1, 3, 48, 48)


# ---------------------------------------------------------------------------------------------------- the stage


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ninety-six small pictures in folders named after the colours; the first colour has most of them."""
    root, g = tmp_path_factory.mktemp("data") / "paintings", np.random.default_rng(0)
    for i in range(96):
        name = COLOUR_NAMES[max(0, i % 16 - 8)]
        (root / name).mkdir(parents=True, exist_ok=True)
        colour = 0.8 * np.array(COLOURS[name]) + 0.2 * g.integers(0, 256, (4, 4, 3))
        Image.fromarray(np.kron(colour, np.ones((8, 8, 1))).astype(np.uint8)).save(root / name / f"{i:02d}.png")
    return root


def make_first_stage(path, seed=0, update=1, **changes):
    torch.manual_seed(seed)
    model = build_first_stage(FIRST | changes)
    save_model(path, "vqgan", FIRST | changes, [], update, {"ema": model.state_dict(), "raw": model.state_dict()})
    return path


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory):
    return make_first_stage(tmp_path_factory.mktemp("first") / "model.pt")


def stage(folder, first_stage, **changes):
    common = {"precision": "float32", "device": "cpu", "model": "small", "multipliers": (1, 2), "batch": 8}
    settings = Latent(data=str(folder), **(common | {"first_stage": first_stage and str(first_stage)} | changes))
    complete(settings)
    s = LatentStage(settings)
    s.start()
    return s


def test_latents_are_encoded_once_for_each_first_stage_set_size_and_flip(folder, first_stage, tmp_path, monkeypatch):
    encodings = []
    encode = VQGAN.encode
    monkeypatch.setattr(VQGAN, "encode", lambda self, x: encodings.append(len(x)) or encode(self, x))
    model, data = load_model(first_stage), open_paintings(folder, 16)

    def count(*arguments):
        encodings.clear()
        encoded(*arguments, "cpu")
        return sum(encodings)

    other = load_model(make_first_stage(tmp_path / "other.pt", seed=1))
    groups = load_model(first_stage)
    for module in groups.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = 1
    assert count(data, model, False) in (0, 96) and count(data, model, False) == 0
    assert count(data, model, True) == 2 * 96 and count(data, model, True) == 0
    assert count(data, other, False) == 96 and count(data, groups, False) == 96
    assert count(open_paintings(folder, 32), model, False) == 96
    images = Path(data.images.filename)
    os.utime(images, ns=(0, images.stat().st_mtime_ns + 1))  # as if it had been packed again
    assert count(data, model, False) == 96


def test_rows_of_latents_are_encodings_of_the_image_and_of_its_mirror_image(folder, first_stage):
    model, data = load_model(first_stage), open_paintings(folder, 16)
    z = encoded(data, model, True, "cpu")
    assert z.shape == (96, 2, 4, 8, 8) and z.dtype == np.float32
    x = to_tensor(np.array(data.images[[0, 95]]))
    with torch.no_grad():
        for column, image in enumerate((x, x.flip(-1))):
            torch.testing.assert_close(torch.from_numpy(z[[0, 95], column]), model.encode(image), rtol=1e-4, atol=1e-5)


def test_an_interrupted_encoding_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    model, data = load_model(make_first_stage(tmp_path / "third.pt", seed=3)), open_paintings(folder, 16)
    before = sorted(Path(data.images.filename).parent.iterdir())
    encode, calls = model.encode, []

    def interrupted(x):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(x)

    monkeypatch.setattr(model, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encoded(data, model, False, "cpu")
    assert sorted(Path(data.images.filename).parent.iterdir()) == before


def test_latents_have_unit_deviation_unless_the_scale_is_given(folder, first_stage, capsys):
    s = stage(folder, first_stage)
    assert "standard deviation" in capsys.readouterr().out
    x, y = s.examples(s.train_rows)
    assert x.std().item() == pytest.approx(1, rel=1e-2) and s.settings.latent_scale == s.model.latent_scale
    torch.testing.assert_close(x, s.model.encode(s.data.batch(s.train_rows)[0]), rtol=1e-3, atol=1e-4)
    assert torch.equal(y, torch.from_numpy(s.data.labels[s.train_rows]))
    assert stage(folder, first_stage, latent_scale=2.0).model.latent_scale == 2.0


def test_flip_takes_the_latent_of_the_mirrored_image(folder, first_stage):
    s = stage(folder, first_stage, flip=True, latent_scale=1.0)
    rows, mirrored = s.train_rows[:4], torch.tensor([True, False, True, False])
    x, _ = s.examples(rows, mirrored)
    assert all(torch.equal(x[i], torch.tensor(s.latents[row, int(m)])) for i, (row, m) in enumerate(zip(rows, mirrored)))
    seen = []
    s.examples = lambda rows, mirrored: seen.append(mirrored) or (torch.zeros(8, *s.model.shape), torch.zeros(8).long())
    for n in range(20):
        s.loss(n)
    assert 0.3 < torch.cat(seen).float().mean() < 0.7


def test_balanced_batches_show_every_label_equally_often(folder, first_stage):
    for balanced, counts in ((True, [8] * 8), (False, None)):
        s = stage(folder, first_stage, balanced=balanced)
        labels = s.data.labels[np.concatenate([s.rows(n) for n in range(8)])]
        found = np.bincount(labels, minlength=8).tolist()
        assert found == counts if balanced else found[0] > 16


def test_activation_checkpointing_changes_no_gradient_and_holds_less(folder):
    unet, again = tiny().unet, tiny().unet
    checkpoint_activations(again)
    x, t, context = randn(2, 4, 8, 8), torch.tensor([3, 900]), randn(2, 1, 12, seed=1)
    held = {}
    for network in (unet, again):
        size = 0

        def pack(tensor):
            nonlocal size
            size += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = network(x, t, context=context).square().mean()
        held[network] = size
        loss.backward()
    assert held[again] < 0.3 * held[unet]
    assert equal_states(again.state_dict(), unet.state_dict())
    for a, b in zip(unet.parameters(), again.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def test_update_is_a_function_of_seed_and_number(folder, first_stage):
    a, b = (stage(folder, first_stage, flip=True) for _ in range(2))
    assert a.loss(7).item() == b.loss(7).item() != a.loss(8).item() and a.validate() == b.validate()


def test_average_leaves_the_first_stage_out():
    model = tiny()
    names = set(EMA(model, 0.9).state_dict())
    assert names == {name for name in model.state_dict() if not name.startswith("first_stage.")}


ARGUMENTS = ("--stage", "ldm", "--device", "cpu", "--precision", "float32", "--multipliers", 1, 2, "--batch", 4, "--T", 4)
ARGUMENTS += ("--updates", 8, "--save-every", 4, "--validate-every", 4, "--preview-every", 3)


@pytest.fixture(scope="module")
def undisturbed(folder, first_stage, tmp_path_factory):
    """Eight updates without interruption."""
    out = tmp_path_factory.mktemp("runs") / "one"
    data = ("--data", folder, "--first-stage", first_stage)
    train.train(*train.parse([*map(str, ARGUMENTS + data), "--flip", "--out", str(out)]))
    return out


def test_a_run_from_start_to_end(run, undisturbed, first_stage, tmp_path):
    for name in ("model.pt", "checkpoint_00000008", "loss.png", "preview_000003.png", "preview_000006_raw.png", "grid.png"):
        assert (undisturbed / name).exists()  # previews where nothing else happens, too
    rows = list(csv.DictReader((undisturbed / "log.csv").open()))
    assert [row["update"] for row in rows] == ["3", "4", "6", "8"]
    assert [bool(row["colour_distance"]) for row in rows] == [True, False, True, True]
    assert float(rows[-1]["validation_loss"]) > 0 and float(rows[-1]["validation_loss_ema"]) > 0
    model = load_model(undisturbed)
    assert equal_states(model.first_stage.state_dict(), load_model(first_stage).state_dict())  # it trained nothing there
    assert model.classes == COLOUR_NAMES and model.shape == (4, 8, 8) and model.latent_scale == model.settings["latent_scale"]
    out = tmp_path / "grid.png"
    code, _, err = run("sample", "--run", undisturbed, "--grid", "--n", 2, "--steps", 2, "--out", out)
    assert code == 0, err
    picture = np.asarray(Image.open(out))
    assert picture.shape[0] == 9 * 18 + 2


def test_interrupted_and_resumed_equals_undisturbed_bit_for_bit(run, folder, undisturbed, tmp_path, monkeypatch):
    """And needs neither the first stage's run nor the latents of it."""
    first_stage, out = make_first_stage(tmp_path / "model.pt"), tmp_path / "run"
    update = EMA.update

    def interrupt(self, n):
        update(self, n)
        if n == 5:
            os.kill(os.getpid(), 15)

    monkeypatch.setattr(EMA, "update", interrupt)
    code, *_ = run("train", *ARGUMENTS, "--flip", "--data", folder, "--first-stage", first_stage, "--out", out)
    assert code == 128 + 15
    monkeypatch.setattr(EMA, "update", update)
    first_stage.unlink()
    for file in Path(open_paintings(folder, 16).images.filename).parent.glob("latents-*.npy"):
        file.unlink()
    code, _, err = run("train", "--stage", "ldm", "--resume", "--out", out)
    assert code == 0, err
    (one, tensors), (two, others) = newest_checkpoint(undisturbed), newest_checkpoint(out)
    assert one["settings"]["latent_scale"] == two["settings"]["latent_scale"] and equal_tensors(tensors, others)
    assert any(name.startswith("train_adamw.") for name in tensors) and any(name.startswith("ema.") for name in tensors)


def test_kernel_distance_of_a_latent_model(folder, first_stage):
    s = stage(folder, first_stage, kernel_distance=8, T=4, size=32)
    assert np.isfinite(s.compare()["kernel_distance"]) and "colour_distance" in s.columns and "kernel_distance" in s.columns


def test_4_4_2_a_classifier_of_noised_latents_guides_its_model_alone(run, refused, folder, undisturbed, tmp_path):
    """Its x_0 are those of the model that it guides, mirrored ones included; another first stage is another space."""
    out = tmp_path / "classifier"
    how = ("--stage", "classifier", "--device", "cpu", "--precision", "float32", "--multipliers", 1, 2, "--batch", 8)
    code, _, err = run("train", *how, "--run", undisturbed, "--updates", 2, "--flip", "--out", out)
    assert code == 0, err
    model, classifier = load_model(undisturbed), load_model(out)
    assert classifier.shape == model.shape == (4, 8, 8) and classifier.classes == model.classes
    s = ClassifierStage(Classifier(**classifier.settings))
    x, y = s.examples(s.train_rows[:4], torch.tensor([True, False, True, False]))
    image, label = s.data.batch(s.train_rows[:4])
    torch.testing.assert_close(x[1::2], model.encode(image[1::2]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(x[::2], model.encode(image[::2].flip(-1)), rtol=1e-3, atol=1e-4)
    assert torch.equal(y, label)

    guided = ("sample", "--run", undisturbed, "--guidance", "classifier", "--classifier", out, "--steps", 2, "--label", "red")
    code, _, err = run(*guided, "--n", 1, "--out", tmp_path / "red.png")
    assert code == 0, err
    assert "are not those of the model" in refused(*guided, "--size", 32)
    content = torch.load(undisturbed / "model.pt", weights_only=True)
    content["weights"]["ema"]["first_stage.decoder.conv_out.bias"] += 1
    torch.save(content, tmp_path / "other.pt")
    assert "are not those of the model" in refused("sample", "--run", tmp_path / "other.pt", *guided[3:])
    content["settings"]["latent_scale"] *= 2
    torch.save(content, tmp_path / "model.pt")
    changed = Classifier(**classifier.settings | {"run": str(tmp_path / "model.pt")})
    with pytest.raises(UserError, match="no longer the model that this run began with"):
        ClassifierStage(changed)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--channels", 48), "--channels 48: must be a multiple of 32"),
        (("--groups", 3), "--groups 3: must divide --channels 32"),
        (("--attention-levels", 2), "--attention-levels: expected numbers from 0 to 1"),
        (("--size", 18), "--size 18: expected a multiple of 4"),
        (("--latent-scale", 0), "--latent-scale 0.0: must be more than 0"),
        (("--guide-above", -1), "--guide-above -1: must be 0 (guide always) or more"),
        (("--p-uncond", 2), "--p-uncond 2.0: must be between 0 and 1"),
        (("--init", "a.ckpt"), "--init a.ckpt brings its own; leave the flag away"),
    ],
)
def test_bad_arguments(refused, folder, first_stage, tmp_path, arguments, message):
    out = tmp_path / "run"
    assert message in refused("train", *ARGUMENTS, "--data", folder, "--first-stage", first_stage, *arguments, "--out", out)
    assert not out.exists()


def test_bad_first_stages(refused, folder, undisturbed, tmp_path):
    common = ("train", *ARGUMENTS, "--data", folder, "--out", tmp_path / "run", "--first-stage")
    assert "no such file" in refused(*common, tmp_path / "nowhere")
    assert "no first stage; python train.py --stage vqgan makes one" in refused(*common, undisturbed)
    young = make_first_stage(tmp_path / "young.pt", quantise_from=5)
    assert "before its code-book joined" in refused(*common, young)


def test_without_a_first_stage_the_small_one_is_trained_first(run, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SIZES[FirstStage]["small"], "updates", 2)
    code, out, err = run("train", *ARGUMENTS, "--data", folder, "--size", 16, "--updates", 1, "--model", "small")
    assert code == 0, err
    assert "no finished one in runs/vqgan: training the small one first" in out
    assert load_model("runs/ldm").settings["first_stage_settings"]["size"] == 16

    def no_training(*arguments):
        raise AssertionError(arguments)

    monkeypatch.setattr(train, "train", no_training)
    settings = Latent(data=str(folder), device="cpu")
    assert first_stage_for(settings).update == 2
    save_model("runs/vqgan/model.pt", "vqgan", FIRST | {"updates": 9}, [], 2, {})
    with pytest.raises(AssertionError, match="'vqgan', {}, True"):  # an unfinished one goes on
        first_stage_for(settings)


# ---------------------------------------------------------------------------------------------------- published files

TABLES = ("alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")


def published(labels=10, levels=(1, 2), attention_levels=None):
    """The state dict of a class-conditional model as published, with an average that differs from the weights."""
    torch.manual_seed(0)
    unet = stir(latent_unet(32, levels, 1, 4, 12, attention_levels))
    first_stage = stir(VQGAN(channels=32, multipliers=(1, 2), blocks=1, attention_levels=(1,), bottleneck=Codebook(24, 4)), 1)
    state = {"betas": SCHEDULES["sqrt_linear"]().float(), **{name: torch.zeros(1000) for name in TABLES}}
    state |= {f"model.diffusion_model.{name}": value for name, value in unet.state_dict().items()}
    state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    for name, value in unet.state_dict().items():
        state["model_ema.diffusion_model" + name.replace(".", "")] = value + 0.01
    state |= {f"first_stage_model.{name}": value for name, value in first_stage.state_dict().items()}
    return state | {"cond_stage_model.embedding.weight": randn(labels, 12)}


@pytest.fixture
def cin(tmp_path):
    return lightning_file(tmp_path / "model.ckpt", published())


def test_a_published_class_conditional_model_opens_with_either_weights(cin):
    state = published()
    for weights, offset in (("raw", 0.0), ("ema", 0.01)):
        model = load_model(cin, weights)
        for name, value in model.unet.state_dict().items():
            assert torch.equal(value, state[f"model.diffusion_model.{name}"] + offset)
        for name, value in model.first_stage.state_dict().items():
            assert torch.equal(value, state[f"first_stage_model.{name}"])
        table = state["cond_stage_model.embedding.weight"]  # the published average leaves it out
        assert torch.equal(model.context.weight[:10], table)
        torch.testing.assert_close(model.context.weight[10], table.mean(0))
    assert model.classes == [str(i) for i in range(10)] and model.latent_scale == 1 and model.shape == (4, 128, 128)
    assert model.settings["p_uncond"] == 0 and isinstance(model, LatentDiffusion)


def test_1001_labels_are_a_thousand_and_the_zero_label(tmp_path):
    """And another shape of U-Net is read off its names: three levels, no attention at the first."""
    state = published(1001, (1, 2, 3), (1, 2))
    model = load_model(lightning_file(tmp_path / "model.ckpt", state))
    assert len(model.classes) == 1000 and torch.equal(model.context.weight, state["cond_stage_model.embedding.weight"])
    assert model.settings["attention_levels"] == (1, 2) and model.settings["multipliers"] == (1, 2, 3)
    assert model.settings["p_uncond"] > 0


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


def renamed(state, old, new):
    return without(state, old) | {new: state[old]}


EDITS = {
    "1 missing (first: unet.out.2.bias)": lambda s: without(s, "model.diffusion_model.out.2.bias"),
    "1 missing (first: unet.time_embed.0.bias); 1 unknown (first: model_ema.diffusion_modeltime)": lambda s: renamed(
        s, "model_ema.diffusion_modeltime_embed0bias", "model_ema.diffusion_modeltime"
    ),
    "1 unknown (first: first_stage.extra)": lambda s: s | {"first_stage_model.extra": torch.zeros(1)},
    "1 unknown (first: logvar)": lambda s: s | {"logvar": torch.zeros(1000)},
    "of another shape (first: context.weight (11, 13) instead of (11, 12))": lambda s: (
        s | {"cond_stage_model.embedding.weight": torch.zeros(10, 13)}
    ),
    "it has no cond_stage_model.embedding.weight": lambda s: without(s, "cond_stage_model.embedding.weight"),
    "not a latent U-Net with cross-attention, it has no middle_block.1": lambda s: without(
        s, "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    ),
    "not a first stage, it has no encoder.conv_in.weight": lambda s: without(s, "first_stage_model.encoder.conv_in.weight"),
    "betas 0.000100 to 0.020000, but the schedule known here": lambda s: s | {"betas": SCHEDULES["linear"]()},
    "no betas, but the schedule known here": lambda s: without(s, "betas"),
}


@pytest.mark.parametrize("words", EDITS)
def test_wrong_published_files_are_refused_with_the_difference(tmp_path, words):
    path = lightning_file(tmp_path / "model.ckpt", EDITS[words](published()))
    with pytest.raises(UserError) as error:
        load_model(path)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_published_file_without_an_average_has_raw_weights_only(tmp_path):
    state = {name: value for name, value in published().items() if not name.startswith("model_ema.")}
    path = lightning_file(tmp_path / "model.ckpt", state)
    load_model(path, "raw")
    with pytest.raises(UserError, match="no 'ema' weights, only: raw"):
        load_model(path)


def test_fine_tuning_keeps_all_but_a_label_table_of_another_size(
    run, refused, cin, folder, undisturbed, tmp_path, monkeypatch, capsys
):
    """--init sets network and first stage: a published model of 10 labels to 8 colours, a model of 8 colours to the same."""
    s = stage(folder, None, init=str(cin), multipliers=None, size=16)
    source = load_model(cin)
    assert "knows 10 labels: the table of these 8 is new" in capsys.readouterr().out
    assert equal_states(s.model.unet.state_dict(), source.unet.state_dict()) and s.model.context.weight.shape == (9, 12)
    assert equal_states(s.model.first_stage.state_dict(), source.first_stage.state_dict())
    assert (s.settings.channels, s.settings.predict, s.settings.latent_scale) == (32, "eps", 1.0)
    ours = stage(folder, None, init=str(undisturbed), multipliers=None).model
    assert equal_states(ours.state_dict(), load_model(undisturbed).state_dict())

    common = ("train", "--stage", "ldm", "--data", folder, "--device", "cpu", "--out", tmp_path / "run")
    assert "--channels 64: --init" in refused(*common, "--init", cin, "--channels", 64)
    monkeypatch.setattr(LatentStage, "preview", lambda *arguments, **more: {})
    size = ("--precision", "float32", "--size", 16, "--batch", 2)
    code, _, err = run(*common, *size, "--init", cin, "--updates", 1)
    assert code == 0, err
    cin.unlink()  # a resumed run does not need it
    code, _, err = run(*common, "--resume", "--updates", 2)
    assert code == 0, err


# ---------------------------------------------------------------------------------------------------- sample.py


def test_published_models_and_ours_draw_at_other_sizes(run, refused, cin, undisturbed, tmp_path):
    out = tmp_path / "a.png"
    common = ("--n", 1, "--steps", 2, "--out", out)
    for model, label, size in ((cin, 7, 16), (undisturbed, "blue", 64)):
        code, _, err = run("sample", "--run", model, "--label", label, "--size", size, *common)
        assert code == 0, err
        assert Image.open(out).size == (68, 68)  # small pictures are shown larger
    assert "--size 17: expected a multiple of 4" in refused("sample", "--run", undisturbed, "--size", 17)
    assert "this model diffuses latents" in refused("sample", "--run", undisturbed, "--clip")


def test_5_3_1_scales_side_by_side(run, refused, undisturbed, tmp_path):
    out = tmp_path / "scales.png"
    common = ("--run", undisturbed, "--steps", 2)
    code, text, err = run("sample", *common, "--scales", 1, 5, "--n", 3, "--out", out)
    assert code == 0, err
    lines = text.splitlines()
    model = load_model(undisturbed)
    images = images_by_label(model, 3, steps=2, scale=5.0, progress=False)
    distance, spread = mean_colour_distances(images, COLOUR_NAMES).mean(), variety(images[:-1]).mean()
    assert lines[2].split() == ["scale", "5", f"{distance:.1f}", f"{spread:.1f}"]
    assert Image.open(out).size[1] == 9 * 18 + 2 + 24
    assert "needs --n 2 or more" in refused("sample", *common, "--scales", 1, "--n", 1)


def test_the_small_model_guides_where_the_noise_is_strong_and_says_so(run, refused, undisturbed, cin, tmp_path):
    """The model's own --guide-above is the default of all that draws, and is recorded; published models always guide."""
    assert (load_model(undisturbed).guide_above, load_model(cin).guide_above) == (8, 0)
    assert SIZES[Latent]["thesis"]["guide_above"] == 0
    model, out = tiny(guide_above=8.0), tmp_path / "set"
    how = ({}, {"guide_above": 8.0}, {"guide_above": 0.0})
    own, same, plain = (list(denoise(model, [0, 1], [0, 1], steps=4, scale=15.0, **more))[-1][1] for more in how)
    assert torch.equal(own, same) and (own - plain).abs().max() > 1e-3
    common = ("--run", undisturbed, "--steps", 2, "--label", 0)
    for more, value in ((), 8.0), (("--guide-above", 0), 0.0):
        code, _, err = run("sample", *common, "--per-label", 1, "--out", out / str(value), *more)
        assert code == 0, err
        assert json.loads((out / str(value) / "settings.json").read_text())["guide_above"] == value
    assert "must be 0 (guide always) or more" in refused("sample", *common, "--guide-above", -1)
    assert "only with --guidance classifier-free" in refused("sample", *common, "--guide-above", 1, "--guidance", "classifier")


def test_a_letters_model_has_one_size(refused, tiny_model):
    assert "this model draws pixels" in refused("sample", "--run", tiny_model, "--size", 64)
