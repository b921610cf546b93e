"""p-values of observed values among replicated ones."""

import torch
from torch import Tensor


def predictive_p(observed: Tensor, replicated: Tensor) -> Tensor:
    """The share of replicates [draws, ...] that are larger than the observed values [...], a tie counting one half.

    >>> predictive_p(torch.tensor([1.0, 5.0]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist()
    [0.75, 0.0]
    """
    return ((replicated > observed).double() + 0.5 * (replicated == observed).double()).mean(0)


def random_ranks(observed: Tensor, replicated: Tensor, generator: torch.Generator) -> Tensor:
    """How many of R replicates [R, ...] are larger than the observed values [...], ties broken at random: 0 .. R.

    Uniform where observed value and replicates are exchangeable.
    """
    ties = (replicated == observed).sum(0)
    share = torch.rand(ties.shape, generator=generator, dtype=torch.float64)
    return (replicated > observed).sum(0) + (share * (ties + 1)).long()


def jittered(ranks: Tensor, bins: int, generator: torch.Generator) -> Tensor:
    """Ranks 0 .. bins - 1 as numbers that are uniform on (0, 1) where the ranks are uniform."""
    return (ranks + torch.rand(ranks.shape, generator=generator, dtype=torch.float64)) / bins


def two_sided(p: float) -> float:
    """The two-sided p-value 2 min(p, 1 - p)."""
    return 2 * min(p, 1 - p)
