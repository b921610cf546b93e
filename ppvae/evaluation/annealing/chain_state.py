"""A state of all chains with its two densities and their gradients, and the densities in between."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChainState:
    """A state and its two densities with their gradients: what a leapfrog step needs."""

    u: Tensor  # [chains, batch, dims]
    log_start: Tensor  # [chains, batch], float64
    log_joint: Tensor
    grad_start: Tensor  # [chains, batch, dims]
    grad_joint: Tensor

    @property
    def log_weight(self) -> Tensor:
        """log p(x, z) - log q(z | x), [chains, batch]."""
        return self.log_joint - self.log_start

    def tempered(self, beta: Tensor) -> tuple[Tensor, Tensor]:
        """(1 - beta) log start + beta log joint, and its gradient; 0 * -inf is 0."""
        zero = torch.zeros_like(self.log_joint)
        value = torch.where(beta > 0, beta * self.log_joint, zero) + torch.where(
            beta < 1, (1 - beta) * self.log_start, zero
        )
        b = beta.to(self.u.dtype)[..., None]
        return value, (1 - b) * self.grad_start + b * self.grad_joint

    def where(self, chosen: Tensor, other: ChainState) -> ChainState:
        """This point where `chosen` [chains, batch], the other elsewhere."""
        wide = chosen[..., None]
        return ChainState(
            torch.where(wide, self.u, other.u),
            torch.where(chosen, self.log_start, other.log_start),
            torch.where(chosen, self.log_joint, other.log_joint),
            torch.where(wide, self.grad_start, other.grad_start),
            torch.where(wide, self.grad_joint, other.grad_joint),
        )

    def taken(self, index: Tensor) -> ChainState:
        """The chains `index` [chains, batch] of each datum."""
        wide = index[..., None].expand_as(self.u)
        return ChainState(
            self.u.gather(0, wide), self.log_start.gather(0, index), self.log_joint.gather(0, index),
            self.grad_start.gather(0, wide), self.grad_joint.gather(0, wide),
        )  # fmt: skip


def concatenate_states(parts: list[ChainState]) -> ChainState:
    """Points of some chains each as the point of all of them."""
    if len(parts) == 1:
        return parts[0]
    names = ("u", "log_start", "log_joint", "grad_start", "grad_joint")
    return ChainState(*(torch.cat([getattr(p, name) for p in parts]) for name in names))
