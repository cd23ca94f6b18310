"""The denoising network eps_theta(x_t, t, label): sections 3.5.5, 4.3, 4.4.2, 4.4.4, 4.4.5, 4.5.1.

One class, `UNet`, serves the 32x32 letters model and the 400M latent model. Three rules apply:

1. Every layer has the same signature, `forward(x, emb, context)`, and ignores what it does not
   need. A chain of layers is therefore a plain loop.
2. The kind of attention is an argument: per level, a function that builds a layer from its number
   of channels (e.g. `LinearAttention`), or None.
3. The label enters in one of two places, and the caller chooses: `y` (its embedding is added to the
   time embedding, fig. 4.6) or `context` (tokens for cross-attention, section 4.5.1).

Attribute names (`input_blocks.1.0.in_layers.2.weight`, ...) are those of the published latent
diffusion checkpoints: their state dicts load with `strict=True`, without a table of names.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

# --------------------------------------------------------------------------------------------------
# 3.5.5  Layers. Each of them: forward(x, emb, context) -> x
# --------------------------------------------------------------------------------------------------


class Conv(nn.Conv2d):
    def forward(self, x, emb=None, context=None):
        return super().forward(x)


class ResBlock(nn.Module):
    """h = conv(silu(norm x)) + linear(silu emb);  out = skip(x) + conv(silu(norm h)).

    Time (and the label, in the letters model) reaches the features through the sum with `emb`.
    """

    def __init__(self, in_channels, out_channels, emb_channels, groups):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, in_channels),
            nn.SiLU(),
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, out_channels),
            nn.SiLU(),
            nn.Identity(),  # a dropout in the published code: keeps the name out_layers.3
            zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, emb, context=None):
        h = self.in_layers(x)  # (B, C', H, W)
        h = h + self.emb_layers(emb)[:, :, None, None]
        h = self.out_layers(h)
        return self.skip_connection(x) + h


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x, emb=None, context=None):
        return self.op(x)  # (B, C, H/2, W/2)


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, emb=None, context=None):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))  # (B, C, 2H, 2W)


def zero_init(layer):
    """Set the last layer of a residual branch to zero: the block is the identity at the start."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


# --------------------------------------------------------------------------------------------------
# 4.3.2  Time: sinusoidal positional encoding
# --------------------------------------------------------------------------------------------------


def timestep_embedding(t, dim, max_period=10_000):
    """Positional encoding, section 4.3.2 (corrected, E43-E45).

        PE(t) = [cos(t w_0), ..., cos(t w_{h-1}), sin(t w_0), ..., sin(t w_{h-1})]
        w_i = max_period^(-i/h),  h = dim/2

    The thesis interleaves sin and cos (with swapped indices). Its fig. 4.6 has [sin | cos], the
    divisor h - 1, and `half_dim` where `arange(half_dim)` is needed. The orders differ only by a
    permutation. This order and the divisor h are those of the published checkpoints.

    t: (B,) integer time steps; dim: even. Returns (B, dim), always float32.
    """
    half = dim // 2
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    w = torch.exp(-math.log(max_period) * i / half)  # (h,)
    angle = t.float()[:, None] * w[None, :]  # (B, h)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)  # (B, dim)


# --------------------------------------------------------------------------------------------------
# 4.4.4, 4.5.1, 4.4.5  Cross-attention, and linear attention
# --------------------------------------------------------------------------------------------------


class CrossAttention(nn.Module):
    """4.4.4:  softmax(Q K^T / sqrt(d)) V  per head. Q: image positions; K, V: context tokens.

    Without a context, K and V also come from the positions: self-attention. The context of the
    thesis is one token, the label. The softmax then has one key, and every weight is 1: the output
    is W_o W_v c at every position, whatever Q is. It cannot "focus on particular regions" (4.4.4),
    and to_q and to_k get no gradient (E52). Contexts of several tokens need them.
    """

    def __init__(self, channels, context_channels, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def split(self, tokens):
        """(B, N, C) -> (B, heads, N, d)."""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = map(self.split, (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self.to_out(attend(q, k, v).transpose(1, 2).flatten(2))  # (B, N, C)

    def weights(self, x, context):
        """(B, heads, N, n): how much each position reads each token."""
        return attention_weights(self.split(self.to_q(x)), self.split(self.to_k(context)))


def attention_weights(q, k):
    """4.4.4:  softmax(Q K^T / sqrt(d)), (B, heads, N, n)."""
    return (q / q.shape[-1] ** 0.5 @ k.transpose(-1, -2)).softmax(-1)


def attend(q, k, v):
    """4.4.4:  softmax(Q K^T / sqrt(d)) V, (B, heads, N, d).

    torch's own function never stores the weights. Where a head has few of them, a CPU is mostly
    several times as fast by the formula itself (docs/results.md, Speed).
    """
    if q.device.type == "cpu" and q.shape[-2] * k.shape[-2] <= 256**2:
        return attention_weights(q, k) @ v
    return F.scaled_dot_product_attention(q, k, v)


class GEGLU(nn.Module):
    """value * gelu(gate), both linear in x."""

    def __init__(self, channels, inner):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.net = nn.Sequential(
            GEGLU(channels, 4 * channels),
            nn.Identity(),  # a dropout in the published code: keeps the name net.2
            nn.Linear(4 * channels, channels),
        )

    def forward(self, x):
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the context, feed-forward; each is  x + f(norm x)."""

    def __init__(self, channels, context_channels, heads):
        super().__init__()
        self.attn1 = CrossAttention(channels, channels, heads)
        self.ff = FeedForward(channels)
        self.attn2 = CrossAttention(channels, context_channels, heads)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, x, context):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """4.5.1: a transformer block over the H W positions of a feature map; the label is the context.

    context: (B, n, context_channels), n tokens. The number of heads grows with the width.
    """

    def __init__(self, channels, context_channels, head_channels=32, groups=32):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        block = TransformerBlock(channels, context_channels, heads=channels // head_channels)
        self.transformer_blocks = nn.ModuleList([block])  # a list, for the published names
        self.proj_out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x, emb, context):
        H, W = x.shape[2:]
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (B, H W, C)
        h = self.transformer_blocks[0](h, context)
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, (H, W)))


class LinearAttention(nn.Module):
    """Linear attention, section 4.4.5 and its reference [17] (E46), over the N = H W positions.

        D(Q, K, V)_i = sum_j (1 + q_i . k_j) v_j / sum_j (1 + q_i . k_j),   |q_i| = |k_j| = 1

    Softmax attention with exp(q . k) replaced by its first-order expansion 1 + q . k, which is the
    inner product of phi(q) = (1, q) and phi(k). One sum over j then serves all i: O(N), not O(N^2).
    As in [17], q and k have an eighth of the channels (here at least 8). (Other diffusion code has
    a module of this name with one softmax over q and one over k.)
    """

    def __init__(self, channels, groups=32):
        super().__init__()
        self.splits = [max(8, channels // 8)] * 2 + [channels]  # channels of q, k, v
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv2d(channels, sum(self.splits), 1, bias=False)
        self.proj_out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x, emb=None, context=None):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1).reshape(B, H * W, -1)
        h = linear_attention(*qkv.split(self.splits, dim=-1))  # (B, N, C)
        return x + self.proj_out(h.reshape(B, H, W, C).permute(0, 3, 1, 2))


def linear_attention(q, k, v):
    """4.4.5:  D(Q, K, V)_i = phi(q_i) (sum_j phi(k_j) v_j^T) / (phi(q_i) . sum_j phi(k_j)).

    q, k: (..., N, d); v: (..., N, C). Returns (..., N, C).
    """

    def phi(x):  # (..., N, d) -> (..., 1 + d, N): the long axis is last, which is faster
        x = x.transpose(-1, -2).contiguous()
        unit = x * (x.square().sum(-2, keepdim=True) + 1e-6).rsqrt()
        return F.pad(unit, (0, 0, 1, 0), value=1.0)

    q, k = phi(q), phi(k)
    denominator = k.sum(-1, keepdim=True).transpose(-1, -2) @ q  # (..., 1, N), between 0 and 2 N
    weight = q * denominator.reciprocal()
    return weight.transpose(-1, -2) @ (k @ v)


# --------------------------------------------------------------------------------------------------
# 3.5.5, 4.5.1  The U-Net
# --------------------------------------------------------------------------------------------------


class Block(nn.Sequential):
    """A chain of layers that all take (x, emb, context)."""

    def forward(self, x, emb, context=None):
        for layer in self:
            x = layer(x, emb, context)
        return x


class UNetEncoder(nn.Module):
    """The way down of a U-Net and its middle. `UNet` adds the way up, `NoisyClassifier` a head.

    in_channels  channels of the image or latent
    channels     width of the first level
    multipliers  width of each level divided by `channels`; the resolution halves between levels
    blocks       residual blocks per level
    attentions   for each level a function: width -> attention layer; None = no attention there
    num_labels   rows of the label table, zero-label included (4.4.3); None = no such table
    groups       groups per GroupNorm of a residual block
    """

    def __init__(
        self, in_channels, channels, multipliers, blocks, attentions, num_labels=None, groups=32
    ):
        super().__init__()
        self.channels, emb_channels = channels, 4 * channels

        def block(level, c_in, *more):
            c = channels * multipliers[level]
            layers = [ResBlock(c_in, c, emb_channels, groups)]
            if attentions[level]:
                layers.append(attentions[level](c))
            return Block(*layers, *more)

        self.block = block  # for the way up of `UNet`
        self.time_embed = nn.Sequential(
            nn.Linear(channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        if num_labels is not None:
            self.label_emb = nn.Embedding(num_labels, emb_channels)

        self.input_blocks = nn.ModuleList([Block(Conv(in_channels, channels, 3, padding=1))])
        c, self.skip_channels = channels, [channels]
        for level, multiplier in enumerate(multipliers):
            if level:
                self.input_blocks.append(Block(Downsample(c)))
                self.skip_channels.append(c)
            for _ in range(blocks):
                self.input_blocks.append(block(level, c))
                c = channels * multiplier
                self.skip_channels.append(c)
        self.middle_block = Block(*block(level, c), ResBlock(c, c, emb_channels, groups))

    def embed(self, x, t, y=None):
        """Time plus label, (B, 4 channels): fig. 4.6; section 4.3.1 says "concatenating" (E42)."""
        emb = self.time_embed(timestep_embedding(t, self.channels).to(x.dtype))
        return emb if y is None else emb + self.label_emb(y)

    def down(self, x, emb, context=None):
        """Returns the features of the middle, and a list of those after every block before it."""
        h, skips = x, []
        for module in self.input_blocks:
            h = module(h, emb, context)
            skips.append(h)
        return self.middle_block(h, emb, context), skips


class UNet(UNetEncoder):
    """3.5.5, 4.5.1: eps_theta(x_t, t, y or context). The settings are those of `UNetEncoder`.

    `forward`: x (B, C, H, W), H and W divisible by 2^(levels - 1); t (B,) integers that start at 0,
    as in the published checkpoints; y (B,) labels; context (B, n, d) tokens. Returns (B, C, H, W).
    """

    def __init__(
        self, in_channels, channels, multipliers, blocks, attentions, num_labels=None, groups=32
    ):
        super().__init__(in_channels, channels, multipliers, blocks, attentions, num_labels, groups)
        c, skips = channels * multipliers[-1], list(self.skip_channels)
        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            width = channels * multiplier
            for i in range(blocks + 1):  # one block per entry of skip_channels
                up = [Upsample(width)] if level and i == blocks else []
                self.output_blocks.append(self.block(level, c + skips.pop(), *up))
                c = width
        last = zero_init(nn.Conv2d(c, in_channels, 3, padding=1))
        self.out = nn.Sequential(nn.GroupNorm(groups, c), nn.SiLU(), last)

    def forward(self, x, t, y=None, context=None):
        emb = self.embed(x, t, y)
        h, skips = self.down(x, emb, context)
        for module in self.output_blocks:
            h = module(torch.cat([h, skips.pop()], dim=1), emb, context)
        return self.out(h)


class NoisyClassifier(UNetEncoder):
    """4.4.2: f(y | x_t, t), the way down of the U-Net and a linear layer on all its features.

    shape: (C, H, W) of x; num_classes: labels without the zero-label; the rest as in `UNetEncoder`.
    `forward(x, t)`: x and t as for `UNet`. Returns logits (B, num_classes).
    """

    def __init__(self, shape, num_classes, channels, multipliers, blocks, attentions, groups):
        super().__init__(shape[0], channels, multipliers, blocks, attentions, groups=groups)
        c = channels * multipliers[-1]
        positions = shape[1] * shape[2] // 4 ** (len(multipliers) - 1)  # in the middle
        head = nn.Linear(c * positions, num_classes)  # no average over them: places matter
        self.out = nn.Sequential(nn.GroupNorm(groups, c), nn.SiLU(), nn.Flatten(), head)

    def forward(self, x, t):
        h, _ = self.down(x, self.embed(x, t))
        return self.out(h)


# --------------------------------------------------------------------------------------------------
# 4.4.2, 4.4.5, 4.5.1  Named sizes
# --------------------------------------------------------------------------------------------------


def letters_unet(channels, multipliers, blocks, num_labels, context_channels=None):
    """4.4.5: the shallow U-Net for 32 x 32 letters; "4 down and up-sampling layers": 4 multipliers.

    With one block per level, linear attention stands right before each down- and up-sampling. The
    groups have at least 16 channels, because smaller ones are slow on a CPU in bfloat16.
    context_channels: the label is not added to the time embedding but is a token of this width for
    cross-attention, on all levels but the first, which has too many positions.
    """
    groups = max(1, channels // 16)
    attentions = [partial(LinearAttention, groups=groups)] * len(multipliers)
    if context_channels:
        cross = partial(SpatialTransformer, context_channels=context_channels, groups=groups)
        attentions[1:], num_labels = [cross] * (len(multipliers) - 1), None
    return UNet(3, channels, multipliers, blocks, attentions, num_labels, groups)


def noisy_classifier(shape, num_classes, channels, multipliers, blocks):
    """4.4.2: the classifier of letters or latents (C, H, W), linear attention on every level."""
    groups = max(1, channels // 16)
    attentions = [partial(LinearAttention, groups=groups)] * len(multipliers)
    return NoisyClassifier(shape, num_classes, channels, multipliers, blocks, attentions, groups)


def latent_unet(
    channels, multipliers, blocks, z_channels, context_channels, attention_levels=None, groups=32
):
    """4.5.1: the U-Net of the latent model, with 32 channels per head.

    The thesis has `latent_unet(256, (1, 2, 4), 2, 4, 512)`: 394,984,196 parameters (E55), with the
    names and shapes of the published model. attention_levels=None: attention on all levels.
    """
    attention = partial(SpatialTransformer, context_channels=context_channels, groups=groups)
    levels = range(len(multipliers)) if attention_levels is None else attention_levels
    attentions = [attention if i in levels else None for i in range(len(multipliers))]
    return UNet(z_channels, channels, multipliers, blocks, attentions, groups=groups)
