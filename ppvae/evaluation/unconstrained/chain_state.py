"""The state of all chains with its two log-densities and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class ChainState(NamedTuple):
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
        pairs = zip(self, other, strict=True)
        return ChainState(*(torch.where(chosen if a.dim() == 2 else chosen[..., None], a, b) for a, b in pairs))

    def select_chains(self, index: Tensor) -> ChainState:
        """The chains `index` [chains, batch] of each datum."""
        per_dim = index[..., None].expand_as(self.u)
        return ChainState(*(t.gather(0, index if t.dim() == 2 else per_dim) for t in self))


def concatenate_states(parts: Sequence[ChainState]) -> ChainState:
    """States of some chains each, as the state of all chains."""
    return parts[0] if len(parts) == 1 else ChainState(*map(torch.cat, zip(*parts, strict=True)))
