"""Sections 3.5.5, 4.3, 4.4.2, 4.4.4, 4.4.5 and 4.5.1: embeddings, attention, the U-Net."""

import hashlib
import math
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fill_, standard_normal
from torch.testing import assert_close

from unet import (
    CrossAttention,
    LinearAttention,
    ResBlock,
    SpatialTransformer,
    TransformerBlock,
    UNet,
    attend,
    attention_weights,
    latent_unet,
    letters_unet,
    linear_attention,
    noisy_classifier,
    timestep_embedding,
)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def stir(module):
    """Change all weights a little: no weight stays zero."""
    for i, p in enumerate(module.parameters()):
        p.data += 0.05 * randn(*p.shape, seed=i, dtype=p.dtype)
    return module


# ------------------------------------------------------------------------------------------- 4.3.2


def test_positional_encoding_values():
    """PE of 4.3.2 in the published order [cos | sin] with divisor d/2 (E43, E45)."""
    d, t = 8, torch.tensor([0, 1, 17, 999])
    angle = t[:, None].double() / 10_000 ** (2 * torch.arange(d // 2) / d)
    expected = torch.cat([angle.cos(), angle.sin()], dim=1).float()
    assert_close(timestep_embedding(t, d), expected, rtol=0, atol=1e-4)


def test_fig_4_6_as_printed_is_one_number_or_an_error():
    """Checks the printed text of fig. 4.6 only, no function of the project (E45).

    `exp(half_dim * -embeddings)` lacks arange: it is a Python float, which torch.exp refuses.
    """
    half = 4
    with pytest.raises(TypeError):
        torch.exp(half * -(math.log(10_000) / (half - 1)))
    time = torch.arange(3.0)[:, None] * torch.ones(1, half)
    assert torch.cat((time.sin(), time.cos())).shape == (6, half)  # needs dim=-1, else: batch axis


def test_other_orders_and_divisors_are_other_encodings():
    """The orders of 4.3.2 and fig. 4.6 are permutations (E43); the divisor h - 1 is not (E45)."""
    d, half = 8, 4
    pe = timestep_embedding(torch.tensor([17]), d)[0]
    fig_4_6 = pe.roll(half)  # [sin | cos]
    printed = torch.stack([pe[:half], pe[half:]], dim=1).flatten()  # cos at 2i, sin at 2i + 1
    for other in (fig_4_6, printed):
        assert other.sort().values.equal(pe.sort().values) and not torch.allclose(other, pe)
    w = torch.exp(-math.log(10_000) * torch.arange(half) / (half - 1))
    assert not torch.allclose(pe[:half], (17 * w).cos(), atol=1e-2)


def test_three_claims_of_4_3_2():
    """Frequencies fall with i, 10,001 positions do not repeat, distances grow (E44)."""
    pe = timestep_embedding(torch.tensor([0, 1, 5, 10_001]), 128)
    distance = (pe - pe[0]).norm(dim=1)
    assert distance[1] < distance[2] < distance[3]
    assert (pe[1, 64:].abs().diff() < 0).all()  # sin(w_i)


# ------------------------------------------------------------------------------------------- 4.4.5


def test_linear_attention_equals_the_quadratic_form():
    """The O(N^2) form of [17] has the weights 1 + cos(q_i, k_j), normalised over j (E46)."""
    q, k, v = randn(2, 30, 8), randn(2, 30, 8, seed=1), randn(2, 30, 5, seed=2)
    weights = 1 + F.cosine_similarity(q[..., :, None, :], k[..., None, :, :], dim=-1)
    quadratic = weights @ v / weights.sum(-1, keepdim=True)
    assert_close(linear_attention(q, k, v), quadratic, rtol=1e-5, atol=1e-6)
    other = q.softmax(-1) @ (k.softmax(-2).transpose(-1, -2) @ v)  # the other module of this name
    assert (linear_attention(q, k, v) - other).abs().max() > 0.1


def test_linear_attention_layer_reads_positions_not_batches():
    assert not LinearAttention(128).proj_out.weight.any()  # the identity at the start
    assert LinearAttention(128).splits == [16, 16, 128]  # q and k: an eighth of the channels (E46)
    layer, x = stir(LinearAttention(16, groups=1).double()), randn(2, 16, 4, 4)
    out = layer(x)
    assert_close(out[:1], layer(x[:1]))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    moved = layer(x.flatten(2)[..., order].view_as(x))  # attention does not know the places
    assert_close(moved.flatten(2), out.flatten(2)[..., order])


# ------------------------------------------------------------------------------------ 3.5.5, 4.3.1


def small():
    return stir(UNet(3, 16, (1, 2), 1, [None, None], num_labels=5, groups=4).double())


def test_label_is_summed_with_time_not_concatenated():
    """emb(t, y) - emb(t, y') is the same for every t: fig. 4.6 adds, 4.3.1 "concatenates" (E42)."""
    unet, seen = small(), []
    block = unet.input_blocks[1][0]
    block.emb_layers.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for t in (0, 999):
        for y in (1, 4):
            unet(randn(1, 3, 8, 8), torch.tensor([t]), torch.tensor([y]))
    difference = (unet.label_emb.weight[1] - unet.label_emb.weight[4])[None]
    assert_close(seen[0] - seen[1], difference)
    assert_close(seen[2] - seen[3], difference)


def test_time_and_label_reach_the_output_and_images_do_not_mix():
    unet, x = small(), randn(3, 3, 8, 8)
    t, y = torch.tensor([5, 5, 700]), torch.tensor([0, 1, 0])
    out, same = unet(x, t, y), unet(x[:1].expand(3, -1, -1, -1), t, y)
    assert (same[0] - same[1]).abs().max() > 1e-3 and (same[0] - same[2]).abs().max() > 1e-3
    for i in range(3):
        assert_close(out[i : i + 1], unet(x[i : i + 1], t[i : i + 1], y[i : i + 1]))


def test_skip_connections_are_concatenations():
    """Each block of the way up takes the sum of two channel counts (E32: "residual" in 3.5.5)."""
    unet = UNet(3, 16, (1, 2, 4), 2, [None] * 3, groups=4)
    skips, before = [16, 16, 16, 16, 32, 32, 32, 64, 64], 64
    for module in unet.output_blocks:
        block = module[0]
        assert block.in_layers[2].in_channels == before + skips.pop()
        before = block.in_layers[2].out_channels


def test_network_starts_at_zero_and_blocks_as_identity():
    unet, x = letters_unet(16, (1, 2, 2, 2), 1, 27), randn(2, 3, 32, 32, dtype=torch.float32)
    assert not unet(x, torch.tensor([3, 900]), torch.tensor([0, 26])).any()
    block, x = ResBlock(16, 16, 8, groups=4), randn(1, 16, 4, 4, dtype=torch.float32)
    assert torch.equal(block(x, randn(1, 8, dtype=torch.float32)), x)


def test_attention_stands_right_before_every_down_and_up_sampling():
    """4.4.5: linear attention precedes each Downsample and Upsample (levels 32, 16, 8, 4)."""
    unet = letters_unet(16, (1, 2, 2, 4), 1, 27)
    for modules, name in ((unet.input_blocks, "Downsample"), (unet.output_blocks, "Upsample")):
        names = [type(layer).__name__ for module in modules for layer in module]
        before = [names[i - 1] for i, layer in enumerate(names) if layer == name]
        assert before == ["LinearAttention"] * 3


# ------------------------------------------------------------------------------------ 4.4.4, 4.5.1


def test_cross_attention_is_softmax_over_the_tokens():
    """softmax(Q K^T / sqrt(d)) V per head; the heads follow one another along the channels."""
    layer = CrossAttention(8, 6, heads=2).double()
    x, context = randn(2, 5, 8), randn(2, 3, 6, seed=1)
    q, k, v = layer.to_q(x), layer.to_k(context), layer.to_v(context)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        weight = torch.softmax(q[..., part] @ k[..., part].transpose(1, 2) / 4**0.5, dim=-1)
        heads.append(weight @ v[..., part])
    assert_close(layer(x, context), layer.to_out(torch.cat(heads, dim=-1)))
    plain = CrossAttention(8, 8, heads=2).double()
    assert_close(plain(x), plain(x, x))  # without a context: self-attention


@pytest.mark.parametrize(("positions", "calls"), [(5, 0), (256, 0), (257, 1)])
def test_attention_to_few_and_to_many_positions_is_one_formula(monkeypatch, positions, calls):
    """Above 256 * 256 weights per head torch's function computes it."""
    theirs = Mock(wraps=F.scaled_dot_product_attention)
    monkeypatch.setattr(F, "scaled_dot_product_attention", theirs)
    q, k, v = randn(3, 1, 2, positions, 8)
    weights = torch.softmax(q @ k.mT / 8**0.5, dim=-1)
    assert_close(attention_weights(q, k), weights)
    assert_close(attend(q, k, v), weights @ v)
    assert theirs.call_count == calls


def test_e52_one_token_conditions_without_attending():
    """E52: with one token, the output is W_o W_v c at every position, for any queries; to_q, to_k
    and the norm before to_q get no gradient. With three tokens they do."""
    x, one, three = randn(2, 8, 4, 4), randn(2, 1, 6, seed=1), randn(2, 3, 6, seed=2)
    layer = fill_(SpatialTransformer(8, 6, head_channels=4, groups=4), "")
    attention, tokens = layer.transformer_blocks[0].attn2, x.flatten(2).transpose(1, 2)
    constant = attention.to_out(attention.to_v(one)).expand_as(tokens)
    assert_close(attention(tokens, one), constant)
    assert (attention(tokens, three) - attention(tokens.flip(1), three)).abs().max() > 1e-3
    idle = ("attn2.to_q.weight", "attn2.to_k.weight", "norm2.weight", "norm2.bias")
    for context in (one, three):
        layer.zero_grad()
        layer(x, None, context).square().sum().backward()
        for name, p in layer.named_parameters():
            trained = context is three or not name.endswith(idle)
            assert (p.grad.abs().max() > 1e-12) == trained, name


@pytest.fixture(scope="module")
def published():
    """The thesis's U-Net, without the memory for its weights."""
    with torch.device("meta"):
        return latent_unet(256, (1, 2, 4), 2, 4, 512)


def test_heads_double_with_the_width(published):
    blocks = [m for m in published.modules() if isinstance(m, TransformerBlock)]
    heads = [8, 8, 16, 16, 32, 32] + [32] + [32, 32, 32, 16, 16, 16, 8, 8, 8]
    assert [block.attn2.heads for block in blocks] == heads


def test_latent_unet_has_the_published_names_and_shapes(published):
    """E55: 394,984,196 parameters, 626 entries; the published file's sorted "name shape" lines."""
    lines = sorted(f"{name} {tuple(v.shape)}" for name, v in published.state_dict().items())
    assert len(lines) == 626 and sum(p.numel() for p in published.parameters()) == 394_984_196
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == "98b4f0d7f92faead58b5bfed6bfa612e4e24089f3843914b4c6fbca8ac9c0e55"


def test_outputs_equal_those_of_the_published_code():
    """One token, then three; float64."""
    with np.load(Path(__file__).parent / "golden" / "unet.npz") as file:
        golden = {name: torch.from_numpy(file[name]) for name in file.files}
    attention = partial(SpatialTransformer, context_channels=16, head_channels=8)
    unet = fill_(UNet(4, 32, (1, 2, 4), 2, [attention] * 3), "model.diffusion_model.")
    x = standard_normal("input:unet.x", (4, 4, 8, 8))[[1, 3]]
    for context, eps in (("context", "eps"), ("context3", "eps3")):
        with torch.no_grad():
            out = unet(x, golden["t"], context=golden[context])
        assert_close(out, golden[eps], rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------------------- 4.4.2


def test_4_4_2_the_classifier_is_the_way_down_of_the_unet():
    """It has the names and shapes of the way down. Its answer depends on the noise level and on
    places, but not on other images."""
    classifier = stir(noisy_classifier((4, 16, 8), 8, 16, (1, 2), 1))
    unet = UNet(4, 16, (1, 2), 1, [partial(LinearAttention, groups=1)] * 2, groups=1)

    def down(model):
        parameters = model.named_parameters()
        return {n: p.shape for n, p in parameters if not n.startswith(("output_blocks", "out."))}

    assert down(classifier) == down(unet)
    x, t = randn(3, 4, 16, 8, dtype=torch.float32), torch.tensor([5, 5, 700])
    logits = classifier(x, t)
    assert logits.shape == (3, 8)
    assert_close(logits[1:2], classifier(x[1:2], t[1:2]))
    assert (classifier(x[:1], t[2:]) - logits[:1]).abs().max() > 1e-3
    assert (classifier(x[:1].flip(-1), t[:1]) - logits[:1]).abs().max() > 1e-3


def test_a_spatial_transformer_starts_as_identity():
    layer, x = SpatialTransformer(32, 6, groups=2), randn(2, 32, 4, 4, dtype=torch.float32)
    assert torch.equal(layer(x, None, randn(2, 3, 6, dtype=torch.float32)), x)


def test_both_heads_normalise_their_features():
    """Five times as large features give the same answer."""
    classifier = stir(noisy_classifier((4, 16, 8), 8, 32, (1, 2), 1))
    h, wide = randn(2, 64, 8, 4, dtype=torch.float32), randn(2, 32, 4, 4, dtype=torch.float32)
    for head, features in ((classifier.out, h), (stir(letters_unet(32, (1, 2), 1, 27)).out, wide)):
        assert_close(head(features), head(5 * features), rtol=1e-3, atol=1e-4)


def test_the_groups_of_the_letters_model_have_at_least_16_channels():
    norms = [m for m in letters_unet(32, (1, 2), 1, 27).modules() if hasattr(m, "num_groups")]
    assert {norm.num_groups for norm in norms} == {2} and len(norms) > 10


def test_a_transformer_block_attends_to_itself_then_to_the_context():
    block, x, context = stir(TransformerBlock(8, 8, 2).double()), randn(2, 5, 8), randn(2, 3, 8)
    h = x + block.attn1(block.norm1(x))
    h = h + block.attn2(block.norm2(h), context)
    assert_close(block(x, context), h + block.ff(block.norm3(h)))


def test_letters_by_attention_read_the_label_on_all_levels_but_the_first():
    unet = letters_unet(32, (1, 2), 1, 27, 64)
    kinds = [type(module[1]) for module in unet.input_blocks if len(module) > 1]
    assert kinds == [LinearAttention, SpatialTransformer]
