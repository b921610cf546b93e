"""The evidence lower bound with a weight, free bits or a target capacity on the rate KL(q(z | x) || p(z))."""

from typing import Any, final

import torch
from torch import Tensor

from ppvae.errors import UsageError
from ppvae.errors.ranges import check_numbers, check_ranges
from ppvae.inference.structure import Structure
from ppvae.inference.terms import Terms
from ppvae.objectives.gradients import Gradient, Pathwise, ScoreFunction
from ppvae.objectives.objective import Objective
from ppvae.objectives.reductions import leave_one_out_mean
from ppvae.objectives.requirements import require_rate_per_latent, require_separable_rate
from ppvae.objectives.schedules import Schedule, ScheduledScalar


class RateDistortionObjective(Objective):
    """E_q[log p(x | z)] minus a function of the rate, averaged over particles."""

    stl_unbiased = True  # a mean of log-weights

    def check_structure(self, s: Structure) -> None:
        """Accepts a point-mass guide (MAP), which has no importance weights but can be trained."""

    def reduce(self, log_weight: Tensor) -> Tensor:
        return log_weight.mean(0)

    def learning_signal(self, log_weight: Tensor) -> Tensor:
        return log_weight / len(log_weight)

    def leave_one_out_bound(self, log_weight: Tensor, replacement: Tensor) -> Tensor:
        return leave_one_out_mean(log_weight, replacement)

    def dreg_weights(self, log_weight: Tensor) -> Tensor:
        return torch.ones_like(log_weight)


@final
class ELBO(RateDistortionObjective):
    """The evidence lower bound, averaged over particles: E_q[log p(x | z)] - beta E_q[log q(z | x) - log p(z)].

    Args:
        num_particles: draws per datum.
        beta: the weight on the rate, or a function of the number of steps taken; 1 gives the bound on log p(x).
        free_bits: lambda, nats per group of latent dims whose rate is not penalised: the rate is
            sum_j max(free_bits, KL_j), KL_j the mean over the batch. A group is one dim of a latent where guide and
            prior factorise over its event, else the whole site.
        analytic_kl: KL(q || p) in closed form where the two sites have one, its Monte Carlo estimate elsewhere.
        gradient: an estimator, or its name. With free_bits: "pathwise"; with analytic_kl: "pathwise" or "score".
        warmup: steps over which beta rises linearly from 0.

    Raises:
        ContractError: enumerated sites, or auxiliary ones, make the rate of a latent undefined, by the site's name.

    Source: Kingma and Welling 2014 (arXiv 1312.6114); Higgins et al. 2017 for beta; Kingma et al. 2016
    (arXiv 1606.04934) for free bits; Sonderby et al. 2016 (arXiv 1602.02282) for the warm-up.

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2), torch.zeros(4, 3)
    >>> isinstance(ELBO(num_particles=10).loss(pair.model, pair.mean_field, x), float)
    True
    """

    def __init__(
        self,
        num_particles: int = 1,
        beta: float | Schedule = 1.0,
        free_bits: float = 0.0,
        analytic_kl: bool = False,
        gradient: Gradient = "pathwise",
        warmup: int = 0,
    ):
        check_numbers(num_particles=num_particles, free_bits=free_bits, warmup=warmup)
        check_ranges(beta=beta)
        self.beta, self.free_bits, self.analytic_kl, self.warmup = beta, free_bits, analytic_kl, warmup
        super().__init__(num_particles, gradient)
        self._schedules["beta"] = ScheduledScalar(beta, warmup)

    def check_estimator(self) -> None:
        if self.free_bits:
            require_gradient(self, Pathwise, "free_bits, whose maximum depends on the draws")
        elif self.analytic_kl:
            require_gradient(self, Pathwise | ScoreFunction, "analytic_kl, in which the guide has no score")
        super().check_estimator()

    @property
    def _is_standard(self) -> bool:
        return self.beta == 1 and not self.warmup

    @property
    def terms_options(self) -> dict[str, Any]:
        return {"kl": self.analytic_kl, "events": bool(self.free_bits)}

    def check_structure(self, s: Structure) -> None:
        if self.free_bits or self.analytic_kl or not self._is_standard:
            require_separable_rate(s, "beta, free_bits and analytic_kl")
        if self.free_bits:
            require_rate_per_latent(s, "free_bits")

    def log_weights(self, t: Terms) -> Tensor:
        if self._is_standard and not t.kl:
            return t.elbo
        return t.log_lik - self._scheduled_value("beta") * kl_estimate(t)

    def bound(self, t: Terms) -> Tensor:
        if not self.free_bits:
            return super().bound(t)
        rate: Any = sum(kl.mean((-1, -2)).clamp(min=self.free_bits).sum() for kl in t.rates().values())
        return t.log_lik.mean(0) - self._scheduled_value("beta") * rate


@final
class Capacity(RateDistortionObjective):
    """E_q[log p(x | z)] - gamma |KL - capacity|: a penalty keeps the rate, its mean over the batch, at a target.

    The rate is that of local latents; the KL of global ones counts once, as in the ELBO.

    Args:
        capacity: the target rate in nats per datum, or a function of the number of steps taken.
        gamma: the weight on the distance from it.
        num_particles: draws per datum.
        analytic_kl: KL(q || p) in closed form where the two sites have one.
        warmup: steps over which the capacity rises linearly from 0.

    Source: Burgess et al. 2018 (arXiv 1804.03599).

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2), torch.zeros(4, 3)
    >>> isinstance(Capacity(2.0).loss(pair.model, pair.mean_field, x), float)
    True
    """

    def __init__(
        self,
        capacity: float | Schedule = 25.0,
        gamma: float = 100.0,
        num_particles: int = 1,
        analytic_kl: bool = False,
        warmup: int = 0,
    ):
        check_numbers(gamma=gamma, num_particles=num_particles, warmup=warmup)
        check_ranges(capacity=capacity)
        self.capacity, self.gamma, self.analytic_kl, self.warmup = capacity, gamma, analytic_kl, warmup
        super().__init__(num_particles)
        self._schedules["capacity"] = ScheduledScalar(capacity, warmup)

    @property
    def terms_options(self) -> dict[str, Any]:
        return {"kl": self.analytic_kl}

    def check_structure(self, s: Structure) -> None:
        require_separable_rate(s, "a capacity")

    def bound(self, t: Terms) -> Tensor:
        return t.log_lik.mean(0) - self.gamma * (kl_estimate(t).mean() - self._scheduled_value("capacity")).abs()

    def global_bound(self, t: Terms) -> Tensor:
        return (t.log_lik - kl_estimate(t)).mean(0)  # the capacity is that of the local latents


def kl_estimate(t: Terms) -> Tensor:
    """The rate log q(z | x) - log p(z) per draw, [particles, batch]; the closed-form KL of the latents in `t.kl`."""
    total = t.log_guide - t.log_prior
    for name, kl in t.kl.items():
        sampled = t.guide[name].log_prob.double() - t.model[name].log_prob.double()
        difference = kl.double().sum(tuple(range(kl.dim() - 2))) - sampled if kl.dim() > 2 else kl.double() - sampled
        total = total + (difference.sum(-1, keepdim=True) if t.has_global_latents else difference)
    return total


def require_gradient(objective: Objective, kinds: Any, option: str) -> None:
    """Raises UsageError unless the objective's gradient estimator is one of these classes."""
    if not isinstance(objective.gradient, kinds):
        raise UsageError(f"gradient: expected 'pathwise' with {option}; found {type(objective.gradient).__name__}")
