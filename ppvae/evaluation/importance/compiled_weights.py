"""Log-weights from a compiled graph, where there are enough of them to pay for compiling."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from ppvae.compilation.graph import CaptureError, all_close, capture, compiled, one_line_reason
from ppvae.compilation.guards import Guards
from ppvae.inference.compiled_step import SECONDS_PER_NODE
from ppvae.inference.param_store import unwrap
from ppvae.inference.structure import Layout, Role, Structure
from ppvae.inference.terms import evaluate_terms
from ppvae.inference.tracing import Program
from ppvae.rng import fork_rng

log = logging.getLogger("ppvae")
LEAST = 20.0  # seconds of runs to come for which a graph is thought of at all
LOOK = 3  # runs of the pair that are timed first


@final
class CompiledWeights:
    """Log-weights and ELBO of one block of particles after another, [particles, batch], as `terms` gives them.

    The first few are left to `terms`, and timed. Where what is to come takes long enough, the run of the pair is
    captured as a graph and compiled; what does not depend on the draws is computed once for each block of data. The
    draws are those of `terms` from the same random state, and the values equal up to rounding, which is checked.
    """

    def __init__(self, model: Program, guide: Program, s: Structure, num_particles: int, total: int, precision: str):
        self.model, self.guide, self.s, self.num_particles, self._left = model, guide, s, num_particles, total
        self._precision = precision
        self._seconds: list[float] = []
        self._asked = 0.0
        self._once: Callable[..., Any] | None = None
        self._each: Callable[..., Any] | None = None
        self._held: list[Tensor] = []
        self._shared: list[Tensor] | None = None
        self._over = (
            s.layout is Layout.ONE_BY_ONE
            or s.has_global_latents
            or s.draws_subsample
            or Role.CANCELLED in s.model_roles.values()
        )
        self._kinds: list[tuple[Any, ...]] = []

    def start(self, batch: tuple[Tensor, ...]) -> None:
        """Begins with another block of data."""
        self._batch, self._shared, self._asked = batch, None, 0.0

    def __call__(self) -> tuple[Tensor, Tensor] | None:
        """(log_weight, elbo) of new draws; None where `terms` is to give them."""
        self._left -= 1
        if self._each is None and not self._over:
            now = time.perf_counter()
            if self._asked:
                self._seconds.append(now - self._asked)
            self._asked = now
            if len(self._seconds) >= LOOK:
                self.compile(min(self._seconds) * self._left)
        if self._each is None or [(t.shape, t.dtype) for t in self._batch] != self._kinds:
            return None
        assert self._once is not None
        if self._shared is None:
            self._shared = self._once(*self._held, *self._batch)
        log_weight, elbo = self._each(*self._shared)
        return log_weight, elbo

    def _run(self) -> list[Tensor]:
        t = evaluate_terms(self.model, self.guide, self._batch, self.num_particles, structure=self.s)
        return [t.log_weight, t.elbo]

    def compile(self, seconds: float) -> None:
        """Captures and compiles, where what is to come would take so many seconds as things are."""
        self._over = True
        if seconds < LEAST:
            return
        try:
            with fork_rng():
                watch = Guards(model=unwrap(self.model), guide=unwrap(self.guide))
                graph = capture(self._run, list(self.s.params.values()), self._batch)
                if what := watch.changed():
                    raise CaptureError(f"it changes {what} as it runs")
                if len(graph.module.graph.nodes) * SECONDS_PER_NODE > seconds:
                    return
                once, each = graph.divided()
                self._once, self._held = once.forward, graph.held
                shared = once.forward(*graph.held, *self._batch)
                call = compiled(each, shared, {})
                state = torch.get_rng_state()
                expected = self._run()
                torch.set_rng_state(state)
                for a, b in zip(expected, call(*shared), strict=True):
                    self._compare(a, b)
        except Exception as error:
            log.warning("ppvae: log-weights are computed without a compiled graph: %s", one_line_reason(error))
            return
        self._each, self._kinds = call, [(t.shape, t.dtype) for t in self._batch]

    def _compare(self, a: Tensor, b: Tensor) -> None:
        """Raises Uncapturable unless log-weights [particles, batch] are those of the pair up to rounding."""
        kinds = [t.dtype for t in (*self._batch, *self.s.params.values()) if t.is_floating_point()]
        digits = 1e-9 if all(k == torch.float64 for k in kinds) else 1e-5
        same = all_close(a, b, digits * (1 + a.abs()))
        if self._precision == "bf16" and not same:  # a number may be rounded the other way, here up and there down
            ordinary = torch.where(a.isfinite(), a, 0.0).abs()
            same = all_close(a, b, 2**-9 * (1 + ordinary)) and all_close(
                a.mean(0), b.mean(0), 2**-12 * (1 + ordinary.mean(0))
            )
        if not same:
            raise CaptureError("it gives other weights than the graph of it")
