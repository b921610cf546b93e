"""Gradients of log-densities with respect to the latents, separate from how the latents depend on parameters."""

from collections.abc import Container

import torch
from torch import Tensor

from ppvae.inference.particle_layout import ParticleLayout
from ppvae.inference.sites import Site, graph_leaves

LatentGradients = dict[tuple[str, int], Tensor]  # by (site, particle of a run with one particle), shaped as the value


class LatentLeaves:
    """Replaces each latent by a leaf of the autograd graph where it enters the densities.

    Passed as `latent_hook=` to `terms`.

    Args:
        names: the latents that are replaced; None for all.

    Attributes:
        entries: (the reparameterised value, its leaf, the layout of its run) of each latent.
    """

    def __init__(self, names: Container[str] | None = None) -> None:
        self.names = names
        self.entries: dict[tuple[str, int], tuple[Tensor, Tensor, ParticleLayout]] = {}

    def __call__(self, name: str, value: Tensor, layout: ParticleLayout) -> Tensor:
        if self.names is not None and name not in self.names:
            return value.view_as(value)
        if not value.is_floating_point():
            return value
        leaf = value.detach().requires_grad_()
        self.entries[name, layout.particle] = value, leaf, layout
        return leaf

    def gradients(self, log_prob: Tensor, latent: str = "") -> LatentGradients:
        """d log_prob / dz per draw and datum, for one latent or for all."""
        keys = [key for key in self.entries if not latent or key[0] == latent]
        leaves = [self.entries[key][1] for key in keys]
        if not keys or not log_prob.requires_grad:
            return {key: torch.zeros_like(leaf) for key, leaf in zip(keys, leaves, strict=True)}
        gradients = torch.autograd.grad(
            log_prob.sum(), leaves, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return dict(zip(keys, gradients, strict=True))

    def path_surrogate(self, gradients: LatentGradients, weights: Tensor) -> Tensor:
        """A scalar whose gradient is sum_k weights_k gradients_k dz_k/dphi; weights are [particles, batch]."""
        total = torch.zeros((), dtype=weights.dtype, device=weights.device)
        for key, gradient in gradients.items():
            value, _, layout = self.entries[key]
            if value.requires_grad:
                total = total + (value * (layout.broadcast_weights(weights, key[0]).to(gradient) * gradient)).sum()
        return total

    def has_parameters(self, site: Site) -> bool:
        """Whether a site's log-density depends on a parameter, beyond the latents."""
        latents = {id(leaf) for _, leaf, _ in self.entries.values()}
        return any(id(leaf) not in latents for leaf in graph_leaves(site.log_prob))
