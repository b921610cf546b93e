"""Posteriors over proportions, for topic models."""

from typing import final

import pyro.distributions as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ppvae.distributions.constraints import positive
from ppvae.errors.ranges import check_numbers
from ppvae.posteriors.amortized import Amortized
from ppvae.priors.simplex import DirichletDistribution, LogisticNormalDistribution


@final
class Dirichlet(Amortized):
    """A Dirichlet posterior over proportions, q(z | x) = Dirichlet(z; floor + softplus(net(x))).

    Draws have implicit reparameterisation gradients. The floor avoids concentrations at which draws underflow float32.

    Args:
        net: maps data [..., *event] to [..., latent].
        floor: the least concentration.

    Returns batch shape [...], event shape [latent]. Raises ValueError for a floor that is not positive.
    Source: Figurnov et al. 2018, Implicit reparameterization gradients (arXiv 1805.08498); Burkhardt and Kramer 2019,
    Decoupling sparsity and smoothness in the Dirichlet variational autoencoder topic model.

    >>> import torch
    >>> from ppvae.nn import mlp
    >>> Dirichlet(mlp(64, 8))(torch.zeros(5, 64)).shape()
    torch.Size([5, 8])
    """

    def __init__(self, net: nn.Module, floor: float = 1e-2):
        check_numbers(floor=floor)
        super().__init__(net)
        self.floor = positive("floor", floor)

    @staticmethod
    def outputs(latent: int) -> int:
        check_numbers(latent=latent)
        return latent

    def head(self, outputs: Tensor) -> dist.TorchDistribution:
        return DirichletDistribution(self.floor + F.softplus(outputs))


@final
class LogisticNormal(Amortized):
    """A logistic-normal posterior over proportions, z = softmax(y), y ~ N(loc(x), diag(exp(log_scale(x)))^2).

    Its density is that of the proportions, with respect to all elements but one (see `priors.LogisticNormal`).
    `net` maps data [..., *event] to [..., 2 * latent]: location and log-scale of y, in this order.
    Returns batch shape [...], event shape [latent].
    Source: Srivastava and Sutton 2017 (arXiv 1703.01488); Blei and Lafferty 2007, A correlated topic model.

    >>> import torch
    >>> from ppvae.nn import mlp
    >>> LogisticNormal(mlp(64, 2 * 8))(torch.zeros(5, 64)).shape()
    torch.Size([5, 8])
    """

    @staticmethod
    def outputs(latent: int) -> int:
        check_numbers(latent=latent)
        return 2 * latent

    def head(self, outputs: Tensor) -> dist.TorchDistribution:
        loc, log_scale = outputs.chunk(2, dim=-1)
        return LogisticNormalDistribution(loc, log_scale.exp())
