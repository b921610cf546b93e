"""Estimators of an objective's gradient: functions of the same terms, which leave the objective's value as it is.

A bound per datum R(log w_1, ..., log w_K) has the pathwise gradient sum_k r_k d log w_k, r_k = dR / d log w_k. The
others change what reaches the guide's parameters, in expectation by nothing, except where they say so.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from ppvae.errors import UsageError, site_error
from ppvae.inference.particle_layout import ParticleLayout
from ppvae.inference.structure import Structure
from ppvae.inference.terms import Terms
from ppvae.objectives.gradients.control_variates import Baseline, LeaveOneOut, MovingAverage, NoBaseline

if TYPE_CHECKING:
    from ppvae.objectives.base import Call, Objective


def accumulate_gradients(surrogate: Tensor) -> Tensor:
    """Zero, with the gradient of the surrogate."""
    return surrogate - surrogate.detach()


class Gradient(ABC):
    """How the gradient of an objective is estimated."""

    @property
    def learns(self) -> bool:
        """Whether it learns from the steps of training: a baseline that does."""
        return False

    @abstractmethod
    def surrogate(self, objective: Objective, call: Call) -> Tensor:
        """The objective's bound summed over the batch, a scalar whose gradient is the estimate."""

    @abstractmethod
    def refuse(self, objective: Objective, s: Structure) -> None:
        """Raises ContractError where the estimator does not exist for a pair."""

    def suits(self, objective: Objective) -> None:  # noqa: B027  most suit all
        """Raises UsageError, or warns, where the estimator does not fit an objective."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Goes on from a checkpoint; an empty one starts anew."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def reparameterized_latents(s: Structure, what: str) -> None:
    """Refuses latents that a guide does not reparameterise."""
    if s.non_reparameterized:
        raise site_error(
            s.non_reparameterized[0], f"a reparameterised latent for a {what} gradient", "one without",
            "enumerate it (infer={'enumerate': 'parallel'}), or take an objective with gradient='score' or 'vimco'",
        )  # fmt: skip


def sampled_latents(s: Structure, what: str, cure: str = "take gradient='pathwise'") -> None:
    """Refuses sites that are enumerated in the guide, whose probabilities are not weighed as draws are."""
    for name in s.enumerated:
        if name in s.guide_roles:
            raise site_error(name, f"a guide that samples all of its sites, for {what}", "one that it enumerates", cure)


@final
class Pathwise(Gradient):
    """Through the reparameterised draws: sum_k r_k (d log w_k / dz dz/dphi - d log q / dphi).

    Source: Kingma and Welling 2014 (arXiv 1312.6114); Burda et al. 2016 (arXiv 1509.00519) for K > 1.
    """

    def refuse(self, objective: Objective, s: Structure) -> None:
        reparameterized_latents(s, "pathwise")

    def surrogate(self, objective: Objective, call: Call) -> Tensor:
        return objective.bound(call.terms()).sum()


@final
class STL(Gradient):
    """Sticking the landing: pathwise, with the guide's own parameters held constant in its density.

    The score that is left out has mean zero where the bound is a mean of log-weights; the gradient of the guide is then
    zero, for every draw, where the guide is the exact posterior. For other bounds with K > 1 it is biased, and warns.
    Source: Roeder et al. 2017 (arXiv 1703.09194); Tucker et al. 2019 (arXiv 1810.04152) for the bias.
    """

    def suits(self, objective: Objective) -> None:
        if objective.draws > 1 and not objective.stl_unbiased:
            warnings.warn(
                f"STL is biased for {type(objective).__name__} with more than one particle: take gradient='dreg'",
                stacklevel=4,
            )

    def refuse(self, objective: Objective, s: Structure) -> None:
        reparameterized_latents(s, "stl")
        sampled_latents(s, "stl")

    def surrogate(self, objective: Objective, call: Call) -> Tensor:
        return objective.bound(call.terms(frozen=("guide",))).sum()


class Gate:
    """Weights what flows back out of the densities into the latents, once the weights [particles, batch] are known."""

    def __init__(self) -> None:
        self.weights: Tensor | None = None

    def __call__(self, name: str, value: Tensor, piece: ParticleLayout) -> Tensor:
        if not value.requires_grad:
            return value

        def weighted(gradient: Tensor) -> Tensor:
            assert self.weights is not None
            return gradient * piece.broadcast_weights(self.weights, name).to(gradient)

        entered = value.view_as(value)
        entered.register_hook(weighted)
        return entered


@final
class DReG(Gradient):
    """Doubly reparameterised: the guide's score is turned into a path, too, which leaves less noise.

    The guide's gradient is sum_k d_k d log w_k / dz dz/dphi, with d_k = r_k - d r_k / d log w_k: for IWAE w_k^2 of the
    normalised weights; all others get the pathwise one. One pass: gradients are weighted where the joint draw of the
    guide enters the densities, so that a hierarchical guide, or a model that shares its parameters, comes out right.
    Source: Tucker et al. 2019 (arXiv 1810.04152).
    """

    def suits(self, objective: Objective) -> None:
        objective.dreg_weights(torch.zeros(objective.draws, 1))

    def refuse(self, objective: Objective, s: Structure) -> None:
        reparameterized_latents(s, "dreg")
        sampled_latents(s, "dreg")

    def surrogate(self, objective: Objective, call: Call) -> Tensor:
        gate = Gate()
        t = call.terms(frozen=("guide",), latent_hook=gate)
        gate.weights = objective.dreg_weights(objective.weigh(t).detach())
        return objective.bound(t).sum()


def score_sites(s: Structure, t: Terms) -> Tensor | None:
    """log q of the latents that the guide does not reparameterise, [particles, batch]."""
    sites = [t.guide[name].log_prob.double() for name in s.non_reparameterized]
    if not sites:
        return None
    total: Any = sum(sites)
    return total.sum(-1, keepdim=True) if s.has_global_latents else total


@final
class ScoreFunction(Gradient):
    """The score function for latents without a path, sum_k (R - b_k) d log q(z_k) / dphi; pathwise for all others.

    Args:
        baseline: what is subtracted, b_k: anything that does not depend on draw k. A moving average by default.

    Source: Williams 1992; Mnih and Gregor 2014 (arXiv 1402.0030); mixed with paths: Schulman et al. 2015
    (arXiv 1506.05254).
    """

    def __init__(self, baseline: Baseline | None = None):
        self.baseline = baseline if baseline is not None else MovingAverage()

    @property
    def learns(self) -> bool:
        return not isinstance(self.baseline, NoBaseline | LeaveOneOut | MovingAverage)

    def suits(self, objective: Objective) -> None:
        if isinstance(self.baseline, LeaveOneOut) and objective.draws < 2:
            raise UsageError(
                "num_particles: expected at least 2 for a baseline made of the other particles (vimco), found 1"
            )
        objective.learning_signal(torch.zeros(objective.draws, 1))

    def refuse(self, objective: Objective, s: Structure) -> None:
        if s.non_reparameterized:
            sampled_latents(s, "the score function of another site")

    def surrogate(self, objective: Objective, call: Call) -> Tensor:
        t = call.terms()
        total = objective.bound(t).sum()
        log_q = score_sites(call.s, t)
        if log_q is None:
            return total
        signal = self.baseline(objective, objective.weigh(t).detach(), call.batch)
        return total + accumulate_gradients((signal * log_q).sum())

    def state_dict(self) -> dict[str, Any]:
        return self.baseline.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.baseline.load_state_dict(state)

    def __repr__(self) -> str:
        return f"Score({self.baseline!r})"


def vimco() -> ScoreFunction:
    """VIMCO: each particle's share in the bound is told by the bound without it.

    b_k is the bound with log w_k replaced by the mean of the others: for an ELBO, leave-one-out.
    Source: Mnih and Rezende 2016 (arXiv 1602.06725).
    """
    return ScoreFunction(LeaveOneOut())


def gradient_named(gradient: str | Gradient) -> Gradient:
    """The estimator of a name, or the estimator itself."""
    from ppvae.objectives.gradients.gdreg import GDReG
    from ppvae.objectives.tvo import Covariance

    if isinstance(gradient, Gradient):
        return gradient
    known = {
        "pathwise": Pathwise, "stl": STL, "dreg": DReG, "gdreg": GDReG, "score": ScoreFunction, "vimco": vimco,
        "covariance": Covariance,
    }  # fmt: skip
    if gradient not in known:
        raise UsageError(f"gradient: expected one of {', '.join(known)}; found {gradient!r}")
    return known[gradient]()
