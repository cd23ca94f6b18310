"""Training: sections 3.5.4, 4.4.5, 4.4.7, 4.5, 4.7 and 5.2 of the thesis.

    python train.py --stage letters                 the conditional pixel DDPM on 32 x 32 letters
    python train.py --stage vqgan                   the first stage: AE, VAE, VQ-VAE or VQ-GAN
    python train.py --stage ldm                     the latent model, paintings by colour, on a first stage
    python train.py --stage classifier              a classifier of noised images, to guide the diffusion with
    python train.py --stage letters --resume        go on after an interruption, exactly where it stopped
    torchrun --nproc-per-node 2 train.py --stage ldm     on two GPUs, or two processes on a CPU

Everything goes to runs/<stage>: model.pt (what sample.py opens), checkpoint_<update> (what --resume opens), log.csv, loss.png,
previews. A run owns no random state: the rows, t, noise and dropped labels of update n are functions of (seed, n), whatever
the number of processes.
"""

import argparse
import contextlib
import csv
import hashlib
import math
import os
import pickle
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import (
    ALPHABET,
    COLOURS,
    UserError,
    balanced_rows_of_update,
    bars,
    best_device,
    chart,
    check_device,
    embedded_letters,
    grid,
    locked,
    open_letters,
    open_paintings,
    picture_name,
    rng,
    rows_of_update,
    run_program,
    to_tensor,
    to_uint8,
    tune,
    whole_file,
)
from ddpm import SCHEDULES, drop_labels
from fid import gradient_energy, kernel_distance_of_images, mean_colour_distances, offline_features, psnr
from ldm import (
    build_classifier,
    build_first_stage,
    build_latent,
    build_letters,
    fingerprint,
    load_model,
    load_perceptual,
    load_weights,
    published_losses,
    read_checkpoint,
    save_model,
    space_of,
    what_makes,
    write_checkpoint,
)
from sample import draw_rows, generate, images_by_label, load
from unet import ResBlock, SpatialTransformer
from vqgan import PatchDiscriminator, adaptive_weight, code_use, discriminator_loss, generator_loss

# ------------------------------------------------------------------------------------------------------------------
# Settings: one dataclass a stage, every field a flag
# ------------------------------------------------------------------------------------------------------------------


def flag(default, help, **more):
    return field(default=default, metadata={"help": help, **more})


@dataclass
class Settings:
    """What every stage has. A field that is None takes its value from `SIZES`."""

    data: str | None = flag(None, "the training images (default: embedded ones)", kind=str)
    out: str = flag("", "run folder", resume=True)
    model: str = flag(
        "auto", "small (fits two CPU cores), thesis, or auto = thesis on a GPU", choices=("auto", "small", "thesis")
    )
    updates: int | None = flag(None, "how many updates to train", kind=int, resume=True)
    batch: int | None = flag(None, "images that a process computes at a time", kind=int, resume=True)
    accumulate: int = flag(1, "such batches to an update, one after the other: less memory", resume=True)
    strategy: str = flag(
        "auto",
        "of several processes (4.7): ddp, every one has all weights; fsdp, every one a share of them; auto = fsdp for ldm",
        choices=("auto", "single", "ddp", "fsdp"),
        resume=True,
    )
    lr: float | None = flag(None, "peak learning rate of AdamW", kind=float)
    channels: int | None = flag(None, "width of the first level", kind=int)
    multipliers: tuple | None = flag(None, "width of every level as a multiple of it", kind=int, nargs="+")
    ema: float | None = flag(None, "decay of the averaged weights, 0 = no averaging", kind=float)
    flip: bool = flag(False, "mirror half of the images")
    balanced: bool = flag(False, "draw every label equally often, however few images it has")
    warmup: int = flag(100, "updates until the learning rate is reached")
    weight_decay: float = flag(0.01, "of AdamW")
    clip: float = flag(1.0, "largest gradient norm")
    overfit: int = flag(0, "train on so many images only, to see that it learns; 0 = all")
    seed: int = flag(0, "of the start weights, the order of the data and every random draw")
    precision: str = flag(
        "auto",
        "float32, bf16 autocast, or the faster one as measured at the start",
        choices=("auto", "float32", "bf16"),
    )
    compile: bool = flag(False, "torch.compile the network", resume=True)
    device: str = flag("auto", "cuda, mps, cpu, or the best there is", resume=True)
    validate_every: int = flag(250, "updates between two validation losses", resume=True)
    preview_every: int = flag(1000, "updates between two preview grids", resume=True)
    save_every: int = flag(250, "updates between two checkpoints", resume=True)

    processes: int = 1  # no flag: torchrun decides

    POSITIVE = ("updates", "batch", "accumulate", "lr", "channels", "clip", "validate_every", "preview_every", "save_every")
    NOT_NEGATIVE = ("seed", "overfit", "weight_decay", "warmup")

    @property
    def images(self):
        """Images an update."""
        return self.batch * self.accumulate * self.processes

    def preset(self):
        """Values that something else than the size decides."""
        return {}

    def check(self):
        """Raises UserError for a number that cannot work."""
        for name in self.POSITIVE:
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{option(name)} {getattr(self, name)}: must be more than 0")
        for name in self.NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{option(name)} {getattr(self, name)}: must be 0 or more")
        if self.seed >= 2**62:
            raise UserError(f"--seed {self.seed}: must be below 2^62")
        if not 0 <= self.ema < 1:
            raise UserError(f"--ema {self.ema}: must be from 0 to below 1")
        if not 1 <= len(self.multipliers) <= 6 or min(self.multipliers) < 1:
            raise UserError("--multipliers: one to six positive numbers")
        if self.strategy == "single" and self.processes > 1:
            raise UserError(f"--strategy single: but torchrun started {self.processes} processes; ddp or fsdp")
        if self.strategy == "fsdp" and not isinstance(self, Latent):
            raise UserError("--strategy fsdp: for --stage ldm; the networks of the other stages are small, --strategy ddp")

    def check_levels(self):
        if self.channels % self.groups:
            raise UserError(f"--groups {self.groups}: must divide --channels {self.channels}")
        if any(not 0 <= level < len(self.multipliers) for level in self.attention_levels or ()):
            raise UserError(f"--attention-levels: expected numbers from 0 to {len(self.multipliers) - 1}")


@dataclass
class DiffusionSettings(Settings):
    """What the stages have whose model generates images for labels."""

    predict: str | None = flag(
        None, "eps: the loss is L_simple, as in the thesis; v: learns labels faster", kind=str, choices=("eps", "v")
    )
    blocks: int | None = flag(None, "residual blocks a level", kind=int)
    schedule: str | None = flag(None, "noise schedule", kind=str, choices=tuple(SCHEDULES))
    T: int | None = flag(None, "diffusion steps", kind=int)
    p_uncond: float = flag(0.2, "share of labels replaced by the zero-label (4.4.3); 0 = no classifier-free training")
    kernel_distance: int = flag(0, "images generated at every preview to follow the kernel distance (5.4.1); 0 = none")

    POSITIVE = (*Settings.POSITIVE, "blocks", "T")

    def check(self):
        super().check()
        if self.kernel_distance < 3 and self.kernel_distance:
            raise UserError(f"--kernel-distance {self.kernel_distance}: must be 0 (none) or at least 3")
        if not 0 <= self.p_uncond <= 1:
            raise UserError(f"--p-uncond {self.p_uncond}: must be between 0 and 1")


@dataclass
class Letters(DiffusionSettings):
    """`--stage letters`: the conditional DDPM on letters (4.4.5)."""

    data: str | None = flag(None, "folder of class folders, or .npz (default: the embedded letters)", kind=str)
    out: str = flag("runs/letters", "run folder", resume=True)
    flip: bool = flag(False, "mirror half of the images, as in fig. 4.8 (makes letters wrong, E41)")
    blocks: int = flag(1, "residual blocks a level")
    schedule: str = flag("linear", "noise schedule", choices=tuple(SCHEDULES))
    T: int = flag(1000, "diffusion steps")

    def check(self):
        super().check()
        if self.channels % 16:
            raise UserError(f"--channels {self.channels}: must be a multiple of 16")


@dataclass
class Classifier(Settings):
    """`--stage classifier`: f(y | x_t, t) for classifier guidance (4.4.2)."""

    run: str | None = flag(None, "the diffusion to guide (default: runs/letters, else the model in assets)", kind=str)
    data: str | None = flag(None, "the training images (default: those of --run)", kind=str)
    out: str = flag("runs/classifier", "run folder", resume=True)
    blocks: int = flag(1, "residual blocks a level")
    weight_decay: float = flag(0.05, "of AdamW")

    shape: tuple | None = None  # these are those of --run
    space: str | None = None
    schedule: str | None = None
    T: int | None = None

    POSITIVE = (*Settings.POSITIVE, "blocks")

    def preset(self):
        if self.shape:
            return {}
        guided = load(self.run)
        of_run = {name: guided.settings.get(name) for name in ("schedule", "T", "data")}  # a published model knows no data
        return of_run | {"shape": guided.shape, "space": space_of(guided)}

    def check(self):
        super().check()
        factor = 2 ** (len(self.multipliers) - 1)
        if self.channels % 16:
            raise UserError(f"--channels {self.channels}: must be a multiple of 16")
        if any(side % factor for side in self.shape[1:]):
            raise UserError(f"--multipliers: {len(self.multipliers)} levels are too many for {self.shape[1:]} positions")


@dataclass
class FirstStage(Settings):
    """`--stage vqgan`: the auto-encoder of 3.1 to 3.4 with any of the three bottlenecks."""

    data: str | None = flag(None, "folder of images (default: painted here), or the word letters", kind=str)
    out: str = flag("runs/vqgan", "run folder", resume=True)
    init: str | None = flag(None, "start from published weights (model.ckpt) or a run; it sets the network", kind=str)
    size: int | None = flag(None, "pixels that images are cropped and resized to", kind=int)
    crop: int | None = flag(None, "train on random squares of so many pixels (default: the whole image)", kind=int)
    bottleneck: str | None = flag(None, "none = AE, kl = VAE, vq = VQ-VAE and VQ-GAN", kind=str, choices=("none", "kl", "vq"))
    z_channels: int | None = flag(None, "channels of the latent, the D of the code-book", kind=int)
    codes: int | None = flag(None, "codes in the code-book, its K", kind=int)
    blocks: int | None = flag(None, "residual blocks a level", kind=int)
    attention_levels: tuple | None = flag(None, "levels with attention, 0 = full resolution", kind=int, nargs="*")
    groups: int | None = flag(None, "of every normalisation", kind=int)
    beta: float = flag(0.25, "weight of the commitment loss (eq. 3.4)")
    released: bool = flag(False, "beta on the code-book term instead, as the published weights were trained (E14)")
    quantise_from: int | None = flag(
        None, "update at which the code-book joins, until then the network is an AE (default: 1/6, at most 1,000)", kind=int
    )
    reseed: bool | None = flag(None, "give codes that an epoch did not use a new place (default: unless --init)")
    kl_weight: float = flag(1e-4, "weight of the KL term of a VAE (eq. 3.1)")
    perceptual: float | None = flag(None, "weight of the perceptual loss (default: 1 if its files are there)", kind=float)
    perceptual_files: str | None = flag(
        None, "folder with vgg16-397923af.pth and vgg.pth, or a published model.ckpt (default: torch hub's)", kind=str
    )
    adversarial: float = flag(0.6, "weight of the adversarial loss (VQ-GAN); 0 = none")
    adversarial_loss: str = flag("hinge", "form of it", choices=("hinge", "vanilla"))
    adaptive: bool = flag(True, "multiply it by lambda (E18)")
    disc_start: int | None = flag(None, "update at which the adversary joins (default: halfway, at most 10,000)", kind=int)
    disc_channels: int | None = flag(None, "width of the discriminator", kind=int)
    disc_layers: int | None = flag(None, "halvings in the discriminator", kind=int)
    accumulate: int = 1  # no flag: lambda and the adversary's batch are those of one batch
    weight_decay: float = flag(0.0, "of AdamW")
    clip: float = flag(100.0, "largest gradient norm")
    validate_every: int = flag(500, "updates between two validation losses", resume=True)
    preview_every: int = flag(2000, "updates between two preview grids", resume=True)
    save_every: int = flag(500, "updates between two checkpoints", resume=True)

    POSITIVE = (*Settings.POSITIVE, "size", "z_channels", "codes", "blocks", "groups", "disc_channels", "disc_layers")
    NOT_NEGATIVE = (*Settings.NOT_NEGATIVE, "beta", "kl_weight", "perceptual", "adversarial", "disc_start", "quantise_from")

    def check(self):
        self.perceptual = self._perceptual_weight() if self.perceptual is None else self.perceptual
        self.reseed = not self.init if self.reseed is None else self.reseed
        self.disc_start = min(self.updates // 2, 10_000) if self.disc_start is None else self.disc_start
        self.quantise_from = min(self.updates // 6, 1000) if self.quantise_from is None else self.quantise_from
        self.crop = self.crop or self.size
        super().check()
        factor = 2 ** (len(self.multipliers) - 1)
        if not 0 < self.crop <= self.size or self.crop % factor:
            raise UserError(f"--crop {self.crop}: expected a multiple of {factor} (f), at most --size {self.size}")
        self.check_levels()
        if self.adversarial and self.crop >> self.disc_layers < 3:
            raise UserError(f"--disc-layers {self.disc_layers}: too many for images of {self.crop} pixels")
        if self.perceptual and self.crop < 16:
            raise UserError(f"--crop {self.crop}: the perceptual loss needs at least 16 pixels; --perceptual 0 does without it")
        if self.data == "letters" and self.size != 32:
            raise UserError(f"--size {self.size}: the embedded letters have 32 pixels")

    def preset(self):
        """The network of the model that --init names, its discriminator's included."""
        network = ("channels", "multipliers", "bottleneck", "z_channels", "codes", "blocks", "attention_levels", "groups")
        if not self.init or all(getattr(self, name) is not None for name in network):
            return {"size": 32} if self.data == "letters" else {}
        model, losses = load_model(self.init), published_losses(self.init)
        if model.stage != "vqgan":
            raise UserError(f"--init {self.init}: no first stage")
        preset = {name: model.settings[name] for name in network}
        if "discriminator" in losses:
            kernels = [value for value in losses["discriminator"].values() if value.ndim == 4]
            preset |= {"disc_channels": len(kernels[0]), "disc_layers": len(kernels) - 2}
        for name, value in preset.items():
            if getattr(self, name) not in (None, value):
                raise UserError(f"{option(name)} {getattr(self, name)}: --init {self.init} has {value}; leave the flag away")
        if not self.perceptual_files and "perceptual_loss" in losses:
            self.perceptual_files = self.init
        return preset | {"quantise_from": 0}

    def _perceptual_weight(self):
        try:
            load_perceptual(self.perceptual_files)
        except UserError as error:
            if self.perceptual_files:
                raise
            print(f"no perceptual loss: {error}")
            return 0.0
        return 1.0


@dataclass
class Latent(DiffusionSettings):
    """`--stage ldm`: the latent model (4.5) on a first stage."""

    data: str | None = flag(None, "folder of paintings (default: painted here)", kind=str)
    out: str = flag("runs/ldm", "run folder", resume=True)
    first_stage: str | None = flag(
        None, "run or model file of the first stage (default: runs/vqgan, where the small one is trained first)", kind=str
    )
    init: str | None = flag(
        None, "start from a published class-conditional model.ckpt or a run; it sets the network and the first stage", kind=str
    )
    size: int | None = flag(None, "pixels that images are cropped and resized to (default: the first stage's)", kind=int)
    lr: float | None = flag(
        None, "peak learning rate of AdamW; no batch size multiplies it (published: 1e-6 an image, 6.4e-5 for 64)", kind=float
    )
    attention_levels: tuple | None = flag(
        None, "levels with cross-attention, 0 = full resolution (default: all)", kind=int, nargs="+"
    )
    groups: int | None = flag(None, "of every normalisation", kind=int)
    context_channels: int | None = flag(None, "width of the label embedding", kind=int)
    latent_scale: float | None = flag(
        None, "factor on the latents (default: small 1/std, thesis 1 as published, E54)", kind=float
    )
    guide_above: float | None = flag(
        None,
        "noise above which previews and sample.py guide, see sample.py --help (default: small 8, thesis 0 = always)",
        kind=float,
    )
    checkpoint_activations: bool = flag(False, "compute activations again for the gradient: less memory", resume=True)
    cpu_offload: bool = flag(False, "fsdp: weights, gradients and moments wait in the memory of the CPU (E59)", resume=True)
    first_stage_settings: dict | None = None  # no flag: what the first stage's file says

    NETWORK = (
        *("channels", "multipliers", "blocks", "attention_levels", "groups", "context_channels"),
        *("predict", "schedule", "T", "latent_scale"),
    )
    POSITIVE = (*DiffusionSettings.POSITIVE, "groups", "context_channels")

    def check(self):
        super().check()
        self.check_levels()
        if self.channels % 32:
            raise UserError(f"--channels {self.channels}: must be a multiple of 32, the width of an attention head")
        if self.cpu_offload and self.strategy != "fsdp":
            raise UserError("--cpu-offload: only with --strategy fsdp")
        if self.compile and self.strategy == "fsdp":
            raise UserError("--compile: not with --strategy fsdp, whose weights come and go; ddp compiles")
        if self.latent_scale is not None and self.latent_scale <= 0:
            raise UserError(f"--latent-scale {self.latent_scale}: must be more than 0")
        if self.guide_above < 0:
            raise UserError(f"--guide-above {self.guide_above:g}: must be 0 (guide always) or more")

    def preset(self):
        """The network of the model that --init names."""
        if not self.init or self.first_stage_settings:
            return {}
        if self.first_stage:
            raise UserError(f"--first-stage {self.first_stage}: --init {self.init} brings its own; leave the flag away")
        model = load_model(self.init)
        if model.stage != "ldm":
            raise UserError(f"--init {self.init}: no latent model")
        preset = {name: model.settings[name] for name in self.NETWORK} | {"guide_above": model.guide_above}
        for name, value in preset.items():
            if getattr(self, name) not in (None, value):
                raise UserError(f"{option(name)} {getattr(self, name)}: --init {self.init} has {value}; leave the flag away")
        return preset


SIZES = {
    Letters: {
        "small": {
            "updates": 3000,
            "batch": 32,
            "lr": 1e-3,
            "channels": 32,
            "multipliers": (1, 2, 3, 4),
            "ema": 0.998,
            "predict": "v",
        },
        "thesis": {
            "updates": 20_000,
            "batch": 512,
            "lr": 3e-4,
            "channels": 64,
            "multipliers": (1, 2, 4, 8),
            "ema": 0.9995,
            "predict": "eps",
        },
    },
    Classifier: {
        "small": {"updates": 1000, "batch": 64, "lr": 1e-3, "channels": 32, "multipliers": (1, 2, 3, 4), "ema": 0.998},
        "thesis": {"updates": 10_000, "batch": 512, "lr": 3e-4, "channels": 64, "multipliers": (1, 2, 4, 8), "ema": 0.9995},
    },
    FirstStage: {
        "small": {
            "updates": 7000,
            "batch": 8,
            "lr": 1e-3,
            "channels": 16,
            "multipliers": (1, 2, 4),
            "ema": 0.995,
            "size": 64,
            "bottleneck": "vq",
            "z_channels": 4,
            "codes": 512,
            "blocks": 1,
            "attention_levels": (),
            "groups": 1,
            "disc_channels": 32,
            "disc_layers": 2,
        },
        "thesis": {
            "updates": 100_000,
            "batch": 8,
            "lr": 3.6e-5,
            "channels": 128,
            "multipliers": (1, 2, 2, 4),
            "ema": 0.0,
            "size": 256,
            "bottleneck": "vq",
            "z_channels": 4,
            "codes": 16384,
            "blocks": 2,
            "attention_levels": (3,),
            "groups": 32,
            "disc_channels": 64,
            "disc_layers": 2,
        },
    },
    Latent: {
        "small": {
            "updates": 6000,
            "batch": 32,
            "lr": 1e-3,
            "channels": 32,
            "multipliers": (1, 2, 4),
            "ema": 0.998,
            "predict": "v",
            "blocks": 1,
            "schedule": "sqrt_linear",
            "T": 1000,
            "groups": 2,
            "context_channels": 512,
            "guide_above": 8.0,
        },
        "thesis": {
            "updates": 88_000,
            "batch": 64,
            "lr": 6.4e-5,
            "channels": 256,
            "multipliers": (1, 2, 4),
            "ema": 0.9999,
            "predict": "eps",
            "blocks": 2,
            "schedule": "sqrt_linear",
            "T": 1000,
            "groups": 32,
            "context_channels": 512,
            "latent_scale": 1.0,
            "guide_above": 0.0,
        },
    },
}


def option(name):
    return "--" + name.replace("_", "-")


def parse(arguments=None):
    """The stage's settings, which of them were typed, and whether to resume."""
    known = argparse.ArgumentParser(add_help=False)
    known.add_argument("--stage", choices=tuple(STAGES), default="letters")
    stage = known.parse_known_args(arguments)[0].stage
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stage", choices=tuple(STAGES), required=True, help="what to train")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument(
        "--chart", metavar="FILE", default=argparse.SUPPRESS, help="draw the losses of the run in --out (5.2), do nothing else"
    )
    if stage == "ldm":
        how = {"metavar": "GB", "default": argparse.SUPPRESS, "help": "train nothing: what fits on GPUs of so many gigabytes"}
        parser.add_argument("--plan", type=float, **how)
    for f in fields(STAGES[stage].Settings):
        if not f.metadata:
            continue  # no flag: taken from another run
        default = "" if f.default is None or f.type is bool else f" (default {f.default})"
        how = {"dest": f.name, "default": argparse.SUPPRESS, "help": f.metadata["help"] + default}
        if f.type in (bool, bool | None):
            parser.add_argument(option(f.name), action=argparse.BooleanOptionalAction, **how)
        else:
            options = {key: f.metadata[key] for key in ("choices", "nargs") if key in f.metadata}
            parser.add_argument(option(f.name), type=f.metadata.get("kind", f.type), **options, **how)
    typed = vars(parser.parse_args(arguments))
    stage, resume = typed.pop("stage"), typed.pop("resume")
    return stage, typed, resume


def complete(settings):
    """Fill in what depends on the machine, check the numbers, and say which model and why."""
    if settings.device == "auto":
        settings.device = best_device()
    check_device(settings.device)
    if dist.is_initialized() and settings.device not in ("cpu", "cuda"):
        raise UserError(f"--device {settings.device}: several processes need cuda, one GPU each, or cpu")
    gpu = settings.device != "cpu"
    if settings.model == "auto":
        settings.model = "thesis" if gpu else "small"
        print(f"--model {settings.model}: {'a GPU is there' if gpu else 'no GPU here'} (flags override it)")
    for f in fields(settings):
        if isinstance(getattr(settings, f.name), list):
            setattr(settings, f.name, tuple(getattr(settings, f.name)))
    for name, value in (SIZES[type(settings)][settings.model] | settings.preset()).items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)
    settings.processes = world()
    if settings.strategy == "auto":
        settings.strategy = "single" if not dist.is_initialized() else "fsdp" if isinstance(settings, Latent) else "ddp"
    tune(settings.device, keep_memory=settings.strategy != "fsdp")
    if settings.precision == "auto":
        faster = across(float(faster_in_bf16(settings.device)), dist.ReduceOp.MAX)
        settings.precision = "bf16" if faster else "float32"
        print(f"--precision {settings.precision}: chosen by the speed of both, measured on this {settings.device}")
    settings.check()


def faster_in_bf16(device):
    """Time a convolution forward and backward, a typical one of the small network, in float32 and under bf16 autocast."""

    def seconds(bf16):
        conv = torch.nn.Conv2d(64, 64, 3, padding=1).to(device)
        x = torch.randn(64, 64, 16, 16, device=device)
        best = math.inf
        for _ in range(5):
            start = time.perf_counter()
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
                conv(x).sum().backward()
            conv.weight.grad.sum().item()  # waits for the device
            best = min(best, time.perf_counter() - start)
        return best

    return seconds(True) < 0.9 * seconds(False)


def mixed_precision(settings):
    """bf16 autocast as the settings ask. Without its cache: that would keep casts of the weights that EMA has swapped out."""
    kind = torch.device(settings.device).type
    return torch.autocast(kind, torch.bfloat16, enabled=settings.precision == "bf16", cache_enabled=False)


# ------------------------------------------------------------------------------------------------------------------
# The stages: what a loss, a validation loss and a preview are
#
#   players()         a Player for everyone who trains: one, or an auto-encoder and then its adversary
#   figures           further numbers of the last update for the log, by column
#   validate()        numbers for the log, "validation_loss" among them
#   preview(path, final)   draws what the model can do, more of it at the end; returns numbers for the log
#   compare()         numbers about generated images for the log, at every preview and at the end; only where `compares`
#   start()           called once in the life of a run, before its first update
#   state_dict()      tensors that a resumed run needs besides weights; they are loaded in place
#   resumed()         called when all tensors of a resumed run are loaded
# ------------------------------------------------------------------------------------------------------------------


WHOLE = slice(None)


@dataclass
class Player:
    """Someone who trains.

    loss: function (n, part) -> the mean loss of those images of update n that the slice `part` leaves over; start: the first
    update; idle: whether some parameters may go without a gradient. `train` adds the parameters and their optimiser.
    """

    name: str
    network: torch.nn.Module
    loss: Callable
    betas: tuple = (0.9, 0.99)
    start: int = 0
    idle: bool = False


class Stage:
    """What the stages share: the rows they train and validate on."""

    loss_name = "mean squared error of the prediction"  # of the validation loss, for the chart
    columns = ()  # what `figures` and `validate` add to the log
    compares = False  # whether `compare` has numbers for the log
    picture = "grid.png"  # what the last preview is called
    best_from = None  # the update from which the best validation loss keeps best.pt; None = never

    def __init__(self, settings, data):
        self.settings, self.data, self.classes, self.figures = settings, data, data.classes, {}
        print(data.report())
        self.train_rows, self.validation_rows = data.split()
        if not len(self.train_rows) or not len(self.validation_rows) and not settings.overfit:
            raise UserError(
                f"{settings.data}: too few images to keep some for validation; two a class are the least, and images of one "
                "source, which files of the same name are without a SOURCES.csv, are not parted"
            )
        if settings.overfit:
            self.train_rows = self.validation_rows = self.train_rows[: settings.overfit]
        self.train_labels = data.labels[self.train_rows]
        torch.manual_seed(settings.seed)

    def start(self):
        pass

    def players(self):
        return [Player("train", self.model, self.loss)]

    def rows(self, n):
        s = self.settings
        if s.balanced:
            return self.train_rows[balanced_rows_of_update(s.seed, n, s.images, self.train_labels)]
        return self.train_rows[rows_of_update(s.seed, n, s.images, len(self.train_rows))]

    def state_dict(self):
        return {}

    def resumed(self):
        pass


class DiffusionStage(Stage):
    """What the stages share whose model generates images for labels."""

    def __init__(self, settings, data, most=10_000):
        super().__init__(settings, data)
        if settings.kernel_distance:
            if len(self.validation_rows) < 3:
                raise UserError("--kernel-distance: needs at least 3 validation images")
            if data.images.shape[1] < 32:
                raise UserError("--kernel-distance: its features need images of 32 pixels or more")
            self.compares, self.columns = True, (*self.columns, "kernel_distance", "kernel_distance_error")
            by_label = self.validation_rows[np.argsort(data.labels[self.validation_rows], kind="stable")]
            rows = spread(by_label, min(most, len(by_label)))
            self.compared_labels = data.labels[spread(rows, settings.kernel_distance)]
            self.features = offline_features(data.classes, device=settings.device)
            parts = (to_uint8(data.batch(rows[i : i + 64])[0]) for i in range(0, len(rows), 64))
            self.real_features = torch.cat([self.features(torch.from_numpy(part)).cpu() for part in parts])

    @property
    def scale(self):
        """The guidance scale of previews: the one that the thesis chose."""
        return 2.0 if self.settings.p_uncond else 1.0

    def loss(self, n, part=WHOLE):
        """The loss of update n (3.5.4), with labels dropped as in 4.4.3: a function of (seed, n) and the weights alone."""
        s = self.settings
        draw = rng(s.seed, n, 2)
        t = torch.randint(1, s.T + 1, (s.images,), generator=draw)  # uniform on {1..T}
        noise = torch.randn((s.images, *self.model.shape), generator=draw)
        u, mirror = torch.rand((2, s.images), generator=draw)
        t, noise, u = (a[part].to(s.device, non_blocking=True) for a in (t, noise, u))
        x, y = self.examples(self.rows(n)[part], ((mirror < 0.5) & s.flip)[part])
        return self.model.loss(x, drop_labels(y, self.model.zero_label, s.p_uncond, u), t, noise).mean()

    @torch.no_grad()
    def validate(self, most=1040, batch=65):
        """The loss over the validation images with fixed noise and fixed t, spread evenly over 1..T: runs compare.

        Every process takes its share; the last image stands in where shares are uneven, and counts for nothing there.
        """
        rows = spread(self.validation_rows, min(most, len(self.validation_rows)))
        draw = rng(0, 0, 3)
        t = 1 + torch.randperm(len(rows), generator=draw) * self.settings.T // len(rows)
        noise = torch.randn((len(rows), *self.model.shape), generator=draw)
        mine = np.arange(rank(), -(-len(rows) // world()) * world(), world())
        total = 0.0
        for i in range(0, len(mine), batch):
            these = np.minimum(mine[i : i + batch], len(rows) - 1)
            x, y = self.examples(rows[these])
            loss = self.model.loss(x, y, t[these].to(x.device), noise[these].to(x.device))
            total += loss[: (mine[i : i + batch] < len(rows)).sum()].sum().item()
        return {"validation_loss": across(total).item() / len(rows)}

    def preview(self, path, final=False):
        """One row a label, the zero-label last, at the scale the thesis chose; the distance from the colours asked for."""
        columns, steps = (6, 50) if final else (4, 20)
        steps = min(steps, self.settings.T)
        images = images_by_label(self.model, columns, steps=steps, scale=self.scale, progress=False)
        write_picture(draw_rows(images, self.classes), path)
        distances = mean_colour_distances(images, self.classes)
        return {} if distances is None else {"colour_distance": distances.mean().item()}

    def compare(self, steps=20):
        """5.4.1: the kernel distance of generated images from the validation images, over the features that need no download.

        Seeds are 0, 1, 2, ...; labels have the shares that the validation images have, for the letters equal ones.
        """
        y, steps = self.compared_labels, min(steps, self.settings.T)
        images = generate(self.model, y, np.arange(len(y)), steps=steps, scale=self.scale, progress=False)
        distance, error = kernel_distance_of_images(images, self.real_features, self.features)
        return {"kernel_distance": distance, "kernel_distance_error": error}


def spread(rows, n):
    """n of the rows at equal distances."""
    return rows[((np.arange(n) + 0.5) * len(rows) / n).astype(int)]


def write_picture(picture, path):
    if rank() == 0:
        with whole_file(path) as temporary:
            picture.save(temporary)


class LettersStage(DiffusionStage):
    """The conditional DDPM on letters (4.4.5)."""

    Settings = Letters
    next = "python sample.py --run {out} --text HELLO"

    def __init__(self, settings):
        super().__init__(settings, open_letters(settings.data))
        if self.classes != ALPHABET:
            self.next = "python sample.py --run {out} --grid"
        self.model = build_letters(asdict(settings), self.classes).to(settings.device)
        if settings.compile:
            self.model.unet.compile()

    def examples(self, rows, mirrored=None):
        return pixel_examples(self.data, rows, mirrored, self.settings.device)


def pixel_examples(data, rows, mirrored, device):
    """x_0 and labels of the rows, x_0 of the mirrored image where `mirrored`, (B,), says so."""
    x, y = data.batch(rows, device)
    if mirrored is not None:
        x = torch.where(mirrored.to(x.device)[:, None, None, None], x.flip(-1), x)
    return x, y


class LatentStage(DiffusionStage):
    """The latent model (3.6, 4.5): the diffusion on latents of a frozen first stage, encoded once."""

    Settings = Latent
    next = "python sample.py --run {out} --grid"
    columns = ("colour_distance",)

    def __init__(self, settings):
        s = settings
        new = s.first_stage_settings is None  # a resumed run has everything in its checkpoint
        if new:
            source = load_model(s.init) if s.init else None
            first_stage = source.first_stage if source else first_stage_for(s)
            s.first_stage_settings = source.settings["first_stage_settings"] if source else first_stage.settings
            s.size = s.size or s.first_stage_settings["size"]
        factor = 2 ** (len(s.first_stage_settings["multipliers"]) - 1 + len(s.multipliers) - 1)
        if s.size < 1 or s.size % factor:
            raise UserError(f"--size {s.size}: expected a multiple of {factor}, halvings of the first stage and the U-Net")
        super().__init__(s, open_paintings(s.data, s.size))
        self.model = build_latent(asdict(s) | {"latent_scale": s.latent_scale or 1.0}, self.classes).to(s.device)
        if new:
            self.model.first_stage.load_state_dict(first_stage.state_dict())
        if new and source:
            self.model.unet.load_state_dict(source.unet.state_dict())
            if len(source.classes) == len(self.classes):
                self.model.context.load_state_dict(source.context.state_dict())
            else:
                print(f"{s.init} knows {len(source.classes)} labels: the table of these {len(self.classes)} is new")
        if s.checkpoint_activations:
            checkpoint_activations(self.model.unet)
        if s.compile:
            self.model.unet.compile()

    def start(self):
        """The latents, once the first stage has its weights, and their scale, which a resumed run keeps."""
        s = self.settings
        self.latents = encoded(self.data, self.model.first_stage, s.flip, s.device)
        z = self.latents[self.train_rows, 0]
        mean, deviation = z.mean(dtype=np.float64), z.std(dtype=np.float64)
        s.latent_scale = self.model.latent_scale = s.latent_scale or float(1 / deviation)
        size = " x ".join(map(str, z.shape[1:]))
        print(f"latents {size}: mean {mean:.3f}, standard deviation {deviation:.3f}, scaled by {s.latent_scale:.3f}")

    resumed = start

    def examples(self, rows, mirrored=None):
        x, y = latent_examples(self.latents, self.data.labels, rows, mirrored, self.settings.device)
        return self.model.latent_scale * x, y


def latent_examples(latents, labels, rows, mirrored, device):
    """Latents as `encoded` wrote them and labels of the rows, of the mirrored image where `mirrored`, (B,), says so."""
    z = latents[rows, 0 if mirrored is None else mirrored.long().numpy()]
    return (torch.from_numpy(a).to(device, non_blocking=True) for a in (z, labels[rows]))


def first_stage_for(settings):
    """The first stage for a new latent model: the one that was named, else that in runs/vqgan, trained before if need be."""
    s, run = settings, Path(settings.first_stage or FirstStage.out)
    if not s.first_stage and not finished(run):
        print(f"no --first-stage, and no finished one in {run}: training the small one first")
        typed = {name: getattr(s, name) for name in ("data", "size", "device") if getattr(s, name) is not None}
        typed |= {"model": "small", "batch": max(1, SIZES[FirstStage]["small"]["batch"] // world())}
        resume = bool(checkpoints(run))
        train("vqgan", {} if resume else typed, resume)
    file = run / "best.pt" if (run / "best.pt").exists() else run
    model = load_model(file)
    if model.stage != "vqgan":
        raise UserError(f"--first-stage {file}: no first stage; python train.py --stage vqgan makes one")
    if model.update < model.settings["quantise_from"]:
        raise UserError(f"--first-stage {file}: saved at update {model.update}, before its code-book joined; train it further")
    print(f"first stage: {file}")
    return model


def finished(run):
    """Whether the run in this folder made all its updates, or left nothing to go on with."""
    if not (run / "model.pt").exists():
        return False
    content = read_checkpoint(run / "model.pt", {"settings", "update"})
    return content["update"] >= content["settings"]["updates"] or not checkpoints(run)


@torch.no_grad()
def encoded(data, first_stage, flip, device, batch=16):
    """4.4.7: the latents of all images of a packed set, (N, 1 or 2, C, h, w) float32; with `flip` the second of the two is
    that of the mirrored image.

    They are encoded once, into the folder of the set (the user's cache where that is read-only), under a name made from all
    that they depend on: network and weights of the first stage, the set, and flip. Older files there may be deleted.
    """
    folder = Path(data.images.filename).parent
    digest, file = hashlib.sha256((folder / "set.json").read_bytes()), (folder / "images.npy").stat()
    digest.update(f"{file.st_size} {file.st_mtime_ns} {flip} {fingerprint(first_stage)}".encode())
    cache = folder if os.access(folder, os.W_OK) else Path.home() / ".cache" / "color-diffusion"
    path = cache / f"latents-{digest.hexdigest()[:16]}.npy"
    with locked(path):  # the first process of a machine encodes, the others wait
        if not path.exists():
            h, w = (side // first_stage.factor for side in data.images.shape[1:3])
            shape = (len(data.images), 1 + flip, first_stage.z_channels, h, w)
            with whole_file(path) as temporary, temporary.open("wb") as out:
                np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": shape})
                for i in tqdm(range(0, len(data.images), batch), desc="encoding", unit="batch", disable=None):
                    x, _ = data.batch(np.arange(i, min(i + batch, len(data.images))), device)
                    z = torch.stack([first_stage.encode(x) for x in (x, x.flip(-1))[: 1 + flip]], dim=1)
                    out.write(z.float().cpu().numpy().tobytes())
    return np.load(path, mmap_mode="r")


class ClassifierStage(Stage):
    """The classifier of noised images (4.4.2)."""

    Settings = Classifier
    next = "python sample.py --guidance classifier --classifier {out} --scale 2 --grid"
    loss_name = "cross-entropy over all noise levels"
    columns = ("validation_accuracy", "validation_accuracy_ema")
    picture = "accuracy.png"

    def __init__(self, settings):
        s, guided = settings, load(settings.run)
        if space_of(guided) != s.space:
            raise UserError(f"{s.run}: no longer the model that this run began with")
        latent = guided.stage == "ldm"
        super().__init__(s, open_paintings(s.data, guided.settings["size"]) if latent else open_letters(s.data))
        if latent:
            self.latents = encoded(self.data, guided.first_stage.to(s.device), s.flip, s.device)
            self.latent_scale = guided.latent_scale
        if self.classes != guided.classes:
            raise UserError(f"--data {s.data}: its labels are not those of the model that it is to guide; leave the flag away")
        if s.run:
            self.next += f" --run {s.run}"
        self.model = build_classifier(asdict(s), self.classes).to(s.device)
        if s.compile:
            self.model.network.compile()

    def examples(self, rows, mirrored=None):
        """x_0 in the space of the diffusion and labels of the rows, see `pixel_examples` and `latent_examples`."""
        if self.settings.space == "pixels":
            return pixel_examples(self.data, rows, mirrored, self.settings.device)
        x, y = latent_examples(self.latents, self.data.labels, rows, mirrored, self.settings.device)
        return self.latent_scale * x, y

    def loss(self, n, part=WHOLE):
        """The loss of update n, at t uniform on {1..T}: a function of (seed, n) and the weights alone."""
        s = self.settings
        draw = rng(s.seed, n, 2)
        t = torch.randint(1, s.T + 1, (s.images,), generator=draw)
        noise = torch.randn((s.images, *s.shape), generator=draw)
        mirrored = (torch.rand(s.images, generator=draw) < 0.5) & s.flip
        t, noise = (a[part].to(s.device, non_blocking=True) for a in (t, noise))
        return self.model.loss(*self.examples(self.rows(n)[part], mirrored[part]), t, noise).mean()

    @torch.no_grad()
    def by_noise_level(self, rows, most=260, batch=260):
        """[(t, cross-entropy, accuracy)] at eleven noise levels from t = 1 to T, with fixed noise."""
        s, table = self.settings, []
        rows = spread(rows, min(most, len(rows)))
        noise = torch.randn((len(rows), *s.shape), generator=rng(0, 0, 3))
        for t in dict.fromkeys(max(1, s.T * i // 10) for i in range(11)):
            loss, correct = 0.0, 0
            for i in range(0, len(rows), batch):
                x, y = self.examples(rows[i : i + batch])
                log_f = self.model.log_f(self.model.diffusion.q_sample(x, t, noise[i : i + batch].to(x.device)), t)
                loss -= log_f.gather(1, y[:, None]).sum().item()
                correct += (log_f.argmax(1) == y).sum().item()
            table.append((t, loss / len(rows), correct / len(rows)))
        return table

    def validate(self):
        _, losses, accuracies = zip(*self.by_noise_level(self.validation_rows))
        return {"validation_loss": np.mean(losses).item(), "validation_accuracy": np.mean(accuracies).item()}

    def preview(self, path, final=False):
        """Accuracy by noise level as a chart; at the end as a table, too."""
        sets = {"training images": self.train_rows, "validation images": self.validation_rows}
        tables = {name: self.by_noise_level(rows) for name, rows in sets.items()}
        title = f"Accuracy by noise level t, {len(self.classes)} labels"
        rows = [{"label": f"{t}", "set": name, "accuracy": a} for name, table in tables.items() for t, _, a in table]
        write_picture(bars(rows, "accuracy", title), path)
        if final:
            lines = [f"{'t':>5}" + "".join(f"{name:>20}" for name in tables)]
            lines += [f"{of_t[0][0]:5}" + "".join(f"{100 * a:18.1f} %" for _, _, a in of_t) for of_t in zip(*tables.values())]
            print("\n".join(lines))
        return {}


class AutoencoderStage(Stage):
    """The first stage (3.1 to 3.4.1): an auto-encoder and, from `disc_start` on, its adversary."""

    Settings = FirstStage
    next = "python sample.py --reconstruct IMAGE --run {out}"
    loss_name = "reconstruction loss: L1 + perceptual (the NLL of 4.4.7)"
    columns = (
        *("l1", "perceptual", "latent_loss", "codes_used", "perplexity"),
        *("g_loss", "lambda", "disc_loss", "disc_grad_norm", "logit_real", "logit_fake"),
        *("validation_psnr", "validation_psnr_ema", "validation_sharpness", "validation_sharpness_ema"),
    )

    def __init__(self, settings):
        s, device = settings, settings.device
        super().__init__(s, embedded_letters() if s.data == "letters" else open_paintings(s.data, s.size))
        self.model = build_first_stage(asdict(s)).to(device)
        self.discriminator = PatchDiscriminator(s.disc_channels, s.disc_layers).to(device)
        self.perceptual = load_perceptual(s.perceptual_files).to(device) if s.perceptual else None
        self.counts = torch.zeros(s.codes, dtype=torch.long, device=device)  # of the codes, since the epoch began
        self.best_from = 1 + max(s.disc_start if s.adversarial else 0, s.quantise_from if s.bottleneck == "vq" else 0)
        if s.compile:
            net = self.model
            for part in (net.encoder, net.decoder.mid, *net.decoder.up):  # not the last layer: lambda keeps its graph
                part.compile()

    def start(self):
        """Weights to start from (4.4.7, fine-tuning)."""
        if self.settings.init:
            self.model.load_state_dict(load_model(self.settings.init).state_dict())
            adversary = published_losses(self.settings.init).get("discriminator")
            if adversary and self.settings.adversarial:
                load_weights(self.discriminator, adversary, self.settings.init)

    def players(self):
        s = self.settings
        players = [Player("train", self.model, self.loss, idle=s.bottleneck == "vq" and s.quantise_from > 0)]
        if s.adversarial:
            players.append(Player("disc", self.discriminator, self.discriminator_loss, (0.5, 0.9), start=s.disc_start))
        return players

    def images(self, rows, draw, part=WHOLE):
        """Random squares of `crop` pixels from `rows[part]` of the images, half of them mirrored with `flip`."""
        s = self.settings
        height, width = self.data.images.shape[1:3]
        corners = (torch.rand((len(rows), 2), generator=draw) * torch.tensor([height - s.crop + 1, width - s.crop + 1])).int()
        places = zip(rows[part], corners[part].tolist())
        x = to_tensor(np.stack([self.data.images[row, y : y + s.crop, x : x + s.crop] for row, (y, x) in places]))
        if s.flip:
            mirror = torch.rand(len(rows), generator=draw)[part, None, None, None]
            x = torch.where(mirror < 0.5, x.flip(-1), x)
        return x.to(s.device, non_blocking=True)  # (B, 3, crop, crop)

    def noise(self, count, draw):
        """xi of the reparametrisation; only a VAE uses it."""
        side = self.settings.crop // self.model.factor
        return torch.randn((count, self.model.z_channels, side, side), generator=draw)

    def loss(self, n, part=WHOLE):
        """The auto-encoder's loss of update n:  |x - x_r| + perceptual + latent loss + lambda * adversarial  (eq. 3.5)."""
        s = self.settings
        if s.bottleneck == "vq":
            self.model.quantize.active = n >= s.quantise_from
            if n == s.quantise_from > 0:
                self.reseed(n, range(s.codes))
        draw = rng(s.seed, n, 2)
        x = self.images(self.rows(n), draw, part)
        x_r, latent_loss, codes = self.model(x, self.noise(s.images, draw)[part].to(x.device))
        rec = self.reconstruction_loss(x, x_r)
        loss = rec.mean() + latent_loss
        self.figures = {"l1": (x_r - x).abs().mean(), "latent_loss": latent_loss}
        if self.perceptual:
            self.figures["perceptual"] = rec.mean() - self.figures["l1"]
        if s.adversarial and n >= s.disc_start:
            with frozen(self.discriminator):
                g_loss = generator_loss(self.discriminator(x_r), s.adversarial_loss)
            last_layer = self.model.decoder.conv_out.weight
            weight = adaptive_weight(rec.mean(), g_loss, last_layer, mean_across) if s.adaptive else 1.0
            loss = loss + s.adversarial * weight * g_loss
            self.figures |= {"g_loss": g_loss, "lambda": torch.as_tensor(weight)}
        self.seen = x, x_r.detach()  # what the discriminator gets
        if codes is not None:
            self.count(n, codes)
        return loss

    def discriminator_loss(self, n, part=WHOLE):
        """The adversary's loss on what the auto-encoder just saw and made."""
        real, fake = (self.discriminator(x) for x in self.seen)
        self.figures |= {"logit_real": real.mean(), "logit_fake": fake.mean()}
        return discriminator_loss(real, fake, self.settings.adversarial_loss)

    def reconstruction_loss(self, x, x_r):
        """L1 + weight * perceptual, (B,): with Laplace-distributed pixels the NLL up to a constant (E16)."""
        rec = (x - x_r).abs().mean((1, 2, 3))
        return rec + self.settings.perceptual * self.perceptual(x, x_r) if self.perceptual else rec

    def count(self, n, codes):
        """At the end of an epoch (or of 50 updates, if that is longer): how many codes it used; the others get a new place."""
        s = self.settings
        self.counts += across(torch.bincount(codes.flatten(), minlength=s.codes))
        if (n + 1) % max(50, -(-len(self.train_rows) // s.images)):
            return
        used, perplexity = code_use(self.counts)
        self.figures |= {"codes_used": torch.tensor(float(used)), "perplexity": torch.tensor(perplexity)}
        if s.reseed and used < s.codes:
            self.reseed(n, torch.nonzero(self.counts == 0)[:, 0].tolist())
        self.counts.zero_()

    @torch.no_grad()
    def reseed(self, n, dead):
        """Put the codes `dead` on latent vectors of images, drawn at random."""
        draw = rng(self.settings.seed, n, 4)
        rows = self.train_rows[torch.randint(len(self.train_rows), (32,), generator=draw).numpy()]
        z = torch.cat([self.model.encode(x) for x in self.images(rows, draw).split(8)])
        z = z.permute(0, 2, 3, 1).flatten(0, 2)  # (N, D)
        weight = self.model.quantize.embedding.weight
        weight[list(dead)] = z[torch.randint(len(z), (len(dead),), generator=draw).to(z.device)]
        if world() > 1:  # the same images, but not everywhere the same rounding
            dist.broadcast(weight, 0)

    @torch.no_grad()
    def validate(self, most=256, batch=16):
        """Of fixed squares of the validation images: reconstruction loss, PSNR, and sharpness, the gradient energy of the
        reconstructions as a share of the originals'."""
        s = self.settings
        rows = np.repeat(self.validation_rows, 4 if s.crop < s.size else 1)
        rows = rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)]
        x = self.images(rows, rng(0, 0, 3))
        total = torch.zeros(4)
        for part in x.split(batch):
            x_r = self.model(part)[0]
            of_images = (self.reconstruction_loss(part, x_r), psnr(part, x_r), gradient_energy(x_r), gradient_energy(part))
            total += torch.stack([value.sum() for value in of_images]).cpu()
        loss, decibel, energy, energy_of_x = (total / len(x)).tolist()
        sharpness = energy / max(energy_of_x, 1e-6)
        return {"validation_loss": loss, "validation_psnr": decibel, "validation_sharpness": sharpness}

    @torch.no_grad()
    def preview(self, path, final=False):
        """Figure 4.9: validation images over their reconstructions."""
        columns = 12 if final else 8
        rows = self.validation_rows[np.linspace(0, len(self.validation_rows) - 1, 2 * columns).astype(int)]
        x = self.images(rows, rng(0, 0, 5))
        pairs = torch.stack([x.view(2, columns, *x.shape[1:]), self.model(x)[0].view(2, columns, *x.shape[1:])], dim=1)
        write_picture(grid(to_uint8(pairs.flatten(0, 2)), columns, ["x", "x_r"] * 2, scale=max(1, 128 // x.shape[-1])), path)
        return {}

    def state_dict(self):
        return {"counts": self.counts}


@contextlib.contextmanager
def frozen(network):
    """Gradients flow through `network` inside this `with`, but not into it: the generator's step leaves none behind."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)


STAGES = {"letters": LettersStage, "vqgan": AutoencoderStage, "ldm": LatentStage, "classifier": ClassifierStage}


# ------------------------------------------------------------------------------------------------------------------
# 5.2  Averaged weights, learning rate, log
# ------------------------------------------------------------------------------------------------------------------


class EMA:
    """5.2: a running average of what is trained, and of nothing else; decay min(decay, (1 + n)/(10 + n)) after update n.

    Averaging runs alongside training and does not train (E62).
    """

    def __init__(self, model, decay):
        self.decay = decay
        self.names, self.parameters = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))
        self.average = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, n):
        decay = min(self.decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(shares(self.average), shares(self.parameters), 1 - decay)

    @contextlib.contextmanager
    def averaged(self):
        """The model has the averaged weights inside this `with`."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self):
        for p, average in zip(shares(self.parameters), shares(self.average)):  # in place: FSDP knows them by their memory
            raw = p.clone()
            p.copy_(average)
            average.copy_(raw)

    def state_dict(self):
        return dict(zip(self.names, self.average))


def learning_rate(settings, n):
    """Linear warm-up, then linear decay, to 0 at the update after the last."""
    warmup = min(1, (n + 1) / max(1, settings.warmup))
    return settings.lr * warmup * min(1, (settings.updates - n) / max(1, settings.updates - settings.warmup))


class Log:
    """log.csv, written by process 0. A resumed run drops the lines past its checkpoint and goes on under a new run number.

    update_seconds: of an update; communication: the share of them that its communication takes on its own, what overlaps with
    computing included; memory: the most that a process had so far, MiB.
    """

    COLUMNS = (
        *("run", "update", "epoch", "seconds", "update_seconds", "communication", "memory", "lr"),
        *("train_loss", "train_grad_norm", "validation_loss"),
    )

    def __init__(self, path, run, start, more=()):
        self.path, self.columns = path, (*self.COLUMNS, "validation_loss_ema", *more)
        if rank():
            return
        kept = [row for row in self.rows() if int(row["update"]) <= start] if run > 1 else []
        with whole_file(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(kept)

    def rows(self):
        return log_rows(self.path) if self.path.exists() else []

    def write(self, row):
        if rank():
            return
        row = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns, restval="").writerow(row)


def log_rows(path):
    text = path.read_text()
    whole_lines = text[: text.rfind("\n") + 1]  # a power cut may leave half a line
    return list(csv.DictReader(whole_lines.splitlines()))


class Means:
    """Averages of named numbers since they were last taken, over all processes; the device is asked for them only then."""

    def __init__(self):
        self.sums, self.counts = {}, {}

    def add(self, values):
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()
            self.counts[name] = self.counts.get(name, 0) + 1

    def take(self):
        means = {name: mean_across(total / self.counts[name]).item() for name, total in self.sums.items()}
        self.__init__()
        return means


def draw_losses(rows, path, loss_name):
    """5.2: the loss chart of a log's rows, training and validation; interruptions stay visible as gaps."""
    pieces = [[row for row in rows if row["run"] == run] for run in sorted({row["run"] for row in rows}, key=int)]
    names = {"train_loss": "training", "validation_loss": "validation", "validation_loss_ema": "validation, averaged weights"}
    lines = {
        name: [
            ([int(row["update"]) for row in piece if row[column]], [float(row[column]) for row in piece if row[column]])
            for piece in pieces
        ]
        for column, name in names.items()
    }
    with whole_file(path) as temporary:
        chart(lines, "Loss", "update", loss_name).save(temporary)


# ------------------------------------------------------------------------------------------------------------------
# 4.7  Several processes
#
# torchrun starts R processes, on one machine or on several, and each of them runs this file. Update n has the images, noise
# and labels that it would have in one process; each process computes the loss of every R-th of them.
#
#   ddp     every process has all weights. Gradients are averaged during and after the backward pass, before the optimiser's
#           step; the thesis says before back-propagation, where there are none yet (E57)
#   fsdp    every process has 1/R of every weight, and of its gradient, moments and average. The weights of a block are
#           gathered right before its forward and again before its backward pass, after which its gradients are averaged and
#           scattered. Layers are not dealt out one by one, and offloading does not move activations (E59)
#
# The networks know nothing of it: blocks are wrapped once they are built.
# ------------------------------------------------------------------------------------------------------------------


def join(device="auto"):
    """Find the other processes that torchrun started; without torchrun this one is alone."""
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    gpus, local_rank = 0 if device == "cpu" else torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    if gpus and local_rank >= gpus:
        raise UserError(f"process {local_rank} of this machine has no GPU of its own: there are {gpus}; see --nproc-per-node")
    if gpus:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(hours=2), **alone)
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  one process speaks


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def across(value, op=dist.ReduceOp.SUM):
    """A number or tensor, summed over all processes."""
    value = torch.as_tensor(value, dtype=None if torch.is_tensor(value) else torch.float64)
    if world() > 1:
        value = value.detach().clone()
        dist.all_reduce(value, op)
    return value


def mean_across(value):
    return across(value) / world()


def parallel(players, settings):
    """Spread the players' networks over the processes as the settings ask."""
    if settings.strategy != "single" and not dist.is_initialized():
        join()
    for player in players:
        if settings.strategy == "fsdp":
            shard(player.network, settings)
        if settings.strategy == "ddp":
            whole = LossModule(player.network, player.loss)
            player.loss = DistributedDataParallel(whole, find_unused_parameters=player.idle, gradient_as_bucket_view=True)


class LossModule(torch.nn.Module):
    """A player's loss as a module, which is what DDP wraps."""

    def __init__(self, network, loss):
        super().__init__()
        self.network, self.forward = network, loss


def shard(model, settings):
    """FSDP: every residual block and transformer of the U-Net is a unit, the rest of it another, the label table the last."""
    gpu = settings.device != "cpu"
    how = {
        "mesh": init_device_mesh("cuda" if gpu else "cpu", (world(),)),
        "reshard_after_forward": True,  # the last unit as well: a validation has no backward pass that would do it
        "mp_policy": MixedPrecisionPolicy(*[torch.bfloat16, torch.float32] * (settings.precision == "bf16")),
        "offload_policy": CPUOffloadPolicy(pin_memory=gpu) if settings.cpu_offload else OffloadPolicy(),
    }
    for part in (model.unet, model.context):
        part.to(memory_format=torch.contiguous_format)  # fully_shard knows no other
        for unit in blocks_of(part):
            fully_shard(unit, **how)
        fully_shard(part, **how)


def unsynchronised(loss, last):
    """DDP: only the last of the batches of an update averages gradients. FSDP always does: whole gradients would not fit."""
    return loss.no_sync() if isinstance(loss, DistributedDataParallel) and not last else contextlib.nullcontext()


def shares(tensors):
    """Of sharded tensors what this process has of them."""
    return [x.to_local() if isinstance(x, DTensor) else x for x in tensors]


def whole_tensor(value):
    """The whole of a sharded tensor. All processes must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def whole_tensors(state):
    """A state dict with whole tensors in the memory of process 0's CPU. All processes must call it."""
    whole = {}
    for name, value in state.items():
        value = whole_tensor(value)
        whole[name] = value.cpu() if rank() == 0 else None
    return whole


def communication_seconds(players, settings):
    """How long the collective operations of an update take on their own: an all-reduce of the gradients, for fsdp two
    gatherings of the weights and a scattering of the gradients."""
    if world() == 1:
        return 0.0
    count = sum(p.numel() for player in players for p in player.parameters)
    piece = min(2**23, -(-count // world()) * world())
    bf16 = settings.strategy == "fsdp" and settings.precision == "bf16"
    whole = torch.zeros(piece, device=settings.device, dtype=torch.bfloat16 if bf16 else torch.float32)
    gradient, mine = torch.zeros(piece, device=settings.device), piece // world()

    def update(pieces):
        for _ in range(pieces):
            if settings.strategy == "ddp":
                dist.all_reduce(gradient)
                continue
            for _ in range(settings.accumulate):
                dist.all_gather_single(whole, whole[:mine].clone())
                dist.all_gather_single(whole, whole[:mine].clone())
                dist.reduce_scatter_single(gradient[:mine].clone(), gradient)
        return gradient.sum().item()  # waits for the device

    update(1)
    start = time.perf_counter()
    update(-(-count // piece))
    return time.perf_counter() - start


def resident_peak():
    """The most memory that this process ever had, MiB; 0 where the system does not say. (What getrusage says is inherited.)"""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def peak_memory(settings):
    """The most memory that a process of the run had so far, MiB: of its GPU, or of the whole process on a CPU."""
    peak = resident_peak() if settings.device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
    return across(peak, dist.ReduceOp.MAX).item()


# ------------------------------------------------------------------------------------------------------------------
# 4.7  What fits on a small GPU
# ------------------------------------------------------------------------------------------------------------------


def blocks_of(unet):
    """The residual blocks and transformers: the units of activation checkpointing and of FSDP."""
    return [module for module in unet.modules() if isinstance(module, ResBlock | SpatialTransformer)]


def checkpoint_activations(unet):
    """Keep only what goes into every block of the U-Net; what happens inside is computed again when the gradient needs it."""
    for block in blocks_of(unet):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def memory_per_process(parameters, largest, frozen, strategy, processes=1, offload=False):
    """What a process holds whatever the batch, in numbers of 4 bytes, by kind (E58, E59).

    parameters: how many are trained; largest: of those the most in one unit of `shard`; frozen: those of the first stage.
    FSDP holds a share of everything, and gathered two units, one at work and one coming, and one's whole gradient.
    """
    share = -(-parameters // processes) if strategy == "fsdp" else parameters
    here = {"weights": share, "gradients": share, "moments": 2 * share, "average": share}
    if offload:
        here = dict.fromkeys(here, 0)
    return here | {"gathered": 3 * largest if strategy == "fsdp" else 0, "first stage": frozen}


def activation_bytes(model, batch):
    """What the forward pass of a batch keeps for the gradient, in bytes: all of it, and with --checkpoint-activations, which
    keeps what goes into every block and, one block at a time, what happens inside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, inputs, inside = {}, {}, []

    def keep(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    def enter(block, arguments):
        inputs[arguments[0].data_ptr()] = arguments[0].nbytes
        inside.append(-sum(kept.values()))

    def leave(block, arguments, output):
        inside[-1] += sum(kept.values())

    hooks = [
        hook for b in blocks_of(model.unet) for hook in (b.register_forward_pre_hook(enter), b.register_forward_hook(leave))
    ]
    z, y = torch.randn(batch, *model.shape), torch.zeros(batch, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model.loss(z, y, torch.full_like(y, 500), torch.randn_like(z))
    del loss  # only now: while it lived, all that it keeps did, and no memory was counted under two names
    for hook in hooks:
        hook.remove()
    total = sum(kept.values())
    return total, total - sum(inside) + sum(inputs.values()) + max(inside)


def untrained_latent(size, settings):
    """A latent model on the first stage of `size`, both with random weights; `settings` are those of the latent model."""
    first_stage = SIZES[FirstStage][size] | {"beta": 0.25, "released": False, "kl_weight": 0.0}
    more = {"first_stage_settings": first_stage, "size": settings.get("size") or first_stage["size"], "latent_scale": 1.0}
    return build_latent({"attention_levels": None} | settings | more, list(COLOURS))


def plan(typed):
    """The table of `--plan`: what a process holds, and how many images it can compute at a time on GPUs of so many GB."""
    gigabytes, s = typed.pop("plan"), Latent(**typed)
    if not 0 < gigabytes < math.inf:
        raise UserError(f"--plan {gigabytes}: expected the gigabytes of a GPU, such as 11")
    complete(s)
    model = untrained_latent(s.model, asdict(s))
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.first_stage.parameters())
    units = [sum(p.numel() for p in block.parameters()) for block in blocks_of(model.unet)]
    largest = max(*units, parameters - sum(units))
    with torch.autocast("cpu", torch.bfloat16, enabled=s.precision == "bf16", cache_enabled=False):
        (one, few), (two, less) = activation_bytes(model, 1), activation_bytes(model, 2)
    image, small_image = two - one, less - few
    print(f"{parameters:,} parameters to train, {frozen:,} in the first stage; {s.precision}; a process holds, in 10^9 bytes:")
    cases = [("single", 1, False), ("ddp", 2, False), *(("fsdp", r, False) for r in (1, 2, 4, 8)), ("fsdp", 2, True)]
    for strategy, processes, offload in cases:
        held = memory_per_process(parameters, largest, frozen, strategy, processes, offload)
        free = 0.92 * gigabytes * 1e9 - 4 * sum(held.values())  # 8 % for CUDA itself and what lies between the tensors
        fit = max(0, int((free - (one - image)) / image))
        more = max(0, int((free - (few - small_image)) / small_image))
        print(f"{strategy}, {processes} processes" + ", --cpu-offload" * offload)
        print("    " + ", ".join(f"{kind} {4 * count / 1e9:.2f}" for kind, count in held.items() if count))
        print(f"    on {gigabytes:g} GB --batch {fit} fits, with --checkpoint-activations {more}")
    print(f"an image adds {image / 1e9:.2f}, with --checkpoint-activations {small_image / 1e9:.2f}")


# ------------------------------------------------------------------------------------------------------------------
# Checkpoints
#
# A folder checkpoint_<update> holds run.pt (settings and progress) and, in the format of torch.distributed.checkpoint, the
# tensors: weights, AdamW's moments, averages. Sharded or whole, it opens under any strategy and number of processes. The two
# newest are kept. Files inside are read as tensors and plain values only.
# ------------------------------------------------------------------------------------------------------------------

KEPT = 2
PROGRESS = {"stage", "settings", "update", "run", "seconds", "best"}


def checkpoints(out):
    """The checkpoints of a run, the newest first."""
    return sorted(out.glob("checkpoint_*"), reverse=True)


def run_tensors(players, ema, stage):
    """Everything that a resumed run needs, by name. The tensors are the run's own, not copies."""
    tensors = {f"ema.{name}": value for name, value in ema.state_dict().items()}
    tensors |= {f"stage.{name}": value for name, value in stage.state_dict().items()}
    for player in players:
        tensors |= {f"{player.name}.{name}": value for name, value in player.network.state_dict().items()}
        for name, p in player.network.named_parameters():
            state = player.optimizer.state.get(p, {})
            tensors |= {f"{player.name}_adamw.{name}.{key}": value for key, value in state.items()}
    return tensors


def save_checkpoint(out, progress, tensors):
    """Write a checkpoint, whole or not at all, and let go of old ones. All processes must call it."""
    path = out / f"checkpoint_{progress['update']:08d}"
    temporary = out / f".{path.name}"
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True, exist_ok=True)  # other processes may be here already
    try:
        in_dcp(dcp.save, tensors, storage_writer=dcp.FileSystemWriter(temporary))
    except dcp.api.CheckpointException as error:
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"cannot write {path}: {root_cause(error)}; nothing was changed") from error
    if rank() == 0:
        files = {place.relative_path for place in Reader(temporary).read_metadata().storage_data.values()}
        if not all((temporary / file).exists() for file in files):
            raise UserError(f"{out}: not every process writes there; several machines need one folder that they share")
        write_checkpoint(temporary / "run.pt", progress)
        remove_folder(path)
        os.replace(temporary, path)
        for old in checkpoints(out)[KEPT:]:
            remove_folder(old)


def remove_folder(path):
    """Gone from the list at once, and then from the disk."""
    if path.exists():
        hidden = path.with_name(f".old-{path.name}")
        os.replace(path, hidden)
        shutil.rmtree(hidden)


def remove_leftovers(out):
    """What a killed process left half written."""
    for path in [*out.glob(".checkpoint_*"), *out.glob(".old-checkpoint_*"), *out.glob(".[0-9]*-*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def newest_progress(out):
    """settings, update, ... of the newest checkpoint that can be read."""
    if not checkpoints(out):
        raise UserError(f"{out}: no checkpoint there to go on from; without --resume a run begins")
    for path in checkpoints(out):
        try:
            return read_checkpoint(path / "run.pt", PROGRESS)
        except UserError as error:
            print(f"{error}; trying the one before")
    raise UserError(f"{out}: none of its checkpoints can be read")


def load_checkpoint(out, players, ema, stage):
    """Read the newest checkpoint that can be read into the run. Returns its progress."""
    for path in checkpoints(out):
        try:
            progress = names = problem = None
            try:
                progress, reader = read_checkpoint(path / "run.pt", PROGRESS), Reader(path)
                names = reader.read_metadata().state_dict_metadata
            except (OSError, pickle.UnpicklingError, UserError) as error:
                problem = error
            if across(float(problem is not None), dist.ReduceOp.MAX):
                raise problem or UserError("another process cannot read it")
            for player in players:
                player.optimizer.state.clear()
                for name, p in player.network.named_parameters():
                    if f"{player.name}_adamw.{name}.step" in names:
                        moments = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
                        player.optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
            with torch.no_grad():
                in_dcp(dcp.load, run_tensors(players, ema, stage), storage_reader=reader, planner=TensorsOnly())
            return progress
        except (dcp.api.CheckpointException, OSError, pickle.UnpicklingError, UserError) as error:
            print(f"{path} cannot be read ({root_cause(error)}); trying the one before")
    raise UserError(f"{out}: none of its checkpoints can be read")


def in_dcp(function, tensors, **how):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        function(tensors, no_dist=not dist.is_initialized(), **how)


def root_cause(error):
    """What went wrong, in a line."""
    if isinstance(error, dcp.api.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    error = error.__context__ if isinstance(error.__context__, OSError) else error
    return str(getattr(error, "strerror", None) or error).strip().split("\n")[0]


class Reader(dcp.FileSystemReader):
    """DCP's reader of files. Their table of contents is a pickle, in which only DCP's own names are let through."""

    NAMES = {
        "torch.distributed.checkpoint.metadata": {
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties"),
            *("ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),  # not BytesStorageMetadata: DCP would unpickle what it names
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch": {"Size", "float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool"},
        "torch.serialization": {"_get_layout"},
        "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    }

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if name not in Reader.NAMES.get(module, ()):
                raise pickle.UnpicklingError(f"it asks to run {module}.{name}")
            return super().find_class(module, name)

    def read_metadata(self, *args, **kwargs):
        try:
            with (self.path / ".metadata").open("rb") as file:
                metadata = self.Unpickler(file).load()
            if not isinstance(metadata, dcp.Metadata):
                raise pickle.UnpicklingError("it is none")
            return metadata
        except OSError:
            raise
        except Exception as error:  # a damaged pickle may raise anything
            raise pickle.UnpicklingError(f"its table of contents is damaged: {error}") from error


class TensorsOnly(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item, value):
        raise pickle.UnpicklingError("it holds more than tensors")


# ------------------------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------------------------


class Interruption:
    """Ctrl-C and SIGTERM ask for a stop after the current update; a second Ctrl-C does not wait."""

    def __init__(self):
        self.signal = None
        self.before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}

    def end(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __call__(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self):
        """The signal that any process got, 0 for none."""
        return int(across(float(self.signal or 0), dist.ReduceOp.MAX))


def train(stage_name, typed, resume):
    Stage = STAGES[stage_name]
    out = Path(typed.get("out", Stage.Settings.out))
    if not resume and checkpoints(out):
        raise UserError(f"{out} already holds a run: --resume goes on with it, --out DIR starts another")
    if not resume and (out / "model.pt").exists():
        raise UserError(f"{out} already holds a model, without a checkpoint to go on from: --out DIR starts another run")
    settings = restore(stage_name, newest_progress(out), typed) if resume else Stage.Settings(**typed)
    complete(settings)
    stage = Stage(settings)
    model, players = stage.model, stage.players()
    if not resume:
        stage.start()
    start, run, before, best = 0, 1, 0.0, math.inf
    parallel(players, settings)
    for player in players:
        player.parameters = [p for p in player.network.parameters() if p.requires_grad]
        player.optimizer = torch.optim.AdamW(
            player.parameters, settings.lr, betas=player.betas, weight_decay=settings.weight_decay, fused=True
        )
    ema = EMA(model, settings.ema)
    if resume:
        saved = load_checkpoint(out, players, ema, stage)
        stage.resumed()
        start, run, before, best = saved["update"], saved["run"] + 1, saved["seconds"], saved["best"]

    if rank() == 0:
        remove_leftovers(out)
    epoch = len(stage.train_rows) / settings.images  # updates
    print(describe(settings, players[0], epoch))
    alone = communication_seconds(players, settings)
    log, means = Log(out / "log.csv", run, start, stage.columns), Means()
    autocast = mixed_precision(settings)
    stop = Interruption()
    bar = tqdm(total=settings.updates, initial=start, unit="update", smoothing=0.05, disable=True if rank() else None)
    parts = [slice(i * world() + rank(), None, settings.accumulate * world()) for i in range(settings.accumulate)]
    clock = time.perf_counter() - before
    mark, counted = time.perf_counter(), start

    for n in range(start, settings.updates):
        for player in players:
            if n < player.start:
                continue
            player.optimizer.param_groups[0]["lr"] = learning_rate(settings, n)
            total = 0.0
            for part in parts:
                with unsynchronised(player.loss, last=part is parts[-1]):
                    with autocast:
                        loss = player.loss(n, part) / settings.accumulate
                    loss.backward()
                total = total + loss.detach()
            norm = whole_tensor(torch.nn.utils.clip_grad_norm_(player.parameters, settings.clip))
            player.optimizer.step()
            player.optimizer.zero_grad()
            means.add({f"{player.name}_loss": total, f"{player.name}_grad_norm": norm})
        ema.update(n + 1)
        means.add(stage.figures)
        bar.update()

        done = n + 1
        stopping = stop.agreed()  # asked once: a signal that comes later waits for the next update
        last = done == settings.updates or stopping
        save = last or done % settings.save_every == 0
        validate = not stopping and (last or done % settings.validate_every == 0)
        preview = not stopping and (last or done % settings.preview_every == 0)
        if not (save or validate or preview or done % 10 == 0):
            continue
        row = {"update": done, "epoch": done / epoch, "lr": learning_rate(settings, n), **means.take()}
        row["update_seconds"] = (time.perf_counter() - mark) / (done - counted)
        row |= {"communication": alone / row["update_seconds"], "memory": peak_memory(settings)}
        images = (bar.format_dict["rate"] or 0) * settings.images
        bar.set_postfix_str(f"loss {row['train_loss']:.4f}, {images:.0f} images/s")
        with autocast:
            if validate:
                row |= stage.validate()
                with ema.averaged():
                    row |= {f"{name}_ema": value for name, value in stage.validate().items()}
            if not all(map(math.isfinite, row.values())):
                bar.close()
                raise UserError(
                    f"the loss or its gradient is no longer finite at update {done}; stopped without saving, "
                    f"earlier checkpoints are untouched. Try a smaller --lr or --precision float32"
                )
            if preview and not last:
                stage.preview(out / f"preview_{done:06d}_raw.png")
            if preview:
                with ema.averaged():
                    row |= stage.preview(out / (stage.picture if last else f"preview_{done:06d}.png"), final=last)
                    row |= stage.compare() if stage.compares else {}
        seconds = time.perf_counter() - clock
        log.write({"run": run, "seconds": seconds, **row})
        better = validate and stage.best_from is not None and done >= stage.best_from and row["validation_loss_ema"] < best
        best = row["validation_loss_ema"] if better else best
        if save or better:
            raw = whole_tensors(model.state_dict())
            weights = {"raw": raw, "ema": raw | whole_tensors(ema.state_dict())}
        if better and rank() == 0:
            save_model(out / "best.pt", stage_name, asdict(settings), stage.classes, done, weights)
        if save and rank() == 0:
            save_model(out / "model.pt", stage_name, asdict(settings), stage.classes, done, weights)
            draw_losses(log.rows(), out / "loss.png", stage.loss_name)
        if save:  # last: what a kill before it loses is computed again, with all that was written
            progress = {
                "stage": stage_name,
                "settings": asdict(settings),
                "update": done,
                "run": run,
                "seconds": seconds,
                "best": best,
            }
            save_checkpoint(out, progress, run_tensors(players, ema, stage))
        if stopping:
            bar.close()
            across(0.0)  # torchrun kills all, soon after the first has left
            print(f"stopped after update {done} and saved; to go on: {resume_command(stage_name, out)}")
            sys.exit(128 + stopping)
        mark, counted = time.perf_counter(), done

    bar.close()
    stop.end()
    across(0.0)  # what process 0 has written is there for all
    print(f"{out / stage.picture} shows what the model can do; next: {stage.next.format(out=out)}")


def describe(settings, player, epoch):
    """What is about to be trained, in a line."""
    s, size = settings, sum(p.numel() for p in player.parameters) / 1e6
    factors = [f"{s.processes} processes ({s.strategy})"] * (s.processes > 1)
    factors += [f"{s.accumulate} batches"] * (s.accumulate > 1) + [f"{s.batch} images"]
    images = f"{s.images}" if len(factors) == 1 else f"{s.images} = {' x '.join(factors)}"
    return f"{size:.1f}M parameters; {s.updates:,} updates of {images}, {s.updates / epoch:.1f} epochs"


def restore(stage_name, saved, typed):
    """The settings of a saved run; of what was typed, only fields marked `resume` may differ."""
    if saved["stage"] != stage_name:
        raise UserError(f"--stage {stage_name}: the run there is one of --stage {saved['stage']}")
    settings = STAGES[stage_name].Settings(**saved["settings"])
    images = settings.images
    for f in fields(settings):
        value = typed.get(f.name, getattr(settings, f.name))
        value = tuple(value) if isinstance(value, list) else value
        if value != getattr(settings, f.name) and not f.metadata.get("resume"):
            old = getattr(settings, f.name)
            raise UserError(f"{option(f.name)} was {old} when this run began; another value needs a new --out DIR")
        setattr(settings, f.name, value)
    moved, settings.processes = settings.processes != world(), world()
    if "accumulate" not in typed:
        settings.accumulate = math.gcd(settings.accumulate, max(1, images // settings.processes))
    if "batch" not in typed:
        settings.batch = max(1, images // (settings.accumulate * settings.processes))
    if settings.images != images:
        factors = f"{settings.processes} processes x --accumulate {settings.accumulate} x --batch {settings.batch}"
        raise UserError(f"an update of this run has {images} images; {factors} are {settings.images}")
    if "strategy" not in typed and moved:
        settings.strategy = "auto"
    if "cpu_offload" not in typed and settings.strategy != "fsdp":
        settings.cpu_offload = False  # as it was: only fsdp has it
    return settings


def resume_command(stage_name, out):
    where = "" if str(out) == STAGES[stage_name].Settings.out else f" --out {out}"
    program = f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', 1)}" if "RANK" in os.environ else "python"
    return f"{program} train.py --stage {stage_name} --resume{where}"


def main():
    stage, typed, resume = parse()
    if "plan" in typed:
        plan(typed)
        return
    if "chart" in typed:
        draw_chart(stage, typed)
        return
    program = partial(train, stage, typed, resume)
    if "RANK" in os.environ:
        in_company(program, typed.get("device", "auto"))
    else:
        program()
    if dist.is_initialized():
        dist.destroy_process_group()


def draw_chart(stage, typed):
    """--chart: the losses of a run (5.2), from its log."""
    log = Path(typed.get("out", STAGES[stage].Settings.out)) / "log.csv"
    if not log.exists():
        raise UserError(f"{log}: no such file; {what_makes(log)}")
    draw_losses(log_rows(log), picture_name(typed["chart"]), STAGES[stage].loss_name)
    print(f"{typed['chart']}: the losses of {log}")


def in_company(program, device="auto"):
    """Run it as one of torchrun's processes: what stops them all is said once, and a finished one exits with 0."""

    def let_others_speak():
        """Of what stops all, process 0 or the one whose disk is full speaks first; torchrun then ends this one."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(2)

    def speak_in_turn():
        join(device)
        try:
            program()
        except UserError:
            if rank():
                let_others_speak()
            raise
        except RuntimeError as error:
            if not any(word in str(error) for word in ("gloo", "NCCL", "Connection")):
                raise
            cause = str(error).strip().split("\n")[0]
            raise UserError(f"another process is gone ({cause}); --resume goes on from the last checkpoint") from error

    code = 0
    try:
        run_program(speak_in_turn)
    except SystemExit as end:
        code = end.code
    if dist.is_initialized() and code == 0:
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a thread of gloo's, still there, would abort one exit in ten


if __name__ == "__main__":
    run_program(main)
