"""Reparameterisation gradients: pathwise, and sticking the landing."""

import warnings
from typing import final

from torch import Tensor

from ppvae.inference.structure import Structure
from ppvae.objectives.gradients.estimator import GradientEstimator
from ppvae.objectives.protocol import LogWeightBound, PairCall
from ppvae.objectives.requirements import (
    require_fixed_maps,
    require_reparameterized_latents,
    require_sampled_latents,
)


@final
class Pathwise(GradientEstimator):
    """The reparameterisation gradient: sum_k r_k (d log w_k / dz dz/dphi - d log q / dphi).

    Source: Kingma and Welling 2014 (arXiv 1312.6114); Burda et al. 2016 (arXiv 1509.00519) for K > 1.
    """

    holds_latents = False

    def check_structure(self, objective: LogWeightBound, s: Structure) -> None:
        require_reparameterized_latents(s, "pathwise")

    def surrogate(self, objective: LogWeightBound, call: PairCall) -> Tensor:
        return objective.total(call.terms())


@final
class STL(GradientEstimator):
    """Sticking the landing: the pathwise gradient without the guide's score, sum_k r_k d log w_k / dz dz/dphi.

    The guide's parameters are held constant in its density. The omitted score has mean zero where the bound is a mean
    of log-weights; the guide's gradient is then zero for every draw where the guide is the exact posterior. For other
    bounds with K > 1 the estimator is biased and warns.
    Source: Roeder et al. 2017 (arXiv 1703.09194); Tucker et al. 2019 (arXiv 1810.04152) for the bias.
    """

    holds_latents = False

    def check_objective(self, objective: LogWeightBound) -> None:
        if objective.draws > 1 and not objective.stl_unbiased:
            warnings.warn(
                f"STL is biased for {type(objective).__name__} with more than one particle: take gradient='dreg'",
                stacklevel=4,
            )

    def check_structure(self, objective: LogWeightBound, s: Structure) -> None:
        require_reparameterized_latents(s, "stl")
        require_sampled_latents(s, "stl")
        require_fixed_maps(s, "stl")

    def surrogate(self, objective: LogWeightBound, call: PairCall) -> Tensor:
        return objective.bound(call.terms(frozen=("guide",))).sum()
