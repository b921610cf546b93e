"""Resampling of weighted particles, per datum: effective sample size, systematic and multinomial ancestors."""

import torch
from torch import Tensor


def effective_sample_size(log_weight: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 over the first dim of log-weights [K, ...]."""
    return (2 * log_weight.logsumexp(0) - (2 * log_weight).logsumexp(0)).exp()


def systematic_resampling(log_weight: Tensor, uniform: Tensor) -> Tensor:
    """Indices [K, batch] drawn in proportion to the weights [K, batch], from one uniform number per datum, [batch]."""
    count = len(log_weight)
    cdf = log_weight.nan_to_num(-torch.inf, torch.inf, -torch.inf).softmax(0).cumsum(0)
    quantiles = (torch.arange(count, device=uniform.device)[:, None] + uniform) / count * cdf[-1]
    return torch.searchsorted(cdf.T.contiguous(), quantiles.T.contiguous(), right=True).T.clamp(max=count - 1)


def systematic_ancestors(log_weight: Tensor) -> Tensor:
    """Indices [K, batch] by systematic resampling, with a uniform number per datum of torch's global generator."""
    uniform = torch.rand(log_weight.shape[1], dtype=log_weight.dtype, device=log_weight.device)
    return systematic_resampling(log_weight.detach(), uniform)


def multinomial_ancestors(log_weight: Tensor) -> Tensor:
    """Indices [K, batch], independent draws in proportion to the weights [K, batch]: P(a) = prod_k w_{a_k} / sum w."""
    return torch.multinomial(log_weight.detach().softmax(0).T, len(log_weight), replacement=True).T
