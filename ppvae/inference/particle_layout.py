"""Where particles stand in a tensor: leftmost under a plate, folded into the batch, or not there at all."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ppvae.inference.structure import Structure


def fold_data(value: Any, num_particles: int, size: int) -> Any:
    """[batch, ...] -> [particles * batch, ...]; anything that is not over the batch stays as it is."""
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == size:
        return value.expand(num_particles, *value.shape).reshape(num_particles * size, *value.shape[1:])
    return value


def particle_dim(value: Tensor, s: Structure, name: str) -> int:
    """Where the particles stand in a latent's value: leftmost, but for dims of sites enumerated in the guide."""
    return max(value.dim() - s.event_dims[name] - s.nesting - 1, 0)


def enumerated_dims(value: Tensor, s: Structure, name: str) -> int:
    """How many dims on the left of a single particle's value belong to sites enumerated in the guide."""
    return max(value.dim() - s.event_dims[name] - s.nesting, 0)


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
    missing = s.nesting + 1 - (value.dim() - s.event_dims[name])
    return value.reshape(value.shape[0], *(1,) * missing, *value.shape[1:]) if missing > 0 else value


def unfold(log_prob: Tensor, num_particles: int, size: int) -> Tensor:
    """[..., particles * batch] -> [..., particles, batch]; a shared site's last dim has size one."""
    if log_prob.shape[-1] == num_particles * size:
        return log_prob.reshape(*log_prob.shape[:-1], num_particles, size)
    return log_prob.unsqueeze(-2)


def over_inner_plates(log_prob: Tensor, nesting: int) -> Tensor:
    """Sums over inner plates: dims -nesting .. -2; keeps the data dim and everything left of the plates."""
    while log_prob.dim() < nesting:
        log_prob = log_prob.unsqueeze(0)
    if nesting > 1:
        log_prob = log_prob.sum(tuple(range(-nesting, -1)))
    return log_prob
