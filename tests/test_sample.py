"""Sections 4.4.3 and 4.6: samplers against exact solutions, guidance, seeds, and the command line.

For data N(m, s^2) the exact eps(x, t) is known and the path of a deterministic sampler is, too: with z fixed at the start,
x_t = sqrt(a) m + sqrt(a s^2 + 1 - a) z, which ends in m + s z. No network is needed to see whether a sampler is right.
"""

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bench import Mixture
from conftest import make_tiny_model
from PIL import Image

import sample
from data import ALPHABET, UserError, read_packed
from ddpm import Diffusion, cosine_schedule, linear_schedule
from fid import open_source
from ldm import build_classifier, load_model, save_model
from sample import (
    ImageNoise,
    classifier_gradient,
    ddim,
    ddim_step,
    ddpm,
    denoise,
    dpm,
    generate,
    load,
    plms,
    published_timesteps,
    timesteps,
    with_cfg,
    with_classifier,
    with_clipping,
    with_labels,
)

ROOT = Path(__file__).parent.parent
D = Diffusion(linear_schedule())
A = D.alpha_bar
M, S = 0.6, 0.5


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def law(t, m=M, s=S):
    return A[t].sqrt() * m, A[t] * s**2 + 1 - A[t]


def exact_eps(x, t, m=M, s=S):
    mean, var = law(t, m, s)
    return (1 - A[t]).sqrt() * (x - mean) / var


def last(path):
    *_, (t, x, x_0) = path
    return x


def ode_error(sampler, steps, end=0):
    """Distance from the exact solution at time `end`, for one start at T."""
    z = torch.tensor([1.3], dtype=torch.float64)
    (start_mean, start_var), (mean, var) = law(1000), law(end)
    times = [end + (1000 - end) * i // steps for i in range(steps, -1, -1)]
    x = last(sampler(exact_eps, start_mean + start_var.sqrt() * z, times, A))
    return (x - (mean + var.sqrt() * z)).abs().item()


# ---------------------------------------------------------------------------------------------------- time steps


def test_timesteps_are_exactly_s_for_every_s():
    for steps in range(1, 1001):
        times = timesteps(1000, steps)
        assert len(times) == steps + 1 and times[0] == 1000 and times[-1] == 0
        assert all(t > t_next for t, t_next in zip(times, times[1:]))
    assert timesteps(1000, 3) == [1000, 666, 333, 0]
    for steps in (0, 1001):
        with pytest.raises(ValueError):
            timesteps(1000, steps)


def test_published_timesteps_and_where_they_fail():
    assert published_timesteps(1000, 50) == [*range(982, 1, -20), 1]
    lengths, failures = {}, 0
    for steps in range(1, 1001):
        try:
            lengths[steps] = len(published_timesteps(1000, steps)) - 1
        except ValueError:
            failures += 1
    assert failures == 599 and 27 not in lengths and 1000 not in lengths  # E56
    assert lengths[30] == 31 and lengths[150] == 167 and lengths[200] == 200


# ---------------------------------------------------------------------------------------------------- samplers


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 999, 1000])
@pytest.mark.parametrize("sampler", [ddpm, ddim, plms, dpm])
def test_one_point_of_data_is_reached_exactly(sampler, steps):
    """With the exact eps of a known x_0 every sampler ends at x_0, whatever the start (E29)."""
    x_0 = randn(4, 3)

    def eps(x, t):
        return D.predict_eps(x, t, x_0)

    noise = [lambda: randn(4, 3, seed=7)] if sampler is ddpm else []
    path = list(sampler(eps, randn(4, 3, seed=1), timesteps(1000, steps), A, *noise))
    assert len(path) == steps and path[-1][0] == 0
    torch.testing.assert_close(path[-1][1], x_0)
    torch.testing.assert_close(path[0][2], x_0)  # the predicted clean image, from the first step on


def orders(errors):
    return -np.diff(np.log2(errors))


def test_order_of_convergence_of_the_deterministic_samplers():
    """Orders found: DDIM 1.0; PLMS 2.0 (its one improved Euler step and the DDIM transfer are of order 2) and DPM-Solver++ 2M
    2.0, down to t = 200.

    The last stretch, where sqrt(1 - alpha_bar) falls to 0 with infinite slope, costs the last two their order but not their
    lead: at the 50 steps of the thesis the error of PLMS is 43 times smaller than DDIM's, and that of 2M 53 times.
    """
    counts = (50, 100, 200, 400)
    for sampler, order, slack in ((ddim, 1, 0.05), (plms, 2, 0.2), (dpm, 2, 0.2)):
        found = orders([ode_error(sampler, n, end=200) for n in counts])
        assert np.all(np.abs(found - order) < slack), (sampler.__name__, found)
    assert 30 < ode_error(ddim, 50) / ode_error(plms, 50) < 60
    assert 40 < ode_error(ddim, 50) / ode_error(dpm, 50) < 70


def ancestral_law(steps, variance):
    """Mean and deviation that ancestral sampling ends with, exactly: eps is linear in x, so the law stays a Gaussian."""
    times = timesteps(1000, steps)
    kept = A[times[::-1]]
    sigma2 = Diffusion(1 - kept[1:] / kept[:-1]).sigma2(variance)
    start = torch.tensor([0.0, 1.0], dtype=torch.float64)
    paths = [x for _, x, _ in ddpm(exact_eps, start, times, A, lambda: 0.0, variance)]
    slope, var = 1.0, torch.ones((), dtype=torch.float64)
    for i, x in zip(range(steps, 0, -1), paths):
        slope, before = x[1] - x[0], slope
        var = (slope / before) ** 2 * var + sigma2[i]
    return paths[-1][0].item(), var.sqrt().item()


def test_order_of_convergence_of_ancestral_sampling():
    """Of its law, as it is random: order 0.9 found, rising to 1, for the deviation with either variance; the mean is exact."""
    for variance in ("beta_tilde", "beta"):
        means, deviations = np.array([ancestral_law(n, variance) for n in (125, 250, 500, 1000)]).T
        assert np.all(np.abs(means - M) < 1e-5)
        assert np.all(np.abs(orders(np.abs(deviations - S)) - 0.95) < 0.1), variance


def test_every_sampler_reaches_a_mixture_of_gaussians():
    """The deterministic path of one dimension keeps the order of the values: quantiles of x_T go to quantiles of the data.

    With 50 steps the mean error found is 0.018 (DDIM), 0.0032 (PLMS), 0.0137 (2M); the orders are 0.9, 1.0 to 1.6 and 1.9.
    """
    mixture = Mixture()
    start, exact = mixture.quantiles(1000, 500), mixture.quantiles(0, 500)
    for sampler, most, order in ((ddim, 0.02, 0.9), (plms, 0.004, 0.9), (dpm, 0.015, 1.8)):
        paths = [last(sampler(mixture.eps, start, timesteps(1000, steps), A)) for steps in (50, 100, 200)]
        errors = [(x - exact).abs().mean().item() for x in paths]
        assert errors[0] < most and np.all(orders(errors) > order), (sampler.__name__, errors)

    generator = torch.Generator().manual_seed(0)

    def noise():
        return torch.randn(10_000, generator=generator, dtype=torch.float64)

    x = last(ddpm(mixture.eps, noise(), timesteps(1000, 250), A, noise))
    assert (x.sort().values - mixture.quantiles(0, 10_000)).abs().mean() < 0.02  # 0.01 of it for the number of samples


def test_ddim_step_equals_the_transfer_of_the_plms_paper():
    """x' = sqrt(a'/a) x - (a' - a) / (sqrt(a) (sqrt((1 - a') a) + sqrt((1 - a) a'))) eps, the same at eta = 0 (E56)."""
    x, e = randn(5), randn(5, seed=1)
    a, b = A[600].item(), A[580].item()
    paper = math.sqrt(b / a) * x - (b - a) / (math.sqrt(a) * (math.sqrt((1 - b) * a) + math.sqrt((1 - a) * b))) * e
    torch.testing.assert_close(ddim_step(x, e, a, b)[0], paper)
    r, r_next = ((1 - a) / a) ** 0.5, ((1 - b) / b) ** 0.5  # and Euler's step for dy/dr = eps with y = x / sqrt(a)
    torch.testing.assert_close(ddim_step(x, e, a, b)[0] / b**0.5, x / a**0.5 + (r_next - r) * e)


def test_ddim_with_eta_1_is_ancestral_sampling():
    """Same noise, same path as the DDPM posterior with variance beta_tilde, on any subset of steps."""
    for steps in (10, 1000):
        times, x_T = timesteps(1000, steps), randn(3, seed=99)
        same_noise = [iter([randn(3, seed=i) for i in range(steps)]).__next__ for _ in range(2)]
        one = last(ddim(exact_eps, x_T, times, A, 1.0, same_noise[0]))
        two = last(ddpm(exact_eps, x_T, times, A, same_noise[1]))
        torch.testing.assert_close(one, two)


def test_ancestral_sampling_reaches_the_law():
    """1,000 steps on data N(m, 1) with variance beta, which is exact there: mean and variance of 40,000 samples."""
    generator = torch.Generator().manual_seed(0)

    def noise():
        return torch.randn(40_000, generator=generator, dtype=torch.float64)

    x = last(ddpm(lambda x, t: exact_eps(x, t, s=1.0), noise(), timesteps(1000, 1000), A, noise, "beta"))
    assert x.mean().item() == pytest.approx(M, abs=4 / math.sqrt(40_000))
    # the last step adds no noise, so the law of x_0 lacks the variance beta_1
    assert x.var().item() == pytest.approx(1 - D.beta[1].item(), abs=4 * math.sqrt(2 / 40_000))


def test_plms_with_a_constant_eps_is_ddim():
    """Each of the four coefficient sets sums to one."""
    e = randn(3)
    x, times = randn(3, seed=1), timesteps(1000, 12)
    for one, two in zip(plms(lambda x, t: e, x, times, A), ddim(lambda x, t: e, x, times, A)):
        torch.testing.assert_close(one[1], two[1])


def test_plms_costs_one_evaluation_more_than_its_steps():
    for sampler, more in ((plms, 1), (dpm, 0), (ddim, 0)):
        for steps in (1, 2, 5, 50):
            calls = []
            last(sampler(lambda x, t: calls.append(t) or x, torch.zeros(1), timesteps(1000, steps), A))  # noqa: B023
            assert len(calls) == steps + more * (steps > 2)


@pytest.mark.parametrize("steps", [2, 5, 20, 50, 100, 500])
def test_plms_does_not_look_ahead_where_that_does_harm(steps):
    """The cosine schedule, whose sqrt(alpha_bar_T) is 5e-5, on a Gaussian. With a look-ahead the error of 10 steps was 3.3,
    35 times DDIM's, and that of 50 was 1.5 times DDIM's. Without it PLMS is ahead, as on the other schedules."""
    a = Diffusion(cosine_schedule()).alpha_bar
    z = torch.tensor([1.3], dtype=torch.float64)

    def eps(x, t):
        return (1 - a[t]).sqrt() * (x - a[t].sqrt() * M) / (a[t] * S**2 + 1 - a[t])

    start = a[1000].sqrt() * M + (a[1000] * S**2 + 1 - a[1000]).sqrt() * z
    errors = [(last(sampler(eps, start, timesteps(1000, steps), a)) - (M + S * z)).abs().item() for sampler in (plms, ddim)]
    assert errors[0] < 0.8 * errors[1], errors


def test_dpm_solver_against_its_paper():
    """x' = (sigma'/sigma) x - alpha' (e^-h - 1) D,  D = (1 + 1/2r) x_0 - 1/(2r) x_0_before,  r = h_before / h; uneven steps."""
    times, x = [1000, 900, 640, 630, 300, 17], randn(5)

    def eps(x, t):
        return torch.tanh(x + t / 1000)

    alpha, sigma = A.sqrt(), (1 - A).sqrt()
    lam, ours = (alpha / sigma).log(), last(dpm(eps, x, times, A))
    data = [None]
    for i, (t, t_next) in enumerate(zip(times, times[1:])):
        data.append((x - sigma[t] * eps(x, t)) / alpha[t])
        h = lam[t_next] - lam[t]
        D = data[-1]
        if i:
            r = (lam[t] - lam[times[i - 1]]) / h
            D = (1 + 1 / (2 * r)) * data[-1] - data[-2] / (2 * r)
        x = sigma[t_next] / sigma[t] * x - alpha[t_next] * ((-h).exp() - 1) * D
    torch.testing.assert_close(ours, x)


def test_published_plms_is_reproduced():
    """An independent transcription of what the published sampler computes, 0-based arrays and all, on a curved eps."""
    alphas = A[1:].numpy()
    steps = np.arange(0, 1000, 20) + 1
    previous = np.concatenate([alphas[:1], alphas[steps[:-1]]])

    def model(x, index):  # counts from 0
        return np.tanh(x + index / 1000)

    def transfer(x, e, i):
        clean = (x - np.sqrt(1 - alphas[steps[i]]) * e) / np.sqrt(alphas[steps[i]])
        return np.sqrt(previous[i]) * clean + np.sqrt(1 - previous[i]) * e

    x, old = randn(4).numpy(), []
    for i in range(49, -1, -1):
        e = model(x, steps[i])
        if len(old) == 0:
            combined = (e + model(transfer(x, e, i), steps[max(i - 1, 0)])) / 2
        elif len(old) == 1:
            combined = (3 * e - old[-1]) / 2
        elif len(old) == 2:
            combined = (23 * e - 16 * old[-1] + 5 * old[-2]) / 12
        else:
            combined = (55 * e - 59 * old[-1] + 37 * old[-2] - 9 * old[-3]) / 24
        x, old = transfer(x, combined, i), [*old, e][-3:]

    ours = last(plms(lambda x, t: torch.tanh(x + (t - 1) / 1000), randn(4), published_timesteps(1000, 50), A))
    torch.testing.assert_close(ours, torch.from_numpy(x))
    to_the_end = last(plms(lambda x, t: torch.tanh(x + (t - 1) / 1000), randn(4), timesteps(1000, 50), A))
    assert (ours - to_the_end).abs().max() > 1e-3  # the published path ends at t = 1, ours at the clean image


# ---------------------------------------------------------------------------------------------------- guidance


class GaussianModel:
    """A model whose label y means data N(m_y, S^2); label 2 is the zero-label."""

    diffusion, zero_label, means = D, 2, torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64)

    def __init__(self):
        self.batches = []

    def eps(self, x, t, y):
        self.batches.append(y.tolist())
        return exact_eps(x, t, m=self.means[y])


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0, 5.0])
def test_classifier_free_guidance_reaches_the_closed_form(scale):
    """eps is linear in the mean, so guided sampling has the mean m_0 + s (m_y - m_0), for every sampler."""
    model, y = GaussianModel(), torch.tensor([0, 1])
    mean = 0.2 + scale * (model.means[y] - 0.2)
    z = torch.tensor([0.3, -1.0], dtype=torch.float64)
    start, var = law(1000, mean)
    eps = with_cfg(model, y, scale)
    for sampler in (ddim, plms, dpm):
        x = last(sampler(eps, start + var.sqrt() * z, timesteps(1000, 200), A))
        torch.testing.assert_close(x, mean + S * z, atol=0.02 if sampler is ddim else 2e-3, rtol=0)
    noiseless = last(ddpm(eps, start, timesteps(1000, 1000), A, lambda: 0.0))
    torch.testing.assert_close(noiseless, mean, atol=0.01, rtol=0)


def test_guidance_of_the_noisy_part_reaches_the_closed_form():
    """Below noise N only the label's own eps acts: of (s - 1) (m_y - m_0) the share S / sqrt(S^2 + N^2) is left."""
    model, y, scale = GaussianModel(), torch.tensor([0, 1]), 15.0
    z = torch.tensor([0.3, -1.0], dtype=torch.float64)
    for t in (300, 700, 1000):  # the first step that is not guided begins here; at T none is
        n = ((1 - A[t]) / A[t]).sqrt()
        mean = model.means[y] + (S / (S**2 + n**2).sqrt() * (scale - 1) * (model.means[y] - 0.2) if t < 1000 else 0)
        start, var = law(1000, 0.2 + (scale if t < 1000 else 1) * (model.means[y] - 0.2))
        for sampler in (ddim, plms, dpm):
            path = sampler(with_cfg(model, y, scale, n), start + var.sqrt() * z, timesteps(1000, 1000), A)
            torch.testing.assert_close(last(path), mean + S * z, atol=0.03, rtol=0)


def test_classifier_free_guidance_is_one_batched_evaluation():
    y, x = torch.tensor([0, 1]), randn(2)
    n = ((1 - A[500]) / A[500]).sqrt()
    cases = ((2.0, 0, [[2, 2, 0, 1]]), (2.0, 0.99 * n, [[2, 2, 0, 1]]), (2.0, 1.01 * n, [[0, 1]]))
    for scale, guide_above, batches in (*cases, (1.0, 0, [[0, 1]]), (0.0, 99.0, [[2, 2]])):
        model = GaussianModel()
        with_cfg(model, y, scale, guide_above)(x, 500)
        assert model.batches == batches


class Tilt:
    """Data N(0, S^2) and a label with f(y | x_0) ~ exp(c_y x_0): x_0 given x_t is a Gaussian, so log f(y | x_t) is linear."""

    c = torch.tensor([1.0, -3.0], dtype=torch.float64)

    def log_f(self, x, t):
        return self.c * (A[t].sqrt() * S**2 / law(t)[1] * x)[:, None]


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0, 5.0])
def test_eq_4_1_classifier_guidance_reaches_the_closed_form(scale):
    """p(x) f(y | x)^s ~ N(s c_y S^2, S^2), for eq. 4.1 in ancestral sampling and for the score form in the others."""
    y, z, classifier = torch.tensor([0, 1, 2]), torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64), Tilt()
    mean = scale * S**2 * torch.tensor([1.0, -3.0, 0.0], dtype=torch.float64)  # 2 is the zero-label: no guidance
    gradient = classifier_gradient(classifier, y)

    def eps_zero(x, t):
        return exact_eps(x, t, m=0.0)

    start, var = law(1000, mean)
    eps = with_classifier(eps_zero, gradient, scale, A)
    for sampler in (ddim, plms, dpm):
        x = last(sampler(eps, start + var.sqrt() * z, timesteps(1000, 200), A))
        torch.testing.assert_close(x, mean + S * z, atol=0.03 if sampler is ddim else 3e-3, rtol=0)
    errors = []
    for steps in (500, 1000):
        path = ddpm(eps_zero, start, timesteps(1000, steps), A, lambda: 0.0, "beta", gradient, scale)
        errors.append((last(path) - mean).abs().max().item())
    assert errors[1] < 0.01 and (errors[1] < 0.55 * errors[0] or not scale)  # eq. 4.1 is of order 1 in the step


def test_classifier_guidance_at_scale_1_is_bayes_rule():
    """On a mixture it turns eps of all data into eps of the label, so every path is that of the label alone."""
    mixture, y, x = Mixture(), torch.tensor([0, 1]).repeat(50), randn(100)
    eps = with_classifier(mixture.eps, classifier_gradient(mixture, y), 1.0, A)
    for sampler in (ddim, plms, dpm):
        guided = last(sampler(eps, x, timesteps(1000, 10), A))
        torch.testing.assert_close(
            guided, last(sampler(lambda x, t: exact_eps(x, t, mixture.m[y], mixture.s[y]), x, timesteps(1000, 10), A))
        )
    noise = [iter([randn(100, seed=i) for i in range(1000)]).__next__ for _ in range(2)]
    guided = last(ddpm(mixture.eps, x, timesteps(1000, 1000), A, noise[0], gradient=classifier_gradient(mixture, y)))
    exact = last(ddpm(lambda x, t: exact_eps(x, t, mixture.m[y], mixture.s[y]), x, timesteps(1000, 1000), A, noise[1]))
    torch.testing.assert_close(guided, exact, atol=0.06, rtol=0)


def test_eq_4_1_the_gradient_is_taken_at_x_t_not_at_x_t_minus_1():
    seen, x_T = [], randn(4)

    def gradient(x, t):
        seen.append((t, x))
        return torch.ones_like(x)

    states = [
        (1000, x_T),
        *((t, x) for t, x, _ in ddpm(exact_eps, x_T, [1000, 600, 200, 0], A, lambda: randn(4), gradient=gradient)),
    ]
    assert [t for t, _ in seen] == [1000, 600, 200]
    assert all(torch.equal(x, at) for (_, x), (_, at) in zip(seen, states))


class Indifferent:
    """A classifier without an opinion."""

    def __init__(self):
        self.autocast = set()

    def log_f(self, x, t):
        self.autocast.add(torch.is_autocast_enabled("cpu"))
        return 0 * x.flatten(1)[:, :26]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_classifier_guides_the_zero_label(tiny_model, sampler):
    """Of a classifier without an opinion it is unconditional generation, whatever the scale and the label."""
    model, how = load_model(tiny_model), {"sampler": sampler, "steps": 3, "progress": False}
    guided = generate(model, ["A", "B"], scale=7.0, classifier=Indifferent(), **how)
    assert np.array_equal(guided, generate(model, ["none", "none"], **how))
    classifier = Indifferent()
    generate(model, "A", scale=7.0, classifier=classifier, bf16=True, **how)
    assert classifier.autocast == {True}


def test_denoise_clips_where_it_is_asked_to(tiny_model):
    model = load_model(tiny_model)
    how = {"sampler": "ddim", "steps": 4}
    free, held = (torch.stack([x_0 for *_, x_0 in denoise(model, [0], [0], clip=clip, **how)]) for clip in (False, True))
    assert free.abs().max() > 1.01 and held.abs().max() < 1.001


def test_e47_a_classifier_must_have_learnt_noised_images():
    """f(y|x, t), f(y|x) and f(y|x_t) of 4.4.2 are one function f(y | x_t, t); that of clean images guides elsewhere."""
    mixture, clean, y, x = Mixture(), Mixture(), torch.tensor([0, 1]).repeat(50), randn(100)
    clean.log_f = lambda x, t: mixture.log_f(x, 0)
    for t in (300, 600):
        alone = exact_eps(x, t, mixture.m[y], mixture.s[y])
        torch.testing.assert_close(with_classifier(mixture.eps, classifier_gradient(mixture, y), 1.0, A)(x, t), alone)
        assert (with_classifier(mixture.eps, classifier_gradient(clean, y), 1.0, A)(x, t) - alone).abs().mean() > 0.1


def test_clipping_bounds_the_predicted_image_and_touches_nothing_else():
    eps = with_clipping(exact_eps, D)
    for t in (1, 300, 1000):
        x = torch.linspace(-4, 4, 9, dtype=torch.float64)
        free, held = (D.predict_x0(x, t, e(x, t)) for e in (exact_eps, eps))
        torch.testing.assert_close(held, free.clamp(-1, 1))


# ---------------------------------------------------------------------------------------------------- images


def test_noise_depends_on_the_seed_not_on_the_batch():
    one, many = ImageNoise([5], (3, 4), "cpu"), ImageNoise([4, 5, 6], (3, 4), "cpu")
    for _ in range(3):
        assert torch.equal(one()[0], many()[1])


@pytest.mark.parametrize("sampler", ["plms", "ddpm"])
def test_an_image_does_not_depend_on_its_batch(tiny_model, sampler):
    """Beyond float32 rounding: at most one grey level."""
    model = load_model(tiny_model)
    y, seeds = np.arange(5), np.arange(5)
    how = {"sampler": sampler, "steps": 6, "progress": False}
    together, alone = generate(model, y, seeds, batch=5, **how), generate(model, y, seeds, batch=2, **how)
    assert np.abs(together.astype(int) - alone).max() <= 1
    assert together.std() > 10 and np.abs(together[0].astype(int) - together[1]).max() > 10


def test_labels_that_differ_by_case_are_different_labels():
    model = SimpleNamespace(classes=["A", "a", "None", "B"], zero_label=4)
    assert [sample.label_number(model, label) for label in ("A", "a", "b", "none", "2")] == [0, 1, 3, 4, 2]
    assert sample.word_labels(model, "Aa b") == [0, 1, None, 3]


def test_network_sees_time_counted_from_zero(tiny_model):
    model, seen = load_model(tiny_model), []
    model.unet.register_forward_pre_hook(lambda module, args: seen.append(args[1].tolist()))
    list(denoise(model, np.array([0]), [0], sampler="ddim", steps=2))
    assert seen == [[999], [999], [499], [499]] or seen == [[999, 999], [499, 499]]
    x = torch.randn((2, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # in sampling t is a number, in training a tensor
        one, two = (model.eps(x, t, torch.tensor([0, 1])) for t in (7, torch.tensor([7, 7])))
    assert torch.equal(one, two) and seen[-1] == [6, 6]


def test_half_precision_files_and_both_sets_of_weights_load(tmp_path, tiny_model):
    content = torch.load(tiny_model, weights_only=True)
    half = {name: value.half() for name, value in content["weights"]["ema"].items()}
    torch.save(content | {"weights": {"ema": half}}, tmp_path / "half.pt")
    model, x, t, y = load_model(tmp_path / "half.pt"), torch.zeros(1, 3, 32, 32), 500, torch.tensor([3])
    assert next(model.parameters()).dtype == torch.float32
    raw = load_model(tiny_model, "raw")
    torch.testing.assert_close(with_labels(model, y)(x, t), with_labels(raw, y)(x, t), atol=1e-2, rtol=1e-2)


# ---------------------------------------------------------------------------------------------------- command line


FAST = ("--steps", "2")


def test_command_line_pictures(run, tiny_model, tmp_path):
    for arguments, size in (
        (("--label", "b", "--n", "3"), (3 * 66 + 2, 68)),
        (("--label", "none", "--n", "2", "--sampler", "ddim", "--eta", "0.5"), (2 * 66 + 2, 68)),
        (("--text", "Ab c"), (4 * 96, 96)),
    ):
        code, out, _ = run("sample", "--run", tiny_model, *FAST, *arguments, "--out", tmp_path / "a.png")
        assert code == 0 and "a.png" in out
        assert Image.open(tmp_path / "a.png").size == size


def test_command_line_grid_has_a_row_a_label_and_the_zero_label_last(run, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "grid", lambda images, columns, names: Image.fromarray(np.concatenate(images)))
    code, *_ = run("sample", "--run", tiny_model, *FAST, "--grid", "--n", 1, "--out", tmp_path / "g.png")
    rows = np.asarray(Image.open(tmp_path / "g.png")).reshape(27, 32, 32, 3)
    assert code == 0
    model = load_model(tiny_model)
    for label in (0, 25, 26):
        expected = generate(model, np.array([label]), [0], steps=2, progress=False)[0]
        assert np.abs(rows[label].astype(int) - expected).max() <= 1


def test_command_line_strip(run, tiny_model, tmp_path):
    code, *_ = run("sample", "--run", tiny_model, "--strip", "--label", "A", "--steps", 4, "--out", tmp_path / "s.png")
    assert code == 0 and Image.open(tmp_path / "s.png").size[1] == 4 * 66 + 2  # two images, x_t and x_0 of each


def test_command_line_folders(run, refused, tiny_model, tmp_path):
    out = tmp_path / "many"
    code, *_ = run("sample", "--run", tiny_model, *FAST, "--per-label", 2, "--seed", 5, "--out", out)
    assert code == 0
    assert sorted(p.name for p in out.iterdir()) == [*ALPHABET, "settings.json"]
    assert sorted(p.name for p in (out / "Q").iterdir()) == ["000005.png", "000006.png"]
    single = tmp_path / "one.png"
    run("sample", "--run", tiny_model, *FAST, "--label", "Q", "--n", 1, "--seed", 6, "--out", single)
    picture = np.asarray(Image.open(single).crop((2, 2, 66, 66)).resize((32, 32), Image.Resampling.NEAREST))
    assert np.abs(picture.astype(int) - np.asarray(Image.open(out / "Q" / "000006.png"))).max() <= 1  # named after its seed
    again = refused("sample", "--run", tiny_model, *FAST, "--per-label", 2, "--out", out)
    assert "was begun with seed 5, not 0" in again
    assert "neither an empty folder" in refused("sample", "--run", tiny_model, *FAST, "--per-label", 2, "--out", tmp_path)


def test_command_line_film(run, refused, tiny_model, tmp_path):
    film = tmp_path / "a.gif"
    code, *_ = run("sample", "--run", tiny_model, "--gif", "--steps", 5, "--n", 9, "--out", film)
    frames = Image.open(film)
    assert code == 0 and frames.n_frames == 5 and frames.info["loop"] == 0 and frames.size == (8 * 66 + 2, 2 * 66 + 2)
    first = np.asarray(frames.convert("RGB"))
    frames.seek(4)
    assert frames.info["duration"] == 2500 and np.abs(np.asarray(frames.convert("RGB")).astype(int) - first).max() > 50
    assert "end it with .gif" in refused("sample", "--run", tiny_model, "--gif", "--out", tmp_path / "a.png")


def test_another_program_asks_by_name_or_number(tiny_model):
    model = load(tiny_model)
    images = generate(model, ["C", 25, "none"], count=2, seed=7, steps=2, sampler="dpm", progress=False)
    assert images.shape == (6, 32, 32, 3) and images.dtype == np.uint8
    assert np.array_equal(images, generate(model, [2, 2, 25, 25, 26, 26], range(7, 13), steps=2, sampler="dpm", progress=False))
    assert generate(model, "C", count=3, steps=2, progress=False).shape == generate(model, 2, count=3, steps=2).shape
    for label in ("blue", 27, -1):
        with pytest.raises(UserError, match="label"):
            generate(model, label)


def make_tiny_classifier(path, schedule="linear"):
    settings = {"channels": 16, "multipliers": (1, 1), "blocks": 1, "shape": (3, 32, 32), "schedule": schedule, "T": 1000}
    settings["space"] = "pixels"
    save_model(path, "classifier", settings, ALPHABET, 0, {"ema": build_classifier(settings, ALPHABET).state_dict()})
    return path


def test_bf16_and_classifier_guidance_through_the_command_line(run, refused, tiny_model, tmp_path):
    make_tiny_classifier(tmp_path / "guide.pt")
    make_tiny_classifier(tmp_path / "other.pt", "cosine")
    how = ("--run", tiny_model, *FAST, "--label", "A", "--n", 2, "--out", tmp_path / "a.png")
    guided = ("--guidance", "classifier", "--scale", 400, "--classifier", tmp_path / "guide.pt")
    pictures = {}
    for sampler in ("plms", "ddpm", "dpm"):
        for more in ((), guided, (*guided, "--precision", "bf16"), (*guided, "--label", "none")):
            code, _, err = run("sample", *how, "--sampler", sampler, *more)
            assert code == 0, err
            pictures[sampler, more] = np.asarray(Image.open(tmp_path / "a.png")).astype(int)
        plain, classified, bf16, none = (pictures[sampler, m] for m in list(dict.fromkeys(m for _, m in pictures)))
        assert np.abs(classified - none).max() > 1 and np.abs(classified - plain).max() > 1
        assert 0 < np.abs(classified - bf16).mean() < 20
    assert "noise schedule are not those" in refused("sample", *how, *guided[:-1], tmp_path / "other.pt")
    assert "is no classifier" in refused("sample", *how, *guided[:-1], tiny_model)
    assert "it guides another model" in refused("sample", "--run", tmp_path / "guide.pt")
    assert "only with --guidance classifier" in refused("sample", *how, "--classifier", tmp_path / "guide.pt")


# ---------------------------------------------------------------------------------------------------- many images


def content(folder):
    """Every file that is no record of the settings, as bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "settings.json"}


@pytest.fixture
def many(run, tiny_model, tmp_path):
    """many("name", 3) makes a set with three images a label, in chunks of 16 rows."""

    def call(name, per_label, *more):
        how = ("--per-label", per_label, "--batch", 16, "--steps", 2, "--sampler", "ddpm", *more)
        code, out, err = run("sample", "--run", tiny_model, *how, "--out", tmp_path / name)
        assert code == (130 if "goes on" in err else 0), err
        return tmp_path / name

    return call


@pytest.fixture
def one_thread():
    """As under torchrun. The number of threads decides how sums are rounded."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_e60_the_hours_of_5_1_1():
    """40 s for 15 images. 56 h, printed for 50,000 images of one label, are 8 labels of 10,000; the 4.5 days are 6."""
    hours = 40 / 15 / 3600  # an image
    assert 10_000 * hours == pytest.approx(7.4, abs=0.05)  # "approximately 7 hours" holds
    assert 50_000 * hours < 38 and 8 * 7 == 56
    assert 8 * 50_000 * hours / 2 / 24 > 6 > 4.5
    assert 1000 / 50 == 20 and 4 * 60 / 40 == 6  # PLMS 50 saves 20 times the steps, the two timings of 4.6.1 differ 6 times


@pytest.mark.parametrize("form", ["png", "npy"])
def test_5_1_1_interrupted_and_grown_and_two_process_sets_are_byte_identical(many, monkeypatch, form):
    whole = content(many("whole", 3, "--format", form))
    assert len(whole) == (78 if form == "png" else 5)
    with monkeypatch.context() as patch:
        calls = []

        def interrupted(*arguments, **how):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return denoise(*arguments, **how)

        patch.setattr(sample, "denoise", interrupted)
        unfinished = content(many("interrupted", 3, "--format", form))
    assert len(calls) == 3 and unfinished != whole and len(unfinished) == (32 if form == "png" else 2)
    assert content(many("interrupted", 3, "--format", form)) == whole

    many("grown", 1, "--format", form)
    assert content(many("grown", 3, "--format", form)) == whole

    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        shared = many("shared", 3, "--format", form)
    assert content(shared) == whole


def test_5_1_1_torchrun(many, one_thread, tiny_model, tmp_path):
    """Two real processes, byte for byte what one makes; to make the set again computes nothing and changes nothing."""
    how = ["--per-label", 2, "--batch", 16, "--steps", 2, "--sampler", "ddpm", "--run", tiny_model, "--out", tmp_path / "two"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--", "sample.py"]
    done = subprocess.run([*torchrun, *map(str, how), "--device", "cpu"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    one = many("one", 2, "--device", "cpu")
    assert content(tmp_path / "two") == content(one)
    before = {p: p.stat().st_mtime_ns for p in one.rglob("*.png")}
    many("one", 2, "--device", "cpu")
    assert {p: p.stat().st_mtime_ns for p in one.rglob("*.png")} == before


def test_many_images_guided_by_a_classifier(many, refused, monkeypatch, tiny_model, tmp_path):
    """The gradient of a chunk is a function of the chunk, too: two processes make what one makes."""
    guide, other = (make_tiny_classifier(tmp_path / name) for name in ("guide.pt", "other.pt"))
    guided = ("--guidance", "classifier", "--scale", 400, "--classifier")
    whole = content(many("whole", 1, *guided, guide))
    assert whole != content(many("plain", 1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        shared = many("shared", 1, *guided, guide)
    assert content(shared) == whole
    how = ("--run", tiny_model, "--per-label", 1, "--batch", 16, "--steps", 2, "--sampler", "ddpm", "--out", shared)
    assert "was begun with classifier" in refused("sample", *how, *guided, other)


def test_many_images_in_one_memory_map_are_the_same_and_open_everywhere(many, tmp_path):
    folders, packed = many("png", 2), many("npy", 2, "--format", "npy")
    letters = read_packed(packed, 32)
    assert letters.classes == ALPHABET and letters.labels.tolist() == [*range(26)] * 2
    assert letters.sources.tolist() == [0] * 26 + [1] * 26
    for row in (0, 25, 26, 51):
        file = folders / ALPHABET[letters.labels[row]] / f"{letters.sources[row]:06d}.png"
        assert np.array_equal(letters.images[row], np.asarray(Image.open(file)))
    for path in (folders, packed):
        source = open_source(path, tmp_path)
        assert source.classes == ALPHABET and set(source.counts().values()) == {2}


def test_a_set_is_never_mixed_from_two_settings(many, refused, tiny_model, tmp_path):
    out = many("set", 1, "--label", "A")
    before = content(out)
    same = ("--run", tiny_model, "--per-label", 1, "--label", "A", "--steps", 2, "--sampler", "ddpm", "--out", out)
    for more, words in (
        (("--scale", 3), "begun with scale 2.0, not 3.0"),
        (("--steps", 3), "begun with steps 2, not 3"),
        (("--batch", 8), "begun with batch 16, not 8"),
        (("--seed", 1), "begun with seed 0, not 1"),
        (("--format", "npy"), "begun with format png, not npy"),
        (("--label", "B"), "begun with labels ['A'], not ['B']"),
        (("--run", make_tiny_model(tmp_path / "other.pt", predict="eps")), "begun with model "),
    ):
        assert words in refused("sample", *same, *more)
    (out / "settings.json").write_text("{")
    assert "is damaged" in refused("sample", *same)
    assert content(out) == before


def test_command_line_says_when_guidance_means_nothing(run, tmp_path):
    model = make_tiny_model(tmp_path / "model.pt", p_uncond=0.0)
    code, _, err = run("sample", "--run", model, *FAST, "--label", "A", "--n", 1, "--out", tmp_path / "a.png")
    assert code == 0 and "never saw the zero-label" in err
    code, _, err = run("sample", "--run", model, *FAST, "--label", "A", "--n", 1, "--scale", 1, "--out", tmp_path / "a.png")
    assert code == 0 and "zero-label" not in err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--steps", 0), "--steps 0"),
        (("--steps", 1001), "1 to 1000"),
        (("--label", "blue"), "unknown label 'blue'"),
        (("--label", "27"), "unknown label"),
        (("--text", "A5"), "draws only"),
        (("--text", ""), "draws only"),
        (("--scale", -1), "--scale -1"),
        (("--n", 0), "1 or more"),
        (("--eta", 2), "--eta 2"),
        (("--times", "published", "--steps", 27), "past the last step"),
        (("--eta", 0.5), "only with --sampler ddim"),
        (("--sampler", "ddpm", "--times", "published"), "must end at the clean image"),
        (("--scale", "nan"), "--scale nan"),
        (("--out", "letters"), "not the name of a picture"),
        (("--device", "cuda:99"), "not there on this machine"),
        (("--out", "/proc/nothing/a.png", "--steps", 1, "--n", 1), "cannot write"),
    ],
)
def test_bad_input_is_one_clear_line(refused, tiny_model, arguments, words):
    assert words in refused("sample", "--run", tiny_model, *arguments)


class Harmful:
    """What an attacker's file would do when it is unpickled."""

    def __reduce__(self):
        import os

        return os.system, ("echo harm > harmed",)


def test_bad_model_files_are_one_clear_line(refused, run, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = torch.load(tiny_model, weights_only=True)
    whole = tiny_model.read_bytes()
    (tmp_path / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"weights": 1}, tmp_path / "foreign.pt")
    torch.save(content | {"extra": Harmful()}, tmp_path / "harmful.pt")
    weights = dict(content["weights"]["ema"])
    weights["unet.other"] = weights.pop("unet.out.2.bias")
    torch.save(content | {"weights": {"ema": weights}}, tmp_path / "misfit.pt")
    for name, words in {
        "nothing.pt": "no such file",
        "truncated.pt": "truncated",
        "text.pt": "not a checkpoint that can be read",
        "foreign.pt": "not a checkpoint of this project",
        "harmful.pt": "refused, it asks to run",
        "misfit.pt": "1 missing (first: unet.out.2.bias); 1 unknown (first: unet.other)",
    }.items():
        assert words in refused("sample", "--run", tmp_path / name)
    assert not (tmp_path / "harmed").exists()
    assert list(tmp_path.glob("*.png")) == []


def test_without_any_model_one_line_says_how_to_make_one(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "ASSETS", tmp_path)
    assert "python train.py --stage letters" in refused("sample", "--text", "HELLO")
