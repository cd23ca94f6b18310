"""Sections 3.1 to 3.4 and 4.4.7: bottlenecks, losses, first stages, their training and files."""

import ast
import hashlib
import os
import pickle
from collections import OrderedDict
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import equal_tensors, fill_, lightning_file, newest_checkpoint, standard_normal
from PIL import Image
from test_ldm import SMALL_STAGE, small_families  # noqa: F401 (a fixture that each test uses)

import data
import ldm
import train
from data import UserError, to_tensor
from ldm import load_model, load_perceptual, save_model
from sample import losses_of, open_originals, reconstruct
from train import AutoencoderStage, FirstStage
from vqgan import (
    VGG16,
    VQGAN,
    AttnBlock,
    Codebook,
    Decoder,
    Encoder,
    GaussianBottleneck,
    NoBottleneck,
    PatchDiscriminator,
    PerceptualLoss,
    adaptive_weight,
    code_use,
    discriminator_loss,
    generator_loss,
    kl_to_standard_normal,
    nearest_code,
)

TINY = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "attention_levels": (1,)}
TINY |= {"z_channels": 4, "groups": 2}


def randn(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64)


def images(n=2, side=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand((n, 3, side, side), generator=g, dtype=torch.float64) * 2 - 1


def tiny(bottleneck):
    torch.manual_seed(0)
    model = VQGAN(**TINY, bottleneck=bottleneck).double()
    for p in model.parameters():  # no weight stays zero, so that every path matters
        p.data += 0.1 * torch.randn_like(p)
    return model


def codebook(codes, seed=0, **more):
    book = Codebook(codes, 4, **more).double()
    book.embedding.weight.data.copy_(randn(codes, 4, seed=seed))
    return book


def rows(z):
    """(B, D, H, W) -> (N, D)."""
    return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)


def count(network):
    return sum(p.numel() for p in network.parameters())


# --------------------------------------------------------------------------------------- 3.1, 3.2


def test_section_3_1_auto_encoder_is_decode_of_encode_and_has_no_latent_loss():
    model, x = tiny(NoBottleneck()), images()
    x_r, loss, codes = model(x)
    assert loss == 0 and codes is None
    torch.testing.assert_close(x_r, model.decode(model.encode(x)))


def test_eq_3_1_kl_term():
    """Against the integral on a grid."""
    mu, logvar = torch.tensor([0.7, -0.4], dtype=torch.float64)
    z = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    q = torch.distributions.Normal(mu, torch.exp(logvar / 2))
    p = torch.distributions.Normal(0.0, 1.0)
    integral = torch.trapezoid(q.log_prob(z).exp() * (q.log_prob(z) - p.log_prob(z)), z)
    torch.testing.assert_close(kl_to_standard_normal(mu, logvar), integral, rtol=1e-6, atol=0)
    assert kl_to_standard_normal(torch.zeros(()), torch.zeros(())) == 0


def test_eq_3_1_reparametrisation_and_gradients():
    """z = mu + sigma xi has the moments of q(z|x), and the gradient reaches mu and sigma."""
    bottleneck, xi = GaussianBottleneck(kl_weight=0.5), randn(100_000, 2, 1, 1)
    z_e = torch.tensor([0.3, -1.0, 0.5, 0.2], dtype=torch.float64).view(1, 4, 1, 1)
    z_e.requires_grad_()
    z, loss, _ = bottleneck(z_e.expand(100_000, 4, 1, 1), xi)
    mu, logvar = z_e.detach().chunk(2, dim=1)
    sigma = torch.exp(logvar / 2)
    torch.testing.assert_close(z.mean(0), mu[0], atol=0.02, rtol=0)
    torch.testing.assert_close(z.std(0), sigma[0], rtol=0.02, atol=0)
    (g,) = gradients(z[0].sum(), z_e)
    torch.testing.assert_close(g, torch.cat([torch.ones_like(mu), sigma * xi[:1] / 2], dim=1))
    (g,) = gradients(loss, z_e)  # d KL / d mu = mu,  d KL / d logvar = (sigma^2 - 1) / 2
    torch.testing.assert_close(g, 0.5 * torch.cat([mu, (sigma**2 - 1) / 2], dim=1) / 2)
    assert torch.equal(bottleneck(z_e)[0], mu) and torch.equal(bottleneck.latent(z_e), mu)


def test_a_variance_is_kept_between_exp_of_minus_30_and_20():
    z_e = torch.tensor([2.0, -40.0, 3.0, 25.0]).view(2, 2, 1, 1)
    mu, logvar = GaussianBottleneck.moments(z_e)
    assert mu.flatten().tolist() == [2, 3] and logvar.flatten().tolist() == [-30, 20]


# ------------------------------------------------------------------------------ 3.4, the code-book


def test_eq_3_3_nearest_code():
    """E11, E12: z_q is the nearest code; argmax, as fig. 3.4 prints, takes the farthest."""
    book, z = codebook(32), randn(3, 4, 5, 6, seed=1)
    z_q, _, k = book(z)
    distance = torch.cdist(rows(z), book.embedding.weight)  # (90, 32)
    nearest = distance.argmin(1)
    assert torch.equal(k.flatten(), nearest)
    torch.testing.assert_close(rows(z_q), book.embedding.weight[nearest])
    assert (distance.max(1).values > distance.gather(1, k.reshape(-1, 1))[:, 0]).all()


def test_e13_figure_3_4_does_not_compile():
    """About the printed text: a comment after a line continuation is a syntax error."""
    printed = "loss = beta * \\\n    # Commitment Loss\n    mean((z_q - z) ** 2)\n"
    with pytest.raises(SyntaxError):
        ast.parse(printed)


def test_eq_3_4_code_book_and_commitment_losses():
    """Value, and which term moves what, with which weight (E14)."""
    z, grads = randn(2, 4, 3, 3, seed=2).requires_grad_(), {}
    for released in (False, True):
        book = codebook(8, seed=3, beta=0.25, released=released)
        _, loss, k = book(z)
        z_q = book.lookup(k)
        torch.testing.assert_close(loss, 1.25 * F.mse_loss(z_q, z))  # wherever beta stands
        grads[released] = gradients(loss, z, book.embedding.weight)
        expected = (1.0 if released else 0.25) * 2 * (z - z_q).detach() / z.numel()
        torch.testing.assert_close(grads[released][0], expected)
    (z_thesis, e_thesis), (z_released, e_released) = grads[False], grads[True]
    torch.testing.assert_close(z_released, 4 * z_thesis)
    torch.testing.assert_close(e_released, 0.25 * e_thesis)
    e = book.embedding.weight.detach()
    expected = torch.zeros_like(e)  # each code is pulled towards the mean of its vectors
    expected.index_add_(0, k.flatten(), 2 * (rows(z_q) - rows(z)).detach() / z.numel())
    torch.testing.assert_close(e_thesis, expected)


def test_eq_3_4_straight_through():
    """E15: forward z_q, backward the identity: the reconstruction loss moves the encoder and no
    code. Without the line it would move the codes and never the encoder."""
    z, book = randn(1, 4, 2, 2, seed=1).requires_grad_(), codebook(8)
    z_q, _, k = book(z)
    torch.testing.assert_close(z_q, book.lookup(k))
    weight = randn(1, 4, 2, 2, seed=2)
    g_z, g_e = gradients((weight * z_q).sum(), z, book.embedding.weight)
    assert torch.equal(g_z, weight) and g_e is None
    g_z, g_e = gradients((weight * book.lookup(k)).sum(), z, book.embedding.weight)
    assert g_z is None and g_e.abs().sum() > 0


def test_eq_3_4_losses_come_before_straight_through():
    """The code-book term must not pull the encoder: computed with z_q it would."""
    z, book = randn(1, 4, 2, 2, seed=1).requires_grad_(), codebook(8, beta=0.0)
    z_q, loss, _ = book(z)
    assert gradients(loss, z)[0].abs().sum() == 0
    assert gradients(F.mse_loss(z_q, z.detach()), z)[0].abs().sum() > 0


# trained codes, vectors far outside them, and codes as initialised
@pytest.mark.parametrize("spread", [1.0, 4.0, 1 / 16384])
@pytest.mark.parametrize("dim", [4, 12])  # the k-d tree, and the matrix in parts
def test_nearest_code_is_exact(spread, dim):
    codes = (spread**0.5 * randn(1000, dim)).float()
    z = (randn(300, dim, seed=1) / spread**0.5).float()
    distance = (z.double()[:, None] - codes.double()).square().sum(-1)
    found = distance.gather(1, nearest_code(z, codes, chunk=7000)[:, None])[:, 0]
    torch.testing.assert_close(found, distance.min(1).values, rtol=1e-12, atol=0)


def test_nearest_code_of_a_code_is_itself_and_the_first_of_equals_in_chunks():
    codes, expected = randn(64, 12).float(), torch.arange(64)
    codes[40], expected[40] = codes[3], 3
    assert torch.equal(nearest_code(codes, codes), expected)


def test_a_diverged_network_is_reported_by_the_loop_and_not_by_the_search():
    assert nearest_code(torch.full((2, 4), torch.nan), torch.randn(8, 4)).shape == (2,)


def test_code_use():
    assert code_use(torch.tensor([5, 5, 0, 5, 5])) == (4, pytest.approx(4))
    used, perplexity = code_use(torch.tensor([3, 1]))
    assert used == 2
    assert perplexity == pytest.approx(np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25)))


# --------------------------------------------------------------------------------------- the model


@pytest.fixture(scope="module")
def golden():
    """An image, its latent and its reconstruction (every fourth pixel), by the published code."""
    x = (standard_normal("input:vq.x", (2, 3, 64, 64))[:1] / 2).clamp(-1, 1)
    model = fill_(VQGAN(channels=32, bottleneck=Codebook(64, 4)), "first_stage_model.")
    with np.load(Path(__file__).parent / "golden" / "vq.npz") as file:
        return model, {"x": x} | {name: torch.from_numpy(file[name]) for name in file.files}


def test_outputs_equal_those_of_the_published_code(golden):
    model, golden = golden
    with torch.no_grad():
        z = model.encode(golden["x"])
        torch.testing.assert_close(z, golden["z"], rtol=0, atol=1e-9)
        assert torch.equal(model.quantize.nearest(z).flatten(), golden["indices"])
        x_r, loss, _ = model(golden["x"])
    torch.testing.assert_close(x_r[..., ::4, ::4], golden["rec"], rtol=0, atol=1e-9)
    torch.testing.assert_close(loss, 1.25 * F.mse_loss(model.quantize.project(z), z))


def test_e54_encode_does_not_quantise_and_decode_does(golden):
    model, golden = golden
    with torch.no_grad():
        z = model.encode(golden["x"])
        z_q = model.quantize.project(z)
        assert (z - z_q).abs().max() > 0.1
        torch.testing.assert_close(model.decode(z), model.decode(z_q))
        unquantised = model.decoder(model.post_quant_conv(z))
        assert (model.decode(z) - unquantised).abs().max() > 0.1


def test_a_code_book_that_is_not_active_is_no_bottleneck():
    model, x = tiny(codebook(16)), images()
    quantised = model(x)[0]
    model.quantize.active = False
    x_r, loss, codes = model(x)
    assert loss == 0 and codes is None
    torch.testing.assert_close(x_r, model.decoder(model.post_quant_conv(model.encode(x))))
    torch.testing.assert_close(x_r, model.decode(model.encode(x)))
    assert (x_r - quantised).abs().max() > 0.1


def test_e55_published_parameter_counts():
    with torch.device("meta"):
        model = VQGAN()
        assert count(model.encoder) == 27_397_764 and count(model.decoder) == 40_253_955
        assert count(model.quantize) == 65_536 and count(model) == 67_717_295
        assert count(PatchDiscriminator()) == 663_361
        assert count(PatchDiscriminator(layers=3)) == 2_765_633


def test_published_names_and_shapes():
    """A sample of the published entries: one of each kind, where a slip is likely."""
    with torch.device("meta"):
        networks = (VQGAN(), PatchDiscriminator(), PerceptualLoss())
    state, loss, perceptual = (
        {name: tuple(value.shape) for name, value in network.state_dict().items()}
        for network in networks
    )
    assert state["encoder.down.1.block.0.nin_shortcut.weight"] == (256, 128, 1, 1)
    assert state["encoder.down.2.downsample.conv.weight"] == (256, 256, 3, 3)
    assert state["encoder.down.3.attn.1.proj_out.bias"] == (512,)
    assert state["encoder.conv_out.weight"] == (4, 512, 3, 3)
    assert state["decoder.up.0.block.0.conv1.weight"] == (128, 256, 3, 3)
    assert state["decoder.up.1.upsample.conv.weight"] == (256, 256, 3, 3)
    assert state["decoder.up.3.block.2.norm2.weight"] == (512,)
    assert state["decoder.up.3.attn.2.q.weight"] == (512, 512, 1, 1)
    assert state["decoder.mid.attn_1.norm.weight"] == (512,)
    assert state["quantize.embedding.weight"] == (16384, 4)
    assert "encoder.down.3.downsample.conv.weight" not in state
    assert "decoder.up.0.upsample.conv.weight" not in state
    assert (len(state), len(loss), len(perceptual)) == (299, 16, 33)
    assert loss["main.8.weight"] == (1, 256, 4, 4) and loss["main.3.running_var"] == (128,)
    assert perceptual["net.slice4.19.weight"] == (512, 512, 3, 3)
    assert perceptual["lin4.model.1.weight"] == (1, 512, 1, 1)


def test_attention_is_softmax_over_positions():
    torch.manual_seed(0)
    layer, x = AttnBlock(8, 2).double(), randn(2, 8, 3, 5)
    h = layer.norm(x)
    q, k, v = (conv(h).reshape(2, 8, 15) for conv in (layer.q, layer.k, layer.v))
    weight = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / 8**0.5, dim=-1)
    out = torch.einsum("bij,bcj->bci", weight, v).reshape(x.shape)
    torch.testing.assert_close(layer(x), x + layer.proj_out(out))


def test_encoder_and_decoder_change_the_resolution_by_f():
    z = Encoder(8, (1, 1, 2), 1, (), 5, 2)(torch.zeros(1, 3, 24, 40))
    assert z.shape == (1, 5, 6, 10)
    assert Decoder(8, (1, 1, 2), 1, (), 5, 2)(z).shape == (1, 3, 24, 40)


# ------------------------------------------------------------------------------------------- 3.2.2


@pytest.fixture(scope="module")
def perceptual():
    torch.manual_seed(0)
    loss = PerceptualLoss().double()
    for i in range(5):
        getattr(loss, f"lin{i}").model[1].weight.data.abs_()
    return loss


def test_e09_perceptual_loss(perceptual):
    """Zero for equal images, symmetric, else positive; its own weights are fixed."""
    x, y = images(2, 32), images(2, 32, seed=1).requires_grad_()
    assert perceptual(x, x).abs().max() == 0
    torch.testing.assert_close(perceptual(x, y), perceptual(y, x))
    assert (perceptual(x, y) > 0).all()
    assert gradients(perceptual(x, y).sum(), y)[0].abs().sum() > 0
    assert not any(p.requires_grad for p in perceptual.parameters())


def test_perceptual_loss_by_hand(perceptual):
    """Shift and scale, five feature maps, unit length over the channels, weighted squares."""
    x, y, vgg = images(1, 16), images(1, 16, seed=1), perceptual.net.state_dict()
    shift = torch.tensor([-0.030, -0.088, -0.188]).double()[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450]).double()[:, None, None]
    slices = [(0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)]

    def features(image):
        h, out = (image - shift) / scale, []
        for s, convs in enumerate(slices, start=1):
            h = F.max_pool2d(h, 2, 2) if s > 1 else h
            for i in convs:
                weight, bias = (vgg[f"slice{s}.{i}.{name}"] for name in ("weight", "bias"))
                h = F.conv2d(h, weight, bias, padding=1).clamp(min=0)
            out.append(h / (torch.linalg.vector_norm(h, dim=1, keepdim=True) + 1e-10))
        return out

    expected = 0.0
    for i, (a, b) in enumerate(zip(features(x), features(y))):
        w = getattr(perceptual, f"lin{i}").model[1].weight[0]
        expected += (w * (a - b).square()).sum(1).mean()
    torch.testing.assert_close(perceptual(x, y)[0], expected, rtol=1e-6, atol=1e-12)


def test_perceptual_weights_from_files_in_the_published_form(tmp_path, monkeypatch):
    torch.manual_seed(1)
    state, files = PerceptualLoss().state_dict(), ldm.PERCEPTUAL_FILES
    heads = {name: value + 1 for name, value in state.items() if name.startswith("lin")}
    vgg = {f"features.{k.split('.', 1)[1]}": v for k, v in VGG16().state_dict().items()}
    vgg["classifier.0.weight"] = torch.zeros(1)  # torchvision's file has this too
    for name, content in (("vgg16-397923af.pth", vgg), ("vgg.pth", heads)):
        torch.save(OrderedDict(content), tmp_path / name)
    with pytest.raises(UserError, match="its sha256 is not 397923af"):
        load_perceptual(tmp_path)
    for name, (kind, _, origin) in list(files.items()):
        digest = hashlib.new(kind, (tmp_path / name).read_bytes()).hexdigest()
        monkeypatch.setitem(files, name, (kind, digest, origin))
    loss = load_perceptual(tmp_path)
    assert torch.equal(loss.net.slice1["0"].weight, vgg["features.0.weight"])
    assert torch.equal(loss.net.slice3["12"].weight, vgg["features.12.weight"])
    assert torch.equal(loss.lin2.model[1].weight, heads["lin2.model.1.weight"])
    (tmp_path / "vgg.pth").unlink()
    with pytest.raises(UserError, match=r"vgg.pth is not there; .*7,289 bytes"):
        load_perceptual(tmp_path)


# -------------------------------------------------------------------------------------- 3.3, 3.4.1


def test_eq_3_2_gan_objective():
    """E10, E17: with densities p, q of images at three logits, the loss of D is least at
    D = p / (p + q), where it equals log 2 - JS(p, q). The printed sign makes it largest there."""
    p, q = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]], dtype=torch.float64)
    real, fake = (torch.repeat_interleave(torch.arange(3), (10 * d).round().int()) for d in (p, q))

    def loss(logit):
        return discriminator_loss(logit[real], logit[fake], "vanilla")

    best, m = torch.log(p / q), (p + q) / 2  # sigmoid(best) = p / (p + q)
    js = ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2
    torch.testing.assert_close(loss(best), np.log(2) - js)
    assert all(loss(best + 0.1 * randn(3, seed=i)) > loss(best) for i in range(20))
    d_real, d_fake = torch.sigmoid(best[real]), torch.sigmoid(best[fake])
    printed = d_real.log().mean() + (1 - d_fake).log().mean()  # 3.4.1's "discriminator loss"
    torch.testing.assert_close(loss(best), -printed / 2)


def test_e10_generator_loss_does_not_saturate():
    """Where D is sure of a fake, -log D(G(z)) has a gradient and log(1 - D(G(z))) has none."""
    fake = torch.tensor([-12.0], requires_grad=True)
    assert abs(gradients(generator_loss(fake, "vanilla"), fake)[0].item() + 1) < 1e-4
    assert gradients(-F.softplus(fake).mean(), fake)[0].abs() < 1e-4  # the printed one


def test_e17_hinge_loss():
    real = torch.tensor([2.0, 0.0, -1.0], requires_grad=True)
    fake = torch.tensor([-3.0, 0.5, 0.0], requires_grad=True)
    loss = discriminator_loss(real, fake)
    assert loss.item() == pytest.approx(0.5 * ((0 + 1 + 2) / 3 + (0 + 1.5 + 1) / 3))
    g_real, g_fake = gradients(loss, real, fake)
    assert g_real.tolist() == pytest.approx([0, -1 / 6, -1 / 6])
    assert g_fake.tolist() == pytest.approx([0, 1 / 6, 1 / 6])
    assert discriminator_loss(torch.zeros(4), torch.zeros(4)) == 1  # a discriminator that is dead
    assert generator_loss(fake).item() == pytest.approx(-fake.mean().item())


def test_eq_3_5_adaptive_weight():
    """E18: lambda = |grad rec| / (|grad g| + delta) at the last layer, clamped and detached."""
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    rec, g = (w * torch.tensor([3.0, 4.0])).sum(), (w * torch.tensor([0.0, 0.5])).sum()
    weight = adaptive_weight(rec, g, w)
    assert weight.item() == pytest.approx(5 / (0.5 + 1e-4)) and not weight.requires_grad
    assert adaptive_weight(rec, g * 0, w).item() == 1e4
    g_a, g_r = gradients(weight * g, w)[0], gradients(rec, w)[0]  # both terms pull equally
    assert g_a.norm().item() == pytest.approx(g_r.norm().item(), rel=1e-3)
    assert adaptive_weight(rec, g, w, average=lambda gradient: 3 * gradient) == pytest.approx(
        15 / (1.5 + 1e-4)
    )


def test_discriminator_and_code_book_begin_as_the_published_ones():
    torch.manual_seed(0)
    convs, norms, activations = (
        [layer for layer in PatchDiscriminator(64).main if isinstance(layer, kind)]
        for kind in (torch.nn.Conv2d, torch.nn.BatchNorm2d, torch.nn.LeakyReLU)
    )
    assert {layer.negative_slope for layer in activations} == {0.2}
    assert all(abs(layer.weight.std() - 0.02) < 0.002 for layer in convs)
    assert all(abs(layer.weight.mean() - 1) < 0.01 for layer in norms)
    codes = Codebook(1000, 4).embedding.weight
    assert 0.0009 < codes.max() <= 1 / 1000 and -1 / 1000 <= codes.min() < -0.0009


@pytest.mark.parametrize("layers, patch", [(2, 34), (3, 70)])
def test_discriminator_sees_patches(layers, patch):
    x = images(1, 96).requires_grad_()
    logits = PatchDiscriminator(4, layers).eval().double()(x)
    h = logits.shape[-1] // 2
    seen = gradients(logits[0, 0, h, h], x)[0][0].abs().sum(0) > 0
    rows = torch.nonzero(seen.any(1))
    assert rows.max() - rows.min() + 1 == patch


# ------------------------------------------------------------------------------------ the training


@pytest.fixture
def folder(tmp_path):
    """40 small pictures of random squares."""
    g = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(40):
        picture = np.kron(g.integers(0, 256, (4, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{i:02d}.png")
    return tmp_path / "pictures"


SMALL = {"channels": 8, "multipliers": (1, 2), "size": 32, "crop": 16, "codes": 32, "batch": 4}
SMALL |= {"disc_channels": 8, "disc_start": 0, "quantise_from": 0, "perceptual": 0.0}
SMALL |= {"blocks": 1, "attention_levels": (), "groups": 1, "lr": 1e-3, "ema": 0.995}
MACHINE = {"model": "thesis", "device": "cpu", "precision": "float32"}


def stage(folder, **changes):
    typed = SMALL | MACHINE | {"data": str(folder)} | changes
    return AutoencoderStage(train.new_settings(FirstStage, typed))


def test_no_gradient_leaks_from_one_player_into_the_other(folder):
    s = stage(folder)
    s.loss(0).backward()
    assert all(p.grad is None for p in s.discriminator.parameters())
    assert all(p.grad is not None for p in s.model.decoder.parameters())
    before = [p.grad.clone() for p in s.model.parameters()]
    s.discriminator_loss(0).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(before, s.model.parameters()))
    assert all(p.grad is not None and p.requires_grad for p in s.discriminator.parameters())


def test_loss_is_the_sum_of_its_terms_and_the_adversary_waits(folder):
    """Eq. 3.5; nothing adversarial before `disc_start`, and with weight 0 no adversary: VQ-VAE."""
    s = stage(folder, disc_start=5)
    loss, f = s.loss(4), s.figures
    assert "lambda" not in f and [player.start for player in s.players()] == [0, 5]
    assert loss.item() == pytest.approx((f["l1"] + f["latent_loss"]).item())
    loss, f = s.loss(5), s.figures
    expected = f["l1"] + f["latent_loss"] + 0.6 * f["lambda"] * f["g_loss"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert s.discriminator_loss(5).item() > 0
    assert [player.betas for player in s.players()] == [(0.9, 0.99), (0.5, 0.9)]
    s.settings.perceptual, s.perceptual = 0.25, lambda x, x_r: torch.arange(len(x)).float()
    x = torch.zeros(3, 3, 2, 2)
    assert s.reconstruction_loss(x, x + 0.5).tolist() == [0.5, 0.75, 1.0]
    assert [player.name for player in stage(folder, adversarial=0.0).players()] == ["train"]


def test_e16_reconstruction_loss_is_a_negative_log_likelihood(folder):
    """L1 is -log p(x|z) of a Laplace density but for a constant; the thesis prints + log p."""
    x, x_r = images(2), images(2, seed=1)
    nll = -torch.distributions.Laplace(x_r, 1.0).log_prob(x).mean((1, 2, 3))
    torch.testing.assert_close(stage(folder).reconstruction_loss(x, x_r), nll - np.log(2))


def test_a_model_saved_before_the_code_book_joined_does_not_quantise(tmp_path):
    settings = TINY | {"size": 16, "bottleneck": "vq", "codes": 8, "beta": 0.25}
    settings |= {"released": False, "quantise_from": 5, "equivariant": False}
    weights = {"ema": ldm.build_first_stage(settings).state_dict()}
    for update, active in ((4, False), (5, True)):
        save_model(tmp_path / "m.pt", "vqgan", settings, [], update, weights)
        assert load_model(tmp_path / "m.pt").quantize.active is active


def test_an_update_is_a_function_of_seed_and_number(folder):
    a, b = (stage(folder, bottleneck="kl", views=8) for _ in range(2))
    assert a.loss(7).item() == b.loss(7).item() != a.loss(8).item()
    assert a.validate() == b.validate()


def test_crops_are_squares_of_the_images(folder):
    s = stage(folder)
    for x, row in zip(s.images(s.train_rows[:3], data.rng(1)), s.train_rows[:3]):
        whole = to_tensor(np.array(s.data.images[row])[None])[0]
        squares = whole.unfold(1, 16, 1).unfold(2, 16, 1)  # (3, 17, 17, 16, 16)
        assert (squares == x[:, None, None]).all((0, 3, 4)).any()


def test_an_equivariant_first_stage_decodes_changed_latents_to_changed_images(folder, refused):
    """In every second update. A linear first stage, the mean of 4 x 4 pixels, is equivariant."""
    s = stage(folder, bottleneck="kl", equivariant=True, adversarial=0.0)
    sides, turned = set(), 0

    def forward(x, xi, change):
        forward.seen = x, change
        return change(x), torch.zeros(()), None

    s.model.forward = forward
    for n in range(60):
        assert s.loss(n).item() == 0  # the target is changed as the latent is
        x, change = forward.seen
        torch.testing.assert_close(F.avg_pool2d(change(x), 4), change(F.avg_pool2d(x, 4)))
        sides.add((n % 2, change(x).shape[-1]))
        turned += change(x).shape == x.shape and not torch.equal(change(x), x)
    assert sides == {(0, 16), (1, 16), (1, 8)} and 5 < turned < 25
    how = ("train", "--stage", "vqgan", "--data", folder, "--size", 32, "--equivariant")
    assert "no code" in refused(*how, "--bottleneck", "vq")


def test_codes_are_counted_over_an_epoch_and_unused_ones_move(folder):
    s, kept, epoch = stage(folder, reseed=True), stage(folder, reseed=False), 50
    before = s.model.quantize.embedding.weight.clone()
    for n in range(epoch):  # 50 updates at least, even if the set is smaller
        s.loss(n)
        kept.loss(n)
        assert ("codes_used" in s.figures) == (n == epoch - 1)
    moved = (s.model.quantize.embedding.weight != before).any(1)
    assert moved.sum() == 32 - s.figures["codes_used"] > 0 and s.counts.sum() == 0
    draw = data.rng(s.settings.seed, epoch - 1, 4)
    chosen = s.train_rows[torch.randint(len(s.train_rows), (32,), generator=draw).numpy()]
    z = torch.cat([rows(s.model.encode(x)) for x in s.images(chosen, draw).split(8)])
    codes = s.model.quantize.embedding.weight[moved]
    assert all((z == code).all(1).any() for code in codes)  # they are latents of images now
    assert torch.equal(kept.model.quantize.embedding.weight, before)


def test_the_code_book_joins_at_quantise_from(folder):
    """The network is an AE before. Then every code starts at a latent of an image, so that
    quantisation costs little."""
    s = stage(folder, quantise_from=3, codes=256)
    codes = s.model.quantize.embedding.weight.clone()
    s.loss(2)
    assert s.figures["latent_loss"] == 0
    assert torch.equal(s.model.quantize.embedding.weight, codes)
    x = s.seen[0]
    torch.testing.assert_close(s.model.decode(s.model.encode(x)), s.model(x)[0])
    s.loss(3)
    assert (s.model.quantize.embedding.weight != codes).any(1).all()
    assert 0 < s.figures["latent_loss"] < 0.1 * s.model.encode(x).var()


@pytest.mark.parametrize("bottleneck", ["none", "kl", "vq"])
def test_each_bottleneck_learns(folder, bottleneck):
    s = stage(folder, bottleneck=bottleneck, adversarial=0.0)
    optimizer = torch.optim.Adam(s.model.parameters(), 3e-3)
    before = s.validate()["validation_psnr"]
    for n in range(60):
        s.loss(n).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert s.validate()["validation_psnr"] > before + 2


ARGUMENTS = ("--stage", "vqgan", "--device", "cpu", "--precision", "float32", "--channels", 8)
ARGUMENTS += ("--multipliers", 1, 2, "--size", 16, "--codes", 16, "--batch", 4, "--updates", 8)
ARGUMENTS += ("--disc-channels", 8, "--disc-start", 4, "--quantise-from", 2, "--perceptual", 0)
ARGUMENTS += ("--model", "thesis", "--blocks", 1, "--groups", 1, "--lr", 1e-3, "--ema", 0.995)
ARGUMENTS += ("--attention-levels",)  # none
ARGUMENTS += ("--save-every", 4, "--validate-every", 4, "--preview-every", 4)


def test_interrupted_training_equals_the_uninterrupted_one(run, folder, tmp_path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    code, _, err = run("train", *ARGUMENTS, "--data", folder, "--out", one)
    assert code == 0, err
    for name in ("model.pt", "best.pt", "grid.png", "loss.png", "preview_000004.png"):
        assert (one / name).exists()
    header, *lines = (one / "log.csv").read_text().splitlines()
    last = dict(zip(header.split(","), lines[-1].split(",")))
    for column in ("lambda", "logit_real", "logit_fake", "disc_loss", "validation_sharpness"):
        assert np.isfinite(float(last[column]))

    validate, calls = AutoencoderStage.validate, []

    def interrupted(self):
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), 2)
        return validate(self)

    monkeypatch.setattr(AutoencoderStage, "validate", interrupted)
    code, out, _ = run("train", *ARGUMENTS, "--data", folder, "--out", two)
    assert code == 130 and "--resume" in out
    monkeypatch.setattr(AutoencoderStage, "validate", validate)
    assert run("train", "--stage", "vqgan", "--resume", "--out", two)[0] == 0
    (progress, tensors), (_, others) = newest_checkpoint(one), newest_checkpoint(two)
    assert progress["best"] < float("inf") and equal_tensors(tensors, others)
    assert {"train", "disc", "stage"} <= {name.split(".")[0] for name in tensors}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--crop", 17), "--crop 17: expected a multiple of 2"),
        (("--crop", 64), "--crop 64: expected a multiple of 2, at most --size"),
        (("--groups", 3), "--groups 3: must divide --channels 8"),
        (("--attention-levels", 2), "--attention-levels: expected numbers from 0 to 1"),
        (("--codes", 0), "--codes 0: must be more than 0"),
        (("--beta", -1), "--beta -1.0: must be at least 0"),
        (("--disc-layers", 4), "--disc-layers 4: too many for"),
        (
            ("--bottleneck", "kl", "--equivariant", "--crop", 16, "--disc-layers", 2),
            "--disc-layers 2: too many for 8 pixels",
        ),
        (
            ("--perceptual", 1, "--perceptual-files", "nowhere"),
            "vgg16-397923af.pth is not there",
        ),
        (("--init", "nowhere.ckpt"), "nowhere.ckpt: no such file"),
    ],
)
def test_bad_arguments(refused, folder, tmp_path, arguments, message):
    how = ("--data", folder, "--out", tmp_path / "run")
    assert message in refused("train", *ARGUMENTS, *arguments, *how)
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------- published files


def published(kind="vq"):
    """A small first stage whose settings are in `test_ldm.FAMILIES`."""
    torch.manual_seed(0)
    bottleneck = Codebook(24, 4) if kind == "vq" else GaussianBottleneck()
    z_channels = 4 if kind == "vq" else 2
    return VQGAN(**SMALL_STAGE, z_channels=z_channels, bottleneck=bottleneck).eval()


def published_file(path, model, **more):
    """A file in the published form, with the discriminator beside the model."""
    adversary = PatchDiscriminator(8).state_dict()
    state = OrderedDict(model.state_dict())
    state |= {f"loss.discriminator.{name}": value for name, value in adversary.items()}
    return lightning_file(path, state, **more)


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_a_published_file_opens_without_lightning_and_without_settings(tmp_path, capsys, kind):
    model = published(kind)
    path = published_file(tmp_path / "model.ckpt", model)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)  # plain torch does not open it
    opened, x = load_model(path), images(1, 16).float()
    with torch.no_grad():
        expected = model.decode(model.encode(x))
        torch.testing.assert_close(opened.decode(opened.encode(x)), expected)
    assert type(opened.quantize) is type(model.quantize)
    assert capsys.readouterr().err == ""  # a published first stage has no averaged weights


class Malice:
    def __reduce__(self):
        return os.system, ("touch /tmp/this-file-ran-code",)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    path = published_file(tmp_path / "model.ckpt", published(), hyper_parameters=Malice())
    with pytest.raises(UserError, match=r"refused, it asks to run (posix|nt).system"):
        load_model(path)
    assert not Path("/tmp/this-file-ran-code").exists()


def test_a_file_that_does_not_fit_says_how(tmp_path):
    path, state = tmp_path / "model.ckpt", published().state_dict()
    del state["decoder.mid.block_1.conv1.weight"]
    state["decoder.conv_out.weight"] = torch.zeros(4, 32, 3, 3)
    torch.save({"state_dict": state}, path)
    with pytest.raises(UserError) as error:
        load_model(path)
    assert "1 missing (first: decoder.mid.block_1.conv1.weight)" in str(error.value)
    assert "1 of another shape (first: decoder.conv_out.weight)" in str(error.value)
    torch.save({"state_dict": {"transformer.wte": torch.zeros(2)}}, path)
    with pytest.raises(UserError, match="it has no 'quant_conv.weight'"):
        load_model(path)


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_training_starts_from_a_published_file(run, refused, folder, tmp_path, kind):
    """4.4.7, fine-tuning: --init decides the network, the first weights and the adversary."""
    model = published(kind)
    path = published_file(tmp_path / "model.ckpt", model)
    typed = MACHINE | {"data": str(folder), "init": str(path), "size": 16, "perceptual": 0.0}
    s = AutoencoderStage(train.new_settings(FirstStage, typed))
    s.start(resumed=False)
    assert not s.settings.reseed and s.settings.quantise_from == 0  # the codes stay
    assert equal_tensors(s.model.state_dict(), model.state_dict())
    adversary = ldm.published_losses(path)["discriminator"]
    assert torch.equal(s.discriminator.main[0].weight, adversary["main.0.weight"])
    assert len(s.discriminator.main[0].weight) == 8

    common = ("train", "--stage", "vqgan", "--device", "cpu", "--out", tmp_path / "run")
    how = ("--init", path, "--data", folder, "--precision", "float32", "--perceptual", 0)
    assert "--channels 12: leave it out, --init or --run decides it (32)" in refused(
        *common, *how, "--channels", 12
    )
    code, _, err = run(*common, *how, "--size", 16, "--batch", 2, "--updates", 2)
    assert code == 0, err
    path.unlink()  # a resumed run does not need it
    code, _, err = run(*common, "--resume", "--updates", 3)
    assert code == 0, err


# --------------------------------------------------------------------------------------- sample.py


@pytest.fixture
def first_stage(tmp_path):
    """A small model file."""
    settings = TINY | {"size": 16, "bottleneck": "none", "equivariant": False}
    torch.manual_seed(0)
    state = ldm.build_first_stage(settings).state_dict()
    save_model(tmp_path / "first.pt", "vqgan", settings, [], 0, {"ema": state, "raw": state})
    return tmp_path / "first.pt"


def test_reconstruct_files(run, refused, first_stage, folder, tiny_model, tmp_path):
    files = sorted(folder.iterdir())[:3]
    common = ("sample", "--reconstruct", *files, "--run", first_stage)
    code, out, err = run(*common, "--out", tmp_path / "pair.png")
    assert code == 0, err
    originals = np.stack([data.decode(file, 16) for file in files])
    rebuilt = reconstruct(load_model(first_stage), originals)
    difference = originals.astype(float) - rebuilt
    mse = (difference**2).mean((1, 2, 3))
    decibel, l1 = 10 * np.log10(255**2 / mse), np.abs(difference).mean((1, 2, 3)) / 255
    words = [line.split() for line in out.splitlines()]
    assert [w[0] for w in words[:4]] == [*(file.name for file in files), "mean"]
    for w, expected in zip(words, zip(decibel, l1)):
        assert float(w[2]) == pytest.approx(expected[0], abs=0.006)
        assert float(w[5]) == pytest.approx(expected[1], abs=6e-5)
    run(*common, "--out", tmp_path / "folder")
    written = sorted((tmp_path / "folder").iterdir())
    assert [file.stem for file in written] == [file.stem for file in files]
    assert all(np.array_equal(np.asarray(Image.open(f)), x) for f, x in zip(written, rebuilt))
    assert "not an empty folder" in refused(*common, "--out", tmp_path / "folder")
    assert "multiple of 2" in refused(*common, "--size", 15)
    assert "first stage" in refused("sample", "--run", first_stage)
    assert "is no first stage" in refused("sample", "--reconstruct", *files, "--run", tiny_model)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    how = ("--reconstruct", tmp_path / "broken.png", "--run", first_stage)
    assert "not an image" in refused("sample", *how)


def test_fig_4_9_reconstructs_a_painting_of_every_colour(run, first_stage, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "painted", lambda size: data.paint_set(tmp_path / "set", size, 40))
    out, how = tmp_path / "figure_4_9.png", ("--reconstruct", "paintings", "--run", first_stage)
    code, text, err = run("sample", *how, "--out", out)
    assert code == 0, err
    found = open_originals(["paintings"], 16)
    _, validation = data.open_set("paintings", 16).split()
    assert len(found.labels) == len(validation) == 8 and f"{out}: 8 reconstructions" in text
    assert sorted(found.labels) == list(range(8))
    picture = np.asarray(Image.open(out))
    first = Image.fromarray(found.images[0]).resize((128, 128), Image.Resampling.NEAREST)
    left = picture.shape[1] - 8 * 130  # the margin with the names of the rows
    assert np.array_equal(picture[2:130, left : left + 128], np.asarray(first))


def test_section_3_1_picture_of_the_prior(run, first_stage, tmp_path):
    how = ("--prior", first_stage, first_stage, "--n", 4, "--out", tmp_path / "prior.png")
    code, _, err = run("sample", *how)
    assert code == 0, err
    picture = np.asarray(Image.open(tmp_path / "prior.png"))
    half = picture.shape[0] // 2  # the same z for every run
    assert np.array_equal(picture[2:half, 40:], picture[half + 1 : -1, 40:])


# ----------------------------------------------------- faults that were found by trying the product


def test_b9_the_critics_compute_in_float32_under_autocast(perceptual):
    x, y = images(2, 32).float(), images(2, 32).float()
    y = y + 0.003 * images(2, 32, seed=1).float()
    critic = PatchDiscriminator(16, 2)
    with torch.no_grad():
        perceptual = deepcopy(perceptual).float()
        exact = perceptual(x, y), critic(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = perceptual(x, y), critic(x)
    for a, b in zip(exact, found):
        assert b.dtype == torch.float32
        torch.testing.assert_close(a, b)


def test_both_losses_of_the_adversary_have_the_form_that_was_asked_for(folder):
    for form in ("hinge", "vanilla"):
        s = stage(folder, adversarial_loss=form, disc_start=0, adaptive=False)
        s.loss(0)
        real, fake = (s.discriminator(x) for x in s.seen)
        assert s.discriminator_loss(0) == discriminator_loss(real, fake, form)
        torch.testing.assert_close(
            s.figures["g_loss"], generator_loss(fake, form), rtol=1e-3, atol=1e-3
        )


def test_sharpness_is_the_share_that_the_reconstructions_keep(folder, monkeypatch):
    s = stage(folder, adversarial=0.0)
    monkeypatch.setattr(s.model, "forward", lambda x, noise=None: (0.5 * x, None, None))
    assert s.validate()["validation_sharpness"] == pytest.approx(0.5, abs=1e-4)


def test_residual_branches_of_a_new_first_stage_start_at_zero():
    middle = VQGAN(**TINY, bottleneck=NoBottleneck()).encoder.mid
    x = torch.randn(1, 16, 4, 4)
    assert torch.equal(middle.block_1(x), x) and torch.equal(middle.attn_1(x), x)


def test_e14_a_published_code_book_goes_on_with_the_loss_it_was_trained_with(folder, tmp_path):
    path = published_file(tmp_path / "model.ckpt", published("vq"))
    typed = MACHINE | {"data": str(folder), "init": str(path), "size": 16, "perceptual": 0.0}
    assert train.new_settings(FirstStage, typed).released
    assert not train.new_settings(
        FirstStage, {n: v for n, v in typed.items() if n != "init"}
    ).released


def test_b14_a_folder_of_any_size_is_reconstructed_a_batch_at_a_time(
    run, first_stage, tmp_path, monkeypatch
):
    """Its table compares the two sets; a damaged file is named; the pictures go to a folder."""
    g = np.random.default_rng(0)
    for i in range(45):
        Image.fromarray(g.integers(0, 256, (40, 40, 3), np.uint8)).save(tmp_path / f"{i}.png")
    folder = tmp_path / "set"
    folder.mkdir()
    for file in tmp_path.glob("*.png"):
        file.rename(folder / file.name)
    (folder / "broken.png").write_bytes(b"no picture")
    most = []
    monkeypatch.setattr("sample.reconstruct", lambda model, x: most.append(len(x)) or x)
    how = ("--reconstruct", folder, "--run", first_stage, "--size", 32)
    code, text, err = run("sample", *how, "--out", tmp_path / "out")
    assert code == 0 and max(most) <= 8, err
    assert "1 of 46 left out: broken.png (not an image)" in err
    mean, distances, last = text.splitlines()
    assert mean.startswith("mean") and "sharpness 1.00" in mean
    assert float(distances.split()[1]) < 1e-6 and last.endswith("45 reconstructions")
    assert len(list((tmp_path / "out").iterdir())) == 45


def test_nearest_code_tells_codes_apart_that_lie_far_from_zero():
    """Their squared length is 10^8 times the squared distance: too many digits for float32."""
    for dim in (4, 12):  # the k-d tree, and the matrix
        codes = torch.zeros(64, dim)
        codes[:, 0] = 4096 + torch.arange(64) / 4
        assert torch.equal(nearest_code(codes, codes), torch.arange(64))


def test_a_first_stage_gives_float32_under_autocast():
    """Distances and losses would see the rounding of bf16."""
    model, x = VQGAN(**TINY, bottleneck=NoBottleneck()), torch.zeros(1, 3, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(x)[0].dtype == model.encode(x).dtype == torch.float32


def test_lambda_is_that_of_gradients_averaged_over_the_processes(folder, monkeypatch):
    """If the other processes cancel both gradients, it is 0."""
    monkeypatch.setattr(train, "all_reduce_mean", lambda gradient: 0 * gradient)
    s = stage(folder)
    s.loss(0)
    assert s.figures["lambda"] == 0


def test_the_weight_of_the_kl_term_is_that_of_training():
    assert GaussianBottleneck().kl_weight == FirstStage().kl_weight == 1e-4


def test_4_4_7_what_is_left_of_an_image():
    """Stripes of 100 and 200 become 125 and 175: half the sharpness, 25 grey levels away."""
    stripes = np.tile(np.array([100, 200], np.uint8), (8, 4))[..., None].repeat(3, 2)
    flat = np.where(stripes == 100, 125, 175).astype(np.uint8)
    decibel, l1, sharp, sharp_r = losses_of(stripes, flat)
    assert decibel == pytest.approx(20 * np.log10(255 / 25), rel=1e-5)
    assert (l1, sharp_r / sharp) == (pytest.approx(25 / 255), pytest.approx(0.5))


def test_the_best_first_stage_is_one_with_code_book_and_adversary(folder):
    how = {"disc_start": 5, "quantise_from": 3}
    assert stage(folder, **how).best_from == 6
    assert stage(folder, **how, adversarial=0.0).best_from == 4
    assert stage(folder, **how, adversarial=0.0, bottleneck="kl").best_from == 1


def test_squares_are_cut_from_all_places_of_an_image(folder):
    """Red counts its rows and green its columns: corners from 0 to 32 - 16."""
    s, place = stage(folder), np.arange(32, dtype=np.uint8)
    image = np.stack(np.broadcast_arrays(place[:, None], place, 0), axis=-1)
    s.data.images = image[None].astype(np.uint8)
    squares = data.to_uint8(s.images(np.zeros(400, int), data.rng(1)))
    corners = squares[:, 0, 0, :2]
    assert corners.min(0).tolist() == [0, 0] and corners.max(0).tolist() == [16, 16]
