"""Score-function gradients (REINFORCE), and VIMCO."""

from typing import Any, final

import torch
from torch import Tensor

from ppvae.errors import ContractError, UsageError
from ppvae.inference.structure import Structure
from ppvae.inference.terms import Terms
from ppvae.objectives.gradients.control_variates import Baseline, LeaveOneOut, MovingAverage, NoBaseline
from ppvae.objectives.gradients.discrete.sites import SiteDraws
from ppvae.objectives.gradients.estimator import GradientEstimator, gradient_only
from ppvae.objectives.protocol import LogWeightBound, PairCall
from ppvae.objectives.requirements import require_sampled_latents


def non_reparameterized_log_prob(t: Terms) -> Tensor | None:
    """log q of the latents without a reparameterised sample, [particles, batch]; None where there is none."""
    log_probs = [t.guide[name].log_prob.double() for name in t.structure.non_reparameterized if name in t.guide]
    if not log_probs:
        return None
    total: Any = sum(q.sum(-1, keepdim=True) if t.has_global_latents else q for q in log_probs)
    return total


@final
class ScoreFunction(GradientEstimator):
    """The score function for latents without a reparameterised sample, the pathwise gradient for all others.

    sum_k (R - b_k) d log q(z_k) / dphi.

    Args:
        baseline: b_k, a control variate that does not depend on draw k; `MovingAverage()` by default.

    Raises UsageError for a baseline that is no object of `Baseline`; ContractError for a b_k of another shape.
    Source: Williams 1992; Mnih and Gregor 2014 (arXiv 1402.0030); combined with paths: Schulman et al. 2015
    (arXiv 1506.05254).
    """

    holds_latents = False

    def __init__(self, baseline: Baseline | None = None):
        if not isinstance(baseline, Baseline | None):
            found = f"the class {baseline.__name__}" if isinstance(baseline, type) else f"a {type(baseline).__name__}"
            raise UsageError(
                f"baseline: expected an object of a subclass of Baseline, whose __call__(objective, log_weight, batch) "
                f"returns b_k, [particles, batch]; found {found}"
            )
        self.baseline = baseline if baseline is not None else MovingAverage()

    @property
    def has_learned_baseline(self) -> bool:
        return not self.baseline.may_be_captured

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
        if (log_q := non_reparameterized_log_prob(t)) is not None:
            signal = _signal(objective, self.baseline, objective.log_weights(t).detach(), call)
            total = total + gradient_only((signal * log_q).sum())
        shared = call.globals
        if shared is None or (log_q := non_reparameterized_log_prob(shared)) is None:
            return total
        # a global latent's signal is of all data, and its baseline of the other particles, which have their own draws
        joint = objective.log_weights(t).sum(-1, keepdim=True) + objective.log_weights(shared) / t.scale
        baseline = LeaveOneOut() if len(joint) > 1 else NoBaseline()
        return total + gradient_only((_signal(objective, baseline, joint.detach(), call) * log_q).sum())

    def site_surrogate(self, site: SiteDraws) -> Tensor:
        """The score of one site, as a part of `gradient={site: "vimco", ...}`."""
        signal = _signal(site.objective, self.baseline, site.log_weight, site.call)
        return (signal * site.log_prob).sum()

    def state_dict(self) -> dict[str, Any]:
        return self.baseline.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.baseline.load_state_dict(state)

    def __repr__(self) -> str:
        return f"Score({self.baseline!r})"  # as in the run folders of 0.1, which a resumed run is compared with


def _signal(objective: LogWeightBound, baseline: Baseline, log_weight: Tensor, call: PairCall) -> Tensor:
    """The learning signal of each draw minus b_k, [particles, batch] nats."""
    b = baseline(objective, log_weight, call.batch)
    if not isinstance(b, Tensor) or b.shape != log_weight.shape:
        shape = list(b.shape) if isinstance(b, Tensor) else type(b).__name__
        raise ContractError(
            f"{type(baseline).__name__}: expected b_k of each draw, [particles, batch] = {list(log_weight.shape)}, "
            f"found {shape}; signal_of_constant(objective, log_weight, b) gives it for a bound b [] or [batch]"
        )
    return objective.learning_signal(log_weight) - b.detach()


def vimco() -> ScoreFunction:
    """VIMCO: b_k is the bound with log w_k replaced by the mean of the other log-weights; leave-one-out for an ELBO.

    Source: Mnih and Rezende 2016 (arXiv 1602.06725).
    """
    return ScoreFunction(LeaveOneOut())
