"""Sites of a pair, and how so many particles of a batch are laid out for a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import Distribution, Independent, kl_divergence


@dataclass(frozen=True)
class Site:
    """One named site of the model or the guide, evaluated for every particle and datum.

    `log_prob` is [particles, batch] (`[particles, 1]` for a site outside the data plate), summed over the site's own
    event and inner plates; enumerated values stand in further dimensions on the left. `role` is "latent", "observed",
    "enumerated", "auxiliary" (a guide's helper that the model lacks) or "cancelled" (proposed from its own prior).
    `parts` are the runs that a site was joined from, where particles are taken one by one.
    """

    name: str
    role: str
    value: Tensor
    distribution: Any
    log_prob: Tensor
    traced: Tensor = field(repr=False)  # the value as the distribution takes it
    events: Tensor | None = field(default=None, repr=False)  # [*event, particles, batch], where it was asked for
    parts: tuple[Site, ...] = field(default=(), repr=False)
    masked: bool = False

    def per_event(self) -> Tensor:
        """Log-densities before the sum over the event: [..., *event] where the distribution is a product over it."""
        base, reinterpreted = event_factors(self.distribution)
        if not reinterpreted:
            raise ValueError(f"site {self.name!r}: {type(base).__name__} does not factorise over its event")
        return base.log_prob(self.traced)


def event_factors(distribution: Any) -> tuple[Any, int]:
    """The distribution of one part of the event, and over how many dims the event is a product of such parts."""
    reinterpreted = 0
    while isinstance(distribution, Independent):
        reinterpreted += distribution.reinterpreted_batch_ndims
        distribution = distribution.base_dist
    return distribution, reinterpreted


def closed_form_kl(q: Distribution, p: Distribution) -> tuple[Tensor, int] | None:
    """KL(q || p) in closed form, [*batch, *parts], and how many dims are parts; None where none is known."""
    shape = torch.broadcast_shapes(q.batch_shape, p.batch_shape)  # Pyro leaves out plates where a value is given
    (q_base, q_dims), (p_base, p_dims) = event_factors(q.expand(shape)), event_factors(p.expand(shape))
    if isinstance(q_base, Delta):
        return None
    try:
        if q_dims == p_dims:
            return kl_divergence(q_base, p_base), q_dims
        return kl_divergence(q.expand(shape), p.expand(shape)), 0
    except NotImplementedError:
        return None


def concatenate_sites(parts: Sequence[Mapping[str, Site]], dim: Mapping[str, int]) -> dict[str, Site]:
    """Sites of single particles as sites of all of them; values are stacked at the dims given."""
    out = {}
    for name, site in parts[0].items():
        own = tuple(p[name] for p in parts)
        value = site.value
        if site.role != "observed":
            value = torch.stack([o.value for o in own], dim[name])
        log_prob = torch.cat([o.log_prob for o in own], dim=-2)
        events = [o.events for o in own if o.events is not None]
        out[name] = replace(
            site, value=value, log_prob=log_prob, events=torch.cat(events, -2) if events else None, parts=own
        )
    return out
