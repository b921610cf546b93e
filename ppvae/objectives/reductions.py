"""Reductions of log-weights [particles, ...] over their first dim, and their leave-one-out forms.

`leave_one_out_*(log_weight, replacement)`, both [particles, ...], is [particles, ...]: entry k is the reduction with
log-weight k replaced by replacement k, in O(K) for K particles. Cumulative sums from both ends are combined;
subtracting log-weight k from the full sum would cancel all digits where it dominates.
"""

import math

import torch
from torch import Tensor


def log_mean_exp(log_weight: Tensor) -> Tensor:
    """log (1/K) sum_k w_k."""
    return log_weight.logsumexp(0) - math.log(len(log_weight))


def leave_one_out_sum(log_weight: Tensor) -> Tensor:
    """sum_{j != k} log w_j, without a replacement: [particles, ...]."""
    total = torch.zeros_like(log_weight)
    total[1:] += log_weight[:-1].cumsum(0)
    total[:-1] += log_weight[1:].flip(0).cumsum(0).flip(0)
    return total


def leave_one_out_log_sum_exp(log_weight: Tensor, replacement: Tensor) -> Tensor:
    """log sum_k w_k."""
    empty = log_weight.new_full((1, *log_weight.shape[1:]), -torch.inf)
    before = torch.cat([empty, log_weight[:-1].logcumsumexp(0)])
    after = torch.cat([log_weight[1:].flip(0).logcumsumexp(0).flip(0), empty])
    return before.logaddexp(after).logaddexp(replacement)


def leave_one_out_log_mean_exp(log_weight: Tensor, replacement: Tensor) -> Tensor:
    """log (1/K) sum_k w_k."""
    return leave_one_out_log_sum_exp(log_weight, replacement) - math.log(len(log_weight))


def leave_one_out_mean(log_weight: Tensor, replacement: Tensor) -> Tensor:
    """(1/K) sum_k log w_k."""
    return log_weight.mean(0) + (replacement - log_weight) / len(log_weight)


def leave_one_out_tempered_mean(log_weight: Tensor, replacement: Tensor, power: float) -> Tensor:
    """sum_k v_k log w_k with v = softmax(power log w)."""
    low = torch.minimum(log_weight, replacement).amin(0)  # the differences from it are positive and have logarithms
    weighted = leave_one_out_log_sum_exp(
        power * log_weight + (log_weight - low).log(), power * replacement + (replacement - low).log()
    )
    return low + (weighted - leave_one_out_log_sum_exp(power * log_weight, power * replacement)).exp()
