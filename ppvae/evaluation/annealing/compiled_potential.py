"""Densities of states and their gradients from a compiled graph, where a run needs enough of them to pay for it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from ppvae.compilation.graph import CaptureError, all_close, capture, compiled, one_line_reason
from ppvae.evaluation.annealing.chain_state import ChainState

if TYPE_CHECKING:
    from ppvae.evaluation.annealing.potential import Potential

log = logging.getLogger("ppvae")
MANY = 30_000  # gradients that pay for a graph: a number, not a time, so that a run gives the same again


@dataclass
class _Made:
    """The graph for one kind of state and block: what is the same for all states, and the rest."""

    once: Callable[..., Any]
    each: Callable[..., Any]
    held: list[Tensor]
    of: Potential | None = None  # whose block `shared` was computed for
    shared: list[Tensor] = field(default_factory=list)

    def __call__(self, density: Potential, u: Tensor) -> ChainState:
        if self.of is not density:
            self.of, self.shared = density, list(self.once(*self.held, *density.batch))
        return ChainState(u, *self.each(*self.shared, u))


@final
class CompiledPotential:
    """log q and log p(x, z) of states with their gradients, for one block of data after another.

    Args:
        total: gradients that the whole run takes, in all processes: with `MANY` of them they come from a graph that is
            captured from `Potential.evaluate` and compiled, one for each shape, and checked against it. What does not
            depend on the state, an encoder say, is computed once for each block.
    """

    def __init__(self, total: int):
        self._over = total < MANY
        self._made: dict[Any, _Made] = {}

    def __call__(self, density: Potential, u: Tensor) -> ChainState:
        """The point at a state [chains, batch, dims] that needs no gradient itself."""
        if self._over or not density.capturable:
            return density.evaluate(u)
        kind = tuple((t.shape, t.dtype, t.device) for t in (u, *density.batch))
        if kind not in self._made:
            try:
                self._made[kind] = _make(density, u)
            except Exception as error:
                self._over = True
                log.warning("ppvae: chains run without a compiled graph: %s", one_line_reason(error))
                return density.evaluate(u)
        with torch.no_grad():
            return self._made[kind](density, u)


def _make(density: Potential, u: Tensor) -> _Made:
    """Captures, compiles and checks."""
    alone = density.without_cache()

    def run() -> list[Tensor]:
        point = alone.evaluate(u)
        return [point.log_start, point.log_joint, point.grad_start, point.grad_joint]

    graph = capture(run, list(density.s.params.values()), (u, *density.batch))
    if graph.draws:
        raise CaptureError("the densities draw random numbers")
    once, each = graph.divided(0)
    with torch.no_grad():
        shared = once.forward(*graph.held, *density.batch)
        made = _Made(once.forward, compiled(each, [*shared, u], {}), graph.held)
        found = made(density, u)
    expected = density.evaluate(u)
    for name in ("log_start", "log_joint", "grad_start", "grad_joint"):
        a, b = getattr(expected, name).double(), getattr(found, name).double()
        near = (1e-9 if u.dtype == torch.float64 else 1e-4) * (1 + a.abs().amax())
        if not all_close(a, b, near):
            raise CaptureError(f"{name} is another than that of the pair")
    return made
