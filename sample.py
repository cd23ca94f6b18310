"""Pictures from a trained model: sections 3.5.3, 4.4.2, 4.4.3, 4.6 and 5.3.1 of the thesis, and 3.1 and 4.4.7 of a first stage.

    python sample.py --text HELLO                                      a word, with the model that comes with the project
    python sample.py --run runs/letters --label A --n 16 --out a.png   sixteen times the letter A
    python sample.py --run runs/letters --grid                         one row a label, the zero-label last
    python sample.py --run runs/letters --label R --strip              the denoising path; --gif shows it moving
    python sample.py --run runs/letters --per-label 64 --out samples   one folder a label; stops, and goes on where it was
    torchrun --nproc-per-node 2 -- sample.py --per-label 64 ...        the same by two processes
    python sample.py --run runs/ldm --scales 1 2 5 15                  grids at several guidance scales, and a table
    python sample.py --run runs/ldm --label blue --size 128            larger than it was trained: a larger latent
    python sample.py --reconstruct paintings                           what a first stage keeps of them (or of image files)

To a sampler a model is a function `eps(x, t)`. Guidance and clipping wrap that function; a sampler knows neither network
nor label. Samplers are generators: after every step they yield (t, x_t, predicted x_0), and the last x is the sample.

To other programs this file is two functions:  generate(load("runs/letters"), ["A", "B"])  returns uint8 images.
"""

import argparse
import json
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from data import (
    ASSETS,
    UserError,
    best_device,
    check_device,
    grid,
    load_image,
    npy_header,
    open_paintings,
    picture_name,
    run_program,
    side_by_side,
    stacked,
    to_tensor,
    to_uint8,
    tune,
    whole_file,
)
from ddpm import Diffusion, classifier_free_guidance, classifier_guided_eps, classifier_guided_mean
from fid import mean_colour_distances, psnr, variety
from ldm import fingerprint, load_model, space_of

# ------------------------------------------------------------------------------------------------------------------
# 4.6  Time steps
# ------------------------------------------------------------------------------------------------------------------


def timesteps(T, S):
    """S + 1 falling time steps from T to 0: exactly S steps for every 1 <= S <= T, the last one reaching the clean image."""
    if not 1 <= S <= T:
        raise ValueError(f"{S} steps; expected 1 to {T}")
    return [T * i // S for i in range(S, -1, -1)]


def published_timesteps(T, S):
    """The table of the published latent diffusion sampler, in the thesis's count of t: T//S apart, from 2 on, ending at t = 1.

    Its path stops one step short of the clean image, and its length is S only where S divides T (E56). S = 50:
    982, 962, ..., 22, 2, 1. Raises ValueError where the published code reads past the end of its tables.
    """
    steps = range(2, T + 2, T // S)
    if steps[-1] > T:
        raise ValueError(f"the published table for {S} steps contains {steps[-1]}, past the last step {T}")
    return [*reversed(steps), 1]


# ------------------------------------------------------------------------------------------------------------------
# 3.5.3, 4.6.1  Samplers: pure functions of eps(x, t), the start x, the time steps and the table alpha_bar
# ------------------------------------------------------------------------------------------------------------------


def ddpm(eps, x, times, alpha_bar, noise, variance="beta_tilde", gradient=None, scale=1.0):
    """3.5.3, ancestral sampling:  x_{t-1} = mu_theta(x_t, t) + sigma_t xi  (E29).

    On a subset of the time steps it is ancestral sampling of the shorter chain, whose beta are 1 - alpha_bar_t/alpha_bar_t'.
    times must end at 0. noise: function () -> standard normal like x; variance: see `Diffusion.p_sample`; gradient: function
    (x, t) -> grad log f(y | x_t, t), which shifts the mean as in eq. 4.1 (corrected, E48), `scale` times.
    """
    kept = alpha_bar[times[::-1]]
    chain = Diffusion(1 - kept[1:] / kept[:-1])
    for i, (t, t_next) in zip(range(chain.T, 0, -1), zip(times, times[1:])):
        e = eps(x, t)
        x_0 = chain.predict_x0(x, i, e)
        x_t, x = x, chain.p_sample(x, i, e, noise(), variance)
        if gradient:  # to the mean or to the sum of mean and noise, it is the same
            x = classifier_guided_mean(x, chain.at(chain.sigma2(variance), i, x), gradient(x_t, t), scale)
        yield t_next, x, x_0


def ddim_step(x, e, a, a_next, sigma=0.0):
    """4.6.1, DDIM (E56):  x_{t'} = sqrt(a') x_0 + sqrt(1 - a' - sigma^2) eps,  x_0 = (x_t - sqrt(1 - a) eps) / sqrt(a).

    At sigma = 0 divide by sqrt(a'): with y = x / sqrt(a) and the ratio of noise to signal r = sqrt((1 - a) / a) it reads
    y' = y + (r' - r) eps, one step of Euler's method for dy/dr = eps. That is the transfer of the PLMS paper, whose own way to
    write the factor of eps avoids the difference of two roots.

    a, a': alpha_bar at t and t'. The noise sigma xi is the caller's. Returns (x_{t'}, x_0).
    """
    x_0 = (x - (1 - a) ** 0.5 * e) / a**0.5
    return a_next**0.5 * x_0 + (1 - a_next - sigma**2) ** 0.5 * e, x_0


def ddim(eps, x, times, alpha_bar, eta=0.0, noise=None):
    """4.6.1, DDIM: `ddim_step` with sigma = eta sqrt((1 - a')/(1 - a)) sqrt(1 - a/a').

    eta = 0 is deterministic, eta = 1 has the variance of ancestral sampling; eta > 0 needs `noise`, a function () -> xi.
    """
    for t, t_next in zip(times, times[1:]):
        a, a_next = alpha_bar[t].item(), alpha_bar[t_next].item()
        sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)) ** 0.5
        x, x_0 = ddim_step(x, eps(x, t), a, a_next, sigma)
        if sigma:
            x = x + sigma * noise()
        yield t_next, x, x_0


def plms(eps, x, times, alpha_bar):
    """4.6.1, PLMS ("PLSM" in the heading, E56): the DDIM transfer with eps' extrapolated from the last four predictions.

        eps' = (55 e_0 - 59 e_1 + 37 e_2 - 9 e_3) / 24          e_0 the newest: Adams-Bashforth of order 4

    Where DDIM takes dy/dr = eps as constant over a step (see `ddim_step`), this draws a cubic through the last four eps, over
    the index of the step, and takes its mean over the step to come; the weights are that integral's and sum to 1.

    The history fills up with orders 2 and 3 after one improved Euler step, as in the published sampler; that step looks
    ahead once, so S steps cost S + 1 evaluations. The history holds the predictions themselves, never eps'.

    A single step has nothing to look ahead to, and where a' > sqrt(a) looking ahead does harm: where the second evaluation
    predicts an x_0 that differs by d from the first one's, the mean of both eps moves x_{t'} by a' / (2 sqrt(a)) d. Of 50 steps
    that is 10 d for the cosine schedule, whose alpha_bar_T is 2e-9, and 0.005 d for the linear one. The first step is then
    plain DDIM.
    """
    history = []
    for t, t_next in zip(times, times[1:]):
        a, a_next = alpha_bar[t].item(), alpha_bar[t_next].item()
        e = eps(x, t)
        if not history and (len(times) == 2 or a_next > a**0.5):
            e_prime = e
        elif not history:
            ahead, _ = ddim_step(x, e, a, a_next)
            e_prime = (e + eps(ahead, t_next)) / 2
        elif len(history) == 1:
            e_prime = (3 * e - history[0]) / 2
        elif len(history) == 2:
            e_prime = (23 * e - 16 * history[0] + 5 * history[1]) / 12
        else:
            e_prime = (55 * e - 59 * history[0] + 37 * history[1] - 9 * history[2]) / 24
        history = [e, *history[:2]]
        x, x_0 = ddim_step(x, e_prime, a, a_next)
        yield t_next, x, x_0


def dpm(eps, x, times, alpha_bar):
    """DPM-Solver++ 2M (not in the thesis): the DDIM transfer with x_0' extrapolated from the last two predictions of x_0.

        x_0' = x_0 + (x_0 - x_0_before) h / (2 h_before),     h = lambda_t' - lambda_t,  lambda = 1/2 log(a / (1 - a))

    Where PLMS extrapolates eps over the index of the step, this extrapolates x_0 over lambda, half the logarithm of the
    signal-to-noise ratio. One evaluation a step. lambda is infinite at t = 0: a step to there is plain DDIM.
    """
    lam = (alpha_bar / (1 - alpha_bar)).log() / 2
    before = h_before = None
    for t, t_next in zip(times, times[1:]):
        a, a_next, h = alpha_bar[t].item(), alpha_bar[t_next].item(), (lam[t_next] - lam[t]).item()
        x_0 = (x - (1 - a) ** 0.5 * eps(x, t)) / a**0.5
        first_order = before is None or t_next == 0
        x_0_prime = x_0 if first_order else x_0 + (x_0 - before) * (h / (2 * h_before))
        before, h_before = x_0, h
        x, _ = ddim_step(x, (x - a**0.5 * x_0_prime) / (1 - a) ** 0.5, a, a_next)
        yield t_next, x, x_0


# ------------------------------------------------------------------------------------------------------------------
# 4.4.2, 4.4.3  What wraps eps(x, t)
# ------------------------------------------------------------------------------------------------------------------


def with_labels(model, y):
    """eps(x, t) of a model for the labels y, (B,)."""
    return lambda x, t: model.eps(x, t, y)


def with_cfg(model, y, scale, guide_above=0.0):
    """Classifier-free guidance as eps(x, t): zero-label and label in one batch, one evaluation at scale 1 or 0 (E49).

    guide_above: N; guided only while the noise, sqrt((1 - alpha_bar_t)/alpha_bar_t), is above it, then scale 1 (not in the
    thesis). For Gaussian data the mean of the samples is then not m_0 + s (m_y - m_0) but, where x_0 has the deviation S,

        m_y + S / sqrt(S^2 + N^2) (s - 1) (m_y - m_0)

    so that a large scale moves what varies most, the colour of the picture as a whole, and hardly any single position.
    """
    zero = torch.full_like(y, model.zero_label)
    if scale in (0, 1):
        return with_labels(model, y if scale else zero)

    labels, alpha_bar = torch.cat([zero, y]), model.diffusion.alpha_bar

    def eps(x, t):
        if 1 - alpha_bar[t] <= guide_above**2 * alpha_bar[t]:
            return model.eps(x, t, y)
        eps_zero, eps_y = model.eps(torch.cat([x, x]), t, labels).chunk(2)
        return classifier_free_guidance(eps_zero, eps_y, scale)

    return eps


def classifier_gradient(classifier, y):
    """4.4.2:  grad_{x_t} log f(y | x_t, t)  as a function of (x, t), for the labels y, (B,).

    The gradient of the sum over the batch: no image is in another's log f. The zero-label, which no classifier
    knows, has the log f of certainty, 0, and so no gradient.
    """

    def gradient(x, t):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            log_f = F.pad(classifier.log_f(x, t), (0, 1)).gather(1, y[:, None])  # (B, 1)
            return torch.autograd.grad(log_f.sum(), x)[0]

    return gradient


def with_classifier(eps, gradient, scale, alpha_bar):
    """Classifier guidance of a sampler that only knows eps (E48); eps is that of the zero-label, so scale 1 is Bayes' rule."""
    return lambda x, t: classifier_guided_eps(eps(x, t), alpha_bar[t].item(), gradient(x, t), scale)


def in_bf16(function, device):
    """function(x, t) under bf16 autocast; the sampler around it stays in float32."""

    def call(x, t):
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            return function(x, t)

    return call


def with_clipping(eps, diffusion):
    """eps(x, t) whose predicted x_0 is clamped to [-1, 1]: for pixels only, never for latents; not in the thesis (E29)."""

    def clipped(x, t):
        x_0 = diffusion.predict_x0(x, t, eps(x, t)).clamp(-1, 1)
        return diffusion.predict_eps(x, t, x_0)

    return clipped


# ------------------------------------------------------------------------------------------------------------------
# Generation
# ------------------------------------------------------------------------------------------------------------------


class ImageNoise:
    """Standard normal noise with a generator of its own for every image: an image depends on its seed, not on its batch."""

    def __init__(self, seeds, shape, device):
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self.shape, self.device = shape, device

    def __call__(self):
        noise = torch.stack([torch.randn(self.shape, generator=generator) for generator in self.generators])
        return noise.to(self.device, non_blocking=True)


SAMPLERS = ("plms", "ddim", "ddpm", "dpm")


@torch.no_grad()
def denoise(
    model, y, seeds, sampler="plms", steps=50, scale=2.0, guide_above=None, eta=0.0, clip=False, classifier=None, bf16=False
):
    """A sampler at work, (t, x, x_0) after every step, for labels y (B,) and one seed an image.

    steps: how many, spread evenly, or the list of time steps itself; guide_above: see `with_cfg`, by default the model's
    own; classifier: guides instead of the model's own labels.
    """
    guide_above = model.guide_above if guide_above is None else guide_above
    alpha_bar = model.diffusion.alpha_bar
    times = steps if isinstance(steps, list) else timesteps(model.diffusion.T, steps)
    device = model.device
    noise = ImageNoise(seeds, model.shape, device)
    y, gradient = torch.as_tensor(y, device=device), None
    eps = with_cfg(model, y, 0 if classifier else scale, guide_above)
    if classifier and scale:
        gradient = classifier_gradient(classifier, y)
    if bf16:
        eps, gradient = in_bf16(eps, device), gradient and in_bf16(gradient, device)
    if gradient and sampler != "ddpm":
        eps = with_classifier(eps, gradient, scale, alpha_bar)
    if clip:
        eps = with_clipping(eps, model.diffusion)
    x_T = noise()
    if sampler == "ddpm":
        yield from ddpm(eps, x_T, times, alpha_bar, noise, gradient=gradient, scale=scale)
    elif sampler == "ddim":
        yield from ddim(eps, x_T, times, alpha_bar, eta, noise)
    else:
        yield from {"plms": plms, "dpm": dpm}[sampler](eps, x_T, times, alpha_bar)


def step_count(steps):
    return len(steps) - 1 if isinstance(steps, list) else steps


def default_run():
    run = next((p for p in ("runs/letters/model.pt", ASSETS / "letters.pt") if Path(p).exists()), None)
    if run is None:
        raise UserError("no model yet: python train.py --stage letters makes one in runs/letters")
    return run


def load(run=None, weights="ema", device="cpu", compile=False):
    """A model that draws: that of a run folder or model file, by default the newest letters model there is."""
    run = run or default_run()
    model = load_model(run, weights, device)
    if model.stage == "classifier":
        raise UserError(f"{run} is a classifier, it guides another model: --guidance classifier --classifier {run}")
    if model.stage == "vqgan":
        raise UserError(f"{run} is a first stage, it draws nothing by itself; --reconstruct IMAGES shows what it keeps of them")
    if compile:
        model.unet.compile()
    return model


def load_classifier(run, model, weights="ema", compile=False):
    """The classifier of `run` to guide `model` with."""
    device = model.device
    classifier = load_model(run, weights, device)
    if classifier.stage != "classifier":
        raise UserError(f"{run} is no classifier; python train.py --stage classifier makes one in runs/classifier")
    same_schedule = torch.equal(classifier.diffusion.beta, model.diffusion.beta)
    same = classifier.classes == model.classes and classifier.shape == model.shape and classifier.space == space_of(model)
    if not (same and same_schedule):
        raise UserError(f"{run}: its labels, images or noise schedule are not those of the model that it is to guide (E47)")
    if compile:
        classifier.network.compile()
    return classifier


@torch.no_grad()
def generate(model, labels, seeds=None, count=1, seed=0, steps=50, batch=64, progress=True, **how):
    """`count` images of every label as (N, H, W, 3) uint8, in that order. `how`: further arguments of `denoise`.

    labels: a name or number, or a list of them; "none" is the zero-label; for latent models each of the list may itself be
    several labels. seeds: one an image, by default seed, seed + 1, ...
    """
    labels = [labels] if isinstance(labels, str) or np.ndim(labels) == 0 else labels
    y = np.repeat([label_number(model, label) for label in labels], count, axis=0)
    seeds = seed + np.arange(len(y)) if seeds is None else seeds
    chunks = [slice(i, i + batch) for i in range(0, len(y), batch)]
    total = len(chunks) * step_count(steps)
    images = []
    with tqdm(total=total, unit="step", desc="denoising", disable=None if progress else True) as bar:
        for chunk in chunks:
            for _, x, _ in denoise(model, y[chunk], seeds[chunk], steps=steps, **how):  # noqa: B007  the last x is wanted
                bar.update()
            images.append(to_uint8(model.decode(x)))
    return np.concatenate(images)


def images_by_label(model, columns, seed=0, **how):
    """Images of every label, the zero-label last, (K + 1, columns, H, W, 3) uint8; a column shares its seed."""
    rows = len(model.classes) + 1
    labels = np.arange(rows).repeat(columns)
    seeds = np.tile(np.arange(seed, seed + columns), rows)
    images = generate(model, labels, seeds, **how)
    return images.reshape(rows, columns, *images.shape[1:])


def draw_rows(images, classes):
    """Figure 5.1's layout: one row a label, the zero-label last. Behind the name of a colour stands its distance."""
    names, distances = [*classes, "none"], mean_colour_distances(images, classes)
    if distances is not None:
        names = [f"{name} {distance:.0f}" for name, distance in zip(names, distances)] + names[-1:]
    return grid(images.reshape(-1, *images.shape[2:]), images.shape[1], names)


def along_the_path(model, y, seeds, frames, steps=50, **how):
    """Of the states (t, x, x_0) of a sampler at work `frames` at equal distances, the last one among them."""
    chosen = np.linspace(0, step_count(steps) - 1, min(frames, step_count(steps))).round()
    return (state for i, state in enumerate(denoise(model, y, seeds, steps=steps, **how)) if i in chosen)


def animation(model, y, seeds, columns, frames=48, **how):
    """5.3.1 in motion: a grid of images being denoised, x_t after every step or so, as a list of pictures."""
    states = along_the_path(model, y, seeds, frames, **how)
    return [grid(to_uint8(model.decode(x)), columns, scale=max(1, 64 // model.shape[1])) for _, x, _ in states]


def denoising_strip(model, y, seeds, frames=12, **how):
    """5.3.1: for every image two rows along the path, x_t above and the predicted x_0 below. Returns the picture."""
    chosen = list(along_the_path(model, y, seeds, frames, **how))
    x_t = np.stack([to_uint8(model.decode(x)) for _, x, _ in chosen], axis=1)  # (B, frames, H, W, 3)
    x_0 = np.stack([to_uint8(model.decode(x)) for _, _, x in chosen], axis=1)
    rows = np.stack([x_t, x_0], axis=1)  # (B, 2, frames, H, W, 3)
    return grid(rows.reshape(-1, *rows.shape[3:]), len(chosen), ["x_t", "x_0"] * len(y), scale=max(1, 64 // rows.shape[-2]))


# ------------------------------------------------------------------------------------------------------------------
# 3.1, 4.4.7  What a first stage keeps of an image, and makes of noise
# ------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def reconstruct(model, originals, batch=8):
    """decode(encode(x)) of images, (N, H, W, 3) uint8.

    Returns the reconstructions, shaped alike, and their PSNR in decibel and L1 in [0, 1], (N,) each, of the 8-bit pictures.
    """
    device = next(model.parameters()).device
    chunks = []
    for i in tqdm(range(0, len(originals), batch), desc="reconstructing", unit="batch", disable=None):
        chunks.append(to_uint8(model.decode(model.encode(to_tensor(originals[i : i + batch]).to(device)))))
    rebuilt = np.concatenate(chunks)
    x, x_r = to_tensor(originals), to_tensor(rebuilt)
    return rebuilt, psnr(x, x_r).tolist(), ((x - x_r).abs().mean((1, 2, 3)) / 2).tolist()


def validation_paintings(size):
    """Names and images of one embedded painting of every colour that no model is trained on."""
    paintings = open_paintings(size=size)
    _, rows = paintings.split()
    _, first = np.unique(paintings.labels[rows], return_index=True)
    return paintings.classes, paintings.images[rows[first]]


@torch.no_grad()
def prior_rows(model, size, columns, seed=0):
    """3.1: what a decoder makes of latents that no image gave. Two rows of `columns` images, uint8.

    First z ~ N(0, I), for completeness: does any point mean something? Then a straight line from the first of them to the
    second, for continuity: do near points look alike?
    """
    side = size // model.factor
    z = ImageNoise(seed + np.arange(columns), (model.z_channels, side, side), next(model.parameters()).device)()
    s = torch.linspace(0, 1, columns, device=z.device)[:, None, None, None]
    return to_uint8(torch.cat([model.decode(z), model.decode((1 - s) * z[0] + s * z[1])]))


# ------------------------------------------------------------------------------------------------------------------
# 5.1.1  Ten thousand images a label
#
# Row k L + i of a set is image k, the one with seed `seed` + k, of its i-th of L labels. Rows are computed in chunks of B:
# chunk c is always the rows c B to c B + B - 1, also where fewer are kept. What a chunk looks like is then a function of c
# alone, whoever computes it and when: process r of R takes the chunks r, r + R, ... that are not there yet, and need not
# talk to the others.
# ------------------------------------------------------------------------------------------------------------------


class PngFolders:
    """A set as out/<label>/<seed>.png."""

    def __init__(self, out, names, seed, rows, shape):
        self.out, self.names, self.seed = out, names, seed

    def path(self, row):
        k, i = divmod(row, len(self.names))
        return self.out / self.names[i] / f"{self.seed + k:06d}.png"

    def has(self, rows):
        return all(self.path(row).exists() for row in rows)

    def write(self, rows, images):
        for row, image in zip(rows, images):
            with whole_file(self.path(row)) as temporary:
                Image.fromarray(image).save(temporary)

    def finish(self):
        pass


class PackedSet:
    """A set as one memory map in out/images.npy. Complete, it is a packed set, as `data.py` makes them; fid.py opens it.

    out/done has a byte for every row, 1 where it is written. Processes write to different places and cut nothing off.
    """

    def __init__(self, out, names, seed, rows, shape):
        self.out, self.names, self.seed, self.rows = out, names, seed, rows
        (out / "done").touch()
        if (out / "done").stat().st_size > rows:
            raise UserError(f"{out} already holds more than {rows:,} images; name another folder with --out")
        if (out / "done").stat().st_size < rows:
            (out / "set.json").unlink(missing_ok=True)
        (out / "images.npy").touch()
        with (out / "images.npy").open("r+b") as images, (out / "done").open("r+b") as done:
            npy_header(images, rows, shape)
            self.start, self.size = images.tell(), math.prod(shape)
            images.truncate(self.start + rows * self.size)
            done.truncate(rows)

    def has(self, rows):
        return all((self.out / "done").read_bytes()[rows.start : rows.stop])

    def write(self, rows, images):
        for name, place, content in (
            ("images.npy", self.start + rows.start * self.size, images.tobytes()),
            ("done", rows.start, b"\1" * len(rows)),
        ):
            with (self.out / name).open("r+b") as file:
                file.seek(place)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # in this order: what is marked as done is on the disk

    def finish(self):
        if not self.has(range(self.rows)):
            return
        k, label = np.divmod(np.arange(self.rows), len(self.names))
        for name, values in (("labels", label), ("sources", self.seed + k)):
            with whole_file(self.out / f"{name}.npy") as temporary:
                np.save(temporary, values)
        with whole_file(self.out / "set.json") as temporary:
            settings = json.loads((self.out / "settings.json").read_text())
            temporary.write_text(json.dumps({"classes": self.names, "note": "generated", "state": settings}))


STORES = {"png": PngFolders, "npy": PackedSet}


def claim(out, settings, rows):
    """Begin the set in `out`, or go on with it if it was begun with the same settings. Returns B, how many rows a chunk has.

    settings: everything that decides about a pixel. Its "batch" may be None: then B is what the set was begun with, or 64.
    """
    names = os.listdir(out) if out.is_dir() else []
    if out.exists() and not out.is_dir() or "settings.json" not in names and any(name[0] != "." for name in names):
        raise UserError(f"{out} is neither an empty folder nor a set to go on with; name another with --out")
    if "settings.json" not in names:
        with whole_file(out / "settings.json") as temporary:
            temporary.write_text(json.dumps(settings | {"batch": settings["batch"] or min(64, rows)}, indent=1))
    try:
        begun = json.loads((out / "settings.json").read_text())
        settings = settings | {"batch": settings["batch"] or begun["batch"]}
        different = [name for name, value in settings.items() if begun[name] != value]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out / 'settings.json'} is damaged; name another folder with --out") from error
    for name in different:
        raise UserError(f"{out} was begun with {name} {begun[name]}, not {settings[name]}; name another folder with --out")
    return begun["batch"]


def write_many(model, out, form, per_label, labels, seed, settings, how):
    """--per-label: what is missing of the set in `out`. Decoding and writing a chunk overlap with denoising the next.

    settings: what else than `how`, the labels, the seed and the model decides about a pixel. Returns how many images were made.
    """
    device, names = model.device, [[*model.classes, "none"][i] for i in labels]
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    rows = per_label * len(labels)
    settings = settings | how | {"format": form, "labels": names, "seed": seed}
    settings["model"] = fingerprint(model, sorted(model.settings.items()))
    settings["classifier"] = how["classifier"] and fingerprint(how["classifier"])
    batch = claim(out, settings, rows)

    @torch.no_grad()  # says nothing to other threads than the one that calls it
    def images(x):
        return to_uint8(model.decode(x))

    def write(chunk, x):
        store.write(chunk, images(x)[: len(chunk)])

    store = STORES[form](out, names, seed, rows, images(torch.zeros(1, *model.shape, device=device)).shape[1:])
    chunks = [range(i, min(rows, i + batch)) for i in range(rank * batch, rows, world * batch)]
    missing = [chunk for chunk in chunks if not store.has(chunk)]
    todo, there = (sum(map(len, these)) for these in (missing, chunks))
    name = f"process {rank} of {world}" if world > 1 else out.name
    try:
        with (
            ThreadPoolExecutor(1) as thread,
            tqdm(total=there, initial=there - todo, desc=name, unit="image", smoothing=0, disable=None) as bar,
        ):
            written = thread.submit(len, ())
            for chunk in missing:
                k, i = np.divmod(np.arange(chunk.start, chunk.start + batch), len(labels))
                for _, x, _ in denoise(model, np.array(labels)[i], seed + k, **how):  # noqa: B007  the last x is wanted
                    pass
                written.result()  # one chunk at most waits for the disk; a full one is said here
                written = thread.submit(write, chunk, x)
                bar.update(len(chunk))
            written.result()
    except KeyboardInterrupt:
        print(f"{out}: stopped; the same command goes on", file=sys.stderr)
        raise
    store.finish()
    return todo


# ------------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------------


def place_of(label, classes):
    """Where a name stands among the classes: written so, else whatever the case; None = nowhere."""
    for names, name in ((classes, label), ([name.lower() for name in classes], label.lower())):
        if name in names:
            return names.index(name)
    return None


def label_number(model, label):
    """A label by name or number, or several; "none" is the zero-label, unconditional generation."""
    if isinstance(label, list | tuple | np.ndarray):
        return [label_number(model, one) for one in label]
    if not isinstance(label, str):
        if not 0 <= label <= model.zero_label:
            raise UserError(f"label {label}: expected 0 to {model.zero_label}")
        return int(label)
    if label.lower() == "none":
        return model.zero_label
    place = place_of(label, model.classes)
    if place is not None:
        return place
    if label.isdecimal() and int(label) <= model.zero_label:
        return int(label)
    raise UserError(f"unknown label {label!r}; expected one of {', '.join(model.classes)}, a number, or none")


def word_labels(model, text):
    """One label a character of `text`, None for a space."""
    places = [place_of(char, model.classes) for char in text]
    if not text.strip() or any(place is None and char != " " for place, char in zip(places, text)):
        raise UserError(f"--text {text!r}: the model draws only {' '.join(model.classes)}")
    return places


def parse():
    p = argparse.ArgumentParser(description="Pictures from a trained model.")
    p.add_argument("--run", help="run folder or model file (default: runs/letters, else the model in assets)")
    p.add_argument("--label", help="label by name or number; none = unconditional (the default)")
    p.add_argument("--n", type=int, help="how many images, or columns of a grid (default 16, film 32, grid 8, strip 2)")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--grid", action="store_true", help="one row a label, the zero-label last")
    what.add_argument("--scales", type=float, nargs="+", metavar="S", help="such a grid for each of these guidance scales")
    what.add_argument("--text", help="draw a word, one image a letter")
    what.add_argument("--strip", action="store_true", help="draw the denoising path of --label")
    what.add_argument("--gif", action="store_true", help="a film of a grid being denoised, of --label or of all labels in turn")
    what.add_argument("--reconstruct", nargs="+", metavar="IMAGE", help="encode and decode images with a first stage")
    what.add_argument("--prior", nargs="+", metavar="RUN", help="decode z ~ N(0, I) with these first stages, two rows each")
    what.add_argument(
        "--per-label", type=int, metavar="N", help="N images of every label (or of --label); goes on where it was"
    )
    p.add_argument("--format", choices=STORES, default="png", help="of --per-label: a folder a label, or one packed memory map")
    p.add_argument("--sampler", choices=SAMPLERS, default="plms", help="default plms; dpm = DPM-Solver++ 2M")
    p.add_argument("--steps", type=int, default=50, help="sampling steps, 1 to T (default 50)")
    p.add_argument("--times", choices=("even", "published"), default="even", help="published = the published sampler's table")
    p.add_argument("--scale", type=float, default=2.0, help="guidance scale, 1 = none (default 2, as the thesis chose)")
    p.add_argument(
        "--guide-above",
        type=float,
        metavar="NOISE",
        help="guide only while the noise, sqrt((1 - alpha_bar)/alpha_bar), is above this; 0 = always (default: the model's)",
    )
    p.add_argument("--guidance", choices=("classifier-free", "classifier"), default="classifier-free", help="4.4.3 or 4.4.2")
    p.add_argument("--classifier", help="run folder or file of the classifier for it (default runs/classifier)")
    p.add_argument("--eta", type=float, default=0.0, help="DDIM's noise, 0 to 1 (default 0)")
    p.add_argument("--clip", action="store_true", help="clamp the predicted clean image to [-1, 1] at every step")
    p.add_argument("--seed", type=int, default=0, help="seed of the first image; image k has seed + k (default 0)")
    p.add_argument("--weights", choices=("ema", "raw"), default="ema", help="default ema")
    p.add_argument("--batch", type=int, help="images at a time (default 64)")
    p.add_argument("--precision", choices=("float32", "bf16"), default="float32", help="of the networks (default float32)")
    p.add_argument("--compile", action="store_true", help="torch.compile the networks")
    p.add_argument(
        "--size", type=int, help="pixels of what a latent model draws or a first stage is given (default: as trained)"
    )
    p.add_argument("--out", help="picture, or folder with --per-label and --reconstruct (default: named after what it shows)")
    p.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    return p.parse_args()


def main():
    args = parse()
    check(args)
    device = args.device or best_device()
    device = check_device(f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device)
    tune(device)
    if args.reconstruct:
        write_reconstructions(args, device)
    elif args.prior:
        draw_prior(args, device)
    else:
        write_samples(args, device)


def check(args):
    """Raises UserError for arguments that no model could follow."""
    for scale in args.scales or [args.scale]:
        if not 0 <= scale < math.inf:
            raise UserError(f"--scale {scale:g}: the guidance scale must be 0 or more (1 = no guidance)")
    if args.guide_above is not None and not 0 <= args.guide_above < math.inf:
        raise UserError(f"--guide-above {args.guide_above:g}: must be 0 (guide always) or more")
    if args.guide_above is not None and args.guidance == "classifier":
        raise UserError("--guide-above: only with --guidance classifier-free")
    if args.scales and args.n == 1:
        raise UserError("--scales: the variety of a row needs --n 2 or more")
    folder = args.per_label or args.reconstruct and not Path(args.out or ".").suffix
    if args.out and not folder:
        picture_name(args.out)
    if args.out and args.gif and Path(args.out).suffix.lower() != ".gif":
        raise UserError(f"--out {args.out}: a film; end it with .gif")
    if args.classifier and args.guidance != "classifier":
        raise UserError("--classifier: only with --guidance classifier")
    if args.format != "png" and not args.per_label:
        raise UserError(f"--format {args.format}: only with --per-label")
    if not 0 <= args.seed < 2**62:
        raise UserError(f"--seed {args.seed}: must be 0 or more, and below 2^62")
    if any(value is not None and value < 1 for value in (args.n, args.per_label, args.size, args.batch)):
        raise UserError("--n, --per-label, --size and --batch must be 1 or more")
    if not 0 <= args.eta <= 1 or (args.eta and args.sampler != "ddim"):
        raise UserError(f"--eta {args.eta:g}: expected 0 to 1, and only with --sampler ddim")
    if args.sampler == "ddpm" and args.times == "published":
        raise UserError("--times published: not for ddpm; ancestral sampling must end at the clean image")


def write_samples(args, device):
    model = load(args.run, args.weights, device, args.compile)
    if args.size:
        model.shape = latent_shape(model, args.size)
    if args.clip and model.stage == "ldm":
        raise UserError("--clip: clamps pixels, and this model diffuses latents")
    T = model.diffusion.T
    if not 1 <= args.steps <= T:
        raise UserError(f"--steps {args.steps}: expected 1 to {T}, the steps the model was trained with")
    steps = args.steps
    if args.times == "published":
        try:
            steps = published_timesteps(T, args.steps)
        except ValueError as error:
            raise UserError(f"--times published: {error}") from None
    guided = args.guidance == "classifier"
    how = {"sampler": args.sampler, "steps": steps, "scale": args.scale, "eta": args.eta, "clip": args.clip}
    how["classifier"] = (
        load_classifier(args.classifier or "runs/classifier", model, args.weights, args.compile) if guided else None
    )
    how["guide_above"] = model.guide_above if args.guide_above is None else args.guide_above
    how["bf16"] = args.precision == "bf16"
    label = label_number(model, args.label) if args.label else None
    none = label == model.zero_label or args.grid or args.scales
    if model.settings["p_uncond"] == 0 and (args.scale != 1 or guided or none):
        print(
            "note: trained with p_uncond 0, this model never saw the zero-label; guidance and 'none' mean nothing",
            file=sys.stderr,
        )

    start = time.perf_counter()
    if args.per_label:
        out = Path(args.out or "samples")
        labels = range(len(model.classes)) if label is None else [label]
        chip = torch.cuda.get_device_name(device) if "cuda" in device else f"{device}, {torch.get_num_threads()} threads"
        settings = {"batch": args.batch, "compile": args.compile, "computed by": f"torch {torch.__version__}, {chip}"}
        count = write_many(model, out, args.format, args.per_label, labels, args.seed, settings, how)
    else:
        picture, count, out = draw(model, args, label, how)
        out = Path(args.out or out)
        save(picture, out)
    seconds = time.perf_counter() - start
    scales = " ".join(f"{scale:g}" for scale in args.scales or [args.scale])
    print(f"{out}: {count} images in {seconds:.1f} s ({count / seconds:.1f} a second), {args.sampler}, scale {scales}")


def latent_shape(model, size):
    """The shape of the latent that decodes to size x size: the network takes any that its halvings divide."""
    if model.stage != "ldm":
        raise UserError("--size: this model draws pixels, of the size it was trained with")
    factor = model.first_stage.factor
    least = factor * 2 ** (len(model.settings["multipliers"]) - 1)
    if size % least:
        raise UserError(f"--size {size}: expected a multiple of {least}, for the halvings of the first stage and the U-Net")
    return model.shape[0], size // factor, size // factor


def open_first_stage(run, args, device):
    model = load_model(run, args.weights, device)
    if model.stage != "vqgan":
        raise UserError(f"{run} is no first stage; python train.py --stage vqgan makes one in runs/vqgan")
    size = args.size or model.settings["size"]
    if size % model.factor:
        raise UserError(f"--size {size}: expected a multiple of {model.factor}, the model's f")
    return model, size


def write_reconstructions(args, device):
    """--reconstruct: one picture, originals over reconstructions, or one file an image where --out is a folder.

    Where the word `paintings` stands instead of files, pictures of the embedded painter.
    """
    run = args.run or "runs/vqgan"
    model, size = open_first_stage(run, args, device)
    out = Path(args.out or "reconstructions.png")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not an empty folder; name another with --out")
    if args.reconstruct == ["paintings"]:
        files, originals = validation_paintings(size)
    else:
        files, originals = args.reconstruct, np.stack([load_image(file, size) for file in args.reconstruct])
    rebuilt, decibel, l1 = reconstruct(model, originals, min(args.batch or 8, 8))
    width = max(len(Path(file).name) for file in files)
    for file, p, e in zip(files, decibel, l1):
        print(f"{Path(file).name:{width}}  PSNR {p:5.2f} dB  L1 {e:.4f}")
    print(f"{'mean':{width}}  PSNR {np.mean(decibel):5.2f} dB  L1 {np.mean(l1):.4f}")
    if not out.suffix:
        with whole_file(out) as temporary:
            temporary.mkdir()
            names = unique_names(files)
            for name, image in zip(names, rebuilt):
                Image.fromarray(image).save(temporary / name)
            if out.exists():
                out.rmdir()
        print(f"{out}: {len(rebuilt)} reconstructions")
        return
    columns = min(len(rebuilt), 8)
    blank = np.full((-len(rebuilt) % columns, *rebuilt.shape[1:]), 255, np.uint8)
    pairs = [np.concatenate([images, blank]).reshape(-1, 1, columns, *rebuilt.shape[1:]) for images in (originals, rebuilt)]
    rows = np.concatenate(pairs, axis=1)  # (rows, 2, columns, H, W, 3)
    save(grid(rows.reshape(-1, *rebuilt.shape[1:]), columns, ["x", "x_r"] * len(rows), scale=max(1, 128 // size)), out)
    print(f"{out}: originals over reconstructions")


def unique_names(files):
    """A .png name for every file, numbered where two folders have one of the same name."""
    stems = [Path(file).stem for file in files]
    return [f"{stem}.png" if stems.count(stem) == 1 else f"{i:06d}_{stem}.png" for i, stem in enumerate(stems)]


def draw_prior(args, device):
    """--prior: for every run two rows, z ~ N(0, I) and the line between two of them."""
    columns, images, names = args.n or 8, [], []
    if columns < 2:
        raise UserError("--prior: a line between two z needs --n 2 or more")
    for run in args.prior:
        model, size = open_first_stage(run, args, device)
        images.append(prior_rows(model, size, columns, args.seed))
        names += [f"{ {'none': 'AE', 'kl': 'VAE', 'vq': 'VQ'}[model.settings['bottleneck']] } z", "line"]
    if len({rows.shape for rows in images}) > 1:
        raise UserError("--prior: these runs draw images of different sizes; give one --size")
    out = Path(args.out or "prior.png")
    save(grid(np.concatenate(images), columns, names, scale=max(1, 64 // images[0].shape[1])), out)
    print(f"{out}: z ~ N(0, I) decoded, and a straight line between the first two z")


def save(picture, path):
    """A picture, or the pictures of a film, which holds the last one and begins again."""
    with whole_file(path) as temporary:
        if isinstance(picture, list):
            duration = [70] * (len(picture) - 1) + [2500]  # ms
            picture[0].save(temporary, save_all=True, append_images=picture[1:], duration=duration, loop=0)
        else:
            picture.save(temporary)


def draw(model, args, label, how):
    """The picture that the arguments ask for, how many images it took, and its default file name."""
    batch = args.batch or 64
    if args.text is not None:
        labels = word_labels(model, args.text)
        y = np.array([i for i in labels if i is not None])
        images = generate(model, y, args.seed + np.arange(len(y)), batch=batch, **how)
        blank, drawn = np.zeros_like(images[:1]), iter(images)
        row = np.stack([blank[0] if i is None else next(drawn) for i in labels])
        return grid(row, len(row), scale=3, gap=0), len(y), f"{args.text.replace(' ', '_')}.png"
    if args.grid:
        columns = args.n or 8
        images = images_by_label(model, columns, args.seed, batch=batch, **how)
        return draw_rows(images, model.classes), columns * (len(model.classes) + 1), "grid.png"
    if args.scales:
        columns = args.n or 8
        count = columns * (len(model.classes) + 1) * len(args.scales)
        return draw_scales(model, columns, args.seed, args.scales, batch=batch, **how), count, "scales.png"
    if args.gif:
        n = args.n or 32
        y = np.arange(n) % len(model.classes) if label is None else np.full(n, label)
        name = "all" if label is None else [*model.classes, "none"][label]
        return animation(model, y, args.seed + np.arange(n), min(n, 8), **how), n, f"{name}.gif"
    label = model.zero_label if label is None else label
    name = [*model.classes, "none"][label]
    n = args.n or (2 if args.strip else 16)
    y, seeds = np.full(n, label), args.seed + np.arange(n)
    if args.strip:
        return denoising_strip(model, y, seeds, **how), n, f"{name}_strip.png"
    images = generate(model, y, seeds, batch=batch, **how)
    return grid(images, min(n, 8), scale=max(1, 64 // images.shape[1])), n, f"{name}.png"


def draw_scales(model, columns, seed, scales, **how):
    """Figures 5.1 to 5.4, two in a row, one grid a guidance scale, and what the scale does to colour and variety as a table."""
    titles = [f"scale {scale:g}" for scale in scales]
    pictures = []
    print(f"{'':10}  colour distance  variety")
    for scale, title in zip(scales, titles):
        images = images_by_label(model, columns, seed, **how | {"scale": scale})
        pictures.append(draw_rows(images, model.classes))
        distances, labelled = mean_colour_distances(images, model.classes), images[:-1]
        distance = "-" if distances is None else f"{distances.mean():.1f}"
        print(f"{title:10}  {distance:>15}  {variety(labelled).mean():7.1f}")
    return stacked([side_by_side(pictures[i : i + 2], titles[i : i + 2]) for i in range(0, len(pictures), 2)])


if __name__ == "__main__":
    run_program(main)
