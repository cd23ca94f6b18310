"""A diffusion model as one object, and the files of every model: sections 3.5.3, 4.4.3, 4.4.5 and 4.4.7 of the thesis.

`PixelDiffusion` is the letters model: the network, its schedule, the names of its labels. Training and sampling know a
model only through `shape`, `eps`, `loss` and `decode`. Below it: building, saving and loading models, ours and the published
first stages.
"""

import errno
import hashlib
import pickle
import zipfile
from pathlib import Path

import torch
from torch import nn

from data import UserError, whole_file
from ddpm import SCHEDULES, Diffusion
from unet import letters_unet, noisy_classifier
from vqgan import VQGAN, Codebook, GaussianBottleneck, NoBottleneck, PerceptualLoss


def network_time(t, x):
    """Time as networks count it, from 0, for every row of x, (B,). t: 1..T, an int or (B,)."""
    return torch.full((len(x),), t - 1, device=x.device) if isinstance(t, int) else t - 1


class PixelDiffusion(nn.Module):
    """The conditional DDPM in pixel space (4.4.5).

    unet: the network; predict: what it predicts, "eps" as in the thesis or "v"; beta: the schedule, (T,); classes: the label
    names in order, the zero-label of 4.4.3 is the number after the last; shape: (C, H, W) of one image.
    """

    def __init__(self, unet, beta, classes, shape, predict="eps"):
        super().__init__()
        self.unet, self.classes, self.shape, self.predict = unet, list(classes), tuple(shape), predict
        self.diffusion = Diffusion(beta)
        self.zero_label = len(classes)

    def eps(self, x, t, y):
        """eps_theta(x_t, t, y). t: 1..T, an int or (B,)."""
        x = x.contiguous(memory_format=torch.channels_last)
        out = self.unet(x, network_time(t, x), y=y).to(x.dtype)  # samplers extrapolate: bf16 would be amplified there
        return out if self.predict == "eps" else self.diffusion.eps_from_v(x, t, out)

    def loss(self, x_0, y, t, noise):
        """The squared error of what the network predicts, one value an image: L_simple (3.5.4) for eps."""
        loss = self.diffusion.loss(lambda x, t: self.eps(x, t, y), x_0, t, noise)
        return loss if self.predict == "eps" else loss / self.diffusion.at(self.diffusion.alpha_bar, t, loss)

    def decode(self, x):
        """From the space of the diffusion to images in [-1, 1], (B, 3, H, W): here they are the same."""
        return x.clamp(-1, 1)


class GuidingClassifier(nn.Module):
    """4.4.2: f(y | x_t, t) for images noised by the schedule of the diffusion that it is to guide (E47).

    network: `unet.NoisyClassifier`; beta: the schedule, (T,); classes: the label names in order; shape: (C, H, W) of x.
    """

    def __init__(self, network, beta, classes, shape):
        super().__init__()
        self.network, self.classes, self.shape = network, list(classes), tuple(shape)
        self.diffusion = Diffusion(beta)
        self.zero_label = len(classes)

    def log_f(self, x, t):
        """log f(y | x_t, t) for every label, (B, K), float32. t: 1..T, an int or (B,)."""
        x = x.contiguous(memory_format=torch.channels_last)
        return self.network(x, network_time(t, x)).float().log_softmax(1)

    def loss(self, x_0, y, t, noise):
        """The cross-entropy -log f(y | x_t, t) at a noised x_0, one value an image."""
        return -self.log_f(self.diffusion.q_sample(x_0, t, noise), t).gather(1, y[:, None])[:, 0]


def build_letters(settings, classes):
    """The letters model for the settings of a run, a dict as `train.py` saves it."""
    unet = letters_unet(settings["channels"], tuple(settings["multipliers"]), settings["blocks"], len(classes) + 1)
    beta = SCHEDULES[settings["schedule"]](settings["T"])
    return PixelDiffusion(unet, beta, classes, (3, 32, 32), settings["predict"]).to(memory_format=torch.channels_last)


def build_classifier(settings, classes):
    """The classifier of 4.4.2 for the settings of a run, a dict as `train.py` saves it."""
    sizes = (settings["channels"], tuple(settings["multipliers"]), settings["blocks"])
    network = noisy_classifier(settings["shape"], len(classes), *sizes)
    beta = SCHEDULES[settings["schedule"]](settings["T"])
    return GuidingClassifier(network, beta, classes, settings["shape"]).to(memory_format=torch.channels_last)


def build_first_stage(settings):
    """The first stage (4.4.7) for the settings of a run, a dict as `train.py` saves it."""
    bottleneck = {
        "none": NoBottleneck,
        "kl": lambda: GaussianBottleneck(settings["kl_weight"]),
        "vq": lambda: Codebook(settings["codes"], settings["z_channels"], settings["beta"], settings["released"]),
    }[settings["bottleneck"]]()
    names = ("channels", "multipliers", "blocks", "attention_levels", "z_channels", "groups")
    return VQGAN(**{name: settings[name] for name in names}, bottleneck=bottleneck).to(memory_format=torch.channels_last)


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

    A published first stage is opened as well. Raises UserError for a file that is missing, truncated or neither. Such a file
    cannot run code: only tensors and plain values are read.
    """
    path = Path(path)
    path = path / "model.pt" if path.is_dir() else path
    content = read_file(path)
    if "state_dict" in content:
        content = published_first_stage(content["state_dict"], path, weights)
    require(content, {"stage", "settings", "classes", "update", "weights"}, path)
    if weights not in content["weights"]:
        raise UserError(f"{path} has no {weights!r} weights, only: {', '.join(content['weights'])}")
    settings, classes = content["settings"], content["classes"]
    model = {
        "letters": lambda: build_letters(settings, classes),
        "classifier": lambda: build_classifier(settings, classes),
        "vqgan": lambda: build_first_stage(settings),
    }[content["stage"]]()
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
        raise UserError(f"{path}: no such file; python train.py --help says what makes one") from None
    except pickle.UnpicklingError as error:
        names = foreign_names(path)
        if names:
            raise UserError(f"{path}: refused, it asks to run {', '.join(names)}; only tensors are read") from None
        raise UserError(f"{path}: not a checkpoint that can be read (truncated, or not a PyTorch file)") from error
    except (OSError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a checkpoint that can be read (truncated, or not a PyTorch file)") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a PyTorch file, but not a checkpoint of this project")
    return content


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
    settings = first_stage_settings(state, path) | {"size": 256, "quantise_from": 0}
    settings |= {"beta": 0.25, "released": True, "kl_weight": 1e-6}
    return {"stage": "vqgan", "settings": settings, "classes": [], "update": 0, "weights": {weights: state}}


def first_stage_settings(state, path):
    """The network a published state dict belongs to, read off its names and shapes."""
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
    }


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
