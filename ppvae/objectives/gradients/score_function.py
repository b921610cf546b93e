"""Score-function gradients (REINFORCE), and VIMCO."""

from typing import Any, final

import torch
from torch import Tensor

from ppvae.errors import ContractError, UsageError
from ppvae.inference.structure import Structure
from ppvae.inference.terms import Terms
from ppvae.objectives.gradients.control_variates import Baseline, LeaveOneOut, MovingAverage, NoBaseline
from ppvae.objectives.gradients.estimator import GradientEstimator, gradient_only
from ppvae.objectives.protocol import LogWeightBound, PairCall
from ppvae.objectives.requirements import require_sampled_latents


def non_reparameterized_log_prob(s: Structure, t: Terms) -> Tensor | None:
    """log q of the latents without a reparameterised sample, [particles, batch]; None where there is none."""
    log_probs = [t.guide[name].log_prob.double() for name in t.structure.non_reparameterized if name in t.guide]
    if not log_probs:
        return None
    total: Any = sum(log_probs)
    return total.sum(-1, keepdim=True) if s.has_global_latents else total


@final
class ScoreFunction(GradientEstimator):
    """The score function for latents without a reparameterised sample, the pathwise gradient for all others.

    sum_k (R - b_k) d log q(z_k) / dphi.

    Args:
        baseline: b_k, a control variate that does not depend on draw k; `MovingAverage()` by default.

    Source: Williams 1992; Mnih and Gregor 2014 (arXiv 1402.0030); combined with paths: Schulman et al. 2015
    (arXiv 1506.05254).
    """

    def __init__(self, baseline: Baseline | None = None):
        self.baseline = baseline if baseline is not None else MovingAverage()

    @property
    def has_learned_baseline(self) -> bool:
        return not isinstance(self.baseline, NoBaseline | LeaveOneOut | MovingAverage)

    def check_objective(self, objective: LogWeightBound) -> None:
        if isinstance(self.baseline, LeaveOneOut) and objective.draws < 2:
            raise UsageError(
                "num_particles: expected at least 2 for a baseline computed from the other particles (vimco), found 1"
            )
        objective.learning_signal(torch.zeros(objective.draws, 1))

    def check_structure(self, objective: LogWeightBound, s: Structure) -> None:
        if s.non_reparameterized:
            require_sampled_latents(s, "the score function of another site")

    def surrogate(self, objective: LogWeightBound, call: PairCall) -> Tensor:
        t = call.terms()
        total = objective.bound(t).sum()
        log_q = non_reparameterized_log_prob(call.structure, t)
        if log_q is None:
            return total
        log_weight = objective.log_weights(t).detach()
        baseline = self.baseline(objective, log_weight, call.batch)
        if not isinstance(baseline, Tensor) or baseline.shape != log_weight.shape:
            shape = list(baseline.shape) if isinstance(baseline, Tensor) else type(baseline).__name__
            raise ContractError(
                f"{type(self.baseline).__name__}: expected b_k of each draw, [particles, batch] = "
                f"{list(log_weight.shape)}, found {shape}"
            )
        signal = objective.learning_signal(log_weight) - baseline.detach()
        return total + gradient_only((signal * log_q).sum())

    def state_dict(self) -> dict[str, Any]:
        return self.baseline.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.baseline.load_state_dict(state)

    def __repr__(self) -> str:
        return f"Score({self.baseline!r})"  # as in the run folders of 0.1, which a resumed run is compared with


def vimco() -> ScoreFunction:
    """VIMCO: b_k is the bound with log w_k replaced by the mean of the other log-weights; leave-one-out for an ELBO.

    Source: Mnih and Rezende 2016 (arXiv 1602.06725).
    """
    return ScoreFunction(LeaveOneOut())
