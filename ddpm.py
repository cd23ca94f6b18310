"""The mathematics of diffusion, one function per equation: chapter 2, sections 3.5 and 4.4.

Time runs as in the thesis: t = 1..T, and t = 0 is the clean image. Every table has T + 1 entries
and is indexed by t; alpha_bar[0] = 1 is the empty product (E24). Tables are float64 and are cast
when used. A model is any function `eps(x_t, t)`. Tests: `pytest tests/test_ddpm.py`.
"""

import math

import torch

# --------------------------------------------------------------------------------------------------
# 2.3, 2.4  Kullback-Leibler divergence and the evidence lower bound
# --------------------------------------------------------------------------------------------------


def kl_divergence(q, p):
    """eq. 2.4 (corrected, E02):  D(q || p) = E_{x~q}[log q(x) - log p(x)] = sum_x q log(q / p).

    The thesis's first form has the ratio upside down and is never positive; its second form is this
    one. D is the expected value (eq. 2.2) of h = log(q/p) (eq. 2.3). Eq. 2.5 is the other
    direction, D(p || q) (E03). The two differ (eq. 2.6), and neither is negative (eq. 2.7).
    Eq. 2.9 and eq. 2.10 look for the q(z) nearest to p(z|x), the posterior of Bayes' rule (eq. 2.1)
    and eq. 2.12, p(z, x) / p(x). Eq. 2.11 and eq. 2.13 write out their divergence.

    q, p: probabilities over the last axis (a density times the cell size). Returns (...,), nats.
    """
    return (torch.xlogy(q, q) - torch.xlogy(q, p)).sum(-1)


def elbo(q, joint):
    """eq. 2.19:  L(q) = E_{z~q}[log p(z, x)] - E_{z~q}[log q(z)]  <=  log p(x).

    Insert p(z|x) = p(z, x) / p(x) into D(q || p(z|x)). log p(x), the integral of eq. 2.8, does not
    depend on z, so it can be taken out of the expectation (eq. 2.14):
    D(q || p(z|x)) = -L(q) + log p(x) (eq. 2.16). This is >= 0 (eq. 2.17), so L is a lower bound
    (eq. 2.18). The q with the largest L is the nearest one (eq. 2.21), as long as p, and so
    log p(x), does not change (eq. 2.20, E06).
    Eq. 2.15 prints -L (E05); with it, 2.16 and 2.18 would be wrong.

    q: probabilities q(z) over the last axis; joint: p(z, x) for one x. Returns (...,), nats.
    """
    return -kl_divergence(q, joint)


def gaussian_kl(mu_1, var_1, mu_2, var_2):
    """eq. 2.4 for N(mu_1, var_1) and N(mu_2, var_2), as in the terms of 3.15; nats per element.

    1/2 [ log(var_2 / var_1) + (var_1 + (mu_1 - mu_2)^2) / var_2 - 1 ]. Tensors or numbers.
    """
    var_1, var_2 = torch.as_tensor(var_1), torch.as_tensor(var_2)
    return 0.5 * (torch.log(var_2 / var_1) + (var_1 + (mu_1 - mu_2) ** 2) / var_2 - 1)


# --------------------------------------------------------------------------------------------------
# 3.5.1  Noise schedules: beta_1 .. beta_T
# --------------------------------------------------------------------------------------------------


def linear_schedule(T=1000, start=None, end=None):
    """beta_t linear in t: DDPM's schedule, for the letters (the thesis prints no range, E35).

    From 0.1 / T to 20 / T, so that alpha_bar_T hardly depends on T; at most 0.999.
    """
    start, end = 0.1 / T if start is None else start, 20 / T if end is None else end
    return torch.linspace(start, end, T, dtype=torch.float64).clamp(max=0.999)


def sqrt_linear_schedule(T=1000):
    """sqrt(beta_t) linear in t: the published latent model, which calls it "linear" (E35).

    beta from 1.5 / T to 19.5 / T, at most 0.999.
    """
    beta = torch.linspace((1.5 / T) ** 0.5, (19.5 / T) ** 0.5, T, dtype=torch.float64) ** 2
    return beta.clamp(max=0.999)


def cosine_schedule(T=1000):
    """3.5.5, [13]: alpha_bar_t = f(t)/f(0), f(t) = cos^2((t/T + s)/(1 + s) pi/2); beta <= 0.999."""
    t, s = torch.arange(T + 1, dtype=torch.float64), 0.008
    f = torch.cos((t / T + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def log_linear_schedule(T=1000):
    """log SNR_t = log(alpha_bar_t / (1 - alpha_bar_t)) linear in t (not in the thesis).

    From 7 to -6. Coarse and fine details are drawn at different log SNR (`ldm.damp`). So every
    range of log SNR gets the same number of steps. After variational diffusion models (Kingma and
    others, 2021).
    """
    log_snr = torch.linspace(7, -6, T, dtype=torch.float64)
    alpha_bar = torch.cat([torch.ones(1), torch.sigmoid(log_snr)])  # of t = 0..T
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


SCHEDULES = {
    "linear": linear_schedule,
    "sqrt_linear": sqrt_linear_schedule,
    "cosine": cosine_schedule,
    "log_linear": log_linear_schedule,
}

# --------------------------------------------------------------------------------------------------
# 3.5  The diffusion process
# --------------------------------------------------------------------------------------------------


class Diffusion:
    """The tables of one schedule, and the equations of section 3.5 that read them.

        alpha_t = 1 - beta_t,  alpha_bar_t = prod_{s=1..t} alpha_s,  beta_bar_t = 1 - alpha_bar_t
        beta_tilde_t = (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) beta_t

    x_t, x_0, eps: (B, ...). t: 1..T (0 = the clean image), an int for the whole batch or (B,).
    """

    def __init__(self, beta):
        zero = torch.zeros(1, dtype=torch.float64)
        self.T = len(beta)
        self.beta = torch.cat([zero, beta.double()])  # (T + 1,); beta[0] is never used
        self.alpha = 1 - self.beta
        self.alpha_bar = self.alpha.cumprod(0)  # alpha_bar[0] = 1; 3.5.2 starts at s = 0 (E24)
        self.beta_bar = 1 - self.alpha_bar  # here, because float32 would lose its digits
        before, after = self.beta_bar[:-1], self.beta_bar[1:]
        self.beta_tilde = torch.cat([zero, before / after * self.beta[1:]])  # [1] = 0

    def at(self, table, t, x):
        """table[t] in the precision and on the device of x, in a shape that multiplies x."""
        if isinstance(t, int):
            return table[t].to(x.dtype)  # a scalar on the CPU multiplies tensors of any device
        table = table.to(x.dtype)  # before it moves: some devices lack float64
        value = table.to(x.device, non_blocking=True)[t]
        return value.view(-1, *[1] * (x.dim() - 1))

    # 3.5.1, 3.5.2  Forward: from data to noise

    def q_step(self, x_prev, t, noise):
        """eq. 3.8:  x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) xi_t,  xi_t ~ N(0, I).

        All xi_t are independent. This is a sample of the Gaussian of eq. 3.6, which is the law of a
        step and not of the data (E19). Eq. 3.7 is its mean and variance, but prints x_t on the
        right (E20). 3.5.2 first writes Sigma xi instead of Sigma^(1/2) xi (E23).
        """
        alpha, beta = self.at(self.alpha, t, x_prev), self.at(self.beta, t, x_prev)
        return alpha.sqrt() * x_prev + beta.sqrt() * noise

    def q_sample(self, x_0, t, noise):
        """eq. 3.9:  x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) xi.

        It follows from 3.8, because the variances of independent noises add:
        alpha_t (1 - alpha_bar_{t-1}) + beta_t = 1 - alpha_bar_t. The steps of the thesis,
        sqrt(beta_t ... beta_1) (E21) and "xi_t = xi_{t-1}" (E22), do not lead to it.
        """
        alpha_bar, beta_bar = self.at(self.alpha_bar, t, x_0), self.at(self.beta_bar, t, x_0)
        return alpha_bar.sqrt() * x_0 + beta_bar.sqrt() * noise

    def trajectory(self, x_0, noises):
        """eq. 3.10:  one sample of q(x_{1:T} | x_0) = prod_t q(x_t | x_{t-1}), the steps 3.8 (E25).

        noises: xi_1, xi_2, ..., one per step. Yields x_1, x_2, ...
        """
        x = x_0
        for t, noise in enumerate(noises, start=1):
            x = self.q_step(x, t, noise)
            yield x

    # 3.5.3  Backward: the posterior and the model

    def posterior(self, x_t, x_0, t):
        """eq. 3.12 and below (corrected, E27):  q(x_{t-1}|x_t, x_0) = N(mu_tilde_t, beta_tilde_t I)

            mu_tilde_t = sqrt(alpha_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) x_t
                       + sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t) x_0

        The thesis prints sqrt(alpha_bar_t) in the first coefficient. Derivation: the logarithm of
        q(x_t|x_{t-1}) q(x_{t-1}|x_0) is quadratic in x_{t-1}. Its precision is
        alpha_t/beta_t + 1/(1 - alpha_bar_{t-1}) = 1/beta_tilde_t, and its linear term is
        sqrt(alpha_t) x_t/beta_t + sqrt(alpha_bar_{t-1}) x_0/(1 - alpha_bar_{t-1}).
        Returns (mean, variance).
        """
        alpha, beta = self.at(self.alpha, t, x_t), self.at(self.beta, t, x_t)
        alpha_bar_prev = self.at(self.alpha_bar, t - 1, x_t)
        beta_bar_prev, beta_bar = self.at(self.beta_bar, t - 1, x_t), self.at(self.beta_bar, t, x_t)
        mean = alpha.sqrt() * beta_bar_prev * x_t + alpha_bar_prev.sqrt() * beta * x_0
        return mean / beta_bar, self.at(self.beta_tilde, t, x_t)

    def predict_x0(self, x_t, t, eps):
        """eq. 3.9 solved for x_0:  (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)."""
        alpha_bar, beta_bar = self.at(self.alpha_bar, t, x_t), self.at(self.beta_bar, t, x_t)
        return (x_t - beta_bar.sqrt() * eps) / alpha_bar.sqrt()

    def predict_eps(self, x_t, t, x_0):
        """eq. 3.9 solved for the noise:  (x_t - sqrt(alpha_bar_t) x_0) / sqrt(1 - alpha_bar_t)."""
        alpha_bar, beta_bar = self.at(self.alpha_bar, t, x_t), self.at(self.beta_bar, t, x_t)
        return (x_t - alpha_bar.sqrt() * x_0) / beta_bar.sqrt()

    def eps_from_v(self, x_t, t, v):
        """The noise if a network predicts v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0.

        By 3.9, eps = sqrt(1 - alpha_bar_t) x_t + sqrt(alpha_bar_t) v. Not in the thesis. The
        squared error of eps is alpha_bar_t times that of v. At strong noise, L_simple therefore
        hardly depends on the clean image and its label; the squared error of v always does.
        """
        alpha_bar, beta_bar = self.at(self.alpha_bar, t, x_t), self.at(self.beta_bar, t, x_t)
        return beta_bar.sqrt() * x_t + alpha_bar.sqrt() * v

    def mu_theta(self, x_t, t, eps):
        """3.5.3, the mean of p_theta(x_{t-1} | x_t), which the thesis does not write out (E29):

            mu_theta = (x_t - beta_t / sqrt(1 - alpha_bar_t) eps_theta(x_t, t)) / sqrt(alpha_t)

        This is mu_tilde of 3.12 at the predicted x_0. The best eps_theta is the mean of eps over
        all x_0 that can lead to x_t. With it, mu_theta is the mean of eq. 3.11, q(x_{t-1} | x_t),
        in which no x_0 is given (E28).
        """
        alpha, beta = self.at(self.alpha, t, x_t), self.at(self.beta, t, x_t)
        return (x_t - beta / self.at(self.beta_bar, t, x_t).sqrt() * eps) / alpha.sqrt()

    def p_sample(self, x_t, t, eps, noise, variance="beta_tilde"):
        """3.5.3, one ancestral step:  x_{t-1} = mu_theta(x_t, t) + sigma_t noise; none at t = 1.

        variance: sigma_t^2 = "beta_tilde" (printed in the thesis; exact if the data are one point)
        or "beta" (exact if the data are N(0, I)).
        """
        sigma = self.at(self.sigma2(variance), t, x_t).sqrt()
        return self.mu_theta(x_t, t, eps) + sigma * noise

    def sigma2(self, variance):
        """The table of sigma_t^2 by name, "beta_tilde" or "beta"; 0 at t = 1."""
        table = {"beta_tilde": self.beta_tilde, "beta": self.beta}[variance].clone()
        table[1] = 0
        return table

    # 3.5.4  Training objective

    def loss(self, model, x_0, t, noise, predict="eps"):
        """3.5.4, L_simple:  E_{t, x_0, eps} || eps - eps_theta(x_t, t) ||^2  with x_t of eq. 3.9.

        The squared distance is averaged over elements. The thesis calls it L_t, but the true L_t
        has a weight (E31, see `bound_term`). It is dropped by choice: it is by far the largest at
        the first few t, which would outweigh the rest. predict: see `target`.
        model: function (x_t, t) -> prediction. Returns one value per image, (B,), float32.
        """
        error = self.target(x_0, t, noise, predict) - model(self.q_sample(x_0, t, noise), t)
        return error.float().square().flatten(1).mean(1)

    def target(self, x_0, t, noise, predict):
        """What a network learns to predict: the noise eps as in the thesis, or (not in it)

            v:  sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0,    flow:  u = eps - x_0

        predict: "eps", "v" or "flow"; x_0, noise, result: (B, ...).
        """
        if predict == "eps":
            return noise
        if predict == "flow":
            return noise - x_0
        alpha_bar, beta_bar = self.at(self.alpha_bar, t, x_0), self.at(self.beta_bar, t, x_0)
        return alpha_bar.sqrt() * noise - beta_bar.sqrt() * x_0

    # Beyond the thesis: score, signal-to-noise ratio, SDE and ODE

    def score(self, x_t, t, eps):
        """The score:  grad log p(x_t) = -eps / sqrt(1 - alpha_bar_t), with the best eps_theta.

        p(x_t) is the mean over x_0 of the Gaussians q(x_t | x_0) of 3.9. So its score is the mean,
        given x_t, of theirs, -(x_t - sqrt(alpha_bar_t) x_0) / (1 - alpha_bar_t), which is
        -xi / sqrt(1 - alpha_bar_t). The best eps_theta is the mean of xi given x_t. (Not in the
        thesis.)
        """
        return -eps / self.at(self.beta_bar, t, x_t).sqrt()

    def tweedie(self, x_t, t, score):
        """Tweedie:  E[x_0 | x_t] = (x_t + (1 - alpha_bar_t) grad log p(x_t)) / sqrt(alpha_bar_t).

        `score` solved for eps and put into `predict_x0` (not in the thesis).
        """
        alpha_bar, beta_bar = self.at(self.alpha_bar, t, x_t), self.at(self.beta_bar, t, x_t)
        return (x_t + beta_bar * score) / alpha_bar.sqrt()

    def loss_weights(self, predict):
        """w_t, (T,), t = 1..T: the squared error of a prediction is w_t times that of its x_0
        (not in the thesis).

            eps: SNR,   x_0: 1,   v: SNR + 1,   flow: (sqrt(SNR) + 1)^2,   SNR = alpha_bar/beta_bar

        An error d of x_0 at a given x_t is, by 3.9, one of -sqrt(SNR) d in eps. That of v is the
        error of eps divided by sqrt(alpha_bar), see `eps_from_v`; that of u is the error of eps
        divided by sqrt(alpha_bar) / (sqrt(alpha_bar) + sqrt(beta_bar)), see `eps_from_flow`.
        """
        snr = self.alpha_bar[1:] / self.beta_bar[1:]
        table = {"eps": snr, "x_0": torch.ones_like(snr), "v": snr + 1}
        return (table | {"flow": (snr.sqrt() + 1) ** 2})[predict]

    def eps_from_flow(self, x_t, t, u):
        """The noise if a network predicts u = eps - x_0, as in flow matching (not in the thesis).

        With a = sqrt(alpha_bar_t) and s = sqrt(1 - alpha_bar_t), y = x_t / (a + s) lies on the
        straight line (1 - tau) x_0 + tau eps, where tau = s / (a + s), and u = dy/dtau. So flow
        matching is this diffusion at another scale, and a DDIM step is Euler's step along u.
        x_0 = eps - u in 3.9 gives eps = (x_t + a u) / (a + s).
        """
        a, s = self.at(self.alpha_bar, t, x_t).sqrt(), self.at(self.beta_bar, t, x_t).sqrt()
        return (x_t + a * u) / (a + s)

    def reverse_sde_step(self, x_t, t, eps, noise):
        """A step of Euler and Maruyama along the reverse of the SDE of which 3.8 is a step
        (not in the thesis).

            forward    dx = -1/2 beta x dt + sqrt(beta) dw          (sqrt(1 - beta) = 1 - beta/2)
            reverse    dx = -(1/2 beta x + beta grad log p(x_t)) dt + sqrt(beta) dw, t falling

        Returns x_t + 1/2 beta_t x_t + beta_t score + sqrt(beta_t) noise. Ancestral sampling with
        the variance beta has the mean (x_t + beta_t score) / sqrt(1 - beta_t): the same up to
        beta_t^2.
        """
        beta = self.at(self.beta, t, x_t)
        return (1 + beta / 2) * x_t + beta * self.score(x_t, t, eps) + beta.sqrt() * noise

    def probability_flow(self, x_t, t, eps):
        """dx/dt of the ODE whose x_t have the same densities:  -1/2 beta_t (x_t + grad log p(x_t)).

        The reverse drift above with half of its score, without noise (not in the thesis).
        d alpha_bar/dt = -beta alpha_bar turns it into dy/dr = eps for y = x / sqrt(alpha_bar),
        r = sqrt(1 / alpha_bar - 1): `ddim` in sample.py is Euler's method for it.
        """
        return -self.at(self.beta, t, x_t) / 2 * (x_t + self.score(x_t, t, eps))

    def mean_kept(self, positions, deviation=1.0):
        """How much of a colour that all positions share survives a start at N(0, I) (not in the
        thesis).

        Let all N positions of x_0 have one value c ~ N(0, S^2). The mean of x_T over the positions
        is N(0, alpha_bar S^2 + beta_bar / N), but that of N(0, I) is N(0, 1/N). A deterministic
        sampler keeps the quantile, so colours come out with this share of their deviation:

            sqrt(1/N) / sqrt(alpha_bar_T S^2 + beta_bar_T / N)

        which falls with N. Of a mean other than 0, a part is lost too: see `LatentDiffusion.start`.
        """
        right = self.alpha_bar[-1] * deviation**2 + self.beta_bar[-1] / positions
        return (1 / positions / right).sqrt().item()

    # 3.5.4  The bound, eq. 3.15, term by term: each (B,), in bits per dimension

    def prior_term(self, x_0):
        """eq. 3.15, L_T:  D( q(x_T|x_0) || N(0, I) ). p(x_T), printed p_theta, is fixed (E30)."""
        alpha_bar = self.at(self.alpha_bar, self.T, x_0)
        beta_bar = self.at(self.beta_bar, self.T, x_0)
        return bits_per_dim(gaussian_kl(alpha_bar.sqrt() * x_0, beta_bar, 0.0, 1.0))

    def bound_term(self, eps_theta, x_0, t, noise, variance="beta_tilde"):
        """eq. 3.15, L_{t-1}, t >= 2, at one x_t:  D( q(x_{t-1}|x_t, x_0) || p_theta(x_{t-1}|x_t) ).

        From L_t to L_simple (E31): if the variances are equal, the KL is
        || mu_tilde - mu_theta ||^2 / (2 sigma_t^2). With `predict_x0` in 3.12, mu_tilde has the
        form of `mu_theta`, with eps instead of eps_theta. The means differ by
        beta_t / (sqrt(alpha_t) sqrt(1 - alpha_bar_t)) (eps_theta - eps), and the term is

            beta_t^2 / (2 sigma_t^2 alpha_t (1 - alpha_bar_t)) || eps - eps_theta ||^2

        L_simple drops this weight and draws t uniformly.
        """
        x_t = self.q_sample(x_0, t, noise)
        mean, var = self.posterior(x_t, x_0, t)
        mu = self.mu_theta(x_t, t, eps_theta(x_t, t))
        return bits_per_dim(gaussian_kl(mean, var, mu, self.at(self.sigma2(variance), t, x_t)))

    def data_term(self, eps_theta, x_0, noise, levels=256):
        """eq. 3.15, L_0:  -log p_theta(x_0 | x_1); the thesis prints a plus sign (E30).

        x_0 has `levels` grey values in [-1, 1]. N(mu_theta(x_1, 1), beta_1 I) is integrated over
        the bin of each value, 2/(levels - 1) wide. The outer bins are infinite: the sum is 1.
        """
        x_1 = self.q_sample(x_0, 1, noise)
        mu = self.mu_theta(x_1, 1, eps_theta(x_1, 1))
        sigma = self.at(self.beta, 1, x_0).sqrt()
        return bits_per_dim(-discrete_log_likelihood(x_0, mu, sigma, levels))

    def bound(self, eps_theta, x_0, noise, variance="beta_tilde"):
        """eq. 3.15 with all T terms:  -log p_theta(x_0) <= L_T + sum_{t=2..T} L_{t-1} + L_0.

        The evidence leaves the integral of eq. 3.13. The rest is eq. 3.14,
        -log p_theta(x_0) <= E_q log(q / p_theta) of trajectories, the products of steps (3.10). For
        t >= 2, 3.12 reverses a step: q(x_t|x_{t-1}) = q(x_{t-1}|x_t, x_0) r_t with
        r_t = q(x_t|x_0) / q(x_{t-1}|x_0). The product of all r_t is q(x_T|x_0) / q(x_1|x_0), and
        q(x_1|x_0) cancels. So log(q / p_theta) is

            log q(x_T|x_0)/p(x_T) + sum_{t>=2} log q(x_{t-1}|x_t, x_0)/p_theta(x_{t-1}|x_t)
            - log p_theta(x_0|x_1)

        The expectation of a log-ratio over its own variable is a KL: L_T and L_{t-1}. L_0 remains.
        noise: function t -> (B, ...) standard normal noise for x_t. Returns (B, T + 1), bits per
        dimension: L_0 in column 0, L_{t-1} in column t - 1, L_T in the last; the sum is the bound.
        """
        terms = [self.data_term(eps_theta, x_0, noise(1))]
        for t in range(2, self.T + 1):
            terms.append(self.bound_term(eps_theta, x_0, t, noise(t), variance))
        return torch.stack([*terms, self.prior_term(x_0)], dim=1)


def bits_per_dim(nats):
    """Nats to bits, mean over all axes but the first."""
    return nats.flatten(1).mean(1) / math.log(2)


def discrete_log_likelihood(x, mu, sigma, levels=256):
    """log of the mass of N(mu, sigma^2) in the bin of x, a grid of `levels` values in [-1, 1].

    log(Phi(b) - Phi(a)) = log Phi(b) + log(1 - Phi(a) / Phi(b)). Above the mean, the mirror image
    is computed, -b to -a: far out, Phi is 1 to all digits, but log Phi of the other side is exact.
    """
    half, infinity = 1 / (levels - 1), torch.full_like(x, math.inf)
    b = ((x + half - mu) / sigma).where(x < 1 - half, infinity)
    a = ((x - half - mu) / sigma).where(x > -1 + half, -infinity)
    a, b = torch.where(x > mu, -b, a), torch.where(x > mu, -a, b)
    log_b = torch.special.log_ndtr(b)
    return log_b + (-torch.expm1(torch.special.log_ndtr(a) - log_b)).log()


# --------------------------------------------------------------------------------------------------
# 4.4  Guidance
# --------------------------------------------------------------------------------------------------


def drop_labels(y, zero_label, p, u):
    """4.4.3:  every label becomes the zero-label with probability p, independently (E50).

    There is one draw per label, not a fixed share as in the thesis's example of ten labels. Unlike
    fig. 4.7, this changes no tensor of the caller and takes its random numbers as an argument.
    y, u: equal shapes, labels and uniform in [0, 1).
    """
    return torch.where(u < p, zero_label, y)


def classifier_free_guidance(eps_zero, eps_y, scale):
    """4.4.3, used in 5.3.1, never printed (E49):  eps' = eps_0 + s (eps_y - eps_0), all channels.

    eps_0: for the zero-label. s = 1: no guidance; s = 0: unconditional; the paper has w = s - 1.
    """
    return eps_zero + scale * (eps_y - eps_zero)


def guidance_away(eps, eps_zero, eps_not, weight):
    """Away from a condition n (not in the thesis):  eps' = eps - w (eps_n - eps_0).

    eps is -sqrt(1 - alpha_bar_t) times the score grad log p(x_t). With classifier-free guidance
    towards y, eps' belongs to the score of

        p(x_t) p(y | x_t)^s p(n | x_t)^(-w)

    because eps_n - eps_0 is that of log p(n | x_t) = log p(x_t | n) - log p(x_t) + constant.
    """
    return eps - weight * (eps_not - eps_zero)


def classifier_guided_mean(mu, sigma2, gradient, scale):
    """eq. 4.1 (corrected, E48):  mu' = mu_theta + s Sigma_t grad_{x_t} log f(y | x_t, t).

    The thesis omits Sigma_t = sigma_t^2 I. N(x; mu, v) exp(g x) is a multiple of N(x; mu + v g, v).
    """
    return mu + scale * sigma2 * gradient


def classifier_guided_eps(eps, alpha_bar, gradient, scale):
    """eq. 4.1 for DDIM and PLMS (E48):  eps' = eps - s sqrt(1 - alpha_bar_t) grad log f."""
    return eps - scale * (1 - alpha_bar) ** 0.5 * gradient
