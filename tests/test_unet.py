"""Sections 3.5.5, 4.3, 4.4.4, 4.4.5 and 4.5.1: time and label embedding, both kinds of attention, the U-Net."""

import hashlib
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fill_, standard_normal

from unet import (
    GEGLU,
    CrossAttention,
    LinearAttention,
    ResBlock,
    SpatialTransformer,
    TransformerBlock,
    UNet,
    draw_time_embedding,
    latent_unet,
    letters_unet,
    linear_attention,
    noisy_classifier,
    timestep_embedding,
)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---------------------------------------------------------------------------------------------------- 4.3.2


def test_positional_encoding_values():
    """PE of 4.3.2 entry by entry, in the published order [cos | sin] with divisor d/2 (E43, E45)."""
    d, t = 8, torch.tensor([0, 1, 17, 999])
    pe = timestep_embedding(t, d)
    for row, time in zip(pe, t.tolist()):
        for i in range(d // 2):
            angle = time / 10_000 ** (2 * i / d)
            assert row[i].item() == pytest.approx(math.cos(angle), abs=1e-4)
            assert row[d // 2 + i].item() == pytest.approx(math.sin(angle), abs=1e-4)


def test_fig_4_6_as_printed_is_one_number_or_an_error():
    """`exp(half_dim * -embeddings)` lacks arange: a Python float, which torch.exp refuses (E45)."""
    half = 4
    with pytest.raises(TypeError):
        torch.exp(half * -(math.log(10_000) / (half - 1)))
    time = torch.arange(3.0)[:, None] * torch.ones(1, half)
    assert torch.cat((time.sin(), time.cos())).shape == (6, half)  # without dim=-1 it stacks along the batch


def test_other_orders_and_divisors_are_other_encodings():
    """E43, E45: the orders of 4.3.2 and fig. 4.6 are permutations of this one, the divisor of fig. 4.6 is another encoding."""
    t, d = torch.tensor([17]), 8
    pe = timestep_embedding(t, d)
    half = d // 2
    assert not torch.allclose(pe, pe.roll(half, dims=-1))  # [sin | cos] of fig. 4.6: a permutation, not the same
    printed = torch.stack([pe[0, :half], pe[0, half:]], dim=1).flatten()  # cos at 2i, sin at 2i + 1; [14] has them swapped
    assert printed.sort().values.equal(pe[0].sort().values) and not torch.allclose(printed, pe[0])
    fig = torch.exp(-math.log(10_000) * torch.arange(half) / (half - 1))  # its divisor half - 1
    assert not torch.allclose(pe[0, :half], (17 * fig).cos(), atol=1e-2)


def test_three_claims_of_4_3_2():
    """Frequencies fall with i, nothing repeats after 10,001 positions, and differences grow with distance (E44)."""
    pe = timestep_embedding(torch.tensor([0, 1, 5, 10_001]), 128)
    distance = (pe - pe[0]).norm(dim=1)
    assert distance[1] < distance[2] < distance[3]
    speed = (timestep_embedding(torch.tensor([1]), 128)[0, 64:]).abs()  # sin(w_i)
    assert (speed.diff() < 0).all()


# ---------------------------------------------------------------------------------------------------- 4.4.5


def kernel_attention(q, k, v):
    """The O(N^2) form of [17]: weights 1 + cos(q_i, k_j), normalised over j."""
    weights = 1 + F.cosine_similarity(q[..., :, None, :], k[..., None, :, :], dim=-1)
    return weights @ v / weights.sum(-1, keepdim=True)


def test_fig_4_5_shows_the_table():
    """Every cell has its entry's colour: orange 1, white 0, blue -1; t = 0 is all cos 0 = 1 above all sin 0 = 0."""
    steps, dim, scale = 12, 8, 4
    picture = np.asarray(draw_time_embedding(steps, dim, scale)).astype(float)
    cells = picture[34 + scale // 2 :: scale, 64 + scale // 2 :: scale][:dim, :steps]
    cells[dim // 2] = picture[34 + scale * dim // 2 + scale - 1, 64 + scale // 2 :: scale][:steps]  # below the line between
    pe = timestep_embedding(torch.arange(steps), dim).T.numpy()
    strength = (255 - cells[..., 2]) / np.where(pe > 0, 255 - 14, 255 - 180)  # of the blue channel, 255 on white
    assert np.abs(strength - np.abs(pe)).max() < 0.01
    assert (cells[: dim // 2, 0] == (214, 93, 14)).all() and (cells[dim // 2 :, 0] == 255).all()


def test_linear_attention_equals_the_quadratic_form():
    q, k, v = randn(2, 30, 8), randn(2, 30, 8, seed=1), randn(2, 30, 5, seed=2)
    torch.testing.assert_close(linear_attention(q, k, v), kernel_attention(q, k, v), rtol=1e-5, atol=1e-6)
    other = q.softmax(-1) @ (k.softmax(-2).transpose(-1, -2) @ v)  # the module that usually bears the name (E46)
    assert (linear_attention(q, k, v) - other).abs().max() > 0.1


def test_linear_attention_averages_the_values():
    """The weights are positive and sum to one: constant values stay, and the output lies within the values' range."""
    q, k, v = randn(1, 50, 8), randn(1, 50, 8, seed=1), randn(1, 50, 3, seed=2)
    torch.testing.assert_close(linear_attention(q, k, torch.ones_like(v)), torch.ones_like(v))
    out = linear_attention(q, k, v)
    assert (out > v.amin(1, keepdim=True)).all() and (out < v.amax(1, keepdim=True)).all()


def test_linear_attention_layer_reads_positions_not_batches():
    assert not LinearAttention(128).proj_out.weight.any()  # begins as the identity
    assert LinearAttention(128).splits == [16, 16, 128]  # q and k have an eighth of the channels (E46)
    layer = LinearAttention(16, groups=1).double()
    torch.nn.init.normal_(layer.proj_out.weight)
    x = randn(2, 16, 4, 4)
    out = layer(x)
    torch.testing.assert_close(out[:1], layer(x[:1]))
    permutation = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    moved = layer(x.flatten(2)[..., permutation].view_as(x))  # attention does not know where a position is
    torch.testing.assert_close(moved.flatten(2), out.flatten(2)[..., permutation])


# ---------------------------------------------------------------------------------------------------- 3.5.5, 4.3.1


def small(**changes):
    arguments = {"attention": None, "num_labels": 5, "groups": 4} | changes
    unet = UNet(3, 3, 16, (1, 2), 1, **arguments).double()
    for i, p in enumerate(unet.parameters()):
        p.data += 0.05 * randn(*p.shape, seed=i)
    return unet


def test_label_is_summed_with_time_not_concatenated():
    """emb(t, y) - emb(t, y') does not depend on t: fig. 4.6 adds, though 4.3.1 says "concatenating" (E42)."""
    unet, seen = small(), []
    unet.input_blocks[1][0].emb_layers.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for t in (0, 999):
        for y in (1, 4):
            unet(randn(1, 3, 8, 8), torch.tensor([t]), torch.tensor([y]))
    torch.testing.assert_close(seen[0] - seen[1], seen[2] - seen[3])
    torch.testing.assert_close(seen[0] - seen[1], (unet.label_emb.weight[1] - unet.label_emb.weight[4])[None])


def test_time_and_label_reach_the_output_and_images_do_not_mix():
    unet, x = small(), randn(3, 3, 8, 8)
    t, y = torch.tensor([5, 5, 700]), torch.tensor([0, 1, 0])
    out = unet(x, t, y)
    same = unet(x[:1].expand(3, -1, -1, -1), t, y)
    assert (same[0] - same[1]).abs().max() > 1e-3 and (same[0] - same[2]).abs().max() > 1e-3
    for i in range(3):
        torch.testing.assert_close(out[i : i + 1], unet(x[i : i + 1], t[i : i + 1], y[i : i + 1]))


def test_skip_connections_are_concatenations():
    """The first block of every level of the way up takes the sum of the channel counts (E32: "residual" in 3.5.5)."""
    unet = UNet(3, 3, 16, (1, 2, 4), 2, None, groups=4)
    skips = [16, 16, 16, 16, 32, 32, 32, 64, 64]
    before = 64
    for module in unet.output_blocks:
        block = module[0]
        assert block.in_layers[2].in_channels == before + skips.pop()
        before = block.in_layers[2].out_channels


def test_network_starts_at_zero_and_blocks_as_identity():
    torch.manual_seed(0)
    unet = letters_unet(16, (1, 2, 2, 2), 1, 27)
    assert (unet(randn(2, 3, 32, 32, dtype=torch.float32), torch.tensor([3, 900]), torch.tensor([0, 26])) == 0).all()
    block = ResBlock(16, 16, 8, groups=4)
    x = randn(1, 16, 4, 4, dtype=torch.float32)
    assert torch.equal(block(x, randn(1, 8, dtype=torch.float32)), x)


def test_attention_stands_right_before_every_down_and_up_sampling():
    """4.4.5, with four levels 32, 16, 8, 4: the layer before a Downsample or Upsample is linear attention."""
    unet = letters_unet(16, (1, 2, 2, 4), 1, 27)
    names = [[type(layer).__name__ for layer in module] for module in unet.input_blocks]
    downs = [i for i, layers in enumerate(names) if layers == ["Downsample"]]
    assert len(downs) == 3 and all(names[i - 1][-1] == "LinearAttention" for i in downs)
    ups = [[type(layer).__name__ for layer in module] for module in unet.output_blocks]
    ups = [layers for layers in ups if layers[-1] == "Upsample"]
    assert len(ups) == 3 and all(layers[-2] == "LinearAttention" for layers in ups)


# ---------------------------------------------------------------------------------------------------- 4.4.4, 4.5.1


def test_cross_attention_is_softmax_over_the_tokens():
    """softmax(Q K^T / sqrt(d)) V for each head, head after head along the channels."""
    layer, x, context = CrossAttention(8, 6, heads=2).double(), randn(2, 5, 8), randn(2, 3, 6, seed=1)
    q, k, v = layer.to_q(x), layer.to_k(context), layer.to_v(context)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        weight = torch.softmax(q[..., part] @ k[..., part].transpose(1, 2) / 4**0.5, dim=-1)  # (B, N, n)
        heads.append(weight @ v[..., part])
    torch.testing.assert_close(layer(x, context), layer.to_out(torch.cat(heads, dim=-1)))
    plain = CrossAttention(8, 8, heads=2).double()
    torch.testing.assert_close(plain(x), plain(x, x))  # without a context: self-attention


def test_e52_one_token_conditions_without_attending():
    """The softmax runs over a single key: the output is W_o W_v c at every position whatever the queries, and to_q, to_k and
    the norm before to_q never train. With three tokens they do."""
    x, one, three = randn(2, 8, 4, 4), randn(2, 1, 6, seed=1), randn(2, 3, 6, seed=2)
    layer = fill_(SpatialTransformer(8, 6, head_channels=4, groups=4), "")
    attention = layer.transformer_blocks[0].attn2
    tokens = x.flatten(2).transpose(1, 2)
    torch.testing.assert_close(attention(tokens, one), attention.to_out(attention.to_v(one)).expand_as(tokens))
    assert (attention(tokens, three) - attention(tokens.flip(1), three)).abs().max() > 1e-3
    idle = ("attn2.to_q.weight", "attn2.to_k.weight", "norm2.weight", "norm2.bias")
    for context in (one, three):
        layer.zero_grad()
        layer(x, None, context).square().sum().backward()
        for name, p in layer.named_parameters():
            assert (p.grad.abs().max() > 1e-12) == (context is three or not name.endswith(idle)), name


def test_feed_forward_gates_with_its_second_half():
    layer, x = GEGLU(3, 5).double(), randn(2, 3)
    value, gate = layer.proj(x)[:, :5], layer.proj(x)[:, 5:]
    torch.testing.assert_close(layer(x), value * gate * 0.5 * (1 + torch.erf(gate / 2**0.5)))


def test_heads_double_with_the_width():
    with torch.device("meta"):
        unet = latent_unet(256, (1, 2, 4), 2, 4, 512)
    heads = [block.attn2.heads for block in unet.modules() if isinstance(block, TransformerBlock)]
    assert heads == [8, 8, 16, 16, 32, 32] + [32] + [32, 32, 32, 16, 16, 16, 8, 8, 8]


def test_latent_unet_has_the_published_names_and_shapes():
    """E55: 394,984,196 parameters in 626 entries; the digest is of the published file's sorted "name shape" lines."""
    with torch.device("meta"):
        unet = latent_unet(256, (1, 2, 4), 2, 4, 512)
    lines = sorted(f"{name} {tuple(value.shape)}" for name, value in unet.state_dict().items())
    assert (len(lines), sum(p.numel() for p in unet.parameters())) == (626, 394_984_196)
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == "98b4f0d7f92faead58b5bfed6bfa612e4e24089f3843914b4c6fbca8ac9c0e55"


@pytest.mark.parametrize("context, eps", [("context", "eps"), ("context3", "eps3")])
def test_outputs_equal_those_of_the_published_code(context, eps):
    """One token, then three; float64."""
    with np.load(Path(__file__).parent / "golden" / "unet.npz") as file:
        golden = {name: torch.from_numpy(file[name]) for name in file.files}
    unet = UNet(4, 4, 32, (1, 2, 4), 2, partial(SpatialTransformer, context_channels=16, head_channels=8))
    fill_(unet, "model.diffusion_model.")
    x = standard_normal("input:unet.x", (4, 4, 8, 8))[[1, 3]]
    with torch.no_grad():
        out = unet(x, golden["t"], context=golden[context])
    torch.testing.assert_close(out, golden[eps], rtol=0, atol=1e-9)


# ---------------------------------------------------------------------------------------------------- 4.4.2


def test_4_4_2_the_classifier_is_the_way_down_of_the_unet():
    """The same names, so the same layers; its answer depends on the noise level, on places, and on no other image."""
    classifier, unet = (
        noisy_classifier((4, 16, 8), 8, 16, (1, 2), 1),
        UNet(4, 4, 16, (1, 2), 1, partial(LinearAttention, groups=1), groups=1),
    )
    for i, p in enumerate(classifier.parameters()):
        p.data += 0.05 * randn(*p.shape, seed=i, dtype=torch.float32)
    down = {name: p.shape for name, p in unet.named_parameters() if not name.startswith(("output_blocks", "out."))}
    assert {name: p.shape for name, p in classifier.named_parameters() if not name.startswith("out.")} == down
    x, t = randn(3, 4, 16, 8, dtype=torch.float32), torch.tensor([5, 5, 700])
    logits = classifier(x, t)
    assert logits.shape == (3, 8)
    torch.testing.assert_close(logits[1:2], classifier(x[1:2], t[1:2]))
    assert (classifier(x[:1], t[2:]) - logits[:1]).abs().max() > 1e-3
    assert (classifier(x[:1].flip(-1), t[:1]) - logits[:1]).abs().max() > 1e-3
