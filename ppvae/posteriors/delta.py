"""A point instead of a distribution."""

from __future__ import annotations

from typing import final

import pyro.distributions as dist
from torch import Tensor

from ppvae.posteriors.amortized import Amortized


@final
class Delta(Amortized):
    """A point mass at z = net(x): training with it maximises log p(x, z), which is MAP estimation of the latent.

    It has no density, and importance weights under it mean nothing: `log_marginal` and bounds of the IWAE kind refuse
    it by the site's name (on a discrete latent they call their result a lower bound only).
    `net` maps data [..., *event] to [..., latent]. Returns batch shape [...], event shape [latent].
    Source: pyro.distributions.Delta; Kingma and Welling 2014 (arXiv 1312.6114) for what it leaves out.

    >>> import torch
    >>> from ppvae.nn import mlp
    >>> Delta(mlp(64, 8))(torch.zeros(5, 64)).shape()
    torch.Size([5, 8])
    """

    @staticmethod
    def outputs(latent: int) -> int:
        """How many outputs the network has."""
        return latent

    def head(self, outputs: Tensor) -> dist.TorchDistribution:
        """The point mass at outputs [..., latent]."""
        return dist.Delta(outputs, event_dim=1)
