"""Likelihoods: modules that take a latent [..., latent] and return a distribution over one datum."""

from __future__ import annotations

from typing import Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae import distributions


def _event_dim(out: Tensor, z: Tensor) -> int:
    """How many dims of a network's output are one datum, given latent vectors [..., latent]."""
    return out.dim() - z.dim() + 1


class Bernoulli(nn.Module):
    """Independent Bernoulli pixels, log p(x | z) = sum_d x_d l_d - softplus(l_d), l = net(z).

    `net` maps [..., latent] to logits [..., *event]; data are 0 or 1. Returns batch shape [...], event shape [*event].
    Source: Kingma and Welling 2014 (arXiv 1312.6114), appendix C.1.

    >>> from ppvae.nn import mlp
    >>> Bernoulli(mlp(8, 64))(torch.zeros(5, 8)).shape()
    torch.Size([5, 64])
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        logits = self.net(z)
        return distributions.Bernoulli(logits=logits).to_event(_event_dim(logits, z))


class Normal(nn.Module):
    """Independent normal dims, log p(x | z) = sum_d log N(x_d; loc_d(z), scale_d).

    Args:
        net: maps [..., latent] to locations [..., *event].
        scale: a number (fixed), "learned" (one for all dims), or a shape, the event's, for one learned scale a dim.
        floor: the smallest learned scale. On data that are constant in a dim, a learned scale falls without a bound
            and bits per dimension with it; the floor ends that, and `at_floor` says that it did.

    Returns batch shape [...], event shape [*event].
    Source: Kingma and Welling 2014 (arXiv 1312.6114), appendix C.2; Rybkin et al. 2021 (arXiv 2006.13202) on the scale.

    >>> from ppvae.nn import mlp
    >>> Normal(mlp(8, 64), scale=0.1)(torch.zeros(5, 8)).shape()
    torch.Size([5, 64])
    """

    log_scale: Tensor

    def __init__(self, net: nn.Module, scale: float | Literal["learned"] | tuple[int, ...] = 1.0, floor: float = 1e-3):
        super().__init__()
        self.net, self.floor = net, floor
        if isinstance(scale, int | float):
            if scale <= 0:
                raise ValueError(f"scale: expected a positive number, found {scale}")
            self.register_buffer("log_scale", torch.tensor(float(scale)).log())
        elif scale == "learned":
            self.log_scale = nn.Parameter(torch.zeros(()))
        elif isinstance(scale, tuple):
            self.log_scale = nn.Parameter(torch.zeros(scale))
        else:
            raise ValueError(f"scale: expected a number, 'learned' or the event's shape, found {scale!r}")

    @property
    def at_floor(self) -> Tensor:
        """Which learned scales have reached the floor, shaped as the scale."""
        return self.log_scale.exp() <= 1.01 * self.floor

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        loc = self.net(z)
        scale = self.log_scale.exp()
        if isinstance(self.log_scale, nn.Parameter):
            scale = scale + self.floor
        return dist.Normal(loc, scale.expand(loc.shape)).to_event(_event_dim(loc, z))
