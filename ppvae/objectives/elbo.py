"""Evidence lower bounds whose rate is weighted, granted, or steered."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from ppvae.errors import ContractError, UsageError, site_error
from ppvae.inference.structure import Role, Structure
from ppvae.inference.terms import Terms
from ppvae.objectives.base import Objective
from ppvae.objectives.gradients.estimators import Gradient, Pathwise, ScoreFunction
from ppvae.objectives.reductions import mean_without
from ppvae.objectives.schedules import Schedule, Scheduled


class Rated(Objective):
    """An expected log-likelihood less something of the rate; the mean over particles."""

    stl_unbiased = True

    def refuse(self, s: Structure) -> None:
        """A point mass as guide (MAP) has no weights, and can be trained."""

    def reduce(self, log_weight: Tensor) -> Tensor:
        return log_weight.mean(0)

    def learning_signal(self, log_weight: Tensor) -> Tensor:
        return log_weight / len(log_weight)

    def without(self, log_weight: Tensor, others: Tensor) -> Tensor:
        return mean_without(log_weight, others)

    def dreg_weights(self, log_weight: Tensor) -> Tensor:
        return torch.ones_like(log_weight)


@final
class ELBO(Rated):
    """The evidence lower bound, averaged over particles: E_q[log p(x | z)] - beta E_q[log q(z | x) - log p(z)].

    Args:
        num_particles: draws per datum.
        beta: the weight on the rate, or a function of the number of steps that gives it; 1 is the bound on log p(x).
        free_bits: nats of rate that each part of the latent may have for nothing: sum_j max(free_bits, KL_j), where
            KL_j is the mean over the batch. A part is one dim of a latent where guide and prior are products over its
            event, and else the whole site.
        analytic_kl: take KL(q || p) in closed form where the two sites have one, and draws for the others.
        gradient: an estimator, or its name. With free_bits: "pathwise"; with analytic_kl: "pathwise" or "score".
        warmup: steps in which beta rises from 0.

    Raises:
        ContractError: the pair's rate does not stand apart where it has to, by the site's name.

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
        gradient: str | Gradient = "pathwise",
        warmup: int = 0,
    ):
        if free_bits < 0:
            raise UsageError(f"free_bits: expected a number of nats, found {free_bits}")
        self.beta, self.free_bits, self.analytic_kl, self.warmup = beta, free_bits, analytic_kl, warmup
        super().__init__(num_particles, gradient)
        self._scheduled["beta"] = Scheduled(beta, warmup)
        if free_bits:
            only(self, Pathwise, "free_bits, whose maximum is of the draws")
        elif analytic_kl:
            only(self, Pathwise | ScoreFunction, "analytic_kl, in which the guide has no score")

    @property
    def _plain(self) -> bool:
        return self.beta == 1 and not self.warmup

    @property
    def options(self) -> dict[str, Any]:
        return {"kl": self.analytic_kl, "events": bool(self.free_bits)}

    def refuse(self, s: Structure) -> None:
        if self.free_bits or self.analytic_kl or not self._plain:
            apart(s, "beta, free_bits and analytic_kl")
        if self.free_bits:
            parted(s, "free_bits")

    def weigh(self, t: Terms) -> Tensor:
        if self._plain and not t.kl:
            return t.elbo
        return t.log_lik - self._now("beta") * rate(t)

    def bound(self, t: Terms) -> Tensor:
        if not self.free_bits:
            return super().bound(t)
        charged: Any = sum(kl.mean((-1, -2)).clamp(min=self.free_bits).sum() for kl in t.rates().values())
        return t.log_lik.mean(0) - self._now("beta") * charged


@final
class Capacity(Rated):
    """E_q[log p(x | z)] - gamma |KL - capacity|: the rate, its mean over the batch, is steered to a given size.

    Args:
        capacity: the rate that is aimed at, in nats per datum, or a function of the number of steps that gives it.
        gamma: the weight on the distance from it.
        num_particles: draws per datum.
        analytic_kl: take KL(q || p) in closed form where the two sites have one.
        warmup: steps in which the capacity rises from 0.

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
        self.capacity, self.gamma, self.analytic_kl, self.warmup = capacity, gamma, analytic_kl, warmup
        super().__init__(num_particles)
        self._scheduled["capacity"] = Scheduled(capacity, warmup)

    @property
    def options(self) -> dict[str, Any]:
        return {"kl": self.analytic_kl}

    def refuse(self, s: Structure) -> None:
        apart(s, "a capacity")

    def bound(self, t: Terms) -> Tensor:
        return t.log_lik.mean(0) - self.gamma * (rate(t).mean() - self._now("capacity")).abs()


def rate(t: Terms) -> Tensor:
    """log q(z | x) - log p(z), [particles, batch]; KL in closed form for the latents that have it."""
    total = t.log_guide - t.log_prior
    for name, kl in t.kl.items():
        sampled = t.guide[name].log_prob.double() - t.model[name].log_prob.double()
        difference = kl.double().sum(tuple(range(kl.dim() - 2))) - sampled if kl.dim() > 2 else kl.double() - sampled
        total = total + (difference.sum(-1, keepdim=True) if t.has_global_latents else difference)
    return total


def only(objective: Objective, kinds: Any, what: str) -> None:
    """Refuses an estimator whose reasoning does not hold for an objective."""
    if not isinstance(objective.gradient, kinds):
        raise UsageError(f"gradient: expected 'pathwise' with {what}; found {type(objective.gradient).__name__}")


def apart(s: Structure, what: str) -> None:
    """Refuses pairs whose rate does not stand apart from the likelihood."""
    if s.enumerated:
        raise site_error(
            s.enumerated[0], f"a pair without enumerated sites, whose rate stands apart, for {what}",
            "a site summed out", "take ELBO with beta = 1 and nothing else",
        )  # fmt: skip


def parted(s: Structure, what: str) -> None:
    """Refuses pairs whose rate has parts that belong to no latent, or to all data."""
    for name, role in s.guide_roles.items():
        if role is Role.AUXILIARY:
            raise site_error(
                name, f"latents with a density of their own, for {what}", "a helper that others are made from",
                "give the latent its density in the guide",
            )  # fmt: skip
    if s.has_global_latents:
        raise ContractError(f"{what}: expected a rate per datum, found a latent that is shared by all data")
