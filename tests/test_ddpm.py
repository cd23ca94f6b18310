"""Chapter 2, section 3.5 and section 4.4, equation by equation. Where the thesis prints something else, both are shown."""

import math

import numpy as np
import pytest
import torch

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
    sqrt_linear_schedule,
)

D = Diffusion(linear_schedule())


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_law(*shape, seed=0):
    return randn(*shape, seed=seed).softmax(-1)


def gaussian_eps(diffusion, m, s):
    """The exact eps(x, t) for data N(m, s^2): x_t has mean sqrt(a) m and variance a s^2 + 1 - a."""

    def eps(x, t):
        a = diffusion.at(diffusion.alpha_bar, t, x)
        return (1 - a).sqrt() * (x - a.sqrt() * m) / (a * s**2 + 1 - a)

    return eps


def hermite(n=3):
    """Nodes and weights with which a polynomial of degree 2 n - 1 in a standard normal variable is averaged exactly."""
    x, w = np.polynomial.hermite_e.hermegauss(n)
    return torch.from_numpy(x), torch.from_numpy(w / w.sum())


# ---------------------------------------------------------------------------------------------------- chapter 2


# A model with four latent values at one observed x, and two hundred guesses q(z)
PRIOR, LIKELIHOOD = random_law(4, seed=5), torch.tensor([0.1, 0.4, 0.7, 0.2], dtype=torch.float64)
JOINT = LIKELIHOOD * PRIOR  # p(z, x)
EVIDENCE = JOINT.sum()  # p(x)
POSTERIOR = JOINT / EVIDENCE  # p(z|x)
Q = random_law(200, 4, seed=6)

# A model with a continuous latent value: p(z) = N(0, 1), p(x|z) = N(z, 1); so p(x) = N(0, 2) and p(z|x) = N(x/2, 1/2)
X, Z = torch.tensor(1.2, dtype=torch.float64), torch.linspace(-9, 9, 1801, dtype=torch.float64)


def density(x, mean, var):
    return torch.distributions.Normal(torch.as_tensor(mean, dtype=torch.float64), var**0.5).log_prob(x).exp()


def on_grid(mean, var):
    """N(mean, var) as probabilities of the cells of Z."""
    return density(Z, mean, var) * (Z[1] - Z[0])


def printed_l(q, joint):
    """L(q) as eq. 2.15 prints it (E05)."""
    return (q * q.log()).sum(-1) - (q * joint.log()).sum(-1)


def test_eq_2_1_bayes_rule():
    posterior = density(X, Z, 1) * on_grid(0, 1) / density(X, 0, 2)  # likelihood times prior over evidence
    assert abs(kl_divergence(posterior, on_grid(X / 2, 0.5))) < 1e-12
    assert kl_divergence(posterior, on_grid(0, 1)) > 0.1  # the prior is another law


def test_eq_2_2_expected_value_as_a_sum_and_as_an_integral():
    x, mu, sigma = torch.arange(256, dtype=torch.float64) / 127.5 - 1, 0.137, 0.1
    p = discrete_log_likelihood(x, mu, torch.tensor(sigma)).exp()
    assert (x * p).sum().item() == pytest.approx(mu, abs=1e-6)
    assert torch.trapezoid(Z * density(Z, mu, sigma**2), Z).item() == pytest.approx(mu, abs=1e-6)


def test_eq_2_3_expected_value_of_a_function():
    """h = log(q/p), as a sum over values and as an integral that is known."""
    q, p = on_grid(0.3, 0.49), on_grid(-1.0, 1.9)
    torch.testing.assert_close(kl_divergence(q, p), gaussian_kl(0.3, 0.49, -1.0, 1.9).double(), rtol=1e-6, atol=0)


def test_eq_2_4_kl_divergence_value_and_printed_sign():
    q, p = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([0.25, 0.75], dtype=torch.float64)
    right = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert kl_divergence(q, p).item() == pytest.approx(right)
    printed = (q * (p / q).log()).sum().item()  # E_q[log(p/q)], the first form of 2.4 (E02)
    assert printed == pytest.approx(-right) and printed < 0


def test_eq_2_5_is_the_other_direction():
    q, p = random_law(5, seed=1), random_law(5, seed=2)
    printed = (p * (q / p).log().neg()).sum()  # integral of log(p/q) p (E03)
    torch.testing.assert_close(printed, kl_divergence(p, q))
    assert abs(printed - kl_divergence(q, p)) > 1e-3
    assert not torch.allclose(p.log() - q.log(), (p - q).abs().log())  # "take the log of" p - q, as the text says


def test_eq_2_6_asymmetry_holds_in_general_not_always():
    q, p = random_law(5, seed=1), random_law(5, seed=2)
    assert abs(kl_divergence(q, p) - kl_divergence(p, q)) > 1e-3
    # two Gaussians of equal variance are symmetric (E04)
    torch.testing.assert_close(gaussian_kl(0.0, 2.0, 3.0, 2.0), gaussian_kl(3.0, 2.0, 0.0, 2.0))
    # and KL also fails the triangle inequality, which the thesis does not say (E04)
    assert gaussian_kl(0.0, 1.0, 2.0, 1.0) > gaussian_kl(0.0, 1.0, 1.0, 1.0) + gaussian_kl(1.0, 1.0, 2.0, 1.0)


def test_eq_2_7_kl_is_never_negative_and_zero_only_for_equal_laws():
    q, p = random_law(1000, 6, seed=3), random_law(1000, 6, seed=4)
    assert (kl_divergence(q, p) > 0).all()
    torch.testing.assert_close(kl_divergence(q, q), torch.zeros(1000, dtype=torch.float64))


def test_eq_2_8_evidence_is_the_integral_over_z():
    joint = density(X, Z, 1) * on_grid(0, 1)
    torch.testing.assert_close(joint.sum(), density(X, 0, 2))
    torch.testing.assert_close(elbo(on_grid(X / 2, 0.5), joint).exp(), density(X, 0, 2))  # and what the best bound reaches


def test_eq_2_9_a_simple_q_for_a_posterior_with_two_peaks():
    """No Gaussian is that posterior, and the two directions of KL choose different ones: 2.10 a peak, 2.5 the middle (E03)."""
    posterior = (on_grid(-2, 0.25) + on_grid(2, 0.25)) / 2
    candidates = [(m, s) for m in np.linspace(-3, 3, 25) for s in (0.3, 0.5, 1.0, 2.0, 3.0)]
    q = torch.stack([on_grid(m, s**2) for m, s in candidates])
    assert kl_divergence(q, posterior).min() > 0.5
    assert abs(candidates[kl_divergence(q, posterior).argmin()][0]) == 2
    assert candidates[kl_divergence(posterior, q).argmin()] == (0, 2)


def test_eq_2_10_the_smallest_divergence_is_at_the_posterior():
    candidates = [(m, v) for m in np.linspace(-1, 1.4, 25) for v in (0.25, 0.5, 1.0, 2.0)]
    divergence = [kl_divergence(on_grid(m, v), on_grid(X / 2, 0.5)).item() for m, v in candidates]
    assert candidates[int(np.argmin(divergence))] == (pytest.approx(0.6), 0.5)


def test_eq_2_11_over_several_axes():
    """The integral runs over all axes of z; for independent ones the divergences add."""
    q, p = random_law(2, 5, seed=1), random_law(2, 5, seed=2)
    together = kl_divergence(torch.outer(*q).flatten(), torch.outer(*p).flatten())
    torch.testing.assert_close(together, kl_divergence(q, p).sum())


def test_eq_2_12_posterior_from_the_joint():
    assert kl_divergence(POSTERIOR, LIKELIHOOD * PRIOR / EVIDENCE) == 0
    torch.testing.assert_close(kl_divergence(POSTERIOR, JOINT), -EVIDENCE.log())  # what forgetting the evidence costs


def test_eq_2_13_the_joint_inserted():
    inserted = (Q * (Q * EVIDENCE / JOINT).log()).sum(-1)
    torch.testing.assert_close(kl_divergence(Q, POSTERIOR), inserted)


def test_eq_2_14_split_into_a_tractable_and_an_intractable_term():
    torch.testing.assert_close(kl_divergence(Q, POSTERIOR), (Q * (Q / JOINT).log()).sum(-1) + EVIDENCE.log())
    torch.testing.assert_close(elbo(Q, JOINT), -(Q * (Q / JOINT).log()).sum(-1))  # the first term is -L(q) (E05)


def test_eq_2_15_is_printed_with_the_opposite_sign():
    torch.testing.assert_close(printed_l(Q, JOINT), -elbo(Q, JOINT))  # E05


def test_eq_2_16_divergence_is_evidence_minus_bound():
    torch.testing.assert_close(kl_divergence(Q, POSTERIOR), -elbo(Q, JOINT) + EVIDENCE.log())
    assert not torch.isclose(kl_divergence(Q, POSTERIOR), -printed_l(Q, JOINT) + EVIDENCE.log()).any()  # E05


def test_eq_2_17_is_not_negative():
    assert (-elbo(Q, JOINT) + EVIDENCE.log() >= 0).all()
    assert (-printed_l(Q, JOINT) + EVIDENCE.log() < 0).all()  # E05


def test_eq_2_18_lower_bound_of_the_evidence():
    assert (EVIDENCE.log() >= elbo(Q, JOINT)).all()
    assert (EVIDENCE.log() < printed_l(Q, JOINT)).all()  # E05: as printed it would be no lower bound


def test_eq_2_19_elbo_by_hand():
    q, joint = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([0.1, 0.3], dtype=torch.float64)
    assert elbo(q, joint).item() == pytest.approx(0.5 * math.log(0.1) + 0.5 * math.log(0.3) + math.log(2))


def test_eq_2_20_the_evidence_is_constant_only_while_the_model_is():
    """Struck out, log p(x) is gone from differences between two q, not from the equation; and it moves with theta (E06)."""
    divergence, bound = kl_divergence(Q, POSTERIOR), elbo(Q, JOINT)
    torch.testing.assert_close(divergence[1:] - divergence[0], bound[0] - bound[1:])
    assert not torch.isclose(divergence, -bound).any()
    better = 1.4 * LIKELIHOOD * PRIOR  # another theta: the same posterior, so the same divergence, and a larger bound
    torch.testing.assert_close(kl_divergence(Q, better / better.sum()), divergence)
    torch.testing.assert_close(elbo(Q, better), bound + math.log(1.4))


def test_eq_2_21_the_largest_bound_is_the_smallest_divergence():
    assert elbo(Q, JOINT).argmax() == kl_divergence(Q, POSTERIOR).argmin()
    torch.testing.assert_close(elbo(POSTERIOR, JOINT), EVIDENCE.log())
    assert (elbo(Q, JOINT) < elbo(POSTERIOR, JOINT)).all()


def test_gaussian_kl_by_quadrature():
    x = torch.linspace(-30, 30, 200_001, dtype=torch.float64)
    p1, p2 = torch.distributions.Normal(0.3, 0.7), torch.distributions.Normal(-1.0, 1.9)
    integral = torch.trapezoid(p1.log_prob(x).exp() * (p1.log_prob(x) - p2.log_prob(x)), x).item()
    assert gaussian_kl(0.3, 0.49, -1.0, 1.9**2).item() == pytest.approx(integral, rel=1e-6)


# ---------------------------------------------------------------------------------------------------- schedules


def test_schedules_have_their_end_points():
    assert linear_schedule()[[0, -1]].tolist() == pytest.approx([1e-4, 0.02])
    assert sqrt_linear_schedule()[[0, -1]].tolist() == pytest.approx([0.0015, 0.0195])
    middle = sqrt_linear_schedule(1001)[500].item()  # linear in sqrt(beta), though its authors call it "linear" (E35)
    assert math.sqrt(middle) == pytest.approx((math.sqrt(0.0015) + math.sqrt(0.0195)) / 2)
    # the end is almost, not exactly, pure noise (E35)
    assert D.alpha_bar[-1].sqrt().item() == pytest.approx(0.00635, abs=1e-5)
    assert Diffusion(sqrt_linear_schedule()).alpha_bar[-1].sqrt().item() == pytest.approx(0.01193, abs=1e-5)


def test_cosine_schedule_is_the_cosine_until_beta_is_capped():
    beta = cosine_schedule()
    d = Diffusion(beta)
    t = torch.arange(991, dtype=torch.float64)
    f = torch.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(d.alpha_bar[:991], f / f[0])
    assert beta.max() == 0.999


@pytest.mark.parametrize("name", SCHEDULES)
def test_tables(name):
    d = Diffusion(SCHEDULES[name](1000))
    assert d.alpha_bar.dtype == torch.float64 and len(d.alpha_bar) == 1001
    assert (d.beta[1:] > 0).all() and (d.beta[1:] < 1).all()
    assert (d.alpha_bar.diff() < 0).all()


# ---------------------------------------------------------------------------------------------------- 3.5.1, 3.5.2


def test_eq_3_6_the_transition_is_gaussian_and_the_data_are_not():
    """x_0 is -1 or 1: two points are no Gaussian, and x_t becomes one only on the way (E19). Kurtosis is 3 for a Gaussian."""
    noise, weight = hermite()

    def kurtosis(x, weight):
        mean = (weight * x).sum()
        return ((weight * (x - mean) ** 4).sum() / (weight * (x - mean) ** 2).sum() ** 2).item()

    both = [D.q_sample(torch.tensor([[-1.0], [1.0]], dtype=torch.float64), t, noise).flatten() for t in (0, 1, 300, 1000)]
    kurtoses = [kurtosis(x_t, weight.repeat(2) / 2) for x_t in both]
    assert kurtoses == sorted(kurtoses) and kurtoses[0] == pytest.approx(1) and kurtoses[-1] == pytest.approx(3, abs=1e-6)
    assert kurtosis(D.q_step(torch.ones_like(noise), 1, noise), weight) == pytest.approx(3)


def test_eq_3_7_mean_and_variance_of_a_step():
    noise, weight = hermite()
    x, t = torch.full_like(noise, 2.0), 300
    x_t = D.q_step(x, t, noise)
    mean = (weight * x_t).sum()
    torch.testing.assert_close(mean, (1 - D.beta[t]).sqrt() * 2)
    torch.testing.assert_close((weight * (x_t - mean) ** 2).sum(), D.beta[t])
    assert not torch.isclose(mean, (1 - D.beta[t]).sqrt() * mean)  # with x_t on the right, as printed, mean = 0 (E20)


def test_eq_3_8_one_step_of_noise():
    """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) xi: the deviation multiplies the noise, not the variance."""
    x, noise, t = randn(4, 3), randn(4, 3, seed=1), torch.tensor([1, 2, 500, 1000])
    beta = D.beta[t][:, None]
    torch.testing.assert_close(D.q_step(x, t, noise), (1 - beta).sqrt() * x + beta.sqrt() * noise)
    printed = (1 - beta).sqrt() * x + beta * noise  # "x = mu + Sigma xi" (E23)
    assert (D.q_step(x, t, noise) - printed).abs().min() > 1e-4


def test_eq_3_9_closed_form_equals_the_steps():
    x_0, steps = torch.tensor([[0.7]], dtype=torch.float64), 500
    zero = torch.zeros_like(x_0)
    *_, mean = D.trajectory(x_0, [zero] * steps)
    torch.testing.assert_close(mean, D.q_sample(x_0, steps, zero))
    # the noises are independent: their contributions add in square (E21)
    one = torch.ones_like(x_0)
    variance = 0.0
    for s in range(1, steps + 1):
        *_, contribution = D.trajectory(zero, [zero] * (s - 1) + [one] + [zero] * (steps - s))
        variance = variance + contribution**2
    right = 1 - D.alpha_bar[steps]
    torch.testing.assert_close(variance.squeeze(), right)
    # printed: the standard deviation sqrt(beta_t ... beta_1), nothing at all after ten steps (E21)
    assert D.beta[1:11].prod().sqrt() < 1e-15
    # printed: one and the same xi at every step; standard deviations would add up to ten times too much (E22)
    *_, same = D.trajectory(zero, [one] * steps)
    assert same.item() > 10 * right.sqrt()


def test_eq_3_9_alpha_bar_starts_at_one():
    assert D.alpha_bar[0] == 1 and D.beta_tilde[1] == 0
    x_0, noise = randn(3, 2), randn(3, 2, seed=1)
    assert torch.equal(D.q_sample(x_0, 0, noise), x_0)
    # with the product from s = 0 (an extra alpha_0 < 1), the variance of the last step would not be zero (E24)
    shifted = (1 - D.beta[1]) * D.alpha_bar
    assert (1 - shifted[0]) / (1 - shifted[1]) * D.beta[1] > 1e-5


def test_eq_3_10_trajectory_is_the_chain_of_3_8():
    """Of 3.8 and not of 3.9 (E25)."""
    x, noises = randn(2, 3), [randn(2, 3, seed=s) for s in range(5)]
    path = list(D.trajectory(x, noises))
    assert len(path) == 5
    for t, (noise, x_t) in enumerate(zip(noises, path), start=1):
        x = D.q_step(x, t, noise)
        assert torch.equal(x, x_t)


def test_tables_take_one_t_for_all_or_one_an_image():
    x, noise = randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=1)
    together = D.q_sample(x, torch.tensor([1, 500, 1000]), noise)
    for i, t in enumerate((1, 500, 1000)):
        torch.testing.assert_close(together[i], D.q_sample(x[i : i + 1], t, noise[i : i + 1])[0])
    assert D.q_sample(x.float(), 3, noise.float()).dtype == torch.float32


# ---------------------------------------------------------------------------------------------------- 3.5.3


@pytest.mark.parametrize("t", [3, 6, 9])
def test_eq_3_11_the_reverse_step_of_known_data(t):
    """For data at -1 and 1 the law of x_{t-1} is known, and so is q(x_{t-1} | x_t), by quadrature: mu_theta at the exact eps is
    its mean. It is another law than 3.12, which knows x_0 (E28): that mean is elsewhere and that variance smaller.
    """
    d, x_t = Diffusion(linear_schedule(10, 0.05, 0.5)), torch.tensor([0.1], dtype=torch.float64)
    x_0, share = torch.tensor([-1.0, 1.0], dtype=torch.float64), torch.tensor([0.3, 0.7], dtype=torch.float64)

    def log_joint(x, t):  # of x_t and both x_0
        return share.log() - (x[:, None] - d.alpha_bar[t].sqrt() * x_0) ** 2 / (2 * (1 - d.alpha_bar[t]))

    x = torch.linspace(-8, 8, 200_001, dtype=torch.float64)  # x_{t-1}
    log_forward = -((x_t - d.alpha[t].sqrt() * x) ** 2) / (2 * d.beta[t])
    reverse = (log_forward + log_joint(x, t - 1).logsumexp(1)).softmax(0)  # q(x_t) is the constant that normalises
    mean = (reverse * x).sum()
    eps = d.predict_eps(x_t, t, (log_joint(x_t, t).softmax(1) * x_0).sum())
    torch.testing.assert_close(d.mu_theta(x_t, t, eps)[0], mean, rtol=1e-6, atol=1e-8)
    mu, var = d.posterior(x_t, x_0, t)
    assert (mu - mean).abs().min() > 0.05 and (reverse * (x - mean) ** 2).sum() > 1.04 * var


@pytest.mark.parametrize("t", [2, 10, 300, 999])
def test_eq_3_12_posterior_mean_and_variance_by_quadrature(t):
    x_0, x_t = 0.4, -0.9
    a, b, before = D.alpha[t], D.beta[t], D.alpha_bar[t - 1]
    x = torch.linspace(-15, 15, 2_000_001, dtype=torch.float64)  # x_{t-1}
    log_q = -((x_t - a.sqrt() * x) ** 2) / (2 * b) - (x - before.sqrt() * x_0) ** 2 / (2 * (1 - before))
    q = (log_q - log_q.max()).exp()
    q = q / q.sum()
    mean = (q * x).sum()
    tensor = torch.tensor([x_t], dtype=torch.float64)
    mu, var = D.posterior(tensor, torch.tensor([x_0], dtype=torch.float64), t)
    torch.testing.assert_close(mu[0], mean, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(var, (q * (x - mean) ** 2).sum(), rtol=1e-5, atol=1e-12)
    printed = (D.alpha_bar[t].sqrt() * (1 - before) * x_t + before.sqrt() * b * x_0) / (1 - D.alpha_bar[t])  # E27
    assert abs(printed - mean) > 1e-6


def test_eq_3_12_posterior_mean_tower_rule():
    """E[ mu_tilde(x_t, x_0) | x_0 ] = sqrt(alpha_bar_{t-1}) x_0 for every t; the printed coefficient (E27) breaks it."""
    x_0 = torch.ones(1000, 1, dtype=torch.float64)
    t = torch.arange(1, 1001)
    mean_x_t = D.q_sample(x_0, t, torch.zeros_like(x_0))
    mu, _ = D.posterior(mean_x_t, x_0, t)
    torch.testing.assert_close(mu[:, 0], D.alpha_bar[t - 1].sqrt())
    before, a_bar = D.alpha_bar[t - 1], D.alpha_bar[t]
    printed = (a_bar.sqrt() * (1 - before) * mean_x_t[:, 0] + before.sqrt() * D.beta[t]) / (1 - a_bar)
    assert printed[0] == mu[0, 0]  # at t = 1 both give x_0: a test there sees nothing
    assert (printed[1:] - mu[1:, 0]).abs().min() > 1e-8


def test_mu_theta_is_the_posterior_mean_at_the_predicted_x0():
    x_t, eps, t = randn(4, 3), randn(4, 3, seed=1), torch.tensor([1, 2, 500, 1000])
    mu, _ = D.posterior(x_t, D.predict_x0(x_t, t, eps), t)
    torch.testing.assert_close(D.mu_theta(x_t, t, eps), mu)


def test_predictions_of_x0_and_eps_invert_eq_3_9():
    x_0, noise, t = randn(4, 3), randn(4, 3, seed=1), torch.tensor([1, 2, 500, 1000])
    x_t = D.q_sample(x_0, t, noise)
    torch.testing.assert_close(D.predict_x0(x_t, t, noise), x_0)
    torch.testing.assert_close(D.predict_eps(x_t, t, x_0), noise)


@pytest.mark.parametrize("s, variance", [(1.0, "beta"), (0.0, "beta_tilde")])
def test_ancestral_step_has_the_marginals_of_3_9(s, variance):
    """For data N(m, s^2) and the exact eps a step is affine, so mean and variance of the whole chain are known exactly.

    sigma^2 = beta is exact for s = 1 and beta_tilde for s = 0 (one point); then every x_t has the law of 3.9 (E29).
    """
    m, eps = 0.6, gaussian_eps(D, 0.6, s)
    points = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    zero = torch.zeros_like(points)
    mean, var = D.alpha_bar[-1].sqrt() * m, D.alpha_bar[-1] * s**2 + 1 - D.alpha_bar[-1]
    for t in range(1000, 0, -1):
        at_0, at_1 = D.p_sample(points, t, eps(points, t), zero, variance).flatten()
        sigma = (D.p_sample(points, t, eps(points, t), zero + 1, variance).flatten()[0] - at_0).item()
        mean, var = at_0 + (at_1 - at_0) * mean, (at_1 - at_0) ** 2 * var + sigma**2
        a = D.alpha_bar[t - 1]
        if t > 1:
            torch.testing.assert_close(var, a * s**2 + 1 - a, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(mean, a.sqrt() * m, rtol=1e-9, atol=1e-12)
    assert sigma == 0  # no noise in the last step


# ---------------------------------------------------------------------------------------------------- 3.5.4


def test_l_simple_is_the_mean_squared_noise_error():
    x_0, noise, t = randn(4, 3, 2, 2), randn(4, 3, 2, 2, seed=1), torch.tensor([1, 7, 500, 1000])
    loss = D.loss(lambda x, t: torch.zeros_like(x), x_0, t, noise)
    torch.testing.assert_close(loss, noise.square().mean((1, 2, 3)).float())
    seen = {}
    D.loss(lambda x, t: seen.setdefault("x", x) * 0, x_0, t, noise)
    torch.testing.assert_close(seen["x"], D.q_sample(x_0, t, noise))


def test_l_simple_has_the_known_floor_for_gaussian_data():
    """For data N(m, s^2) the best possible loss at t is a s^2 / (a s^2 + 1 - a); the exact eps reaches it, others do not."""
    m, s, t = 0.5, 0.8, 200
    node, weight = hermite()
    x_0, noise = (m + s * node).repeat_interleave(3)[:, None], node.repeat(3)[:, None]
    w = (weight[:, None] * weight).flatten()
    loss = (w * D.loss(gaussian_eps(D, m, s), x_0, t, noise)).sum().item()
    a = D.alpha_bar[t].item()
    assert loss == pytest.approx(a * s**2 / (a * s**2 + 1 - a), rel=1e-6)
    assert (w * D.loss(gaussian_eps(D, m + 0.1, s), x_0, t, noise)).sum().item() > loss + 1e-3


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_eq_3_15_l_t_is_l_simple_with_a_weight(variance):
    """The true L_t weighs the squared error by beta^2 / (2 sigma^2 alpha (1 - alpha_bar)), which L_simple drops (E31)."""
    x_0, noise, t = randn(5, 8), randn(5, 8, seed=1), torch.tensor([2, 3, 50, 500, 1000])

    def model(x, t):
        return torch.tanh(x)

    sigma2 = (D.beta if variance == "beta" else D.beta_tilde)[t]
    weight = D.beta[t] ** 2 / (2 * sigma2 * D.alpha[t] * (1 - D.alpha_bar[t]))
    error = (noise - model(D.q_sample(x_0, t, noise), t)).square().mean(1)
    expected = weight * error
    if variance == "beta":  # two different variances add a constant that no network can change
        expected = expected + gaussian_kl(0.0, D.beta_tilde[t], 0.0, D.beta[t])
    torch.testing.assert_close(D.bound_term(model, x_0, t, noise, variance), expected / math.log(2))
    assert weight[0] > 20 * weight[-1]  # far from the constant that the thesis's L_t suggests


def test_eq_3_15_l_T_is_the_kl_to_the_prior():
    x_0 = randn(2, 5)
    a = D.alpha_bar[-1]
    expected = 0.5 * (a * x_0**2 - a - (1 - a).log()).mean(1) / math.log(2)
    torch.testing.assert_close(D.prior_term(x_0), expected)
    assert D.prior_term(x_0).max() < 1e-4


def test_eq_3_13_the_gap_of_the_bound_is_the_divergence_of_the_trajectories():
    """log p_theta(x_0) = D( q(x_{1:T} | x_0) || p_theta(x_{1:T} | x_0) ) - bound, with T = 2, on a grid of trajectories."""
    d, x_0 = Diffusion(linear_schedule(2, 0.3, 0.6)), torch.tensor([[0.8]], dtype=torch.float64)
    eps, grid = gaussian_eps(d, 0.5, 0.7), torch.linspace(-7, 7, 701, dtype=torch.float64)
    x_1, x_2, cell = grid[:, None], grid[None, :], (grid[1] - grid[0]) ** 2
    q = density(x_1, d.alpha[1].sqrt() * x_0, d.beta[1]) * density(x_2, d.alpha[2].sqrt() * x_1, d.beta[2])
    p = density(x_2, 0, 1) * density(x_1, d.mu_theta(x_2, 2, eps(x_2, 2)), d.beta[2])
    p = p * density(x_0, d.mu_theta(x_1, 1, eps(x_1, 1)), d.beta[1])  # p_theta(x_{0:2}) at this x_0
    evidence = p.sum() * cell
    divergence = kl_divergence((q * cell).flatten(), (p / evidence * cell).flatten())
    noise, weight = hermite()
    x_1 = d.q_sample(x_0, 1, noise[:, None])
    l_0 = -(density(x_0, d.mu_theta(x_1, 1, eps(x_1, 1)), d.beta[1]).log()[:, 0] * weight).sum()
    l_1 = (weight * d.bound_term(eps, x_0.expand(3, 1), 2, noise[:, None], "beta")).sum() * math.log(2)
    bound = l_0 + l_1 + d.prior_term(x_0)[0] * math.log(2)
    torch.testing.assert_close(evidence.log(), divergence - bound, rtol=1e-6, atol=1e-6)
    assert divergence > 0.01  # eq. 3.14


def test_eq_3_14_and_3_15_the_bound_is_tight_for_the_exact_reverse_chain():
    """Data N(m, 1): the true q(x_{t-1} | x_t) is Gaussian with variance beta_t, so p_theta with the exact eps is the true
    reverse chain and the bound equals the entropy. Every term is quadratic in (x_0, xi): quadrature is exact. With L_0 as
    -log p(x_0 | x_1); the plus sign printed in 3.15 taken for a loss term would be far off (E30).
    """
    d, m = Diffusion(linear_schedule(5, 0.05, 0.5)), 0.3
    eps, (node, weight) = gaussian_eps(d, m, 1.0), hermite()
    x_0, noise = (m + node).repeat_interleave(3)[:, None], node.repeat(3)[:, None]
    w = (weight[:, None] * weight).flatten()
    x_1 = d.q_sample(x_0, 1, noise)
    decoder = torch.distributions.Normal(d.mu_theta(x_1, 1, eps(x_1, 1)), d.beta[1].sqrt())
    l_0 = bits_per_dim(-decoder.log_prob(x_0))
    others = d.prior_term(x_0) + sum(d.bound_term(eps, x_0, t, noise, "beta") for t in range(2, 6))
    entropy = 0.5 * math.log(2 * math.pi * math.e) / math.log(2)
    gap = d.alpha_bar[-1].item() * m**2 / 2 / math.log(2)  # D( q(x_T) || N(0, 1) ): five steps do not quite end in the prior
    assert (w * (l_0 + others)).sum().item() == pytest.approx(entropy + gap, rel=1e-10)
    assert abs((w * (others - l_0)).sum().item() - entropy - gap) > 0.1
    wrong = d.prior_term(x_0) + sum(d.bound_term(gaussian_eps(d, m, 0.5), x_0, t, noise, "beta") for t in range(2, 6))
    assert (w * wrong).sum() > (w * others).sum()  # any other model has a larger bound


def test_eq_3_15_l_0_is_a_probability_over_the_grey_levels():
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    mu, sigma = torch.tensor(-0.97, dtype=torch.float64), torch.tensor(0.03, dtype=torch.float64)
    log_p = discrete_log_likelihood(levels, mu, sigma)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)
    density = torch.distributions.Normal(mu, sigma).log_prob(levels) + math.log(2 / 255)
    torch.testing.assert_close(log_p[1:20], density[1:20], rtol=0.01, atol=0.01)


def test_eq_3_15_l_0_has_the_mean_and_the_deviation_of_the_last_step():
    """E30: N(mu_theta(x_1, 1), beta_1). Where eps_theta is right, mu is x_0 and the bin of x_0 is a third of a deviation wide
    on either side, as sqrt(beta_1) = 0.01."""
    x_0, e = torch.full((1, 1), 1 / 255, dtype=torch.float64), torch.full((1, 1), 0.4, dtype=torch.float64)
    mass = math.erf(1 / 255 / 0.01 / math.sqrt(2))
    term = D.data_term(lambda x_1, t: e, x_0, e)
    assert term.item() == pytest.approx(-math.log2(mass), rel=1e-4)


def test_the_variance_of_a_step_is_the_one_the_thesis_prints():
    x, e, noise = (randn(2, 3, seed=s) for s in range(3))
    assert torch.equal(D.p_sample(x, 500, e, noise), D.p_sample(x, 500, e, noise, "beta_tilde"))


def test_eq_3_15_bound_has_every_term_and_sums_them():
    d = Diffusion(linear_schedule(20, 1e-3, 0.6))
    x_0 = (randn(3, 4).clamp(-1, 1) * 127.5).round() / 127.5
    eps = gaussian_eps(d, 0.0, 0.6)
    terms = d.bound(eps, x_0, lambda t: randn(3, 4, seed=t))
    assert terms.shape == (3, 21)
    torch.testing.assert_close(terms[:, 0], d.data_term(eps, x_0, randn(3, 4, seed=1)))
    torch.testing.assert_close(terms[:, 6], d.bound_term(eps, x_0, 7, randn(3, 4, seed=7)))
    torch.testing.assert_close(terms[:, -1], d.prior_term(x_0))
    # 256 equally likely grey levels cost 8 bits; a model that knows the data does better, one that knows nothing worse
    noises = [
        [d.bound(model, x_0, lambda t, s=s: randn(3, 4, seed=100 * s + t)).sum(1).mean() for s in range(20)]
        for model in (eps, gaussian_eps(d, 0.0, 5.0))
    ]
    known, unknown = (torch.stack(n).mean() for n in noises)
    assert 6 < known < unknown


# ---------------------------------------------------------------------------------------------------- 4.4


def test_drop_labels_share_and_ends():
    y = torch.arange(100_000) % 8
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    dropped = drop_labels(y, 8, 0.2, u)
    share = (dropped == 8).double().mean().item()
    assert abs(share - 0.2) < 3 * math.sqrt(0.2 * 0.8 / 100_000)
    assert torch.equal(dropped[dropped != 8], y[dropped != 8])
    assert torch.equal(drop_labels(y, 8, 0.0, u), y)
    assert (drop_labels(y, 8, 1.0, u) == 8).all()
    assert y.max() == 7  # the caller's labels stay as they were; fig. 4.7 overwrites them (E50)


def test_drop_labels_is_a_draw_a_label_not_a_fixed_share():
    """The thesis's example replaces 4 of 10 labels at p = 20 %: the chance of four or more is 12 % (E50)."""
    u = torch.rand(20_000, 10, generator=torch.Generator().manual_seed(1))
    four = (drop_labels(torch.zeros(20_000, 10, dtype=torch.long), 8, 0.2, u) == 8).sum(1) >= 4
    exact = 1 - sum(math.comb(10, k) * 0.2**k * 0.8 ** (10 - k) for k in range(4))
    assert exact == pytest.approx(0.1209, abs=1e-4)
    assert four.double().mean().item() == pytest.approx(exact, abs=0.01)


def test_classifier_free_guidance_scale_convention():
    e_0, e_y = randn(2, 4, 3, 3), randn(2, 4, 3, 3, seed=1)
    torch.testing.assert_close(classifier_free_guidance(e_0, e_y, 1), e_y)  # s = 1: no guidance (E49)
    assert torch.equal(classifier_free_guidance(e_0, e_y, 0), e_0)
    w = 4  # the paper's weight: (1 + w) e_y - w e_0, s = 1 + w
    torch.testing.assert_close(classifier_free_guidance(e_0, e_y, 1 + w), (1 + w) * e_y - w * e_0)
    assert ((classifier_free_guidance(e_0, e_y, 5) - e_y).abs() > 0).all()  # every channel is guided


def test_eq_4_1_classifier_guidance_needs_the_variance():
    """N(x; mu, v) exp(s g x) is proportional to N(x; mu + s v g, v): by quadrature; the printed mu + s g is another (E48)."""
    mu, v, g, s = 0.2, 0.3, 1.7, 2.0
    x = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    p = (-((x - mu) ** 2) / (2 * v) + s * g * x).exp()
    mean = ((p * x).sum() / p.sum()).item()
    assert classifier_guided_mean(mu, v, g, s) == pytest.approx(mean, rel=1e-6)
    assert abs(mu + s * g - mean) > 1
    assert classifier_guided_mean(mu, v, g, 0) == mu


def test_classifier_guidance_of_eps_is_the_exact_guided_law():
    """Data N(0, s^2), classifier f(y | x_t) ~ N(x_t; sqrt(a) m, v) / N(x_t; 0, v): guidance at scale 1 is Bayes' rule."""
    s, m, t, x = 0.7, 1.1, 400, randn(6, 1)
    a = D.alpha_bar[t]
    v = a * s**2 + 1 - a
    gradient = (a.sqrt() * m / v).expand_as(x)
    for scale in (0.0, 1.0, 3.0):
        guided = classifier_guided_eps(gaussian_eps(D, 0.0, s)(x, t), a, gradient, scale)
        torch.testing.assert_close(guided, gaussian_eps(D, scale * m, s)(x, t))


def test_eps_from_v_and_what_l_simple_sees_of_it():
    x_0, noise, t = randn(4, 3), randn(4, 3, seed=1), torch.tensor([1, 300, 900, 1000])
    a = D.alpha_bar[t][:, None]
    v = a.sqrt() * noise - (1 - a).sqrt() * x_0
    x_t = D.q_sample(x_0, t, noise)
    torch.testing.assert_close(D.eps_from_v(x_t, t, v), noise)
    wrong = D.eps_from_v(x_t, t, v + 0.1) - noise  # an error of v counts alpha_bar_t times in L_simple
    torch.testing.assert_close(wrong.square(), (a * 0.01).expand(4, 3))
