"""Normal posteriors with diagonal, full-rank and low-rank covariance."""

import math
from typing import Any, final

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions.kl import register_kl

from ppvae.errors import UsageError
from ppvae.errors.ranges import check_numbers
from ppvae.posteriors.amortized import Amortized


@final
class DiagonalNormal(Amortized):
    """A normal posterior with independent dims, q(z | x) = N(z; loc(x), diag(exp(log_scale(x)))^2).

    `net` maps data [..., *event] to [..., 2 * latent]: location and log-scale, in this order.
    Returns a distribution of batch shape [...] and event shape [latent].
    Source: Kingma and Welling 2014 (arXiv 1312.6114).

    >>> from ppvae.nn import mlp
    >>> DiagonalNormal(mlp(64, 2 * 8))(torch.zeros(5, 64)).shape()
    torch.Size([5, 8])
    """

    @staticmethod
    def outputs(latent: int) -> int:
        check_numbers(latent=latent)
        return 2 * latent

    def head(self, outputs: Tensor) -> dist.TorchDistribution:
        loc, log_scale = outputs.chunk(2, dim=-1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)


@final
class FullRank(Amortized):
    """A normal posterior with full covariance, q(z | x) = N(z; loc(x), L(x) L(x)^T), L lower triangular.

    `net` maps data [..., *event] to [..., latent * (latent + 3) / 2] (`FullRank.outputs(latent)`): location, the
    logarithm of L's diagonal, and L below the diagonal row by row, in this order.
    Returns a distribution of batch shape [...] and event shape [latent].
    Raises ValueError for a number of outputs that fits no latent.
    Source: Kingma and Welling 2019, An introduction to variational autoencoders (arXiv 1906.02691), section 2.5.1.

    >>> from ppvae.nn import mlp
    >>> FullRank(mlp(64, FullRank.outputs(8)))(torch.zeros(5, 64)).shape()
    torch.Size([5, 8])
    """

    @staticmethod
    def outputs(latent: int) -> int:
        check_numbers(latent=latent)
        return latent * (latent + 3) // 2

    def head(self, outputs: Tensor) -> dist.TorchDistribution:
        size = outputs.shape[-1]
        latent = (math.isqrt(9 + 8 * size) - 3) // 2
        if self.outputs(latent) != size or latent < 1:
            raise ValueError(
                f"net: expected latent * (latent + 3) / 2 outputs, as {self.outputs(max(latent, 1))} for latent "
                f"{max(latent, 1)}; found {size}"
            )
        loc, log_diagonal, below = outputs.split([latent, latent, size - 2 * latent], -1)
        scale_tril = log_diagonal.exp().diag_embed()
        row, column = torch.tril_indices(latent, latent, -1, device=outputs.device)
        strict = torch.zeros_like(scale_tril)
        strict[..., row, column] = below
        return dist.MultivariateNormal(loc, scale_tril=scale_tril + strict)


@final
class LowRank(Amortized):
    """A normal posterior with low-rank plus diagonal covariance, q(z | x) = N(z; loc, W W^T + diag(s)^2).

    `net` maps data [..., *event] to [..., latent * (2 + rank)]: location, log s, and W [latent, rank] row by row.

    Args:
        net: the network.
        rank: the number of columns of W.

    Returns a distribution of batch shape [...] and event shape [latent].
    Raises ValueError for a rank below one, or outputs that are no multiple of 2 + rank.
    Source: Rezende et al. 2014 (arXiv 1401.4082); Ong et al. 2018 (arXiv 1701.03208).

    >>> from ppvae.nn import mlp
    >>> LowRank(mlp(64, 8 * (2 + 3)), rank=3)(torch.zeros(5, 64)).shape()
    torch.Size([5, 8])
    """

    def __init__(self, net: nn.Module, rank: int):
        check_numbers(rank=rank)
        super().__init__(net)
        if rank < 1:
            raise UsageError(f"rank: expected at least 1, found {rank}")
        self.rank = rank

    def outputs(self, latent: int) -> int:
        check_numbers(latent=latent)
        return latent * (2 + self.rank)

    def head(self, outputs: Tensor) -> dist.TorchDistribution:
        latent, remainder = divmod(outputs.shape[-1], 2 + self.rank)
        if remainder:
            raise ValueError(
                f"net: expected latent * {2 + self.rank} outputs at rank {self.rank}, found {outputs.shape[-1]}"
            )
        loc, log_scale, factor = outputs.split([latent, latent, latent * self.rank], -1)
        return dist.LowRankMultivariateNormal(loc, factor.unflatten(-1, (latent, self.rank)), (2 * log_scale).exp())


@register_kl(torch.distributions.MultivariateNormal, torch.distributions.Independent)
@register_kl(torch.distributions.LowRankMultivariateNormal, torch.distributions.Independent)
def _kl_to_diagonal(p: Any, q: Any) -> Tensor:
    """KL(p || q) to a normal with independent dims, which torch lacks, from the moments and the entropy of p."""
    base = q.base_dist
    if not isinstance(base, torch.distributions.Normal) or q.event_shape != p.event_shape:
        raise NotImplementedError(f"no KL in closed form from {type(p).__name__} to {type(base).__name__}")
    moments = (p.variance + (p.mean - base.loc) ** 2) / base.scale**2
    return (moments / 2 + base.scale.log() + math.log(2 * math.pi) / 2).sum(-1) - p.entropy()
