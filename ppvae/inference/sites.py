"""Sites of a pair, and how so many particles of a batch are laid out for a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import Distribution, Independent, kl_divergence

from ppvae.inference.particle_layout import (
    fold,
    fold_data,
    over_inner_plates,
    particle_dim,
    unfold,
    unfold_value,
    with_plates,
)
from ppvae.inference.structure import Structure
from ppvae.inference.tracing import node_log_prob


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
        base, reinterpreted = factors(self.distribution)
        if not reinterpreted:
            raise ValueError(f"site {self.name!r}: {type(base).__name__} does not factorise over its event")
        return base.log_prob(self.traced)


def factors(distribution: Any) -> tuple[Any, int]:
    """The distribution of one part of the event, and over how many dims the event is a product of such parts."""
    reinterpreted = 0
    while isinstance(distribution, Independent):
        reinterpreted += distribution.reinterpreted_batch_ndims
        distribution = distribution.base_dist
    return distribution, reinterpreted


def divergence(q: Distribution, p: Distribution) -> tuple[Tensor, int] | None:
    """KL(q || p) in closed form, [*batch, *parts], and how many dims are parts; None where none is known."""
    shape = torch.broadcast_shapes(q.batch_shape, p.batch_shape)  # Pyro leaves out plates where a value is given
    (q_base, q_dims), (p_base, p_dims) = factors(q.expand(shape)), factors(p.expand(shape))
    if isinstance(q_base, Delta):
        return None
    try:
        if q_dims == p_dims:
            return kl_divergence(q_base, p_base), q_dims
        return kl_divergence(q.expand(shape), p.expand(shape)), 0
    except NotImplementedError:
        return None


@dataclass(frozen=True)
class Laid:
    """So many particles of a batch, laid out as the pair takes them."""

    s: Structure
    num_particles: int
    size: int
    particle: int = 0  # which one a run of a single particle holds

    def runs(
        self, batch: Sequence[Any], given: Mapping[str, Tensor]
    ) -> Iterator[tuple[Sequence[Any], dict[str, Tensor], int | None, Laid]]:
        """The runs to make: (batch, values to put in place, size of the particle plate, what the run holds)."""
        s, count = self.s, self.num_particles
        if s.layout == "vectorized":
            yield batch, {n: with_plates(v, s, n) for n, v in given.items()}, count, self
        elif s.layout == "folded":
            rows = [fold_data(t, count, self.size) for t in batch]
            yield rows, {n: fold(v, s, n) for n, v in given.items()}, None, self
        else:
            for k in range(count):
                at = {n: v if n == s.plate else v.select(particle_dim(v, s, n), k) for n, v in given.items()}
                yield batch, at, None, replace(self, num_particles=1, particle=k)

    def unfold(self, tensor: Tensor) -> Tensor:
        """[..., batch as run] -> [..., particles, batch]."""
        if self.s.layout == "vectorized":
            return tensor.unsqueeze(0) if tensor.dim() == 1 else tensor
        if self.s.layout == "folded":
            return unfold(tensor, self.num_particles, self.size)
        return tensor.unsqueeze(-2)

    def spread(self, weights: Tensor, name: str) -> Tensor:
        """Weights of all particles, [particles, batch], in a shape that multiplies a latent's value in this run."""
        s, event = self.s, (1,) * self.s.event_dims[name]
        if s.layout == "vectorized":
            return weights.reshape(weights.shape[0], *(1,) * (s.nesting - 1), weights.shape[1], *event)
        if s.layout == "folded":
            return weights.reshape(-1, *event)
        return weights[self.particle].reshape(-1, *event)

    def per_datum(self, tensor: Tensor, parts: int, mask: Any) -> Tensor:
        """[*batch as run, *parts] -> [*parts, particles, batch], masked and summed over inner plates."""
        if isinstance(mask, Tensor):
            mask = mask.reshape(*mask.shape, *(1,) * parts)
        tensor = scale_and_mask(tensor, 1.0, mask)
        plates = self.s.nesting + (self.s.layout == "vectorized")
        tensor = tensor.reshape(*(1,) * (plates + parts - tensor.dim()), *tensor.shape)
        tensor = tensor.movedim(tuple(range(-parts, 0)), tuple(range(parts)))
        return self.all_particles(self.unfold(over_inner_plates(tensor, self.s.nesting)))

    def all_particles(self, tensor: Tensor) -> Tensor:
        """[..., 1 or particles, batch] -> [..., particles, batch]."""
        count = self.num_particles
        return tensor if tensor.shape[-2] == count else tensor.expand(*tensor.shape[:-2], count, tensor.shape[-1])

    def site(self, name: str, node: dict[str, Any], role: str, events: bool = False) -> Site:
        """A traced site with its log-density per particle and datum, and per part of its event where asked for."""
        s, count = self.s, self.num_particles
        log_prob = self.all_particles(self.unfold(over_inner_plates(node_log_prob(node), s.nesting)))
        parts = None
        if events and role == "latent":
            base, dims = factors(node["fn"])
            parts = self.per_datum(base.log_prob(node["value"]), dims, node["mask"]) if dims else None
        value, rows = node["value"], count * self.size
        if s.layout == "folded" and role == "observed":
            value = value[: self.size] if value.shape[:1] == (rows,) else value
        elif s.layout == "folded" and value.shape[value.dim() - s.event_dims[name] - 1 :][:1] == (rows,):
            value = unfold_value(value, s, name, count, self.size)
        masked = isinstance(node["mask"], Tensor)
        return Site(name, role, value, node["fn"], log_prob, node["value"], parts, masked=masked)


def joined(parts: Sequence[Mapping[str, Site]], dim: Mapping[str, int]) -> dict[str, Site]:
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
