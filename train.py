"""Training: sections 3.5.4, 4.4.5, 4.4.7, 4.5, 4.7 and 5.2 of the thesis.

    python train.py --stage letters               the conditional pixel DDPM on 32 x 32 letters
    python train.py --stage vqgan                 the first stage: AE, VAE, VQ-VAE or VQ-GAN
    python train.py --stage ldm                   the latent model: paintings by colour
    python train.py --stage classifier            a classifier of noised images, for guidance
    python train.py --stage letters --resume      continue exactly where the run stopped
    torchrun --nproc-per-node 2 train.py --stage ldm        with two GPUs, or two CPU processes

A run writes to runs/<stage>: model.pt (sample.py opens it), checkpoint_<update>.pt (--resume opens
it), log.csv, loss.png, previews. A run has no random state: rows, t, noise and dropped labels of
update n are functions of (seed, n), whatever the number of processes.

In this file: settings, stages, averaged weights and log (5.2), several processes (4.7),
checkpoints, the loop.
"""

import argparse
import contextlib
import csv
import io
import math
import operator
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
import ldm
import plots
import vqgan
from data import UserError, evenly, rng, to_uint8, whole_file
from ddpm import SCHEDULES, drop_labels
from fid import mean_colour_distances, psnr, total_variation
from sample import draw_rows, images_by_label, load
from unet import ResBlock, SpatialTransformer

# --------------------------------------------------------------------------------------------------
# Settings: one dataclass per stage, every setting a flag
#
# The default is the thesis's value, or ours where the thesis has none. SMALL has those of the small
# model. Where the default is None, the help text says what decides.
# --------------------------------------------------------------------------------------------------


def setting(default, help, **more):
    """A setting and its flag. more: kind (its type, if the default is None); choices; nargs; the
    limits above, least, below, most; resume = --resume may change it; path = it names a file."""
    return field(default=default, metadata={"help": help, **more})


def about(Kind, name):
    """What `setting` says of a setting, in this class or where it was defined first."""
    classes = [c for c in Kind.__mro__ if name in getattr(c, "__dataclass_fields__", ())]
    return next(filter(None, (c.__dataclass_fields__[name].metadata for c in classes)), {})


@dataclass
class Settings:
    """The settings that every stage has."""

    data: str = setting("letters", "images to train on, see data.open_set", path=True, resume=True)
    out: str = setting("runs/letters", "run folder", resume=True)
    model: str = setting(
        "auto", "auto = thesis if a GPU does it in a day", choices=("auto", "small", "thesis")
    )
    updates: int = setting(20_000, "updates to train", above=0, resume=True)
    batch: int = setting(512, "images per update, of all processes together", above=0)
    accumulate: int = setting(1, "compute a batch in so many parts", above=0, resume=True)
    strategy: str = setting("ddp", "how processes share work", choices=("ddp", "fsdp"), resume=True)
    lr: float = setting(3e-4, "peak learning rate, whatever the batch", above=0)
    optimizer: str = setting("adamw", "muon learns faster", choices=("adamw", "muon"))
    constant_lr: bool = setting(False, "constant after warm-up; default: linear decay to 0")
    warmup: int = setting(100, "updates until the peak learning rate is reached", least=0)
    weight_decay: float = setting(0.01, "weight decay of the optimizer", least=0)
    grad_clip: float = setting(1.0, "largest gradient norm", above=0)
    blocks: int = setting(1, "residual blocks per level", above=0)
    channels: int = setting(64, "channels of the first level", above=0)
    multipliers: tuple = setting((1, 2, 4, 8), "channels per level / channels", kind=int, nargs="+")
    ema: float = setting(0.9995, "decay of the averaged weights, 0 = no average", least=0, below=1)
    views: int = setting(1, "2 = images also mirrored (E41), 8 = also turned", choices=(1, 2, 8))
    balanced: bool = setting(False, "draw every label equally often")
    overfit: int = setting(0, "train on the first N images only, as a check; 0 = all", least=0)
    seed: int = setting(0, "seed of all that is random", least=0, below=2**62)
    precision: str = setting(
        "auto", "auto asks the CPU or GPU", choices=("auto", "float32", "bf16")
    )
    compile: bool = setting(False, "torch.compile the network", resume=True)
    device: str = setting("auto", "cuda, mps, cpu; auto = the best", resume=True)
    validate_every: int = setting(250, "updates between validations", above=0, resume=True)
    preview_every: int = setting(1000, "updates between previews", above=0, resume=True)
    save_every: int = setting(250, "updates between checkpoints", above=0, resume=True)

    multiple = 16  # --channels must be a multiple of it

    def given(self):
        """Values that another model decides, such as that of --init."""
        return {}

    def complete(self):
        """Replace None by a value. Raises UserError if settings do not fit together."""
        levels = len(self.multipliers)
        if self.channels % self.multiple or min(self.multipliers) < 1:
            raise UserError(f"--channels: must be a multiple of {self.multiple}, --multipliers > 0")
        if self.channels % getattr(self, "groups", 1):
            raise UserError(f"--groups {self.groups}: must divide --channels {self.channels}")
        if set(getattr(self, "attention_levels", None) or ()) - set(range(levels)):
            raise UserError(f"--attention-levels: expected numbers from 0 to {levels - 1}")


@dataclass
class Diffusion(Settings):
    """The settings of the stages whose model generates images for labels."""

    predict: str = setting(
        "eps", "eps (L_simple), v (learns faster) or flow", choices=("eps", "v", "flow")
    )
    schedule: str = setting("linear", "noise schedule", choices=tuple(SCHEDULES))
    T: int = setting(1000, "diffusion steps", above=0)
    p_uncond: float = setting(0.2, "share of labels that are dropped (4.4.3)", least=0, most=1)


@dataclass
class Letters(Diffusion):
    """`--stage letters`: the conditional DDPM on letters (4.4.5)."""

    condition: str = setting(
        "sum", "the label: sum with t (fig. 4.6) or attention (4.4.4)", choices=("sum", "attention")
    )

    @property
    def multiple(self):
        return 32 if self.condition == "attention" else 16  # 32 channels per head


@dataclass
class Classifier(Settings):
    """`--stage classifier`: f(y | x_t, t) for classifier guidance (4.4.2)."""

    run: str = setting("letters", "model to guide, see sample.py --run", path=True)
    data: str | None = setting(None, "(default: that of --run)", kind=str, path=True, resume=True)
    out: str = "runs/classifier"
    updates: int = 10_000
    weight_decay: float = 0.05
    schedule: str | None = None  # these four are those of --run
    T: int | None = None
    shape: tuple | None = None
    space: str | None = None

    def given(self):
        guided = load(self.run)
        found = {name: guided.settings.get(name) for name in ("schedule", "T")}
        if self.data is None:
            own = "paintings" if guided.stage == "ldm" else "letters"
            found["data"] = guided.settings.get("data") or own  # a published model does not say
        return found | {"shape": guided.shape, "space": ldm.space_of(guided)}

    def complete(self):
        super().complete()
        if any(side % 2 ** (len(self.multipliers) - 1) for side in self.shape[1:]):
            raise UserError(f"--multipliers: too many levels for {self.shape[1:]} positions")


@dataclass
class FirstStage(Settings):
    """`--stage vqgan`: the auto-encoder of 3.1 to 3.4, with one of three bottlenecks."""

    data: str = "paintings"
    out: str = "runs/vqgan"
    init: str | None = setting(None, "run or published weights to start from", kind=str, path=True)
    size: int = setting(256, "pixels per side that images are brought to", above=0)
    crop: int | None = setting(
        None, "train on squares (default: whole images; small model: at most 64)", kind=int, above=0
    )
    updates: int = 100_000
    batch: int = 8
    accumulate: int = field(default=1, metadata={"flag": None})  # lambda needs the whole batch
    lr: float = 3.6e-5
    weight_decay: float = 0.0
    grad_clip: float = 100.0
    ema: float = 0.0
    channels: int = 128
    multipliers: tuple = (1, 2, 2, 4)
    blocks: int = 2
    attention_levels: tuple = setting((3,), "0 = full resolution", kind=int, nargs="*")
    groups: int = setting(32, "groups of every GroupNorm", above=0)
    bottleneck: str = setting("vq", "AE, VAE, VQ-VAE", choices=("none", "kl", "vq"))
    z_channels: int = setting(4, "channels of the latent, D of the code-book", above=0)
    codes: int = setting(16384, "number of codes, K of the code-book", above=0)
    beta: float = setting(0.25, "weight of the commitment loss (eq. 3.4)", least=0)
    released: bool = setting(False, "beta on the code-book loss, as in the published code (E14)")
    quantise_from: int | None = setting(None, "(default: updates / 6, at most 1000)", kind=int)
    reseed: bool | None = setting(None, "move unused codes (default: unless --init)")
    equivariant: bool | None = setting(
        None, "see `equivariant_change`; not for vq (default: small model)"
    )
    kl_weight: float = setting(1e-4, "weight of the KL term of a VAE (eq. 3.1)", least=0)
    perceptual: float | None = setting(
        None, "weight of the perceptual loss (default: 1 with its files)", kind=float
    )
    perceptual_files: str | None = setting(None, "folder of its files", kind=str, path=True)
    adversarial: float = setting(0.6, "weight of the adversarial loss, 0 = no VQ-GAN", least=0)
    adversarial_loss: str = setting("hinge", "form of that loss", choices=("hinge", "vanilla"))
    adaptive: bool = setting(True, "multiply that loss by lambda (E18)")
    disc_start: int | None = setting(None, "(default: updates / 2, at most 10000)", kind=int)
    disc_channels: int = setting(64, "channels of the discriminator", above=0)
    disc_layers: int = setting(2, "halvings in the discriminator", above=0)
    validate_every: int = 500
    preview_every: int = 2000
    save_every: int = 500

    multiple = 1

    def given(self):
        if not self.init:
            return {"size": 32} if self.data == "letters" else {}
        model, losses = ldm.load_model(self.init), ldm.published_losses(self.init)
        if model.stage != "vqgan":
            raise UserError(f"--init {self.init}: not a first stage")
        names = "channels multipliers bottleneck z_channels codes blocks attention_levels groups"
        found = {name: model.settings[name] for name in names.split()} | {"quantise_from": 0}
        if not model.update:  # a published file goes on with the loss it was trained with (E14)
            found["released"] = model.settings["released"]
        if "discriminator" in losses:
            kernels = [value for value in losses["discriminator"].values() if value.ndim == 4]
            found |= {"disc_channels": len(kernels[0]), "disc_layers": len(kernels) - 2}
        if "perceptual_loss" in losses and not self.perceptual_files:
            found["perceptual_files"] = self.init
        return found

    def complete(self):
        small = self.model == "small"
        self.crop = self.crop or (min(self.size, 64) if small else self.size)
        if self.equivariant is None:
            self.equivariant = small and self.bottleneck != "vq" and not self.init
        self.reseed = not self.init if self.reseed is None else self.reseed
        if self.disc_start is None:
            self.disc_start = min(self.updates // 2, 10_000)
        if self.quantise_from is None:
            self.quantise_from = min(self.updates // 6, 1000)
        super().complete()
        if self.equivariant and self.bottleneck == "vq":
            raise UserError("--equivariant: not with a code-book, the mean of codes is no code")
        factor = 2 ** (len(self.multipliers) - 1 + self.equivariant)
        if self.crop > self.size or self.crop % factor:
            raise UserError(f"--crop {self.crop}: expected a multiple of {factor}, at most --size")
        smallest = self.crop >> self.equivariant  # which `equivariant_change` may halve
        if self.adversarial and smallest >> self.disc_layers < 3:
            raise UserError(f"--disc-layers {self.disc_layers}: too many for {smallest} pixels")


@dataclass
class Latent(Diffusion):
    """`--stage ldm`: the latent model (4.5) on a first stage."""

    data: str = "paintings"
    out: str = "runs/ldm"
    first_stage: str | None = setting(None, "(default: runs/vqgan)", kind=str, path=True)
    init: str | None = setting(None, "run or published model to start from", kind=str, path=True)
    size: int | None = setting(None, "(default: as the first stage)", kind=int, above=0)
    updates: int = 88_000
    batch: int = 64
    strategy: str = "fsdp"
    lr: float = 6.4e-5
    ema: float = 0.9999
    channels: int = 256
    multipliers: tuple = (1, 2, 4)
    blocks: int = 2
    schedule: str = "sqrt_linear"
    attention_levels: tuple | None = setting(None, "(default: all)", kind=int, nargs="+")
    groups: int = setting(32, "groups of every GroupNorm", above=0)
    condition: str | None = setting(
        None,
        "a label, or the colours of a picture (default: palette, if small and labels are colours)",
        kind=str,
        choices=("label", "palette"),
    )
    context_channels: int = setting(512, "width of the label embedding", above=0)
    latent_scale: float | None = setting(
        None, "factor (default: 1 for a published first stage, else 1/std)", kind=float, above=0
    )
    pyramid: tuple = setting(
        (), "channels of more U-Nets, each for half the side of the one before", kind=int, nargs="*"
    )
    checkpoint_activations: bool = setting(False, "compute them twice: less memory", resume=True)
    cpu_offload: bool = setting(False, "fsdp: the CPU holds the weights (E59)", resume=True)
    first_stage_settings: dict | None = None  # no flag: the first stage's file decides

    multiple = 32  # channels per attention head

    def given(self):
        if not self.init:
            return {}
        model = ldm.load_model(self.init)
        if model.stage != "ldm":
            raise UserError(f"--init {self.init}: not a latent model")
        names = "channels multipliers blocks attention_levels groups context_channels predict "
        names += "schedule T latent_scale"
        found = {name: model.settings[name] for name in names.split()}
        return found | {"pyramid": model.settings["pyramid"], "first_stage": None}

    def complete(self):
        super().complete()
        if self.schedule == "cosine" and self.predict == "eps":
            raise UserError(
                "--schedule cosine: latents need --predict v, their eps cannot be clipped"
            )
        if self.pyramid and self.predict != "v":
            raise UserError(f"--predict {self.predict}: --pyramid needs v")
        if any(channels < 1 or channels % self.multiple for channels in self.pyramid):
            raise UserError(f"--pyramid {self.pyramid}: needs multiples of {self.multiple}")
        several = dist.is_initialized() and self.strategy == "fsdp"
        if self.pyramid and several:  # processes that wait for each other's parts of a U-Net
            raise UserError("--pyramid: its U-Nets are small; they need --strategy ddp")
        if self.cpu_offload and not several or self.compile and several:
            raise UserError(
                "--cpu-offload needs torchrun and fsdp; --compile does not go with them"
            )


# fmt: off
SMALL = {
    Letters: dict(updates=2500, batch=32, lr=1e-3, optimizer="muon", channels=32,
                  multipliers=(1, 2, 3, 4), ema=0.998, predict="v"),
    Classifier: dict(updates=1000, batch=64, lr=1e-3, channels=32, multipliers=(1, 2, 3, 4),
                     ema=0.998),
    FirstStage: dict(updates=4000, lr=3e-4, optimizer="muon", views=8, channels=16, ema=0.995,
                     multipliers=(1, 2, 4, 4), blocks=1, attention_levels=(), groups=1,
                     bottleneck="kl", kl_weight=1e-3, codes=512, adversarial=0.0, disc_channels=32),
    Latent: dict(updates=3600, batch=32, lr=2e-3, optimizer="muon", views=8, strategy="ddp",
                 channels=64, multipliers=(1, 1), pyramid=(64, 96), blocks=1, groups=4,
                 attention_levels=(1,), context_channels=128, ema=0.999, predict="v",
                 schedule="log_linear", p_uncond=0.1),
}
# fmt: on


def option(name):
    return "--" + name.replace("_", "-")


def parse(arguments=None):
    """Returns the stage, the settings that were typed (a dict), and whether to resume."""
    known = argparse.ArgumentParser(add_help=False)
    known.add_argument("--stage", choices=tuple(STAGES), default="letters")
    Kind = STAGES[known.parse_known_args(arguments)[0].stage].Settings
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stage", choices=tuple(STAGES), required=True, help="what to train")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    flags = {f: about(Kind, f.name) for f in fields(Kind) if "help" in about(Kind, f.name)}
    for f, more in flags.items():
        text = more["help"]
        if f.default is not None:
            text += f" (default {f.default}"
            text += f"; small model {SMALL[Kind][f.name]})" if f.name in SMALL[Kind] else ")"
        how = {"dest": f.name, "default": argparse.SUPPRESS, "help": text}
        if f.type in (bool, bool | None):
            parser.add_argument(option(f.name), action=argparse.BooleanOptionalAction, **how)
        else:
            how |= {key: more[key] for key in ("choices", "nargs") if key in more}
            parser.add_argument(option(f.name), type=more.get("kind", f.type), **how)
    typed = vars(parser.parse_args(arguments))
    stage, resume = typed.pop("stage"), typed.pop("resume")
    for f, more in flags.items():
        value = typed.get(f.name)
        if isinstance(value, list):
            typed[f.name] = tuple(value)
        if more.get("path") and value and value.partition(":")[0] not in data.BUILT_IN:
            typed[f.name] = str(Path(value).resolve())  # --resume works from any folder
    return stage, typed, resume


def chosen_device(typed):
    device = typed.get("device", "auto")
    return data.check_device(data.best_device() if device == "auto" else device)


def new_settings(Kind, typed):
    """The settings of a new run: typed, else given by another model, else those of the size."""
    size = typed.get("model", "small")
    decided = {"device": chosen_device(typed), "model": size}
    values = (SMALL[Kind] if size == "small" else {}) | typed | decided
    for name, value in Kind(**values).given().items():
        if typed.get(name, value) != value:
            raise UserError(
                f"{option(name)} {typed[name]}: leave it out, --init or --run decides it ({value})"
            )
        values[name] = value
    return settle(Kind(**values))


def resumed_settings(Kind, saved, typed):
    """The settings of a saved run. Of the typed ones, only those marked `resume` may differ."""
    if unknown := saved.keys() - {f.name for f in fields(Kind)}:
        raise UserError(
            f"this run has settings that this version does not know: {', '.join(sorted(unknown))}. "
            "Resume it with the version that began it, or begin another with --out"
        )
    settings = Kind(**saved)
    for f in fields(settings):
        old = getattr(settings, f.name)
        new = typed.get(f.name, old)
        if new != old and not about(Kind, f.name).get("resume"):
            raise UserError(f"{option(f.name)} was {old} in this run; {new} needs another --out")
        setattr(settings, f.name, new)
    return settle(settings)


LIMITS = {"above": operator.gt, "least": operator.ge, "below": operator.lt, "most": operator.le}
WORDS = {"above": "more than", "least": "at least", "below": "below", "most": "at most"}


def settle(settings):
    """Check all limits, and settle what the machine decides."""
    s = settings
    for f in fields(s):
        value, more = getattr(s, f.name), about(type(s), f.name)
        for name in LIMITS.keys() & more.keys() if value is not None else ():
            if not (LIMITS[name](value, more[name]) and math.isfinite(value)):
                limit = f"{WORDS[name]} {more[name]}"
                raise UserError(f"{option(f.name)} {value}: must be {limit}")
    if data.check_device(s.device) == "mps" and dist.is_initialized():
        raise UserError("--device mps: several processes need cuda or cpu")
    if s.batch % (world_size() * s.accumulate):
        parts = f"{world_size()} processes x --accumulate {s.accumulate}"
        raise UserError(f"--batch {s.batch}: images per update; must be a multiple of {parts}")
    if s.optimizer == "muon" and dist.is_initialized() and s.strategy == "fsdp":
        raise UserError("--optimizer muon: needs whole matrices; fsdp has parts (--strategy ddp)")
    if s.strategy == "fsdp" and not isinstance(s, Latent):
        raise UserError("--strategy fsdp: only for --stage ldm; the other networks are small")
    if s.precision == "auto":
        votes = all_reduce_mean(float(data.computes_bf16(s.device)))
        s.precision = "bf16" if votes > 0.5 else "float32"
        print(f"--precision {s.precision}: the faster one on this {s.device}")
    data.tune(s.device, keep_memory=not (dist.is_initialized() and s.strategy == "fsdp"))
    s.complete()
    return s


def mixed_precision(settings):
    """bf16 autocast, if the settings ask for it. Its cache is off: it would keep casts of the raw
    weights while the averaged ones are in place."""
    bf16, kind = settings.precision == "bf16", torch.device(settings.device).type
    return torch.autocast(kind, torch.bfloat16, enabled=bf16, cache_enabled=False)


# --------------------------------------------------------------------------------------------------
# The stages: what a loss, a validation and a preview are
#
#   players()             the networks that train: one, or an auto-encoder and then its adversary
#   figures               more numbers of the last update, for the log
#   validate()            numbers for the log, "validation_loss" among them
#   preview(path, final)  draws what the model can do; returns numbers for the log
#   start(resumed)        called when the weights are there, before the first update
#   state_dict()          tensors beside the weights that a resumed run needs
# --------------------------------------------------------------------------------------------------


WHOLE = slice(None)


@dataclass
class Player:
    """A network that trains.

    loss: function (n, part) -> the mean loss over the images of update n that the slice `part`
    selects; start: its first update; idle: whether parameters may have no gradient.
    """

    name: str
    network: torch.nn.Module
    loss: Callable
    betas: tuple = (0.9, 0.99)
    start: int = 0
    idle: bool = False


class Stage:
    """What all stages share: the data and the rows of every update."""

    loss_name = "mean squared error of the prediction"  # the y axis of the loss chart
    columns = ()  # further columns of the log
    picture = "grid.png"  # the last preview
    best_from = None  # the update from which best.pt keeps the best validation loss; None = never

    def __init__(self, settings, size, labels):
        s = self.settings = settings
        with first_of_machine():  # which packs the set, if need be
            self.data = data.open_set(s.data, size, labels)
        self.classes, self.figures = self.data.classes, {}
        print(self.data.report())
        self.divide(self.data.split()[1])
        torch.manual_seed(s.seed)

    def divide(self, held_out):
        """E68: validate with the rows `held_out`, train on the others."""
        s, self.held_out = self.settings, held_out
        self.validation_rows = held_out
        self.train_rows = np.delete(np.arange(len(self.data.labels)), held_out)
        if not len(held_out) and not s.overfit:
            raise UserError(f"{s.data}: too few sources; a label needs two, one to validate with")
        if s.overfit:
            self.train_rows = self.validation_rows = self.train_rows[: s.overfit]
        self.train_labels = self.data.labels[self.train_rows]

    def rows(self, n):
        s = self.settings
        if s.balanced:
            rows = data.balanced_rows_of_update(s.seed, n, s.batch, self.train_labels)
        else:
            rows = data.rows_of_update(s.seed, n, s.batch, len(self.train_rows))
        return self.train_rows[rows]

    def players(self):
        return [Player("train", self.model, self.loss)]

    def start(self, resumed):
        pass

    def state_dict(self):
        return {}


class DiffusionStage(Stage):
    """Stages whose loss is taken at a random t with random noise, on pixels or on latents."""

    columns = ("colour_distance",)
    latents = None  # those of the first stage, (N, views, C, h, w)
    latent_scale, octaves = 1.0, 0  # from them to x_0, see `ldm.scaled`

    def conditions(self, rows):
        """y of these images, (B, ...)."""
        return torch.from_numpy(self.data.labels[rows])

    def encode(self, first_stage):
        """The latents. Those of an equivariant first stage can be turned themselves."""
        s = self.settings
        views = 1 if first_stage.equivariant else s.views
        with first_of_machine(), mixed_precision(s):  # which encodes the images, if need be
            self.latents = ldm.encode_set(self.data, first_stage, views, s.device, s.precision)

    def examples(self, rows, views=None):
        """x_0 and labels of the rows. views: (B,), the numbers of `data.view`; None = 0."""
        device = self.settings.device
        views = torch.zeros(len(rows), dtype=torch.long) if views is None else views
        if self.latents is None:
            x, y = self.data.batch(rows, device)
        else:
            encoded = self.latents.shape[1] > 1
            x = self.latents[rows, views.numpy() if encoded else 0]
            x = ldm.scaled(torch.from_numpy(x), self.latent_scale, self.octaves)
            y = self.conditions(rows)
            x, y = (data.send(a, device) for a in (x, y))
            if encoded:
                return x, y
        return data.viewed(x, views), y

    def drop(self, y, u):
        """The labels that the network gets: some become the zero-label (4.4.3)."""
        return drop_labels(y, self.model.zero_label, self.settings.p_uncond, u)

    def times(self, draw):
        """t of the images of an update, (batch,): uniform on {1..T}."""
        s = self.settings
        return torch.randint(1, s.T + 1, (s.batch,), generator=draw)

    def loss(self, n, part=WHOLE):
        """The loss of update n (3.5.4), a function of (seed, n) and the weights."""
        s = self.settings
        draw = rng(s.seed, n, data.LOSS)
        t = self.times(draw)
        noise = torch.randn((s.batch, *self.model.shape), generator=draw)
        u, turn = torch.rand((2, s.batch), generator=draw)
        t, noise, u = (data.send(a[part], s.device) for a in (t, noise, u))
        x, y = self.examples(self.rows(n)[part], (turn * s.views).long()[part])
        return self.model.loss(x, self.drop(y, u), t, noise).mean()

    @torch.no_grad()
    def validate(self, most=1040, batch=65):
        """The loss of validation images with fixed noise and fixed t, spread evenly over 1..T.

        Each process computes its share. The last image fills up uneven shares and is not counted.
        """
        rows, draw = self.validation_rows, rng(0, 0, data.VALIDATION)
        rows = rows[evenly(len(rows), most)]
        t = 1 + torch.randperm(len(rows), generator=draw) * self.settings.T // len(rows)
        noise = torch.randn((len(rows), *self.model.shape), generator=draw)
        mine = np.arange(rank(), -(-len(rows) // world_size()) * world_size(), world_size())
        total = 0.0
        for i in range(0, len(mine), batch):
            k = np.minimum(mine[i : i + batch], len(rows) - 1)
            x, y = self.examples(rows[k])
            loss = self.model.loss(x, y, t[k].to(x.device), noise[k].to(x.device))
            total += loss[: (mine[i : i + batch] < len(rows)).sum()].sum().item()
        return {"validation_loss": all_reduce(total).item() / len(rows)}

    @property
    def scale(self):
        """The guidance scale of previews: the thesis's choice."""
        return 2.0 if self.settings.p_uncond else 1.0

    def preview(self, path, final=False):
        """One row per label, the zero-label last, and the distance from the colours (5.4.1)."""
        columns, steps = (6, 50) if final else (4, 20)
        labels = evenly(len(self.classes), 40)  # more rows would take long
        how = {"steps": min(steps, self.settings.T), "scale": self.scale, "progress": False}
        images = images_by_label(self.model, columns, labels=labels, **how)
        save_picture(draw_rows(images, [self.classes[label] for label in labels]), path)
        distances = mean_colour_distances(images, self.classes)
        return {} if distances is None else {"colour_distance": distances.mean().item()}


def save_picture(picture, path):
    if rank() == 0:
        plots.save(picture, path)


class LettersStage(DiffusionStage):
    """The conditional DDPM on letters (4.4.5)."""

    Settings = Letters

    def __init__(self, settings):
        super().__init__(settings, 32, "folder")
        self.next = "python sample.py --run {out} "
        self.next += "--text HELLO" if self.classes == data.ALPHABET else "--grid"
        self.model = ldm.build_letters(asdict(settings), self.classes).to(settings.device)
        if settings.compile:
            self.model.unet.compile()


class LatentStage(DiffusionStage):
    """The latent model (3.6, 4.5): the diffusion on latents of a frozen first stage."""

    Settings = Latent
    next = "python sample.py --run {out} --grid"
    palettes = None

    def __init__(self, settings):
        s, first_stage, source = settings, None, None
        if s.first_stage_settings is None:  # a new run; a checkpoint has all of it
            if s.init:
                source = ldm.load_model(s.init)
                first_stage = source.first_stage
                s.first_stage_settings = source.settings["first_stage_settings"]
            else:
                first_stage = open_first_stage(s.first_stage)
                if not first_stage.update:  # a published one, made for the factor 1 (E54)
                    s.latent_scale = s.latent_scale or 1.0
                s.first_stage_settings = first_stage.settings
            s.size = s.size or s.first_stage_settings["size"]
        ldm.check_size(s.size, asdict(s))
        super().__init__(s, s.size, "rgb")
        colours = set(self.classes) <= set(data.COLOURS)
        usual = "palette" if s.model == "small" else "label"
        if source:
            usual = source.settings["condition"]
        s.condition = s.condition or (usual if colours else "label")
        if s.condition == "palette" and not colours:
            raise UserError(f"--condition palette: the labels of {s.data} must be colours")
        values = asdict(s) | {"latent_scale": s.latent_scale or 1.0}
        self.model = ldm.build_latent(values, self.classes).to(s.device)
        if first_stage:
            self.model.first_stage.load_state_dict(first_stage.state_dict())
        if source:
            self.model.unet.load_state_dict(source.unet.state_dict())
            if s.condition != usual:
                print(f"the tokens of --condition {s.condition} are new: {s.init} has others")
            elif len(source.classes) == len(self.classes):
                self.model.context.load_state_dict(source.context.state_dict())
            else:
                print(f"the label table is new: {s.init} has {len(source.classes)} labels")
        if s.checkpoint_activations:
            checkpoint_activations(self.model.unet)
        if s.compile:
            self.model.unet.compile()

    def start(self, resumed):
        s = self.settings
        self.encode(self.model.first_stage)
        if s.condition == "palette":
            with first_of_machine():
                self.palettes = torch.from_numpy(self.data.palettes())
        z = self.latents[self.train_rows, 0]
        mean, deviation = z.mean(dtype=np.float64), z.std(dtype=np.float64)
        s.latent_scale = s.latent_scale or float(1 / deviation)
        self.latent_scale = self.model.latent_scale = s.latent_scale
        self.octaves = self.model.octaves
        members = [z[self.train_labels == label] for label in range(len(self.classes))]
        means = [(part if len(part) else z).mean((0, 2, 3)) for part in [*members, z]]
        self.model.mean.copy_(torch.from_numpy(np.stack(means)) * s.latent_scale)
        print(f"latents {z.shape[1:]}: mean {mean:.3f}, deviation {deviation:.3f}, ", end="")
        print(f"scaled by {s.latent_scale:.3f}")
        if s.pyramid:
            some = torch.from_numpy(z[evenly(len(z), 1000)])
            some = ldm.scaled(some, self.latent_scale, self.octaves)
            self.model.unet.divide(some.to(s.device))
            self.levels = self.model.unet.level.cpu()
            steps = torch.bincount(self.levels, minlength=1 + len(s.pyramid)).tolist()
            sides = [self.model.shape[1] >> level for level in range(len(steps))]
            print(f"U-Nets for latents with sides of {sides}: they see {steps} steps of t")

    def conditions(self, rows):
        return super().conditions(rows) if self.palettes is None else self.palettes[rows]

    def drop(self, y, u):
        if self.palettes is None:
            return super().drop(y, u)
        return ldm.drop_colours(y, self.settings.p_uncond, u)

    def times(self, draw):
        """With --pyramid, an update trains one U-Net (`Pyramid.only`), drawn at random, at t of its
        own. All U-Nets get equally many updates on average."""
        if not self.settings.pyramid:
            return super().times(draw)
        levels = self.levels.unique()
        self.model.unet.only = levels[torch.randint(len(levels), (), generator=draw)].item()
        seen = 1 + (self.levels == self.model.unet.only).nonzero()[:, 0]
        return seen[torch.randint(len(seen), (self.settings.batch,), generator=draw)]

    def players(self):
        return [Player("train", self.model, self.loss, idle=bool(self.settings.pyramid))]


def open_first_stage(run):
    """The first stage of a run (its best validation, if there is one) or of a model file."""
    file = Path(run, "best.pt") if Path(run, "best.pt").exists() else run
    model = ldm.load_model(file)
    if model.stage != "vqgan":
        raise UserError(f"--first-stage {file}: not one; train.py --stage vqgan makes one")
    if model.update < model.settings["quantise_from"]:
        raise UserError(f"--first-stage {file}: its code-book is not in use yet; train it longer")
    print(f"first stage: {file}")
    return model


def equivariant_change(draw):
    """A random view, see `data.view`, perhaps at half the size, as a function of images or latents.

    If a latent that is changed so must be decoded to the image that is changed so, then latents
    are like small images: their low frequencies say what the low frequencies of the image are
    (EQ-VAE, not in the thesis). A diffusion model learns such latents faster.
    """
    k, half = int(torch.randint(8, (), generator=draw)), torch.rand((), generator=draw) < 0.5
    return lambda x: data.view(F.avg_pool2d(x, 2) if half else x, k)


class ClassifierStage(DiffusionStage):
    """The classifier of noised images (4.4.2), in the space of the diffusion that it will guide."""

    Settings = Classifier
    next = "python sample.py --guidance classifier --classifier {out} --scale 2 --grid"
    loss_name = "cross-entropy over all noise levels"
    columns = ("validation_accuracy", "validation_accuracy_ema")
    picture = "accuracy.png"

    def __init__(self, settings):
        s, guided = settings, load(settings.run)
        if ldm.space_of(guided) != s.space:
            raise UserError(f"{s.run}: no longer the model with which this run began")
        latent = guided.stage == "ldm"
        super().__init__(s, *(guided.settings["size"], "rgb") if latent else (32, "folder"))
        if self.classes != guided.classes:
            raise UserError(f"--data {s.data}: other labels than those of the model to guide")
        if latent:
            self.encode(guided.first_stage.to(s.device))
            self.latent_scale, self.octaves = guided.latent_scale, guided.octaves
        self.next += f" --run {shlex.quote(s.run)}"
        self.model = ldm.build_classifier(asdict(s), self.classes).to(s.device)
        if s.compile:
            self.model.network.compile()

    def drop(self, y, u):
        return y

    @torch.no_grad()
    def by_noise_level(self, rows, most=260):
        """[(t, cross-entropy, accuracy)] at eleven t from 1 to T, with fixed noise."""
        T, table = self.settings.T, []
        x, y = self.examples(rows[evenly(len(rows), most)])
        noise = torch.randn(x.shape, generator=rng(0, 0, data.VALIDATION)).to(x.device)
        for t in dict.fromkeys(max(1, T * i // 10) for i in range(11)):
            log_f = self.model.log_f(self.model.diffusion.q_sample(x, t, noise), t)
            loss = F.nll_loss(log_f, y).item()
            table.append((t, loss, (log_f.argmax(1) == y).float().mean().item()))
        return table

    def validate(self):
        _, loss, accuracy = np.mean(self.by_noise_level(self.validation_rows), axis=0).tolist()
        return {"validation_loss": loss, "validation_accuracy": accuracy}

    def preview(self, path, final=False):
        """A chart of the accuracy by noise level; at the end a table, too."""
        sets = {"training images": self.train_rows, "validation images": self.validation_rows}
        tables = {name: self.by_noise_level(rows) for name, rows in sets.items()}
        bars = [
            {"label": str(t), "set": name, "accuracy": accuracy}
            for name, table in tables.items()
            for t, _, accuracy in table
        ]
        title = f"Accuracy by noise level t, {len(self.classes)} labels"
        save_picture(plots.bars(bars, "accuracy", title), path)
        if final:
            print(f"{'t':>5}" + "".join(f"{name:>20}" for name in tables))
            for rows in zip(*tables.values()):
                print(f"{rows[0][0]:5}" + "".join(f"{accuracy:20.1%}" for _, _, accuracy in rows))
        return {}


class AutoencoderStage(Stage):
    """The first stage (3.1 to 3.4.1): an auto-encoder and, from `disc_start` on, its adversary."""

    Settings = FirstStage
    next = "python sample.py --reconstruct IMAGE --run {out}"
    loss_name = "reconstruction loss: L1 + perceptual (the NLL of 4.4.7)"
    columns = (
        *("l1", "perceptual", "latent_loss", "codes_used", "perplexity"),
        *("g_loss", "lambda", "disc_loss", "disc_grad_norm", "logit_real", "logit_fake"),
        *("validation_psnr", "validation_psnr_ema"),
        *("validation_sharpness", "validation_sharpness_ema"),
    )

    def __init__(self, settings):
        s, device = settings, settings.device
        super().__init__(s, s.size, "rgb")
        self.model = ldm.build_first_stage(asdict(s)).to(device)
        self.discriminator = vqgan.PatchDiscriminator(s.disc_channels, s.disc_layers).to(device)
        self.perceptual = self.open_perceptual()
        self.counts = torch.zeros(s.codes, dtype=torch.long, device=device)  # of an epoch
        joined = [s.disc_start * bool(s.adversarial), s.quantise_from * (s.bottleneck == "vq")]
        self.best_from = 1 + max(joined)  # when code-book and adversary have joined
        if s.compile:  # not the last layer: lambda needs its graph
            for part in (self.model.encoder, self.model.decoder.mid, *self.model.decoder.up):
                part.compile()

    def open_perceptual(self):
        """The perceptual loss; None without its files, unless they were asked for."""
        s = self.settings
        if s.perceptual == 0:
            return None
        try:
            network = ldm.load_perceptual(s.perceptual_files).to(s.device)
        except UserError as error:
            if s.perceptual or s.perceptual_files:
                raise
            print(f"no perceptual loss: {error}")
            s.perceptual = 0.0
            return None
        if s.crop < 16:
            raise UserError(f"--crop {s.crop}: --perceptual 0 is needed below 16 pixels")
        s.perceptual = s.perceptual or 1.0
        return network

    def start(self, resumed):
        """4.4.7, fine-tuning: the weights of --init."""
        s = self.settings
        if s.init and not resumed:
            self.model.load_state_dict(ldm.load_model(s.init).state_dict())
            adversary = ldm.published_losses(s.init).get("discriminator")
            if adversary and s.adversarial:
                ldm.load_weights(self.discriminator, adversary, s.init)

    def players(self):
        s = self.settings
        idle = s.bottleneck == "vq" and s.quantise_from > 0
        players = [Player("train", self.model, self.loss, idle=idle)]
        if s.adversarial:
            adversary = (self.discriminator, self.discriminator_loss, (0.5, 0.9), s.disc_start)
            players.append(Player("disc", *adversary))
        return players

    def images(self, rows, draw, part=WHOLE):
        """Random squares of random views of the images rows[part]: (B, 3, crop, crop)."""
        s = self.settings
        height, width = self.data.images.shape[1:3]
        places = torch.tensor([height - s.crop + 1, width - s.crop + 1])
        corners = (torch.rand((len(rows), 2), generator=draw) * places).int()[part].tolist()
        squares = [
            self.data.images[row, y : y + s.crop, x : x + s.crop]
            for row, (y, x) in zip(rows[part], corners)
        ]
        x = data.to_tensor(np.stack(squares))
        views = (torch.rand(len(rows), generator=draw) * s.views).long()[part]
        return data.send(data.viewed(x, views), s.device)

    def loss(self, n, part=WHOLE):
        """eq. 3.5, the auto-encoder:  |x - x_r| + perceptual + latent + lambda * adversarial."""
        s = self.settings
        if s.bottleneck == "vq":
            self.model.quantize.active = n >= s.quantise_from
            if n == s.quantise_from > 0:
                self.move_codes(n, range(s.codes))
        draw = rng(s.seed, n, data.LOSS)
        x = self.images(self.rows(n), draw, part)
        side = s.crop // self.model.factor
        xi = torch.randn((s.batch, self.model.z_channels, side, side), generator=draw)  # of a VAE
        change = equivariant_change(draw) if s.equivariant and n % 2 else lambda x: x
        x_r, latent_loss, codes = self.model(x, data.send(xi[part], s.device), change)
        x = change(x)
        rec = self.reconstruction_loss(x, x_r)
        loss = rec.mean() + latent_loss
        self.figures = {"l1": (x_r - x).abs().mean(), "latent_loss": latent_loss}
        if self.perceptual:
            self.figures["perceptual"] = rec.mean() - self.figures["l1"]
        if s.adversarial and n >= s.disc_start:
            self.discriminator.requires_grad_(False)  # this step must not change its gradient
            g_loss = vqgan.generator_loss(self.discriminator(x_r), s.adversarial_loss)
            self.discriminator.requires_grad_(True)
            weight = torch.ones(())
            if s.adaptive:
                last_layer = self.model.decoder.conv_out.weight
                weight = vqgan.adaptive_weight(rec.mean(), g_loss, last_layer, all_reduce_mean)
            loss = loss + s.adversarial * weight * g_loss
            self.figures |= {"g_loss": g_loss, "lambda": weight}
        self.seen = x, x_r.detach()  # for the discriminator
        if codes is not None:
            self.count_codes(n, codes)
        return loss

    def discriminator_loss(self, n, part=WHOLE):
        """The adversary's loss on the images and reconstructions of `loss`."""
        real, fake = (self.discriminator(x) for x in self.seen)
        self.figures |= {"logit_real": real.mean(), "logit_fake": fake.mean()}
        return vqgan.discriminator_loss(real, fake, self.settings.adversarial_loss)

    def reconstruction_loss(self, x, x_r):
        """L1 + weight * perceptual, (B,). L1 is the NLL of Laplace-distributed pixels (E16)."""
        rec = (x - x_r).abs().mean((1, 2, 3))
        if self.perceptual:
            rec = rec + self.settings.perceptual * self.perceptual(x, x_r)
        return rec

    def count_codes(self, n, codes):
        """After an epoch (at least 50 updates): log how many codes it used, move the others."""
        s = self.settings
        self.counts += all_reduce(torch.bincount(codes.flatten(), minlength=s.codes))
        if (n + 1) % max(50, -(-len(self.train_rows) // s.batch)):
            return
        used, perplexity = (torch.tensor(float(value)) for value in vqgan.code_use(self.counts))
        self.figures |= {"codes_used": used, "perplexity": perplexity}
        if s.reseed and used < s.codes:
            self.move_codes(n, torch.nonzero(self.counts == 0)[:, 0].tolist())
        self.counts.zero_()

    @torch.no_grad()
    def move_codes(self, n, unused):
        """Move the unused codes to random latent vectors of images."""
        draw = rng(self.settings.seed, n, data.CODES)
        rows = torch.randint(len(self.train_rows), (32,), generator=draw).numpy()
        x = self.images(self.train_rows[rows], draw)
        z = torch.cat([self.model.encode(part) for part in x.split(8)])
        z = z.permute(0, 2, 3, 1).flatten(0, 2)  # (N, D)
        weight = self.model.quantize.embedding.weight
        weight[list(unused)] = z[torch.randint(len(z), (len(unused),), generator=draw).to(z.device)]
        if world_size() > 1:  # every process rounds a little differently
            dist.broadcast(weight, 0)

    @torch.no_grad()
    def validate(self, most=256, batch=16):
        """Reconstruction loss, PSNR and sharpness of fixed squares of the validation images.

        Sharpness is the total variation of the reconstructions as a share of the originals'.
        """
        s = self.settings
        rows = np.repeat(self.validation_rows, 4 if s.crop < s.size else 1)
        rows = rows[evenly(len(rows), most)]
        x, total = self.images(rows, rng(0, 0, data.VALIDATION)), torch.zeros(4)
        for part in x.split(batch):
            x_r = self.model(part)[0]
            values = (self.reconstruction_loss(part, x_r), psnr(part, x_r))
            values += (total_variation(x_r), total_variation(part))
            total += torch.stack([value.sum() for value in values]).cpu()
        loss, decibel, variation, variation_of_x = (total / len(x)).tolist()
        row = {"validation_loss": loss, "validation_psnr": decibel}
        return row | {"validation_sharpness": variation / max(variation_of_x, 1e-6)}

    @torch.no_grad()
    def preview(self, path, final=False):
        """Figure 4.9: validation images over their reconstructions."""
        columns = 12 if final else 8
        rows = np.linspace(0, len(self.validation_rows) - 1, 2 * columns).astype(int)
        x = self.images(self.validation_rows[rows], rng(0, 0, data.PREVIEW))
        pairs = [images.unflatten(0, (2, columns)) for images in (x, self.model(x)[0])]
        images, scale = torch.stack(pairs, dim=1).flatten(0, 2), max(1, 128 // x.shape[-1])
        save_picture(plots.grid(to_uint8(images), columns, ["x", "x_r"] * 2, scale=scale), path)
        return {}

    def state_dict(self):
        return {"counts": self.counts}


STAGES = {
    "letters": LettersStage,
    "vqgan": AutoencoderStage,
    "ldm": LatentStage,
    "classifier": ClassifierStage,
}


# --------------------------------------------------------------------------------------------------
# 5.2  Averaged weights, learning rate, log
# --------------------------------------------------------------------------------------------------


class EMA:
    """5.2: a running average of the weights, with decay min(decay, (1 + n) / (10 + n)) at update n.

    It runs beside training and does not train (E62)."""

    def __init__(self, model, decay):
        self.decay = decay
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names, self.parameters = zip(*trained)
        self.average = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, n):
        decay = min(self.decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(local_shards(self.average), local_shards(self.parameters), 1 - decay)

    @contextlib.contextmanager
    def averaged(self):
        """Inside this `with`, the model has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self):
        for p, average in zip(local_shards(self.parameters), local_shards(self.average)):
            raw = p.clone()  # then in place: FSDP holds on to the memory of a weight
            p.copy_(average)
            average.copy_(raw)

    def state_dict(self):
        return dict(zip(self.names, self.average))


def learning_rate(settings, n):
    """Linear warm-up, then linear decay to 0 after the last update, or a constant rate."""
    s = settings
    warmup = min(1, (n + 1) / max(1, s.warmup))
    decay = 1 if s.constant_lr else min(1, (s.updates - n) / max(1, s.updates - s.warmup))
    return s.lr * warmup * decay


class Muon(torch.optim.AdamW):
    """AdamW, except that each weight matrix W moves along an orthogonal matrix (not in the thesis).

        M <- 0.95 M + G
        W <- (1 - lr decay) W - lr sqrt(max(rows, columns)) orthogonal(G + 0.95 M)

    G is the gradient; the weight of a convolution is a matrix with one row per output channel. All
    directions of the step are equally long, so rare ones are learned as fast as common ones. The
    root makes its mean square lr^2. After K. Jordan and others, 2024.
    """

    def __init__(self, params, matrices, lr, **how):
        super().__init__(params, lr, **how)
        self.matrices = matrices

    @torch.no_grad()
    def step(self):
        super().step()
        lr, decay = (self.param_groups[0][name] for name in ("lr", "weight_decay"))
        alike = {}  # matrices of one shape are made orthogonal together
        for p in self.matrices:
            if p.grad is not None:  # not those of idle U-Nets
                alike.setdefault(p.flatten(1).shape, []).append(p)
        for params in alike.values():
            m = torch.stack([self.moved(p) for p in params])
            mine, direction = slice(rank(), None, world_size()), torch.zeros_like(m)
            direction[mine] = orthogonal(m[mine])  # each process computes some, the sum has all
            rate = lr * max(m.shape[1:]) ** 0.5
            for p, d in zip(params, all_reduce(direction)):
                p.mul_(1 - lr * decay).sub_(rate * d.view_as(p))

    def moved(self, p):
        """G + 0.95 M, with the new M."""
        if p not in self.state:
            self.state[p]["momentum"] = torch.zeros_like(p)
        momentum = self.state[p]["momentum"].mul_(0.95).add_(p.grad)
        return (p.grad + 0.95 * momentum).flatten(1)

    def zero_grad(self):
        super().zero_grad()
        for p in self.matrices:
            p.grad = None


def orthogonal(m):
    """About U V^T of the singular value decomposition m = U S V^T, by Newton and Schulz's steps.

    X <- S X,   S = a + b X X^T + c (X X^T)^2   leaves U and V and drives the singular values to
    about 1: these a, b and c are the fastest, and end between 0.7 and 1.2. S depends on X X^T only,
    so the loop multiplies small square matrices, and X once at the end: a third of the time for
    wide matrices. m: (..., rows, columns).
    """
    high = m.shape[-2] > m.shape[-1]
    x = m.mT if high else m
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    square = x @ x.mT
    product = identity = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    for _ in range(5):
        step = 3.4445 * identity - 4.775 * square + 2.0315 * square @ square
        product, square = step @ product, step @ square @ step
    x = product @ x
    return x.mT if high else x


def make_optimizer(player, settings):
    """AdamW, or Muon for the matrices of all layers but tables of embeddings."""
    s = settings
    how = {"betas": player.betas, "weight_decay": s.weight_decay, "fused": True}
    if s.optimizer == "adamw":
        return torch.optim.AdamW(player.parameters, s.lr, **how)
    tables = {m.weight for m in player.network.modules() if isinstance(m, torch.nn.Embedding)}
    matrices = [p for p in player.parameters if p.ndim > 1 and p not in tables]
    others = [p for p in player.parameters if p.ndim < 2 or p in tables]
    return Muon(others, matrices, s.lr, **how)


class Log:
    """log.csv, written by process 0: means over the updates since the last row.

    A resumed run drops the rows after its checkpoint and continues under a new run number.
    """

    COLUMNS = ("run", "update", "epoch", "seconds", "update_seconds", "memory", "lr")
    COLUMNS += ("train_loss", "train_grad_norm", "validation_loss", "validation_loss_ema")

    def __init__(self, path, run, start, more=()):
        self.path, self.run, self.columns = path, run, (*self.COLUMNS, *more)
        self.sums, self.counts, self.mark = {}, {}, (time.perf_counter(), start)
        if rank():
            return
        rows = plots.log_rows(path) if run > 1 else []
        with whole_file(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(row for row in rows if int(row["update"]) <= start)

    def add(self, values):
        """Tensors of an update. They are read only in `row`, so that a GPU need not wait."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()
            self.counts[name] = self.counts.get(name, 0) + 1

    def row(self, settings, update, epoch):
        """The next row: learning rate, seconds per update, peak memory of a GPU (MiB), means."""
        seconds = (time.perf_counter() - self.mark[0]) / (update - self.mark[1])
        row = {"update": update, "epoch": epoch, "lr": learning_rate(settings, update - 1)}
        row |= {"update_seconds": seconds, "memory": torch.cuda.max_memory_allocated() / 2**20}
        if self.sums:
            means = [(self.sums[name] / self.counts[name]).cpu().double() for name in self.sums]
            row |= dict(zip(self.sums, all_reduce_mean(torch.stack(means)).tolist()))
        self.sums, self.counts = {}, {}
        return row

    def write(self, row, seconds):
        if rank() == 0:
            row = {"run": self.run, "seconds": seconds} | row
            text = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns, restval="").writerow(text)


# --------------------------------------------------------------------------------------------------
# 4.7  Several processes
#
# torchrun starts R processes, on one machine or on several. Each runs this file. Update n has the
# images, noise and labels that it has in one process; each process computes every R-th of them.
#
#   ddp     Each process has all weights. Gradients are averaged during and after the backward pass,
#           before the optimiser's step. The thesis says before back-propagation, when there are no
#           gradients yet (E57).
#   fsdp    Each process has 1/R of every weight, and of its gradient, moments and average. The
#           weights of a block are gathered right before its forward pass and again before its
#           backward pass; then its gradients are averaged and scattered. Layers are not dealt out
#           one by one, and offloading does not move activations (E59).
#
# The networks know nothing of it: blocks are wrapped after they are built.
# --------------------------------------------------------------------------------------------------


def init_distributed(device="auto"):
    """Find the other processes that torchrun started."""
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    if gpus:
        if int(os.environ["LOCAL_WORLD_SIZE"]) > gpus:
            raise UserError(f"--nproc-per-node: this machine has {gpus} GPUs, one per process")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(hours=2))
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  one process speaks


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(value, op=dist.ReduceOp.SUM):
    """A number or tensor, summed over all processes. All must call it, so it also waits for all."""
    value = torch.as_tensor(value, dtype=None if torch.is_tensor(value) else torch.float64)
    if world_size() > 1:
        value = value.detach().clone()
        dist.all_reduce(value, op)
    return value


def all_reduce_mean(value):
    return all_reduce(value) / world_size()


@contextlib.contextmanager
def first_of_machine():
    """The first process of each machine enters this `with` alone; then the others follow."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        all_reduce(0.0)
    yield
    if first:
        all_reduce(0.0)


def parallel(players, settings):
    """Spread the networks of the players over the processes."""
    for player in players if dist.is_initialized() else ():
        if settings.strategy == "fsdp":
            shard(player.network, settings)
        else:
            how = {"find_unused_parameters": player.idle, "gradient_as_bucket_view": True}
            player.loss = DistributedDataParallel(LossModule(player.network, player.loss), **how)


class LossModule(torch.nn.Module):
    """A player's loss as a module, since DDP wraps modules."""

    def __init__(self, network, loss):
        super().__init__()
        self.network, self.forward = network, loss


def shard(model, settings):
    """FSDP: every block of the U-Net is a unit, its other layers are one more, the label table the
    last."""
    gpu, bf16 = settings.device != "cpu", settings.precision == "bf16"
    offload = fsdp.CPUOffloadPolicy(pin_memory=gpu)
    how = {
        "mesh": init_device_mesh("cuda" if gpu else "cpu", (world_size(),)),
        "reshard_after_forward": True,  # a validation has no backward pass that would do it
        "mp_policy": fsdp.MixedPrecisionPolicy(*[torch.bfloat16, torch.float32] * bf16),
        "offload_policy": offload if settings.cpu_offload else fsdp.OffloadPolicy(),
    }
    for part in (model.unet, model.context):
        part.to(memory_format=torch.contiguous_format)  # fully_shard accepts no other
        for block in blocks_of(part):
            fsdp.fully_shard(block, **how)
        fsdp.fully_shard(part, **how)


def unsynchronised(loss, last):
    """DDP averages the gradients of the last part of a batch only. FSDP averages those of every
    part: whole gradients would not fit."""
    ddp = isinstance(loss, DistributedDataParallel)
    return loss.no_sync() if ddp and not last else contextlib.nullcontext()


def local_shards(tensors):
    """Of sharded tensors the share of this process."""
    return [x.to_local() if isinstance(x, DTensor) else x for x in tensors]


def full_tensor(value):
    """The whole of a sharded tensor. All processes must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def blocks_of(unet):
    """The residual blocks and transformers: units of FSDP and of activation checkpointing."""
    return [m for m in unet.modules() if isinstance(m, ResBlock | SpatialTransformer)]


def checkpoint_activations(unet):
    """Keep the input of every block only; compute its inside again when the gradient needs it."""
    for block in blocks_of(unet):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


# --------------------------------------------------------------------------------------------------
# Checkpoints: one file of whole tensors, written by process 0. It opens under any strategy and any
# number of processes. The two newest are kept.
# --------------------------------------------------------------------------------------------------

KEPT = 2
CONTENT = {"stage", "settings", "data", "held_out", "update", "run", "seconds", "best", "tensors"}


def checkpoints(out):
    """The checkpoints of a run, the newest first."""
    return sorted(Path(out).glob("checkpoint_*.pt"), reverse=True)


def run_tensors(players, ema, stage):
    """All tensors that a run needs to continue, by name."""
    tensors = {f"ema.{name}": value for name, value in ema.state_dict().items()}
    tensors |= {f"stage.{name}": value for name, value in stage.state_dict().items()}
    for player in players:
        tensors |= {f"{player.name}.{k}": v for k, v in player.network.state_dict().items()}
        for name, p in player.network.named_parameters():
            moments = player.optimizer.state.get(p, {})
            tensors |= {f"{player.name}_optimizer.{name}.{k}": v for k, v in moments.items()}
    return tensors


def save(out, stage, players, ema, progress, best, checkpoint):
    """If `best`, write best.pt; if `checkpoint`, model.pt, the loss chart and the checkpoint."""
    tensors = {}
    for name, value in run_tensors(players, ema, stage).items():
        value = full_tensor(value)
        tensors[name] = value.cpu() if rank() == 0 else None  # one whole tensor at a time
    if rank():
        return
    raw = {k.removeprefix("train."): v for k, v in tensors.items() if k.startswith("train.")}
    average = {k.removeprefix("ema."): v for k, v in tensors.items() if k.startswith("ema.")}
    about = progress["stage"], progress["settings"], stage.classes, progress["update"]
    split = {name: progress[name] for name in ("data", "held_out")}
    for name in ["best.pt"] * bool(best) + ["model.pt"] * bool(checkpoint):
        ldm.save_model(out / name, *about, {"raw": raw, "ema": raw | average}, split)
    if checkpoint:  # its file last: after a kill, all the rest is computed again
        plots.draw_losses(plots.log_rows(out / "log.csv"), out / "loss.png", stage.loss_name)
        path = out / f"checkpoint_{progress['update']:08d}.pt"
        ldm.write_checkpoint(path, progress | {"tensors": tensors})
        for old in checkpoints(out)[KEPT:]:
            old.unlink()


def newest_checkpoint(out):
    """The newest checkpoint that can be read. Process 0 reads it; the others get no tensors."""
    found = None
    for path in checkpoints(out) if rank() == 0 else ():
        try:
            found = ldm.read_checkpoint(path, CONTENT)
            break
        except UserError as error:
            print(f"{error}; trying the one before")
    tensors = found.pop("tensors") if found else {}
    found = [found and found | {"names": set(tensors)}]
    if world_size() > 1:
        dist.broadcast_object_list(found)
    if found[0] is None:
        raise UserError(f"{out}: no checkpoint that can be read; without --resume a run begins")
    return found[0], tensors


def load_tensors(players, ema, stage, names, tensors):
    """Copy the tensors of a checkpoint, which process 0 has, into a run."""
    for player in players:
        for name, p in player.network.named_parameters():
            for key in ("step", "exp_avg", "exp_avg_sq", "momentum"):
                if f"{player.name}_optimizer.{name}.{key}" in names:
                    zeros = (
                        torch.zeros((), device=p.device) if key == "step" else torch.zeros_like(p)
                    )
                    player.optimizer.state[p][key] = zeros
    with torch.no_grad():
        for name, target in run_tensors(players, ema, stage).items():
            if name not in names:
                raise UserError(f"the checkpoint lacks {name}; it is of another version")
            value = tensors[name] if rank() == 0 else torch.empty(target.shape, dtype=target.dtype)
            value = value.contiguous()  # processes exchange memory, in one order for all
            if isinstance(target, DTensor):
                mesh = target.device_mesh
                value = distribute_tensor(value.to(mesh.device_type), mesh, target.placements)
                target.to_local().copy_(value.to_local())
                continue
            value = value.to(target.device)
            if world_size() > 1:
                dist.broadcast(value, 0)
            target.copy_(value)


# --------------------------------------------------------------------------------------------------
# The loop
# --------------------------------------------------------------------------------------------------


class Interruption:
    """Ctrl-C and SIGTERM ask to stop after the current update; a second Ctrl-C stops at once."""

    def __init__(self):
        self.signal, numbers = 0, (signal.SIGINT, signal.SIGTERM)
        self.before = {number: signal.signal(number, self) for number in numbers}

    def __call__(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self):
        """The signal that any process got; 0 = none."""
        return int(all_reduce(float(self.signal), dist.ReduceOp.MAX))

    def end(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def update(player, n, settings, autocast):
    """Update n of a network. Returns its loss and the norm of its gradient."""
    s, R, total = settings, world_size(), 0.0
    for i in range(s.accumulate):  # gradient accumulation
        part = slice(i * R + rank(), None, s.accumulate * R)
        with unsynchronised(player.loss, last=i == s.accumulate - 1):
            with autocast:
                loss = player.loss(n, part) / s.accumulate
            loss.backward()
        total = total + loss.detach()
    norm = full_tensor(torch.nn.utils.clip_grad_norm_(player.parameters, s.grad_clip))
    player.optimizer.param_groups[0]["lr"] = learning_rate(s, n)
    player.optimizer.step()
    player.optimizer.zero_grad()
    return total, norm


def loop(stage, players, ema, log, out, progress):
    """Train from update progress["update"] on. Returns the signal that stopped it; 0 = finished."""
    s, done, stopping = stage.settings, progress["update"], 0
    autocast, stop = mixed_precision(s), Interruption()
    bar = tqdm(total=s.updates, initial=done, unit="update", disable=True if rank() else None)
    clock = time.perf_counter() - progress["seconds"]

    def due(every):
        return done % every == 0 or done == s.updates

    for n in range(done, s.updates):
        for player in players:  # one; a VQ-GAN has two
            if n >= player.start:
                loss, norm = update(player, n, s, autocast)
                log.add({f"{player.name}_loss": loss, f"{player.name}_grad_norm": norm})
        log.add(stage.figures)
        ema.update(n + 1)
        bar.update()

        done, stopping = n + 1, stop.agreed()  # a later signal waits for the next update
        saving = due(s.save_every) or stopping
        if not (saving or due(s.validate_every) or due(s.preview_every) or due(10)):
            continue
        row = log.row(s, done, done * s.batch / len(stage.train_rows))
        with autocast:
            if due(s.validate_every):
                row |= validation(stage, ema)
            check_finite(row)  # before anything is saved
            if due(s.preview_every):
                row |= previews(stage, ema, out, done)
        progress |= {"update": done, "seconds": time.perf_counter() - clock}
        log.write(row, progress["seconds"])
        bar.set_postfix_str(f"loss {row['train_loss']:.4f}")
        loss = row.get("validation_loss_ema", row.get("validation_loss", math.inf))
        best = stage.best_from and done >= stage.best_from and loss < progress["best"]
        progress["best"] = loss if best else progress["best"]
        if best or saving:
            save(out, stage, players, ema, progress, best, saving)
        if stopping:
            break
        log.mark = time.perf_counter(), done
    bar.close()
    stop.end()
    return stopping if done < s.updates else 0


def check_finite(row):
    if not all(map(math.isfinite, row.values())):
        raise UserError(
            f"the loss or its gradient is not finite at update {row['update']}; nothing was saved, "
            "earlier checkpoints are untouched. Try a smaller --lr or --precision float32"
        )


def validation(stage, ema):
    """Numbers for the log with the raw and, as `..._ema`, with the averaged weights."""
    stage.model.eval()
    row = stage.validate()
    if ema.decay:
        with ema.averaged():
            row |= {f"{name}_ema": value for name, value in stage.validate().items()}
    stage.model.train()
    return row


def previews(stage, ema, out, update):
    """Draw a preview with the averaged weights and, unless it is the last, with the raw weights."""
    last = update == stage.settings.updates
    stage.model.eval()
    if not last:
        stage.preview(out / f"preview_{update:06d}_raw.png")
    with ema.averaged():
        name = stage.picture if last else f"preview_{update:06d}.png"
        row = stage.preview(out / name, final=last)
    stage.model.train()
    return row


def choose_size(name, typed):
    """--model auto: the thesis's size if a GPU can train it within a day, else the small one."""
    reason, gpu = "no NVIDIA or AMD GPU here", chosen_device(typed).startswith("cuda")
    for size in ("thesis", "small") if gpu else ("small",):
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # the run itself will say it
                s = new_settings(STAGES[name].Settings, typed | {"model": size})
                seconds = seconds_per_update(name, s)
        except torch.OutOfMemoryError:
            if size == "small":
                raise
            reason = "the thesis's batch does not fit into this GPU"
            continue
        hours = seconds * s.updates / 3600
        if size == "small" or hours <= 24:
            break
        reason = f"the thesis's would take {hours:.0f} hours here"
    why = reason if size == "small" else "it fits into this GPU"
    other = {"small": "thesis", "thesis": "small"}[size]
    length = f"{hours:.1f} hours" if hours >= 1 else f"{max(1, round(60 * hours))} min"
    print(
        f"--model {size}: {why}; its {s.updates:,} updates take about {length}. "
        f"--model {other} is the other one (see --help)"
    )
    return size


def seconds_per_update(name, settings, updates=2):
    """The time of some updates of a new run, after one that does not count."""
    stage = STAGES[name](settings)
    stage.start(resumed=False)
    players, average = ready(stage)  # the average needs memory, too
    for n in range(1 + updates):
        if n == 1:
            start = time.perf_counter()
        losses = [update(player, n, settings, mixed_precision(settings))[0] for player in players]
        sum(losses).item()  # waits for a GPU
    del average
    return all_reduce_mean((time.perf_counter() - start) / updates).item()


def ready(stage):
    """The players of a stage, with optimisers and spread over the processes, and its average."""
    players = stage.players()
    parallel(players, stage.settings)
    for player in players:
        player.parameters = [p for p in player.network.parameters() if p.requires_grad]
        player.optimizer = make_optimizer(player, stage.settings)
    return players, EMA(stage.model, stage.settings.ema)


def train(name, typed, resume):
    """A run of a stage, from its beginning or, with `resume`, from its newest checkpoint."""
    Kind = STAGES[name].Settings
    out = Path(typed.get("out", Kind.out))
    if resume:
        progress, tensors = newest_checkpoint(out)
        if progress["stage"] != name:
            raise UserError(f"--stage {name}: the run in {out} has --stage {progress['stage']}")
        s = resumed_settings(Kind, progress["settings"], typed)
    else:
        if checkpoints(out) or (out / "model.pt").exists():
            raise UserError(f"{out} holds a run: --resume continues it, --out DIR begins another")
        progress = {"stage": name, "update": 0, "run": 0, "seconds": 0.0, "best": math.inf}
        if typed.get("model", "auto") == "auto":
            typed = typed | {"model": choose_size(name, typed)}
        s = new_settings(Kind, typed)
    stage = STAGES[name](s)
    fingerprint = stage.data.fingerprint()
    if progress.setdefault("data", fingerprint) != fingerprint:
        raise UserError(f"--data {s.data}: not the images with which this run began")
    if resume:
        stage.divide(np.array(progress["held_out"], np.int64))
    else:
        progress["held_out"] = stage.held_out.tolist()
        stage.start(resumed=False)
    players, ema = ready(stage)
    if resume:
        load_tensors(players, ema, stage, progress.pop("names"), tensors)
        stage.start(resumed=True)
        before = progress["settings"]["updates"]
        if s.updates != before:
            rate = learning_rate(s, progress["update"])
            print(f"{s.updates} updates instead of {before}: the learning rate becomes {rate:.2g}")
    progress |= {"settings": asdict(s), "run": progress["run"] + 1}
    if progress["update"] >= s.updates:
        print(f"{out}: finished after {progress['update']} updates; --updates N trains it longer")
        return
    claim(out, progress["run"])
    log = Log(out / "log.csv", progress["run"], progress["update"], stage.columns)
    size = sum(p.numel() for p in players[0].parameters) / 1e6
    how = f", {s.accumulate} parts by {world_size()} processes" * (s.accumulate * world_size() > 1)
    print(f"{size:.1f}M parameters; {s.updates:,} updates of {s.batch} images{how}")
    stopped = loop(stage, players, ema, log, out, progress)
    all_reduce(0.0)  # until process 0 has written everything
    if stopped:
        print(f"stopped and saved after update {progress['update']}; to go on, add --resume")
        sys.exit(128 + stopped)
    command = stage.next.format(out=shlex.quote(str(out)))
    print(f"{out / stage.picture} shows what the model can do; next: {command}")


def claim(out, run):
    """Begin a run folder, unless another run began there; remove what a kill left half written."""
    if rank():
        return
    out.mkdir(parents=True, exist_ok=True)
    if run == 1:
        try:
            (out / "log.csv").touch(exist_ok=False)
        except FileExistsError:
            text = "holds a run that has not saved yet. If it runs no more, remove the folder"
            raise UserError(f"{out} {text}; else use another --out") from None
    for leftover in out.glob(".[0-9]*-*"):
        leftover.unlink()


def first_stage_for(typed):
    """The first stage of a new latent model: runs/vqgan, trained now if it is not finished."""
    run = Path(FirstStage.out)
    begun, there = bool(checkpoints(run)), (run / "model.pt").exists()
    content = ldm.read_checkpoint(run / "model.pt", {"settings", "update"}) if there else None
    if not there or begun and content["update"] < content["settings"]["updates"]:
        print(f"no --first-stage, and no finished one in {run}: training the small one first")
        shared = {name: typed[name] for name in ("data", "size", "device") if name in typed}
        train("vqgan", {} if begun else shared | {"model": "small"}, resume=begun)
    return str(run.resolve())


def main():
    name, typed, resume = parse()

    def program():
        if name == "ldm" and not resume and not typed.keys() & {"first_stage", "init"}:
            typed["first_stage"] = first_stage_for(typed)
        train(name, typed, resume)

    if "RANK" in os.environ:
        run_distributed(program, typed.get("device", "auto"))
    else:
        program()


def run_distributed(program, device="auto"):
    """Run it as one of torchrun's processes. The first of each machine reports errors for all."""

    def joined():
        init_distributed(device)
        try:
            program()
        except RuntimeError as error:
            if not any(word in str(error) for word in ("gloo", "NCCL", "Connection")):
                raise
            cause = str(error).strip().split("\n")[0]
            text = f"another process is gone ({cause}); --resume continues from the last checkpoint"
            raise UserError(text) from error

    code, others = 1, int(os.environ["LOCAL_RANK"]) > 0
    try:
        errors = open(os.devnull, "w") if others else sys.stderr  # noqa: SIM115
        with contextlib.redirect_stderr(errors):
            data.run_program(joined)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # threads of gloo would abort one regular exit in ten


if __name__ == "__main__":
    data.run_program(main)
