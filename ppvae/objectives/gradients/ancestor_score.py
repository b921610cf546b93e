"""The resampling term of the gradient of a particle filter's bound."""

from typing import Protocol, final, runtime_checkable

from torch import Tensor

from ppvae.errors import UsageError
from ppvae.inference.sequences.particle_filter import FilterResult
from ppvae.inference.structure import Structure
from ppvae.objectives.gradients.estimator import GradientEstimator, gradient_only
from ppvae.objectives.protocol import LogWeightBound, PairCall
from ppvae.objectives.requirements import require_reparameterized_latents


@runtime_checkable
class FilteringBound(Protocol):
    """A bound that a particle filter estimates."""

    def filter(self, call: PairCall) -> FilterResult: ...


@final
class AncestorScore(GradientEstimator):
    """The pathwise gradient and the score of the ancestors, sum_t d log P(a_t) (log Z - log Z_t), of `FIVO` alone.

    a_t are the multinomial ancestors of resampling step t, and Z_t is the estimate of p(x) up to it.
    Source: Maddison et al. 2017 (arXiv 1705.09279), equation 10; Naesseth et al. 2018 (arXiv 1705.11140).
    """

    holds_latents = False

    def check_objective(self, objective: LogWeightBound) -> None:
        if not isinstance(objective, FilteringBound):
            raise UsageError(
                f"{type(objective).__name__}: expected a gradient other than 'ancestor_score', the resampling term of "
                f"FIVO; take gradient='pathwise'"
            )

    def check_structure(self, objective: LogWeightBound, s: Structure) -> None:
        require_reparameterized_latents(s, "pathwise")

    def surrogate(self, objective: LogWeightBound, call: PairCall) -> Tensor:
        assert isinstance(objective, FilteringBound)
        f = objective.filter(call)
        return f.log_px.sum() + gradient_only(f.ancestor_score.sum())
