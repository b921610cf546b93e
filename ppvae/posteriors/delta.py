"""The point-mass posterior."""

from __future__ import annotations

from typing import final

import pyro.distributions as dist
from torch import Tensor

from ppvae.posteriors.amortized import Amortized


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
        """The number of network outputs."""
        return latent

    def head(self, outputs: Tensor) -> dist.TorchDistribution:
        """The point mass at outputs [..., latent]."""
        return dist.Delta(outputs, event_dim=1)
