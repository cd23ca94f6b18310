"""Sections 3.1 to 3.4 and 4.4.7: first stages, from the auto-encoder to VQ-GAN.

    x --encoder--> z_e --bottleneck--> z --decoder--> x_r

Three bottlenecks share one encoder and decoder: none (AE, 3.1), a diagonal Gaussian (VAE, 3.2)
and a code-book (VQ-VAE, 3.4). VQ-GAN (3.4.1) is the third with a perceptual and an adversarial
loss. Layers have the names of the published checkpoints, so their state dicts load unchanged.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree
from torch import nn

# --------------------------------------------------------------------------------------------------
# 3.1, 3.2, 3.4  The three bottlenecks
# --------------------------------------------------------------------------------------------------


class NoBottleneck(nn.Module):
    """3.1, AE: z = z_e. The latent space has no structure: most z decode to nothing meaningful.

    This is also the base of the other bottlenecks. widen: channels of z_e per channel of z;
    active: if False, `VQGAN` leaves the bottleneck out.
    """

    widen, active = 1, True

    def forward(self, z_e, noise=None):
        """Returns z for the decoder, the latent loss, and the indices of the codes or None."""
        return z_e, z_e.new_zeros(()), None

    def latent(self, z_e):
        """The latent for a diffusion model, see `VQGAN.encode`."""
        return z_e

    def project(self, z):
        """From any latent to one that the decoder knows."""
        return z


class GaussianBottleneck(NoBottleneck):
    """3.2, VAE: q(z|x) = N(mu, diag sigma^2), reparametrised as z = mu + sigma xi.

    The encoder gives mu and log sigma^2. The loss is kl_weight * mean KL(q || N(0, I)). Eq. 3.1
    sums the error over all pixel values and the KL over all latent values; here both are means,
    so the weight also contains the ratio of their numbers and the width of p(x|z).
    """

    widen = 2

    def __init__(self, kl_weight=1e-4):
        super().__init__()
        self.kl_weight = kl_weight

    def forward(self, z_e, noise=None):
        """noise: xi ~ N(0, I) in the shape of z, or None for z = mu."""
        mu, logvar = self.moments(z_e)
        z = mu if noise is None else mu + torch.exp(logvar / 2) * noise
        return z, self.kl_weight * kl_to_standard_normal(mu, logvar).mean(), None

    def latent(self, z_e):
        return self.moments(z_e)[0]

    @staticmethod
    def moments(z_e):
        mu, logvar = z_e.chunk(2, dim=1)
        return mu, logvar.clamp(-30, 20)


def kl_to_standard_normal(mu, logvar):
    """Eq. 3.1, second term: KL(N(mu, sigma^2) || N(0, 1)) per latent value."""
    return (mu.square() + logvar.exp() - 1 - logvar) / 2


class Codebook(NoBottleneck):
    """3.4, VQ: every D-vector of z_e becomes the nearest of K codes (eq. 3.3, corrected, E11, E12).

        k = argmin_j ||z_e - e_j||_2,    z_q = e_k          (fig. 3.4 prints argmax, the farthest)

    Loss (eq. 3.4, second and third term; means over the values, as in fig. 3.4):

        mean (sg[z_e] - e)^2 + beta mean (z_e - sg[e])^2    code-book term, commitment term

    With `released` the factor beta stands at the code-book term instead, as in the code that
    trained the published weights (E14): the same value, other gradients. The gradient passes
    straight through: z_q = z_e + sg[e - z_e]. This comes after the losses (E15).

    train.py sets `active` to False at first: a young encoder learns faster without a code-book.
    """

    def __init__(self, codes=16384, dim=4, beta=0.25, released=False):
        super().__init__()
        self.w_codebook, self.w_commitment = (beta, 1) if released else (1, beta)
        self.embedding = nn.Embedding(codes, dim)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)

    def forward(self, z_e, noise=None):
        k = self.nearest(z_e)  # (B, H, W)
        e = self.lookup(k)  # (B, D, H, W)
        codebook, commitment = F.mse_loss(e, z_e.detach()), F.mse_loss(z_e, e.detach())
        z_q = z_e + (e - z_e).detach()
        return z_q, self.w_codebook * codebook + self.w_commitment * commitment, k

    def project(self, z):  # but `latent` does not quantise (E54)
        return self.lookup(self.nearest(z))

    def nearest(self, z):
        """z (B, D, H, W) -> indices of the nearest codes, (B, H, W)."""
        flat = z.detach().permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        k = nearest_code(flat, self.embedding.weight.detach())
        return k.reshape(len(z), *z.shape[2:])

    def lookup(self, k):
        return self.embedding(k).permute(0, 3, 1, 2)  # (B, D, H, W)


def nearest_code(z, codes, chunk=2**21):
    """argmin_j ||z_i - e_j||_2 (eq. 3.3), in float64 (float32 on mps). z: (N, D); codes: (K, D).

    On a CPU a k-d tree finds it if D is small. Otherwise the N x K matrix is computed in parts of
    `chunk` entries: ||z - e||^2 / 2 = ||e||^2 / 2 - z . e + const. Returns (N,) int64.
    """
    if z.device.type == "cpu" and z.shape[1] <= 8:
        # NaN becomes 0, because the training loop reports a diverged network better than the tree
        z, codes = (a.double().nan_to_num(0, 0, 0).numpy() for a in (z, codes))
        tree = cKDTree(codes, balanced_tree=False, compact_nodes=False)  # 2 ms for 16384 x 4
        return torch.from_numpy(tree.query(z, workers=torch.get_num_threads())[1])
    precise = torch.float32 if z.device.type == "mps" else torch.float64
    z, codes = z.to(precise), codes.to(precise)
    half = codes.square().sum(1) / 2
    rows = max(1, chunk // len(codes))
    with torch.autocast(z.device.type, enabled=False):
        parts = [torch.addmm(half, part, codes.T, alpha=-1).argmin(1) for part in z.split(rows)]
    return torch.cat(parts)


def code_use(counts):
    """The number of used codes and their perplexity exp(-sum p log p). counts: (K,), per epoch."""
    counts = counts.cpu()
    p = counts.double() / counts.sum().clamp(min=1)
    return int((counts > 0).sum()), torch.exp(torch.special.entr(p).sum()).item()


# --------------------------------------------------------------------------------------------------
# 3.2.2  Perceptual loss
# --------------------------------------------------------------------------------------------------


class VGG16(nn.Module):
    """The convolutions of VGG16 in five slices, which end at relu1_2, 2_2, 3_3, 4_3 and 5_3.

    Layers keep their number in torchvision's `features`: `slice3.10` is its `features.10`.
    """

    SLICES = (
        ((0, 3, 64), (2, 64, 64)),
        ((5, 64, 128), (7, 128, 128)),
        ((10, 128, 256), (12, 256, 256), (14, 256, 256)),
        ((17, 256, 512), (19, 512, 512), (21, 512, 512)),
        ((24, 512, 512), (26, 512, 512), (28, 512, 512)),
    )

    def __init__(self):
        super().__init__()
        for s, convs in enumerate(self.SLICES, start=1):
            layers = {str(i): nn.Conv2d(c_in, c_out, 3, padding=1) for i, c_in, c_out in convs}
            setattr(self, f"slice{s}", nn.ModuleDict(layers))

    def forward(self, x):
        features = []
        for s in range(1, 6):
            x = F.max_pool2d(x, 2) if s > 1 else x
            for conv in getattr(self, f"slice{s}").values():
                x = F.relu(conv(x))
            features.append(x)
        return features


def outside_autocast(forward):
    """A forward pass in the precision of its images: bf16 would drown small differences."""

    def call(self, *images):
        with torch.autocast(images[0].device.type, enabled=False):
            return forward(self, *images)

    return call


class PerceptualLoss(nn.Module):
    """3.2.2, as in VQ-GAN: LPIPS, a weighted L2 between normalised VGG16 features (E09).

        d(x, y) = sum_l mean_{h,w} sum_c w_lc (phi_lc(x) / |phi_l(x)| - phi_lc(y) / |phi_l(y)|)^2

    x, y: (B, 3, H, W) in [-1, 1]. Returns (B,). The weights w_lc were learned by others and are
    fixed; `ldm.load_perceptual` reads all weights from files.
    """

    def __init__(self):
        super().__init__()
        shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]])
        self.scaling_layer = nn.Module()  # from [-1, 1] to the values that VGG16 was trained on
        self.scaling_layer.register_buffer("shift", shift[None, :, None, None])
        self.scaling_layer.register_buffer("scale", scale[None, :, None, None])
        self.net = VGG16()
        for i, channels in enumerate(
            (64, 128, 256, 512, 512)
        ):  # the published name is lin0.model.1
            head = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))
            setattr(self, f"lin{i}", nn.ModuleDict({"model": head}))
        self.requires_grad_(False)

    @outside_autocast
    def forward(self, x, y):
        total = 0.0
        for i, (f_x, f_y) in enumerate(zip(self.features(x), self.features(y))):
            head = getattr(self, f"lin{i}")["model"]  # w_l
            total = total + head((f_x - f_y).square()).mean((1, 2, 3))
        return total

    def features(self, x):
        """phi_l / |phi_l| of the five layers, (B, C, h, w)."""
        x = (x - self.scaling_layer.shift) / self.scaling_layer.scale
        return (f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in self.net(x))


# --------------------------------------------------------------------------------------------------
# 3.3, 3.4.1  The adversary
# --------------------------------------------------------------------------------------------------


class PatchDiscriminator(nn.Module):
    """3.4.1: one logit per patch of the image, real > 0 > fake. (B, 3, H, W) -> (B, 1, h, w).

    layers: halvings of the resolution. 2, as in the published f = 8 model, gives patches of
    34 x 34 pixels; 3 gives 70 x 70.
    """

    def __init__(self, channels=64, layers=2):
        super().__init__()
        main = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            main += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[i]),
                nn.LeakyReLU(0.2),
            ]
        main.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.main = nn.Sequential(*main)
        for layer in self.main:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    @outside_autocast
    def forward(self, x):
        return self.main(x)


def discriminator_loss(real, fake, kind="hinge"):
    """The loss of D, from its logits for real and for reconstructed images (3.4.1, corrected, E17).

        hinge:    mean(max(0, 1 - real) + max(0, 1 + fake)) / 2
        vanilla:  -mean(log D(x) + log(1 - D(x_r))) / 2,   D = sigmoid(logit)

    The thesis prints log D(x) + log(1 - D(x_r)) as the loss; D maximises this (eq. 3.2).
    """
    if kind == "hinge":
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def generator_loss(fake, kind="hinge"):
    """The loss of G: -mean(fake); vanilla: -mean log D(x_r), which does not saturate (E10)."""
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def adaptive_weight(rec_loss, g_loss, last_layer, average=lambda gradient: gradient, delta=1e-4):
    """lambda of eq. 3.5, for which the thesis gives no formula (E18). A number without gradient.

        lambda = |grad_L rec_loss| / (|grad_L g_loss| + delta),   in [0, 10^4]

    L is the weight of the decoder's last layer. The gradient of rec_loss + lambda g_loss at L is
    g_r + lambda g_a; with this quotient both terms are equally large. Both losses reach the rest of
    the decoder only through L, so one layer is enough. delta keeps lambda finite if g_a is zero.

    average: takes the mean of a gradient over the processes. Only the generator's term has the
    weight; D has its own loss and optimiser.
    """
    (g_r,) = torch.autograd.grad(rec_loss, last_layer, retain_graph=True)
    (g_a,) = torch.autograd.grad(g_loss, last_layer, retain_graph=True)
    weight = average(g_r).norm() / (average(g_a).norm() + delta)
    return weight.clamp(0, 1e4).detach()


# --------------------------------------------------------------------------------------------------
# 4.4.7  The network (fig. 4.10)
# --------------------------------------------------------------------------------------------------


def norm(channels, groups):
    return nn.GroupNorm(groups, channels, eps=1e-6)


def initialise(network):
    """First weights: a convolution keeps the size of its input; residual branches start at zero."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    for layer in network.modules():
        if isinstance(layer, ResnetBlock):
            nn.init.zeros_(layer.conv2.weight)
        elif isinstance(layer, AttnBlock):
            nn.init.zeros_(layer.proj_out.weight)


class ResnetBlock(nn.Module):
    """out = shortcut(x) + conv(silu(norm(conv(silu(norm x)))));  silu is the thesis's "Swish"."""

    def __init__(self, in_channels, out_channels, groups):
        super().__init__()
        self.norm1 = norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """The "non-local block" of fig. 4.10: softmax attention over H W positions, one head."""

    def __init__(self, channels, groups):
        super().__init__()
        self.norm = norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2)[:, None] for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)  # (B, 1, H W, C), scale C^(-1/2)
        return x + self.proj_out(h[:, 0].transpose(1, 2).reshape(x.shape))


def downsample(channels):
    """(B, C, H, W) -> (B, C, H/2, W/2); padded only at the right and at the bottom."""
    conv = nn.Conv2d(channels, channels, 3, stride=2)
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=conv))


def upsample(channels):
    """(B, C, H, W) -> (B, C, 2H, 2W)."""
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(OrderedDict(nearest=nn.Upsample(scale_factor=2), conv=conv))


def middle(channels, groups):
    first, second = (ResnetBlock(channels, channels, groups) for _ in range(2))
    attention = AttnBlock(channels, groups)
    return nn.Sequential(OrderedDict(block_1=first, attn_1=attention, block_2=second))


class Level(nn.Module):
    """The blocks at one resolution; with `attends` attention follows each of them."""

    def __init__(self, in_channels, out_channels, blocks, attends, groups):
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResnetBlock(c, out_channels, groups) for c in widths[:-1])
        attention = (lambda: AttnBlock(out_channels, groups)) if attends else nn.Identity
        self.attn = nn.ModuleList(attention() for _ in range(blocks))

    def forward(self, h):
        for block, attn in zip(self.block, self.attn):
            h = attn(block(h))
        return h


class Encoder(nn.Module):
    """Image -> latent: (B, 3, H, W) -> (B, z_channels, H/f, W/f),  f = 2^(levels - 1).

    channels: width of the first level; multipliers: width per level as a multiple of it; blocks:
    residual blocks per level; attention_levels: levels with attention after each block, 0 is the
    full resolution (the middle of the network always has attention).
    """

    def __init__(self, channels, multipliers, blocks, attention_levels, z_channels, groups):
        super().__init__()
        widths = [channels * m for m in (1, *multipliers)]
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i in range(len(multipliers)):
            level = Level(widths[i], widths[i + 1], blocks, i in attention_levels, groups)
            if i < len(multipliers) - 1:
                level.downsample = downsample(widths[i + 1])
            self.down.append(level)
        self.mid = middle(widths[-1], groups)
        self.norm_out = norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)  # (B, channels, H, W)
        for level in self.down[:-1]:
            h = level.downsample(level(h))
        h = self.mid(self.down[-1](h))  # (B, C, H/f, W/f)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latent -> image (not clamped): `Encoder` mirrored, with one more block per level."""

    def __init__(self, channels, multipliers, blocks, attention_levels, z_channels, groups):
        super().__init__()
        widths = [channels * m for m in (*multipliers, multipliers[-1])]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1], groups)
        self.up = nn.ModuleList()  # index 0 is the full resolution, as in the encoder
        for i in range(len(multipliers)):
            level = Level(widths[i + 1], widths[i], blocks + 1, i in attention_levels, groups)
            if i > 0:
                level.upsample = upsample(widths[i])
            self.up.append(level)
        self.norm_out = norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z):
        h = self.mid(self.conv_in(z))  # (B, C, H/f, W/f)
        for level in reversed(self.up[1:]):
            h = level.upsample(level(h))
        h = self.up[0](h)  # (B, channels, H, W)
        return self.conv_out(F.silu(self.norm_out(h)))


class VQGAN(nn.Module):
    """The first stage; by default the published f = 8 model: 256 x 256 x 3 -> 32 x 32 x 4 (E55).

    bottleneck: `NoBottleneck()`, `GaussianBottleneck()` or a `Codebook` of dimension z_channels
    (default: of 16384 codes); groups: of every GroupNorm; the rest as in `Encoder`.
    """

    def __init__(
        self,
        channels=128,
        multipliers=(1, 2, 2, 4),
        blocks=2,
        attention_levels=(3,),
        z_channels=4,
        bottleneck=None,
        groups=32,
    ):
        super().__init__()
        self.quantize = bottleneck or Codebook(16384, z_channels)  # the published name
        wide = z_channels * self.quantize.widen
        self.z_channels, self.factor = z_channels, 2 ** (len(multipliers) - 1)
        self.encoder = Encoder(channels, multipliers, blocks, attention_levels, wide, groups)
        self.decoder = Decoder(channels, multipliers, blocks, attention_levels, z_channels, groups)
        self.quant_conv = nn.Conv2d(wide, wide, 1)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)
        initialise(self)

    @property
    def bottleneck(self):
        return self.quantize if self.quantize.active else NoBottleneck()

    def encode(self, x):
        """Image (B, 3, H, W) in [-1, 1] -> latent (B, z_channels, H/f, W/f); f divides H and W.

        With a code-book this is z_e, before quantisation (E54); with a Gaussian it is the mean.
        """
        return self.bottleneck.latent(self._encode(x))

    def decode(self, z):
        """Latent (B, z_channels, h, w) -> image (B, 3, f h, f w). A code-book quantises z (E54)."""
        return self.decoder(self.post_quant_conv(self.bottleneck.project(z)))

    def forward(self, x, noise=None, change=lambda z: z):
        """Returns x_r (B, 3, H, W), the latent loss, and the codes, (B, H/f, W/f) or None.

        change: what happens to z before it is decoded, see `train.equivariant_change`.
        """
        z, loss, codes = self.bottleneck(self._encode(x), noise)
        return self.decoder(self.post_quant_conv(change(z))).to(x.dtype), loss, codes

    def _encode(self, x):
        z_e = self.quant_conv(self.encoder(x))
        return z_e.to(x.dtype)  # distances and losses in full precision under autocast, too
