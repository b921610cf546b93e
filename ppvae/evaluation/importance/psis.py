"""Pareto-smoothed importance sampling for many data at once: the k-hat diagnostic, and smoothed weights for export.

Both give what ArviZ 0.23 gives (`arviz.psislw`, which loops over data). They follow Vehtari, Simpson, Gelman, Yao and
Gabry (2024), "Pareto smoothed importance sampling", JMLR 25(72), arXiv 1507.02646, with the generalised-Pareto fit of
Zhang and Stephens (2009), "A new and efficient estimation method for the generalized Pareto distribution",
Technometrics 51(3), 316-325. All arithmetic is in float64. Three rules are ours: fewer than 25 particles give NaN,
log-weights that spread less than 1e-6 give -inf, and a datum with unusable weights (NaN, +inf, or all -inf) gives NaN.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ppvae.errors import UsageError

MIN_PARTICLES = 25  # a tail of five, the fewest that the fit takes
EQUAL_SPREAD = 1e-6  # log-weights closer together than this are equal: nothing is left to diagnose
_LOG_TINY = math.log(torch.finfo(torch.float64).tiny)
_GRID_ELEMENTS = 2**20  # in one [data, grid, tail] temporary: 8 MiB, however many data there are


class _Tail(NamedTuple):
    """Per datum, relative to its largest weight: the excesses over the cutoff [N, M] (ascending, 0 outside the tail),
    how many there are [N], the cutoff [N], and the fitted shape and scale [N]."""

    excess: Tensor
    size: Tensor
    cutoff: Tensor
    k: Tensor
    sigma: Tensor


def tail_length(num_particles: int) -> int:
    """How many of the largest of K weights make up the tail: M = ceil(min(K / 5, 3 sqrt(K))).

    As in Vehtari et al. (2024) and ArviZ 0.x; ArviZ 1.x rounds down.

    >>> [tail_length(k) for k in (25, 100, 5000)]
    [5, 20, 213]
    """
    return math.ceil(min(num_particles / 5.0, 3 * num_particles**0.5))


@torch.no_grad()
def pareto_k(top: Tensor, num_particles: int, smallest: Tensor) -> Tensor:
    """Pareto shape k-hat [N] (float64) of each datum's importance weights, from the largest of them alone.

    With M = `tail_length(K)`, the weights above the (M + 1)-th largest are fitted by a generalised Pareto distribution,
    and the fitted k is drawn towards 1/2 as if by ten further observations: k-hat = (n k + 10 / 2) / (n + 10), where
    n <= M counts the weights strictly above the cutoff (ties with it are left out). Weights have finite moments up to
    about the order 1 / k-hat; above min(0.7, 1 - 1 / log10 K) their average is unreliable (Vehtari et al. 2024).

    Args:
        top: [N, M + 1 or more], the largest log-weights of each datum in any order.
        num_particles: K, the number of weights that `top` was taken from.
        smallest: [N], the smallest log-weight of each datum (tells equal weights from a tie at the top); may be -inf.

    Returns:
        [N]: NaN where K < 25, or a log-weight is NaN or +inf, or all are -inf; -inf where all K log-weights lie within
        1e-6; +inf where four or fewer weights lie above the cutoff, as in ArviZ (so also where M + 1 weights tie for
        the largest), or where the fit fails; else the fitted value.

    Raises:
        UsageError: `top` has fewer than M + 1 columns.

    Example: weights with the quantiles of a Pareto distribution of shape 1/2.

        >>> log_weights = -0.5 * torch.log1p(-(torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
        >>> top = log_weights.topk(tail_length(1000) + 1).values
        >>> pareto_k(top[None], 1000, log_weights.min()[None])
        tensor([0.4971], dtype=torch.float64)
    """
    if num_particles < MIN_PARTICLES:
        return torch.full_like(smallest, math.nan, dtype=torch.float64)
    needed = tail_length(num_particles) + 1
    if top.dim() != 2 or top.shape[1] < needed:
        raise UsageError(
            f"pareto_k: expected top [N, {needed}], the {needed} largest of {num_particles} log-weights of each datum; "
            f"found {list(top.shape)}"
        )
    rows = _rows_at_once(needed - 1)
    blocks = zip(top.double().split(rows), smallest.double().split(rows), strict=True)
    return torch.cat([_mark_degenerate(_fit_tail(a.topk(needed, dim=1).values).k, a.amax(1), b) for a, b in blocks])


@torch.no_grad()
def smoothed(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Pareto-smoothed, normalised log-weights [K, N] and k-hat [N], in float64, from log-weights [K, N].

    The n weights above the cutoff u are replaced, in their order, by u + F^-1((i - 1/2) / n) for i = 1..n, with F the
    fitted generalised Pareto distribution, and truncated at the largest raw weight; then each datum's weights are made
    to sum to one (Vehtari et al. 2024). Where k-hat, as `pareto_k` gives it, is not finite, they are only normalised. A
    datum with NaN, +inf or nothing but -inf gets NaN throughout.

        >>> log_weights = 3 * torch.randn(400, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> log_w, k_hat = smoothed(log_weights)
        >>> log_w.exp().sum(0), k_hat.shape
        (tensor([1.0000, 1.0000], dtype=torch.float64), torch.Size([2]))
    """
    rows = _rows_at_once(tail_length(len(log_weights)))
    parts = [_smooth(block) for block in log_weights.double().split(rows, dim=1)]
    return torch.cat([weights for weights, _ in parts], dim=1), torch.cat([k_hat for _, k_hat in parts])


def _smooth(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    largest = log_weights.amax(0)
    relative = log_weights - largest
    if len(log_weights) < MIN_PARTICLES:
        return relative - relative.logsumexp(0), torch.full_like(largest, math.nan)
    tail_size = tail_length(len(log_weights))
    top, index = log_weights.topk(tail_size + 1, dim=0)
    tail = _fit_tail(top.T)
    k_hat = _mark_degenerate(tail.k, largest, log_weights.amin(0))
    index = index[:tail_size].flip(0)  # ascending, as the tail is
    values = torch.where(k_hat.isfinite()[:, None], _order_statistics(tail), math.nan).T
    relative.scatter_(0, index, torch.where(values.isnan(), relative.gather(0, index), values))
    return relative - relative.logsumexp(0), k_hat


def _rows_at_once(tail_size: int) -> int:
    return max(1, _GRID_ELEMENTS // max(1, tail_size * _grid_size(tail_size)))


def _grid_size(tail_size: int) -> int:
    return 30 + math.isqrt(tail_size)


def _mark_degenerate(k: Tensor, largest: Tensor, smallest: Tensor) -> Tensor:
    """The fitted shape [N], but -inf for equal weights and NaN for unusable ones."""
    k_hat = torch.where(largest - smallest < EQUAL_SPREAD, -math.inf, k)
    return torch.where(largest.isfinite() & ~smallest.isnan(), k_hat, math.nan)


def _fit_tail(top: Tensor) -> _Tail:
    """The tail of the M + 1 largest log-weights [N, M + 1], given in descending order."""
    largest = top[:, :1]
    # a datum without a finite maximum is judged later; here it must only do no harm
    relative = torch.where(largest.isfinite(), top - largest, 0.0).flip(1)
    log_cutoff = relative[:, :1].clamp(min=_LOG_TINY)
    inside = relative[:, 1:] > log_cutoff
    excess = torch.where(inside, relative[:, 1:].exp() - log_cutoff.exp(), 0.0)
    size = inside.sum(1)
    k, sigma = excess.new_full((2, len(top)), math.inf)
    rows = (size > 4).nonzero()[:, 0]
    k[rows], sigma[rows] = _fit_pareto(excess[rows], size[rows])
    return _Tail(excess, size, log_cutoff.exp()[:, 0], k, sigma)


def _fit_pareto(excess: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Shape, drawn towards 1/2, and scale of excesses [R, M]: each [R].

    Zhang and Stephens average b = -k / sigma over a grid, weighted by its profile likelihood: given b, k is the mean of
    log(1 - b x), and the log-likelihood is n (log(-b / k) - k - 1).
    """
    n = size.double()[:, None]
    mean = excess.sum(1, keepdim=True) / n
    quartile = excess.gather(1, (excess.shape[1] - size + (size + 2) // 4 - 1)[:, None])
    grid = 30 + n.sqrt().floor()
    step = torch.arange(1, _grid_size(excess.shape[1]) + 1, dtype=n.dtype, device=n.device).expand(len(n), -1)
    b = (1 - (grid / (step.minimum(grid) - 0.5)).sqrt()) / (3 * quartile) + 1 / excess[:, -1:]
    k = (-b[:, :, None] * excess[:, None, :]).log1p_().sum(2) / n  # outside the tail the excess is 0 and adds nothing
    # At b = 0, which a tail of equal weights can hit exactly, -b / k has the exponential distribution's limit. ArviZ
    # 0.x has 0 / 0 there, loses the whole grid to NaN, and returns the prior's 5 / (n + 10).
    log_likelihood = n * (torch.where(b == 0, 1 / mean, -b / k).log() - k - 1)
    weight = log_likelihood.masked_fill(step > grid, -math.inf).softmax(1)
    weight = torch.where(weight < 10 * torch.finfo(weight.dtype).eps, 0.0, weight)  # NaN stays
    b_mean = (b * weight / weight.sum(1, keepdim=True)).sum(1, keepdim=True)
    k = (-b_mean * excess).log1p().sum(1, keepdim=True) / n
    sigma = torch.where(b_mean == 0, mean, -k / b_mean)
    # The fit fails where excesses underflow. ArviZ 0.x then gives NaN or, again, 5 / (n + 10): bad, but it looks good.
    k_hat = torch.where(k.isnan(), math.inf, (n * k + 5) / (n + 10))
    return k_hat[:, 0], sigma[:, 0]


def _order_statistics(tail: _Tail) -> Tensor:
    """Log of the fitted order statistics [N, M] relative to the largest raw weight, NaN outside the tail."""
    tail_size = tail.excess.shape[1]
    rank = torch.arange(tail_size, dtype=tail.k.dtype, device=tail.k.device) - (tail_size - tail.size)[:, None]
    log_survival = torch.log1p(-(rank + 0.5) / tail.size[:, None])
    k = tail.k[:, None]
    quantile = torch.where(k == 0, -log_survival, torch.expm1(-k * log_survival) / k)
    values = (tail.sigma[:, None] * quantile + tail.cutoff[:, None]).log().clamp(max=0.0)
    return torch.where(rank >= 0, values, math.nan)
