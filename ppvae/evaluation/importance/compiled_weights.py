"""Log-weights from a compiled graph, where there are enough of them to pay for compiling."""

from __future__ import annotations

import time
from typing import final

import torch
from torch import Tensor

from ppvae.compilation.function import SECONDS_PER_NODE, Comparison, CompiledFunction, Outputs, Policy, Target
from ppvae.compilation.graph import CaptureError, all_close, all_double
from ppvae.compilation.guards import Guards
from ppvae.inference.param_store import unwrap
from ppvae.inference.structure import ParticlePlacement, Role, Structure
from ppvae.inference.terms import evaluate_terms
from ppvae.inference.tracing import Program
from ppvae.rng import fork_rng

MIN_SECONDS = 20.0  # seconds of eager runs to come below which nothing is captured
TIMED_RUNS = 3  # eager runs before that


@final
class CompiledWeights:
    """Log-weights and ELBO of one block of particles after another, [particles, batch], as `terms` gives them.

    The first runs are left to `terms` and timed. Where the remaining ones would take long enough, the run of the pair
    is captured and compiled; what does not depend on the draws is computed once for each block of data. The draws are
    those of `terms` from the same random state, and the values equal up to rounding, which is checked.

    Args:
        total: blocks of particles in the whole evaluation.
        precision: of the products in layers, which the caller sets by `layer_precision`.
    """

    def __init__(self, model: Program, guide: Program, s: Structure, num_particles: int, total: int, precision: str):
        self.model, self.guide, self.s, self.num_particles = model, guide, s, num_particles
        self._remaining, self._precision = total, precision
        self._seconds: list[float] = []
        self._last_call = 0.0
        self._function: CompiledFunction | None = None
        self._decided = (
            s.layout is ParticlePlacement.ONE_BY_ONE
            or s.has_global_latents
            or s.draws_subsample
            or Role.CANCELLED in s.model_roles.values()
        )

    def start(self, batch: tuple[Tensor, ...]) -> None:
        """Begins with another block of data."""
        self._batch, self._last_call = batch, 0.0
        self._kind = tuple((t.shape, t.dtype) for t in batch)
        if self._function is not None:
            self._function.block = object()

    def __call__(self) -> tuple[Tensor, Tensor] | None:
        """(log_weight, elbo) of new draws; None where `terms` is to give them."""
        self._remaining -= 1
        if not self._decided:
            now = time.perf_counter()
            if self._last_call:
                self._seconds.append(now - self._last_call)
            self._last_call = now
            if len(self._seconds) >= TIMED_RUNS:
                self.compile(min(self._seconds) * self._remaining)
        out = None if self._function is None else self._function(self._kind, self._batch)
        return None if out is None else (out[0], out[1])

    def compile(self, seconds: float) -> None:
        """Captures and compiles, where the remaining runs would take so many seconds eagerly."""
        self._decided = True
        if seconds < MIN_SECONDS:
            return
        target = Target(
            function=self._run,
            agree=self._agree,
            parameters=self.s.params.values,
            guards=lambda: Guards(model=unwrap(self.model), guide=unwrap(self.guide)),
            varying=(),
        )
        policy = Policy(lambda graph, _: len(graph.module.graph.nodes) * SECONDS_PER_NODE <= seconds, most=1)
        self._function = CompiledFunction(
            target, policy, "log-weights", "log-weights are computed without a compiled graph"
        )
        self._function.block = object()
        with fork_rng():  # these draws belong to the next call
            self._function(self._kind, self._batch)

    def _run(self, *batch: Tensor) -> Outputs:
        t = evaluate_terms(self.model, self.guide, batch, self.num_particles, structure=self.s)
        return [t.log_weight, t.elbo]

    def _agree(self, c: Comparison) -> None:
        """Raises CaptureError unless log-weights [particles, batch] are those of the pair up to rounding."""
        digits = 1e-9 if all_double((*self._batch, *self.s.params.values())) else 1e-5
        for a, b in zip(c.expected, c.found, strict=True):
            same = all_close(a, b, digits * (1 + a.abs()))
            if self._precision == "bf16" and not same:  # a number may be rounded the other way, here up and there down
                ordinary = torch.where(a.isfinite(), a, 0.0).abs()
                same = all_close(a, b, 2**-9 * (1 + ordinary)) and all_close(
                    a.mean(0), b.mean(0), 2**-12 * (1 + ordinary.mean(0))
                )
            if not same:
                raise CaptureError("it gives other weights than the graph of it")
