"""First stages, from the auto-encoder to VQ-GAN: sections 3.1 to 3.4 and 4.4.7 of the thesis.

    x --encoder--> z_e --bottleneck--> z --decoder--> x_r

One encoder and one decoder with one of three bottlenecks between them: none (AE, 3.1), a diagonal Gaussian (VAE, 3.2), or a
code-book (VQ-VAE, 3.4). VQ-GAN (3.4.1) is the third, trained with a perceptual and an adversarial loss as well. First what
chapter 3 is about, bottlenecks and losses; then the network of fig. 4.10 and the whole model, whose attribute names are those
of the published checkpoints, so such a state dict loads with `strict=True` and no table of names.
"""

import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree
from torch import nn

# ------------------------------------------------------------------------------------------------------------------
# 3.1, 3.2, 3.4  The three bottlenecks
#
#   forward(h, noise) -> z, loss, codes     h from the encoder, z to the decoder in training, latent loss, codes used or None
#   latent(h)                               what `encode` returns
#   project(z)                              what `decode` makes of a latent before decoding it
#   widen                                   channels of the encoder's output for one channel of z
# ------------------------------------------------------------------------------------------------------------------


class NoBottleneck(nn.Module):
    """3.1, AE: z = z_e. Nothing gives the latent space a structure: a z never encoded decodes to anything."""

    widen = 1

    def forward(self, h, noise=None):
        return h, h.new_zeros(()), None

    def latent(self, h):
        return h

    def project(self, z):
        return z


class GaussianBottleneck(nn.Module):
    """3.2, VAE: q(z|x) = N(mu, diag sigma^2), where the encoder gives mu and log sigma^2; reparametrised as z = mu + sigma xi.

    kl_weight: of the loss, kl_weight * (KL(q || N(0, I)) a latent value). Eq. 3.1 sums the error of all pixel values and the KL
    of all latent values; here both are means, so the weight also stands for their ratio and for the width of p(x|z).
    """

    widen = 2

    def __init__(self, kl_weight=1e-4):
        super().__init__()
        self.kl_weight = kl_weight

    def forward(self, h, noise=None):
        """noise: xi ~ N(0, I) in the shape of z, or None for z = mu."""
        mu, logvar = self.moments(h)
        z = mu if noise is None else mu + torch.exp(logvar / 2) * noise
        return z, self.kl_weight * kl_to_standard_normal(mu, logvar).mean(), None

    def latent(self, h):
        return self.moments(h)[0]

    def project(self, z):
        return z

    @staticmethod
    def moments(h):
        mu, logvar = h.chunk(2, dim=1)
        return mu, logvar.clamp(-30, 20)


def kl_to_standard_normal(mu, logvar):
    """Eq. 3.1, second term, a latent value:  KL(N(mu, sigma^2) || N(0, 1)) = (mu^2 + sigma^2 - 1 - log sigma^2) / 2."""
    return (mu.square() + logvar.exp() - 1 - logvar) / 2


class Codebook(nn.Module):
    """3.4, VQ: every D-vector of z_e becomes the nearest of K codes (eq. 3.3, corrected, E11, E12).

        k = argmin_j ||z_e - e_j||_2,    z_q = e_k          (fig. 3.4 prints argmax, the farthest code)

    Loss (eq. 3.4, second and third term; means over the values, as in fig. 3.4):

        mean (sg[z_e] - e)^2 + beta mean (z_e - sg[e])^2    code-book term, commitment term

    `released=True` puts beta on the code-book term instead, as the code that trained the published weights does (E14): the
    value is the same, the gradients are not. After the losses, and only there (E15), the gradient is sent straight through:
    z_q = z_e + sg[z_q - z_e].

    `active = False` lets z_e pass as it is: a young encoder learns several times faster without a code-book.
    """

    widen = 1
    active = True

    def __init__(self, codes=16384, dim=4, beta=0.25, released=False):
        super().__init__()
        self.beta, self.released = beta, released
        self.embedding = nn.Embedding(codes, dim)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)

    def forward(self, h, noise=None):
        if not self.active:
            return h, h.new_zeros(()), None
        k = self.nearest(h)  # (B, H, W)
        z_q = self.lookup(k)
        codebook, commitment = F.mse_loss(z_q, h.detach()), F.mse_loss(h, z_q.detach())
        loss = self.beta * codebook + commitment if self.released else codebook + self.beta * commitment
        return h + (z_q - h).detach(), loss, k

    def latent(self, h):
        return h  # before quantisation: the diffusion model works on these (E54)

    def project(self, z):
        return self.lookup(self.nearest(z)) if self.active else z

    def nearest(self, z):
        """z (B, D, H, W) -> indices of the nearest codes (B, H, W)."""
        flat = z.detach().permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        k = nearest_code(flat, self.embedding.weight.detach())
        return k.reshape(len(z), *z.shape[2:])

    def lookup(self, k):
        return self.embedding(k).permute(0, 3, 1, 2)  # (B, D, H, W)


def nearest_code(z, codes, chunk=2**21):
    """argmin_j ||z_i - e_j||_2 (eq. 3.3), in float64 (float32 on mps), without the N x K matrix of distances.

    On a CPU a k-d tree answers while D is small; otherwise the matrix is made `chunk` entries at a time, by
    ||z - e||^2 / 2 = ||e||^2 / 2 - z . e + const.   z: (N, D); codes: (K, D). Returns (N,) int64.
    """
    if z.device.type == "cpu" and z.shape[1] <= 8:
        z, codes = (a.double().nan_to_num(0, 0, 0).numpy() for a in (z, codes))  # a diverged run is for the loop to report
        tree = cKDTree(codes, balanced_tree=False, compact_nodes=False)  # built in 2 ms for 16384 x 4
        return torch.from_numpy(tree.query(z, workers=torch.get_num_threads())[1])
    precise = torch.float32 if z.device.type == "mps" else torch.float64
    z, codes = z.to(precise), codes.to(precise)
    half = codes.square().sum(1) / 2
    rows = max(1, chunk // len(codes))
    with torch.autocast(z.device.type, enabled=False):
        return torch.cat([torch.addmm(half, part, codes.T, alpha=-1).argmin(1) for part in z.split(rows)])


def code_use(counts):
    """How many codes are used, and their perplexity exp(-sum p log p). counts: (K,), over an epoch: a batch misleads."""
    counts = counts.cpu()
    p = counts.double() / counts.sum().clamp(min=1)
    return int((counts > 0).sum()), torch.exp(torch.special.entr(p).sum()).item()


# ------------------------------------------------------------------------------------------------------------------
# 3.2.2  Perceptual loss
# ------------------------------------------------------------------------------------------------------------------


class VGG16(nn.Module):
    """The convolutions of VGG16, cut where the perceptual loss looks: after relu1_2, 2_2, 3_3, 4_3 and 5_3.

    Layers keep their number in torchvision's `features`, so `slice3.10` is its `features.10`.
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
            if s > 1:
                x = F.max_pool2d(x, 2)
            for conv in getattr(self, f"slice{s}").values():
                x = F.relu(conv(x))
            features.append(x)
        return features


class LinearHead(nn.Module):
    """A learned weight for every channel of one layer's features."""

    def __init__(self, channels):
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))  # published name: model.1

    def forward(self, x):
        return self.model(x)


class PerceptualLoss(nn.Module):
    """3.2.2, in the form of VQ-GAN: LPIPS, a learned, weighted L2 between channel-normalised VGG16 features (E09).

        d(x, y) = sum_l mean_{h,w} sum_c w_lc (phi_lc(x) / |phi_l(x)| - phi_lc(y) / |phi_l(y)|)^2

    x, y: (B, 3, H, W) in [-1, 1]. Returns (B,). Its weights are fixed; `ldm.load_perceptual` reads them from files.
    """

    def __init__(self):
        super().__init__()
        self.scaling_layer = nn.Module()  # from [-1, 1] to what VGG16 was trained on
        self.scaling_layer.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.scaling_layer.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])
        self.net = VGG16()
        for i, channels in enumerate((64, 128, 256, 512, 512)):
            setattr(self, f"lin{i}", LinearHead(channels))
        self.requires_grad_(False)

    def forward(self, x, y):
        total = 0.0
        for i, (f_x, f_y) in enumerate(zip(self.features(x), self.features(y))):
            difference = (unit_channels(f_x) - unit_channels(f_y)).square()  # (B, C, h, w)
            total = total + getattr(self, f"lin{i}")(difference).mean((1, 2, 3))
        return total

    def features(self, x):
        return self.net((x - self.scaling_layer.shift) / self.scaling_layer.scale)


def unit_channels(f):
    return f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10)


# ------------------------------------------------------------------------------------------------------------------
# 3.3, 3.4.1  The adversary
# ------------------------------------------------------------------------------------------------------------------


class PatchDiscriminator(nn.Module):
    """3.4.1: one logit for every patch of the image, real > 0 > fake. (B, 3, H, W) -> (B, 1, h, w).

    layers: halvings of the resolution; 2, as in the published f = 8 model, gives patches of 34 x 34 pixels, 3 of 70 x 70.
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

    def forward(self, x):
        return self.main(x).to(x.dtype)  # full precision under autocast too


def discriminator_loss(real, fake, kind="hinge"):
    """What D minimises, from its logits for real and for reconstructed images (3.4.1; sign corrected, E17).

        hinge:    mean(max(0, 1 - real) + max(0, 1 + fake)) / 2
        vanilla:  -mean(log D(x) + log(1 - D(x_r))) / 2,   D = sigmoid(logit)

    The thesis prints log D(x) + log(1 - D(x_r)) as the loss: that is what D maximises (eq. 3.2).
    """
    if kind == "hinge":
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def generator_loss(fake, kind="hinge"):
    """What the generator minimises: hinge, -mean(fake); vanilla, -mean(log D(x_r)), the form that does not saturate (E10)."""
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def adaptive_weight(rec_loss, g_loss, last_layer, average=lambda gradient: gradient, delta=1e-4):
    """lambda of eq. 3.5, for which the thesis gives no formula (E18).

        lambda = |grad_L rec_loss| / (|grad_L g_loss| + delta),   L the weight of the decoder's last layer; in [0, 10^4]

    The gradient of rec_loss + lambda g_loss at L is g_r + lambda g_a. Neither term is to drown the other: |lambda g_a| = |g_r|
    gives this quotient; delta keeps it finite when the adversary is silent. Both losses reach the rest of the decoder through L
    only, so one layer is measured and not all.

    average: of the gradients of several processes that share a batch. Returns a number without gradient. Only the generator's
    term is weighted; D has a loss and an optimiser of its own.
    """
    grad_rec, grad_g = (average(torch.autograd.grad(loss, last_layer, retain_graph=True)[0]) for loss in (rec_loss, g_loss))
    return (grad_rec.norm() / (grad_g.norm() + delta)).clamp(0, 1e4).detach()


# ------------------------------------------------------------------------------------------------------------------
# 4.4.7  Layers (fig. 4.10)
# ------------------------------------------------------------------------------------------------------------------


def norm(channels, groups):
    return nn.GroupNorm(groups, channels, eps=1e-6)


def initialise(network):
    """Start weights: signals keep their size through a convolution, and every residual branch begins at zero."""
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
    """The "non-local block" of fig. 4.10: softmax attention with one head over the H W positions."""

    def __init__(self, channels, groups):
        super().__init__()
        self.norm = norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))  # (B, 1, H W, C)
        h = F.scaled_dot_product_attention(q, k, v)  # scale C^(-1/2)
        return x + self.proj_out(h[:, 0].transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (B, C, H/2, W/2); padded at the right and the bottom only


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))  # (B, C, 2H, 2W)


class Level(nn.Module):
    """The blocks at one resolution, each with attention behind it where `attends`."""

    def __init__(self, in_channels, out_channels, blocks, attends, groups):
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResnetBlock(c, out_channels, groups) for c in widths[:-1])
        self.attn = nn.ModuleList(AttnBlock(out_channels, groups) if attends else nn.Identity() for _ in range(blocks))

    def forward(self, h):
        for block, attn in zip(self.block, self.attn):
            h = attn(block(h))
        return h


class Middle(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, h):
        return self.block_2(self.attn_1(self.block_1(h)))


# ------------------------------------------------------------------------------------------------------------------
# 4.4.7  Encoder and decoder (fig. 4.10)
# ------------------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Image -> latent: (B, 3, H, W) -> (B, z_channels, H/f, W/f),  f = 2^(levels - 1).

    channels: width of the first level; multipliers: width of every level as a multiple of it; blocks: residual blocks a level;
    attention_levels: levels with attention behind every block (the lowest resolution has one more in the middle anyway).
    """

    def __init__(self, channels, multipliers, blocks, attention_levels, z_channels, groups):
        super().__init__()
        widths = [channels * m for m in (1, *multipliers)]
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i in range(len(multipliers)):
            level = Level(widths[i], widths[i + 1], blocks, i in attention_levels, groups)
            if i < len(multipliers) - 1:
                level.downsample = Downsample(widths[i + 1])
            self.down.append(level)
        self.mid = Middle(widths[-1], groups)
        self.norm_out = norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)  # (B, channels, H, W)
        for level in self.down[:-1]:
            h = level.downsample(level(h))
        h = self.mid(self.down[-1](h))  # (B, C, H/f, W/f)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latent -> image, the mirror of `Encoder` with one block a level more. No clamp at the end: values may leave [-1, 1]."""

    def __init__(self, channels, multipliers, blocks, attention_levels, z_channels, groups):
        super().__init__()
        widths = [channels * m for m in (*multipliers, multipliers[-1])]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        self.up = nn.ModuleList()  # index 0 is the full resolution, as in the encoder
        for i in range(len(multipliers)):
            level = Level(widths[i + 1], widths[i], blocks + 1, i in attention_levels, groups)
            if i > 0:
                level.upsample = Upsample(widths[i])
            self.up.append(level)
        self.norm_out = norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z):
        h = self.mid(self.conv_in(z))  # (B, C, H/f, W/f)
        for level in reversed(self.up[1:]):
            h = level.upsample(level(h))
        h = self.up[0](h)  # (B, channels, H, W)
        return self.conv_out(F.silu(self.norm_out(h)))


# ------------------------------------------------------------------------------------------------------------------
# 4.4.7  The model
# ------------------------------------------------------------------------------------------------------------------


class VQGAN(nn.Module):
    """Encoder, bottleneck and decoder. The defaults are the published f = 8 model: 256 x 256 x 3 -> 32 x 32 x 4, 16384 codes.

    bottleneck: `NoBottleneck()`, `GaussianBottleneck()` or a `Codebook` of dimension `z_channels`, which is the default.
    groups: of every GroupNorm.
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
        self.quantize = bottleneck or Codebook(16384, z_channels)  # the published name, whatever the bottleneck
        wide = z_channels * self.quantize.widen
        self.z_channels, self.factor = z_channels, 2 ** (len(multipliers) - 1)
        self.encoder = Encoder(channels, multipliers, blocks, attention_levels, wide, groups)
        self.decoder = Decoder(channels, multipliers, blocks, attention_levels, z_channels, groups)
        self.quant_conv = nn.Conv2d(wide, wide, 1)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)
        initialise(self)

    def encode(self, x):
        """x (B, 3, H, W) in [-1, 1], H and W divisible by f -> the latent z (B, z_channels, H/f, W/f).

        With a code-book this is z_e, before quantisation; of a Gaussian it is the mean.
        """
        return self.quantize.latent(self._encode(x))

    def decode(self, z):
        """A latent (B, z_channels, h, w) -> image (B, 3, f h, f w). With a code-book, z is quantised first (E54)."""
        return self.decoder(self.post_quant_conv(self.quantize.project(z)))

    def forward(self, x, noise=None):
        """Returns x_r (B, 3, H, W), the latent loss of the bottleneck, and the codes used, (B, H/f, W/f) or None."""
        z, loss, codes = self.quantize(self._encode(x), noise)
        return self.decoder(self.post_quant_conv(z)).to(x.dtype), loss, codes

    def _encode(self, x):
        return self.quant_conv(self.encoder(x)).to(x.dtype)  # distances and losses in full precision under autocast too
