"""Priors: modules that take nothing and return a distribution over one datum's latent."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn


class StandardNormal(nn.Module):
    """The standard normal prior over a vector, log p(z) = -|z|^2 / 2 - (latent / 2) log(2 pi).

    Returns a distribution of batch shape [] and event shape [latent].
    Source: Kingma and Welling 2014 (arXiv 1312.6114).

    >>> StandardNormal(2)().log_prob(torch.zeros(2))
    tensor(-1.8379)
    """

    loc: Tensor

    def __init__(self, latent: int):
        super().__init__()
        self.register_buffer("loc", torch.zeros(latent), persistent=False)

    def forward(self) -> dist.TorchDistribution:
        return dist.Normal(self.loc, torch.ones_like(self.loc)).to_event(1)
