"""What amortised posteriors share: one network, whose outputs they read."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor, nn

from ppvae.nn.context import call_with_context


class Amortized(nn.Module):
    """A posterior that a network's outputs stand for, q(z | x) = head(net(x)); subclasses say what `head` is.

    A network that declares `context` is given the batch's second tensor under that name, q(z | x, c) = head(net(x, c)).
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def head(self, outputs: Tensor) -> dist.TorchDistribution:
        """The distribution that outputs [..., outputs] stand for."""
        raise NotImplementedError

    def forward(self, x: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        return self.head(call_with_context(self.net, x, context=context))
