"""Pairs with global latents whose joint log p(x), predictive densities and leave-one-out densities are known exactly.

Each guide is absolutely continuous with its posterior and no more than near it, so that every correction is put to use.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex
from scipy import stats
from torch import Tensor
from torch.distributions import constraints


@dataclass(frozen=True)
class Conjugate:
    """A pair, its data, and what is known of them, float64 nats.

    Attributes:
        log_px: log p(all data).
        predictive: log E_q[p(x_n | theta)] under the guide's global latents, [N].
        loo: log p(x_n | all other data), [N].
        posterior_predictive: log p(x_n | all data), [N].
        elbo: the exact E_q[log p(X, Z, theta) - log q(Z, theta)], None where it is not known.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    batch: tuple[Tensor, ...]
    log_px: float
    predictive: Tensor
    loo: Tensor
    posterior_predictive: Tensor
    elbo: float | None = None

    def __post_init__(self) -> None:
        self.guide(*self.batch)  # creates its parameters in the current store

    @property
    def pair(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        return self.model, self.guide


def gaussian_regression(
    y: Tensor, f: Tensor, tau: float, rho: float, loc: Tensor, cov: Tensor
) -> tuple[float, Tensor, Tensor, Tensor]:
    """(log p(y), predictive under N(loc, cov), leave-one-out, posterior predictive), y ~ N(f w, rho^2 I)."""

    def posterior(y: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        cov = torch.linalg.inv(f.T @ f / rho**2 + torch.eye(f.shape[1]).double() / tau**2)
        return cov @ f.T @ y / rho**2, cov

    def predict(y: Tensor, f: Tensor, loc: Tensor, cov: Tensor) -> Tensor:
        return dist.Normal(f @ loc, ((f @ cov * f).sum(-1) + rho**2).sqrt()).log_prob(y)

    n = len(y)
    whole = dist.MultivariateNormal(torch.zeros(n).double(), tau**2 * f @ f.T + rho**2 * torch.eye(n).double())
    rest = [torch.arange(n) != i for i in range(n)]
    loo = torch.cat([predict(y[~r], f[~r], *posterior(y[r], f[r])) for r in rest])
    return whole.log_prob(y).item(), predict(y, f, loc, cov), loo, predict(y, f, *posterior(y, f))


def normal_mean(count: int = 20, wide: float = 1.3) -> Conjugate:
    """x_n ~ N(mu, 1.25), mu ~ N(0, 4): no local latents."""
    x = 1.1 * torch.randn(count, generator=torch.Generator().manual_seed(count)).double() + 1.5
    rho, tau = 1.25**0.5, 2.0
    precision = 1 / tau**2 + count / rho**2
    loc, scale = x.sum() / rho**2 / precision + 0.1 * precision**-0.5, wide * precision**-0.5

    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), tau))
        with pyro.plate("data", count, subsample=x):
            pyro.sample("x", dist.Normal(mu, rho), obs=x)

    def guide(x):
        mean, log_scale = (
            pyro.param("mean", loc.clone()),
            pyro.param("log_scale", torch.tensor(scale, dtype=torch.float64).log()),
        )
        pyro.sample("mu", dist.Normal(mean, log_scale.exp()))

    ones = torch.ones(count, 1).double()
    known = gaussian_regression(x, ones, tau, rho, loc[None], torch.tensor([[scale**2]], dtype=torch.float64))
    kl = math.log(tau / scale) + (scale**2 + loc.item() ** 2) / (2 * tau**2) - 0.5
    elbo = (dist.Normal(loc, rho).log_prob(x) - scale**2 / (2 * rho**2)).sum().item() - kl
    return Conjugate(model, guide, (x,), *known, elbo)


def regression(count: int = 12, wide: float = 1.2, local: float = 1.3, dependent: bool = True) -> Conjugate:
    """y_n ~ N(z_n, 0.25), z_n ~ N(f_n w, 0.64), w ~ N(0, 2.25 I) in two dims: local noise latents.

    `wide` is the guide's scale of w and `local` that of z_n in units of the exact ones; `dependent`: the guide of z_n
    is given w.
    """
    generator = torch.Generator().manual_seed(count)
    f = torch.stack([torch.ones(count), torch.randn(count, generator=generator)], 1).double()
    noise = torch.randn(2, count, generator=generator).double()
    tau, s, sigma = 1.5, 0.8, 0.5
    rho = math.hypot(s, sigma)
    y = f @ torch.tensor([0.7, -1.2], dtype=torch.float64) + s * noise[0] + sigma * noise[1]
    exact_cov = torch.linalg.inv(f.T @ f / rho**2 + torch.eye(2).double() / tau**2)
    loc, cov = exact_cov @ f.T @ y / rho**2 + 0.05, wide**2 * exact_cov
    share, variance = s**2 / rho**2, s**2 * sigma**2 / rho**2

    def model(y, f):
        w = pyro.sample("w", dist.Normal(torch.zeros(2).double(), tau).to_event(1))
        with pyro.plate("data", count, subsample=y):
            z = pyro.sample("z", dist.Normal((w * f).sum(-1), s))
            pyro.sample("y", dist.Normal(z, sigma), obs=y)

    def guide(y, f):
        mean = pyro.param("w_mean", loc.clone())
        tril = pyro.param("w_tril", torch.linalg.cholesky(cov), constraint=constraints.lower_cholesky)
        w = pyro.sample("w", dist.MultivariateNormal(mean, scale_tril=tril))
        a, log_scale = (
            pyro.param("a", torch.tensor(share, dtype=torch.float64)),
            pyro.param("c", torch.tensor(local, dtype=torch.float64).log()),
        )
        center = (w * f).sum(-1) if dependent else f @ loc
        with pyro.plate("data", count, subsample=y):
            pyro.sample("z", dist.Normal(a * y + (1 - a) * center, log_scale.exp() * variance**0.5))

    known = gaussian_regression(y, f, tau, rho, loc, cov)
    elbo = None
    if dependent:
        prior = dist.MultivariateNormal(torch.zeros(2).double(), tau**2 * torch.eye(2).double())
        kl = torch.distributions.kl_divergence(dist.MultivariateNormal(loc, cov), prior).item()
        spread = (f @ cov * f).sum(-1) / (2 * rho**2)
        local_kl = 0.5 * (local**2 - 1 - math.log(local**2))
        elbo = (dist.Normal(f @ loc, rho).log_prob(y) - spread - local_kl).sum().item() - kl
    return Conjugate(model, guide, (y, f), *known, elbo)


TRIALS, MIXING, PRIORS = 5, (0.4, 0.6), ((2.0, 6.0), (6.0, 2.0))  # the latter tell the components apart


def mixture(in_plate: bool = False) -> Conjugate:
    """x_n ~ Binomial(5, p_c), c ~ Categorical(0.4, 0.6) summed out, p_1 ~ Beta(2, 6) and
    p_2 ~ Beta(6, 2) for all six data.

    `in_plate`: the rates stand in a plate at dim -1 and are indexed as in Pyro's tutorials, without a particle dim.
    """
    x = torch.tensor([0.0, 4.0, 1.0, 5.0, 1.0, 3.0], dtype=torch.float64)
    mixing = torch.tensor(MIXING, dtype=torch.float64)
    alpha, beta = torch.tensor([2.5, 7.0], dtype=torch.float64), torch.tensor([7.0, 3.0], dtype=torch.float64)
    prior_alpha, prior_beta = torch.tensor(PRIORS, dtype=torch.float64).T

    def rates(fn):
        if in_plate:
            with pyro.plate("components", 2):
                return pyro.sample("p", fn)
        return pyro.sample("p", fn.to_event(1))

    def model(x):
        p = rates(dist.Beta(prior_alpha, prior_beta))
        with pyro.plate("data", 6, subsample=x):
            c = pyro.sample("c", dist.Categorical(mixing), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Binomial(TRIALS, p[c] if in_plate else Vindex(p)[..., c]), obs=x)

    def guide(x):
        a = pyro.param("alpha", alpha.clone(), constraint=constraints.positive)
        b = pyro.param("beta", beta.clone(), constraint=constraints.positive)
        rates(dist.Beta(a, b))

    def log_joint(x: Tensor) -> float:
        total = []
        for c in itertools.product((0, 1), repeat=len(x)):
            log_p = 0.0
            for k in (0, 1):
                mine = x[[i for i, j in enumerate(c) if j == k]]
                log_p += len(mine) * math.log(MIXING[k]) + sum(math.log(math.comb(TRIALS, int(v))) for v in mine)
                a, b = PRIORS[k]
                log_p += _log_beta(a + mine.sum().item(), b + (TRIALS - mine).sum().item()) - _log_beta(a, b)
            total.append(log_p)
        return torch.tensor(total, dtype=torch.float64).logsumexp(0).item()

    log_px = log_joint(x)
    log_p = [stats.betabinom.logpmf(x.numpy(), TRIALS, a, b) for a, b in zip(alpha.numpy(), beta.numpy(), strict=True)]
    predictive = (torch.tensor(log_p[0]) + mixing[0].log()).logaddexp(torch.tensor(log_p[1]) + mixing[1].log())
    loo = torch.tensor([log_px - log_joint(x[torch.arange(6) != i]) for i in range(6)], dtype=torch.float64)
    twice = torch.tensor([log_joint(torch.cat([x, x[i : i + 1]])) - log_px for i in range(6)], dtype=torch.float64)
    return Conjugate(model, guide, (x,), log_px, predictive, loo, twice)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


CONJUGATE = {
    "normal mean": normal_mean,
    "regression": regression,
    "mixture": mixture,
    "mixture in a plate": lambda: mixture(in_plate=True),
}
