"""The uniform prior on the unit sphere."""

import math
from collections.abc import Sequence
from typing import final

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from ppvae.distributions.batch_shape import ParametricDistribution
from ppvae.errors import UsageError
from ppvae.errors.ranges import check_numbers


@final
class SphericalUniform(ParametricDistribution):
    """The uniform distribution of unit vectors, log p(z) = lgamma(D / 2) - log 2 - (D / 2) log pi, D elements.

    The density is with respect to the sphere's surface.

    >>> SphericalUniform(torch.zeros(3)).log_prob(torch.tensor([0.0, 0.6, 0.8])), -math.log(4 * math.pi)
    (tensor(-2.5310), -2.5310242469692907)
    """

    support = constraints.sphere
    has_rsample = True

    def __init__(self, like: Tensor, validate_args: bool | None = None):
        self.like = like
        super().__init__(torch.Size(), like.shape, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """The origin, which is no unit vector."""
        return self.like.expand(self.shape())

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        return normalize(torch.randn(shape, dtype=self.like.dtype, device=self.like.device))

    def _log_prob(self, value: Tensor) -> Tensor:
        half = len(self.like) / 2
        log_area = math.log(2) + half * math.log(math.pi) - math.lgamma(half)
        return value.new_full(torch.broadcast_shapes(self.batch_shape, value.shape[:-1]), -log_area)


def normalize(x: Tensor) -> Tensor:
    """x / |x|, finite and of length one for any finite x but zero, which gives zero."""
    x = x / x.detach().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


@final
class UniformOnSphere(nn.Module):
    """The uniform prior over unit vectors, the prior for `posteriors.PowerSpherical`.

    log p(z) = lgamma(D / 2) - log 2 - (D / 2) log pi with respect to the surface of the sphere in D dims.

    Args:
        latent: D, the number of elements of z; the sphere has one dim less.

    Returns batch shape [], event shape [latent]. Raises ValueError for latent < 2.
    Source: Davidson et al. 2018, Hyperspherical variational auto-encoders (arXiv 1804.00891).

    >>> bool((torch.linalg.norm(UniformOnSphere(3)().sample()) - 1).abs() < 1e-6)
    True
    """

    def __init__(self, latent: int):
        check_numbers(latent=latent)
        super().__init__()
        if latent < 2:
            raise UsageError(f"latent: expected at least 2 elements of a unit vector, found {latent}")
        self.like = nn.Buffer(torch.zeros(latent), persistent=False)

    def forward(self) -> dist.TorchDistribution:
        return SphericalUniform(self.like)
