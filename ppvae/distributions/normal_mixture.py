"""Reparameterised mixtures of normals with constant weights."""

from collections.abc import Sequence
from typing import ClassVar, final

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from ppvae.distributions.batch_shape import ParametricDistribution


@final
class NormalMixture(ParametricDistribution):
    """A mixture of normals with independent dims and given weights, q(z) = sum_m w_m N(z; loc_m, diag(scale_m)^2).

    Reparameterised, although a draw chooses its component at random: with the weights constant, dz = sum_m r_m(z)
    d(loc_m + scale_m e_m), e_m = (z - loc_m) / scale_m held fixed and the responsibilities r_m(z) = w_m N_m(z) / q(z).
    This velocity field satisfies the transport equation d q / d phi = -div(q dz / d phi), so that the pathwise gradient
    of E[f(z)] is unbiased. There is no such path for the weights.

    Args:
        loc: [..., components, latent].
        scale: the same shape.
        log_weight: [..., components], normalised here; constant; -inf removes a component.

    Batch shape [...], event shape [latent]. Raises ValueError for weights that require a gradient.
    Source: Jankowiak and Karaletsos 2019, Pathwise derivatives for multivariate distributions (arXiv 1806.01856).

    >>> two = NormalMixture(torch.tensor([[-1.0], [1.0]]), torch.ones(2, 1), torch.zeros(2))
    >>> two.log_prob(torch.zeros(1))
    tensor(-1.4189)
    """

    support = constraints.real_vector
    has_rsample = True
    parameter_dims: ClassVar[dict[str, int]] = {"loc": 2, "scale": 2, "log_weight": 1}

    def __init__(self, loc: Tensor, scale: Tensor, log_weight: Tensor, validate_args: bool | None = None):
        if log_weight.requires_grad:
            raise ValueError("log_weight: expected constant weights, found some that require a gradient")
        batch = torch.broadcast_shapes(loc.shape[:-2], scale.shape[:-2], log_weight.shape[:-1])
        self.loc, self.scale = loc.expand(batch + loc.shape[-2:]), scale.expand(batch + scale.shape[-2:])
        self.log_weight = log_weight.log_softmax(-1).expand(batch + log_weight.shape[-1:])
        super().__init__(batch, loc.shape[-1:], validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        return (self.log_weight.exp().unsqueeze(-1) * self.loc).sum(-2)

    def _component_log_probs(self, value: Tensor) -> Tensor:
        """log w_m + log N_m(z), [..., components]."""
        return self.log_weight + dist.Normal(self.loc, self.scale).log_prob(value.unsqueeze(-2)).sum(-1)

    def _log_prob(self, value: Tensor) -> Tensor:
        return self._component_log_probs(value).logsumexp(-1)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            exponential = torch.empty(shape[:-1] + self.loc.shape[-2:-1], dtype=self.loc.dtype, device=self.loc.device)
            # Gumbel-max; noise that is drawn independently of the values can be compiled
            component = (self.log_weight - exponential.exponential_().log()).argmax(-1)
            at = component[..., None, None].expand(*shape[:-1], 1, shape[-1])
            loc, scale = (
                t.expand(*shape[:-1], *t.shape[-2:]).gather(-2, at).squeeze(-2) for t in (self.loc, self.scale)
            )
            z = loc + scale * torch.randn(shape, dtype=loc.dtype, device=loc.device)
            noise = (z.unsqueeze(-2) - self.loc) / self.scale
            responsibility = self._component_log_probs(z).softmax(-1).unsqueeze(-1)
        return (responsibility * (self.loc + self.scale * noise)).sum(-2)
