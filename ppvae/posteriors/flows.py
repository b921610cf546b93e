"""Normalizing-flow posteriors conditioned on the data, with cheap draws and cached densities of draws."""

import functools
import warnings
from collections.abc import Sequence
from typing import Any, final

import pyro.distributions as dist
import torch
from pyro.distributions import transforms
from pyro.nn import ConditionalAutoRegressiveNN
from torch import Tensor, nn

from ppvae.distributions.batch_shape import WithoutMoments
from ppvae.errors import UsageError
from ppvae.errors.ranges import check_numbers, check_sequences
from ppvae.posteriors.amortized import Amortized
from ppvae.priors.flows import ZukoDistribution, start_at_identity, zuko


@final
class GradientSafeTransformed(WithoutMoments, dist.TransformedDistribution):
    """Pyro's TransformedDistribution, which uses the cached inverse only where gradients through it are right.

    The density of a value without a path (a draw made without gradients) depends on the parameters through the inverse;
    the cached inverse has no such gradient.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not value.requires_grad:
            value = value[...]  # a new tensor with the same values, which is in no cache
        shape = torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape)
        return super().log_prob(value if value.shape == shape else value.expand(shape))


@final
class InverseAutoregressive(transforms.AffineAutoregressive):
    """Pyro's AffineAutoregressive, y_d = exp(s_d(y_in_<d)) y_in_d + m_d(y_in_<d), inverted in the value's own dtype."""

    def _inverse(self, y: Tensor) -> Tensor:
        x = torch.zeros_like(y)
        for _ in range(y.shape[-1]):  # d passes determine the first d elements in the order of the network
            mean, log_scale = self.arn(x)
            log_scale = transforms.utils.clamp_preserve_gradients(
                log_scale, self.log_scale_min_clip, self.log_scale_max_clip
            )
            x = (y - mean) * torch.exp(-log_scale)
        self._cached_log_scale = log_scale
        return x


@final
class IAF(Amortized):
    """Inverse autoregressive flow: affine autoregressive maps of a draw from a diagonal normal.

    u_0 = loc + scale * noise, u_t = exp(s_t(u_(t-1), h)) * u_(t-1) + m_t(u_(t-1), h), z = u_flows, so that
    log q(z | x) = log N(u_0; loc, scale) - sum_t sum_d s_td; h is a part of the network outputs, and element d of s and
    m depends on elements before d (after d in every second flow). A draw with its density takes one pass, the density
    of another value `latent` passes. It starts as the diagonal normal.

    Args:
        net: maps data [..., *event] to [..., 2 * latent + features]: loc, log scale, and h, in this order.
        latent: the size of z.
        features: the size of h.
        flows: the number of maps.
        hidden: the widths of each map's masked network, none below `latent`.

    Returns a distribution of batch shape [...] and event shape [latent].
    Raises ValueError where the outputs do not match. Log-scales are clipped to [-5, 3], as in Pyro.
    Source: Kingma et al. 2016 (arXiv 1606.04934), equation 10; pyro.distributions.transforms.AffineAutoregressive.

    >>> from ppvae.nn import mlp
    >>> IAF(mlp(64, 2 * 8 + 16), latent=8, features=16)(torch.zeros(5, 64)).shape()
    torch.Size([5, 8])
    """

    def __init__(self, net: nn.Module, latent: int, features: int = 16, flows: int = 2, hidden: Sequence[int] = (64,)):
        check_numbers(latent=latent, features=features, flows=flows)
        check_sequences(hidden=hidden)
        if not hidden:
            raise UsageError("hidden: expected at least one width, found none")
        super().__init__(net)
        self.latent, self.features = latent, features
        order = torch.arange(latent)
        with warnings.catch_warnings():  # one dim needs no order, and Pyro says so
            warnings.filterwarnings("ignore", message=".*input_dim = 1.*")
            self.maps = nn.ModuleList(
                ConditionalAutoRegressiveNN(
                    latent, features, list(hidden), permutation=order.flip(0) if i % 2 else order, nonlinearity=nn.ELU()
                )
                for i in range(flows)
            )
        for network in self.maps:
            for p in network.layers[-1].parameters():  # type: ignore[union-attr, index]
                nn.init.zeros_(p)

    def outputs(self, latent: int) -> int:
        check_numbers(latent=latent)
        return 2 * latent + self.features

    def head(self, outputs: Tensor) -> dist.TorchDistribution:
        loc, log_scale, h = _split_outputs(outputs, self.latent, self.features)
        maps: list[Any] = [InverseAutoregressive(functools.partial(network, context=h)) for network in self.maps]
        base = dist.Normal(loc, log_scale.exp()).to_event(1)
        return GradientSafeTransformed(base, maps)


@final
class SplineCoupling(Amortized):
    """A conditional neural spline flow with a diagonal affine map, z = loc + scale * g(noise; h).

    log q(z | x) = log N(f(u); 0, I) + log |det df/du| - sum_d log scale_d, u = (z - loc) / scale, f the inverse of g: a
    flow of rational-quadratic splines on [-5, 5], each half of u given the other half and h. Draws and the density of
    any value take two passes through each transform. It starts as the diagonal normal.

    Args:
        net: maps data [..., *event] to [..., 2 * latent + features]: loc, log scale, and h, in this order.
        latent: the size of z.
        features: the size of h.
        transforms: the number of couplings.
        hidden: the widths of each coupling's network.
        bins: pieces of each spline.

    Returns a distribution of batch shape [...] and event shape [latent]. Raises ValueError where the outputs do not
    match.
    Source: Durkan et al. 2019 (arXiv 1906.04032); zuko.flows.NSF with two passes.

    >>> from ppvae.nn import mlp
    >>> SplineCoupling(mlp(64, 2 * 8 + 16), latent=8, features=16)(torch.zeros(5, 64)).shape()
    torch.Size([5, 8])
    """

    def __init__(
        self,
        net: nn.Module,
        latent: int,
        features: int = 16,
        transforms: int = 2,
        hidden: Sequence[int] = (64,),
        bins: int = 8,
    ):
        check_numbers(latent=latent, features=features, transforms=transforms, bins=bins)
        check_sequences(hidden=hidden)
        super().__init__(net)
        self.latent, self.features = latent, features
        self.flow = start_at_identity(
            zuko.flows.NSF(latent, features, bins=bins, transforms=transforms, passes=2, hidden_features=hidden)
        )

    def outputs(self, latent: int) -> int:
        check_numbers(latent=latent)
        return 2 * latent + self.features

    def head(self, outputs: Tensor) -> dist.TorchDistribution:
        loc, log_scale, h = _split_outputs(outputs, self.latent, self.features)
        place = transforms.AffineTransform(loc, log_scale.exp(), event_dim=1, cache_size=1)
        return GradientSafeTransformed(ZukoDistribution(self.flow(h)), [place])


def _split_outputs(outputs: Tensor, latent: int, features: int) -> tuple[Tensor, ...]:
    if outputs.shape[-1] != 2 * latent + features:
        raise ValueError(
            f"net: expected 2 * {latent} + {features} outputs (location, log-scale, features), found "
            f"{outputs.shape[-1]}"
        )
    return outputs.split([latent, latent, features], -1)
