"""Sections 3.1 to 3.4 and 4.4.7: bottlenecks, losses, the model, its training and the files it lives in."""

import ast
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import equal_tensors, fill_, lightning_file, newest_checkpoint, standard_normal
from PIL import Image

import ldm
import sample
import train
from data import COLOURS, UserError, load_image, paint_set, to_tensor
from ldm import load_model, load_perceptual, perceptual_from, save_model
from sample import reconstruct
from train import AutoencoderStage, FirstStage, complete
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

TINY = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "attention_levels": (1,), "z_channels": 4, "groups": 2}


def tiny(bottleneck=None, seed=0):
    torch.manual_seed(seed)
    model = VQGAN(**TINY, bottleneck=bottleneck or Codebook(16, 4)).double()
    for p in model.parameters():  # nothing stays zero, so that every path matters
        p.data += 0.1 * torch.randn_like(p)
    return model


def images(n=2, side=8, seed=0):
    return torch.rand((n, 3, side, side), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def gradients(loss, *tensors):
    return [g if g is None else g.clone() for g in torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)]


# ---------------------------------------------------------------------------------------------------- 3.1, 3.2


def test_section_3_1_auto_encoder_is_decode_of_encode_and_has_no_latent_loss():
    model, x = tiny(NoBottleneck()), images()
    x_r, loss, codes = model(x)
    assert loss == 0 and codes is None
    torch.testing.assert_close(x_r, model.decode(model.encode(x)))


def test_eq_3_1_kl_term():
    """Against the integral on a grid, and torch's own."""
    mu, logvar = torch.tensor(0.7, dtype=torch.float64), torch.tensor(-0.4, dtype=torch.float64)
    z = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    q, p = torch.distributions.Normal(mu, torch.exp(logvar / 2)), torch.distributions.Normal(0.0, 1.0)
    integral = torch.trapezoid(q.log_prob(z).exp() * (q.log_prob(z) - p.log_prob(z)), z)
    torch.testing.assert_close(kl_to_standard_normal(mu, logvar), integral, rtol=1e-6, atol=0)
    assert kl_to_standard_normal(torch.zeros(()), torch.zeros(())) == 0


def test_eq_3_1_reparametrisation_and_gradients():
    """z = mu + sigma xi has the moments of q(z|x), and the gradient reaches mu and sigma; without noise z is the mean."""
    bottleneck = GaussianBottleneck(kl_weight=0.5)
    h = torch.tensor([0.3, -1.0, 0.5, 0.2], dtype=torch.float64).reshape(1, 4, 1, 1).requires_grad_()
    xi = torch.randn((100_000, 2, 1, 1), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z, loss, _ = bottleneck(h.expand(100_000, 4, 1, 1), xi)
    mu, logvar = h.detach().chunk(2, dim=1)
    torch.testing.assert_close(z.mean(0), mu[0], atol=0.02, rtol=0)
    torch.testing.assert_close(z.std(0), torch.exp(logvar / 2)[0], rtol=0.02, atol=0)
    (g,) = gradients(z[0].sum(), h)
    torch.testing.assert_close(g, torch.cat([torch.ones_like(mu), torch.exp(logvar / 2) * xi[:1] / 2], dim=1))
    (g,) = gradients(loss, h)  # d KL / d mu = mu,  d KL / d logvar = (sigma^2 - 1) / 2; a mean over two values
    torch.testing.assert_close(g, 0.5 * torch.cat([mu, (logvar.exp() - 1) / 2], dim=1) / 2)
    assert torch.equal(bottleneck(h)[0], mu) and torch.equal(bottleneck.latent(h), mu)


# ---------------------------------------------------------------------------------------------------- 3.4, the code-book


def test_eq_3_3_nearest_code():
    """E11, E12: the nearest code is taken, in value an e_k; argmax, as fig. 3.4 prints, takes the farthest."""
    book = Codebook(32, 4).double()
    torch.nn.init.normal_(book.embedding.weight)
    z = torch.randn((3, 4, 5, 6), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z_q, _, k = book(z)
    distance = torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, 4), book.embedding.weight)  # (90, 32)
    assert torch.equal(k.flatten(), distance.argmin(1))
    torch.testing.assert_close(z_q.permute(0, 2, 3, 1).reshape(-1, 4), book.embedding.weight[distance.argmin(1)])
    assert (distance.gather(1, distance.argmax(1)[:, None])[:, 0] > distance.gather(1, k.reshape(-1, 1))[:, 0]).all()


def test_e13_figure_3_4_does_not_compile():
    """A comment after a line continuation is a syntax error."""
    printed = "loss = beta * \\\n    # Commitment Loss\n    mean((z_q - z) ** 2)\n"
    with pytest.raises(SyntaxError):
        ast.parse(printed)


def test_eq_3_4_code_book_and_commitment_losses():
    """Value, and which term moves what, with which weight (E14)."""
    z = torch.randn((2, 4, 3, 3), generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    grads = {}
    for released in (False, True):
        torch.manual_seed(0)
        book = Codebook(8, 4, beta=0.25, released=released).double()
        torch.nn.init.normal_(book.embedding.weight, generator=torch.Generator().manual_seed(3))
        _, loss, k = book(z)
        z_q = book.lookup(k)
        torch.testing.assert_close(loss, 1.25 * F.mse_loss(z_q, z))  # the value is the same wherever beta stands
        grads[released] = gradients(loss, z, book.embedding.weight)
        torch.testing.assert_close(grads[released][0], (1.0 if released else 0.25) * 2 * (z - z_q).detach() / z.numel())
    (z_thesis, e_thesis), (z_released, e_released) = grads[False], grads[True]
    torch.testing.assert_close(z_released, 4 * z_thesis)
    torch.testing.assert_close(e_released, 0.25 * e_thesis)
    expected = torch.zeros_like(book.embedding.weight)  # each code is pulled towards the mean of its vectors
    flat, index = z.detach().permute(0, 2, 3, 1).reshape(-1, 4), k.flatten()
    expected.index_add_(0, index, 2 * (book.embedding.weight.detach()[index] - flat) / z.numel())
    torch.testing.assert_close(e_thesis, expected)


def test_eq_3_4_straight_through():
    """E15: forward z_q, backward the identity; the reconstruction loss moves the encoder and no code. Without the line it
    would move the codes and never the encoder."""
    z = torch.randn((1, 4, 2, 2), dtype=torch.float64, requires_grad=True)
    book = Codebook(8, 4).double()
    torch.nn.init.normal_(book.embedding.weight)
    z_q, _, k = book(z)
    torch.testing.assert_close(z_q, book.lookup(k))
    weight = torch.randn_like(z)
    g_z, g_e = gradients((weight * z_q).sum(), z, book.embedding.weight)
    assert torch.equal(g_z, weight) and g_e is None
    g_z, g_e = gradients((weight * book.lookup(k)).sum(), z, book.embedding.weight)
    assert g_z is None and g_e.abs().sum() > 0


def test_eq_3_4_losses_come_before_straight_through():
    """The code-book term must not pull the encoder: computed on the patched z_q it would."""
    z = torch.randn((1, 4, 2, 2), dtype=torch.float64, requires_grad=True)
    book = Codebook(8, 4, beta=0.0).double()
    torch.nn.init.normal_(book.embedding.weight)
    z_q, loss, _ = book(z)
    assert gradients(loss, z)[0].abs().sum() == 0
    assert gradients(F.mse_loss(z_q, z.detach()), z)[0].abs().sum() > 0


@pytest.mark.parametrize("spread", [1.0, 4.0, 1 / 16384])  # trained codes, queries far outside them, codes as initialised
@pytest.mark.parametrize("dim", [4, 12])  # the k-d tree, and the chunks
def test_nearest_code_is_exact(spread, dim):
    g = torch.Generator().manual_seed(0)
    codes, z = spread**0.5 * torch.randn((1000, dim), generator=g), torch.randn((300, dim), generator=g) / spread**0.5
    distance = (z.double()[:, None] - codes.double()).square().sum(-1)
    found = distance.gather(1, nearest_code(z, codes, chunk=7000)[:, None])[:, 0]
    torch.testing.assert_close(found, distance.min(1).values, rtol=1e-12, atol=0)


def test_nearest_code_of_a_code_is_itself_and_the_first_of_equals_in_chunks():
    codes = torch.randn((64, 12), generator=torch.Generator().manual_seed(0))
    codes[40] = codes[3]
    expected = torch.arange(64)
    expected[40] = 3
    assert torch.equal(nearest_code(codes, codes), expected)


def test_code_use():
    assert code_use(torch.tensor([5, 5, 0, 5, 5])) == (4, pytest.approx(4))
    used, perplexity = code_use(torch.tensor([3, 1]))
    assert used == 2 and perplexity == pytest.approx(np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25)))


# ---------------------------------------------------------------------------------------------------- the model


@pytest.fixture(scope="module")
def golden():
    """The first of two images, its latent and its reconstruction (every fourth pixel), from the published code in float64."""
    x = (standard_normal("input:vq.x", (2, 3, 64, 64))[:1] / 2).clamp(-1, 1)
    with np.load(Path(__file__).parent / "golden" / "vq.npz") as file:
        return {"x": x} | {name: torch.from_numpy(file[name]) for name in file.files}


def test_outputs_equal_those_of_the_published_code(golden):
    model = fill_(VQGAN(channels=32, bottleneck=Codebook(64, 4)), "first_stage_model.")
    with torch.no_grad():
        z = model.encode(golden["x"])
        torch.testing.assert_close(z, golden["z"], rtol=0, atol=1e-9)
        assert torch.equal(model.quantize.nearest(z).flatten(), golden["indices"])
        x_r, loss, _ = model(golden["x"])
    torch.testing.assert_close(x_r[..., ::4, ::4], golden["rec"], rtol=0, atol=1e-9)
    torch.testing.assert_close(loss, 1.25 * F.mse_loss(model.quantize.project(z), z))


def test_e54_encode_does_not_quantise_and_decode_does(golden):
    model = fill_(VQGAN(channels=32, bottleneck=Codebook(64, 4)), "first_stage_model.")
    with torch.no_grad():
        z = model.encode(golden["x"])
        z_q = model.quantize.project(z)
        assert (z - z_q).abs().max() > 0.1
        torch.testing.assert_close(model.decode(z), model.decode(z_q))
        assert (model.decode(z) - model.decoder(model.post_quant_conv(z))).abs().max() > 0.1  # quantisation left out


def test_e55_published_parameter_counts():
    with torch.device("meta"):
        model = VQGAN()
        parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
        assert (parts["encoder"], parts["decoder"], parts["quantize"]) == (27_397_764, 40_253_955, 65_536)
        assert sum(parts.values()) == 67_717_295
        kl = VQGAN(multipliers=(1, 2, 4, 4), attention_levels=(), bottleneck=GaussianBottleneck())
        assert sum(p.numel() for p in kl.parameters()) == 83_653_863  # kl-f8
        assert sum(p.numel() for p in PatchDiscriminator().parameters()) == 663_361
        assert sum(p.numel() for p in PatchDiscriminator(layers=3).parameters()) == 2_765_633


def test_published_names_and_shapes():
    """A sample of the published entries: one of every kind, at the places where a slip is likely."""
    with torch.device("meta"):
        state = {name: tuple(value.shape) for name, value in VQGAN().state_dict().items()}
        loss = {name: tuple(value.shape) for name, value in PatchDiscriminator().state_dict().items()}
        perceptual = {name: tuple(value.shape) for name, value in PerceptualLoss().state_dict().items()}
    assert state["encoder.down.1.block.0.nin_shortcut.weight"] == (256, 128, 1, 1)
    assert state["encoder.down.3.attn.1.proj_out.bias"] == (512,)
    assert state["encoder.conv_out.weight"] == (4, 512, 3, 3)
    assert state["decoder.up.0.block.0.conv1.weight"] == (128, 256, 3, 3)
    assert state["decoder.up.3.block.2.norm2.weight"] == (512,)
    assert state["decoder.up.3.attn.2.q.weight"] == (512, 512, 1, 1)
    assert state["decoder.mid.attn_1.norm.weight"] == (512,)
    assert state["quantize.embedding.weight"] == (16384, 4)
    assert "encoder.down.3.downsample.conv.weight" not in state and "decoder.up.0.upsample.conv.weight" not in state
    assert (len(state), len(loss), len(perceptual)) == (299, 16, 33)
    assert loss["main.8.weight"] == (1, 256, 4, 4) and loss["main.3.running_var"] == (128,)
    assert perceptual["net.slice4.19.weight"] == (512, 512, 3, 3) and perceptual["lin4.model.1.weight"] == (1, 512, 1, 1)


def test_attention_is_softmax_over_positions():
    torch.manual_seed(0)
    layer, x = AttnBlock(8, 2).double(), torch.randn((2, 8, 3, 5), dtype=torch.float64)
    h = layer.norm(x)
    q, k, v = (conv(h).reshape(2, 8, 15) for conv in (layer.q, layer.k, layer.v))
    weight = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / 8**0.5, dim=-1)
    expected = x + layer.proj_out(torch.einsum("bij,bcj->bci", weight, v).reshape(x.shape))
    torch.testing.assert_close(layer(x), expected)


def test_encoder_and_decoder_change_the_resolution_by_f():
    z = Encoder(8, (1, 1, 2), 1, (), 5, 2)(torch.zeros(1, 3, 24, 40))
    assert z.shape == (1, 5, 6, 10)
    assert Decoder(8, (1, 1, 2), 1, (), 5, 2)(z).shape == (1, 3, 24, 40)


# ---------------------------------------------------------------------------------------------------- 3.2.2


@pytest.fixture(scope="module")
def perceptual():
    torch.manual_seed(0)
    loss = PerceptualLoss().double()
    for i in range(5):
        getattr(loss, f"lin{i}").model[1].weight.data.abs_()
    return loss


def test_e09_perceptual_loss(perceptual):
    """Zero for equal images, symmetric, positive otherwise; its own weights never move."""
    x, y = images(2, 32), images(2, 32, seed=1).requires_grad_()
    assert perceptual(x, x).abs().max() == 0
    torch.testing.assert_close(perceptual(x, y), perceptual(y, x))
    assert (perceptual(x, y) > 0).all()
    assert gradients(perceptual(x, y).sum(), y)[0].abs().sum() > 0
    assert not any(p.requires_grad for p in perceptual.parameters())


def test_perceptual_loss_by_hand(perceptual):
    """Written out: shift and scale, features after five convolutions by number, unit length over channels, weighted squares."""
    x, y = images(1, 16), images(1, 16, seed=1)
    vgg = {name: value for name, value in perceptual.net.state_dict().items()}
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]).double(), torch.tensor([0.458, 0.448, 0.450]).double()

    def features(image):
        h, out = (image - shift[:, None, None]) / scale[:, None, None], []
        for stage, convs in enumerate([(0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)], start=1):
            h = F.max_pool2d(h, 2, 2) if stage > 1 else h
            for i in convs:
                h = F.conv2d(h, vgg[f"slice{stage}.{i}.weight"], vgg[f"slice{stage}.{i}.bias"], padding=1).clamp(min=0)
            out.append(h / (torch.linalg.vector_norm(h, dim=1, keepdim=True) + 1e-10))
        return out

    expected = 0.0
    for i, (a, b) in enumerate(zip(features(x), features(y))):
        w = getattr(perceptual, f"lin{i}").model[1].weight[0]
        expected += (w * (a - b).square()).sum(1).mean()
    torch.testing.assert_close(perceptual(x, y)[0], expected.to(torch.float64), rtol=1e-6, atol=1e-12)


def perceptual_files(folder):
    """Files in the published form, with other weights: torchvision's VGG16 and LPIPS's heads."""
    torch.manual_seed(1)
    vgg, loss = VGG16(), PerceptualLoss()
    features = {"features." + name.split(".", 1)[1]: value for name, value in vgg.state_dict().items()}
    features |= {"classifier.0.weight": torch.zeros(1), "classifier.0.bias": torch.zeros(1)}  # torchvision's file has these too
    heads = {name: value + 1 for name, value in loss.state_dict().items() if name.startswith("lin")}
    folder.mkdir()
    torch.save(OrderedDict(features), folder / "vgg16-397923af.pth")
    torch.save(OrderedDict(heads), folder / "vgg.pth")
    return features, heads


def test_perceptual_weights_from_files_in_the_published_form(tmp_path, monkeypatch):
    features, heads = perceptual_files(tmp_path / "hub")
    loss = perceptual_from(features, heads, "a file")
    assert torch.equal(loss.net.slice3["12"].weight, features["features.12.weight"])
    assert torch.equal(loss.lin2.model[1].weight, heads["lin2.model.1.weight"])
    with pytest.raises(UserError, match="its sha256 is not 397923af"):
        load_perceptual(tmp_path / "hub")
    monkeypatch.setattr(ldm.hashlib, "file_digest", lambda file, kind: type("", (), {"hexdigest": lambda s: DIGESTS[kind]})())
    assert torch.equal(load_perceptual(tmp_path / "hub").net.slice1["0"].weight, features["features.0.weight"])
    (tmp_path / "hub" / "vgg.pth").unlink()
    with pytest.raises(UserError, match=r"vgg.pth is not there; .*7,289 bytes.*d507d7349b931f0638a25a48a722f98a"):
        load_perceptual(tmp_path / "hub")


DIGESTS = {
    "sha256": "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    "md5": "d507d7349b931f0638a25a48a722f98a",
}

# ---------------------------------------------------------------------------------------------------- 3.3, 3.4.1


def test_eq_3_2_gan_objective():
    """E10, E17: with densities p, q over logits the loss of D is least at the optimal D = p / (p + q), where the printed sign
    makes it largest; there it equals log 2 - JS(p, q), and 2 log 2 - 2 JS is the objective's negative."""
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)

    def loss(logit):
        return ((p * F.softplus(-logit)).sum() + (q * F.softplus(logit)).sum()) / 2

    best = torch.log(p / q)  # sigmoid(best) = p / (p + q)
    m = (p + q) / 2
    js = ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2
    torch.testing.assert_close(loss(best), np.log(2) - js)
    assert all(loss(best + 0.1 * torch.randn(3, dtype=torch.float64)) > loss(best) for _ in range(20))
    real, fake = torch.tensor([0.3, 2.0]), torch.tensor([-1.0, 0.5])
    printed = torch.sigmoid(real).log().mean() + (1 - torch.sigmoid(fake)).log().mean()  # 3.4.1's "discriminator loss"
    torch.testing.assert_close(discriminator_loss(real, fake, "vanilla"), -printed / 2)
    assert discriminator_loss(real, fake, "vanilla") < discriminator_loss(fake, real, "vanilla")  # printed, the wrong D wins


def test_e10_generator_loss_does_not_saturate():
    """Where D is sure of a fake, -log D(G(z)) still has a gradient and the printed log(1 - D(G(z))) has none."""
    fake = torch.tensor([-12.0], requires_grad=True)
    assert abs(gradients(generator_loss(fake, "vanilla"), fake)[0].item() + 1) < 1e-4
    assert gradients(-F.softplus(fake).mean(), fake)[0].abs() < 1e-4  # log(1 - sigmoid(l)) = -softplus(l)


def test_e17_hinge_loss():
    real, fake = torch.tensor([2.0, 0.0, -1.0], requires_grad=True), torch.tensor([-3.0, 0.5, 0.0], requires_grad=True)
    loss = discriminator_loss(real, fake)
    assert loss.item() == pytest.approx(0.5 * ((0 + 1 + 2) / 3 + (0 + 1.5 + 1) / 3))
    g_real, g_fake = gradients(loss, real, fake)
    assert g_real.tolist() == pytest.approx([0, -1 / 6, -1 / 6]) and g_fake.tolist() == pytest.approx([0, 1 / 6, 1 / 6])
    assert discriminator_loss(torch.zeros(4), torch.zeros(4)) == 1  # a dead discriminator: all logits 0
    assert generator_loss(fake).item() == pytest.approx(-fake.mean().item())


def test_eq_3_5_adaptive_weight():
    """E18: lambda = |grad rec| / (|grad g| + delta) at the last layer; both terms then pull equally; clamped, detached."""
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    rec, g = (w * torch.tensor([3.0, 4.0])).sum(), (w * torch.tensor([0.0, 0.5])).sum()
    weight = adaptive_weight(rec, g, w)
    assert weight.item() == pytest.approx(5 / (0.5 + 1e-4)) and not weight.requires_grad
    assert adaptive_weight(rec, g * 0, w).item() == 1e4
    assert gradients(weight * g, w)[0].norm().item() == pytest.approx(gradients(rec, w)[0].norm().item(), rel=1e-3)


def test_discriminator_and_code_book_begin_as_the_published_ones():
    torch.manual_seed(0)
    main = PatchDiscriminator(64).main
    assert {layer.negative_slope for layer in main if isinstance(layer, torch.nn.LeakyReLU)} == {0.2}
    assert all(abs(layer.weight.std() - 0.02) < 0.002 for layer in main if isinstance(layer, torch.nn.Conv2d))
    assert all(abs(layer.weight.mean() - 1) < 0.01 for layer in main if isinstance(layer, torch.nn.BatchNorm2d))
    codes = Codebook(1000, 4).embedding.weight
    assert 0.0009 < codes.max() <= 1 / 1000 and -1 / 1000 <= codes.min() < -0.0009


def test_a_variance_is_kept_between_exp_of_minus_30_and_20():
    mu, logvar = GaussianBottleneck.moments(torch.tensor([2.0, -40.0, 3.0, 25.0]).view(2, 2, 1, 1))
    assert mu.flatten().tolist() == [2, 3] and logvar.flatten().tolist() == [-30, 20]


@pytest.mark.parametrize("layers, patch", [(2, 34), (3, 70)])
def test_discriminator_sees_patches(layers, patch):
    d = PatchDiscriminator(4, layers).eval().double()
    x = images(1, 96).requires_grad_()
    logits = d(x)
    h = logits.shape[-1] // 2
    seen = gradients(logits[0, 0, h, h], x)[0][0].abs().sum(0) > 0
    rows = torch.nonzero(seen.any(1))
    assert rows.max() - rows.min() + 1 == patch


# ---------------------------------------------------------------------------------------------------- the stage


@pytest.fixture
def folder(tmp_path):
    """Forty small pictures of two colours each."""
    g = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(40):
        picture = np.kron(g.integers(0, 256, (4, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{i:02d}.png")
    return tmp_path / "pictures"


SMALL = {"channels": 8, "multipliers": (1, 2), "size": 32, "crop": 16, "codes": 32, "batch": 4}
SMALL |= {"disc_channels": 8, "quantise_from": 0}


def stage(folder, **changes):
    common = {"precision": "float32", "device": "cpu", "model": "small", "perceptual": 0.0, "disc_start": 0}
    settings = FirstStage(data=str(folder), **(SMALL | common | changes))
    complete(settings)
    return AutoencoderStage(settings)


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
    """Eq. 3.5, and nothing adversarial before `disc_start`; with weight 0 there is no adversary: VQ-VAE."""
    s = stage(folder, disc_start=5)
    loss = s.loss(4)
    assert "lambda" not in s.figures and [player.start for player in s.players()] == [0, 5]
    assert loss.item() == pytest.approx((s.figures["l1"] + s.figures["latent_loss"]).item())
    loss = s.loss(5)
    f = s.figures
    assert loss.item() == pytest.approx((f["l1"] + f["latent_loss"] + 0.6 * f["lambda"] * f["g_loss"]).item(), rel=1e-5)
    assert s.discriminator_loss(5).item() > 0
    assert [player.betas for player in s.players()] == [(0.9, 0.99), (0.5, 0.9)]
    s.settings.perceptual, s.perceptual = 0.25, lambda x, x_r: torch.arange(len(x)).float()
    x = torch.zeros(3, 3, 2, 2)
    assert s.reconstruction_loss(x, x + 0.5).tolist() == [0.5, 0.75, 1.0]
    assert [player.name for player in stage(folder, adversarial=0.0).players()] == ["train"]


def test_e16_reconstruction_loss_is_a_negative_log_likelihood(folder):
    """L1 is -log p(x|z) of a Laplace density up to a constant: as printed, + log p, it would be maximised."""
    x, x_r = images(2), images(2, seed=1)
    nll = -torch.distributions.Laplace(x_r, 1.0).log_prob(x).mean((1, 2, 3))
    torch.testing.assert_close(stage(folder).reconstruction_loss(x, x_r), nll - np.log(2))


def test_a_model_saved_before_the_code_book_joined_does_not_quantise(tmp_path):
    settings = TINY | {"size": 16, "bottleneck": "vq", "codes": 8, "beta": 0.25, "released": False, "quantise_from": 5}
    model = ldm.build_first_stage(settings)
    for update, active in ((4, False), (5, True)):
        save_model(tmp_path / "m.pt", "vqgan", settings, [], update, {"ema": model.state_dict()})
        assert load_model(tmp_path / "m.pt").quantize.active is active


def test_a_diverged_network_is_reported_by_the_loop_and_not_by_the_search():
    assert nearest_code(torch.full((2, 4), torch.nan), torch.randn(8, 4)).shape == (2,)


def test_an_update_is_a_function_of_seed_and_number(folder):
    a, b = stage(folder, bottleneck="kl", flip=True), stage(folder, bottleneck="kl", flip=True)
    assert a.loss(7).item() == b.loss(7).item() != a.loss(8).item()
    assert a.validate() == b.validate()


def test_crops_are_squares_of_the_images(folder):
    s = stage(folder)
    for x, row in zip(s.images(s.train_rows[:3], train.rng(1)), s.train_rows[:3]):
        whole = to_tensor(np.array(s.data.images[row])[None])[0]
        assert any(torch.equal(x, whole[:, i : i + 16, j : j + 16]) for i in range(17) for j in range(17))


def test_codes_are_counted_over_an_epoch_and_unused_ones_move(folder):
    s = stage(folder, reseed=True)
    epoch = 50  # updates: the least that is counted over; an epoch of this set has ten
    dead = s.model.quantize.embedding.weight.clone()
    for n in range(epoch):
        s.loss(n)
        assert ("codes_used" in s.figures) == (n == epoch - 1)
    moved = (s.model.quantize.embedding.weight != dead).any(1)
    assert moved.sum() == 32 - s.figures["codes_used"] > 0 and s.counts.sum() == 0
    draw = train.rng(s.settings.seed, epoch - 1, 4)
    rows = s.train_rows[torch.randint(len(s.train_rows), (32,), generator=draw).numpy()]
    z = torch.cat([s.model.encode(x) for x in s.images(rows, draw).split(8)]).permute(0, 2, 3, 1).flatten(0, 2)
    assert all((z == code).all(1).any() for code in s.model.quantize.embedding.weight[moved])  # now on latents of images
    kept = stage(folder, reseed=False)
    before = kept.model.quantize.embedding.weight.clone()
    for n in range(epoch):
        kept.loss(n)
    assert torch.equal(kept.model.quantize.embedding.weight, before)


def test_the_code_book_joins_at_quantise_from(folder):
    """Until then the network is an AE; then every code starts on a latent of some image, and quantisation costs little."""
    s = stage(folder, quantise_from=3, codes=256)
    codes = s.model.quantize.embedding.weight.clone()
    s.loss(2)
    assert s.figures["latent_loss"] == 0 and torch.equal(s.model.quantize.embedding.weight, codes)
    x = s.seen[0]
    torch.testing.assert_close(s.model.decode(s.model.encode(x)), s.model(x)[0])
    s.loss(3)
    assert (s.model.quantize.embedding.weight != codes).any(1).all()
    assert 0 < s.figures["latent_loss"] < 0.1 * s.model.encode(x).var()


ARGUMENTS = ("--stage", "vqgan", "--device", "cpu", "--precision", "float32", "--channels", 8, "--multipliers", 1, 2)
ARGUMENTS += ("--size", 16, "--codes", 16, "--batch", 4, "--disc-channels", 8, "--disc-start", 4, "--updates", 8)
ARGUMENTS += ("--quantise-from", 2)
ARGUMENTS += ("--save-every", 4, "--validate-every", 4, "--preview-every", 4, "--perceptual", 0)


def test_a_run_from_start_to_end(run, folder, tmp_path):
    code, _, err = run("train", *ARGUMENTS, "--data", folder, "--out", tmp_path / "one")
    assert code == 0, err
    progress, tensors = newest_checkpoint(tmp_path / "one")
    assert progress["best"] < float("inf") and {"train", "disc"} <= {name.split(".")[0] for name in tensors}
    for name in ("model.pt", "best.pt", "grid.png", "loss.png", "preview_000004.png", "log.csv"):
        assert (tmp_path / "one" / name).exists()
    header, *rows = (tmp_path / "one" / "log.csv").read_text().splitlines()
    last = dict(zip(header.split(","), rows[-1].split(",")))
    for column in ("lambda", "logit_real", "logit_fake", "disc_loss", "validation_psnr_ema", "validation_sharpness"):
        assert np.isfinite(float(last[column]))


def test_interrupted_training_equals_the_uninterrupted_one(run, folder, tmp_path, monkeypatch):
    assert run("train", *ARGUMENTS, "--data", folder, "--out", tmp_path / "one")[0] == 0
    validate, calls = AutoencoderStage.validate, []

    def interrupted(self):
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), 2)
        return validate(self)

    monkeypatch.setattr(AutoencoderStage, "validate", interrupted)
    code, out, _ = run("train", *ARGUMENTS, "--data", folder, "--out", tmp_path / "two")
    assert code == 130 and "--resume" in out
    monkeypatch.setattr(AutoencoderStage, "validate", validate)
    assert run("train", "--stage", "vqgan", "--resume", "--out", tmp_path / "two")[0] == 0
    one, two = (newest_checkpoint(tmp_path / name)[1] for name in ("one", "two"))
    assert "stage.counts" in one and equal_tensors(one, two)


@pytest.mark.parametrize("bottleneck", ["none", "kl", "vq"])
def test_each_bottleneck_learns(folder, bottleneck):
    s = stage(folder, bottleneck=bottleneck, adversarial=0.0, lr=3e-3)
    optimizer = torch.optim.Adam(s.model.parameters(), 3e-3)
    before = s.validate()["validation_psnr"]
    for n in range(60):
        s.loss(n).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert s.validate()["validation_psnr"] > before + 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--crop", 17), "--crop 17: expected a multiple of 2"),
        (("--crop", 64), "at most --size 16"),
        (("--groups", 3), "--groups 3: must divide --channels 8"),
        (("--attention-levels", 2), "--attention-levels: expected numbers from 0 to 1"),
        (("--codes", 0), "--codes 0: must be more than 0"),
        (("--beta", -1), "--beta -1.0: must be 0 or more"),
        (("--disc-layers", 4), "--disc-layers 4: too many for images of 16 pixels"),
        (("--perceptual", 1, "--perceptual-files", "nowhere"), "vgg16-397923af.pth is not there"),
        (("--init", "nowhere.ckpt"), "nowhere.ckpt: no such file"),
    ],
)
def test_bad_arguments(refused, folder, tmp_path, arguments, message):
    assert message in refused("train", *ARGUMENTS, *arguments, "--data", folder, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------- published files


def published_file(path, model, **more):
    """A file in the form of the published ones, with networks of the loss beside the model."""
    state = OrderedDict(model.state_dict())
    state |= {f"loss.discriminator.{name}": value for name, value in PatchDiscriminator(8).state_dict().items()}
    return lightning_file(path, state, **more)


def published(bottleneck, seed=0):
    torch.manual_seed(seed)
    return VQGAN(channels=32, multipliers=(1, 2), blocks=1, attention_levels=(1,), bottleneck=bottleneck)


@pytest.mark.parametrize("bottleneck", [Codebook(24, 4), GaussianBottleneck(), NoBottleneck()])
def test_a_published_file_opens_without_lightning_and_without_settings(tmp_path, bottleneck):
    model = published(bottleneck).eval()
    path = published_file(tmp_path / "model.ckpt", model)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)  # plain torch does not open it
    opened = load_model(path)
    x = images(1, 16).float()
    with torch.no_grad():
        torch.testing.assert_close(opened.decode(opened.encode(x)), model.decode(model.encode(x)))
    assert type(opened.quantize) is type(bottleneck)


class Malice:
    def __reduce__(self):
        return os.system, ("touch /tmp/this-file-ran-code",)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    path = published_file(tmp_path / "model.ckpt", published(Codebook(24, 4)), hyper_parameters=Malice())
    with pytest.raises(UserError, match=r"refused, it asks to run (posix|nt).system; only tensors are read"):
        load_model(path)


def test_a_file_that_does_not_fit_says_how(tmp_path):
    model = published(Codebook(24, 4))
    state = model.state_dict()
    del state["decoder.mid.block_1.conv1.weight"]
    state["decoder.conv_out.weight"] = torch.zeros(4, 32, 3, 3)
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    with pytest.raises(UserError) as error:
        load_model(tmp_path / "model.ckpt")
    assert "1 missing (first: decoder.mid.block_1.conv1.weight)" in str(error.value)
    assert "(first: decoder.conv_out.weight (4, 32, 3, 3) instead of (3, 32, 3, 3))" in str(error.value)
    torch.save({"state_dict": {"transformer.wte": torch.zeros(2)}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="not a first stage"):
        load_model(tmp_path / "other.ckpt")


@pytest.mark.parametrize("bottleneck", [Codebook(24, 4), GaussianBottleneck(), NoBottleneck()])
def test_training_starts_from_a_published_file(refused, folder, tmp_path, bottleneck):
    """4.4.7, fine-tuning: --init sets the network and its weights, the adversary's too; a flag that disagrees is refused."""
    model = published(bottleneck)
    path = published_file(tmp_path / "model.ckpt", model)
    settings = FirstStage(
        data=str(folder),
        init=str(path),
        model="small",
        device="cpu",
        precision="float32",
        size=16,
        disc_channels=8,
        perceptual=0.0,
    )
    complete(settings)
    s = AutoencoderStage(settings)
    s.start()
    assert not settings.reseed and settings.quantise_from == 0  # the codes stay where they are
    assert type(s.model.quantize) is type(bottleneck)
    assert all(torch.equal(a, b) for a, b in zip(s.model.state_dict().values(), model.state_dict().values()))
    adversary = ldm.published_losses(path)["discriminator"]
    assert torch.equal(s.discriminator.main[0].weight, adversary["main.0.weight"]) and len(adversary["main.0.weight"]) == 8
    message = refused(
        "train", "--stage", "vqgan", "--init", path, "--channels", 12, "--data", folder, "--out", tmp_path / "run"
    )
    assert "--channels 12: --init" in message and "has 32" in message


def test_a_run_that_fine_tunes_resumes_without_the_file_it_began_with(run, folder, tmp_path):
    path = published_file(tmp_path / "model.ckpt", published(Codebook(24, 4)))
    common = ("--stage", "vqgan", "--device", "cpu", "--out", tmp_path / "run")
    size = ("--precision", "float32", "--size", 16, "--batch", 2, "--updates", 2, "--perceptual", 0)
    code, _, err = run("train", *common, *size, "--init", path, "--data", folder)
    assert code == 0, err
    path.unlink()
    code, _, err = run("train", *common, "--resume", "--updates", 3)
    assert code == 0, err


# ---------------------------------------------------------------------------------------------------- sample.py


@pytest.fixture
def first_stage(tmp_path):
    """A model file whose decoder is no identity, and is fast."""
    settings = TINY | {"size": 16, "bottleneck": "none", "codes": 0, "beta": 0.25, "released": False, "kl_weight": 1.0}
    torch.manual_seed(0)
    model = ldm.build_first_stage(settings)
    save_model(tmp_path / "first.pt", "vqgan", settings, [], 0, {"ema": model.state_dict(), "raw": model.state_dict()})
    return tmp_path / "first.pt"


def test_reconstruct_files(run, refused, first_stage, folder, tmp_path):
    files = sorted(folder.iterdir())[:3]
    code, out, err = run("sample", "--reconstruct", *files, "--run", first_stage, "--out", tmp_path / "pair.png")
    assert code == 0, err
    model = load_model(first_stage)
    originals = np.stack([load_image(file, 16) for file in files])
    rebuilt, decibel, l1 = reconstruct(model, originals)
    mse = ((originals.astype(float) - rebuilt) ** 2).mean((1, 2, 3))
    assert decibel == pytest.approx(10 * np.log10(255**2 / mse), rel=1e-4)
    assert l1 == pytest.approx(np.abs(originals.astype(float) - rebuilt).mean((1, 2, 3)) / 255, rel=1e-4)
    assert f"{files[1].name}  PSNR {decibel[1]:5.2f} dB  L1 {l1[1]:.4f}" in out
    code, *_ = run("sample", "--reconstruct", *files, "--run", first_stage, "--out", tmp_path / "folder")
    written = sorted((tmp_path / "folder").iterdir())
    assert [file.stem for file in written] == [file.stem for file in files]
    assert all(np.array_equal(np.asarray(Image.open(file)), image) for file, image in zip(written, rebuilt))
    assert "not an empty folder" in refused(
        "sample", "--reconstruct", *files, "--run", first_stage, "--out", tmp_path / "folder"
    )
    assert "multiple of 2" in refused("sample", "--reconstruct", *files, "--run", first_stage, "--size", 15)
    assert "draws nothing by itself" in refused("sample", "--run", first_stage)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert "not an image" in refused("sample", "--reconstruct", tmp_path / "broken.png", "--run", first_stage)


def test_fig_4_9_reconstructs_a_painting_of_every_colour(run, first_stage, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "open_paintings", lambda size: paint_set(tmp_path / "set", size, count=40, processes=1))
    code, out, err = run("sample", "--reconstruct", "paintings", "--run", first_stage, "--out", tmp_path / "figure_4_9.png")
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines()[:8]] == list(COLOURS)
    _, originals = sample.validation_paintings(16)
    train_rows, rows = paint_set(tmp_path / "set", 16, count=40, processes=1).split()
    assert len(rows) == 8 and len(originals) == 8  # one of every colour is all there is to validate with
    picture = np.asarray(Image.open(tmp_path / "figure_4_9.png"))
    first = Image.fromarray(originals[0]).resize((128, 128), Image.Resampling.NEAREST)
    left = picture.shape[1] - 8 * 130  # the margin with the names of the rows
    assert np.array_equal(picture[2:130, left : left + 128], np.asarray(first))


def test_a_letters_model_reconstructs_nothing(refused, tiny_model, folder):
    files = sorted(folder.iterdir())[:1]
    assert "is no first stage" in refused("sample", "--reconstruct", *files, "--run", tiny_model)


def test_section_3_1_picture_of_the_prior(run, first_stage, tmp_path):
    code, out, err = run("sample", "--prior", first_stage, first_stage, "--n", 4, "--out", tmp_path / "prior.png")
    assert code == 0, err
    picture = np.asarray(Image.open(tmp_path / "prior.png"))
    half = picture.shape[0] // 2
    assert np.array_equal(picture[2:half, 40:], picture[half + 1 : -1, 40:])  # the same z for every run
