"""Pictures from a trained model: sections 3.5.3, 4.4.2, 4.4.3, 4.6, 5.1.1 and 5.3.1 of the thesis.

    python sample.py --text HELLO                           a word, with the project's own model
    python sample.py --run runs/letters --label A --n 16    sixteen times the letter A
    python sample.py --run runs/letters --grid              one row per label, the zero-label last
    python sample.py --run runs/letters --label R --strip   the denoising path; --gif: a film
    python sample.py --run runs/ldm --per-label 64          one folder per label; also with torchrun
    python sample.py --run runs/ldm --scales 1 2 5 15       grids at guidance scales, and a table
    python sample.py --colours '#1e90ff' gold:0.2           pictures in these colours; --like PHOTO
    python sample.py --reconstruct paintings                images through a first stage
    python sample.py --bound letters:validation             bits per dimension, eq. 3.15; also --ode

For a sampler, a model is a function eps(x, t). Guidance and clipping wrap this function, so a
sampler knows neither the network nor the label. A sampler is a generator: after each step it yields
(t, x_t, predicted x_0). The last x_t is the sample.

For other programs:  generate(load("runs/letters"), ["A", "B"])  returns uint8 images.
"""

import argparse
import json
import math
import os
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm, trange

import data
from data import UserError, to_tensor, to_uint8, whole_file
from ddpm import (
    Diffusion,
    classifier_free_guidance,
    classifier_guided_eps,
    classifier_guided_mean,
    guidance_away,
)
from fid import (
    compare,
    letters_features,
    mean_colour_distances,
    offline_features,
    paintings_features,
    psnr,
    total_variation,
    variety,
)
from ldm import PaletteDiffusion, check_size, fingerprint, load_model, space_of
from plots import grid, join, save

# --------------------------------------------------------------------------------------------------
# 3.5.3, 4.6  Samplers: functions of eps(x, t), the start x, the time steps and alpha_bar
# --------------------------------------------------------------------------------------------------


def timesteps(T, S):
    """4.6: S + 1 falling time steps from T to 0: exactly S steps for every 1 <= S <= T (E56)."""
    if not 1 <= S <= T:
        raise ValueError(f"{S} steps; expected 1 to {T}")
    return [T * i // S for i in range(S, -1, -1)]


def ddpm(eps, x, times, alpha_bar, noise, variance="beta_tilde", gradient=None, scale=1.0):
    """3.5.3, ancestral sampling:  x_{t-1} = mu_theta(x_t, t) + sigma_t xi  (E29).

    A subset of the time steps is a shorter chain, with beta = 1 - alpha_bar_t / alpha_bar_t'.
    times must end at 0. noise: function () -> standard normal noise like x; variance: see
    `Diffusion.p_sample`; gradient: function (x, t) -> grad log f(y | x_t, t); `scale` times this
    gradient shifts the mean, eq. 4.1 (corrected, E48).
    """
    kept = alpha_bar[times[::-1]]
    chain = Diffusion(1 - kept[1:] / kept[:-1])
    for i, (t, t_next) in zip(range(chain.T, 0, -1), zip(times, times[1:])):
        e = eps(x, t)
        x_0 = chain.predict_x0(x, i, e)
        x_t, x = x, chain.p_sample(x, i, e, noise(), variance)
        if gradient:  # a shift of the sample equals a shift of the mean
            sigma2 = chain.at(chain.sigma2(variance), i, x)
            x = classifier_guided_mean(x, sigma2, gradient(x_t, t), scale)
        yield t_next, x, x_0


def ddim_step(x, e, a, a_next, sigma=0.0):
    """4.6.1, DDIM (E56):  x_{t'} = sqrt(a') x_0 + sqrt(1 - a' - sigma^2) eps + sigma xi

    with x_0 = (x_t - sqrt(1 - a) eps) / sqrt(a). a, a': alpha_bar at t and t'. The caller adds the
    noise sigma xi. Returns (x_{t'}, x_0).

    At sigma = 0, let y = x / sqrt(a) and r = sqrt((1 - a) / a), the ratio of noise to signal. The
    step is then y' = y + (r' - r) eps: Euler's method for dy/dr = eps.
    """
    x_0 = (x - (1 - a) ** 0.5 * e) / a**0.5
    return a_next**0.5 * x_0 + (1 - a_next - sigma**2) ** 0.5 * e, x_0


def noisy_step(x, e, a, a_next, eta, noise):
    """4.6.1, `ddim_step` and its noise, with sigma = eta sqrt((1 - a')/(1 - a)) sqrt(1 - a/a').

    eta = 0 is deterministic, eta = 1 has the variance of ancestral sampling. eta > 0 needs
    `noise`, a function () -> xi. ValueError if eta is not between 0 and 1: there is no such step.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta {eta:g}; expected 0 to 1")
    sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)) ** 0.5
    x, x_0 = ddim_step(x, e, a, a_next, sigma)
    return x + sigma * noise() if sigma else x, x_0


def ddim(eps, x, times, alpha_bar, eta=0.0, noise=None):
    """4.6.1, DDIM: a `noisy_step` per time step."""
    for t, t_next in zip(times, times[1:]):
        a, a_next = alpha_bar[t].item(), alpha_bar[t_next].item()
        x, x_0 = noisy_step(x, eps(x, t), a, a_next, eta, noise)
        yield t_next, x, x_0


# Adams-Bashforth, orders 1 to 4: weights of the predictions, newest first; divide by their sum
PLMS_WEIGHTS = (1,), (3, -1), (23, -16, 5), (55, -59, 37, -9)


def plms(eps, x, times, alpha_bar):
    """4.6.1, PLMS ("PLSM" in the heading, E56): the DDIM transfer with an extrapolated eps'.

        eps' = (55 e_0 - 59 e_1 + 37 e_2 - 9 e_3) / 24          e_0 is the newest prediction

    DDIM takes dy/dr = eps as constant over a step (see `ddim_step`). PLMS draws a cubic through the
    last four eps, over the index of the step, and takes its mean over the next step. Steps 2 and 3
    have orders 2 and 3. The first step is improved Euler, as in the published sampler: it looks
    ahead once, so S steps cost S + 1 evaluations.

    Looking ahead does harm where a' > sqrt(a). If the second evaluation predicts an x_0 that
    differs by d from the first one, the mean of both eps moves x_{t'} by a' / (2 sqrt(a)) d. With
    50 steps this is 10 d for the cosine schedule (alpha_bar_T = 2e-9), 0.005 d for the linear one.
    The first step is then plain DDIM. So is a single step.
    """
    history = []
    for t, t_next in zip(times, times[1:]):
        a, a_next = alpha_bar[t].item(), alpha_bar[t_next].item()
        history = [eps(x, t), *history[:3]]
        weights = PLMS_WEIGHTS[len(history) - 1]
        e_prime = sum(w * e for w, e in zip(weights, history)) / sum(weights)
        if len(history) == 1 and len(times) > 2 and a_next <= a**0.5:
            ahead, _ = ddim_step(x, e_prime, a, a_next)
            e_prime = (e_prime + eps(ahead, t_next)) / 2
        x, x_0 = ddim_step(x, e_prime, a, a_next)
        yield t_next, x, x_0


def dpm(eps, x, times, alpha_bar, eta=0.0, noise=None):
    """DPM-Solver++ 2M (not in the thesis): the DDIM transfer with an extrapolated x_0'.

        x_0' = x_0 + (x_0 - x_0_before) h / (2 h_before)
        h = lambda_t' - lambda_t,   lambda = 1/2 log(a / (1 - a))

    PLMS extrapolates eps over the index of the step. This sampler extrapolates x_0 over lambda,
    half the logarithm of the signal-to-noise ratio, with one evaluation per step. lambda is
    infinite at t = 0, so the step to t = 0 is plain DDIM. eta and noise: see `noisy_step`; fresh
    noise covers the errors that earlier steps have made.
    """
    lam = (alpha_bar / (1 - alpha_bar)).log() / 2
    before = h_before = None
    for t, t_next in zip(times, times[1:]):
        a, a_next = alpha_bar[t].item(), alpha_bar[t_next].item()
        h = (lam[t_next] - lam[t]).item()
        x_0 = (x - (1 - a) ** 0.5 * eps(x, t)) / a**0.5
        first_order = before is None or t_next == 0
        x_0_prime = x_0 if first_order else x_0 + (x_0 - before) * (h / (2 * h_before))
        before, h_before = x_0, h
        e_prime = (x - a**0.5 * x_0_prime) / (1 - a) ** 0.5
        x, _ = noisy_step(x, e_prime, a, a_next, eta, noise)
        yield t_next, x, x_0


def times_of_log_r(alpha_bar, steps):
    """Rising times from 1 to T for `ode_log_likelihood`, at most steps + 1, evenly spaced in log r.
    There are fewer where r is small: neighbouring t are farther apart there."""
    log_r = (1 / alpha_bar[1:] - 1).log() / 2
    wanted = torch.lerp(log_r[0], log_r[-1], torch.linspace(0, 1, steps + 1).to(log_r))
    return (1 + (log_r[:, None] - wanted).abs().argmin(0)).unique().tolist()


def ode_log_likelihood(eps, x, times, alpha_bar, probe):
    """log p(x_t) at t = times[0] along the probability-flow ODE (not in the thesis), (B,), in nats.

    With y = x / sqrt(a) and r = sqrt(1/a - 1), dy/dr = eps (see `ddim_step`). A density moves with
    its points and thins out by the divergence of their velocity (the change of variables):

        log p(y_t) = log p(y_T) + integral of div_y eps dr from r_t to r_T,    x_T ~ N(0, I)

    Hutchinson: div eps is the mean of z . (d eps/dy z) over z with entries +1 or -1; `probe` is one
    such z per image. times: rising, from 1 or later to T. Heun's method: the mean of the slopes at
    both ends of a step. The divergence is integrated over log r, as r div eps is almost constant
    near the data.
    """

    def slope(y, t):
        root = alpha_bar[t].item() ** 0.5
        with torch.enable_grad():
            x = (root * y).detach().requires_grad_()
            e = eps(x, t)
            (gradient,) = torch.autograd.grad((e * probe).sum(), x)
        return e.detach(), root * (gradient * probe).flatten(1).sum(1)

    a_0 = alpha_bar[times[0]].item()
    y, integral = x / a_0**0.5, 0.0
    for t, t_next in zip(times, times[1:]):
        r, r_next = ((1 / alpha_bar[i].item() - 1) ** 0.5 for i in (t, t_next))
        e, div = slope(y, t)
        e_next, div_next = slope(y + (r_next - r) * e, t_next)
        y = y + (r_next - r) * (e + e_next) / 2
        integral = integral + math.log(r_next / r) * (r * div + r_next * div_next) / 2
    a, d = alpha_bar[times[-1]].item(), x[0].numel()
    square = (a**0.5 * y).square().flatten(1).sum(1)
    return integral - square / 2 - d / 2 * math.log(2 * math.pi * a_0 / a)


# --------------------------------------------------------------------------------------------------
# 4.4.2, 4.4.3  Wrappers of eps(x, t)
# --------------------------------------------------------------------------------------------------


def with_cfg(model, y, scale, guide_above=0.0, away=None):
    """4.4.3, classifier-free guidance as eps(x, t) for the labels y, (B,).

    Scale 0 or 1 needs one evaluation (E49). Otherwise one batch holds the zero-label and the label.
    ValueError for a negative scale. away: labels in the form of y to avoid, see `guidance_away`,
    with the weight max(1, scale - 1).

    guide_above: the end of a guidance interval (Kynkaanniemi and others, 2024; not in the thesis).
    A scale above 1 holds while the noise sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t) is above
    this sigma; then the scale is 1. Let x_0 of label y be a Gaussian with mean m_y and deviation S.
    The mean of the samples is then not m_0 + s (m_y - m_0) but

        m_y + S / sqrt(S^2 + sigma^2) (s - 1) (m_y - m_0)

    So a large scale mostly moves directions of large deviation S, such as the mean colour.
    """
    if not scale >= 0:
        raise ValueError(f"guidance scale {scale:g}; expected 0 or more")
    zero, alpha_bar = model.zero_like(y), model.diffusion.alpha_bar

    def eps(x, t):
        above = 1 - alpha_bar[t] > guide_above**2 * alpha_bar[t]
        s = scale if above else min(scale, 1)
        avoided = [away] if above and away is not None else []
        if s in (0, 1) and not avoided:
            return model.eps(x, t, y if s else zero)
        labels = [zero, y, *avoided]
        several = model.eps(torch.cat([x] * len(labels)), t, torch.cat(labels))
        eps_zero, eps_y, *eps_away = several.chunk(len(labels))
        guided = classifier_free_guidance(eps_zero, eps_y, s)
        if avoided:
            guided = guidance_away(guided, eps_zero, *eps_away, max(1.0, scale - 1))
        return guided

    return eps


def classifier_gradient(classifier, y):
    """4.4.2:  grad_{x_t} log f(y | x_t, t)  as a function of (x, t), for the labels y, (B,).

    The sum over the batch has the same gradient: the log f of an image depends on no other image.
    No classifier knows the zero-label: here its log f is 0, and so is its gradient.
    """

    def gradient(x, t):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            log_f = F.pad(classifier.log_f(x, t), (0, 1)).gather(1, y[:, None])  # (B, 1)
            return torch.autograd.grad(log_f.sum(), x)[0]

    return gradient


def with_classifier(eps, gradient, scale, alpha_bar):
    """4.4.2, classifier guidance of the zero-label's eps (E48); scale 1 is Bayes' rule."""
    return lambda x, t: classifier_guided_eps(eps(x, t), alpha_bar[t].item(), gradient(x, t), scale)


def with_clipping(eps, diffusion):
    """eps(x, t) with x_0 clamped to [-1, 1]: for pixels only; not in the thesis (E29).

    `predict_x0` divides the error of eps by sqrt(alpha_bar_t). With the cosine schedule, sampling
    begins at alpha_bar_T = 2e-9: without the clamp, no sampler recovers.
    """

    def clipped(x, t):
        x_0 = diffusion.predict_x0(x, t, eps(x, t)).clamp(-1, 1)
        return diffusion.predict_eps(x, t, x_0)

    return clipped


# --------------------------------------------------------------------------------------------------
# Generation
# --------------------------------------------------------------------------------------------------


class ImageNoise:
    """5.1.1: standard normal noise. Each image has its own generator: its batch has no effect."""

    def __init__(self, seeds, shape, device):
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self.shape, self.device = shape, device

    def __call__(self):
        noise = [torch.randn(self.shape, generator=generator) for generator in self.generators]
        return data.send(torch.stack(noise), self.device)


SAMPLERS = {"plms": plms, "ddim": ddim, "ddpm": ddpm, "dpm": dpm}


def sampler_of(model, sampler=None, eta=None):
    """A sampler and its eta. None means the model's own. ValueError if it takes no eta."""
    usual = model.sampler if sampler is None else (sampler, 0.0)
    sampler, eta = usual[0], usual[1] if eta is None else eta
    if eta and sampler not in ("ddim", "dpm"):
        raise ValueError(f"eta {eta:g} has no meaning for {sampler}, only for ddim and dpm")
    return sampler, eta


@torch.no_grad()
def denoise(
    model,
    y,
    seeds,
    sampler=None,
    steps=50,
    scale=2.0,
    guide_above=None,
    eta=None,
    clip=None,
    classifier=None,
    away=None,
):
    """Run a sampler for the labels y, (B,), with one seed per image. Yields (t, x, x_0) per step.

    y may also be tokens or palettes, see `condition` of the model. guide_above: see `with_cfg`;
    clip: see `with_clipping`; their default is the model's, and so are sampler and eta. away:
    one label or palette that all images avoid. classifier: with it, the classifier guides (4.4.2),
    and the network sees only the zero-label.
    """
    sampler, eta = sampler_of(model, sampler, eta)
    alpha_bar, device, gradient = model.diffusion.alpha_bar, model.device, None
    guide_above = model.guide_above if guide_above is None else guide_above
    noise, y = ImageNoise(seeds, model.shape, device), torch.as_tensor(y, device=device)
    if away is not None:
        away = torch.as_tensor(away, device=device).expand(y.shape)
    eps = with_cfg(model, y, 0 if classifier else scale, guide_above, away)
    if classifier and scale:
        gradient = classifier_gradient(classifier, y)
    if model.bf16:  # per call: a generator that pauses inside autocast leaves it on for its reader
        autocast = torch.autocast(device.type, torch.bfloat16)
        eps, gradient = autocast(eps), gradient and autocast(gradient)
    if gradient and sampler != "ddpm":
        eps = with_classifier(eps, gradient, scale, alpha_bar)
    if model.clip if clip is None else clip:
        eps = with_clipping(eps, model.diffusion)
    ancestral, stochastic = (noise, "beta_tilde", gradient, scale), (eta, noise)
    more = {"ddpm": ancestral, "ddim": stochastic, "dpm": stochastic}.get(sampler, ())
    times = timesteps(model.diffusion.T, steps)
    yield from SAMPLERS[sampler](eps, model.start(y, noise()), times, alpha_bar, *more)


def load(run="letters", weights="ema", device="cpu", compile=False, kind="diffusion model"):
    """The model of a run folder or model file, or "letters" or "paintings", see `ldm.load_model`.

    UserError if it is of another kind: "diffusion model", "first stage" or "classifier".
    """
    model = load_model(run, weights, device)
    kinds = {"vqgan": "first stage", "classifier": "classifier"}
    found = kinds.get(model.stage, "diffusion model")
    if found != kind:
        raise UserError(f"{run} is no {kind} but a {found}; see python train.py --help")
    if compile:
        (model.network if kind == "classifier" else model.unet).compile()
    return model


def load_classifier(run, model, weights="ema", compile=False):
    """4.4.2: a classifier that guides `model`. UserError if it does not fit the model (E47)."""
    guide = load(run, weights, model.device, compile, "classifier")
    needed = model.classes, model.shape, space_of(model), model.diffusion.beta.tolist()
    if (guide.classes, guide.shape, guide.space, guide.diffusion.beta.tolist()) != needed:
        raise UserError(f"{run}: labels, images or noise schedule are not those of the model (E47)")
    return guide


def label_number(model, label):
    """The number of a label: a name in any case, a number, or "none" (the zero-label)."""
    names = [*model.classes, "none"]
    numbers = {str(i): i for i in range(len(names))}
    if isinstance(label, str):  # the exact name wins over the name in another case
        numbers |= {name.lower(): i for i, name in enumerate(names)}
        numbers |= {name: i for i, name in enumerate(names)}
    number = numbers.get(str(label), numbers.get(str(label).lower()))
    if number is None:
        raise UserError(f"unknown label {label!r}; expected a number or one of {', '.join(names)}")
    return number


def colour_palette(model, colours):
    """A palette (4, 4) as a tensor, from words as for `data.read_colours` or as an array."""
    if not isinstance(model, PaletteDiffusion):
        raise UserError("colours: this model knows labels only; train.py's --condition palette")
    if isinstance(colours[0], str):
        colours = data.read_colours(colours)
    return torch.as_tensor(colours)


@torch.no_grad()
def generate(
    model,
    labels="none",
    seeds=None,
    count=1,
    seed=0,
    steps=50,
    batch=64,
    progress=True,
    colours=None,
    **more,
):
    """`count` images per label, one label after the other: (N, H, W, 3) uint8.

    labels: one or a list, see `label_number`; or tokens, a float tensor (N, n, channels), see
    `LabelledDiffusion.condition`.
    colours: instead of labels a palette, such as ["gold", "#1e90ff:0.3"], see `data.read_colours`.
    seeds: one per image; default: seed, seed + 1, ... more: further arguments of `denoise`.
    """
    if colours is not None:
        labels = colour_palette(model, colours)[None]
    if torch.is_tensor(labels) and labels.is_floating_point():
        y = labels.repeat_interleave(count, dim=0)
    else:
        labels = [labels] if np.ndim(labels) == 0 else labels
        y = np.repeat([label_number(model, label) for label in labels], count)
    seeds = seed + np.arange(len(y)) if seeds is None else seeds
    parts, images = [slice(i, i + batch) for i in range(0, len(y), batch)], []
    with tqdm(total=len(parts) * steps, unit="step", disable=None if progress else True) as bar:
        for part in parts:
            for _, x, _ in denoise(model, y[part], seeds[part], steps=steps, **more):  # noqa: B007
                bar.update()
            images.append(to_uint8(model.decode(x)))
    return np.concatenate(images)


def tiles(images, columns, names=None, side=64):
    """A grid of images. Smaller ones are enlarged by a whole factor, to at most `side` pixels."""
    return grid(images, columns, names, max(1, side // images.shape[1]))


def images_by_label(model, columns, seed=0, labels=None, **more):
    """5.3.1: (K + 1, columns, H, W, 3) uint8. One row per label, the zero-label last.

    labels: their numbers (default: all).
    """
    rows = [*(range(len(model.classes)) if labels is None else labels), model.zero_label]
    seeds = np.tile(np.arange(seed, seed + columns), len(rows))
    images = generate(model, np.repeat(rows, columns), seeds, **more)
    return images.reshape(len(rows), columns, *images.shape[1:])


def draw_rows(images, classes):
    """Figure 5.1: `images_by_label` as a picture; colours with their mean colour distance."""
    names, distances = [*classes, "none"], mean_colour_distances(images, classes)
    if distances is not None:
        names[:-1] = [f"{name} {distance:.0f}" for name, distance in zip(classes, distances)]
    return grid(images.reshape(-1, *images.shape[2:]), images.shape[1], names)


def draw_scales(model, columns, seed, scales, **more):
    """Figures 5.1 to 5.4: a grid per guidance scale. Prints colour distance and variety."""
    titles, pictures = [f"scale {scale:g}" for scale in scales], []
    print(f"{'':10}  colour distance  variety")
    for scale, title in zip(scales, titles):
        images = images_by_label(model, columns, seed, **more | {"scale": scale})
        pictures.append(draw_rows(images, model.classes))
        distances = mean_colour_distances(images, model.classes)
        distance = "-" if distances is None else f"{distances.mean():.1f}"
        print(f"{title:10}  {distance:>15}  {variety(images[:-1]).mean():7.1f}")
    return join(pictures, 2, titles)


def along_the_path(model, y, seeds, frames, steps, **more):
    """5.3.1: yields x_t and the predicted x_0 after `frames` evenly spaced steps."""
    chosen = np.linspace(0, steps - 1, min(frames, steps)).round()
    for i, (_, x, x_0) in enumerate(denoise(model, y, seeds, steps=steps, **more)):
        if i in chosen:
            yield x, x_0


@torch.no_grad()
def attention(model, y, seeds, **more):
    """4.4.4: images (N, H, W, 3) uint8, and where each of their n tokens was read, (N, n, h, w).

    The cross-attention weights are averaged over heads, layers and steps; over tokens, they add up
    to 1. more: as for `denoise`.
    """
    maps, (_, height, width) = [], model.shape

    def look(module, inputs, output):
        weights = module.weights(*inputs).mean(1)  # (B, positions, n), over heads
        weights = weights[len(y) : 2 * len(y)] if len(weights) > len(y) else weights  # see with_cfg
        shrink = round((height * width / weights.shape[1]) ** 0.5)
        weights = weights.transpose(1, 2).unflatten(2, (height // shrink, width // shrink))
        maps.append(F.interpolate(weights.float(), (height, width)))

    hooks = [layer.register_forward_hook(look) for layer in model.cross_attentions()]
    total = count = 0
    try:
        for _, x, _ in denoise(model, y, seeds, **more):  # noqa: B007
            total, count = total + sum(maps), count + len(maps)
            maps.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return to_uint8(model.decode(x)), total / count


def draw_attention(colours, images, maps):
    """A row per image, and where it read each of the colours (n, 3); the first row has these. White
    is where an image read a colour most."""
    side = images.shape[1]
    maps = F.interpolate(maps, (side, side), mode="bilinear")
    maps = (255 * maps / maps.amax((2, 3), keepdim=True)).byte().cpu().numpy()
    first = [np.full((side, side, 3), colour) for colour in [np.uint8([255] * 3), *colours]]
    rows = [[image, *np.repeat(ours[..., None], 3, axis=3)] for image, ours in zip(images, maps)]
    return tiles(np.stack(sum(rows, first)), 1 + len(colours))


def write_many(model, folder, labels, seeds, batch, settings):
    """5.1.1: one file folder/<label>/<seed>.png per label and seed.

    A file that exists is not made again, so an interrupted command can be repeated. Process r of R
    (of torchrun) makes the files r, r + R, ...
    """
    guide, extra = settings["classifier"], (sorted(model.settings.items()), model.shape)
    made_by = {"bf16": model.bf16, "model": fingerprint(model, *extra)}
    made_by["classifier"] = guide and fingerprint(guide)
    check_settings(folder, settings | made_by)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    folders = [folder / name for name in [*model.classes, "none"]]
    files = [(y, seed, folders[y] / f"{seed:06d}.png") for seed in seeds for y in labels]
    missing = [file for file in files[rank::world] if not file[2].exists()]
    for i in trange(0, len(missing), batch, unit="batch", disable=rank > 0 or None):
        y, part_seeds, paths = zip(*missing[i : i + batch])
        images = generate(model, y, part_seeds, batch=batch, progress=False, **settings)
        for image, path in zip(images, paths):
            save(Image.fromarray(image), path)
    print(f"{folder}: {len(missing)} new images")


def check_settings(folder, settings):
    """Write folder/settings.json. UserError if the folder was begun with other settings."""
    file, there = folder / "settings.json", [path.name for path in folder.glob("[!.]*")]
    if not there:
        with whole_file(file) as temporary:
            temporary.write_text(json.dumps(settings, indent=1))
    elif file.name not in there:
        raise UserError(f"{folder} is not an empty folder; name another with --out")
    begun = json.loads(file.read_text())
    if other := [name for name in settings if settings[name] != begun.get(name)]:
        raise UserError(f"{file}: begun with another {', '.join(other)}; give another --out")


# --------------------------------------------------------------------------------------------------
# 3.1, 4.4.7  First stages: reconstructions, and decoded noise
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def reconstruct(model, originals):
    """4.4.7: decode(encode(x)) of images (B, H, W, 3) uint8, in the same form."""
    x = to_tensor(originals).to(next(model.parameters()).device)
    return to_uint8(model.decode(model.encode(x)))


def open_first_stage(run, args, device):
    """The first stage of a run folder or file, and the size of its images in pixels."""
    model = load(run, args.weights, device, kind="first stage")
    size = args.size or model.settings["size"]
    if size % model.factor:
        raise UserError(f"--size {size}: expected a multiple of {model.factor}, the model's f")
    return model, size


def open_originals(items, size):
    """The image files with these names as a set, or the set of this name (see `data.open_set`).

    "paintings" stands for its validation side.
    """
    if not all(Path(item).is_file() and Path(item).suffix != ".npz" for item in items):
        if len(items) > 1:
            raise UserError("--reconstruct: name image files or one set")
        name = items[0] + ":validation" * (items[0] == "paintings")
        return data.open_set(name, size, pack=False)
    numbers = np.arange(len(items))
    return data.ImageSet(data.Files([*map(Path, items)], size), 0 * numbers, numbers, ["all"])


def reconstructions(model, found, size, batch):
    """Yields (row, x, x_r) for the images of a set; only one batch of pixels is held at a time."""
    images = found.each(size, lambda row, image: None, "reconstructing")
    while part := list(islice(images, batch)):
        rows, originals, _ = zip(*part)
        yield from zip(rows, originals, reconstruct(model, np.stack(originals)))


def losses_of(x, x_r):
    """4.4.7: PSNR in decibels, L1 distance in [0, 1], and the sharpness of both, of one image and
    its reconstruction, (H, W, 3) uint8."""
    x, x_r = to_tensor(x[None]), to_tensor(x_r[None])
    l1 = (x - x_r).abs().mean() / 2
    return [value.item() for value in (psnr(x, x_r), l1, total_variation(x), total_variation(x_r))]


LISTED = 40  # so many images are listed one by one; larger sets are compared as sets


def print_losses(table, sets):
    """table: rows (name, *losses_of); sets: the features of the images and of the reconstructions,
    compared if there are any."""
    mean = "mean", *np.mean([row[1:] for row in table], axis=0)
    for name, decibel, l1, sharp, sharp_r in [*table, mean] if len(table) <= LISTED else [mean]:
        share = sharp_r / max(sharp, 1e-6)
        print(f"{name:20}  PSNR {decibel:5.2f} dB  L1 {l1:.4f}  sharpness {share:.2f}")
    if sets[0]:
        numbers = compare(*map(torch.cat, sets))
        names = ("frechet", "kernel", "kernel_error")
        print("  ".join(f"{name} {numbers[name]:.3g}" for name in names))


def write_reconstructions(args, device):
    """--reconstruct (4.4.7, fig. 4.9): a picture, or a folder with one file per image."""
    model, size = open_first_stage(args.run or "runs/vqgan", args, device)
    out = Path(args.out or "reconstructions.png")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not an empty folder; name another with --out")
    found = open_originals(args.reconstruct, size)
    names = [found.name(row) for row in range(len(found.labels))]
    stems = Counter(Path(name).stem for name in names)
    first = np.unique(found.labels, return_index=True)[1]  # one per label
    letters = size == 32 and offline_features(found.classes) == "letters"
    features = letters_features(device=device) if letters else paintings_features
    compared = len(names) > LISTED and size >= 32  # what the features need
    table, pairs, sets = [], [], ([], [])
    for row, *pair in reconstructions(model, found, size, min(args.batch, 8)):
        table.append((names[row], *losses_of(*pair)))
        for rows, image in zip(sets, pair) if compared else ():
            rows.append(features(torch.from_numpy(image[None])))
        if out.suffix:
            wanted = len(pairs) < LISTED and (len(first) == 1 or row in first)
            pairs += [pair] * wanted
        else:
            stem = Path(names[row]).stem
            stem = stem if stems[stem] == 1 else f"{row:06d}_{stem}"
            save(Image.fromarray(pair[1]), out / f"{stem}.png")
    print_losses(table, sets)
    if out.suffix:
        parts = [np.stack(pairs[i : i + 8], axis=1) for i in range(0, len(pairs), 8)]
        grids = [tiles(np.concatenate(p), p.shape[1], ["x", "x_r"], 128) for p in parts]
        save(join(grids), out)
    print(f"{out}: {len(table)} reconstructions")


@torch.no_grad()
def write_prior(args, device):
    """3.1, --prior: two rows of images per first stage, decoded from z without an encoder.

    First row, z ~ N(0, I): does every z mean something (completeness)? Second row, z on the line
    from the first z to the second: do near z look alike (continuity)?
    """
    columns, rows, names = args.n or 8, [], []
    s = torch.linspace(0, 1, columns, device=device)[:, None, None, None]
    for run in args.prior:
        model, size = open_first_stage(run, args, device)
        shape = model.z_channels, size // model.factor, size // model.factor
        z = ImageNoise(args.seed + np.arange(columns), shape, device)()
        rows += [to_uint8(model.decode(x)) for x in (z, (1 - s) * z[0] + s * z[1])]
        kind = {"none": "AE", "kl": "VAE", "vq": "VQ"}[model.settings["bottleneck"]]
        names += [f"{kind} z", "line"]
    if len({row.shape for row in rows}) > 1:
        raise UserError("--prior: the images of these runs differ in size; give one --size")
    out = Path(args.out or "prior.png")
    save(tiles(np.concatenate(rows), columns, names), out)
    print(out)


# --------------------------------------------------------------------------------------------------
# 3.5.4  The bound on -log p(x_0)
# --------------------------------------------------------------------------------------------------


def open_likelihood(args, device, name):
    """What both numbers need: the model, images with labels, noise with a seed per image."""
    model = load(args.run or "letters", args.weights, device, args.compile)
    if model.stage != "letters":
        raise UserError("--bound, --ode: likelihoods are of pixels; this model diffuses latents")
    found, n = data.open_set(name, model.shape[1]), args.n or 16
    rows = data.evenly(len(found.labels), n)
    x, y = found.batch(rows, device)
    if found.classes != model.classes:
        y = torch.full_like(y, model.zero_label)
    return model, x, y, ImageNoise(args.seed + np.arange(len(rows)), model.shape, device)


@torch.no_grad()
def write_bound(args, device):
    """--bound: eq. 3.15, `Diffusion.bound`, for images of a set with their labels."""
    model, x, y, draw = open_likelihood(args, device, args.bound)
    T = model.diffusion.T
    with tqdm(total=T, desc="bound", unit="step", disable=None) as bar:

        def noise(t):
            bar.update()
            return draw()

        terms = model.diffusion.bound(lambda x, t: model.eps(x, t, y), x, noise)
    middle = {f"L_1 to L_{T - 1}": terms[:, 1:-1].sum(1)}
    print_bound({"L_0": terms[:, 0]} | middle | {f"L_{T}": terms[:, -1]})


def print_bound(parts):
    """Means over the images of the parts (B,) and of their sum, in bits per dimension."""
    for name, value in parts.items():
        print(f"{name:12} {value.mean():8.4f}")
    total = sum(parts.values())
    error = total.std() / len(total) ** 0.5
    print(
        f"{'bound':12} {total.mean():8.4f} +- {error:.4f} bits per dimension, {len(total)} images"
    )


@torch.no_grad()
def write_ode(args, device):
    """--ode: a bound with the density of the probability-flow ODE (not in the thesis), in --steps
    steps. With x_1 ~ q(x_1|x_0), a single step of the chain,

        -log p(x_0) <= E[ -log p_theta(x_0|x_1) - log p(x_1) + log q(x_1|x_0) ]

    by the inequality of eq. 3.14. The first term is L_0 of --bound; the others replace all L_t.
    """
    model, x_0, y, draw = open_likelihood(args, device, args.ode)
    noise, probe, D = draw(), draw().sign(), model.diffusion
    times = times_of_log_r(D.alpha_bar, args.steps)
    with tqdm(total=2 * len(times) - 2, desc="ode", unit="step", disable=None) as bar:

        def eps(x, t):
            bar.update()
            return model.eps(x, t, y)

        log_p = ode_log_likelihood(eps, D.q_sample(x_0, 1, noise), times, D.alpha_bar, probe)
    log_q = -(noise.square() + (2 * math.pi * D.beta_bar[1]).log()).flatten(1).sum(1) / 2
    first = D.data_term(lambda x, t: model.eps(x, t, y), x_0, noise)
    print_bound({"L_0": first, "x_1 by ode": (log_q - log_p) / x_0[0].numel() / math.log(2)})


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def parse():
    p = argparse.ArgumentParser(description="Pictures of a model.", usage="sample.py [flags]")
    mode, add = p.add_mutually_exclusive_group(), p.add_argument
    mode.add_argument("--grid", action="store_true", help="one row per label, the zero-label last")
    mode.add_argument("--scales", type=float, nargs="+", help="one such grid per guidance scale")
    mode.add_argument("--text", help="a word, one image per letter")
    attention = "for every picture, where the network reads each of its --colours"
    mode.add_argument("--attention", action="store_true", help=attention)
    mode.add_argument("--strip", action="store_true", help="the denoising path")
    mode.add_argument("--gif", action="store_true", help="the denoising path as a film")
    mode.add_argument("--per-label", type=int, help="this many files out/<label>/<seed>.png")
    mode.add_argument("--reconstruct", nargs="+", help="images or a set through a first stage")
    mode.add_argument("--prior", nargs="+", help="run folders of first stages: decode z ~ N(0, I)")
    bound = {"nargs": "?", "const": "letters:validation"}
    mode.add_argument("--bound", **bound, help="bits per dimension of a set (letters:validation)")
    mode.add_argument("--ode", **bound, help="the same by the probability-flow ODE")
    add("--run", help="run folder, model file, letters or paintings (default: by --label)")
    add("--label", help="a name or number; a colour is painted; none = unconditional (default)")
    palette = "such as gold, '#1e90ff' or white:0.3 (the share); again for another --grid row"
    add("--colours", nargs="+", action="append", metavar="COLOUR", help=palette)
    add("--like", metavar="FILE", help="the colours of this picture")
    add("--away", nargs="+", metavar="COLOUR", help="colours (or a label) to avoid")
    add(
        "--n",
        type=int,
        help="images or columns (default 16; --gif 32, --grid 8, --strip 2, --attention 4)",
    )
    add("--seed", type=int, default=0, help="image k has seed + k (default 0)")
    add("--out", help="picture; folder for --per-label or --reconstruct")
    add("--sampler", choices=SAMPLERS, help="dpm = DPM-Solver++ 2M (default: the model's)")
    add("--steps", type=int, default=50, help="sampling steps, 1 to T (default 50)")
    add("--eta", type=float, help="noise of ddim and dpm, 0 to 1 (default 0, or the model's)")
    add("--scale", type=float, default=2.0, help="guidance scale, 1 = none (default 2)")
    add("--guide-above", type=float, help="least noise to guide at, see with_cfg (the model's)")
    guidance = ("classifier-free", "classifier")
    add("--guidance", choices=guidance, default=guidance[0], help="4.4.3 or 4.4.2 (default 4.4.3)")
    add("--classifier", help="its run folder or file (default runs/classifier)")
    clips = "clamp the predicted x_0 to [-1, 1] (default: for pixel models that predict eps)"
    add("--clip", action=argparse.BooleanOptionalAction, help=clips)
    add("--size", type=int, help="pixels, of a latent model or first stage (default: as trained)")
    add("--weights", choices=("ema", "raw"), default="ema", help="averaged or raw (ema)")
    add("--batch", type=int, default=64, help="images per batch (default 64)")
    precisions = ("auto", "float32", "bf16")
    add(
        "--precision",
        choices=precisions,
        default="auto",
        help="of the diffusion network (auto: the faster)",
    )
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--device", help="cuda, mps or cpu (default: the best one)")
    return p.parse_args()


def check(args):
    """UserError for a number out of range, and for a flag that would have no effect."""
    least = dict.fromkeys(("n", "steps", "per_label", "size", "batch"), 1)
    least |= dict.fromkeys(("scale", "scales", "guide_above", "eta", "seed"), 0)
    for name, low in least.items():
        for value in np.ravel(getattr(args, name)):  # --scales is a list
            if value is not None and not low <= value < np.inf:
                raise UserError(f"--{name.replace('_', '-')} {value:g}: expected {low} or more")
    suffix, guided = Path(args.out or "").suffix.lower(), args.guidance == "classifier"
    if args.out and not args.per_label and (suffix or not args.reconstruct):
        data.check_picture_name(args.out)
    all_labels = args.grid or args.scales or args.text is not None
    palette = args.colours or args.like
    for wrong, message in (
        ((args.eta or 0) > 1, "--eta: expected 0 to 1"),
        (args.classifier and not guided, "--classifier: only with --guidance classifier"),
        (args.guide_above is not None and guided, "--guide-above: not with --guidance classifier"),
        (args.label and all_labels, "--label: not with --grid, --scales or --text"),
        (
            palette and (args.label or args.scales or args.text is not None or args.per_label),
            "--colours or --like: not with --label, --scales, --text or --per-label",
        ),
        (args.colours and args.like, "--colours or --like, not both"),
        (len(args.colours or [0]) > 1 and not args.grid, "--colours: several only with --grid"),
        (
            args.attention and not (palette or args.label),
            "--attention: needs --colours, --like or --label",
        ),
        (args.away and guided, "--away: not with --guidance classifier"),
        ((args.scales or args.prior) and args.n == 1, "--scales or --prior needs --n 2 or more"),
        (args.gif and args.out and suffix != ".gif", f"--out {args.out}: a film; end it with .gif"),
    ):
        if wrong:
            raise UserError(message)


def open_models(args, device):
    """The diffusion model, and the settings for `denoise` with the classifier among them."""
    colour = args.colours or args.like or (args.label or "").lower() in data.COLOURS
    own = "paintings" if colour else "letters"
    model = load(args.run or own, args.weights, device, args.compile)
    latent, T = model.stage == "ldm", model.diffusion.T
    if args.steps > T:
        raise UserError(f"--steps {args.steps}: expected 1 to {T}, as in training")
    if args.clip and latent:
        raise UserError("--clip: clamps pixels, and this model diffuses latents")
    if args.size and not latent:
        raise UserError("--size: this model draws pixels, of the size it was trained with")
    if args.size:
        factor = model.first_stage.factor
        check_size(args.size, model.settings)
        model.shape = model.shape[0], args.size // factor, args.size // factor
    if args.precision == "bf16" or args.precision == "auto" and data.computes_bf16(device):
        model.compute_in_bf16()
    if args.guide_above is None:
        args.guide_above = model.guide_above
    try:
        args.sampler, args.eta = sampler_of(model, args.sampler, args.eta)
    except ValueError:
        raise UserError("--eta: only with --sampler ddim or dpm") from None
    names = ("sampler", "steps", "scale", "guide_above", "eta", "clip")
    settings = {name: getattr(args, name) for name in names}
    settings |= {"classifier": None, "away": None}
    if args.away and isinstance(model, PaletteDiffusion):
        settings["away"] = colour_palette(model, args.away).tolist()
    elif args.away:
        if len(args.away) > 1:
            raise UserError("--away: this model avoids one label, not several")
        settings["away"] = label_number(model, args.away[0])
    if args.guidance == "classifier":
        run = args.classifier or "runs/classifier"
        settings["classifier"] = load_classifier(run, model, args.weights, args.compile)
    return model, settings


def write_samples(args, device):
    """Everything that a diffusion model draws."""
    model, settings = open_models(args, device)
    try:
        label = label_number(model, args.label or "none")
    except UserError as error:
        more = "" if args.run else f"; or a colour: {', '.join(data.COLOURS)}"
        raise UserError(f"{error}{more}") from None
    guided = args.scale != 1 or args.scales or args.guidance == "classifier"
    if model.settings["p_uncond"] == 0 and (guided or args.grid or args.label == "none"):
        note = "this model never saw the zero-label; guidance and 'none' mean nothing"
        print(f"note: trained with p_uncond 0, {note}", file=sys.stderr)
    if args.per_label:
        labels = [label] if args.label else range(len(model.classes))
        seeds = range(args.seed, args.seed + args.per_label)
        write_many(model, Path(args.out or "samples"), labels, seeds, args.batch, settings)
    else:
        picture, name = draw(model, args, label, settings)
        out = args.out or f"{name}.{'gif' if args.gif else 'png'}"
        save(picture, out)
        print(out)


def asked_palettes(model, args):
    """The palettes of --colours or --like: (P, 4, 4), or None; and their names."""
    if args.like:
        return colour_palette(model, data.palette(data.Files([args.like], None)[0]))[None], ["like"]
    if args.colours:
        found = torch.stack([colour_palette(model, words) for words in args.colours])
        return found, [" ".join(words) for words in args.colours]
    return None, []


def draw(model, args, label, settings):
    """The picture that the arguments ask for, and its default name."""
    palettes, names = asked_palettes(model, args)
    batched, seed, columns = settings | {"batch": args.batch}, args.seed, args.n or 8
    if args.text is not None:
        letters, known = args.text.replace(" ", ""), {name.lower() for name in model.classes}
        if not letters or not set(letters.lower()) <= known:
            raise UserError(f"--text {args.text!r}: the model draws only {' '.join(model.classes)}")
        images = generate(model, list(letters), seed=seed, **batched)
        row = np.zeros((len(args.text), *images.shape[1:]), np.uint8)
        row[[char != " " for char in args.text]] = images
        return grid(row, len(row), scale=3, gap=0), args.text.replace(" ", "_")
    if args.grid and palettes is not None:
        palettes = torch.cat([palettes, torch.zeros_like(palettes[:1])])
        seeds = np.tile(seed + np.arange(columns), len(palettes))
        images = generate(model, palettes.repeat_interleave(columns, 0), seeds, **batched)
        return tiles(images, columns, [*names, "none"]), "grid"
    if args.grid:
        images = images_by_label(model, columns, seed, **batched)
        return draw_rows(images, model.classes), "grid"
    if args.scales:
        return draw_scales(model, columns, seed, args.scales, **batched), "scales"
    n = args.n or (32 if args.gif else 2 if args.strip else 4 if args.attention else 16)
    seeds, columns = seed + np.arange(n), min(n, 8)
    y, name = np.full(n, label), [*model.classes, "none"][label]
    if palettes is not None:
        y, name = palettes.expand(n, -1, -1), "colours"
    if args.attention:
        if not model.cross_attentions():
            raise UserError("--attention: this model has no cross-attention")
        images, maps = attention(model, y, seeds, **settings)
        if palettes is None:  # a label is one token
            colours, known = np.uint8([data.COLOURS.get(name, (255, 255, 255))]), slice(1)
        else:
            known = palettes[0, :, 3] != 0
            colours = data.lab_to_rgb(palettes[0, known, :3]).round().astype(np.uint8)
        return draw_attention(colours, images, maps[:, known]), "attention"
    if args.gif and not args.label and palettes is None:
        y, name = np.arange(n) % len(model.classes), "all"
    if args.gif:
        path = along_the_path(model, y, seeds, 48, **settings)
        return [tiles(to_uint8(model.decode(x)), columns) for x, _ in path], name
    if args.strip:
        path = along_the_path(model, y, seeds, 12, **settings)
        path = np.array([[to_uint8(model.decode(x)) for x in state] for state in path])
        path = path.transpose(2, 1, 0, 3, 4, 5)  # (n, 2, frames, H, W, 3)
        names = ["x_t", "x_0"] * n
        return tiles(np.concatenate(np.concatenate(path)), path.shape[2], names), f"{name}_strip"
    return tiles(generate(model, y, seeds, **batched), columns), name


def main():
    args = parse()
    check(args)
    device = args.device or data.best_device()
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    data.tune(data.check_device(device))
    others = {"reconstruct": write_reconstructions, "prior": write_prior}
    others |= {"bound": write_bound, "ode": write_ode}
    write = next((write for name, write in others.items() if getattr(args, name)), write_samples)
    write(args, device)


if __name__ == "__main__":
    data.run_program(main)
