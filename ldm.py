"""A diffusion model as one object, and the files of every model: sections 3.5.3, 3.6, 4.4.3 to 4.4.5, 4.4.7 and 4.5.

A network, its schedule and the names of its labels: `PixelDiffusion` is the letters model, `LatentDiffusion` draws in the
latent space of a first stage. Training and sampling know a model only through `shape`, `eps`, `loss` and `decode`. Below:
building, saving and loading models, ours and the published ones.
"""

import errno
import hashlib
import pickle
from pathlib import Path

import torch
from torch import nn

from data import UserError, whole_file
from ddpm import SCHEDULES, Diffusion
from unet import latent_unet, letters_unet, noisy_classifier
from vqgan import VQGAN, Codebook, GaussianBottleneck, NoBottleneck, PerceptualLoss

# ------------------------------------------------------------------------------------------------------------------
# 3.6, 4.4.3  A network, a schedule and the names of labels as one model
# ------------------------------------------------------------------------------------------------------------------


def network_time(t, x):
    """Time as networks count it, from 0, for every row of x, (B,). t: 1..T, an int or (B,)."""
    return torch.full((len(x),), t - 1, device=x.device) if isinstance(t, int) else t - 1


class LabelledDiffusion(nn.Module):
    """What both models are: a network eps_theta(x_t, t, label) with its schedule.

    unet: the network; predict: what it predicts, "eps" as in the thesis or "v"; beta: the schedule, (T,); classes: the label
    names in order, the zero-label of 4.4.3 is the number after the last; shape: (C, H, W) of what is diffused.
    """

    guide_above = 0.0  # the noise above which classifier-free guidance is on unless told otherwise, see `sample.with_cfg`

    def __init__(self, unet, beta, classes, shape, predict="eps"):
        super().__init__()
        self.unet, self.classes, self.shape, self.predict = unet, list(classes), tuple(shape), predict
        self.diffusion = Diffusion(beta)
        self.zero_label = len(classes)

    @property
    def device(self):
        """Where x_t is."""
        return next(self.parameters()).device

    def eps(self, x, t, y):
        """eps_theta(x_t, t, y). t: 1..T, an int or (B,)."""
        x = x.contiguous(memory_format=torch.channels_last)
        out = self.unet(x, network_time(t, x), **self.condition(y)).to(x.dtype)  # samplers would amplify the rounding of bf16
        return out if self.predict == "eps" else self.diffusion.eps_from_v(x, t, out)

    def loss(self, x_0, y, t, noise):
        """The squared error of what the network predicts, one value an image: L_simple (3.5.4) for eps."""
        loss = self.diffusion.loss(lambda x, t: self.eps(x, t, y), x_0, t, noise)
        return loss if self.predict == "eps" else loss / self.diffusion.at(self.diffusion.alpha_bar, t, loss)


class PixelDiffusion(LabelledDiffusion):
    """The conditional DDPM in pixel space (4.4.5)."""

    def condition(self, y):
        """The label as the network takes it, by the name of the argument: added to the time embedding (fig. 4.6)."""
        return {"y": y}

    def decode(self, x):
        """From the space of the diffusion to images in [-1, 1], (B, 3, H, W): here they are the same."""
        return x.clamp(-1, 1)


class LatentDiffusion(LabelledDiffusion):
    """3.6, 4.5: the diffusion runs on z = latent_scale * E(x) of a frozen first stage; the label is a context (4.4.4).

    context: the table of label embeddings, 9 x 512 in the thesis, the zero-label last. A label y (B,) is one token: no
    position of the image can choose what to attend to, cross-attention then adds the same vector everywhere (E52). Labels
    y (B, n) are n tokens.
    latent_scale: 1 as published and in the thesis (E54); 1/std of the latents where their deviation is far from 1.
    """

    def __init__(self, unet, first_stage, beta, classes, shape, predict="eps", latent_scale=1.0, context_channels=512):
        super().__init__(unet, beta, classes, shape, predict)
        self.first_stage, self.latent_scale = first_stage.requires_grad_(False).eval(), latent_scale
        self.context = nn.Embedding(len(classes) + 1, context_channels)

    def train(self, mode=True):
        super().train(mode)
        self.first_stage.eval()
        return self

    @property
    def device(self):
        """Where x_t is; with FSDP's offloading the weights of the U-Net are elsewhere."""
        return next(self.first_stage.parameters()).device

    def condition(self, y):
        """The label as the network takes it: (B, n, context_channels), n tokens."""
        return {"context": self.context(y.view(len(y), -1))}

    @torch.no_grad()
    def encode(self, x):
        """Images (B, 3, H, W) in [-1, 1] -> z (B, C, H/f, W/f), not quantised (E54)."""
        return self.latent_scale * self.first_stage.encode(x)

    def decode(self, z):
        """z -> images in [-1, 1], (B, 3, f h, f w), a few at a time; with a code-book z is quantised first (E54)."""
        parts = (z / self.latent_scale).split(8)
        return torch.cat([self.first_stage.decode(part) for part in parts]).clamp(-1, 1)


class GuidingClassifier(nn.Module):
    """4.4.2: f(y | x_t, t) for images noised by the schedule of the diffusion that it is to guide (E47).

    network: `unet.NoisyClassifier`; beta: the schedule, (T,); classes: the label names in order; shape: (C, H, W) of x; space:
    what x is, see `space_of`.
    """

    def __init__(self, network, beta, classes, shape, space):
        super().__init__()
        self.network, self.classes, self.shape, self.space = network, list(classes), tuple(shape), space
        self.diffusion = Diffusion(beta)
        self.zero_label = len(classes)

    def log_f(self, x, t):
        """log f(y | x_t, t) for every label, (B, K), float32. t: 1..T, an int or (B,)."""
        x = x.contiguous(memory_format=torch.channels_last)
        return self.network(x, network_time(t, x)).float().log_softmax(1)

    def loss(self, x_0, y, t, noise):
        """The cross-entropy -log f(y | x_t, t) at a noised x_0, one value an image."""
        return -self.log_f(self.diffusion.q_sample(x_0, t, noise), t).gather(1, y[:, None])[:, 0]


# ------------------------------------------------------------------------------------------------------------------
# From settings to a model
# ------------------------------------------------------------------------------------------------------------------


def build_model(stage, settings, classes):
    """The model of a stage for the settings of a run, a dict as `train.py` saves it."""
    if stage == "vqgan":
        return build_first_stage(settings)
    return {"letters": build_letters, "ldm": build_latent, "classifier": build_classifier}[stage](settings, classes)


def build_letters(settings, classes):
    """The letters model (4.4.5)."""
    unet = letters_unet(settings["channels"], tuple(settings["multipliers"]), settings["blocks"], len(classes) + 1)
    beta = SCHEDULES[settings["schedule"]](settings["T"])
    return PixelDiffusion(unet, beta, classes, (3, 32, 32), settings["predict"]).to(memory_format=torch.channels_last)


def build_classifier(settings, classes):
    """The classifier of noised images or latents (4.4.2)."""
    sizes = (settings["channels"], tuple(settings["multipliers"]), settings["blocks"])
    network = noisy_classifier(settings["shape"], len(classes), *sizes)
    beta = SCHEDULES[settings["schedule"]](settings["T"])
    model = GuidingClassifier(network, beta, classes, settings["shape"], settings["space"])
    return model.to(memory_format=torch.channels_last)


def build_first_stage(settings):
    """The first stage (4.4.7)."""
    bottleneck = {
        "none": NoBottleneck,
        "kl": lambda: GaussianBottleneck(settings["kl_weight"]),
        "vq": lambda: Codebook(settings["codes"], settings["z_channels"], settings["beta"], settings["released"]),
    }[settings["bottleneck"]]()
    names = ("channels", "multipliers", "blocks", "attention_levels", "z_channels", "groups")
    return VQGAN(**{name: settings[name] for name in names}, bottleneck=bottleneck).to(memory_format=torch.channels_last)


def build_latent(settings, classes):
    """The latent model (4.5) with its first stage."""
    first_stage = build_first_stage(settings["first_stage_settings"])
    side = settings["size"] // first_stage.factor
    names = ("channels", "multipliers", "blocks", "context_channels", "attention_levels", "groups")
    unet = latent_unet(z_channels=first_stage.z_channels, **{name: settings[name] for name in names})
    beta, shape = SCHEDULES[settings["schedule"]](settings["T"]), (first_stage.z_channels, side, side)
    more = {name: settings[name] for name in ("predict", "latent_scale", "context_channels")}
    model = LatentDiffusion(unet, first_stage, beta, classes, shape, **more).to(memory_format=torch.channels_last)
    model.guide_above = settings.get("guide_above", 0.0)  # published models do not say
    return model


def fingerprint(module, *more):
    """A digest of a network, its weights, and whatever more."""
    digest = hashlib.sha256(repr((module, *more)).encode())
    for name, value in module.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def space_of(model):
    """What a model diffuses, in words: only models of one space understand each other's x_t."""
    if not isinstance(model, LatentDiffusion):
        return "pixels"
    return f"latents of {fingerprint(model.first_stage)} x {model.latent_scale:.6g}"


# ------------------------------------------------------------------------------------------------------------------
# Our files
# ------------------------------------------------------------------------------------------------------------------


def save_model(path, stage, settings, classes, update, weights):
    """Everything `sample.py` needs, in one file that loads with `weights_only=True`.

    settings: a dict; weights: name -> state dict; training saves "raw" and "ema".
    """
    content = {"stage": stage, "settings": settings, "classes": list(classes), "update": update, "weights": weights}
    write_checkpoint(path, content)


def load_model(path, weights="ema", device="cpu"):
    """The model of a run folder or of a model file, ready for use, with `stage`, `settings` and `update` as attributes.

    A published first stage or class-conditional model is opened as well. Raises UserError for a file that is missing,
    truncated or neither. Such a file cannot run code: only tensors and plain values are read.
    """
    path = Path(path)
    path = path / "model.pt" if path.is_dir() else path
    content = read_file(path)
    if "state_dict" in content:
        state = content["state_dict"]
        latent = any(name.startswith("model.diffusion_model.") for name in state)
        content = published_latent(state, path) if latent else published_first_stage(state, path, weights)
    require(content, {"stage", "settings", "classes", "update", "weights"}, path)
    if weights not in content["weights"]:
        raise UserError(f"{path} has no {weights!r} weights, only: {', '.join(content['weights'])}")
    settings, classes = content["settings"], content["classes"]
    try:
        model = build_model(content["stage"], settings, classes)
    except KeyError as error:
        raise UserError(f"{path}: a model file that lacks {error.args[0]!r}; it is of another version, or damaged") from None
    load_weights(model, content["weights"][weights], path)
    model.stage, model.settings, model.update = content["stage"], settings, content["update"]
    if settings.get("bottleneck") == "vq":
        model.quantize.active = content["update"] >= settings["quantise_from"]
    return model.to(device).eval()


def write_checkpoint(path, content):
    """A dict of tensors and plain values to a file, whole or not at all; UserError when the disk is full."""
    with whole_file(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # how torch.save reports a failed write
            raise OSError(errno.EIO, "the write failed, the disk may be full") from error


def read_checkpoint(path, keys):
    """The dict in a checkpoint file, which must have `keys`."""
    return require(read_file(path), keys, path)


def require(content, keys, path):
    if not keys <= content.keys():
        raise UserError(f"{path}: a PyTorch file, but not a checkpoint of this project")
    return content


def read_file(path):
    """The dict in a PyTorch file. Nothing in the file is run: of what is no tensor or plain value, Lightning's names become
    inert stand-ins, and any other is refused."""
    stand_ins = [(StandIn, name) for name in LIGHTNING_NAMES]
    try:
        with torch.serialization.safe_globals(stand_ins):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {what_makes(Path(path))}") from None
    except pickle.UnpicklingError as error:
        names = foreign_names(path)
        if names:
            raise UserError(f"{path}: refused, it asks to run {', '.join(names)}; only tensors are read") from None
        raise UserError(f"{path}: not a checkpoint that can be read (truncated, or not a PyTorch file)") from error
    except Exception as error:  # whatever torch's reader stumbles on in a file of another kind
        raise UserError(f"{path}: not a checkpoint that can be read (truncated, or not a PyTorch file)") from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict", {}), dict):
        raise UserError(f"{path}: a PyTorch file, but not a checkpoint of this project")
    return content


def what_makes(path):
    """The command that makes a missing run folder, or a missing file of one."""
    for stage in ("letters", "vqgan", "ldm", "classifier"):
        if Path("runs", stage) in (path, path.parent):
            return f"python train.py --stage {stage} makes it"
    return "python train.py --help says what makes one" if path.suffix else f"train.py makes it, with --out {path}"


def load_weights(module, state, path):
    """Load a state dict strictly (half precision becomes the module's); a difference is said in one readable line."""
    own = module.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    problems = [
        f"{len(names)} {what} (first: {names[0]})"
        for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", sorted(shapes)))
        if names
    ]
    if problems:
        raise UserError(f"{path}: the weights do not fit the model: {'; '.join(problems)}")
    module.load_state_dict(state)


# ------------------------------------------------------------------------------------------------------------------
# Published files
# ------------------------------------------------------------------------------------------------------------------

# What PyTorch Lightning's checkpoints name beside tensors: the key of a callback's state, and the best score as a NumPy scalar.
LIGHTNING_NAMES = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "_codecs.encode",
)


class StandIn:
    """Takes the place of whatever such a name would have built, and does nothing."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


def foreign_names(path):
    """The names in a file that neither torch's own loader nor LIGHTNING_NAMES knows."""
    try:
        return sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - set(LIGHTNING_NAMES))
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
        return []


def published_first_stage(state, path, weights):
    """The content of one of our model files, made from the state dict of a published one (`vq-f8`, `kl-f8`, ...)."""
    state = {name: value for name, value in state.items() if not name.startswith("loss.")}
    settings = first_stage_settings(state, path)
    return {"stage": "vqgan", "settings": settings, "classes": [], "update": 0, "weights": {weights: state}}


def first_stage_settings(state, path):
    """The settings of a published first stage, its network read off names and shapes."""
    try:
        levels = [int(name.split(".")[2]) for name in state if name.startswith("encoder.down.")]
        channels = len(state["encoder.conv_in.weight"])
        widths = [len(state[f"encoder.down.{i}.block.0.conv1.weight"]) for i in range(1 + max(levels))]
        z_channels = len(state["post_quant_conv.weight"])
        wide = len(state["quant_conv.weight"]) == 2 * z_channels
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: not a first stage, it has no {error.args[0]}") from None
    codes = state.get("quantize.embedding.weight", ())
    return {
        "channels": channels,
        "multipliers": tuple(width // channels for width in widths),
        "blocks": sum(f"encoder.down.0.block.{i}.conv1.weight" in state for i in range(16)),
        "attention_levels": tuple(i for i in range(len(widths)) if f"encoder.down.{i}.attn.0.q.weight" in state),
        "z_channels": z_channels,
        "groups": 32,
        "bottleneck": "vq" if len(codes) else "kl" if wide else "none",
        "codes": max(1, len(codes)),
        **{"size": 256, "quantise_from": 0, "beta": 0.25, "released": True, "kl_weight": 1e-6},
    }


# What the published names begin with, and what ours do. The rest of such a file is tables, which the schedule gives.
PUBLISHED_PARTS = {
    "model.diffusion_model.": "unet.",
    "first_stage_model.": "first_stage.",
    "cond_stage_model.embedding.": "context.",
}
PUBLISHED_TABLES = (
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance"),
    *("posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
)


def published_latent(state, path):
    """The content of one of our model files, made from the state dict of a published class-conditional model (`cin`).

    1001 labels are the 1000 of ImageNet and a zero-label. Any other table has none: the mean of the labels stands in for it,
    untrained. The published average leaves the label table out; that of "ema" is the trained one.
    """
    parts = {ours: {} for ours in PUBLISHED_PARTS.values()}
    average, unknown = {}, {}
    for name, value in state.items():
        prefix = next((prefix for prefix in PUBLISHED_PARTS if name.startswith(prefix)), None)
        if prefix:
            parts[PUBLISHED_PARTS[prefix]][name.removeprefix(prefix)] = value
        elif name.startswith("model_ema."):
            average[name.removeprefix("model_ema.")] = value
        elif name not in PUBLISHED_TABLES:
            unknown[name] = value
    table = parts["context."].get("weight")
    if table is None:
        raise UserError(f"{path}: not a class-conditional model, it has no cond_stage_model.embedding.weight")
    settings = latent_settings(parts["unet."], path)
    settings["first_stage_settings"] = first_stage_settings(parts["first_stage."], path)
    settings |= {"size": 256, "T": check_schedule(state, path), "latent_scale": float(unknown.pop("scale_factor", 1.0))}
    settings["p_uncond"] = 0.1 if len(table) == 1001 else 0.0
    if not settings["p_uncond"]:
        parts["context."]["weight"] = torch.cat([table, table.mean(0, keepdim=True)])
    raw = unknown | {ours + name: value for ours, part in parts.items() for name, value in part.items()}
    weights = {"raw": raw}
    if average:
        for name in ("decay", "num_updates"):
            average.pop(name, None)
        dotted = {"diffusion_model" + name.replace(".", ""): f"unet.{name}" for name in parts["unet."]}
        kept = {name: value for name, value in raw.items() if not name.startswith("unet.")}
        weights["ema"] = kept | {dotted.get(name, f"model_ema.{name}"): value for name, value in average.items()}
    classes = [str(i) for i in range(len(parts["context."]["weight"]) - 1)]
    return {"stage": "ldm", "settings": settings, "classes": classes, "update": 0, "weights": weights}


def latent_settings(state, path):
    """The settings of a published latent U-Net, read off its names and shapes."""
    try:
        channels, z_channels = state["input_blocks.0.0.weight"].shape[:2]
        inputs = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("input_blocks."))
        levels = 1 + sum(name.startswith("input_blocks.") and name.endswith(".0.op.weight") for name in state)
        blocks = inputs // levels - 1  # of every level: `blocks` blocks and one more entry, the first convolution or an `op`
        last = [(level + 1) * (blocks + 1) - 1 for level in range(levels)]  # the last block of every level
        multipliers = tuple(len(state[f"input_blocks.{i}.0.out_layers.3.weight"]) // channels for i in last)
        context_channels = state["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1]
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: not a latent U-Net with cross-attention, it has no {error.args[0]}") from None
    return {
        "channels": channels,
        "multipliers": multipliers,
        "blocks": blocks,
        "attention_levels": tuple(level for level, i in enumerate(last) if f"input_blocks.{i}.1.proj_in.weight" in state),
        "groups": 32,
        "context_channels": context_channels,
        "schedule": "sqrt_linear",
        "predict": "eps",
    }


def check_schedule(state, path):
    """The number of steps of a published model, whose schedule must be ours."""
    beta = state.get("betas", torch.zeros(0)).double()
    ours = SCHEDULES["sqrt_linear"](len(beta))
    if not len(beta) or (beta - ours).abs().max() > 1e-6:
        ends = f"betas {beta[0]:.6f} to {beta[-1]:.6f}" if len(beta) else "no betas"
        raise UserError(f"{path}: {ends}, but the schedule known here is linear in sqrt(beta) from 0.001500 to 0.019500")
    return len(beta)


def published_losses(path):
    """The state dicts of a published first stage's networks for the losses: {"discriminator": ..., "perceptual_loss": ...}.

    Empty where `path` is one of our files.
    """
    state = read_file(path).get("state_dict", {}) if Path(path).is_file() else {}
    parts = {}
    for name, value in state.items():
        _, _, rest = name.partition("loss.")
        part, _, inside = rest.partition(".")
        if name.startswith("loss.") and inside:
            parts.setdefault(part, {})[inside] = value
    return parts


# name, sha256 and size (where published), and where it comes from
VGG16_FILE = "vgg16-397923af.pth"
LPIPS_FILE = "vgg.pth"
PERCEPTUAL_FILES = {
    VGG16_FILE: (
        ("sha256", "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"),
        "https://download.pytorch.org/models/vgg16-397923af.pth",
    ),
    LPIPS_FILE: (
        ("md5", "d507d7349b931f0638a25a48a722f98a"),
        "lpips/weights/v0.1/vgg.pth inside the package lpips 0.1.4 (7,289 bytes)",
    ),
}


def load_perceptual(source=None):
    """The perceptual loss with its weights (3.2.2).

    source: a folder with the two files of `PERCEPTUAL_FILES` (default: where torch.hub keeps its own), or a published first
    stage, which holds them too. Raises UserError, naming what is missing, its checksum and where it comes from.
    """
    source = Path(source or Path(torch.hub.get_dir()) / "checkpoints")
    loss = PerceptualLoss()
    if source.is_file():
        load_weights(loss, published_losses(source).get("perceptual_loss", {}), source)
        return loss.eval()
    for name, ((kind, digest), origin) in PERCEPTUAL_FILES.items():
        if not (source / name).is_file():
            raise UserError(f"{source / name} is not there; it is {origin}, {kind} {digest}")
        with (source / name).open("rb") as file:
            if hashlib.file_digest(file, kind).hexdigest() != digest:
                raise UserError(f"{source / name}: its {kind} is not {digest}; take it from {origin}")
    return perceptual_from(read_file(source / VGG16_FILE), read_file(source / LPIPS_FILE), source)


def perceptual_from(vgg16, heads, source):
    """The perceptual loss from torchvision's state dict of VGG16 (`features.<n>.weight`, ...) and LPIPS's heads."""
    loss = PerceptualLoss()
    state = {name: value for name, value in loss.state_dict().items() if name.startswith("scaling_layer.")} | heads
    for name in loss.net.state_dict():
        state[f"net.{name}"] = vgg16["features." + name.partition(".")[2]]
    load_weights(loss, state, source)
    return loss.eval()
