"""The thermodynamic variational objective."""

import itertools
from typing import final

import torch
from torch import Tensor

from ppvae.errors import UsageError
from ppvae.errors.ranges import check_numbers
from ppvae.inference.structure import Structure
from ppvae.objectives.gradients import Gradient
from ppvae.objectives.objective import Objective
from ppvae.objectives.reductions import leave_one_out_tempered_mean
from ppvae.objectives.requirements import require_sampled_latents


@final
class TVO(Objective):
    """The left Riemann sum of log p(x) = int_0^1 E_b[log w] db: sum_j (b_{j+1} - b_j) sum_k v_jk log w_k.

    v_j = softmax(b_j log w) are the self-normalised weights of the draws under q^(1 - b) p^b, 0 = b_0 < b_1 < ... < 1,
    b_1, b_2, ..., 1 equally spaced in log b. One partition gives the ELBO.

    Args:
        num_particles: K, draws per datum.
        num_partitions: terms of the sum.
        first: b_1.
        gradient: "covariance", which needs no reparameterised latent and is consistent for the gradient of the exact
            Riemann sum as K grows; or "pathwise", "score", "vimco", unbiased for the value's expectation at this K.

    Raises:
        UsageError: fewer than one partition, or b_1 outside (0, 1).

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
        gradient: Gradient = "covariance",
    ):
        check_numbers(num_particles=num_particles, num_partitions=num_partitions, first=first)
        if num_partitions < 1 or not 0 < first < 1:
            raise UsageError(
                f"num_partitions and first: expected at least 1 and a number in (0, 1), found {num_partitions}, {first}"
            )
        self.num_partitions, self.first = num_partitions, first
        super().__init__(num_particles, gradient)

    @property
    def stl_unbiased(self) -> bool:
        return self.num_partitions == 1

    def check_structure(self, s: Structure) -> None:
        if self.num_partitions > 1:
            require_sampled_latents(s, "TVO", "take ELBO or CIWAE")
        super().check_structure(s)

    def partition(self) -> list[tuple[float, float]]:
        count = self.num_partitions
        ends = [0.0, *(self.first ** (1 - j / (count - 1)) for j in range(count - 1)), 1.0]
        return [(b, after - b) for b, after in itertools.pairwise(ends)]

    def reduce(self, log_weight: Tensor) -> Tensor:
        terms = [width * ((b * log_weight).softmax(0) * log_weight).sum(0) for b, width in self.partition()]
        return torch.stack(terms).sum(0)

    def learning_signal(self, log_weight: Tensor) -> Tensor:
        return super().learning_signal(log_weight) if self.num_partitions > 1 else log_weight / len(log_weight)

    def dreg_weights(self, log_weight: Tensor) -> Tensor:
        raise UsageError("TVO: expected a gradient other than 'dreg' and 'gdreg': its pathwise weights may be zero")

    def leave_one_out_bound(self, log_weight: Tensor, replacement: Tensor) -> Tensor:
        terms = [width * leave_one_out_tempered_mean(log_weight, replacement, b) for b, width in self.partition()]
        return torch.stack(terms).sum(0)
