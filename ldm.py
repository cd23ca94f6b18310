"""A diffusion model as one object, and the file it lives in: sections 3.5.3, 4.4.3 and 4.4.5 of the thesis.

`PixelDiffusion` is the letters model: the network, its schedule, the names of its labels. Training and sampling know a
model only through `shape`, `eps`, `loss` and `decode`.
"""

import errno
import pickle
import zipfile
from pathlib import Path

import torch
from torch import nn

from data import UserError, whole_file
from ddpm import SCHEDULES, Diffusion
from unet import letters_unet


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
        """eps_theta(x_t, t, y). t: 1..T, an int or (B,); networks count from 0, here is where the two meet."""
        if isinstance(t, int):
            t = torch.full((len(x),), t, device=x.device)
        x = x.contiguous(memory_format=torch.channels_last)
        out = self.unet(x, t - 1, y=y).to(x.dtype)  # samplers extrapolate: bf16 would be amplified there
        return out if self.predict == "eps" else self.diffusion.eps_from_v(x, t, out)

    def loss(self, x_0, y, t, noise):
        """The squared error of what the network predicts, one value an image: L_simple (3.5.4) for eps."""
        loss = self.diffusion.loss(lambda x, t: self.eps(x, t, y), x_0, t, noise)
        return loss if self.predict == "eps" else loss / self.diffusion.at(self.diffusion.alpha_bar, t, loss)

    def decode(self, x):
        """From the space of the diffusion to images in [-1, 1], (B, 3, H, W): here they are the same."""
        return x.clamp(-1, 1)


def build_letters(settings, classes):
    """The letters model for the settings of a run, a dict as `train.py` saves it."""
    unet = letters_unet(settings["channels"], tuple(settings["multipliers"]), settings["blocks"], len(classes) + 1)
    beta = SCHEDULES[settings["schedule"]](settings["T"])
    return PixelDiffusion(unet, beta, classes, (3, 32, 32), settings["predict"]).to(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------------


def save_model(path, stage, settings, classes, update, weights):
    """Everything `sample.py` needs, in one file that loads with `weights_only=True`.

    settings: a dict; weights: name -> state dict; training saves "raw" and "ema".
    """
    content = {"stage": stage, "settings": settings, "classes": list(classes), "update": update, "weights": weights}
    write_checkpoint(path, content)


def load_model(path, weights="ema", device="cpu"):
    """The model of a run folder or of a model file, ready for sampling, with `settings` and `update` as attributes.

    Raises UserError for a file that is missing, truncated or not one of ours. Such a file cannot run code: only tensors and
    plain values are read.
    """
    path = Path(path)
    path = path / "model.pt" if path.is_dir() else path
    content = read_checkpoint(path, {"stage", "settings", "classes", "update", "weights"})
    if weights not in content["weights"]:
        raise UserError(f"{path} has no {weights!r} weights, only: {', '.join(content['weights'])}")
    model = build_letters(content["settings"], content["classes"])
    load_weights(model, content["weights"][weights], path)
    model.settings, model.update = content["settings"], content["update"]
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
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; python train.py --stage letters makes a model") from None
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a checkpoint that can be read (truncated, or not a PyTorch file of tensors)") from error
    if not isinstance(content, dict) or not keys <= content.keys():
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
