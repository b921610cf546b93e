"""Conditional priors, given a label or attributes."""

from __future__ import annotations

from typing import final

import pyro.distributions as dist
from torch import Tensor, nn


@final
class ConditionalNormal(nn.Module):
    """A normal prior given the batch's second tensor, log p(z | c) = sum_d log N(z_d; loc_d(c), exp(log_scale_d(c))).

    Args:
        net: maps the context [..., *] to [..., 2 * latent], location and log-scale in this order: an embedding of
            labels [...] (see `of_labels`), or a network of attributes [..., attributes].

    `forward(context=...)` returns the context's batch shape [...] and event shape [latent].
    Source: Sohn et al. 2015, Learning structured output representation using deep conditional generative models.

    >>> import torch
    >>> prior = ConditionalNormal.of_labels(10, latent=2)
    >>> prior(context=torch.tensor([3, 1, 4])).shape()
    torch.Size([3, 2])
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    @classmethod
    def of_labels(cls, num_labels: int, latent: int) -> ConditionalNormal:
        """One normal for each label 0 .. num_labels - 1: locations start at standard normal draws, scales at one."""
        table = nn.Embedding(num_labels, 2 * latent)
        nn.init.zeros_(table.weight[:, latent:].detach())
        return cls(table)

    def forward(self, *, context: Tensor) -> dist.TorchDistribution:
        loc, log_scale = self.net(context).chunk(2, dim=-1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)
