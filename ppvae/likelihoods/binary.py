"""Likelihoods of binary data."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor

from ppvae import distributions
from ppvae.likelihoods.network_outputs import NetworkLikelihood, event_dim


class Bernoulli(NetworkLikelihood):
    """Independent Bernoulli pixels, log p(x | z) = sum_d x_d l_d - softplus(l_d), l = net(z).

    `net` maps [..., latent] to logits [..., *event]; data are 0 or 1. Returns batch shape [...], event shape [*event].
    Source: Kingma and Welling 2014 (arXiv 1312.6114), appendix C.1.

    >>> import torch
    >>> from ppvae.nn import mlp
    >>> Bernoulli(mlp(8, 64))(torch.zeros(5, 8)).shape()
    torch.Size([5, 64])
    """

    def output_for_mean(self, mean: Tensor) -> Tensor:
        """The output at which pixels have a mean [*event], clamped to [0.001, 0.999]: to initialise the output bias."""
        return torch.logit(mean.double().clamp(0.001, 0.999)).to(mean.dtype)

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        logits = self.net(z)
        return distributions.Bernoulli(logits=logits).to_event(event_dim(logits, z))
