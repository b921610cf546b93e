"""Posteriors: modules that take data and return a distribution over its latent, amortised by a network."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor, nn


class DiagonalNormal(nn.Module):
    """A normal posterior with independent dims, q(z | x) = N(z; loc(x), diag(exp(log_scale(x)))^2).

    `net` maps data [..., *event] to [..., 2 * latent]: location and log-scale, in this order.
    Returns a distribution of batch shape [...] and event shape [latent].
    Source: Kingma and Welling 2014 (arXiv 1312.6114).

    >>> import torch
    >>> from ppvae.nn import mlp
    >>> DiagonalNormal(mlp(64, 2 * 8))(torch.zeros(5, 64)).shape()
    torch.Size([5, 8])
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> dist.TorchDistribution:
        loc, log_scale = self.net(x).chunk(2, dim=-1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)
