"""Whether ranks are uniform: a band that holds the whole empirical distribution, with its exact probability."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SMALLEST = 1e-12  # edge by edge; the band is wide there, and slow


def pointwise(count: int, bins: int) -> Tensor:
    """Two-sided p-values of every count at every edge, [bins - 1, count + 1].

    At edge i the number of `count` uniform ranks in the first i of `bins` bins is binomial(count, i / bins), and
    p = min(1, 2 min(P(C <= c), P(C >= c))).
    """
    c = torch.arange(count + 1, dtype=torch.float64)
    share = (torch.arange(1, bins, dtype=torch.float64) / bins).unsqueeze(-1)
    log_choose = math.lgamma(count + 1) - torch.lgamma(c + 1) - torch.lgamma(count - c + 1)
    mass = (log_choose + c * share.log() + (count - c) * torch.log1p(-share)).exp()
    below, above = mass.cumsum(1), mass.flip(1).cumsum(1).flip(1)
    log_p = (2 * torch.minimum(below, above)).clamp(max=1.0).log()
    return ((log_p * 1e9).round() / 1e9).exp()  # what is equal by symmetry must not differ by rounding


def escape(level: float, count: int, bins: int, table: Tensor) -> float:
    """P(some edge's p-value is `level` or less) for `count` uniform ranks; `table` is what `pointwise` gives.

    Exact: counts at successive edges are a Markov chain, C_(i+1) - C_i given C_i being binomial with count - C_i trials
    and probability 1 / (bins - i).
    Source: Säilynoja, Bürkner and Vehtari 2022, Graphical test for discrete uniformity (arXiv 2103.10522).

    >>> table = pointwise(50, 2)  # one edge: the band's error is the level itself, up to what is discrete
    >>> 0.02 < escape(0.05, 50, 2, table) <= 0.05
    True
    """
    if bool((table <= level).all(1).any()):  # an edge with no count above the level
        return 1.0
    low, high = bounds(level, table)
    log_factorial = torch.lgamma(torch.arange(count + 2, dtype=torch.float64) + 1)
    at, weight = torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.float64)
    for i in range(bins - 1):
        to = torch.arange(int(low[i]), int(high[i]) + 1)
        left, new = (count - at)[:, None], to[None] - at[:, None]
        legal = (new >= 0) & (new <= left)
        step = new.clamp(min=0).minimum(left)
        share = 1 / (bins - i)
        log_mass = log_factorial[left] - log_factorial[step] - log_factorial[left - step]
        log_mass = log_mass + step.double() * math.log(share) + (left - step).double() * math.log1p(-share)
        weight = weight @ torch.where(legal, log_mass.exp(), torch.zeros_like(log_mass))
        at = to
    return max(0.0, 1.0 - float(weight.sum()))


def bounds(level: float, table: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and largest count at every edge whose p-value is above a level, each [bins - 1]."""
    inside = (table > level).to(torch.int64)
    return inside.argmax(1), table.shape[1] - 1 - inside.flip(1).argmax(1)


def p_value(ranks: Tensor, bins: int, table: Tensor) -> float:
    """How probable a departure as large as that of ranks [R], in 0 .. bins - 1, is if they are uniform.

    Below 1e-10 it is that number or less: smaller ones are lost in rounding.
    """
    counts = torch.bincount(ranks.long(), minlength=bins).cumsum(0)[:-1]
    smallest = float(table[torch.arange(bins - 1), counts].min())
    return escape(max(smallest, SMALLEST), len(ranks), bins, table)


def band(alpha: float, count: int, bins: int, table: Tensor) -> tuple[Tensor, Tensor]:
    """Counts at every edge between which all those of uniform ranks stay with probability 1 - alpha or more."""
    # the band changes at these alone, and by the union bound is never left too often at alpha / bins
    levels = table[(table >= alpha / bins) & (table <= alpha)].unique()
    low, high = 0, len(levels)
    while low < high:  # the first level whose band is left too often
        middle = (low + high) // 2
        low, high = (low, middle) if escape(float(levels[middle]), count, bins, table) > alpha else (middle + 1, high)
    return bounds(float(levels[low - 1]) if low else alpha / bins, table)
