"""The base class of amortised posteriors."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor, nn

from ppvae.nn.context import call_with_context


class Amortized(nn.Module):
    """An amortised posterior, q(z | x) = head(net(x)); subclasses define `head`.

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
