"""Particle layouts: how the values and log-densities of several particles are laid out in the tensors of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pyro.distributions.util import scale_and_mask
from torch import Tensor

from ppvae.inference.contract.support import mask_of
from ppvae.inference.sites import Site, event_factors
from ppvae.inference.structure import ParticlePlacement, Role, Structure
from ppvae.inference.tracing import node_log_prob


def fold_batch(column: Any, num_particles: int, size: int) -> Any:
    """[batch, ...] -> [particles * batch, ...]; arguments of the pair that are not over the batch stay as they are."""
    if isinstance(column, Tensor) and column.dim() and column.shape[0] == size:
        return column.expand(num_particles, *column.shape).reshape(num_particles * size, *column.shape[1:])
    return column


def particle_dim(value: Tensor, s: Structure, name: str) -> int:
    """The particle dim of a latent's value: leftmost, after the dims of sites enumerated in the guide."""
    return max(value.dim() - s.event_dims[name] - s.plate_nesting - 1, 0)


def num_enumerated_dims(value: Tensor, s: Structure, name: str) -> int:
    """The number of leftmost dims of a single particle's value that belong to sites enumerated in the guide."""
    return max(value.dim() - s.event_dims[name] - s.plate_nesting, 0)


def fold_value(value: Tensor, s: Structure, name: str) -> Tensor:
    """[..., particles, *inner, batch, *event] -> [..., *inner, particles * batch, *event]."""
    if name == s.plate:
        return value
    data = value.dim() - s.event_dims[name] - 1
    moved = value.movedim(particle_dim(value, s, name), data - 1)
    return moved.reshape(*moved.shape[: data - 1], -1, *moved.shape[data + 1 :])


def unfold_value(value: Tensor, s: Structure, name: str, num_particles: int, size: int) -> Tensor:
    """[..., *inner, particles * batch, *event] -> [..., particles, *inner, batch, *event]."""
    data = value.dim() - s.event_dims[name] - 1
    split = value.reshape(*value.shape[:data], num_particles, size, *value.shape[data + 1 :])
    return split.movedim(data, num_enumerated_dims(value, s, name))


def insert_plate_dims(value: Tensor, s: Structure, name: str) -> Tensor:
    """[particles, *some plates, *event] -> the same with a dim for every plate, so that particles stay leftmost."""
    if name == s.plate:
        return value
    missing = s.plate_nesting + 1 - (value.dim() - s.event_dims[name])
    return value.reshape(value.shape[0], *(1,) * missing, *value.shape[1:]) if missing > 0 else value


def sum_inner_plates(log_prob: Tensor, plate_nesting: int) -> Tensor:
    """Sums over inner plates, dims -plate_nesting .. -2; keeps the data dim and everything left of the plates."""
    while log_prob.dim() < plate_nesting:
        log_prob = log_prob.unsqueeze(0)
    if plate_nesting > 1:
        log_prob = log_prob.sum(tuple(range(-plate_nesting, -1)))
    return log_prob


def with_sampled_sites(s: Structure, sites: Mapping[str, Site]) -> Structure:
    """The structure of the batch that a guide's sites were sampled for, which may have further ones."""
    if sites.keys() <= s.guide_roles.keys():
        return s
    return s.with_guide_sites({n: (site.role, len(site.distribution.event_shape)) for n, site in sites.items()})


def slice_particles(sites: Mapping[str, Site], s: Structure, start: int, count: int) -> dict[str, Site]:
    """`count` particles of a guide's sites, from `start` on."""
    out, s = {}, with_sampled_sites(s, sites)
    for name, site in sites.items():
        value = site.value.narrow(particle_dim(site.value, s, name), start, count)
        out[name] = replace(site, value=value, traced_value=value, log_prob=site.log_prob.narrow(-2, start, count))
    return out


def repeat_particles(site: Site, count: int, s: Structure) -> Site:
    """A site of the guide with every particle `count` times."""
    value = site.value.repeat_interleave(count, particle_dim(site.value, s, site.name))
    return replace(site, value=value, traced_value=value, log_prob=site.log_prob.repeat_interleave(count, -2))


@dataclass(frozen=True)
class ParticleLayout:
    """The layout of `num_particles` particles of a batch of `size` data in one run of a pair.

    `particle` is the index of the particle, where each has a run of its own.
    """

    s: Structure
    num_particles: int
    size: int
    particle: int = 0

    def runs(
        self, batch: Sequence[Any], values: Mapping[str, Tensor]
    ) -> Iterator[tuple[Sequence[Any], dict[str, Tensor], int | None, ParticleLayout]]:
        """Yields (batch, values to substitute, size of the particle plate or None, layout) of each run to make."""
        s, count = self.s, self.num_particles
        if s.layout is ParticlePlacement.VECTORIZED:
            yield batch, {n: insert_plate_dims(v, s, n) for n, v in values.items()}, count, self
        elif s.layout is ParticlePlacement.FOLDED:
            rows = [fold_batch(t, count, self.size) for t in batch]
            yield rows, {n: fold_value(v, s, n) for n, v in values.items()}, None, self
        else:
            for k in range(count):
                at = {n: v if n == s.plate else v.select(particle_dim(v, s, n), k) for n, v in values.items()}
                yield batch, at, None, replace(self, num_particles=1, particle=k)

    def unfold(self, log_prob: Tensor) -> Tensor:
        """[..., batch of the run] -> [..., particles, batch]."""
        if self.s.layout is ParticlePlacement.VECTORIZED:
            return log_prob.unsqueeze(0) if log_prob.dim() == 1 else log_prob
        rows = self.num_particles * self.size
        if self.s.layout is ParticlePlacement.FOLDED and log_prob.shape[-1] == rows:  # one for a global site
            return log_prob.reshape(*log_prob.shape[:-1], self.num_particles, self.size)
        return log_prob.unsqueeze(-2)

    def broadcast_weights(self, weights: Tensor, name: str) -> Tensor:
        """Weights of all particles, [particles, batch], in a shape that broadcasts with a latent's value in the run."""
        s, event = self.s, (1,) * self.s.event_dims[name]
        if s.layout is ParticlePlacement.VECTORIZED:
            return weights.reshape(weights.shape[0], *(1,) * (s.plate_nesting - 1), weights.shape[1], *event)
        if s.layout is ParticlePlacement.FOLDED:
            return weights.reshape(-1, *event)
        return weights[self.particle].reshape(-1, *event)

    def per_datum(self, log_prob: Tensor) -> Tensor:
        """[*batch of the run] -> [particles, batch], summed over inner plates."""
        log_prob, count = self.unfold(sum_inner_plates(log_prob, self.s.plate_nesting)), self.num_particles
        return log_prob if log_prob.shape[-2] == count else log_prob.expand(*log_prob.shape[:-2], count, -1)

    def per_factor(self, tensor: Tensor, dims: int, mask: Any) -> Tensor:
        """[*batch of the run, *factors] -> [*factors, particles, batch], masked and summed over inner plates.

        `dims` is the number of factor dims.
        """
        if isinstance(mask, Tensor):
            mask = mask.reshape(mask.shape + (1,) * dims)
        tensor = scale_and_mask(tensor, 1.0, mask)
        plates = self.s.plate_nesting + (self.s.layout is ParticlePlacement.VECTORIZED)
        tensor = tensor.reshape(*(1,) * (plates + dims - tensor.dim()), *tensor.shape)
        return self.per_datum(tensor.movedim(tuple(range(-dims, 0)), tuple(range(dims))))

    def site(self, name: str, node: dict[str, Any], role: Role, events: bool = False) -> Site:
        """A traced site with its log-density per particle and datum; with `events`, per factor of a latent's event."""
        log_prob, event_log_prob = self.per_datum(node_log_prob(node)), None
        if events and role is Role.LATENT:
            base, dims = event_factors(node["fn"])
            event_log_prob = self.per_factor(base.log_prob(node["value"]), dims, node["mask"]) if dims else None
        value = self._unfold_value(name, node["value"], role)
        return Site(name, role, value, node["fn"], log_prob, node["value"], event_log_prob, mask=mask_of(node))

    def _unfold_value(self, name: str, value: Tensor, role: Role) -> Tensor:
        """The value of a site with particles in a dim of their own; observed values without the copies of folding."""
        s, rows = self.s, self.num_particles * self.size
        if s.layout is not ParticlePlacement.FOLDED:
            return value
        if role is Role.OBSERVED:
            return value[: self.size] if value.shape[:1] == (rows,) else value
        if value.shape[value.dim() - s.event_dims[name] - 1 :][:1] == (rows,):
            return unfold_value(value, s, name, self.num_particles, self.size)
        return value
