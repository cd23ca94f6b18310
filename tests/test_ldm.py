"""Sections 3.6, 4.4.4, 4.4.7 and 4.5: the latent model, its training, published files, drawing."""

import csv
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import equal_tensors, lightning_file, newest_checkpoint
from PIL import Image

import data
import ldm
import train
from data import COLOURS, UserError, to_tensor, view
from ddpm import SCHEDULES
from fid import mean_colour_distances, variety
from ldm import build_first_stage, build_latent, fingerprint, load_model, save_model, space_of
from sample import denoise, generate, images_by_label
from train import EMA, Classifier, ClassifierStage, FirstStage, Latent, LatentStage
from unet import latent_unet
from vqgan import VQGAN, AttnBlock, Codebook

FIRST = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "attention_levels": (), "groups": 2}
FIRST |= {"bottleneck": "vq", "codes": 16, "z_channels": 4, "beta": 0.25, "released": False}
FIRST |= {"size": 16, "quantise_from": 0, "updates": 1, "equivariant": False}
TINY = {"channels": 32, "multipliers": (1, 2), "blocks": 1, "attention_levels": None, "groups": 2}
TINY |= {"schedule": "sqrt_linear", "T": 1000, "predict": "eps", "latent_scale": 0.5, "size": 16}
TINY |= {"context_channels": 12, "p_uncond": 0.2, "first_stage_settings": FIRST}
TINY |= {"condition": "label", "pyramid": ()}
COLOUR_NAMES = list(COLOURS)


def stir(module, seed=0):
    """Make all weights nonzero, so that every path matters."""
    torch.manual_seed(seed)
    for p in module.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return module


def tiny(**changes):
    torch.manual_seed(0)
    return stir(build_latent(TINY | changes, COLOUR_NAMES)).eval()


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------ the model


def test_the_loss_of_v_is_the_squared_error_of_v():
    model, y, t = tiny(predict="v"), torch.tensor([0, 3, 8]), torch.tensor([1, 400, 990])
    z, noise = randn(3, *model.shape), randn(3, *model.shape, seed=1)
    a = model.diffusion.alpha_bar[t].float().view(3, 1, 1, 1)
    with torch.no_grad():
        z_t = a.sqrt() * z + (1 - a).sqrt() * noise
        v = model.unet(z_t, t - 1, **model.condition(y))
        expected = (v - a.sqrt() * noise + (1 - a).sqrt() * z).square().mean((1, 2, 3))
        torch.testing.assert_close(model.loss(z, y, t, noise), expected, rtol=1e-4, atol=1e-5)


def test_the_loss_of_the_flow_is_the_squared_error_of_the_flow():
    model, y, t = tiny(predict="flow"), torch.tensor([0, 3, 8]), torch.tensor([1, 400, 990])
    z, noise = randn(3, *model.shape), randn(3, *model.shape, seed=1)
    x = model.diffusion.q_sample(z, t, noise)
    u = model.unet(x, t - 1, **model.condition(y))
    expected = (u - (noise - z)).square().mean((1, 2, 3))
    torch.testing.assert_close(model.loss(z, y, t, noise), expected, rtol=1e-3, atol=1e-4)


def test_decoded_pictures_stay_in_range():
    far = 9 * randn(2, 3, 32, 32)
    letters = ldm.PixelDiffusion(
        torch.nn.Identity(), None, SCHEDULES["linear"](), ["A"], (3, 32, 32), "eps"
    )
    assert torch.equal(letters.decode(far), far.clamp(-1, 1))
    model, z = tiny(), 50 * randn(1, 4, 8, 8)
    torch.testing.assert_close(model.decode(z), model.first_stage.decode(z / 0.5).clamp(-1, 1))


def test_latent_model_has_the_thesis_shapes():
    """4.5.1, with the default settings: 4 x 32 x 32 latents of 256 x 256 images, a label table of
    9 x 512, sqrt(beta) linear from 0.0015 to 0.0195."""
    settings = asdict(Latent()) | {"size": 256, "first_stage_settings": asdict(FirstStage())}
    with torch.device("meta"):
        model = build_latent(settings, COLOUR_NAMES)
    assert model.shape == (4, 32, 32) and model.zero_label == 8
    assert model.context.weight.shape == (9, 512)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 394_984_196 + 9 * 512
    beta = SCHEDULES[settings["schedule"]]()
    assert (beta[0].item(), beta[-1].item()) == (pytest.approx(0.0015), pytest.approx(0.0195))


def test_output_depends_on_the_label_and_on_each_of_three_tokens():
    model, x = tiny(), randn(1, 4, 8, 8)
    tokens = [model.context.weight[rows] for rows in ([0, 1, 2], [8, 1, 2], [0, 8, 2], [0, 1, 8])]
    with torch.no_grad():
        one = [model.eps(x, 500, torch.tensor([label])) for label in range(9)]
        three, *others = (model.eps(x, 500, rows[None]) for rows in tokens)
        same = model.eps(x, 500, model.context.weight[3][None, None])  # the token of a label
    assert all((a - b).abs().max() > 1e-4 for i, a in enumerate(one) for b in one[:i])
    assert all((three - other).abs().max() > 1e-4 for other in others)
    torch.testing.assert_close(same, one[3])
    images = generate(model, torch.stack(tokens[:2]).detach(), [0, 1], steps=2, progress=False)
    assert images.shape == (2, 16, 16, 3)


def test_first_stage_is_frozen_and_stays_in_eval_mode():
    model = tiny().train()
    assert model.unet.training
    assert not any(module.training for module in model.first_stage.modules())
    assert not any(p.requires_grad for p in model.first_stage.parameters())


def test_e54_latents_are_scaled_and_quantised_by_the_decoder_alone():
    model, x = tiny(), randn(10, 3, 16, 16).clamp(-1, 1)
    z, first = model.encode(x), model.first_stage
    with torch.no_grad():
        torch.testing.assert_close(z, 0.5 * first.encode(x))
        assert (first.quantize.project(z / 0.5) - z / 0.5).abs().max() > 0.01
        torch.testing.assert_close(model.decode(z), first.decode(first.encode(x)).clamp(-1, 1))
    assert model.decode(torch.zeros(1, 4, 24, 24)).shape == (1, 3, 48, 48)


def test_a_fingerprint_changes_with_a_value_a_name_or_a_shape():
    """And with a type; not with the words that torch prints for a module (B12)."""

    def module(name, value):
        network = torch.nn.Module()
        network.register_buffer(name, value)
        return network

    w = torch.arange(6.0).view(3, 2)
    same, reworded = module("w", w), module("w", w.clone())
    reworded.extra_repr = lambda: "other words"
    others = [module("w", w + 1e-6), module("v", w), module("w", w.view(2, 3))]
    others.append(module("w", w.view(torch.int32)))
    assert fingerprint(same) == fingerprint(reworded)
    digests = {fingerprint(network) for network in (same, *others)} | {fingerprint(same, "more")}
    assert len(digests) == 6


# ---------------------------------------------------------------------------------- the training


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """96 small pictures in folders named after the colours; the first colour has most of them."""
    root, g = tmp_path_factory.mktemp("data") / "paintings", np.random.default_rng(0)
    for i in range(96):
        name = COLOUR_NAMES[max(0, i % 16 - 8)]
        (root / name).mkdir(parents=True, exist_ok=True)
        colour = 0.8 * np.array(COLOURS[name]) + 0.2 * g.integers(0, 256, (4, 4, 3))
        picture = np.kron(colour, np.ones((8, 8, 1))).astype(np.uint8)
        Image.fromarray(picture).save(root / name / f"{i:02d}.png")
    return root


def make_first_stage(path, seed=0, update=1, **changes):
    torch.manual_seed(seed)
    state = build_first_stage(FIRST | changes).state_dict()
    save_model(path, "vqgan", FIRST | changes, [], update, {"ema": state, "raw": state})
    return path


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory):
    return make_first_stage(tmp_path_factory.mktemp("first") / "model.pt")


def stage(folder, first_stage, **changes):
    typed = {"data": str(folder), "model": "thesis", "batch": 8, "ema": 0.998}
    if not changes.get("init"):
        typed |= {"channels": 32, "multipliers": (1, 2), "blocks": 1, "groups": 2, "predict": "v"}
    typed |= {"first_stage": first_stage and str(first_stage)}
    typed |= {"device": "cpu", "precision": "float32"}
    s = LatentStage(train.new_settings(Latent, typed | changes))
    s.start(resumed=False)
    return s


def test_latents_are_encoded_once_for_each_first_stage_set_size_and_number_of_views(
    folder, first_stage, tmp_path, monkeypatch
):
    encoded, encode = [], VQGAN.encode
    monkeypatch.setattr(VQGAN, "encode", lambda m, x: encoded.append(len(x)) or encode(m, x))

    def count(first_stage, **changes):
        encoded.clear()
        count.images = Path(stage(folder, first_stage, **changes).data.images.filename)
        return sum(encoded)

    other = make_first_stage(tmp_path / "other.pt", seed=1)
    assert count(first_stage) in (0, 96) and count(first_stage) == 0
    assert count(first_stage, views=2) in (0, 192) and count(first_stage, views=2) == 0
    assert count(other) == count(first_stage, size=32) == 96 and count(first_stage) == 0
    packed = count.images.stat().st_mtime_ns
    os.utime(count.images, ns=(0, packed + 1))  # as if the set had been packed again
    assert count(first_stage) == 96


def test_an_interrupted_encoding_leaves_nothing_behind(folder, first_stage, tmp_path, monkeypatch):
    s, calls, encode = stage(folder, first_stage), [], VQGAN.encode
    before = sorted(Path(s.data.images.filename).parent.iterdir())

    def interrupted(model, x):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(model, x)

    monkeypatch.setattr(VQGAN, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        s.encode(load_model(make_first_stage(tmp_path / "third.pt", seed=3)))
    assert sorted(Path(s.data.images.filename).parent.iterdir()) == before


def test_latents_have_unit_deviation_unless_the_scale_is_given(folder, first_stage, capsys):
    s = stage(folder, first_stage)
    assert "deviation" in capsys.readouterr().out
    x, y = s.examples(s.train_rows)
    assert x.std().item() == pytest.approx(1, rel=1e-2)
    assert s.settings.latent_scale == s.model.latent_scale
    encoded = s.model.encode(s.data.batch(s.train_rows)[0])
    torch.testing.assert_close(x, encoded, rtol=1e-3, atol=1e-4)
    assert torch.equal(y, torch.from_numpy(s.data.labels[s.train_rows]).long())
    assert stage(folder, first_stage, latent_scale=2.0).model.latent_scale == 2.0


def test_an_example_is_the_latent_of_a_random_view(folder, first_stage):
    s = stage(folder, first_stage, views=8, latent_scale=1.0)
    assert s.latents.shape == (96, 8, 4, 8, 8) and s.latents.dtype == np.float32
    image = to_tensor(np.array(s.data.images[[0, 95]]))
    for k in range(8):
        z = torch.tensor(s.latents[[0, 95], k])
        torch.testing.assert_close(z, s.model.encode(view(image, k)), rtol=1e-4, atol=1e-5)
    rows, views = s.train_rows[:4], torch.tensor([7, 0, 3, 1])
    for z, row, k in zip(s.examples(rows, views)[0], rows, views.tolist()):
        assert torch.equal(z, torch.tensor(s.latents[row, k]))
    seen, zeros = [], (torch.zeros(8, *s.model.shape), torch.zeros(8).long())
    s.examples = lambda rows, views: seen.append(views) or zeros
    for n in range(40):
        s.loss(n)
    assert (torch.bincount(torch.cat(seen), minlength=8) / 320 - 1 / 8).abs().max() < 0.06


# ------------------------------------------------------------------------- U-Nets of several sizes

PYRAMID = {"pyramid": (32,), "predict": "v"}


def pyramid(levels, **changes):
    """A tiny model whose U-Nets see the given runs of t: [(level, steps), ...]."""
    model = tiny(**PYRAMID | changes)
    assert isinstance(model.unet, ldm.Pyramid)
    model.unet.level.copy_(torch.tensor([k for k, steps in levels for _ in range(steps)]))
    return model


class BestV(torch.nn.Module):
    """The best v for x_0 ~ N(0, variance) in every position:  E[v | x_t], Gaussian conditioning.

    seen: what it was asked, as (x_t, t)."""

    def __init__(self, alpha_bar, variance=1.0):
        super().__init__()
        self.alpha_bar, self.variance, self.seen = alpha_bar, variance, []

    def forward(self, x, t, context):
        self.seen.append((x, t))
        a = self.alpha_bar(t).float().view(-1, 1, 1, 1)
        x_0 = a.sqrt() * self.variance / (a * self.variance + 1 - a) * x
        return (a.sqrt() * x - x_0) / (1 - a).sqrt()


@pytest.mark.parametrize("level, k", [(0, 1), (1, 2), (2, 4)])
def test_a_pyramid_predicts_the_posterior_mean_of_pictures_without_details(level, k):
    """x_0 = repeat_k(m), m ~ N(0, 1): E[m | x_t] = sqrt(a) mean_k(x_t) / (a + (1 - a) / k^2)."""
    model = pyramid([(level, 1000)], pyramid=(32, 32), size=32)
    a_t = model.diffusion.alpha_bar[1:]

    def of_the_mean(t):  # SNR of the mean of k^2: k^2 times as high
        return k**2 * a_t[t] / (k**2 * a_t[t] + 1 - a_t[t])

    model.unet.unets[level] = small = BestV(of_the_mean)
    t = torch.tensor([30, 300, 700, 1000])
    m, noise = randn(4, 4, 16 // k, 16 // k), randn(4, 4, 16, 16, seed=1)
    x_0 = m.repeat_interleave(k, 2).repeat_interleave(k, 3)
    x = model.diffusion.q_sample(x_0, t, noise)
    found = model.diffusion.predict_x0(x, t, model.eps(x, t, torch.zeros(4).long()))
    a = a_t[t - 1].float().view(4, 1, 1, 1)
    means = x.unflatten(3, (-1, k)).unflatten(2, (-1, k)).mean((3, 5))
    expected = a.sqrt() * means / (a + (1 - a) / k**2)
    expected = expected.repeat_interleave(k, 2).repeat_interleave(k, 3)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    (y, times), *more = small.seen
    assert not more and torch.equal(times, t - 1)
    assert y.shape == m.shape and y.var().item() == pytest.approx(1, abs=0.15)


def test_damped_details_are_smaller_by_octave_and_come_back():
    """On pictures with one octave only: +-1 in squares of 1 (finest details), 2 and 4 (means)."""
    column = torch.arange(8) % 2 * 2.0 - 1
    square = (column[:, None] * column)[None, None].expand(3, 4, 8, 8)
    for octave, factor in ((0, 1 / 9), (1, 1 / 3), (2, 1.0)):
        k = 2**octave
        z = square.repeat_interleave(k, 2).repeat_interleave(k, 3)
        torch.testing.assert_close(ldm.damp(z, 1 / 3, 2), factor * z)
    z = randn(3, 4, 16, 16)
    damped = ldm.damp(z, 0.25, 3)
    torch.testing.assert_close(ldm.damp(damped, 4.0, 3), z, rtol=1e-4, atol=1e-4)
    means = F.avg_pool2d(z, 8)
    torch.testing.assert_close(F.avg_pool2d(damped, 8), means)  # means stay
    for k in range(8):  # a turned picture is damped in the same way
        torch.testing.assert_close(ldm.damp(data.view(z, k), 0.25, 3), data.view(damped, k))


def test_a_model_with_a_pyramid_diffuses_damped_latents():
    model = tiny(**PYRAMID | {"pyramid": (32, 32), "size": 16, "latent_scale": 0.5})
    x = randn(2, 3, 16, 16).clamp(-1, 1)
    first = model.first_stage.encode(x)
    z = model.encode(x)
    torch.testing.assert_close(z, ldm.damp(0.5 * first, 1 / 2, 2))
    back = model.first_stage.decode(first).clamp(-1, 1)
    torch.testing.assert_close(model.decode(z), back, rtol=1e-3, atol=1e-3)
    plain = tiny(size=16, latent_scale=0.5)
    assert space_of(model) != space_of(plain)


def test_every_row_goes_to_the_u_net_of_its_t():
    model = pyramid([(0, 400), (1, 600)])
    t, y = torch.tensor([1, 900, 400, 401, 1000]), torch.tensor([0, 1, 2, 3, 8])
    x = randn(5, *model.shape)
    together = model.eps(x, t, y)
    for i in range(5):
        alone = model.eps(x[i : i + 1], int(t[i]), y[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    before = model.unet.unets[1].out[2].bias.clone()
    model.unet.unets[1].out[2].bias.data += 1
    changed = (model.eps(x, t, y) - together).flatten(1).abs().amax(1) > 1e-3
    assert changed.tolist() == [False, True, False, True, True] and before.shape == (4,)


def test_details_are_drowned_where_they_deviate_a_tenth_as_much_as_the_noise():
    """Latents of independent Gaussians: of means, details of deviation d_k, noise of 1 / 2^k."""
    model = tiny(**PYRAMID | {"pyramid": (32, 32), "size": 256})
    coarse, fine = 0.1 * randn(400, 4, 16, 16), 0.03 * randn(400, 4, 32, 32, seed=1)
    z = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3) + fine
    model.unet.divide(z)
    a = model.diffusion.alpha_bar[1:]
    noise = ((1 - a) / a).sqrt()  # beside a signal of size 1
    d_0, d_1 = 0.03, (0.1**2 + 0.03**2 / 4) ** 0.5
    expected = (d_0 < noise / 10).long() + (d_1 < noise / 2 / 10)
    assert (model.unet.level != expected).sum() < 10 and expected.unique().tolist() == [0, 1, 2]
    model.unet.divide(coarse[:, :, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3)[..., ::2])
    assert (model.unet.level.diff() >= 0).all()


def test_an_update_of_a_pyramid_trains_one_u_net_at_its_t(folder, first_stage):
    how = PYRAMID | {"optimizer": "muon", "multipliers": (1, 1)}
    s = stage(folder, first_stage, **how)
    (player,) = s.players()
    levels, found, seen = s.model.unet.level, [], torch.zeros(1000)
    for n in range(800):
        t = s.times(data.rng(0, n, 2))
        assert len(levels[t - 1].unique()) == 1 and len(t.unique()) > 2
        found.append(levels[t[0] - 1].item())
        seen += torch.bincount(t - 1, minlength=1000)
    assert abs(np.mean(found) - 0.5) < 4 * 0.5 / 800**0.5
    for level in (0, 1):  # the half of its t with less noise
        low = (levels == level).nonzero()[: (levels == level).sum() // 2]
        assert abs((seen[low].sum() / seen[levels == level].sum()).item() - 0.5) < 0.05
    player.parameters = [p for p in s.model.parameters() if p.requires_grad]
    optimizer = train.make_optimizer(player, s.settings)
    for n in range(8):
        before = [[p.clone() for p in unet.parameters()] for unet in s.model.unet.unets]
        s.loss(n).backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = [
            any(not torch.equal(p, old) for p, old in zip(unet.parameters(), of_it))
            for unet, of_it in zip(s.model.unet.unets, before)
        ]
        assert moved == [level == found[n] for level in (0, 1)]
    assert len(set(found[:8])) == 2


def test_smaller_u_nets_have_attention_where_the_largest_has_it_and_below():
    model = tiny(pyramid=(64, 96), predict="v", multipliers=(1, 2, 1), attention_levels=(1,))
    expected = [(32, (1,)), (64, (0, 1, 2)), (96, (0, 1, 2))]
    for unet, (channels, levels) in zip(model.unet.unets, expected):
        same = latent_unet(channels, (1, 2, 1), 1, 4, 12, levels, 2)
        shapes = {name: value.shape for name, value in same.state_dict().items()}
        assert {name: value.shape for name, value in unet.state_dict().items()} == shapes


def test_balanced_batches_show_every_label_equally_often(folder, first_stage):
    for balanced in (True, False):
        s = stage(folder, first_stage, balanced=balanced)
        labels = s.data.labels[np.concatenate([s.rows(n) for n in range(8)])]
        found = np.bincount(labels, minlength=8).tolist()
        assert found == [8] * 8 if balanced else found[0] > 16


def test_activation_checkpointing_changes_no_gradient_and_holds_less():
    unet, again, held = tiny().unet, tiny().unet, {}
    train.checkpoint_activations(again)
    x, t, context = randn(2, 4, 8, 8), torch.tensor([3, 900]), randn(2, 1, 12, seed=1)
    for network in (unet, again):
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = network(x, t, context=context).square().mean()
        held[network] = sum(sizes)
        loss.backward()
    assert held[again] < 0.3 * held[unet]
    assert equal_tensors(again.state_dict(), unet.state_dict())
    for a, b in zip(unet.parameters(), again.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def test_update_is_a_function_of_seed_and_number(folder, first_stage):
    a, b = (stage(folder, first_stage, views=8) for _ in range(2))
    assert a.loss(7).item() == b.loss(7).item() != a.loss(8).item()
    assert a.validate() == b.validate()


def test_a_colour_as_label_finds_the_painting_model(
    run, refused, undisturbed, tmp_path, monkeypatch
):
    """`--label blue` is drawn by runs/ldm or, without it, by the model that comes along."""
    monkeypatch.chdir(tmp_path)
    few = ("--n", 1, "--steps", 2)
    monkeypatch.setattr("ldm.ASSETS", tmp_path / "assets")
    assert "assets/paintings.pt: no such file" in refused("sample", "--label", "blue")
    (tmp_path / "assets").mkdir()
    shutil.copy(undisturbed / "model.pt", "assets/paintings.pt")
    assert run("sample", "--label", "Blue", *few) == (0, "blue.png\n", "")
    assert "assets/letters.pt: no such file" in refused("sample", "--label", "B")
    assert run("sample", "--run", "paintings", "--label", "3", *few)[0] == 0
    Path("runs/ldm").mkdir(parents=True)
    Path("runs/ldm/model.pt").write_bytes(b"half")
    assert "runs/ldm/model.pt: not a checkpoint" in refused("sample", "--label", "blue")


def test_average_leaves_the_first_stage_out():
    model = tiny()
    names = {name for name, _ in model.named_parameters() if not name.startswith("first_stage.")}
    assert set(EMA(model, 0.9).state_dict()) == names


ARGUMENTS = ("--stage", "ldm", "--model", "thesis", "--device", "cpu", "--precision", "float32")
ARGUMENTS += ("--channels", 32, "--multipliers", 1, 2, "--blocks", 1, "--groups", 2)
ARGUMENTS += ("--predict", "v", "--lr", 1e-3, "--ema", 0.998, "--batch", 4, "--T", 4)
ARGUMENTS += ("--updates", 8)
ARGUMENTS += ("--save-every", 4, "--validate-every", 4, "--preview-every", 3)


@pytest.fixture(scope="module")
def undisturbed(folder, first_stage, tmp_path_factory):
    """A run of eight updates without interruption."""
    out = tmp_path_factory.mktemp("runs") / "one"
    more = ("--views", 2, "--data", folder, "--first-stage", first_stage, "--out", out)
    train.train(*train.parse([str(word) for word in ARGUMENTS + more]))
    return out


def test_a_run_from_start_to_end(run, undisturbed, first_stage, tmp_path):
    names = ("model.pt", "checkpoint_00000008.pt", "loss.png", "grid.png")
    for name in (*names, "preview_000003.png", "preview_000006_raw.png"):
        assert (undisturbed / name).exists()
    rows = list(csv.DictReader((undisturbed / "log.csv").open()))
    assert [row["update"] for row in rows] == ["3", "4", "6", "8"]
    assert [bool(row["colour_distance"]) for row in rows] == [True, False, True, True]
    assert float(rows[-1]["validation_loss"]) > 0 and float(rows[-1]["validation_loss_ema"]) > 0
    model, before = load_model(undisturbed), load_model(first_stage)
    assert equal_tensors(model.first_stage.state_dict(), before.state_dict())  # it is frozen
    assert model.classes == COLOUR_NAMES and model.shape == (4, 8, 8)
    assert model.latent_scale == model.settings["latent_scale"]
    out = tmp_path / "grid.png"
    how = ("--run", undisturbed, "--grid", "--n", 2, "--steps", 2)
    code, _, err = run("sample", *how, "--out", out)
    assert code == 0, err
    assert np.asarray(Image.open(out)).shape[0] == 9 * 18 + 2


def test_interrupted_and_resumed_equals_undisturbed_bit_for_bit(
    run, folder, undisturbed, tmp_path, monkeypatch
):
    """It also needs neither the run nor the latents of the first stage."""
    first_stage, out = make_first_stage(tmp_path / "model.pt"), tmp_path / "run"
    update = EMA.update

    def interrupt(self, n):
        update(self, n)
        if n == 5:
            os.kill(os.getpid(), 15)

    monkeypatch.setattr(EMA, "update", interrupt)
    more = ("--views", 2, "--data", folder, "--first-stage", first_stage, "--out", out)
    code, *_ = run("train", *ARGUMENTS, *more)
    assert code == 128 + 15
    monkeypatch.setattr(EMA, "update", update)
    first_stage.unlink()
    for file in folder.parent.rglob("latents-*.npy"):
        file.unlink()
    code, _, err = run("train", "--stage", "ldm", "--resume", "--out", out)
    assert code == 0, err
    (one, tensors), (two, others) = newest_checkpoint(undisturbed), newest_checkpoint(out)
    assert one["settings"]["latent_scale"] == two["settings"]["latent_scale"]
    assert equal_tensors(tensors, others)
    assert {"train", "train_optimizer", "ema"} <= {name.split(".")[0] for name in tensors}


def test_4_4_2_a_classifier_of_noised_latents_guides_its_model_alone(
    run, refused, undisturbed, tmp_path
):
    """Its x_0 are those of the guided model, mirrored ones included. It guides no other model."""
    out = tmp_path / "classifier"
    how = ("--stage", "classifier", "--device", "cpu", "--precision", "float32", "--views", "2")
    how += ("--multipliers", 1, 2, "--batch", 8, "--run", undisturbed, "--updates", 2)
    code, _, err = run("train", *how, "--out", out)
    assert code == 0, err
    model, classifier = load_model(undisturbed), load_model(out)
    assert classifier.shape == model.shape == (4, 8, 8) and classifier.classes == model.classes
    s = ClassifierStage(Classifier(**classifier.settings))
    x, y = s.examples(s.train_rows[:4], torch.tensor([1, 0, 1, 0]))
    image, label = s.data.batch(s.train_rows[:4])
    torch.testing.assert_close(x[1::2], model.encode(image[1::2]), rtol=1e-3, atol=1e-4)
    mirrored = model.encode(image[::2].flip(-1))
    torch.testing.assert_close(x[::2], mirrored, rtol=1e-3, atol=1e-4)
    assert torch.equal(y, label)

    guided = ("--guidance", "classifier", "--classifier", out, "--steps", 2, "--label", "red")
    one = ("sample", "--run", undisturbed, *guided)
    code, _, err = run(*one, "--n", 1, "--out", tmp_path / "red.png")
    assert code == 0, err
    assert "are not those of the model" in refused(*one, "--size", 32)
    content = torch.load(undisturbed / "model.pt", weights_only=True)
    content["weights"]["ema"]["first_stage.decoder.conv_out.bias"] += 1
    torch.save(content, tmp_path / "other.pt")
    error = refused("sample", "--run", tmp_path / "other.pt", *guided)
    assert "are not those of the model" in error
    changed = Classifier(**classifier.settings | {"run": str(tmp_path / "other.pt")})
    with pytest.raises(UserError, match="no longer the model"):
        ClassifierStage(changed)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--channels", 48), "must be a multiple of 32"),
        (("--groups", 3), "--groups 3: must divide --channels 32"),
        (("--attention-levels", 2), "--attention-levels: expected numbers from 0 to 1"),
        (("--size", 18), "--size 18: expected a multiple of 4"),
        (("--pyramid", 32, "--predict", "eps"), "--predict eps: --pyramid needs v"),
        (("--pyramid", 40), "--pyramid (40,): needs multiples of 32"),
        (("--pyramid", 32, "--size", 20), "--size 20: expected a multiple of 8"),
        (("--latent-scale", 0), "--latent-scale 0.0: must be more than 0"),
        (("--p-uncond", 2), "--p-uncond 2.0: must be at most 1"),
        (("--first-stage", "nowhere"), "nowhere: no such file"),
    ],
)
def test_bad_arguments(refused, folder, first_stage, tmp_path, arguments, message):
    out = tmp_path / "run"
    common = ("--data", folder, "--first-stage", first_stage, "--out", out)
    assert message in refused("train", *ARGUMENTS, *common, *arguments)
    assert not out.exists()


def test_bad_first_stages(refused, folder, undisturbed, tmp_path):
    common = ("train", *ARGUMENTS, "--data", folder, "--out", tmp_path / "run", "--first-stage")
    assert "train.py --stage vqgan makes one" in refused(*common, undisturbed)
    young = make_first_stage(tmp_path / "young.pt", quantise_from=5)
    assert "its code-book is not in use yet" in refused(*common, young)


def test_without_a_first_stage_the_small_one_is_trained_first(run, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train.SMALL[FirstStage], "updates", 2)
    how = ("--data", folder, "--size", 64, "--updates", 1, "--batch", 4, "--precision", "float32")
    code, out, err = run("train", "--stage", "ldm", "--model", "small", "--device", "cpu", *how)
    assert code == 0, err
    assert "no finished one in runs/vqgan: training the small one first" in out
    assert load_model("runs/ldm").settings["first_stage_settings"]["size"] == 64

    calls = []
    monkeypatch.setattr(train, "train", lambda name, typed, resume: calls.append((typed, resume)))
    assert train.first_stage_for({}) == str(tmp_path / "runs" / "vqgan") and not calls
    save_model("runs/vqgan/model.pt", "vqgan", FIRST | {"updates": 9}, [], 2, {})
    train.first_stage_for({})
    assert calls == [({}, True)]  # an unfinished one is continued


def test_a_shipped_model_has_averaged_weights_in_half_precision_and_no_folders(
    tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(str(data.ASSETS))
    import ship

    raw, ema = tiny(), tiny(predict="v")
    for p in ema.parameters():
        p.data = p.data.half().float()
    settings = TINY | {"data": str(tmp_path / "mine"), "predict": "v"}
    settings["first_stage_settings"] = FIRST | {"data": str(tmp_path / "mine")}
    weights = {"raw": raw.state_dict(), "ema": ema.state_dict()}
    save_model(tmp_path / "model.pt", "ldm", settings, COLOUR_NAMES, 9, weights)
    ship.ship(tmp_path / "model.pt", tmp_path / "small.pt")
    content = ldm.read_checkpoint(tmp_path / "small.pt")
    assert all(w.dtype == torch.float16 for w in content["weights"]["ema"].values())
    assert str(tmp_path) not in str(content["settings"])
    model = load_model(tmp_path / "small.pt")
    for name, value in ema.state_dict().items():
        assert torch.equal(model.state_dict()[name], value.half().float())


# ------------------------------------------------------------------------------- published files

SMALL_STAGE = {"channels": 32, "multipliers": (1, 2), "blocks": 1, "attention_levels": (1,)}
SMALL_UNET = {"channels": 32, "multipliers": (1, 2), "blocks": 1, "attention_levels": None}
FAMILIES = {  # small ones beside the published ones: table in ldm.py -> rows
    "FIRST_STAGES": {
        (24, 4): SMALL_STAGE | {"z_channels": 4},
        (4, 4, 1, 1): SMALL_STAGE | {"z_channels": 2},
    },
    "LATENT_UNETS": {(32, 4, 3, 3): SMALL_UNET | {"context_channels": 12}},
}
TABLES = ("alphas_cumprod", "sqrt_alphas_cumprod", "posterior_mean_coef2")


@pytest.fixture(autouse=True)
def small_families(monkeypatch):
    for table, rows in FAMILIES.items():
        for shape, row in rows.items():
            monkeypatch.setitem(getattr(ldm, table), shape, row)


def published(labels=10):
    """The state dict of a small class-conditional model in the published form.

    Its averaged weights are its weights + 0.01.
    """
    torch.manual_seed(0)
    unet = stir(latent_unet(32, (1, 2), 1, 4, 12))
    first_stage = stir(VQGAN(**SMALL_STAGE, bottleneck=Codebook(24, 4)), 1)
    state = {"betas": SCHEDULES["sqrt_linear"]().float()}
    state |= {name: torch.zeros(1000) for name in TABLES}
    state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    for name, value in unet.state_dict().items():
        state[f"model.diffusion_model.{name}"] = value
        state["model_ema.diffusion_model" + name.replace(".", "")] = value + 0.01
    state |= {f"first_stage_model.{k}": value for k, value in first_stage.state_dict().items()}
    return state | {"cond_stage_model.embedding.weight": randn(labels, 12)}


@pytest.fixture
def cin(tmp_path):
    return lightning_file(tmp_path / "model.ckpt", published())


def test_known_families_are_the_published_networks():
    counts = {(8192, 3): 55_322_782, (16384, 4): 67_717_295, (8, 8, 1, 1): 83_653_863}
    with torch.device("meta"):
        for shape, count in counts.items():
            name = "quantize.embedding.weight" if len(shape) == 2 else "quant_conv.weight"
            settings = ldm.first_stage_settings({name: torch.empty(shape)}, "model.ckpt")
            first_stage = build_first_stage(settings)
            assert sum(p.numel() for p in first_stage.parameters()) == count
            assert first_stage.state_dict()[name].shape == shape
        row = ldm.ALL_LATENT_UNETS | ldm.LATENT_UNETS[256, 4, 3, 3]
        names = ("channels", "multipliers", "blocks", "attention_levels", "context_channels")
        unet = latent_unet(z_channels=4, **{name: row[name] for name in names})
        assert sum(p.numel() for p in unet.parameters()) == 394_984_196


def test_a_published_class_conditional_model_opens_with_either_weights(cin):
    state = published()
    for weights, offset in (("raw", 0.0), ("ema", 0.01)):
        model = load_model(cin, weights)
        for name, value in model.unet.state_dict().items():
            assert torch.equal(value, state[f"model.diffusion_model.{name}"] + offset)
        for name, value in model.first_stage.state_dict().items():
            assert torch.equal(value, state[f"first_stage_model.{name}"])
        table = state["cond_stage_model.embedding.weight"]  # not in the published average
        assert torch.equal(model.context.weight[:10], table)
        torch.testing.assert_close(model.context.weight[10], table.mean(0))
    assert model.classes == [str(i) for i in range(10)] and model.settings["p_uncond"] == 0
    assert model.latent_scale == 1 and model.shape == (4, 128, 128)
    assert isinstance(model, ldm.LatentDiffusion)


def test_a_published_file_without_an_average_falls_back_to_raw_weights(tmp_path, capsys):
    state = published()
    raw = {name: value for name, value in state.items() if not name.startswith("model_ema.")}
    path = lightning_file(tmp_path / "model.ckpt", raw)
    model = load_model(path)
    message = f"{path} has no averaged weights; its raw weights are used\n"
    assert capsys.readouterr().err == message
    weight = state["model.diffusion_model.out.2.weight"]
    assert torch.equal(model.unet.state_dict()["out.2.weight"], weight)
    load_model(path, "raw")
    assert capsys.readouterr().err == ""


def test_a_published_file_in_half_precision_opens(tmp_path):
    """Its schedule too is rounded to half precision."""
    state = {name: value.half() for name, value in published().items()}
    model = load_model(lightning_file(tmp_path / "model.ckpt", state), "raw")
    assert torch.equal(model.diffusion.beta[1:], SCHEDULES["sqrt_linear"]())
    for name, value in model.unet.state_dict().items():
        assert torch.equal(value, state[f"model.diffusion_model.{name}"].float())


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


def renamed(state, old, new):
    return without(state, old) | {new: state[old]}


EDITS = {
    "1 missing (first: unet.out.2.bias)": lambda s: without(s, "model.diffusion_model.out.2.bias"),
    "1 missing (first: unet.time_embed.0.bias); 1 unknown (first: diffusion_modeltime)": lambda s: (
        renamed(s, "model_ema.diffusion_modeltime_embed0bias", "model_ema.diffusion_modeltime")
    ),
    "1 unknown (first: first_stage.extra)": lambda s: (
        s | {"first_stage_model.extra": torch.zeros(1)}
    ),
    "1 unknown (first: scale_factor)": lambda s: s | {"scale_factor": torch.tensor(0.2)},
    "1 of another shape (first: context.weight)": lambda s: (
        s | {"cond_stage_model.embedding.weight": torch.zeros(10, 13)}
    ),
    "it has no 'context.weight'": lambda s: without(s, "cond_stage_model.embedding.weight"),
    "unet.input_blocks.0.0.weight has the shape (64, 4, 3, 3)": lambda s: (
        s | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(64, 4, 3, 3)}
    ),
    "first_stage.quantize.embedding.weight has the shape (25, 4)": lambda s: (
        s | {"first_stage_model.quantize.embedding.weight": torch.zeros(25, 4)}
    ),
    "betas 0.000100 to 0.020000, but expected": lambda s: s | {"betas": SCHEDULES["linear"]()},
    "no betas, but expected": lambda s: without(s, "betas"),
}


@pytest.mark.parametrize("words", EDITS)
def test_wrong_published_files_are_refused_with_the_difference(tmp_path, words):
    path = lightning_file(tmp_path / "model.ckpt", EDITS[words](published()))
    with pytest.raises(UserError) as error:
        load_model(path)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_fine_tuning_keeps_all_but_a_label_table_of_another_size(
    run, refused, cin, folder, undisturbed, first_stage, tmp_path, monkeypatch, capsys
):
    """--init decides the network and the first stage."""
    s, source = stage(folder, None, init=str(cin), size=16), load_model(cin)
    assert "the label table is new" in capsys.readouterr().out
    assert equal_tensors(s.model.unet.state_dict(), source.unet.state_dict())
    assert equal_tensors(s.model.first_stage.state_dict(), source.first_stage.state_dict())
    assert s.model.context.weight.shape == (9, 12)
    assert (s.settings.channels, s.settings.predict, s.settings.latent_scale) == (32, "eps", 1.0)
    ours = stage(folder, None, init=str(undisturbed)).model
    assert equal_tensors(ours.state_dict(), load_model(undisturbed).state_dict())

    common = ("train", "--stage", "ldm", "--data", folder, "--device", "cpu")
    common += ("--out", tmp_path / "run")
    assert "--channels 64: " in refused(*common, "--init", cin, "--channels", 64)
    assert "--first-stage" in refused(*common, "--init", cin, "--first-stage", first_stage)
    monkeypatch.setattr(LatentStage, "preview", lambda *arguments, **more: {})
    how = ("--precision", "float32", "--size", 16, "--batch", 2, "--init", cin, "--updates", 1)
    code, _, err = run(*common, *how)
    assert code == 0, err
    cin.unlink()  # a resumed run does not need it
    code, _, err = run(*common, "--resume", "--updates", 2)
    assert code == 0, err


# ------------------------------------------------------------------------------------- sample.py


def test_published_models_and_ours_draw_at_other_sizes(
    run, refused, cin, undisturbed, tiny_model, tmp_path
):
    out = tmp_path / "a.png"
    for model, label, size in ((cin, 7, 16), (undisturbed, "blue", 64)):
        how = ("--run", model, "--label", label, "--size", size, "--n", 1, "--steps", 2)
        code, _, err = run("sample", *how, "--out", out)
        assert code == 0, err
        assert Image.open(out).size == (68, 68)  # small pictures are enlarged
    common = ("sample", "--steps", 2, "--run", undisturbed)
    assert "--size 17: expected a multiple of 4" in refused(*common, "--size", 17)
    assert "this model diffuses latents" in refused(*common, "--clip")
    assert "this model draws pixels" in refused("sample", "--run", tiny_model, "--size", 64)


def test_a_pyramid_is_trained_saved_and_drawn_at_another_size(
    run, refused, folder, first_stage, tmp_path
):
    how = (
        "--data",
        folder,
        "--first-stage",
        first_stage,
        "--pyramid",
        32,
        "--out",
        tmp_path / "run",
    )
    assert run("train", *ARGUMENTS, *how)[0] == 0
    model = load_model(tmp_path / "run")
    assert len(model.unet.unets) == 2 and set(model.unet.level.tolist()) <= {0, 1}
    draw = ("sample", "--run", tmp_path / "run", "--label", "blue", "--n", 2, "--steps", 2)
    assert run(*draw, "--size", 32, "--sampler", "plms", "--out", tmp_path / "a.png")[0] == 0
    assert "--size 20: expected a multiple of 8" in refused(*draw, "--size", 20)
    tuned = stage(folder, None, init=str(tmp_path / "run"), size=16)
    assert tuned.settings.pyramid == (32,)
    raw = load_model(tmp_path / "run", "ema").unet.state_dict()
    assert equal_tensors(tuned.model.unet.state_dict(), raw)


def test_5_3_1_scales_side_by_side(run, refused, undisturbed, tmp_path):
    common = ("--run", undisturbed, "--steps", 2, "--out", tmp_path / "scales.png", "--scales", 1)
    code, text, err = run("sample", *common, 5, "--n", 3)
    assert code == 0, err
    model = load_model(undisturbed)
    images = images_by_label(model, 3, steps=2, scale=5.0, progress=False)
    distance = mean_colour_distances(images, COLOUR_NAMES).mean()
    expected = ["scale", "5", f"{distance:.1f}", f"{variety(images[:-1]).mean():.1f}"]
    assert text.splitlines()[2].split() == expected
    assert "needs --n 2 or more" in refused("sample", *common, "--n", 1)


def test_a_pyramid_is_sampled_with_noise_by_default():
    """Its U-Nets make errors of their own; a deterministic sampler would carry them along."""
    how = {"seeds": [0, 1], "steps": 4}
    plain, pyramid = {"sampler": "plms"}, {"sampler": "dpm", "eta": 1.0}
    for model, own in ((tiny(), plain), (tiny(**PYRAMID), pyramid)):
        a, b = (list(denoise(model, [0, 1], **how, **more))[-1][1] for more in ({}, own))
        assert torch.equal(a, b)


def test_a_model_with_a_pyramid_guides_where_the_noise_is_strong_and_says_so(
    run, refused, undisturbed, cin, tmp_path
):
    """The model's threshold is the default of sample.py, which writes it down. Others always
    guide."""
    assert (load_model(undisturbed).guide_above, load_model(cin).guide_above) == (0, 0)
    model, out = tiny(**PYRAMID), tmp_path / "set"
    own, same, plain = (
        list(denoise(model, [0, 1], [0, 1], steps=4, scale=15.0, **more))[-1][1]
        for more in ({}, {"guide_above": 4.0}, {"guide_above": 0.0})
    )
    assert torch.equal(own, same) and (own - plain).abs().max() > 1e-3
    common = ("--run", undisturbed, "--steps", 2, "--label", 0)
    for more, value in ((), 0.0), (("--guide-above", 8), 8.0):
        how = (*common, "--per-label", 1, "--out", out / str(value), *more)
        code, _, err = run("sample", *how)
        assert code == 0, err
        written = json.loads((out / str(value) / "settings.json").read_text())
        assert written["guide_above"] == value
    assert "--guide-above -1: expected 0 or more" in refused("sample", *common, "--guide-above", -1)
    message = refused("sample", *common, "--guide-above", 1, "--guidance", "classifier")
    assert "--guide-above: not with --guidance classifier" in message


# ----------------------------------------------------- faults that were found by trying the product


def test_1_4_any_embedding_can_be_the_context(undisturbed):
    """Tokens instead of labels, through `generate`: those of a label draw the label's pictures, and
    guidance starts from the zero-label."""
    model = load_model(undisturbed)
    for p in model.unet.parameters():
        p.data += 0.02 * torch.randn_like(p)
    how = {"seeds": [1, 2], "steps": 2, "progress": False, "scale": 3.0}
    tokens = model.context.weight.detach()[[0, 2]][:, None]
    by_label, by_token = (generate(model, y, **how) for y in ([0, 2], tokens))
    assert np.array_equal(by_label, by_token)
    other = generate(model, tokens + torch.randn(tokens.shape), **how)
    assert other.shape == by_label.shape and not np.array_equal(other, by_label)
    zero = model.zero_like(tokens.expand(2, 3, -1))
    assert zero.shape == (2, 3, tokens.shape[2])
    assert torch.equal(zero[1, 2], model.context.weight[model.zero_label])


def test_b3_latent_models_start_at_the_mean_colour_of_the_label(folder, first_stage):
    """The mean is that of the scaled training latents, per label; for the zero-label, of all."""
    s = stage(folder, first_stage)
    model, (z, _) = s.model, s.examples(s.train_rows)
    for label in np.unique(s.train_labels):
        mean = z[s.train_labels == label].mean((0, 2, 3))
        torch.testing.assert_close(model.mean[label], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.mean[8], z.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    seen, kept = [], model.diffusion.alpha_bar[-1].sqrt().float()
    model.eps = lambda x, t, y: seen.append(x) or torch.zeros_like(x)
    list(denoise(model, [3] * 500, np.arange(500), steps=1, scale=1.0))
    error = (seen[0].mean((0, 2, 3)) - kept * model.mean[3]).abs().max()
    assert error < 4 / (500 * 64) ** 0.5 and abs(seen[0].std() - 1) < 0.02
    x_T = model.start(torch.zeros(1, 3, 512), torch.zeros(1, *model.shape))  # tokens, no label
    torch.testing.assert_close(x_T[0, :, 0, 0], kept * model.mean[8])


def test_b4_only_published_first_stages_have_the_factor_1(folder, first_stage, tmp_path):
    assert stage(folder, first_stage).settings.latent_scale != 1.0
    published = make_first_stage(tmp_path / "published.pt", update=0)
    assert stage(folder, published).settings.latent_scale == 1.0
    assert Latent().latent_scale is None  # of the thesis's size, too


def test_schedule_and_length_reach_every_model():
    sizes = {"channels": 32, "multipliers": (1, 1), "blocks": 1, "T": 30, "predict": "v"}
    sizes |= {"shape": (3, 8, 8), "space": "pixels", "condition": "sum"}
    for name, schedule in SCHEDULES.items():
        settings = sizes | {"schedule": name}
        latent = build_latent(TINY | {"schedule": name, "T": 30}, ["a"])
        others = (ldm.build_letters(settings, ["a"]), ldm.build_classifier(settings, ["a", "b"]))
        for model in (latent, *others):
            assert torch.equal(model.diffusion.beta[1:], schedule(30))


def test_the_settings_of_a_first_stage_reach_it():
    for released, weights in ((False, (1, 0.5)), (True, (0.5, 1))):
        book = build_first_stage(FIRST | {"beta": 0.5, "released": released}).quantize
        assert (book.w_codebook, book.w_commitment) == weights
    model = build_first_stage(
        FIRST | {"bottleneck": "kl", "kl_weight": 0.02, "attention_levels": (0,)}
    )
    assert model.quantize.kl_weight == 0.02
    assert isinstance(model.encoder.down[0].attn[0], AttnBlock)
    assert isinstance(model.encoder.down[1].attn[0], torch.nn.Identity)


def test_training_labels_pictures_by_the_rgb_rule(folder, first_stage, monkeypatch):
    """4.2.2. The pictures of the small set lie in folders that are named after the colours."""
    asked, open_set = [], train.data.open_set

    def spy(name, size, labels):
        asked.append((size, labels))
        return open_set(name, size, labels)

    monkeypatch.setattr(train.data, "open_set", spy)
    stage(folder, first_stage)
    typed = {"model": "small", "device": "cpu", "precision": "float32", "perceptual": 0.0}
    train.AutoencoderStage(
        train.new_settings(FirstStage, typed | {"data": str(folder), "size": 32})
    )
    assert asked == [(16, "rgb"), (32, "rgb")]


def test_the_latent_model_takes_the_best_first_stage_of_a_run(tmp_path):
    make_first_stage(tmp_path / "model.pt", update=9)
    assert train.open_first_stage(tmp_path).update == 9
    make_first_stage(tmp_path / "best.pt", seed=1, update=7)
    assert train.open_first_stage(tmp_path).update == 7
