"""Supports as finite partitions, so that one law sums or integrates a density and one tests its sampler."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, Literal

import torch
from scipy.stats import chi2
from torch import Tensor

FAILURE = 1e-3  # the probability that some test by `p_value`, of all files, fails although its sampler is right
TESTS = 150  # there are fewer: each gets an equal share of it (Bonferroni)

Support = Tensor | Literal["real", "unit"]


def points(values: Iterable[float], dims: int = 1) -> Tensor:
    """Every vector of `dims` numbers out of `values`, [n, dims]."""
    return torch.tensor(list(itertools.product(values, repeat=dims)), dtype=torch.float64)


def bags(total: int, dims: int) -> Tensor:
    """Every vector of `dims` counts that sum to `total`."""
    every = points(range(total + 1), dims)
    return every[every.sum(-1) == total]


def grid(support: str, size: int = 100_001) -> tuple[Tensor, Tensor]:
    """Abscissae and trapezoid weights of the real line, or of (0, 1), fine where heavy tails and ends need it."""
    if support == "real":
        u = torch.linspace(-18, 18, size, dtype=torch.float64)
        x, slope = u.sinh(), u.cosh()
    else:
        u = torch.linspace(-36, 36, size, dtype=torch.float64)
        x = torch.sigmoid(u)
        slope = x * torch.sigmoid(-u)
    return x, slope * (u[1] - u[0])


def masses(fn: Any, support: Support) -> tuple[Tensor, Tensor]:
    """Points [n, *event] and the masses [n, *batch] that a distribution puts on them."""
    if isinstance(support, Tensor):
        x, weight = support, torch.ones(len(support), dtype=torch.float64)
    else:
        x, weight = grid(support)
    event = tuple(fn.event_shape)
    x = x.reshape(-1, *event)
    at = x.reshape(len(x), *(1,) * len(fn.batch_shape), *event)
    return x, fn.log_prob(at).exp() * weight.reshape(-1, *(1,) * len(fn.batch_shape))


def p_value(fn: Any, support: Support, draws: int = 5000, cells: int = 20) -> float:
    """The p-value of draws from a distribution [*batch] under its own log_prob, by a chi-square over all the batch.

    Counts on the points of a discrete support, those expected fewer than five times together; of a real variable in
    `cells` equally probable cells of its own distribution function.
    """
    with torch.no_grad():
        x, mass = masses(fn, support)
        sample = fn.sample((draws,))
    flat_mass = mass.reshape(len(x), -1).T  # [batch, points]
    sample = sample.reshape(draws, flat_mass.shape[0], -1).transpose(0, 1)  # [batch, draws, event]
    statistic, freedom = 0.0, 0
    for probability, drawn in zip(flat_mass, sample, strict=True):
        if isinstance(support, Tensor):
            counts = (drawn.double()[:, None] - x.reshape(len(x), -1)).abs().amax(-1).lt(1e-4).double().sum(0)
            assert counts.sum() == draws, "a draw outside the support"
            rare = probability * draws < 5
            counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
            expected = draws * torch.cat([probability[~rare], probability[rare].sum()[None]])
        else:
            inside = torch.linspace(0, 1, cells + 1, dtype=torch.float64)[1:-1]
            cumulative = probability.cumsum(0)
            at = torch.searchsorted(cumulative, inside)
            edges, below = x.flatten()[at], cumulative[at] - 0.5 * probability[at]
            cell = torch.searchsorted(edges, drawn.double().flatten().contiguous())
            counts = torch.bincount(cell, minlength=cells).double()
            expected = draws * torch.diff(below, prepend=torch.zeros(1), append=torch.ones(1))
        seen = expected > 1e-9
        assert counts[~seen].sum() == 0, "a draw where there is no mass"
        statistic += float(((counts - expected).square() / expected)[seen].sum())
        freedom += int(seen.sum()) - 1
    return float(chi2.sf(statistic, freedom)) if freedom else 1.0
