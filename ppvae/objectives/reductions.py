"""Reductions of log-weights [particles, ...] over their first dim, and what they are with one weight replaced.

`without(log_weight, others)` gives, in the shape of both, the reduction with each log-weight in turn replaced by the
other: in O(K) for K particles. Sums from both ends meet at the one that is left out; to take a weight off the whole
would lose all digits where it is nearly all.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_mean_exp(log_weight: Tensor) -> Tensor:
    """log (1/K) sum_k w_k."""
    return log_weight.logsumexp(0) - math.log(len(log_weight))


def sum_of_others(log_weight: Tensor) -> Tensor:
    """sum_{j != k} log w_j, [particles, ...]."""
    total = torch.zeros_like(log_weight)
    total[1:] += log_weight[:-1].cumsum(0)
    total[:-1] += log_weight[1:].flip(0).cumsum(0).flip(0)
    return total


def log_sum_exp_without(log_weight: Tensor, others: Tensor) -> Tensor:
    """log sum_k w_k with each w_k in turn replaced."""
    nothing = log_weight.new_full((1, *log_weight.shape[1:]), -torch.inf)
    before = torch.cat([nothing, log_weight[:-1].logcumsumexp(0)])
    after = torch.cat([log_weight[1:].flip(0).logcumsumexp(0).flip(0), nothing])
    return before.logaddexp(after).logaddexp(others)


def log_mean_exp_without(log_weight: Tensor, others: Tensor) -> Tensor:
    """log (1/K) sum_k w_k with each w_k in turn replaced."""
    return log_sum_exp_without(log_weight, others) - math.log(len(log_weight))


def mean_without(log_weight: Tensor, others: Tensor) -> Tensor:
    """(1/K) sum_k log w_k with each log w_k in turn replaced."""
    return log_weight.mean(0) + (others - log_weight) / len(log_weight)


def tempered_mean_without(log_weight: Tensor, others: Tensor, power: float) -> Tensor:
    """sum_k v_k log w_k, v = softmax(power log w), with each log w_k in turn replaced."""
    low = torch.minimum(log_weight, others).amin(0)  # log-weights above it have logarithms
    weighted = log_sum_exp_without(power * log_weight + (log_weight - low).log(), power * others + (others - low).log())
    return low + (weighted - log_sum_exp_without(power * log_weight, power * others)).exp()
