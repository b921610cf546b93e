"""Potentials and their gradients from a compiled graph, where the run needs enough of them to pay for compiling."""

from __future__ import annotations

from typing import Protocol, final

import torch
from torch import Tensor

from ppvae.compilation.function import Comparison, CompiledFunction, Outputs, Policy, Target
from ppvae.compilation.graph import CaptureError, all_close
from ppvae.evaluation.annealing.chain_state import ChainState
from ppvae.inference.structure import Structure

MIN_GRADIENTS = 30_000  # of a run that pay for compiling: a number, not a time, so that results are reproducible


class DifferentiablePotential(Protocol):
    """What is compiled of a `Potential`: its densities and gradients at a state, for one block of data."""

    batch: tuple[Tensor, ...]
    s: Structure

    @property
    def capturable(self) -> bool:
        """Whether a graph of `point` would serve other blocks of data of the same shape, too."""

    def without_cache(self) -> DifferentiablePotential:
        """The same densities without cached values."""

    def evaluate(self, u: Tensor) -> ChainState:
        """Densities and gradients at a state [chains, batch, dims], by a run of the pair."""


@final
class CompiledPotential:
    """log q and log p(x, z) of states with their gradients, for one block of data after another.

    Args:
        total: gradients of the whole run, in all processes. From `MIN_GRADIENTS` on they come from a graph that is
            captured from `Potential.evaluate` for each shape, compiled, and compared with it. What does not depend on
            the state, as an encoder's output, is computed once for each block.
    """

    def __init__(self, total: int):
        target = Target(
            function=lambda u, *_: _outputs(self._density.evaluate(u)),
            agree=_agree,
            parameters=lambda: self._density.s.params.values(),
            traced=lambda u, *_: _outputs(self._density.without_cache().evaluate(u)),
            varying=(0,),
            deterministic=True,
        )
        fallback = "chains run without a compiled graph"
        self._function = None if total < MIN_GRADIENTS else CompiledFunction(target, Policy(), "densities", fallback)
        self._density: DifferentiablePotential

    def __call__(self, density: DifferentiablePotential, u: Tensor) -> ChainState:
        """The point at a state [chains, batch, dims] that needs no gradient itself."""
        if self._function is None or not density.capturable:
            return density.evaluate(u)
        args = (u, *density.batch)
        self._density = self._function.block = density
        out = self._function(tuple((t.shape, t.dtype, t.device) for t in args), args)
        return density.evaluate(u) if out is None else ChainState(u, *out)


def _outputs(point: ChainState) -> Outputs:
    return [point.log_start, point.log_joint, point.grad_start, point.grad_joint]


def _agree(c: Comparison) -> None:
    names = ("log_start", "log_joint", "grad_start", "grad_joint")
    for name, a, b in zip(names, c.expected, c.found, strict=True):
        digits = 1e-9 if c.expected[2].dtype == torch.float64 else 1e-4  # a gradient has the type of the state
        a, b = a.double(), b.double()
        if not all_close(a, b, digits * (1 + a.abs().amax())):
            raise CaptureError(f"{name} is another than that of the pair")
