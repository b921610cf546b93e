"""Steps and estimates of ppvae, and Pyro's `SVI`, on the same pairs."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor

from experiments.bench import Settings, Timed
from experiments.bench.hand_written import per_step
from experiments.bench.pairs import build, data
from ppvae import log_marginal, objectives
from ppvae.compilation.precision import layer_precision
from ppvae.evaluation.blocks import DATA_BLOCK, PARTICLE_BLOCK
from ppvae.evaluation.importance.accumulators import LogWeightAccumulator, recorded_bounds
from ppvae.evaluation.importance.compiled_weights import CompiledWeights
from ppvae.inference import inspect
from ppvae.inference.svi import SVI

ADAM = functools.partial(torch.optim.Adam, lr=1e-3)


def step(
    kind: str,
    s: Settings,
    particles: int,
    kernels: str,
    precision: str = "float32",
    optim: Callable[..., Any] = lambda: ADAM,
) -> Timed:
    """Seconds per step of `ppvae.inference.SVI`, without the time of capture and compilation."""
    pair, batch = build(kind, s), data(kind, s.batch)
    loss = objectives.IWAE(particles) if particles > 1 else objectives.ELBO()
    svi = SVI(pair.model, pair.guide, optim(), loss)
    svi.precision = precision
    svi.use(kernels, settled=True)
    one = _without_validation(svi)
    for _ in range(3):
        one(batch)
    if svi.kernels != kernels:
        raise RuntimeError(f"expected steps by {kernels!r}, found {svi.kernels!r}")
    return per_step(one, batch, s.steps_of(particles))


def many_steps(kind: str, s: Settings, particles: int) -> Timed:
    """Seconds per step of `ppvae.inference.SVI.steps`, compiled, of a round in one call."""
    pair, batch = build(kind, s), data(kind, s.batch)
    loss = objectives.IWAE(particles) if particles > 1 else objectives.ELBO()
    svi = SVI(pair.model, pair.guide, ADAM, loss)
    svi.use("compiled", settled=True)
    batches = [(batch,)] * s.steps_of(particles)

    def run() -> float:
        start = time.perf_counter()
        with pyro.validation_enabled(False):
            svi.steps(batches)
        return (time.perf_counter() - start) / len(batches)

    run()
    if svi.kernels != "compiled":
        raise RuntimeError(f"expected compiled steps, found {svi.kernels!r}")
    return run


def pyro_step(kind: str, s: Settings, particles: int) -> Timed:
    """Seconds per step of Pyro's `SVI`, used as in its VAE example; RenyiELBO(0) for the IWAE bound."""
    pair = build(kind, s)
    elbo: Any = pyro.infer.Trace_ELBO()
    if particles > 1:
        elbo = pyro.infer.RenyiELBO(alpha=0, num_particles=particles, vectorize_particles=True)
    svi = pyro.infer.SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
    return per_step(_without_validation(svi), data(kind, s.batch), s.steps_of(particles))


def _without_validation(svi: Any) -> Any:
    def one(batch: Tensor) -> None:
        with pyro.validation_enabled(False):
            svi.step(batch)

    return one


def log_px(s: Settings) -> Timed:
    """Microseconds per (datum, particle) of eager `log_marginal`, with all diagnostics."""
    pair, x = build("one layer", s), data("one layer", s.num_eval)

    def run() -> float:
        start = time.perf_counter()
        log_marginal(
            pair.model, pair.guide, x, num_particles=s.particles, progress=False, compile=False, proposal="guide"
        )
        return (time.perf_counter() - start) / (len(x) * s.particles) * 1e6

    return run


def compiled_log_px(s: Settings, precision: str = "float32") -> Timed:
    """Microseconds per (datum, particle) of the compiled graph with all reductions, without compilation."""
    pair, batches = build("one layer", s), data("one layer", s.num_eval).split(DATA_BLOCK)
    structure = inspect(pair.model, pair.guide, (batches[0],))
    cells = CompiledWeights(pair.model, pair.guide, structure, PARTICLE_BLOCK, 0, precision)
    with torch.no_grad(), pyro.validation_enabled(False), layer_precision(precision):
        cells.start((batches[0],))
        cells.compile(math.inf)

    @torch.no_grad()
    def run() -> float:
        start = time.perf_counter()
        for batch in batches:
            cells.start((batch,))
            weights = LogWeightAccumulator(s.particles, recorded_bounds(s.particles), torch.finfo(torch.float32).eps)
            for _ in range(s.particles // PARTICLE_BLOCK):
                cell = cells()
                if cell is None:
                    raise RuntimeError("expected compiled log-weights, found none")
                weights.add(*cell)
            weights.result()
        return (time.perf_counter() - start) / (s.num_eval * s.particles) * 1e6

    return run


PEAK = """
import re, resource, torch
from pathlib import Path
from experiments.bench import Settings
from experiments.bench.pairs import build, data
from ppvae import log_marginal
torch.set_num_threads(1)
pair = build("one layer", Settings())
log_marginal(pair.model, pair.guide, data("one layer", 50), num_particles={particles}, compile=False,
    proposal="guide")
try:  # getrusage includes the memory of the parent process
    print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024)
except OSError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def peak_memory(particles: int) -> float:
    """Peak memory in megabytes of a separate process that evaluates fifty data.

    Its malloc returns freed blocks at once: heap fragmentation in glibc would add up to 15 %, at random.
    """
    code, env = PEAK.format(particles=particles), os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=env).stdout)
