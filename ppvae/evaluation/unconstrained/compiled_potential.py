"""Potentials and their gradients from a compiled graph, where the run needs enough of them to pay for compiling."""

from __future__ import annotations

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
        target = Target(
            function=lambda u, *_: _outputs(self._potential.evaluate(u)),
            agree=_agree,
            parameters=lambda: self._potential.s.params.values(),
            traced=lambda u, *_: _outputs(self._potential.without_cache().evaluate(u)),
            varying=(0,),
            deterministic=True,
        )
        fallback = "chains run without a compiled graph"
        self._function = None if total < MIN_GRADIENTS else CompiledFunction(target, Policy(), "densities", fallback)
        self._potential: Potential

    def __call__(self, potential: Potential, u: Tensor) -> ChainState:
        """Densities and gradients at a state [chains, batch, dims] that needs no gradient itself."""
        if self._function is None or not potential.capturable:
            return potential.evaluate(u)
        args = (u, *potential.batch)
        self._potential = self._function.block = potential
        out = self._function(tuple((t.shape, t.dtype, t.device) for t in args), args)
        return potential.evaluate(u) if out is None else ChainState(u, *out)


def _outputs(state: ChainState) -> Outputs:
    return list(state[1:])


def _agree(c: Comparison) -> None:
    for name, a, b in zip(ChainState._fields[1:], c.expected, c.found, strict=True):
        digits = 1e-9 if c.expected[2].dtype == torch.float64 else 1e-4  # a gradient has the type of the state
        a, b = a.double(), b.double()
        if not all_close(a, b, digits * (1 + a.abs().amax())):
            raise CaptureError(f"{name} is another than that of the pair")
