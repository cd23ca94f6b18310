"""The denoising network eps_theta(x_t, t, label): sections 3.5.5, 4.3, 4.4.2, 4.4.4, 4.4.5 and 4.5.1 of the thesis.

One class, `UNet`, serves the 32x32 letters model and the 400M latent model. Three rules keep it free of special cases:

1. every layer has one signature, `forward(x, emb, context)`, and ignores what it does not use: a chain is a plain loop;
2. the kind of attention is an argument that builds a layer from a channel count, e.g. `attention=LinearAttention`;
3. the label enters in one of two places and the caller decides: `y` (an embedding added to the time embedding, fig. 4.6)
   or `context` (tokens for cross-attention, section 4.5.1).

Attribute names (`input_blocks.1.0.in_layers.2.weight`, ...) are those of the published latent diffusion checkpoints, so
such a state dict loads with `strict=True` and no table of names.

    python unet.py --out figures/figure_4_5.png     the table of time embeddings as a picture
"""

import argparse
import math
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn

# ------------------------------------------------------------------------------------------------------------------
# 3.5.5  Layers. All of them: forward(x, emb, context) -> x
# ------------------------------------------------------------------------------------------------------------------


class Conv(nn.Conv2d):
    def forward(self, x, emb=None, context=None):
        return super().forward(x)


class ResBlock(nn.Module):
    """Residual block: h = conv(silu(norm x)) + linear(silu emb);  out = skip(x) + conv(silu(norm h)).

    The sum with `emb` is where time (and, in the letters model, the label) reaches the features.
    """

    def __init__(self, in_channels, out_channels, emb_channels, dropout=0.0, groups=32):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, in_channels), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
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
    """Start a residual branch at zero, so that the block begins as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


# ------------------------------------------------------------------------------------------------------------------
# 4.3.2  Time: sinusoidal positional encoding
# ------------------------------------------------------------------------------------------------------------------


def timestep_embedding(t, dim, max_period=10_000):
    """Positional encoding, section 4.3.2 (corrected, E43-E45).

        PE(t) = [cos(t w_0), ..., cos(t w_{h-1}), sin(t w_0), ..., sin(t w_{h-1})],  w_i = max_period^(-i/h),  h = dim/2

    The thesis interleaves sin and cos (at swapped indices), its fig. 4.6 concatenates [sin | cos] and takes the exponential
    of `half_dim` where `arange(half_dim)` is meant. All orders are permutations of one another; this one is the published
    checkpoints', and so is the divisor h (fig. 4.6 has h - 1).

    t: (B,) time steps, raw integers; dim: even. Returns (B, dim), float32 whatever the precision of the network.
    """
    half = dim // 2
    w = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)  # (h,)
    angle = t.float()[:, None] * w[None, :]  # (B, h)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)  # (B, dim)


# ------------------------------------------------------------------------------------------------------------------
# 4.4.4, 4.5.1  Cross-attention
# ------------------------------------------------------------------------------------------------------------------


class CrossAttention(nn.Module):
    """4.4.4:  softmax(Q K^T / sqrt(d)) V  per head, Q from the positions of the image, K and V from the context.

    Without a context, K and V come from the positions too: self-attention. No matrix of weights is held (SDPA).

    With a context of one token, as the thesis's label is, the softmax runs over a single key and every weight is 1: the
    output is W_o W_v c at every position, whatever Q. It conditions, but "focus on particular regions" (4.4.4) it cannot,
    and to_q and to_k get no gradient (E52). It is kept for the published weights, and for contexts of more tokens.
    """

    def __init__(self, channels, context_channels, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = (
            project(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N or n, d)
            for project, tokens in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        h = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(h.transpose(1, 2).flatten(2))  # (B, N, C)


class GEGLU(nn.Module):
    """value * gelu(gate), both linear in x."""

    def __init__(self, channels, inner):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, channels, dropout=0.0):
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Dropout(dropout), nn.Linear(4 * channels, channels))

    def forward(self, x):
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the context, feed-forward; each  x + f(norm x)."""

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
    """4.5.1: a transformer block over the H W positions of a feature map, with the label as its context.

    context: (B, n, context_channels), n tokens; heads of `head_channels` each, so that they double with the width.
    """

    def __init__(self, channels, context_channels, head_channels=32, groups=32):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        heads = channels // head_channels
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_channels, heads)])
        self.proj_out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x, emb, context):
        H, W = x.shape[2:]
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (B, H W, C)
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, (H, W)))


# ------------------------------------------------------------------------------------------------------------------
# 4.4.5  Linear attention
# ------------------------------------------------------------------------------------------------------------------


class LinearAttention(nn.Module):
    """Linear attention of the thesis's reference [17], section 4.4.5 (E46), over the N = H W positions.

        D(Q, K, V)_i = sum_j (1 + q_i . k_j) v_j / sum_j (1 + q_i . k_j),     q_i, k_j scaled to unit length

    Softmax attention with exp(q . k) replaced by its first-order expansion 1 + q . k, which is an inner product of
    phi(q) = (1, q) with phi(k): the sum over j can be done once for all i, in O(N) instead of O(N^2).
    As in [17], q and k have an eighth of the channels. (Another module of the same name, with a softmax over q and one
    over k, is common in diffusion code; it is not this one.)
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
    """D(Q, K, V) of `LinearAttention` as  phi(q_i) (sum_j phi(k_j) v_j^T) / phi(q_i) . sum_j phi(k_j).

    q, k: (..., N, d); v: (..., N, C). Returns (..., N, C).
    """

    def phi(x):  # (..., N, d) -> (..., 1 + d, N); d is small, so the long axis goes last
        x = x.transpose(-1, -2).contiguous()
        unit = x * (x.square().sum(-2, keepdim=True) + 1e-6).rsqrt()
        return F.pad(unit, (0, 0, 1, 0), value=1.0)

    q, k = phi(q), phi(k)
    denominator = k.sum(-1, keepdim=True).transpose(-1, -2) @ q  # (..., 1, N), between 0 and 2 N
    weight = q * denominator.reciprocal()
    return weight.transpose(-1, -2) @ (k @ v)


# ------------------------------------------------------------------------------------------------------------------
# 3.5.5, 4.5.1  The U-Net
# ------------------------------------------------------------------------------------------------------------------


class Block(nn.Sequential):
    """A chain of layers that all take (x, emb, context)."""

    def forward(self, x, emb, context=None):
        for layer in self:
            x = layer(x, emb, context)
        return x


def level_block(level, c_in, c_out, *more, emb_channels, attention, attention_levels, dropout, groups):
    """A residual block, attention on the levels that have it, and whatever comes `more`."""
    layers = [ResBlock(c_in, c_out, emb_channels, dropout, groups)]
    if level in attention_levels:
        layers.append(attention(c_out))
    return Block(*layers, *more)


class Encoder(nn.Module):
    """The half of a U-Net that goes down, its middle included. `UNet` goes up again, `NoisyClassifier` names what it sees.

    in_channels   of the image or latent
    channels      width of the first level
    multipliers   width of every level as a multiple of `channels`; the resolution halves between levels
    blocks        residual blocks a level
    attention     builds an attention layer from a channel count, or None for a network without any
    attention_levels  the levels that get it; None = all
    num_labels    rows of the label table, the zero-label included (section 4.4.3), or None if no label enters this way
    groups        of every GroupNorm in a residual block
    """

    def __init__(
        self,
        in_channels,
        channels,
        multipliers,
        blocks,
        attention,
        attention_levels=None,
        num_labels=None,
        dropout=0.0,
        groups=32,
    ):
        super().__init__()
        self.channels = channels
        emb_channels = 4 * channels
        levels = range(len(multipliers))
        attends = set(levels if attention_levels is None else attention_levels) if attention else set()
        self.block = partial(
            level_block,
            emb_channels=emb_channels,
            attention=attention,
            attention_levels=attends,
            dropout=dropout,
            groups=groups,
        )

        self.time_embed = nn.Sequential(nn.Linear(channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels))
        if num_labels is not None:
            self.label_emb = nn.Embedding(num_labels, emb_channels)

        self.input_blocks = nn.ModuleList([Block(Conv(in_channels, channels, 3, padding=1))])
        c, self.skip_channels = channels, [channels]
        for level in levels:
            for _ in range(blocks):
                self.input_blocks.append(self.block(level, c, channels * multipliers[level]))
                c = channels * multipliers[level]
                self.skip_channels.append(c)
            if level != levels[-1]:
                self.input_blocks.append(Block(Downsample(c)))
                self.skip_channels.append(c)

        self.middle_block = Block(*self.block(levels[-1], c, c), ResBlock(c, c, emb_channels, dropout, groups))

    def embed(self, x, t, y=None):
        """The embedding of time and label that every residual block gets, (B, 4 channels)."""
        emb = self.time_embed(timestep_embedding(t, self.channels).to(x.dtype))
        return emb if y is None else emb + self.label_emb(y)  # the sum of fig. 4.6; 4.3.1 says "concatenating" (E42)

    def down(self, x, emb, context=None):
        """The features in the middle and, for the way up, those of every block before it."""
        h, skips = x, []
        for module in self.input_blocks:
            h = module(h, emb, context)
            skips.append(h)
        return self.middle_block(h, emb, context), skips


class UNet(Encoder):
    """eps_theta(x_t, t, y or context).

    out_channels: of the prediction; one residual block a level more on the way up; the other settings are `Encoder`'s.

    `forward(x, t, y=None, context=None)`: x (B, C, H, W) with H and W divisible by 2^(levels - 1); t (B,) integers, counted
    from 0 as in the published checkpoints; y (B,) labels; context (B, n, d) tokens. Returns (B, out_channels, H, W).
    """

    def __init__(self, in_channels, out_channels, channels, multipliers, blocks, *more, groups=32, **settings):
        super().__init__(in_channels, channels, multipliers, blocks, *more, groups=groups, **settings)
        c, skips = channels * multipliers[-1], list(self.skip_channels)
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(multipliers))):
            for i in range(blocks + 1):
                c_out = channels * multipliers[level]
                up = [Upsample(c_out)] if level and i == blocks else []
                self.output_blocks.append(self.block(level, c + skips.pop(), c_out, *up))
                c = c_out

        self.out = nn.Sequential(nn.GroupNorm(groups, c), nn.SiLU(), zero_init(nn.Conv2d(c, out_channels, 3, padding=1)))

    def forward(self, x, t, y=None, context=None):
        emb = self.embed(x, t, y)
        h, skips = self.down(x, emb, context)
        for module in self.output_blocks:
            h = module(torch.cat([h, skips.pop()], dim=1), emb, context)
        return self.out(h)


class NoisyClassifier(Encoder):
    """4.4.2: f(y | x_t, t), the way down of the U-Net and a linear layer on all that is left, so that places count.

    num_classes: of the answer, without a zero-label; positions: H W in the middle; the other settings are `Encoder`'s.
    `forward(x, t)`: as the U-Net's, no label enters. Returns logits (B, num_classes).
    """

    def __init__(self, in_channels, num_classes, channels, multipliers, blocks, attention, positions, groups=32):
        super().__init__(in_channels, channels, multipliers, blocks, attention, groups=groups)
        c = channels * multipliers[-1]
        self.out = nn.Sequential(nn.GroupNorm(groups, c), nn.SiLU(), nn.Flatten(), nn.Linear(c * positions, num_classes))

    def forward(self, x, t):
        h, _ = self.down(x, self.embed(x, t))
        return self.out(h)  # the linear layer takes (B, C H W)


# ------------------------------------------------------------------------------------------------------------------
# 4.4.2, 4.4.5, 4.5.1  Named sizes
# ------------------------------------------------------------------------------------------------------------------


def letters_unet(channels, multipliers, blocks, num_labels):
    """4.4.5: the shallow U-Net for 32 x 32 letters; four multipliers are its "4 down and up-sampling layers".

    One block a level puts linear attention right before each down- and up-sampling. Groups of 16 channels and more: on a CPU
    in bfloat16 the normalisation of smaller ones takes longer than the convolutions.
    """
    groups = max(1, channels // 16)
    attention = partial(LinearAttention, groups=groups)
    return UNet(3, 3, channels, multipliers, blocks, attention, num_labels=num_labels, groups=groups)


def noisy_classifier(shape, num_classes, channels, multipliers, blocks):
    """4.4.2: the classifier of (C, H, W) letters or latents, with linear attention on every level."""
    groups = max(1, channels // 16)
    attention = partial(LinearAttention, groups=groups)
    positions = shape[1] * shape[2] // 4 ** (len(multipliers) - 1)
    return NoisyClassifier(shape[0], num_classes, channels, multipliers, blocks, attention, positions, groups)


def latent_unet(channels, multipliers, blocks, z_channels, context_channels, attention_levels=None, groups=32):
    """4.5.1: the U-Net of the latent model, 32 channels a head. `latent_unet(256, (1, 2, 4), 2, 4, 512)` is the thesis's,
    394,984,196 parameters (E55), with the names and shapes of the published class-conditional model."""
    attention = partial(SpatialTransformer, context_channels=context_channels, groups=groups)
    return UNet(z_channels, z_channels, channels, multipliers, blocks, attention, attention_levels, groups=groups)


# ------------------------------------------------------------------------------------------------------------------
# Figure 4.5
# ------------------------------------------------------------------------------------------------------------------


def draw_time_embedding(steps, dim, scale=8):
    """Figure 4.5: `timestep_embedding` of t = 0 .. steps - 1 as a picture, a column a time step, a row an entry.

    Orange is 1, white 0, blue -1. Fast waves are on top of each half; a step changes them most, the slow ones hardly.
    """
    pe = timestep_embedding(torch.arange(steps), dim).T[..., None]  # (dim, steps, 1)
    ends = torch.where(pe > 0, torch.tensor([214.0, 93.0, 14.0]), torch.tensor([31.0, 98.0, 180.0]))
    table = Image.fromarray((255 + pe.abs() * (ends - 255)).round().to(torch.uint8).numpy())
    width, height, left, top, text = steps * scale, dim * scale, 64, 34, ImageFont.load_default(15)
    picture = Image.new("RGB", (left + width + 20, top + height + 44), "white")
    picture.paste(table.resize((width, height), Image.Resampling.NEAREST), (left, top))
    draw = ImageDraw.Draw(picture)
    draw.text((left, 17), f"Time embedding, {dim} entries: orange 1, white 0, blue -1", "black", text, anchor="lm")
    for name, half in (("cos", 0.25), ("sin", 0.75)):
        draw.text((left - 10, top + half * height), name, "black", text, anchor="rm")
    draw.line((left, top + height // 2, left + width, top + height // 2), "black", 2)
    for t in range(0, steps, max(1, steps // 8)):
        draw.text((left + (t + 0.5) * scale, top + height + 14), str(t), "black", text, anchor="mm")
    draw.text((left + width, top + height + 32), "time step t", "black", text, anchor="rm")
    return picture


def parse():
    p = argparse.ArgumentParser(description="Figure 4.5: the table of time embeddings as a picture.")
    p.add_argument("--out", default="figures/figure_4_5.png", help="default figures/figure_4_5.png")
    return p.parse_args()


def main():
    out = Path(parse().out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draw_time_embedding(128, 64).save(out)  # Pillow removes a file that it could not finish
    except (OSError, ValueError) as error:
        print(f"error: --out {out}: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{out}: a column a time step, a row an entry of the embedding")


if __name__ == "__main__":
    main()
