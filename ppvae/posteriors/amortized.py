"""The base class of amortised posteriors, and the point mass."""

from typing import final

import pyro.distributions as dist
from torch import Tensor, nn

from ppvae.errors.ranges import check_numbers
from ppvae.nn.context import call_with_context


class Amortized(nn.Module):
    """An amortised posterior, q(z | x) = head(net(x)); subclasses define `head`, and `outputs`.

    `outputs(latent)` is the number of network outputs for a latent of that size; ValueError where none fits.
    A network that declares `context` is given the batch's second tensor, q(z | x, c) = head(net(x, c)).
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def head(self, outputs: Tensor) -> dist.TorchDistribution:
        """The distribution with outputs [..., outputs]."""
        raise NotImplementedError

    def forward(self, x: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        return self.head(call_with_context(self.net, x, context=context))


@final
class Delta(Amortized):
    """A point mass at z = net(x): training with it maximises log p(x, z), which is MAP estimation of the latent.

    It is not absolutely continuous, so that importance weights under it are invalid: `log_marginal` and IWAE bounds
    refuse it by the name of the site (on a discrete latent the result is a lower bound only).
    `net` maps data [..., *event] to [..., latent]. Returns batch shape [...], event shape [latent].
    Source: pyro.distributions.Delta; Kingma and Welling 2014 (arXiv 1312.6114) for the entropy term that it omits.

    >>> import torch
    >>> from ppvae.nn import mlp
    >>> Delta(mlp(64, 8))(torch.zeros(5, 64)).shape()
    torch.Size([5, 8])
    """

    @staticmethod
    def outputs(latent: int) -> int:
        check_numbers(latent=latent)
        return latent

    def head(self, outputs: Tensor) -> dist.TorchDistribution:
        return dist.Delta(outputs, event_dim=1)
