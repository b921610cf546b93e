"""Mixtures of posteriors of any families."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch import Tensor, nn

from ppvae.distributions.mixture import StratifiedMixture
from ppvae.errors import UsageError
from ppvae.nn.context import call_with_context


@final
class Mixture(nn.Module):
    """A mixture of posteriors of any families with equal weights, q(z | x) = (1 / M) sum_m q_m(z | x).

    Each component gets its share of the particles, and every particle is weighed by the density of the whole mixture,
    so that a component need not cover what another one covers: under ELBO with M particles this is the multiple
    importance sampling ELBO, under IWAE with more particles its tighter bound. Components start apart where their
    networks do; equal ones stay equal.

    Args:
        components: posteriors over one space, such as `DiagonalNormal(net)` and `SplineCoupling(other)`; they may
            share layers. The batch's second tensor is given to those that declare `context`.

    Returns batch shape [...], event shape [latent]. Reparameterised if all components are.
    Raises UsageError for fewer than two components, or for components over different spaces.
    Source: Kviman et al. 2022, Multiple importance sampling ELBO and deep ensembles of variational approximations
    (arXiv 2202.10951); Kviman et al. 2023 (arXiv 2209.15514) for VAEs.

    >>> import torch
    >>> from ppvae.nn import mlp
    >>> from ppvae.posteriors import DiagonalNormal, FullRank
    >>> two = Mixture([DiagonalNormal(mlp(64, 2 * 8)), FullRank(mlp(64, FullRank.outputs(8)))])
    >>> two(torch.zeros(5, 64)).shape()
    torch.Size([5, 8])
    """

    def __init__(self, components: Sequence[nn.Module]):
        super().__init__()
        if len(components) < 2:
            raise UsageError(f"components: expected two or more posteriors, found {len(components)}")
        self.components = nn.ModuleList(components)

    def forward(self, x: Tensor, context: Tensor | None = None) -> StratifiedMixture:
        return StratifiedMixture([call_with_context(part, x, context=context) for part in self.components])
