"""The covariance gradient of the thermodynamic variational objective."""

from typing import Protocol, final, runtime_checkable

from torch import Tensor

from ppvae.errors import UsageError
from ppvae.inference.structure import Structure
from ppvae.objectives.gradients.estimator import GradientEstimator, gradient_only
from ppvae.objectives.protocol import LogWeightBound, PairCall
from ppvae.objectives.requirements import require_sampled_latents


@runtime_checkable
class ThermodynamicBound(LogWeightBound, Protocol):
    """A Riemann sum over inverse temperatures b_j in [0, 1]."""

    def partition(self) -> list[tuple[float, float]]:
        """(b_j, b_{j+1} - b_j) of each term."""
        ...


@final
class Covariance(GradientEstimator):
    """d/d E_b[f] = E_b[d f] + Cov_b(d log pi_b, f), log pi_b = (1 - b) log q + b log p(x, z), f = log w.

    Expectations and covariances are those of the K draws under their self-normalised weights v_b, consistent as K
    grows; the guide's score term is (K - 1) / K of its expectation at b = 0. Draws are held constant, so the guide
    needs no reparameterised samples, but of global latents, whose gradient is pathwise.
    Source: Masrani et al. 2019 (arXiv 1907.00031), equation 10.
    """

    def check_objective(self, objective: LogWeightBound) -> None:
        if not isinstance(objective, ThermodynamicBound):
            raise UsageError(f"{type(objective).__name__}: expected a gradient other than covariance, which is TVO's")
        if objective.draws < 2:
            raise UsageError("num_particles: expected at least 2 for a covariance, found 1")

    def check_structure(self, objective: LogWeightBound, s: Structure) -> None:
        require_sampled_latents(s, "covariance")

    def surrogate(self, objective: LogWeightBound, call: PairCall) -> Tensor:
        assert isinstance(objective, ThermodynamicBound)
        t = call.terms(frozen=("latents",))
        log_weight, log_q = t.log_weight, t.log_guide
        f = log_weight.detach()
        total = f.new_zeros(())
        for b, width in objective.partition():
            v = (b * f).softmax(0)
            mean = (v * f).sum(0)
            log_pi = log_q + b * log_weight
            total = total + width * (v * log_weight + v * (f - mean) * log_pi).sum()
        return objective.reduce(f).sum() + gradient_only(total)
