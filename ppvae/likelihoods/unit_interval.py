"""Likelihoods of binary data, and with a density on [0, 1] for grey values."""

import pyro.distributions as dist
import torch
from torch import Tensor

from ppvae import distributions
from ppvae.likelihoods.network_outputs import NetworkLikelihood, event_dim, split_blocks


class Bernoulli(NetworkLikelihood):
    """Independent Bernoulli pixels, log p(x | z) = sum_d x_d l_d - softplus(l_d), l = net(z).

    `net` maps [..., latent] to logits [..., *event]; data are 0 or 1. Returns batch shape [...], event shape [*event].
    Source: Kingma and Welling 2014 (arXiv 1312.6114), appendix C.1.

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


class ContinuousBernoulli(NetworkLikelihood):
    """Independent continuous Bernoulli pixels, log p(x | z) = sum_d l_d x_d - log((e^l_d - 1) / l_d), l = net(z).

    `net` maps [..., latent] to logits [..., *event]; data lie in [0, 1], both ends included. A density in nats;
    returns batch shape [...], event shape [*event].
    Source: Loaiza-Ganem and Cunningham 2019 (arXiv 1907.06845): a Bernoulli is not normalised over grey values.

    >>> from ppvae.nn import mlp
    >>> ContinuousBernoulli(mlp(8, 64))(torch.zeros(5, 8)).shape()
    torch.Size([5, 64])
    """

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        logits = self.net(z)
        return distributions.ContinuousBernoulli(logits).to_event(event_dim(logits, z))


class Beta(NetworkLikelihood):
    """Independent beta pixels, log p(x | z) = sum_d (a_d - 1) log x_d + (b_d - 1) log(1 - x_d) - log B(a_d, b_d).

    `net` maps [..., latent] to [..., 2 * first, *rest]: log a, then log b, along the first event dim. Data lie in
    (0, 1) without the ends, where the density is zero or infinite: load pixels with `dequantize=True`. A density in
    nats; returns batch shape [...], event shape [first, *rest]. Raises ValueError for an output of odd size.
    Source: Loaiza-Ganem and Cunningham 2019 (arXiv 1907.06845), who compare it with the continuous Bernoulli.

    >>> from ppvae.nn import mlp
    >>> Beta(mlp(8, 2 * 64))(torch.zeros(5, 8)).shape()
    torch.Size([5, 64])
    """

    parameters_per_element = 2

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        log_a, log_b = split_blocks(self.net(z), z, 2, "log a, log b")
        return distributions.Beta(log_a.exp(), log_b.exp()).to_event(event_dim(log_a, z))
