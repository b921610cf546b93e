"""Normalizing flows from zuko as priors; each starts as the standard normal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from ppvae.distributions.batch_shape import ParametricDistribution, expand_parameters
from ppvae.errors.ranges import check_numbers, check_sequences


@contextmanager
def _restore_validation() -> Iterator[None]:
    """Restores argument validation of torch distributions, which the import of zuko disables globally."""
    before = torch.distributions.Distribution._validate_args
    yield
    torch.distributions.Distribution._validate_args = before


with _restore_validation():
    import zuko


@final
class ZukoDistribution(ParametricDistribution):
    """A zuko flow as a Pyro distribution over a real vector: log p(z) = log p_0(f(z)) + log |det df/dz|.

    pyro.contrib.zuko.ZukoToPyro lacks `sample`, `support` and shapes, which plates and `terms` need. As there, the
    density of a draw is cached with the draw; here it is used only where its gradient equals that of `log_prob`.

    >>> ZukoDistribution(zuko.flows.MAF(3)()).expand([5]).rsample().shape
    torch.Size([5, 3])
    """

    support = constraints.real_vector
    has_rsample = True

    def __init__(self, flow: Any, validate_args: bool | None = None):
        self.flow = flow
        self._cache: tuple[Tensor, Tensor] | None = None
        super().__init__(flow.batch_shape, flow.event_shape, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> ZukoDistribution:
        new = expand_parameters(self, batch_shape)
        new.flow, new._cache = self.flow.expand(torch.Size(batch_shape)), None
        return new

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        value, log_prob = self.flow.rsample_and_log_prob(torch.Size(sample_shape))
        self._cache = value, log_prob
        return value

    def _log_prob(self, value: Tensor) -> Tensor:
        # under gradients, a value without a path is a constant, and its density is computed anew
        if self._cache and self._cache[0] is value and (value.requires_grad or not torch.is_grad_enabled()):
            return self._cache[1]
        return self.flow.log_prob(value)


def start_at_identity(flow: Any) -> Any:
    """Sets the last layer of every hypernetwork of a zuko flow to zero, so that the flow is the identity."""
    for module in flow.modules():
        last = module.hyper[-1].parameters() if hasattr(module, "hyper") else getattr(module, "phi", ())
        for p in last:
            nn.init.zeros_(p)
    return flow


@final
class RealNVP(nn.Module):
    """A real-valued non-volume-preserving flow: affine coupling layers on alternating halves, invertible in one pass.

    log p(z) = log N(f(z); 0, I) + sum over layers of sum_d s_d, where a layer maps z_d to exp(s_d) z_d + t_d and s, t
    are functions of the other half. It starts as the standard normal.

    Args:
        latent: the size of z.
        transforms: the number of coupling layers.
        hidden: the widths of each layer's network.

    Returns batch shape [], event shape [latent].
    Source: Dinh et al. 2017 (arXiv 1605.08803); as a prior, Huang et al. 2017 (arXiv 1710.02248); zuko.flows.RealNVP.

    >>> RealNVP(4)().log_prob(torch.zeros(5, 4)).shape
    torch.Size([5])
    """

    def __init__(self, latent: int, transforms: int = 6, hidden: Sequence[int] = (64, 64)):
        check_numbers(latent=latent, transforms=transforms)
        check_sequences(hidden=hidden)
        super().__init__()
        self.flow = start_at_identity(zuko.flows.RealNVP(latent, transforms=transforms, hidden_features=hidden))

    def forward(self) -> dist.TorchDistribution:
        return ZukoDistribution(self.flow())


@final
class MAF(nn.Module):
    """A masked autoregressive flow: z_d given z_<d is affine in the noise; the order is reversed between layers.

    log p(z) = log N(f(z); 0, I) + sum over layers of sum_d s_d(z_<d). The density takes one pass through each layer, a
    draw takes `latent` of them. It starts as the standard normal.

    Args:
        latent: the size of z.
        transforms: how many autoregressive layers.
        hidden: the widths of each layer's masked network.

    Returns batch shape [], event shape [latent].
    Source: Papamakarios et al. 2017 (arXiv 1705.07057), zuko.flows.MAF; as a prior, Chen et al. 2017 (arXiv
    1611.02731).

    >>> MAF(4)().log_prob(torch.zeros(5, 4)).shape
    torch.Size([5])
    """

    def __init__(self, latent: int, transforms: int = 3, hidden: Sequence[int] = (64, 64)):
        check_numbers(latent=latent, transforms=transforms)
        check_sequences(hidden=hidden)
        super().__init__()
        self.flow = start_at_identity(zuko.flows.MAF(latent, transforms=transforms, hidden_features=hidden))

    def forward(self) -> dist.TorchDistribution:
        return ZukoDistribution(self.flow())


@final
class NeuralSpline(nn.Module):
    """A neural spline flow: as MAF, with a monotonic rational-quadratic spline in place of each affine map.

    log p(z) = log N(f(z); 0, I) + sum over layers of sum_d log f_d'(z_d; z_<d). The splines act on [-5, 5] and leave
    the rest of the line as it is. It starts as the standard normal.

    Args:
        latent: the size of z.
        transforms: how many autoregressive layers.
        hidden: the widths of each layer's masked network.
        bins: pieces of each spline.

    Returns batch shape [], event shape [latent].
    Source: Durkan et al. 2019 (arXiv 1906.04032); zuko.flows.NSF.

    >>> NeuralSpline(4)().log_prob(torch.zeros(5, 4)).shape
    torch.Size([5])
    """

    def __init__(self, latent: int, transforms: int = 2, hidden: Sequence[int] = (64, 64), bins: int = 8):
        check_numbers(latent=latent, transforms=transforms, bins=bins)
        check_sequences(hidden=hidden)
        super().__init__()
        self.flow = start_at_identity(zuko.flows.NSF(latent, transforms=transforms, bins=bins, hidden_features=hidden))

    def forward(self) -> dist.TorchDistribution:
        return ZukoDistribution(self.flow())
