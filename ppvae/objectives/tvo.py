"""The thermodynamic variational objective, and the covariance gradient that goes with it."""

from __future__ import annotations

import itertools
from typing import final

import torch
from torch import Tensor

from ppvae.errors import UsageError
from ppvae.inference.structure import Structure
from ppvae.objectives.base import Call, Objective
from ppvae.objectives.bounds import warn_of_enumerated
from ppvae.objectives.gradients.estimators import Gradient, accumulate_gradients, sampled_latents
from ppvae.objectives.reductions import tempered_mean_without


@final
class TVO(Objective):
    """The left Riemann sum of log p(x) = int_0^1 E_b[log w] db: sum_j (b_{j+1} - b_j) sum_k v_jk log w_k.

    v_j = softmax(b_j log w) are the self-normalised weights of the draws under q^(1 - b) p^b, 0 = b_0 < b_1 < ... < 1,
    b_1 and those after it evenly apart in their logarithm. One partition is the ELBO.

    Args:
        num_particles: K, draws per datum.
        num_partitions: terms of the sum.
        first: b_1.
        gradient: "covariance", which needs no path and tends to the gradient of the exact sum as K grows; or
            "pathwise", "score", "vimco", whose mean is the gradient of the mean of the value at this K.

    Source: Masrani et al. 2019 (arXiv 1907.00031).

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2), torch.zeros(4, 3)
    >>> bool(abs(TVO(5).loss(pair.model, pair.guide, x) + pair.log_px(x).sum()) < 1e-4)
    True
    """

    def __init__(
        self,
        num_particles: int = 50,
        num_partitions: int = 2,
        first: float = 0.1,
        gradient: str | Gradient = "covariance",
    ):
        if num_partitions < 1 or not 0 < first < 1:
            raise UsageError(
                f"num_partitions and first: expected at least 1 and a number in (0, 1), found {num_partitions}, {first}"
            )
        self.num_partitions, self.first = num_partitions, first
        super().__init__(num_particles, gradient)

    @property
    def stl_unbiased(self) -> bool:  # type: ignore[override]
        return self.num_partitions == 1

    def refuse(self, s: Structure) -> None:
        super().refuse(s)
        if self.num_partitions > 1:
            sampled_latents(s, "TVO", "take ELBO or CIWAE")
        warn_of_enumerated(s)

    def path(self) -> list[tuple[float, float]]:
        """(b_j, b_{j+1} - b_j) of every term."""
        count = self.num_partitions
        ends = [0.0, *(self.first ** (1 - j / (count - 1)) for j in range(count - 1)), 1.0]
        return [(b, after - b) for b, after in itertools.pairwise(ends)]

    def reduce(self, log_weight: Tensor) -> Tensor:
        return torch.stack([width * ((b * log_weight).softmax(0) * log_weight).sum(0) for b, width in self.path()]).sum(
            0
        )

    def learning_signal(self, log_weight: Tensor) -> Tensor:
        return super().learning_signal(log_weight) if self.num_partitions > 1 else log_weight / len(log_weight)

    def without(self, log_weight: Tensor, others: Tensor) -> Tensor:
        terms = [width * tempered_mean_without(log_weight, others, b) for b, width in self.path()]
        return torch.stack(terms).sum(0)


@final
class Covariance(Gradient):
    """TVO's own: d/d E_b[f] = E_b[d f] + Cov_b(d log pi_b, f), log pi_b = (1 - b) log q + b log p(x, z), f = log w.

    Expectations and covariances are those of the draws under their weights v_b, so that they are right as K grows; the
    part of the guide's score is (K - 1) / K of the right one at b = 0. Draws are held: it serves every guide.
    Source: Masrani et al. 2019 (arXiv 1907.00031), equation 10.
    """

    def suits(self, objective: Objective) -> None:
        if not isinstance(objective, TVO):
            raise UsageError(f"{type(objective).__name__}: expected a gradient other than covariance, which is TVO's")
        if objective.draws < 2:
            raise UsageError("num_particles: expected at least 2 for a covariance, found 1")

    def refuse(self, objective: Objective, s: Structure) -> None:
        sampled_latents(s, "covariance")

    def surrogate(self, objective: Objective, call: Call) -> Tensor:
        assert isinstance(objective, TVO)
        t = call.terms(frozen=("latents",))
        log_weight, log_q = t.log_weight, t.log_guide
        f = log_weight.detach()
        total = f.new_zeros(())
        for b, width in objective.path():
            v = (b * f).softmax(0)
            mean = (v * f).sum(0)
            log_pi = log_q + b * log_weight
            total = total + width * (v * log_weight + v * (f - mean) * log_pi).sum()
        return objective.reduce(f).sum() + accumulate_gradients(total)
