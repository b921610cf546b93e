"""Where particles stand in a tensor: leftmost under a plate, folded into the batch, or not there at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pyro.distributions.util import scale_and_mask
from torch import Tensor

from ppvae.inference.sites import Site, event_factors
from ppvae.inference.structure import Structure
from ppvae.inference.tracing import node_log_prob


def fold_data(value: Any, num_particles: int, size: int) -> Any:
    """[batch, ...] -> [particles * batch, ...]; anything that is not over the batch stays as it is."""
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == size:
        return value.expand(num_particles, *value.shape).reshape(num_particles * size, *value.shape[1:])
    return value


def particle_dim(value: Tensor, s: Structure, name: str) -> int:
    """Where the particles stand in a latent's value: leftmost, but for dims of sites enumerated in the guide."""
    return max(value.dim() - s.event_dims[name] - s.plate_nesting - 1, 0)


def enumerated_dims(value: Tensor, s: Structure, name: str) -> int:
    """How many dims on the left of a single particle's value belong to sites enumerated in the guide."""
    return max(value.dim() - s.event_dims[name] - s.plate_nesting, 0)


def unfold_value(value: Tensor, s: Structure, name: str, num_particles: int, size: int) -> Tensor:
    """[..., *inner, particles * batch, *event] -> [..., particles, *inner, batch, *event]."""
    data = value.dim() - s.event_dims[name] - 1
    split = value.reshape(*value.shape[:data], num_particles, size, *value.shape[data + 1 :])
    return split.movedim(data, enumerated_dims(value, s, name))


def fold(value: Tensor, s: Structure, name: str) -> Tensor:
    """[..., particles, *inner, batch, *event] -> [..., *inner, particles * batch, *event]."""
    if name == s.plate:
        return value
    data = value.dim() - s.event_dims[name] - 1
    moved = value.movedim(particle_dim(value, s, name), data - 1)
    return moved.reshape(*moved.shape[: data - 1], -1, *moved.shape[data + 1 :])


def with_plates(value: Tensor, s: Structure, name: str) -> Tensor:
    """[particles, *some plates, *event] -> the same with every plate dim present, so that particles stay leftmost."""
    if name == s.plate:
        return value
    missing = s.plate_nesting + 1 - (value.dim() - s.event_dims[name])
    return value.reshape(value.shape[0], *(1,) * missing, *value.shape[1:]) if missing > 0 else value


def unfold(log_prob: Tensor, num_particles: int, size: int) -> Tensor:
    """[..., particles * batch] -> [..., particles, batch]; a shared site's last dim has size one."""
    if log_prob.shape[-1] == num_particles * size:
        return log_prob.reshape(*log_prob.shape[:-1], num_particles, size)
    return log_prob.unsqueeze(-2)


def over_inner_plates(log_prob: Tensor, plate_nesting: int) -> Tensor:
    """Sums over inner plates: dims -nesting .. -2; keeps the data dim and everything left of the plates."""
    while log_prob.dim() < plate_nesting:
        log_prob = log_prob.unsqueeze(0)
    if plate_nesting > 1:
        log_prob = log_prob.sum(tuple(range(-plate_nesting, -1)))
    return log_prob


@dataclass(frozen=True)
class ParticleLayout:
    """So many particles of a batch, laid out as the pair takes them."""

    s: Structure
    num_particles: int
    size: int
    particle: int = 0  # which one a run of a single particle holds

    def runs(
        self, batch: Sequence[Any], given: Mapping[str, Tensor]
    ) -> Iterator[tuple[Sequence[Any], dict[str, Tensor], int | None, ParticleLayout]]:
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
            return weights.reshape(weights.shape[0], *(1,) * (s.plate_nesting - 1), weights.shape[1], *event)
        if s.layout == "folded":
            return weights.reshape(-1, *event)
        return weights[self.particle].reshape(-1, *event)

    def per_datum(self, tensor: Tensor, parts: int, mask: Any) -> Tensor:
        """[*batch as run, *parts] -> [*parts, particles, batch], masked and summed over inner plates."""
        if isinstance(mask, Tensor):
            mask = mask.reshape(*mask.shape, *(1,) * parts)
        tensor = scale_and_mask(tensor, 1.0, mask)
        plates = self.s.plate_nesting + (self.s.layout == "vectorized")
        tensor = tensor.reshape(*(1,) * (plates + parts - tensor.dim()), *tensor.shape)
        tensor = tensor.movedim(tuple(range(-parts, 0)), tuple(range(parts)))
        return self.all_particles(self.unfold(over_inner_plates(tensor, self.s.plate_nesting)))

    def all_particles(self, tensor: Tensor) -> Tensor:
        """[..., 1 or particles, batch] -> [..., particles, batch]."""
        count = self.num_particles
        return tensor if tensor.shape[-2] == count else tensor.expand(*tensor.shape[:-2], count, tensor.shape[-1])

    def site(self, name: str, node: dict[str, Any], role: str, events: bool = False) -> Site:
        """A traced site with its log-density per particle and datum, and per part of its event where asked for."""
        s, count = self.s, self.num_particles
        log_prob = self.all_particles(self.unfold(over_inner_plates(node_log_prob(node), s.plate_nesting)))
        parts = None
        if events and role == "latent":
            base, dims = event_factors(node["fn"])
            parts = self.per_datum(base.log_prob(node["value"]), dims, node["mask"]) if dims else None
        value, rows = node["value"], count * self.size
        if s.layout == "folded" and role == "observed":
            value = value[: self.size] if value.shape[:1] == (rows,) else value
        elif s.layout == "folded" and value.shape[value.dim() - s.event_dims[name] - 1 :][:1] == (rows,):
            value = unfold_value(value, s, name, count, self.size)
        masked = isinstance(node["mask"], Tensor)
        return Site(name, role, value, node["fn"], log_prob, node["value"], parts, masked=masked)
