"""The state of all chains with its two log-densities and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChainState:
    """A state with the log-densities and gradients that a leapfrog step needs."""

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
        """This state where `chosen` [chains, batch], the other elsewhere."""
        per_dim = chosen[..., None]
        return ChainState(
            torch.where(per_dim, self.u, other.u),
            torch.where(chosen, self.log_start, other.log_start),
            torch.where(chosen, self.log_joint, other.log_joint),
            torch.where(per_dim, self.grad_start, other.grad_start),
            torch.where(per_dim, self.grad_joint, other.grad_joint),
        )

    def gather(self, index: Tensor) -> ChainState:
        """The chains `index` [chains, batch] of each datum."""
        per_dim = index[..., None].expand_as(self.u)
        return ChainState(
            self.u.gather(0, per_dim), self.log_start.gather(0, index), self.log_joint.gather(0, index),
            self.grad_start.gather(0, per_dim), self.grad_joint.gather(0, per_dim),
        )  # fmt: skip


def concatenate_states(parts: Sequence[ChainState]) -> ChainState:
    """States of some chains each, as the state of all chains."""
    if len(parts) == 1:
        return parts[0]
    return ChainState(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(ChainState)))
