"""The doubly reparameterised gradient of the guide's parameters."""

from typing import final

import torch
from torch import Tensor

from ppvae.inference.particle_layout import ParticleLayout
from ppvae.inference.structure import Structure
from ppvae.objectives.gradients.estimator import GradientEstimator
from ppvae.objectives.protocol import LogWeightBound, PairCall
from ppvae.objectives.requirements import (
    require_fixed_maps,
    require_reparameterized_latents,
    require_sampled_latents,
)


class LatentGradientHook:
    """Multiplies the densities' gradient with respect to each latent by `weights` [particles, batch].

    Passed as `latent_hook=` to `terms`; `weights` is set after the forward pass, before the backward pass.
    """

    def __init__(self) -> None:
        self.weights: Tensor | None = None

    def __call__(self, name: str, value: Tensor, layout: ParticleLayout) -> Tensor:
        if not value.requires_grad:
            return value

        def weighted(gradient: Tensor) -> Tensor:
            assert self.weights is not None
            return gradient * layout.broadcast_weights(self.weights, name).to(gradient)

        entry = value.view_as(value)
        entry.register_hook(weighted)
        return entry


@final
class DReG(GradientEstimator):
    """Doubly reparameterised: the guide's score is reparameterised, too, which lowers the variance.

    The guide's gradient is sum_k d_k d log w_k / dz dz/dphi with d_k = r_k - d r_k / d log w_k: for IWAE the squared
    normalised weights. The model's parameters get the pathwise gradient. One backward pass: gradients are weighted
    where the guide's joint draw enters the densities, which is exact for hierarchical guides and for models that share
    parameters with the guide. Global latents are to the local ones what parameters are; their own ratio log p(theta) -
    log q(theta) has the pathwise gradient.
    Source: Tucker et al. 2019 (arXiv 1810.04152).
    """

    holds_latents = False

    def check_objective(self, objective: LogWeightBound) -> None:
        objective.dreg_weights(torch.zeros(objective.draws, 1))

    def check_structure(self, objective: LogWeightBound, s: Structure) -> None:
        require_reparameterized_latents(s, "dreg")
        require_sampled_latents(s, "dreg")
        require_fixed_maps(s, "dreg")

    def surrogate(self, objective: LogWeightBound, call: PairCall) -> Tensor:
        hook = LatentGradientHook()
        t = call.terms(frozen=("guide",), latent_hook=hook)
        hook.weights = objective.dreg_weights(objective.log_weights(t).detach())
        return objective.bound(t).sum()
