"""Discrete sites as independent bits: a Bernoulli is one, a categorical a sequence of them by stick-breaking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from ppvae.errors import site_error
from ppvae.objectives.gradients.discrete.sites import SiteDraws, base_distribution

FAMILIES = (dist.Bernoulli, dist.Categorical, dist.OneHotCategorical)
FAR = 1000.0  # of a logit: its probability is zero in float64


def family_of(site: SiteDraws, consumer: str, families: tuple[Any, ...] = FAMILIES) -> type:
    """The family of a site, one of `families`; raises ContractError, by the site's name, for any other."""
    fn = _base_of(site)
    for family in families:
        if isinstance(fn, getattr(torch.distributions, family.__name__)):  # with Pyro's subclasses of torch's
            return family
    one_hot = isinstance(fn, torch.distributions.Categorical) and dist.OneHotCategorical in families
    raise site_error(
        site.name, f"a {' or '.join(f.__name__ for f in families)} latent for {consumer}", type(fn).__name__,
        ("make it a OneHotCategorical, or " if one_hot else "")
        + "give it another estimator, as gradient={'" + site.name + "': 'vimco'}, or take gradient='vimco' for all",
    )  # fmt: skip


def _base_of(site: SiteDraws) -> Any:
    return base_distribution((site.site.particle_sites or (site.site,))[0].distribution)


@dataclass(frozen=True)
class Bits:
    """A site as S independent bits per element, b_s ~ Bernoulli(logits_s), S = 1 for a Bernoulli site.

    A categorical site of C values has S = C - 1: its value is the first s with b_s = 1, and C - 1 if there is none.
    The logits are those of pi_s / sum_{c > s} pi_c.

    Attributes:
        logits: [S, K, *inner plates, batch, *event] with gradients; the event without the dim of a one-hot value.
        count: C, or 2 for a Bernoulli site.

    Source: Dong, Mnih and Tucker 2021 (arXiv 2106.08056).
    """

    site: SiteDraws
    family: type
    logits: Tensor

    @property
    def event_dims(self) -> int:
        return self.site.event_dims - (self.family is dist.OneHotCategorical)

    @property
    def index(self) -> Tensor:
        """The value as a number, [K, *inner plates, batch, *event]."""
        return self.site.value.argmax(-1) if self.family is dist.OneHotCategorical else self.site.value.long()

    @property
    def kept(self) -> Tensor:
        kept = self.site.kept
        return kept[..., 0] if self.family is dist.OneHotCategorical else kept

    def draw(self) -> Tensor:
        """The bits of the guide's draws, [S, ...]; those that the value leaves open are drawn."""
        p = self.logits.detach().sigmoid()
        if self.family is dist.Bernoulli:
            return self.index.to(p).expand_as(p)
        at = torch.arange(len(p), device=p.device).reshape(-1, *(1,) * self.index.dim())
        drawn = (torch.empty_like(p).uniform_() < p).to(p)
        return torch.where(at < self.index, 0.0, torch.where(at == self.index, 1.0, drawn))

    def values(self, bits: Tensor) -> Tensor:
        """The values of further bits, [M, S, ...] -> [M, *shape of the site's value]."""
        index = bits[:, 0].long() if self.family is dist.Bernoulli else self.first(bits)
        return value_of_index(index, self.family, bits.shape[1] + 1).to(self.site.value)

    def first(self, bits: Tensor) -> Tensor:
        """The first s with b_s = 1, S if there is none: [M, S, ...] -> [M, ...]."""
        return (bits.cumsum(1) == 0).sum(1)

    def spread(self, weights: Tensor) -> Tensor:
        """[M, K, batch] -> a shape that broadcasts with [M, S, K, *inner plates, batch, *event]."""
        return self.site.spread(weights, self.logits[0], self.event_dims)[:, None]


def count_of(site: SiteDraws, family: type) -> int:
    """The number of values of an element of a site."""
    return 2 if family is dist.Bernoulli else int(_base_of(site).logits.shape[-1])


def value_of_index(index: Tensor, family: type, count: int) -> Tensor:
    """The values of a family, of `count` each, of their numbers."""
    return torch.nn.functional.one_hot(index, count) if family is dist.OneHotCategorical else index


def bits_of(site: SiteDraws, consumer: str) -> Bits:
    """A Bernoulli, Categorical or OneHotCategorical site as bits."""
    family = family_of(site, consumer)
    if family is dist.Bernoulli:
        return Bits(site, family, logits_of(site)[None])
    log_probs = finite(log_probs_of(site, family))
    rest = log_probs.flip(0).logcumsumexp(0).flip(0)  # log sum_{c >= s} pi_c
    return Bits(site, family, log_probs[:-1] - rest[1:])


def finite(logits: Tensor) -> Tensor:
    """Logits with those of impossible values, -inf, at a finite number, so that sums over values have a gradient."""
    return torch.where(logits == -torch.inf, -FAR, logits)


def logits_of(site: SiteDraws) -> Tensor:
    """The logits of a Bernoulli or one-hot site in the shape of its value, finite, with gradients."""
    return finite(site.particles(lambda fn, value: fn.logits.expand(value.shape)))


def log_probs_of(site: SiteDraws, family: type) -> Tensor:
    """log pi_c with gradients, [C, K, *inner plates, batch, *event]; the event without the dim of a one-hot value."""

    def column(c: int) -> Tensor:
        def of(fn: Any, value: Tensor) -> Tensor:
            log_prob = fn.logits[..., c]
            if family is dist.OneHotCategorical:
                return log_prob[..., None].expand(value.shape)
            return log_prob.expand(value.shape)

        found = site.particles(of)
        return found[..., 0] if family is dist.OneHotCategorical else found

    if family is dist.Bernoulli:
        ones = site.particles(lambda base, value: torch.nn.functional.logsigmoid(base.logits).expand(value.shape))
        zeros = site.particles(lambda base, value: torch.nn.functional.logsigmoid(-base.logits).expand(value.shape))
        return torch.stack([zeros, ones])
    return torch.stack([column(c) for c in range(count_of(site, family))])
