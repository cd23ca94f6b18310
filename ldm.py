"""Sections 3.5.3, 3.6, 4.4.3 to 4.4.5, 4.4.7 and 4.5: diffusion models as objects, and their files.

A model is a network with its schedule and the names of its labels. `PixelDiffusion` draws letters;
`LatentDiffusion` draws in the latent space of a first stage. Training needs its `loss`, samplers
its `eps`, `start` and `decode`. Below: models from settings, our files, published files.
"""

import errno
import hashlib
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import (
    ASSETS,
    COLOURS,
    MOST_COLOURS,
    UNKNOWN,
    UserError,
    cache_folder,
    lab_to_rgb,
    rgb_to_lab,
    view,
    whole_file,
    write_npy,
)
from ddpm import SCHEDULES, Diffusion
from unet import TransformerBlock, latent_unet, letters_unet, noisy_classifier
from vqgan import VQGAN, Codebook, GaussianBottleneck, NoBottleneck, PerceptualLoss

# --------------------------------------------------------------------------------------------------
# 3.6, 4.4.3  A network, a schedule and the names of labels as one model
# --------------------------------------------------------------------------------------------------


def network_time(t, x):
    """The time step as networks count it, from 0, per row of x: (B,). t: 1..T, an int or (B,)."""
    return torch.full((len(x),), t - 1, device=x.device) if isinstance(t, int) else t - 1


class LabelledDiffusion(nn.Module):
    """A network eps_theta(x_t, t, label) with its schedule: what both models have in common.

    unet: the network; predict: its output, "eps" as in the thesis, "v" or "flow"; beta: (T,);
    classes: the label names in order (label len(classes) is the zero-label of 4.4.3);
    shape: (C, H, W) of x_t.
    """

    sampler = "plms", 0.0  # default of sample.py: its name and eta
    guide_above = 0.0  # default of sample.py: guide only at noise levels above, see `with_cfg`
    clip = False  # default of sample.py: clamp the predicted x_0, see `with_clipping`
    bf16 = False  # samplers call the network inside autocast, see `compute_in_bf16`

    def __init__(self, unet, beta, classes, shape, predict="eps"):
        super().__init__()
        self.unet, self.diffusion, self.predict = unet, Diffusion(beta), predict
        self.classes, self.shape, self.zero_label = list(classes), tuple(shape), len(classes)

    @property
    def device(self):
        """The device of x_t."""
        return next(self.parameters()).device

    def compute_in_bf16(self):
        """Sample in bfloat16 from now on. Autocast would cast the weights at every evaluation; here
        they are cast once, with the same results. Sampler and guidance stay float32."""
        for layer in self.unet.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.bfloat16()
        self.bf16 = True
        return self

    def condition(self, y):
        """4.4.4: the network's argument for the label, n tokens (B, n, context_channels).

        y: labels (B,), or the tokens themselves: any embedding, such as that of a sound, can be the
        context (1.2, 6.2).
        """
        return {"context": y if y.is_floating_point() else self.context(y[:, None])}

    def cross_attentions(self):
        """The layers of the network that read the context (4.4.4)."""
        return [part.attn2 for part in self.unet.modules() if isinstance(part, TransformerBlock)]

    def zero_like(self, y):
        """The zero-label in the form of y, which are labels or tokens."""
        if y.is_floating_point():
            return self.context.weight[self.zero_label].to(y).expand(y.shape)
        return torch.full_like(y, self.zero_label)

    def start(self, y, noise):
        """x_T, where a sampler starts: N(0, I)."""
        return noise

    def output(self, x, t, y):
        """The network's prediction: eps, v or the flow."""
        x = x.contiguous(memory_format=torch.channels_last)
        out = self.unet(x, network_time(t, x), **self.condition(y))
        return out.to(x.dtype)  # samplers would amplify the rounding of bf16

    def eps(self, x, t, y):
        """eps_theta(x_t, t, y). t: 1..T, an int or (B,)."""
        out = self.output(x, t, y)
        if self.predict == "eps":
            return out
        convert = {"v": self.diffusion.eps_from_v, "flow": self.diffusion.eps_from_flow}
        return convert[self.predict](x, t, out)

    def loss(self, x_0, y, t, noise):
        """The squared error of the prediction, one value per image; for eps L_simple (3.5.4)."""
        return self.diffusion.loss(lambda x, t: self.output(x, t, y), x_0, t, noise, self.predict)


class Pyramid(nn.Module):
    """U-Nets for pictures of several sizes: the noisier x_t, the smaller (not in the thesis).

    The mean over k x k positions of x_t is a smaller picture with a k^2-th of the noise. In the
    form of 3.5.2, where the shares of signal and noise add up to 1, it is

        y = mean_k(x_t) / sqrt(q),   a = alpha_bar / q,   q = alpha_bar + (1 - alpha_bar) / k^2

    Where noise drowns the details that this mean loses, nothing is known of them, and their
    expected value is 0. What is left of x_0 is the x_0 of y, each position repeated k x k times:

        x_0 = repeat_k(sqrt(a) y - sqrt(1 - a) v(y, t))

    So U-Nets of small pictures draw the composition, in a k^2-th of the time; that of the large
    ones draws details only, which `damp` keeps for the end. After subspace diffusion (Jing and
    others, 2022).
    unets: those of k = 1, 2, 4, ...; their output is v. So is that of `forward`, which is called
    like a U-Net: x (B, C, H, W), t (B,) from 0, context (B, n, d).
    """

    def __init__(self, unets, diffusion):
        super().__init__()
        self.unets = nn.ModuleList(unets)
        alpha_bar = diffusion.alpha_bar[1:].float()  # t starts at 0 here
        self.register_buffer("alpha_bar", alpha_bar, persistent=False)
        self.register_buffer("level", torch.zeros(len(alpha_bar), dtype=torch.long))
        self.only = None  # in training, the U-Net of this update: a GPU need not say which t it has

    def divide(self, z, drowned=0.1):
        """Decide which U-Net sees which t. A detail is drowned if its standard deviation is below
        `drowned` times that of its noise. Each t gets the U-Net of the largest k whose mean loses
        only drowned details. z: x_0 of some images. (With 0.3, the many details along a long edge
        would still be visible together.)"""
        snr = self.alpha_bar / (1 - self.alpha_bar)
        self.level.zero_()
        for level in range(len(self.unets) - 1):
            small = F.avg_pool2d(z, 2)  # one number of four is the mean, three are details
            details = (z - F.interpolate(small, scale_factor=2)).square().mean() * 4 / 3
            self.level += (4**level * details * snr < drowned**2) & (self.level == level)
            z = small

    def forward(self, x, t, context):
        if self.training and self.only is not None:
            return self.v(self.only, x, t, context)
        out, levels = torch.empty_like(x), self.level[t]
        for level in levels.unique().tolist():
            rows = levels == level
            out[rows] = self.v(level, x[rows], t[rows], context[rows])
        return out

    def v(self, level, x, t, context):
        """The prediction of one U-Net, as the v of x."""
        k, alpha_bar = 2**level, self.alpha_bar[t].view(-1, 1, 1, 1)
        if k == 1:
            return self.unets[0](x, t, context=context).to(x.dtype)
        q = alpha_bar + (1 - alpha_bar) / k**2
        y, a = F.avg_pool2d(x, k) / q.sqrt(), alpha_bar / q
        v = self.unets[level](y, t, context=context).to(x.dtype)
        x_0 = F.interpolate(a.sqrt() * y - (1 - a).sqrt() * v, scale_factor=k)
        return (alpha_bar.sqrt() * x - x_0) / (1 - alpha_bar).sqrt()


def damp(z, factor, octaves):
    """Pictures with smaller details, the finer the smaller (not in the thesis): (B, C, H, W).

        D_n(z) = repeat(D_{n-1}(m)) + factor^n (z - repeat(m)),   D_0(z) = z,   m = mean_{2x2}(z)

    The noise of a diffusion on D(z) drowns details while the means are still seen. So a picture is
    drawn from coarse to fine: the coarse part is finished before the fine one begins. In blurring
    diffusion, too, each part of a picture has its own schedule (Hoogeboom and Salimans, 2023).
    1 / factor is the inverse. octaves: n, the halvings of H and W.
    """
    if not octaves:
        return z
    m = F.avg_pool2d(z, 2)
    details = z - F.interpolate(m, scale_factor=2)
    return F.interpolate(damp(m, factor, octaves - 1), scale_factor=2) + factor**octaves * details


DETAILS = 1 / 2  # the factor of latent models with a pyramid


def scaled(z, latent_scale, octaves):
    """From latents of a first stage to x_0. octaves: 0 without a pyramid."""
    return damp(latent_scale * z, DETAILS, octaves)


class PixelDiffusion(LabelledDiffusion):
    """The conditional DDPM in pixel space (4.4.5). context: as in `LatentDiffusion`, or None."""

    def __init__(self, unet, context, beta, classes, shape, predict):
        super().__init__(unet, beta, classes, shape, predict)
        self.context, self.clip = context, predict == "eps"

    def condition(self, y):
        """Without `context`, the label `y` is added to the time embedding (fig. 4.6)."""
        return super().condition(y) if self.context else {"y": y}

    def decode(self, x):
        """From x_0 to images in [-1, 1], (B, 3, H, W): here they are the same."""
        return x.clamp(-1, 1)


class LatentDiffusion(LabelledDiffusion):
    """3.6, 4.5: the diffusion runs on z = latent_scale * E(x) of a frozen first stage. For a
    `Pyramid`, details of z are smaller, see `damp`.

    The label is a context (4.4.4). context: the embeddings of the labels, 9 x 512 in the thesis,
    the zero-label last. A label is one token; cross-attention then adds the same vector at every
    position (E52).
    latent_scale: 1 in the thesis and in published models (E54), else 1/std of the latents.
    mean: the mean latent of each label's training images, (K + 1, C), see `start`.
    """

    def __init__(self, unet, first_stage, context, beta, classes, shape, predict, latent_scale):
        super().__init__(unet, beta, classes, shape, predict)
        self.register_buffer("mean", torch.zeros(len(classes) + 1, shape[0]))
        self.first_stage = first_stage.requires_grad_(False).eval()
        self.context, self.latent_scale = context, latent_scale
        self.octaves = len(unet.unets) - 1 if isinstance(unet, Pyramid) else 0
        if self.octaves:
            self.sampler = "dpm", 1.0  # errors of one U-Net are covered by noise for the next
            self.guide_above = 4.0  # below, a large scale would invent spots of the opposite colour

    def train(self, mode=True):
        super().train(mode)
        self.first_stage.eval()
        return self

    @property
    def device(self):
        """The device of x_t. FSDP's offloading may keep the weights of the U-Net on another one."""
        return next(self.first_stage.parameters()).device

    def start(self, y, noise):
        """x_T of eq. 3.9 for an x_0 of the label's mean colour, not N(0, I) (not in the thesis).

        sqrt(alpha_bar_T) is small, 0.012 in the thesis, but the mean is the same at all N = 1024
        positions. If the colours of pictures have the mean 1 and the deviation 0.3, a start at
        N(0, I) loses 11 % of that mean. Published models have the mean 0.
        """
        if y.is_floating_point():  # tokens: no label's mean is theirs
            y = torch.full((len(y),), self.zero_label, device=y.device)
        x_0 = self.mean[y][:, :, None, None]
        return self.diffusion.q_sample(x_0, self.diffusion.T, noise)

    @torch.no_grad()
    def encode(self, x):
        """Images (B, 3, H, W) in [-1, 1] -> z (B, C, H/f, W/f), not quantised (E54)."""
        return scaled(self.first_stage.encode(x), self.latent_scale, self.octaves)

    def decode(self, z):
        """z -> images in [-1, 1], (B, 3, f h, f w); with a code-book z is quantised first (E54)."""
        parts = (damp(z, 1 / DETAILS, self.octaves) / self.latent_scale).split(8)  # less memory
        return torch.cat([self.first_stage.decode(part) for part in parts]).clamp(-1, 1)


class PaletteTokens(nn.Module):
    """A token per colour of a palette (not in the thesis, whose label is a single token, E52).

        token = MLP(sin(2^k pi f), cos(2^k pi f), f, whether the share is known),   k = 0, ..., 3

    with f = (L / 100, a / 100, b / 100, share). A missing colour has a learned token of its own,
    and four of them are the zero-label (4.4.3). Attention adds over tokens, so their order has no
    meaning. labels: colours in sRGB, (K, 3), that can be named by their number.
    """

    def __init__(self, labels, channels, octaves=4):
        super().__init__()
        table = np.full((len(labels) + 1, 4), UNKNOWN, np.float32)
        table[:-1, :3] = rgb_to_lab(np.array(labels, np.float64))
        table[-1] = 0
        self.register_buffer("table", torch.from_numpy(table))
        self.register_buffer("frequency", math.pi * 2.0 ** torch.arange(octaves))
        self.net = nn.Sequential(
            nn.Linear(4 * (2 * octaves + 1) + 1, channels), nn.SiLU(), nn.Linear(channels, channels)
        )
        self.missing = nn.Parameter(torch.randn(channels))

    def palettes(self, y):
        """Palettes (B, 4, 4) from shorter ones (B, n, 4), or from labels (B,)."""
        y = y if y.is_floating_point() else self.table[y][:, None]
        return F.pad(y, (0, 0, 0, MOST_COLOURS - y.shape[1]))

    def forward(self, palettes):
        """Palettes (B, 4, 4), rows (L, a, b, share) -> tokens (B, 4, channels)."""
        share = palettes[..., 3:]
        known = (share > 0).to(share)
        f = torch.cat([palettes[..., :3] / 100, share * known], dim=-1)
        angle = (f[..., None] * self.frequency).flatten(2)
        tokens = self.net(torch.cat([angle.sin(), angle.cos(), f, known], dim=-1))
        return torch.where(share == 0, self.missing, tokens)


def drop_colours(palettes, p, u):
    """What training shows of palettes (B, 4, 4): with probability p nothing (4.4.3). Else the first
    one, two, three or four colours, and in half of the cases not their shares. u: (B,) uniform in
    [0, 1)."""
    case = ((u - p) / (1 - p) * 8).floor().clamp(min=-1).long()[:, None]  # -1 = nothing, else 0..7
    share = palettes[..., 3]
    share = torch.where((case % 2 == 1) & (share > 0), UNKNOWN, share)
    shown = torch.arange(MOST_COLOURS, device=case.device) <= case.div(2, rounding_mode="floor")
    return torch.cat([palettes[..., :3], share[..., None]], dim=-1) * shown[..., None]


class PaletteDiffusion(LatentDiffusion):
    """A latent model whose condition is a palette of one to four colours. context: `PaletteTokens`.

    y: palettes (B, n, 4), see `data.palette`, or labels, which are palettes of one colour each.
    """

    def condition(self, y):
        return {"context": self.context(self.context.palettes(y))}

    def zero_like(self, y):
        """The zero-label in the form of y: no colour at all."""
        return torch.zeros_like(y) if y.is_floating_point() else torch.full_like(y, self.zero_label)

    def start(self, y, noise):
        """x_T of eq. 3.9 for the mean colour of the palette, see `LatentDiffusion.start`.

        Its latent is that of a plain picture of this colour; without colours it is the mean of all.
        """
        palettes = self.context.palettes(y)
        share = palettes[..., 3:].abs()  # colours without a share count alike
        lab = (palettes[..., :3] * share).sum(1) / share.sum(1).clamp(min=1e-6)
        plain = torch.from_numpy(lab_to_rgb(lab.cpu())).to(noise) / 127.5 - 1
        side = self.first_stage.factor << max(2, self.octaves)
        z = self.encode(plain[:, :, None, None].expand(-1, -1, side, side)).mean((2, 3))
        z = torch.where(share.sum(1) > 0, z, self.mean[self.zero_label])
        return self.diffusion.q_sample(z[:, :, None, None], self.diffusion.T, noise)


class GuidingClassifier(nn.Module):
    """4.4.2: f(y | x_t, t), trained on noised images for guiding a diffusion model (E47).

    network: `unet.NoisyClassifier`; beta: the schedule of the guided model, (T,); classes: the
    label names in order; shape: (C, H, W) of x_t; space: the space of x_t, see `space_of`.
    """

    def __init__(self, network, beta, classes, shape, space):
        super().__init__()
        self.network, self.diffusion = network, Diffusion(beta)
        self.classes, self.shape, self.space = list(classes), tuple(shape), space

    def log_f(self, x, t):
        """log f(y | x_t, t) for every label, (B, K), float32. t: 1..T, an int or (B,)."""
        x = x.contiguous(memory_format=torch.channels_last)
        return self.network(x, network_time(t, x)).float().log_softmax(1)

    def loss(self, x_0, y, t, noise):
        """The cross-entropy -log f(y | x_t, t), one value per image."""
        log_f = self.log_f(self.diffusion.q_sample(x_0, t, noise), t)
        return F.nll_loss(log_f, y, reduction="none")


# --------------------------------------------------------------------------------------------------
# From settings to a model
# --------------------------------------------------------------------------------------------------


def build_model(stage, settings, classes):
    """The model of a stage, with new weights. settings: a dict as `train.py` saves it."""
    if stage == "vqgan":
        return build_first_stage(settings)
    build = {"letters": build_letters, "ldm": build_latent, "classifier": build_classifier}
    return build[stage](settings, classes)


def build_letters(settings, classes):
    """The letters model (4.4.5). Its label is added to the time embedding or, as 4.4.5 compares, is
    a token that cross-attention reads."""
    sizes = (settings["channels"], tuple(settings["multipliers"]), settings["blocks"])
    attention = settings["condition"] == "attention"
    width = 4 * settings["channels"] if attention else None
    unet = letters_unet(*sizes, len(classes) + 1, width)
    context = nn.Embedding(len(classes) + 1, width) if attention else None
    beta = SCHEDULES[settings["schedule"]](settings["T"])
    model = PixelDiffusion(unet, context, beta, classes, (3, 32, 32), settings["predict"])
    return model.to(memory_format=torch.channels_last)


def build_classifier(settings, classes):
    """The classifier of noised images or latents (4.4.2)."""
    sizes = (settings["channels"], tuple(settings["multipliers"]), settings["blocks"])
    network = noisy_classifier(settings["shape"], len(classes), *sizes)
    beta = SCHEDULES[settings["schedule"]](settings["T"])
    model = GuidingClassifier(network, beta, classes, settings["shape"], settings["space"])
    return model.to(memory_format=torch.channels_last)


def build_first_stage(settings):
    """The first stage (4.4.7)."""
    s = settings
    if s["bottleneck"] == "vq":
        bottleneck = Codebook(s["codes"], s["z_channels"], s["beta"], s["released"])
    elif s["bottleneck"] == "kl":
        bottleneck = GaussianBottleneck(s["kl_weight"])
    else:
        bottleneck = NoBottleneck()
    names = ("channels", "multipliers", "blocks", "attention_levels", "z_channels", "groups")
    model = VQGAN(**{name: s[name] for name in names}, bottleneck=bottleneck)
    model.equivariant = s["equivariant"]
    return model.to(memory_format=torch.channels_last)


def build_unet_of_level(settings, z_channels, level):
    """The U-Net of the latent model for a 2^level-th of the side, see `Pyramid`. Smaller ones
    have attention at the sides where the largest one has it, and below."""
    channels = (settings["channels"], *settings["pyramid"])[level]
    multipliers, attention = tuple(settings["multipliers"]), settings["attention_levels"]
    if level and attention:
        attention = [i for i in range(len(multipliers)) if i + level >= min(attention)]
    others = {name: settings[name] for name in ("blocks", "context_channels", "groups")}
    return latent_unet(
        channels, multipliers, z_channels=z_channels, attention_levels=attention, **others
    )


def check_size(size, settings):
    """UserError unless first stage, U-Net and pyramid can halve a side of `size` pixels."""
    halvings = len(settings["first_stage_settings"]["multipliers"]) - 1
    halvings += len(settings["multipliers"]) - 1 + len(settings["pyramid"])
    if size % 2**halvings:
        raise UserError(f"--size {size}: expected a multiple of {2**halvings}")


def build_latent(settings, classes):
    """The latent model (4.5) with its first stage."""
    first_stage = build_first_stage(settings["first_stage_settings"])
    z_channels, side = first_stage.z_channels, settings["size"] // first_stage.factor
    beta, shape = SCHEDULES[settings["schedule"]](settings["T"]), (z_channels, side, side)
    levels = range(1 + len(settings["pyramid"]))
    unets = [build_unet_of_level(settings, z_channels, level) for level in levels]
    unet = Pyramid(unets, Diffusion(beta)) if len(unets) > 1 else unets[0]
    if settings["condition"] == "palette":
        Model, colours = PaletteDiffusion, [COLOURS[name] for name in classes]
        context = PaletteTokens(colours, settings["context_channels"])
    else:
        Model = LatentDiffusion
        context = nn.Embedding(len(classes) + 1, settings["context_channels"])
    options = settings["predict"], settings["latent_scale"]
    model = Model(unet, first_stage, context, beta, classes, shape, *options)
    return model.to(memory_format=torch.channels_last)


def fingerprint(module, *more):
    """16 digits that depend on all names, shapes, types and values of a module, and on `more`."""
    digest = hashlib.sha256(repr(more).encode())
    for name, value in module.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def space_of(model):
    """The name of the space of x_t. A classifier guides only models of its own space."""
    if not isinstance(model, LatentDiffusion):
        return "pixels"
    damped = f", {model.octaves} octaves damped" if model.octaves else ""
    return f"latents of {fingerprint(model.first_stage)} x {model.latent_scale:.6g}{damped}"


@torch.no_grad()
def encode_set(data, first_stage, views, device, precision, batch=16):
    """4.4.7: the latents of all images of a `data.ImageSet`, as a memory map (N, views, C, h, w).

    They are those of the first `views` views of every image, see `data.view`. They are computed
    once and kept in a file, whose name depends on images, views, precision and first stage; older
    files may be deleted.
    """
    images = data.images
    packed = Path(images.filename) if isinstance(images, np.memmap) else None
    folder = packed.parent if packed and os.access(packed.parent, os.W_OK) else cache_folder()
    date = packed.stat().st_mtime_ns if packed else 0
    key = f"{data.fingerprint()} {date} {views} {precision} {fingerprint(first_stage)}"
    path = folder / f"latents-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"

    def latents():
        for i in tqdm(range(0, len(images), batch), "encoding", unit="batch", disable=None):
            x, _ = data.batch(np.arange(i, min(i + batch, len(images))), device)
            z = [first_stage.encode(view(x, k)) for k in range(views)]
            yield from torch.stack(z, dim=1).float().cpu().numpy()

    if not path.exists():
        h, w = (side // first_stage.factor for side in images.shape[1:3])
        with whole_file(path) as temporary:
            write_npy(temporary, (views, first_stage.z_channels, h, w), np.float32, latents())
    return np.load(path, mmap_mode="r")


# --------------------------------------------------------------------------------------------------
# Our files
# --------------------------------------------------------------------------------------------------


def save_model(path, stage, settings, classes, update, weights, split=None):
    """Everything that `sample.py` needs, in one file.

    settings: a dict; weights: name -> state dict. Training saves "raw" and "ema". split: what the
    model was not trained on (E68), {"data": fingerprint of the set, "held_out": its rows}.
    """
    content = {"stage": stage, "settings": settings, "classes": list(classes), "update": update}
    write_checkpoint(path, content | {"weights": weights, "split": split})


def load_model(path, weights="ema", device="cpu"):
    """The model of a run folder or a model file, with attributes `stage`, `settings` and `update`.

    "letters" and "paintings" are the models of runs/letters and runs/ldm or, without such a run,
    those that come with the project. Published files of the known families open as well. Raises
    UserError for any other file. A file cannot run code: only tensors and plain values are read.
    """
    path = own_model(path) if path in OWN_RUNS else Path(path)
    path = path / "model.pt" if path.is_dir() else path
    content = read_checkpoint(path)
    try:
        if "state_dict" in content:
            content = published_model(content["state_dict"], path)
        settings, states, update = content["settings"], content["weights"], content["update"]
        if weights == "ema" and "ema" not in states:
            print(f"{path} has no averaged weights; its raw weights are used", file=sys.stderr)
            weights = "raw"
        state = states[weights]
        model = build_model(content["stage"], settings, content["classes"])
    except KeyError as error:
        what = "not a checkpoint of this project or a known published one"
        raise UserError(f"{path}: {what}, it has no {error}") from None
    load_weights(model, state, path)
    model.stage, model.settings, model.update = content["stage"], settings, update
    if settings.get("bottleneck") == "vq":
        model.quantize.active = update >= settings["quantise_from"]
    return model.to(device).eval()


OWN_RUNS = {"letters": Path("runs", "letters"), "paintings": Path("runs", "ldm")}


def own_model(name):
    trained = OWN_RUNS[name] / "model.pt"
    return trained if trained.exists() else ASSETS / f"{name}.pt"


def write_checkpoint(path, content):
    """Write a dict of tensors and plain values whole, or raise UserError (disk full)."""
    with whole_file(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # torch.save's error for a failed write
            raise OSError(errno.EIO, "the write failed, the disk may be full") from error


def read_checkpoint(path, keys=frozenset()):
    """The dict in a PyTorch file; UserError if it cannot be read or lacks one of `keys`.

    No code in the file is run: it may contain tensors, plain values, and the names in
    LIGHTNING_NAMES, which are replaced by objects that do nothing. Other names are refused.
    """
    try:
        with torch.serialization.safe_globals([(StandIn, name) for name in LIGHTNING_NAMES]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {what_makes(Path(path))}") from None
    except Exception as error:  # torch raises many kinds of errors for damaged and foreign files
        reason = "not a checkpoint that can be read (truncated, or not a PyTorch file)"
        if foreign := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"refused, it asks to run {foreign[1]}; only tensors are read"
        raise UserError(f"{path}: {reason}") from error
    if not isinstance(content, dict) or not keys <= content.keys():
        raise UserError(f"{path}: a PyTorch file, but not a checkpoint of this project")
    return content


def what_makes(path):
    """The command that makes a missing run folder, or a missing file in one."""
    for stage in ("letters", "vqgan", "ldm", "classifier"):
        if Path("runs", stage) in (path, path.parent):
            return f"python train.py --stage {stage} makes it"
    if path.suffix:
        return "python train.py --help says what makes one"
    return f"train.py makes it, with --out {path}"


def load_weights(module, state, path):
    """Load a state dict, of any precision. UserError, in one line, if names or shapes differ."""
    own = module.state_dict()
    common = own.keys() & state.keys()
    problems = {
        "missing": own.keys() - common,
        "unknown": state.keys() - common,
        "of another shape": {name for name in common if own[name].shape != state[name].shape},
    }
    found = [f"{len(n)} {kind} (first: {min(n)})" for kind, n in problems.items() if n]
    if found:
        raise UserError(f"{path}: the weights do not fit the model: {'; '.join(found)}")
    module.load_state_dict(state)


# --------------------------------------------------------------------------------------------------
# Published files
# --------------------------------------------------------------------------------------------------

# Names in the checkpoints of PyTorch Lightning that are no tensors: the class of a callback, and
# what pickles its best score, a NumPy scalar.
LIGHTNING_NAMES = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "_codecs.encode",
)


class StandIn:
    """Replaces each of LIGHTNING_NAMES and does nothing."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


# The known first stages: vq-f4, vq-f8 and kl-f8, by the shape of the code-book or of quant_conv.
FIRST_STAGES = {
    (8192, 3): {"multipliers": (1, 2, 4), "attention_levels": (), "z_channels": 3},
    (16384, 4): {"multipliers": (1, 2, 2, 4), "attention_levels": (3,), "z_channels": 4},
    (8, 8, 1, 1): {"multipliers": (1, 2, 4, 4), "attention_levels": (), "z_channels": 4},
}
ALL_FIRST_STAGES = {"channels": 128, "blocks": 2, "groups": 32, "size": 256, "quantise_from": 0}
ALL_FIRST_STAGES |= {"beta": 0.25, "released": True, "kl_weight": 1e-6, "equivariant": False}

# The known U-Net: cin (on vq-f8), by the shape of the first convolution.
LATENT_UNETS = {
    (256, 4, 3, 3): {"channels": 256, "multipliers": (1, 2, 4), "attention_levels": (0, 1, 2)},
}
ALL_LATENT_UNETS = {"blocks": 2, "groups": 32, "context_channels": 512, "size": 256}
ALL_LATENT_UNETS |= {"schedule": "sqrt_linear", "predict": "eps", "latent_scale": 1.0}
ALL_LATENT_UNETS |= {"condition": "label", "pyramid": (), "p_uncond": 0.0}

PREFIXES = {  # published -> ours
    "model.diffusion_model.": "unet.",
    "first_stage_model.": "first_stage.",
    "cond_stage_model.embedding.": "context.",
}


def published_model(state, path):
    """The content of one of our model files, made from a published state dict."""
    if any(name.startswith("model.diffusion_model.") for name in state):
        return published_latent(state, path)
    state = {name: value for name, value in state.items() if not name.startswith("loss.")}
    weights = {"raw": state, "ema": state}  # published first stages have no averaged weights
    settings = first_stage_settings(state, path)
    return {"stage": "vqgan", "settings": settings, "classes": [], "update": 0, "weights": weights}


def known_network(table, state, name, path):
    """The row of a table of known networks that has the shape of the weight `name`."""
    shape = tuple(state[name].shape)
    if shape not in table:
        raise UserError(f"{path}: not a known published file, {name} has the shape {shape}")
    return table[shape]


def first_stage_settings(state, path, prefix=""):
    """The settings of a published first stage, whose names begin with `prefix`."""
    book = state.get(f"{prefix}quantize.embedding.weight")
    if book is None:
        name, found = "quant_conv.weight", {"bottleneck": "kl", "codes": 1}
    else:
        name, found = "quantize.embedding.weight", {"bottleneck": "vq", "codes": len(book)}
    return ALL_FIRST_STAGES | known_network(FIRST_STAGES, state, prefix + name, path) | found


def published_latent(state, path):
    """The same for a class-conditional latent model.

    It has no zero-label; the mean of the labels takes its place, untrained. The published average
    does not include the table of labels, so "ema" has the trained one.
    """
    steps = check_schedule(state, path)
    raw, average = {}, {}
    for name, value in state.items():
        for theirs, ours in PREFIXES.items():
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
        if name.startswith("model_ema."):
            average[name] = value
        elif "." in name or value.shape != (steps,):  # else a table of the schedule
            raw[name] = value
    first_stage = first_stage_settings(raw, path, "first_stage.")
    settings = known_network(LATENT_UNETS, raw, "unet.input_blocks.0.0.weight", path)
    settings = ALL_LATENT_UNETS | settings | {"T": steps, "first_stage_settings": first_stage}
    classes = [str(i) for i in range(len(raw["context.weight"]))]
    zero_label = raw["context.weight"].mean(0, keepdim=True)
    raw["context.weight"] = torch.cat([raw["context.weight"], zero_label])
    raw["mean"] = torch.zeros(len(classes) + 1, raw["unet.input_blocks.0.0.weight"].shape[1])
    weights = {"raw": raw, "ema": averaged(raw, average)} if average else {"raw": raw}
    content = {"stage": "ldm", "settings": settings, "classes": classes, "update": 0}
    return content | {"weights": weights}


def averaged(raw, average):
    """`raw` with the averaged U-Net, whose published names have no dots: model_ema.<name>."""
    state = {name: value for name, value in raw.items() if not name.startswith("unet.")}
    names = {f"diffusion_model{name[5:].replace('.', '')}": name for name in raw.keys() - state}
    for name, value in average.items():
        name = name.removeprefix("model_ema.")
        if name not in ("decay", "num_updates"):
            state[names.get(name, name)] = value
    return state


def check_schedule(state, path):
    """The number of steps of a published model. Its schedule must be ours, up to half precision."""
    beta = state.get("betas", torch.zeros(0)).double()
    ours = SCHEDULES["sqrt_linear"]
    if not len(beta) or not torch.allclose(beta, ours(len(beta)), rtol=1e-3, atol=0):
        found = f"betas {beta[0]:.6f} to {beta[-1]:.6f}" if len(beta) else "no betas"
        expected = "a schedule linear in sqrt(beta) from 0.001500 to 0.019500"
        raise UserError(f"{path}: {found}, but expected {expected}")
    return len(beta)


def published_losses(path):
    """The state dicts of the discriminator and of the perceptual loss in a published first stage.

    Returns {"discriminator": ..., "perceptual_loss": ...}; empty if `path` is one of our files.
    """
    state = read_checkpoint(path).get("state_dict", {}) if Path(path).is_file() else {}
    parts = {}
    for name, value in state.items():
        if name.startswith(("loss.discriminator.", "loss.perceptual_loss.")):
            _, part, inside = name.split(".", 2)
            parts.setdefault(part, {})[inside] = value
    return parts


# torchvision's VGG16 and LPIPS's heads: name, kind of checksum, checksum, and origin
PERCEPTUAL_FILES = {
    "vgg16-397923af.pth": (
        "sha256",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        "https://download.pytorch.org/models/vgg16-397923af.pth",
    ),
    "vgg.pth": (
        "md5",
        "d507d7349b931f0638a25a48a722f98a",
        "lpips/weights/v0.1/vgg.pth inside the package lpips 0.1.4 (7,289 bytes)",
    ),
}


def load_perceptual(source=None):
    """The perceptual loss with its weights (3.2.2).

    source: a folder with both PERCEPTUAL_FILES (default: torch.hub's), or a published first stage,
    which contains the loss. Raises UserError with the name, checksum and origin of a missing file.
    """
    source = Path(source or Path(torch.hub.get_dir()) / "checkpoints")
    loss = PerceptualLoss()
    if source.is_file():
        state = published_losses(source).get("perceptual_loss", {})
    else:
        vgg16, heads = (checked_file(source, name) for name in PERCEPTUAL_FILES)
        state = loss.state_dict() | heads
        for name in loss.net.state_dict():  # slice3.10.weight is torchvision's features.10.weight
            state[f"net.{name}"] = vgg16["features." + name.partition(".")[2]]
    load_weights(loss, state, source)
    return loss.eval()


def checked_file(folder, name):
    """The state dict in one of PERCEPTUAL_FILES."""
    kind, digest, origin = PERCEPTUAL_FILES[name]
    if not (folder / name).is_file():
        raise UserError(f"{folder / name} is not there; it is {origin}, {kind} {digest}")
    with (folder / name).open("rb") as file:
        if hashlib.file_digest(file, kind).hexdigest() != digest:
            raise UserError(f"{folder / name}: its {kind} is not {digest}; take it from {origin}")
    return read_checkpoint(folder / name)
