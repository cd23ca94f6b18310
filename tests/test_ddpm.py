"""Chapter 2, sections 3.5 and 4.4, equation by equation: the right form and the printed one."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch.testing import assert_close

from ddpm import (
    SCHEDULES,
    Diffusion,
    bits_per_dim,
    classifier_free_guidance,
    classifier_guided_eps,
    classifier_guided_mean,
    cosine_schedule,
    discrete_log_likelihood,
    drop_labels,
    elbo,
    gaussian_kl,
    kl_divergence,
    linear_schedule,
    log_linear_schedule,
    sqrt_linear_schedule,
)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


D = Diffusion(linear_schedule())
X_0, NOISE, T = randn(4, 3), randn(4, 3, seed=1), torch.tensor([1, 2, 500, 1000])  # a small batch

# Averages of polynomials up to degree 5 in a standard normal variable are exact with these
NODE, WEIGHT = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(3))
WEIGHT = WEIGHT / WEIGHT.sum()


def gaussian_eps(diffusion, m, s):
    """The exact eps(x, t) for data N(m, s^2): x_t has mean sqrt(a) m and variance a s^2 + 1 - a."""

    def eps(x, t):
        a = diffusion.at(diffusion.alpha_bar, t, x)
        return (1 - a).sqrt() * (x - a.sqrt() * m) / (a * s**2 + 1 - a)

    return eps


def gaussian_data(m, s):
    """x_0 ~ N(m, s^2) and independent noise: (9, 1) nodes each, and (9,) weights."""
    x_0, noise = (m + s * NODE).repeat_interleave(3)[:, None], NODE.repeat(3)[:, None]
    return x_0, noise, torch.outer(WEIGHT, WEIGHT).flatten()


# --------------------------------------------------------------------------------------- chapter 2

# A model with four latent values at one observed x, and two hundred guesses q(z)
PRIOR, LIKELIHOOD = randn(4, seed=5).softmax(-1), tensor(0.1, 0.4, 0.7, 0.2)
JOINT = LIKELIHOOD * PRIOR  # p(z, x)
EVIDENCE = JOINT.sum()  # p(x)
POSTERIOR = JOINT / EVIDENCE  # p(z|x)
Q = randn(200, 4, seed=6).softmax(-1)
PRINTED_L = (Q * Q.log()).sum(-1) - (Q * JOINT.log()).sum(-1)  # eq. 2.15 as printed (E05)
LAW_1, LAW_2 = randn(5, seed=1).softmax(-1), randn(5, seed=2).softmax(-1)

# A continuous model: p(z) = N(0, 1), p(x|z) = N(z, 1); so p(x) = N(0, 2) and p(z|x) = N(x/2, 1/2)
X, Z = torch.tensor(1.2, dtype=torch.float64), torch.linspace(-9, 9, 1801, dtype=torch.float64)


def density(x, mean, var):
    mean = torch.as_tensor(mean, dtype=torch.float64)
    return torch.distributions.Normal(mean, var**0.5).log_prob(x).exp()


def on_grid(mean, var):
    """N(mean, var) as probabilities of the cells of Z."""
    return density(Z, mean, var) * (Z[1] - Z[0])


def test_eq_2_1_bayes_rule():
    posterior = density(X, Z, 1) * on_grid(0, 1) / density(X, 0, 2)
    assert abs(kl_divergence(posterior, on_grid(X / 2, 0.5))) < 1e-12
    assert kl_divergence(posterior, on_grid(0, 1)) > 0.1  # the prior is another law


def test_eq_2_2_expected_value_as_a_sum_and_as_an_integral():
    x, mu, sigma = torch.arange(256, dtype=torch.float64) / 127.5 - 1, 0.137, 0.1
    p = discrete_log_likelihood(x, mu, torch.tensor(sigma)).exp()
    assert (x * p).sum().item() == pytest.approx(mu, abs=1e-6)
    integral = torch.trapezoid(Z * density(Z, mu, sigma**2), Z)
    assert integral.item() == pytest.approx(mu, abs=1e-6)


def test_eq_2_3_expected_value_of_a_function():
    """h = log(q/p): a sum over values against the known integral."""
    known = gaussian_kl(0.3, 0.49, -1.0, 1.9).double()
    assert_close(kl_divergence(on_grid(0.3, 0.49), on_grid(-1.0, 1.9)), known, rtol=1e-6, atol=0)


def test_eq_2_4_kl_divergence_value_and_printed_sign():
    q, p = tensor(0.5, 0.5), tensor(0.25, 0.75)
    right = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert kl_divergence(q, p).item() == pytest.approx(right)
    printed = (q * (p / q).log()).sum().item()  # E_q[log(p/q)], the first form of 2.4 (E02)
    assert printed == pytest.approx(-right) and printed < 0


def test_eq_2_5_is_the_other_direction():
    printed = (LAW_2 * (LAW_1 / LAW_2).log().neg()).sum()  # integral of log(p/q) p (E03)
    assert_close(printed, kl_divergence(LAW_2, LAW_1))
    assert abs(printed - kl_divergence(LAW_1, LAW_2)) > 1e-3
    difference = LAW_2.log() - LAW_1.log()  # the text takes "the log of" p - q
    assert not torch.allclose(difference, (LAW_2 - LAW_1).abs().log())


def test_eq_2_6_asymmetry_holds_in_general_not_always():
    """E04: equal variances make it symmetric; KL also fails the triangle inequality."""
    assert abs(kl_divergence(LAW_1, LAW_2) - kl_divergence(LAW_2, LAW_1)) > 1e-3
    assert_close(gaussian_kl(0.0, 2.0, 3.0, 2.0), gaussian_kl(3.0, 2.0, 0.0, 2.0))
    parts = gaussian_kl(0.0, 1.0, 1.0, 1.0) + gaussian_kl(1.0, 1.0, 2.0, 1.0)
    assert gaussian_kl(0.0, 1.0, 2.0, 1.0) > parts


def test_eq_2_7_kl_is_never_negative_and_zero_only_for_equal_laws():
    q, p = randn(1000, 6, seed=3).softmax(-1), randn(1000, 6, seed=4).softmax(-1)
    assert (kl_divergence(q, p) > 0).all()
    assert_close(kl_divergence(q, q), torch.zeros(1000, dtype=torch.float64))


def test_eq_2_8_evidence_is_the_integral_over_z():
    joint, evidence = density(X, Z, 1) * on_grid(0, 1), density(X, 0, 2)
    assert_close(joint.sum(), evidence)
    assert_close(elbo(on_grid(X / 2, 0.5), joint).exp(), evidence)  # the best bound reaches it


def test_eq_2_9_a_simple_q_for_a_posterior_with_two_peaks():
    """No Gaussian fits. D of 2.10 chooses one of the peaks, D of 2.5 the middle (E03)."""
    posterior = (on_grid(-2, 0.25) + on_grid(2, 0.25)) / 2
    candidates = [(m, s) for m in np.linspace(-3, 3, 25) for s in (0.3, 0.5, 1.0, 2.0, 3.0)]
    q = torch.stack([on_grid(m, s**2) for m, s in candidates])
    assert kl_divergence(q, posterior).min() > 0.5
    assert abs(candidates[kl_divergence(q, posterior).argmin()][0]) == 2
    assert candidates[kl_divergence(posterior, q).argmin()] == (0, 2)


def test_eq_2_10_the_smallest_divergence_is_at_the_posterior():
    candidates = [(m, v) for m in np.linspace(-1, 1.4, 25) for v in (0.25, 0.5, 1.0, 2.0)]
    q = torch.stack([on_grid(m, v) for m, v in candidates])
    best = kl_divergence(q, on_grid(X / 2, 0.5)).argmin()
    assert candidates[best] == (pytest.approx(0.6), 0.5)


def test_eq_2_11_over_several_axes():
    """The integral runs over all axes of z; for independent axes the divergences add."""
    q, p = randn(2, 5, seed=1).softmax(-1), randn(2, 5, seed=2).softmax(-1)
    together = kl_divergence(torch.outer(*q).flatten(), torch.outer(*p).flatten())
    assert_close(together, kl_divergence(q, p).sum())


def test_eq_2_12_posterior_from_the_joint():
    assert_close(kl_divergence(POSTERIOR, JOINT), -EVIDENCE.log())  # without the evidence


def test_eq_2_13_the_joint_inserted():
    assert_close(kl_divergence(Q, POSTERIOR), (Q * (Q * EVIDENCE / JOINT).log()).sum(-1))


def test_eq_2_14_split_into_a_tractable_and_an_intractable_term():
    tractable = (Q * (Q / JOINT).log()).sum(-1)
    assert_close(kl_divergence(Q, POSTERIOR), tractable + EVIDENCE.log())
    assert_close(elbo(Q, JOINT), -tractable)  # the first term is -L(q) (E05)


def test_eq_2_15_is_printed_with_the_opposite_sign():
    assert_close(PRINTED_L, -elbo(Q, JOINT))  # E05


def test_eq_2_16_divergence_is_evidence_minus_bound():
    divergence = kl_divergence(Q, POSTERIOR)
    assert_close(divergence, -elbo(Q, JOINT) + EVIDENCE.log())
    assert not torch.isclose(divergence, -PRINTED_L + EVIDENCE.log()).any()  # E05


def test_eq_2_17_is_not_negative():
    assert (-elbo(Q, JOINT) + EVIDENCE.log() >= 0).all()
    assert (-PRINTED_L + EVIDENCE.log() < 0).all()  # E05


def test_eq_2_18_lower_bound_of_the_evidence():
    assert (EVIDENCE.log() >= elbo(Q, JOINT)).all()
    assert (EVIDENCE.log() < PRINTED_L).all()  # E05: as printed it is no lower bound


def test_eq_2_19_elbo_by_hand():
    expected = 0.5 * math.log(0.1) + 0.5 * math.log(0.3) + math.log(2)
    assert elbo(tensor(0.5, 0.5), tensor(0.1, 0.3)).item() == pytest.approx(expected)


def test_eq_2_20_the_evidence_is_constant_only_while_the_model_is():
    """E06: log p(x) cancels only in a difference of two q, and it changes with theta."""
    divergence, bound = kl_divergence(Q, POSTERIOR), elbo(Q, JOINT)
    assert_close(divergence[1:] - divergence[0], bound[0] - bound[1:])
    assert not torch.isclose(divergence, -bound).any()
    better = 1.4 * JOINT  # another theta: the same posterior and divergence, but a larger bound
    assert_close(kl_divergence(Q, better / better.sum()), divergence)
    assert_close(elbo(Q, better), bound + math.log(1.4))


def test_eq_2_21_the_largest_bound_is_the_smallest_divergence():
    assert elbo(Q, JOINT).argmax() == kl_divergence(Q, POSTERIOR).argmin()
    assert_close(elbo(POSTERIOR, JOINT), EVIDENCE.log())
    assert (elbo(Q, JOINT) < elbo(POSTERIOR, JOINT)).all()


def test_gaussian_kl_by_quadrature():
    q, p = density(Z, 0.3, 0.49), density(Z, -1.0, 1.9**2)
    integral = torch.trapezoid(q * (q / p).log(), Z).item()
    assert gaussian_kl(0.3, 0.49, -1.0, 1.9**2).item() == pytest.approx(integral, rel=1e-6)


# --------------------------------------------------------------------------------------- schedules


def test_schedules_have_their_end_points():
    """E35; the second is linear in sqrt(beta), and the end is almost pure noise."""
    assert linear_schedule()[[0, -1]].tolist() == pytest.approx([1e-4, 0.02])
    assert sqrt_linear_schedule()[[0, -1]].tolist() == pytest.approx([0.0015, 0.0195])
    first, middle, last = sqrt_linear_schedule(1001)[[0, 500, 1000]].sqrt().tolist()
    assert middle == pytest.approx((first + last) / 2)
    assert D.alpha_bar[-1].sqrt().item() == pytest.approx(0.00635, abs=1e-5)
    end = Diffusion(sqrt_linear_schedule()).alpha_bar[-1].sqrt()
    assert end.item() == pytest.approx(0.01193, abs=1e-5)


def test_cosine_schedule_is_the_cosine_until_beta_is_capped():
    t = torch.arange(991, dtype=torch.float64)
    f = torch.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    assert_close(Diffusion(cosine_schedule()).alpha_bar[:991], f / f[0])
    assert cosine_schedule().max() == 0.999


def test_log_linear_schedule_divides_the_snr_by_the_same_factor_at_each_step():
    a = Diffusion(log_linear_schedule(14)).alpha_bar[1:]
    assert_close((a / (1 - a)).log(), 7.0 - torch.arange(14, dtype=torch.float64))


def test_alpha_bar_falls_with_every_schedule():
    for schedule in SCHEDULES.values():
        assert (Diffusion(schedule()).alpha_bar.diff() < 0).all() and len(schedule(20)) == 20


# ------------------------------------------------------------------------------------ 3.5.1, 3.5.2


def test_eq_3_6_the_transition_is_gaussian_and_the_data_are_not():
    """x_0 is -1 or 1; x_t becomes Gaussian, with kurtosis 3, on the way; a step is (E19)."""

    def kurtosis(x):  # (n, 3) with the nodes on the last axis
        second, fourth = (((x - x.mean(0) @ WEIGHT) ** k).mean(0) @ WEIGHT for k in (2, 4))
        return (fourth / second**2).item()

    kurtoses = [kurtosis(D.q_sample(tensor([-1], [1]), t, NODE)) for t in (0, 1, 300, 1000)]
    assert kurtoses == sorted(kurtoses)
    assert kurtoses[0] == pytest.approx(1) and kurtoses[-1] == pytest.approx(3, abs=1e-6)
    assert kurtosis(D.q_step(tensor([1]), 1, NODE)) == pytest.approx(3)


def test_eq_3_7_mean_and_variance_of_a_step():
    x_t, root = D.q_step(tensor(2), 300, NODE), (1 - D.beta[300]).sqrt()
    mean = x_t @ WEIGHT
    assert_close(mean, root * 2)
    assert_close((x_t - mean) ** 2 @ WEIGHT, D.beta[300])
    assert not torch.isclose(mean, root * mean)  # with x_t on the right, as printed (E20)


def test_eq_3_8_one_step_of_noise():
    beta, x_t = D.beta[T][:, None], D.q_step(X_0, T, NOISE)
    assert_close(x_t, (1 - beta).sqrt() * X_0 + beta.sqrt() * NOISE)
    printed = (1 - beta).sqrt() * X_0 + beta * NOISE  # the variance times the noise (E23)
    assert (x_t - printed).abs().min() > 1e-4


def test_eq_3_9_closed_form_equals_the_steps():
    """Independent noises add in square. As printed, sqrt(beta_t ... beta_1) is 0 after ten steps
    (E21), and one xi for all steps adds up to ten times too much (E22)."""
    steps = 500

    def end(x, noises):
        *_, last = D.trajectory(x, noises)
        return last

    assert_close(end(X_0, [0 * X_0] * steps), D.q_sample(X_0, steps, 0 * X_0))
    each = end(torch.zeros(steps).double(), torch.eye(steps).double())  # element i: xi_i alone
    assert_close(each.square().sum(), 1 - D.alpha_bar[steps])
    assert D.beta[1:11].prod().sqrt() < 1e-15
    assert each.sum() > 10 * (1 - D.alpha_bar[steps]).sqrt()


def test_eq_3_9_alpha_bar_starts_at_one():
    """E24: with a product from s = 0 and alpha_0 < 1, the last step would have a variance."""
    assert D.alpha_bar[0] == 1 and D.beta_tilde[1] == 0
    assert torch.equal(D.q_sample(X_0, 0, NOISE), X_0)
    printed = (1 - D.beta[1]) * D.alpha_bar
    assert (1 - printed[0]) / (1 - printed[1]) * D.beta[1] > 1e-5


def test_eq_3_10_trajectory_is_the_chain_of_3_8():
    """Of 3.8 and not of 3.9 (E25)."""
    x, noises = X_0, [randn(4, 3, seed=s) for s in range(5)]
    for t, x_t in enumerate(D.trajectory(X_0, noises), start=1):
        x = D.q_step(x, t, noises[t - 1])
        assert torch.equal(x, x_t)
    assert t == 5


def test_tables_take_one_t_for_all_or_one_per_image():
    together = D.q_sample(X_0, T, NOISE)
    for x_t, x_0, t, noise in zip(together, X_0, T.tolist(), NOISE):
        assert_close(x_t, D.q_sample(x_0, t, noise))
    assert D.q_sample(X_0.float(), 3, NOISE.float()).dtype == torch.float32


# ------------------------------------------------------------------------------------------- 3.5.3


@pytest.mark.parametrize("t", [3, 6, 9])
def test_eq_3_11_the_reverse_step_of_known_data(t):
    """For data at -1 and 1, mu_theta at the exact eps is the mean of q(x_{t-1} | x_t). The law of
    3.12, which knows x_0, has another mean and a smaller variance (E28)."""
    d, x_t = Diffusion(linear_schedule(10, 0.05, 0.5)), tensor(0.1)
    x_0, share = tensor(-1, 1), tensor(0.3, 0.7)

    def log_joint(x, t):  # of x_t and both x_0
        square = (x[:, None] - d.alpha_bar[t].sqrt() * x_0) ** 2
        return share.log() - square / (2 * (1 - d.alpha_bar[t]))

    x = torch.linspace(-8, 8, 200_001, dtype=torch.float64)  # x_{t-1}
    log_forward = -((x_t - d.alpha[t].sqrt() * x) ** 2) / (2 * d.beta[t])
    reverse = (log_forward + log_joint(x, t - 1).logsumexp(1)).softmax(0)
    mean = (reverse * x).sum()
    eps = d.predict_eps(x_t, t, (log_joint(x_t, t).softmax(1) * x_0).sum())
    assert_close(d.mu_theta(x_t, t, eps)[0], mean, rtol=1e-6, atol=1e-8)
    mu, var = d.posterior(x_t, x_0, t)
    assert (mu - mean).abs().min() > 0.05 and (reverse * (x - mean) ** 2).sum() > 1.04 * var


@pytest.mark.parametrize("t", [2, 10, 300, 999])
def test_eq_3_12_posterior_mean_and_variance_by_quadrature(t):
    x_0, x_t = 0.4, -0.9
    a, b, before = D.alpha[t], D.beta[t], D.alpha_bar[t - 1]
    x = torch.linspace(-15, 15, 2_000_001, dtype=torch.float64)  # x_{t-1}
    forward, prior = (x_t - a.sqrt() * x) ** 2 / b, (x - before.sqrt() * x_0) ** 2 / (1 - before)
    q = (-(forward + prior) / 2).softmax(0)
    mean = (q * x).sum()
    mu, var = D.posterior(tensor(x_t), tensor(x_0), t)
    assert_close(mu[0], mean, rtol=1e-6, atol=1e-8)
    assert_close(var, (q * (x - mean) ** 2).sum(), rtol=1e-5, atol=1e-12)
    a_bar = D.alpha_bar[t]
    printed = (a_bar.sqrt() * (1 - before) * x_t + before.sqrt() * b * x_0) / (1 - a_bar)  # E27
    assert abs(printed - mean) > 1e-6


def test_eq_3_12_posterior_mean_tower_rule():
    """E[ mu_tilde(x_t, x_0) | x_0 ] = sqrt(alpha_bar_{t-1}) x_0, but not as printed (E27)."""
    x_0, t = torch.ones(1000, 1, dtype=torch.float64), torch.arange(1, 1001)
    x_t = D.q_sample(x_0, t, torch.zeros_like(x_0))
    mu = D.posterior(x_t, x_0, t)[0][:, 0]
    before, a_bar = D.alpha_bar[t - 1], D.alpha_bar[t]
    assert_close(mu, before.sqrt())
    printed = (a_bar.sqrt() * (1 - before) * x_t[:, 0] + before.sqrt() * D.beta[t]) / (1 - a_bar)
    assert printed[0] == mu[0]  # at t = 1 both give x_0: a test there sees nothing
    assert (printed[1:] - mu[1:]).abs().min() > 1e-8


def test_mu_theta_is_the_posterior_mean_at_the_predicted_x0():
    x_t, eps = X_0, NOISE  # any numbers
    mu, _ = D.posterior(x_t, D.predict_x0(x_t, T, eps), T)
    assert_close(D.mu_theta(x_t, T, eps), mu)


def test_predictions_of_x0_and_eps_invert_eq_3_9():
    x_t = D.q_sample(X_0, T, NOISE)
    assert_close(D.predict_x0(x_t, T, NOISE), X_0)
    assert_close(D.predict_eps(x_t, T, X_0), NOISE)


@pytest.mark.parametrize("s, variance", [(1.0, "beta"), (0.0, "beta_tilde")])
def test_ancestral_step_has_the_marginals_of_3_9(s, variance):
    """For data N(m, s^2) and the exact eps, a step is affine. beta is exact for s = 1,
    beta_tilde for s = 0 (one point): every x_t has the mean and variance of 3.9 (E29)."""
    m, eps = 0.6, gaussian_eps(D, 0.6, s)
    points, noise = tensor([0], [1], [0]), tensor([0], [0], [1])
    mean, var = D.alpha_bar[-1].sqrt() * m, D.alpha_bar[-1] * s**2 + 1 - D.alpha_bar[-1]
    for t in range(1000, 0, -1):
        at_0, at_1, noised = D.p_sample(points, t, eps(points, t), noise, variance).flatten()
        slope, sigma, a = at_1 - at_0, noised - at_0, D.alpha_bar[t - 1]
        mean, var = at_0 + slope * mean, slope**2 * var + sigma**2
        assert_close(mean, a.sqrt() * m, rtol=1e-9, atol=1e-12)
        if t > 1:
            assert_close(var, a * s**2 + 1 - a, rtol=1e-9, atol=1e-12)
    assert sigma == 0  # no noise in the last step
    printed = D.p_sample(X_0, 500, X_0, NOISE, "beta_tilde")
    assert torch.equal(D.p_sample(X_0, 500, X_0, NOISE), printed)  # the default


# --------------------------------------------------- score, SNR, SDE and ODE: not in the thesis


def mixture_log_density(x, t):
    """log p(x_t) for data 0.3 N(-1, 0.2^2) + 0.7 N(0.5, 0.4^2), and E[x_0 | x_t]."""
    w, m, s = tensor(0.3, 0.7), tensor(-1, 0.5), tensor(0.2, 0.4)
    a = D.alpha_bar[t]
    law = torch.distributions.Normal(a.sqrt() * m, (a * s**2 + 1 - a).sqrt())
    each = w.log() + law.log_prob(x[:, None])
    mean = m + a.sqrt() * s**2 / (a * s**2 + 1 - a) * (x[:, None] - a.sqrt() * m)
    return each.logsumexp(1), (each.softmax(1) * mean).sum(1)


@pytest.mark.parametrize("t", [1, 300, 1000])
def test_the_score_is_the_gradient_of_log_p_and_gives_the_mean_of_x_0(t):
    """Tweedie: with the exact score, the predicted x_0 is E[x_0 | x_t], here known by Bayes."""
    x = torch.linspace(-2, 2, 41, dtype=torch.float64, requires_grad=True)
    log_p, mean = mixture_log_density(x, t)
    score = torch.autograd.grad(log_p.sum(), x)[0]
    x, mean = x.detach(), mean.detach()
    assert_close(D.tweedie(x, t, score), mean)
    eps = (x - D.alpha_bar[t].sqrt() * mean) / D.beta_bar[t].sqrt()  # E[xi | x_t], by 3.9
    assert_close(D.score(x, t, eps), score)
    assert_close(D.tweedie(x, t, D.score(x, t, eps)), D.predict_x0(x, t, eps))


def test_losses_are_weights_on_the_squared_error_of_x_0():
    """At one x_t, let x_0 be wrong by d. eps, v and u = eps - x_0 are then wrong by multiples."""
    x_t, d = randn(4, 3, seed=3), randn(4, 3, seed=4)
    a, s = (D.at(table, T, x_t).sqrt() for table in (D.alpha_bar, D.beta_bar))

    def predictions(x_0):
        eps = D.predict_eps(x_t, T, x_0)
        return {"eps": eps, "x_0": x_0, "v": a * eps - s * x_0, "flow": eps - x_0}

    right, wrong = predictions(X_0), predictions(X_0 + d)
    for name, value in right.items():
        ratio = (wrong[name] - value).square() / d.square()
        expected = D.loss_weights(name)[T - 1][:, None].expand(-1, 3)
        assert_close(ratio, expected, rtol=1e-6, atol=1e-12)
    assert len(D.loss_weights("eps")) == 1000


def test_eps_from_flow_lies_on_a_straight_line():
    x_t, u = D.q_sample(X_0, T, NOISE), NOISE - X_0
    assert_close(D.eps_from_flow(x_t, T, u), NOISE)
    a, s = (D.at(table, T, x_t).sqrt() for table in (D.alpha_bar, D.beta_bar))
    tau = s / (a + s)
    assert_close(x_t / (a + s), X_0 + tau * u)
    assert_close(D.eps_from_flow(x_t.float(), T, u.float()), NOISE.float())


def test_the_reverse_sde_step_is_ancestral_sampling_up_to_beta_squared():
    """(1 - b)^(-1/2) = 1 + b/2 + 3/8 b^2 + ...; the score has a factor b in front."""
    x, eps, noise = randn(4, 3, seed=3), randn(4, 3, seed=4), randn(4, 3, seed=5)
    t = torch.tensor([2, 100, 500, 1000])
    beta, score = D.at(D.beta, t, x), D.score(x, t, eps)
    difference = D.p_sample(x, t, eps, noise, "beta") - D.reverse_sde_step(x, t, eps, noise)
    second = beta**2 * (3 / 8 * x + score / 2)
    assert (difference - second).abs().max() < 1.1 * (beta**3 * (x.abs() + score.abs())).max()
    assert (difference / second - 1).abs().max() < 0.2


def test_the_probability_flow_keeps_the_marginals():
    """For data N(m, s^2), a point that keeps its place in N(mean_t, var_t) solves the ODE."""
    m, s, z = 0.6, 0.5, tensor(-1, 0, 1.5)
    mean, deviation = D.alpha_bar.sqrt() * m, (D.alpha_bar * s**2 + D.beta_bar).sqrt()
    for t in (100, 500, 999):
        x, before, after = (mean[i] + deviation[i] * z for i in (t, t - 1, t + 1))
        flow = D.probability_flow(x, t, gaussian_eps(D, m, s)(x, t))
        assert_close((after - before) / 2, flow, rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("positions, deviation", [(64, 1.0), (1024, 1.0), (1024, 0.3)])
def test_a_shared_colour_is_lost_by_a_start_at_the_standard_normal(positions, deviation):
    """The mean over positions is a Gaussian of its own, with noise of variance 1/N; the exact
    deterministic path scales it by its deviation at 0 over that at T."""
    D_ = Diffusion(cosine_schedule()) if deviation == 0.3 else D
    y, n = tensor(1.0) / positions**0.5, positions
    for t in range(1000, 0, -1):  # DDIM on y = x / sqrt(alpha_bar), see sample.py
        a, a_next = D_.alpha_bar[t], D_.alpha_bar[t - 1]
        eps = (1 - a).sqrt() * y / (a * n * deviation**2 + 1 - a)
        x_0 = (y - (1 - a).sqrt() * eps) / a.sqrt()
        y = a_next.sqrt() * x_0 + (1 - a_next).sqrt() * eps
    assert_close(y / deviation, tensor(D_.mean_kept(positions, deviation)), rtol=0.03, atol=0)


# ------------------------------------------------------------------------------------------- 3.5.4


def test_l_simple_is_the_mean_squared_noise_error():
    x_0, noise = randn(4, 3, 2, 2), randn(4, 3, 2, 2, seed=1)
    error = noise - torch.tanh(D.q_sample(x_0, T, noise))
    loss = D.loss(lambda x, t: torch.tanh(x), x_0, T, noise)
    assert_close(loss, error.square().mean((1, 2, 3)).float())


def test_l_simple_has_the_known_floor_for_gaussian_data():
    """The best loss for data N(m, s^2), a s^2 / (a s^2 + 1 - a), needs the exact eps."""
    m, s, t = 0.5, 0.8, 200
    x_0, noise, weight = gaussian_data(m, s)
    exact, other = (D.loss(gaussian_eps(D, mean, s), x_0, t, noise) for mean in (m, m + 0.1))
    a = D.alpha_bar[t].item()
    best = a * s**2 / (a * s**2 + 1 - a)
    assert (weight * exact).sum().item() == pytest.approx(best, rel=1e-6)
    assert (weight * other).sum() > best + 1e-3


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_eq_3_15_l_t_is_l_simple_with_a_weight(variance):
    """L_t has the weight beta^2 / (2 sigma^2 alpha (1 - alpha_bar)), which L_simple drops (E31)."""
    x_0, noise, t = randn(4, 8), randn(4, 8, seed=1), torch.tensor([2, 3, 500, 1000])
    sigma2 = (D.beta if variance == "beta" else D.beta_tilde)[t]
    weight = D.beta[t] ** 2 / (2 * sigma2 * D.alpha[t] * (1 - D.alpha_bar[t]))
    expected = weight * (noise - torch.tanh(D.q_sample(x_0, t, noise))).square().mean(1)
    if variance == "beta":  # two different variances add a constant that no network can change
        expected = expected + gaussian_kl(0.0, D.beta_tilde[t], 0.0, D.beta[t])
    term = D.bound_term(lambda x, t: torch.tanh(x), x_0, t, noise, variance)
    assert_close(term, expected / math.log(2))
    assert weight[0] > 20 * weight[-1]  # far from a constant


def test_eq_3_15_l_T_is_the_kl_to_the_prior():
    a = D.alpha_bar[-1]
    expected = 0.5 * (a * X_0**2 - a - (1 - a).log()).mean(1) / math.log(2)
    assert_close(D.prior_term(X_0), expected)
    assert expected.max() < 1e-4


def test_eq_3_13_the_gap_of_the_bound_is_the_divergence_of_the_trajectories():
    """log p_theta(x_0) = D( q(x_{1:2}|x_0) || p_theta(x_{1:2}|x_0) ) - bound, on a grid."""
    d, x_0 = Diffusion(linear_schedule(2, 0.3, 0.6)), tensor([0.8])
    eps, grid = gaussian_eps(d, 0.5, 0.7), torch.linspace(-7, 7, 701, dtype=torch.float64)
    x_1, x_2, cell = grid[:, None], grid[None, :], (grid[1] - grid[0]) ** 2

    def decoder(x_1):  # p_theta(x_0 | x_1)
        return density(x_0, d.mu_theta(x_1, 1, eps(x_1, 1)), d.beta[1])

    q = density(x_1, d.alpha[1].sqrt() * x_0, d.beta[1])
    q = q * density(x_2, d.alpha[2].sqrt() * x_1, d.beta[2])
    p = density(x_2, 0, 1) * density(x_1, d.mu_theta(x_2, 2, eps(x_2, 2)), d.beta[2]) * decoder(x_1)
    evidence = p.sum() * cell
    divergence = kl_divergence((q * cell).flatten(), (p / evidence * cell).flatten())
    noise = NODE[:, None]
    l_0 = -(WEIGHT * decoder(d.q_sample(x_0, 1, noise)).log()[:, 0]).sum()
    l_1 = (WEIGHT * d.bound_term(eps, x_0.expand(3, 1), 2, noise, "beta")).sum()
    bound = l_0 + (l_1 + d.prior_term(x_0)[0]) * math.log(2)
    assert_close(evidence.log(), divergence - bound, rtol=1e-6, atol=1e-6)
    assert divergence > 0.01  # eq. 3.14


def test_eq_3_14_and_3_15_the_bound_is_tight_for_the_exact_reverse_chain():
    """For data N(m, 1), q(x_{t-1} | x_t) is Gaussian with variance beta_t. With the exact eps, the
    bound is the entropy. L_0 is -log p(x_0 | x_1); the printed plus sign is far off (E30)."""
    d, m = Diffusion(linear_schedule(5, 0.05, 0.5)), 0.3
    eps, (x_0, noise, weight) = gaussian_eps(d, m, 1.0), gaussian_data(m, 1.0)

    def without_l_0(model):
        terms = [d.bound_term(model, x_0, t, noise, "beta") for t in range(2, 6)]
        return (weight * (d.prior_term(x_0) + sum(terms))).sum().item()

    x_1 = d.q_sample(x_0, 1, noise)
    decoder = torch.distributions.Normal(d.mu_theta(x_1, 1, eps(x_1, 1)), d.beta[1].sqrt())
    l_0 = (weight * bits_per_dim(-decoder.log_prob(x_0))).sum().item()
    gap = d.alpha_bar[-1].item() * m**2 / 2  # D( q(x_T) || N(0, 1) ): five steps leave a little
    entropy = (0.5 * math.log(2 * math.pi * math.e) + gap) / math.log(2)
    assert without_l_0(eps) + l_0 == pytest.approx(entropy, rel=1e-10)
    assert abs(without_l_0(eps) - l_0 - entropy) > 0.1
    assert without_l_0(gaussian_eps(d, m, 0.5)) > without_l_0(eps)  # any other model is worse


def test_eq_3_15_l_0_is_a_probability_over_the_grey_levels():
    levels, mu, sigma = torch.arange(256, dtype=torch.float64) / 127.5 - 1, -0.97, tensor(0.03)
    log_p = discrete_log_likelihood(levels, mu, sigma)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)
    expected = (density(levels, mu, sigma**2) * 2 / 255).log()
    assert_close(log_p[1:20], expected[1:20], rtol=0.01, atol=0.01)


def test_eq_3_15_l_0_has_the_mean_and_the_deviation_of_the_last_step():
    """E30: N(mu_theta(x_1, 1), beta_1) with sqrt(beta_1) = 0.01. At the right eps, mu is x_0, and
    the bin around x_0 is 2/255 wide."""
    x_0, e = tensor([1 / 255]), tensor([0.4])
    mass = math.erf(1 / 255 / 0.01 / math.sqrt(2))
    term = D.data_term(lambda x_1, t: e, x_0, e)
    assert term.item() == pytest.approx(-math.log2(mass), rel=1e-4)


def test_eq_3_15_bound_has_every_term_and_sums_them():
    """The bound of a model that knows the data is smaller than that of one that does not."""
    d = Diffusion(linear_schedule(20, 1e-3, 0.6))
    x_0 = (randn(3, 4).clamp(-1, 1) * 127.5).round() / 127.5
    eps, other = gaussian_eps(d, 0.0, 0.6), gaussian_eps(d, 0.0, 5.0)

    def bound(model, seed):
        return d.bound(model, x_0, lambda t: randn(3, 4, seed=100 * seed + t))

    terms = bound(eps, 0)
    assert terms.shape == (3, 21)
    assert_close(terms[:, 0], d.data_term(eps, x_0, randn(3, 4, seed=1)))
    assert_close(terms[:, 6], d.bound_term(eps, x_0, 7, randn(3, 4, seed=7)))
    assert_close(terms[:, -1], d.prior_term(x_0))
    known, unknown = (sum(bound(m, s).sum(1).mean() for s in range(20)) / 20 for m in (eps, other))
    assert 6 < known < unknown


# --------------------------------------------------------------------------------------------- 4.4


def test_drop_labels_share_and_ends():
    y = torch.arange(100_000) % 8
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    dropped = drop_labels(y, 8, 0.2, u)
    share = (dropped == 8).double().mean().item()
    assert abs(share - 0.2) < 3 * math.sqrt(0.2 * 0.8 / 100_000)
    assert torch.equal(dropped[dropped != 8], y[dropped != 8])
    assert torch.equal(drop_labels(y, 8, 0.0, u), y) and (drop_labels(y, 8, 1.0, u) == 8).all()
    assert y.max() == 7  # the caller's labels do not change; fig. 4.7 overwrites them (E50)


def test_drop_labels_is_a_draw_a_label_not_a_fixed_share():
    """The thesis replaces 4 of 10 labels at p = 20 %; four or more have a chance of 12 % (E50)."""
    u = torch.rand(20_000, 10, generator=torch.Generator().manual_seed(1))
    four = (drop_labels(torch.zeros(20_000, 10, dtype=torch.long), 8, 0.2, u) == 8).sum(1) >= 4
    exact = 1 - sum(math.comb(10, k) * 0.2**k * 0.8 ** (10 - k) for k in range(4))
    assert exact == pytest.approx(0.1209, abs=1e-4)
    assert four.double().mean().item() == pytest.approx(exact, abs=0.01)


def test_classifier_free_guidance_scale_convention():
    """s = 1 is no guidance (E49); the paper's weight w, (1 + w) e_y - w e_0, is s = 1 + w."""
    e_0, e_y, w = randn(2, 4, 3, 3), randn(2, 4, 3, 3, seed=1), 4
    assert_close(classifier_free_guidance(e_0, e_y, 1), e_y)
    assert torch.equal(classifier_free_guidance(e_0, e_y, 0), e_0)
    assert_close(classifier_free_guidance(e_0, e_y, 1 + w), (1 + w) * e_y - w * e_0)


def test_eq_4_1_classifier_guidance_needs_the_variance():
    """N(x; mu, v) exp(s g x) has the mean mu + s v g, and not the printed mu + s g (E48)."""
    mu, v, g, s = 0.2, 0.3, 1.7, 2.0
    x = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    mean = ((-((x - mu) ** 2) / (2 * v) + s * g * x).softmax(0) * x).sum().item()
    assert classifier_guided_mean(mu, v, g, s) == pytest.approx(mean, rel=1e-6)
    assert abs(mu + s * g - mean) > 1
    assert classifier_guided_mean(mu, v, g, 0) == mu


def test_classifier_guidance_of_eps_is_the_exact_guided_law():
    """f(y | x_t) ~ N(x_t; sqrt(a) m, v) / N(x_t; 0, v) moves data N(0, s^2) to N(scale m, s^2)."""
    s, m, t, x = 0.7, 1.1, 400, randn(6, 1)
    a = D.alpha_bar[t]
    gradient = (a.sqrt() * m / (a * s**2 + 1 - a)).expand_as(x)
    for scale in (0.0, 1.0, 3.0):
        guided = classifier_guided_eps(gaussian_eps(D, 0.0, s)(x, t), a, gradient, scale)
        assert_close(guided, gaussian_eps(D, scale * m, s)(x, t))


def test_eps_from_v_and_what_l_simple_sees_of_it():
    """An error of v counts alpha_bar_t times in L_simple."""
    a = D.alpha_bar[T][:, None]
    x_t, v = D.q_sample(X_0, T, NOISE), a.sqrt() * NOISE - (1 - a).sqrt() * X_0
    assert_close(D.eps_from_v(x_t, T, v), NOISE)
    wrong = D.eps_from_v(x_t, T, v + 0.1) - NOISE
    assert_close(wrong.square(), (a * 0.01).expand(4, 3))


# ----------------------------------------------------- faults that were found by trying the product


@pytest.mark.parametrize("schedule", SCHEDULES.values())
def test_a6_fewer_steps_end_in_the_same_noise(schedule):
    """With betas that do not depend on T, T = 100 would end at sqrt(alpha_bar) = 0.6."""
    whole = Diffusion(schedule()).alpha_bar[-1].sqrt()
    most = 0.05 if schedule is log_linear_schedule else 0.02  # its log SNR ends at -6
    for T in (50, 100, 4000):
        end = Diffusion(schedule(T)).alpha_bar[-1].sqrt()
        assert end < most and abs(end - whole) < 0.01
    assert (schedule(3) <= 0.999).all()


def test_b5_one_minus_alpha_bar_keeps_its_digits():
    """Formed after the cast to float32 it costs 3 % of sigma, and bf16 images get no noise."""
    x_0, noise = randn(4, 3, 8, 8), randn(4, 3, 8, 8, seed=1)
    for schedule in SCHEDULES.values():
        d = Diffusion(schedule())
        for t in (2, 3, 5, 900):
            x_t = d.q_sample(x_0, t, noise)
            exact, variance = d.posterior(x_t, x_0, t)
            found, _ = d.posterior(x_t.float(), x_0.float(), t)
            assert (found - exact).abs().max() < 1e-3 * variance.sqrt()
            perfect = d.bound_term(lambda x, t: noise.float(), x_0.float(), t, noise.float())
            assert perfect.abs().max() < 1e-5
    noised = D.q_sample(torch.zeros(1000, dtype=torch.bfloat16), 5, torch.ones(1000).bfloat16())
    assert noised[0].item() == pytest.approx(math.sqrt(D.beta_bar[5]), rel=0.01)


def test_b7_a_grey_level_far_from_the_mean_has_its_exact_probability():
    """Six deviations away: log of 9.9e-10 and not of a floor. With scipy's normal law."""
    x, sigma = torch.tensor([0.0, 0.0]), torch.tensor(0.05)
    mu = torch.tensor([-0.3, 0.3])
    a, b = (0.3 - 1 / 255) / 0.05, (0.3 + 1 / 255) / 0.05
    exact = math.log(scipy.stats.norm.sf(a) - scipy.stats.norm.sf(b))
    found = discrete_log_likelihood(x, mu, sigma)
    assert found.tolist() == pytest.approx([exact, exact], rel=1e-4)
    far = discrete_log_likelihood(torch.tensor([1.0]), torch.tensor([-1.0]), torch.tensor(0.02))
    assert far.item() == pytest.approx(scipy.stats.norm.logsf((2 - 1 / 255) / 0.02), rel=1e-4)


def test_grey_levels_sum_to_1_at_both_ends():
    for levels in (256, 4):
        grid = torch.linspace(-1, 1, levels, dtype=torch.float64)
        for mu in (-0.97, 0.97, 1.0):
            arguments = (torch.tensor(v, dtype=torch.float64) for v in (mu, 0.03))
            p = discrete_log_likelihood(grid, *arguments, levels).exp()
            assert p.sum().item() == pytest.approx(1, abs=1e-9)


def test_the_terms_of_the_bound_get_variance_and_levels():
    d, x = Diffusion(linear_schedule(5, 0.05, 0.5)), randn(2, 3)

    def eps(x, t):
        return torch.tanh(x)

    terms = d.bound(eps, x, lambda t: randn(2, 3, seed=t), "beta")
    torch.testing.assert_close(terms[:, 2], d.bound_term(eps, x, 3, randn(2, 3, seed=3), "beta"))
    coarse, fine = (d.data_term(eps, 0 * x, randn(2, 3), levels) for levels in (4, 256))
    assert (coarse < fine - 3).all()  # a bin is 85 times as wide


def test_the_thesis_s_variance_is_the_default_of_a_step_and_of_the_bound():
    x, eps, noise = randn(4, 3), randn(4, 3, seed=1), randn(4, 3, seed=2)
    step = D.mu_theta(x, 5, eps) + D.beta_tilde[5].sqrt() * noise
    assert_close(D.p_sample(x, 5, eps, noise), step)
    terms = [D.bound_term(lambda x, t: eps, x, 5, noise, *v) for v in ((), ("beta_tilde",))]
    assert torch.equal(*terms)
