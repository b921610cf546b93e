"""Potentials and their gradients from a compiled graph, where the run needs enough of them to pay for compiling."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from ppvae.compilation.function import Comparison, CompiledFunction, Outputs, Policy, Target
from ppvae.compilation.graph import CaptureError, all_close
from ppvae.evaluation.unconstrained.chain_state import ChainState
from ppvae.evaluation.unconstrained.potential import Potential

MIN_GRADIENTS = 30_000  # of a run that pay for compiling: a number, not a time, so that results are reproducible


@final
class CompiledPotential:
    """log q and log p(x, z) of states with their gradients, for one block of data after another.

    Args:
        total: gradients of the whole run, in all processes. From `MIN_GRADIENTS` on they come from a graph that is
            captured from `Potential.evaluate` for each shape, compiled, and compared with it. The outputs that do not
            depend on the state, such as an encoder's, are computed once for each block.
    """

    def __init__(self, total: int):
        self._function = None
        if total >= MIN_GRADIENTS:
            fallback = "chains run without a compiled graph"
            self._function = _OfPotential(lambda potential, u: list(potential.evaluate(u)[1:]), _agree, fallback)

    def __call__(self, potential: Potential, u: Tensor) -> ChainState:
        """Densities and gradients at a state [chains, batch, dims] that needs no gradient itself."""
        if self._function is None or not potential.capturable:
            return potential.evaluate(u)
        out = self._function(potential, u)
        return potential.evaluate(u) if out is None else ChainState(u, *out)


class _OfPotential:
    """A compiled function of (potential, state) for one block of data after another; None where none can be used."""

    def __init__(
        self, function: Callable[[Potential, Tensor], Outputs], agree: Callable[[Comparison], None], fallback: str
    ):
        target = Target(
            function=lambda u, *_: function(self._potential, u),
            agree=agree,
            parameters=lambda: self._potential.s.params.values(),
            traced=lambda u, *_: function(self._potential.without_cache(), u),
            varying=(0,),
            deterministic=True,
        )
        self._compiled = CompiledFunction(target, Policy(), "densities", fallback)
        self._potential: Potential

    def __call__(self, potential: Potential, u: Tensor) -> Outputs | None:
        args = (u, *potential.batch)
        self._potential = self._compiled.block = potential
        return self._compiled(tuple((t.shape, t.dtype, t.device) for t in args), args)


def _agree(c: Comparison) -> None:
    for name, a, b in zip(ChainState._fields[1:], c.expected, c.found, strict=True):
        digits = 1e-9 if c.expected[2].dtype == torch.float64 else 1e-4  # a gradient has the type of the state
        a, b = a.double(), b.double()
        if not all_close(a, b, digits * (1 + a.abs().amax())):
            raise CaptureError(f"{name} is another than that of the pair")


MIN_ROWS = 1_000_000  # (particle, datum) rows that pay for compiling, as `MIN_GRADIENTS` does


@final
class CompiledProposalTarget:
    """`Potential.joint_gradient` and `Potential.log_densities`, for one block of data after another, without chains.

    Args:
        gradient_rows, density_rows: (particle, datum) rows of the whole run, in all processes, of either. From
            `MIN_ROWS` on it comes from a graph, compiled and compared with the pair, as in `CompiledPotential`.
        rows: the rows of one call; those of half as many or fewer are left to the pair, others are padded.
    """

    def __init__(self, gradient_rows: int, density_rows: int, rows: int):
        self._rows = rows
        fallback = "proposals are computed without a compiled graph"

        def compiled(function: Callable[[Potential, Tensor], Outputs], total: int) -> _OfPotential | None:
            return None if total < MIN_ROWS else _OfPotential(function, _agree_on_all, fallback)

        self._gradient = compiled(lambda potential, u: [potential.joint_gradient(u)], gradient_rows)
        self._densities = compiled(lambda potential, u: list(potential.log_densities(u)), density_rows)

    def gradient(self, potential: Potential, u: Tensor) -> Tensor:
        """The gradient of log p(x, z) at a state [particles, batch, dims], of the same shape."""
        out = self._call(self._gradient, potential, u)
        return potential.joint_gradient(u) if out is None else out[0]

    def log_densities(self, potential: Potential, u: Tensor) -> tuple[Tensor, Tensor]:
        """log q(z | x) and log p(x, z), [particles, batch], of a state that needs no gradient."""
        with torch.no_grad():
            out = self._call(self._densities, potential, u)
            return potential.log_densities(u) if out is None else (out[0], out[1])

    def _call(self, function: _OfPotential | None, potential: Potential, u: Tensor) -> Outputs | None:
        count, most = len(u), max(1, self._rows // u.shape[1])
        if function is None or not potential.capturable or 2 * count <= most or count > most:
            return None
        if count < most:
            u = torch.cat([u, u[-1:].expand(most - count, *u.shape[1:])])
        out = function(potential, u.contiguous())
        return None if out is None else [t[:count] for t in out]


def _agree_on_all(c: Comparison) -> None:
    for a, b in zip(c.expected, c.found, strict=True):
        digits = 1e-9 if c.expected[0].dtype == torch.float64 and a.dim() > 2 else 1e-4
        if not all_close(a.double(), b.double(), digits * (1 + a.double().abs().amax())):
            raise CaptureError("a density is another than that of the pair")
