"""The power spherical posterior on the unit sphere."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, final

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions.kl import register_kl

from ppvae.distributions.batch_shape import ParametricDistribution
from ppvae.errors.ranges import check_numbers
from ppvae.posteriors.amortized import Amortized
from ppvae.priors.sphere import SphericalUniform, normalize


@final
class PowerSphericalDistribution(ParametricDistribution):
    """Unit vectors around `loc`, p(z) = (1 + loc . z)^kappa / C, kappa >= 0 the concentration; zero is uniform.

    log C = (a + b) log 2 + b log pi + lgamma(a) - lgamma(a + b), b = (D - 1) / 2, a = b + kappa, for D elements, with
    respect to the sphere's surface. `loc` [..., D] are unit vectors, `concentration` [...]. The density is
    computed from s = (1 + loc . z) / 2 with the power of two cancelled, normaliser and entropy in float64: accurate in
    float32 at a concentration of 1e8.

    >>> p = PowerSphericalDistribution(torch.tensor([1.0, 0.0, 0.0]), torch.tensor(0.0))
    >>> p.log_prob(torch.tensor([0.0, 0.6, 0.8])).exp() * 4 * math.pi
    tensor(1.0000)
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"concentration": constraints.nonnegative}
    support = constraints.sphere
    has_rsample = True
    parameter_dims: ClassVar[dict[str, int]] = {"loc": 1, "concentration": 0}

    def __init__(self, loc: Tensor, concentration: Tensor, validate_args: bool | None = None):
        batch_shape = torch.broadcast_shapes(loc.shape[:-1], concentration.shape)
        self.loc, self.concentration = loc.expand(batch_shape + loc.shape[-1:]), concentration.expand(batch_shape)
        super().__init__(batch_shape, loc.shape[-1:], validate_args=validate_args)

    def _shapes(self) -> tuple[Tensor, float]:
        """a and b of the Beta distribution that (1 + loc . z) / 2 has, in float64."""
        b = (self.event_shape[0] - 1) / 2
        return self.concentration.double() + b, b

    @property
    def mean(self) -> Tensor:
        """loc times (a - b) / (a + b), inside the sphere."""
        a, b = self._shapes()
        return self.loc * ((a - b) / (a + b)).to(self.loc.dtype).unsqueeze(-1)

    @property
    def mode(self) -> Tensor:
        return self.loc

    def _log_normaliser(self) -> Tensor:
        """log C - kappa log 2, in float64."""
        a, b = self._shapes()
        return b * math.log(4 * math.pi) + torch.lgamma(a) - torch.lgamma(a + b)

    def _log_prob(self, value: Tensor) -> Tensor:
        # for unit vectors s = |loc + z|^2 / 4 = 1 - |loc - z|^2 / 4: accurate far from loc and near it, respectively
        s = (((self.loc + value) ** 2).sum(-1) / 4).clamp(min=torch.finfo(value.dtype).tiny)
        complement = (((self.loc - value) ** 2).sum(-1) / 4).clamp(max=0.75)
        log_s = torch.where(complement < 0.5, torch.log1p(-complement), s.log())
        return self.concentration * log_s - self._log_normaliser().to(value.dtype)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        a, b = self._shapes()
        concentrations = torch.stack([a, torch.full_like(a, b)], -1).expand(*shape[:-1], 2)
        share, complement = torch.distributions.Dirichlet(concentrations, validate_args=False).rsample().unbind(-1)
        tangent = normalize(torch.randn(*shape[:-1], shape[-1] - 1, dtype=a.dtype, device=a.device))
        along, across = (share - complement).unsqueeze(-1), (2 * (share * complement).sqrt()).unsqueeze(-1)
        start = torch.cat([along, across * tangent], -1)  # around the first axis
        # a reflection maps the axis to loc, or to -loc with a change of sign, whichever is far from singular
        loc = self.loc.double()
        axis = F.pad(torch.ones_like(loc[..., :1]), (0, shape[-1] - 1))
        sign = torch.where(loc[..., :1] >= 0, 1.0, -1.0)
        mirror = normalize(axis + sign * loc)
        return normalize(-sign * (start - 2 * (start * mirror).sum(-1, keepdim=True) * mirror)).to(self.loc.dtype)

    def entropy(self) -> Tensor:
        a, b = self._shapes()
        mean_log = torch.digamma(a) - torch.digamma(a + b)  # of s
        return (self._log_normaliser() - self.concentration.double() * mean_log).to(self.loc.dtype)


@register_kl(PowerSphericalDistribution, SphericalUniform)
def _kl_to_uniform(p: PowerSphericalDistribution, q: SphericalUniform) -> Tensor:
    return -p.entropy() - q.log_prob(p.loc)


@final
class PowerSpherical(Amortized):
    """A posterior over unit vectors around a mean direction, q(z | x) proportional to (1 + loc(x) . z)^kappa(x).

    Reparameterised: 2 t - 1 with t from a Beta distribution along `loc`, a uniform direction orthogonal to it. Its
    prior is `priors.UniformOnSphere`.

    Args:
        net: maps data [..., *event] to [..., latent + 1]: a vector whose direction is loc, and a number whose softplus
            is kappa, in this order; a vector of zeros counts as the first axis.

    Returns a distribution of batch shape [...] and event shape [latent], a density on the sphere's surface.
    Raises ValueError for fewer than three outputs.
    Source: De Cao and Aziz 2020, The power spherical distribution (arXiv 2006.04437).

    >>> from ppvae.nn import mlp
    >>> posterior = PowerSpherical(mlp(64, 3 + 1))
    >>> bool((torch.linalg.norm(posterior(torch.rand(5, 64)).rsample(), dim=-1) - 1 < 1e-6).all())
    True
    """

    @staticmethod
    def outputs(latent: int) -> int:
        check_numbers(latent=latent)
        return latent + 1

    def head(self, outputs: Tensor) -> dist.TorchDistribution:
        if outputs.shape[-1] < 3:
            raise ValueError(f"net: expected latent + 1 outputs with latent at least 2, found {outputs.shape[-1]}")
        where = outputs[..., :-1]
        is_zero = (where == 0).all(-1, keepdim=True)  # as a network without biases says of a datum of zeros
        axis = F.pad(torch.ones_like(where[..., :1]), (0, where.shape[-1] - 1))
        return PowerSphericalDistribution(normalize(torch.where(is_zero, axis, where)), F.softplus(outputs[..., -1]))
