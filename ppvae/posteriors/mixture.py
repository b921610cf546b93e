"""Mixtures of posteriors of any families."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor, nn

from ppvae.distributions.mixture import StratifiedMixture
from ppvae.errors import UsageError
from ppvae.nn.context import call_with_context


@final
class Mixture(nn.Module):
    """A mixture of posteriors of any families, q(z | x) = sum_m w_m(x) q_m(z | x), by default of equal weights 1 / M.

    Each component gets its share of the particles, and every particle is weighed by the density of the whole mixture,
    so that a component need not cover what another one covers: under ELBO with M particles this is the multiple
    importance sampling ELBO, under IWAE with more particles its tighter bound. Components start apart where their
    networks do; equal ones stay equal. Weights that are trained have no pathwise gradient: the posterior is then not
    reparameterised, and an objective takes a score-function estimator, as IWAE(K, gradient="vimco"); draws are
    independent in training and stratified in evaluation.

    Args:
        components: posteriors over one space, such as `DiagonalNormal(net)` and `SplineCoupling(other)`; they may
            share layers. The batch's second tensor is given to those that declare `context`.
        weights: "equal"; "learned", M parameters, equal at first; or a network from x to their logits [..., M].

    Returns batch shape [...], event shape [latent]. Reparameterised if all components are and weights are equal.
    Raises UsageError for other weights, for fewer than two components, or for components over different spaces.
    Source: Kviman et al. 2022, Multiple importance sampling ELBO and deep ensembles of variational approximations
    (arXiv 2202.10951); Kviman et al. 2023 (arXiv 2209.15514) for VAEs.

    >>> import torch
    >>> from ppvae.nn import mlp
    >>> from ppvae.posteriors import DiagonalNormal, FullRank
    >>> two = Mixture([DiagonalNormal(mlp(64, 2 * 8)), FullRank(mlp(64, FullRank.outputs(8)))])
    >>> two(torch.zeros(5, 64)).shape()
    torch.Size([5, 8])
    """

    def __init__(self, components: Sequence[nn.Module], weights: nn.Module | Literal["equal", "learned"] = "equal"):
        super().__init__()
        if len(components) < 2:
            raise UsageError(f"components: expected two or more posteriors, found {len(components)}")
        if not isinstance(weights, nn.Module) and weights not in ("equal", "learned"):
            raise UsageError(f"weights: expected 'equal', 'learned' or a network of logits, found {weights!r}")
        self.components = nn.ModuleList(components)
        self.weights = weights if isinstance(weights, nn.Module) else None
        self.logits = nn.Parameter(torch.zeros(len(components))) if weights == "learned" else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> StratifiedMixture:
        logits = self.logits if self.weights is None else call_with_context(self.weights, x, context=context)
        return StratifiedMixture(
            [call_with_context(part, x, context=context) for part in self.components], logits=logits
        )
