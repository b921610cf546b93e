"""The contenders: functions that set up what is timed, by row of the table and name."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import TypeAlias

import pyro
import torch

from experiments.bench import Settings, Timed, hand_written, other_libraries, ppvae_and_pyro
from ppvae.compilation.process_setup import prepare_process
from ppvae.evaluation.blocks import DATA_BLOCK, PARTICLE_BLOCK

Key: TypeAlias = tuple[Hashable, ...]  # (row of the table, contender, ...)
Contenders: TypeAlias = dict[Key, Callable[[], Timed]]

STEPS = {"VAE step": "one layer", "convolutional step": "convolutional", "hierarchical step": "two layers"}
CURVES = {"batch": (25, 50, 100, 200, 400), "particles": (1, 2, 5, 10, 20, 50), "latent": (10, 25, 50, 100, 200)}
SHORT = (200, 1000)  # data and particles of an evaluation that is too short to be compiled
CELL = DATA_BLOCK * PARTICLE_BLOCK  # log-weights per call


def contenders(s: Settings, threads: int) -> Contenders:
    """Set-up functions of the table {(row, contender): ...} and of the curves {(axis, contender, value): ...}."""
    out: Contenders = {}
    kinds = {**{what: (kind, 1) for what, kind in STEPS.items()}, f"IWAE-{s.iwae} step": ("one layer", s.iwae)}
    for what, (kind, k) in kinds.items():
        out[what, "hand-written"] = functools.partial(hand_written.step, kind, s, k, False)
        out[what, "torch.compile"] = functools.partial(hand_written.step, kind, s, k, True)
        out[what, "Pyro's SVI"] = functools.partial(ppvae_and_pyro.pyro_step, kind, s, k)
        for kernels in ("eager", "compiled"):
            out[what, f"ppvae {kernels}"] = functools.partial(ppvae_and_pyro.step, kind, s, k, kernels)
        out[what, "ppvae, many steps"] = functools.partial(ppvae_and_pyro.many_steps, kind, s, k)
        out[what, "ppvae compiled, bf16"] = functools.partial(ppvae_and_pyro.step, kind, s, k, "compiled", "bf16")
    of_pyro = functools.partial(pyro.optim.Adam, {"lr": 1e-3})
    out["VAE step", "ppvae, pyro.optim"] = functools.partial(
        ppvae_and_pyro.step, "one layer", s, 1, "compiled", optim=of_pyro
    )
    short = dataclasses.replace(s, particles=min(SHORT[1], s.particles), num_eval=min(SHORT[0], 2 * s.num_eval))
    out["short log p(x)", "hand-written"] = functools.partial(hand_written.log_px, short, False)
    out["short log p(x)", "ppvae eager"] = functools.partial(ppvae_and_pyro.log_px, short)
    out["log p(x)", "hand-written"] = functools.partial(hand_written.log_px, s, False)
    out["log p(x)", "torch.compile"] = functools.partial(hand_written.log_px, s, True)
    out["log p(x)", "ppvae eager"] = functools.partial(ppvae_and_pyro.log_px, s)
    out["log p(x)", "ppvae compiled"] = functools.partial(ppvae_and_pyro.compiled_log_px, s)
    out["log p(x)", "ppvae compiled, bf16"] = functools.partial(ppvae_and_pyro.compiled_log_px, s, "bf16")
    for key in [key for key in out if key[1] in ("hand-written", "torch.compile")]:
        out[key] = functools.partial(_prepared, out[key], flush=True)
    out |= other_libraries.contenders(s, threads)
    for what, (layers, gradients) in matmul_layers(s).items():
        repeats = s.steps if what == "VAE step" else s.steps_of(s.iwae)
        per = 1e6 / CELL if what == "log p(x)" else 1.0
        for who, onednn in (("products, usual", False), ("products, oneDNN", True)):
            alone = functools.partial(hand_written.matrix_products, layers, gradients, onednn, repeats, per)
            out[what, who] = functools.partial(_prepared, alone)  # a lower bound excludes page faults of fresh memory
    for axis, values in CURVES.items():
        for value in values:
            one = s if axis == "particles" else dataclasses.replace(s, **{axis: value})
            k = value if axis == "particles" else 1
            by_hand = functools.partial(hand_written.step, "one layer", one, k, False)
            out[axis, "hand-written", value] = functools.partial(_prepared, by_hand, flush=True)
            out[axis, "ppvae compiled", value] = functools.partial(ppvae_and_pyro.step, "one layer", one, k, "compiled")
    return out


def _prepared(make: Callable[[], Timed], flush: bool = False) -> Timed:
    """Sets up a contender in a process prepared as ppvae prepares its own runs.

    With `flush`, subnormal numbers count as zeros in all its threads, which start later, as in compiled steps of ppvae.
    """
    prepare_process()
    if flush:
        torch.set_flush_denormal(True)
    return make()


def matmul_layers(s: Settings) -> dict[str, tuple[list[hand_written.Layer], bool]]:
    """{row: (its layers, whether gradients are computed)} of the rows for which bare matrix products are timed."""
    return {
        "VAE step": (hand_written.layers(s, (s.batch, s.batch)), True),
        f"IWAE-{s.iwae} step": (hand_written.layers(s, (s.batch, s.batch * s.iwae)), True),
        "log p(x)": (hand_written.layers(s, (0, CELL)), False),
    }


def flops(s: Settings) -> dict[str, float]:
    """Floating-point operations of the matrix products of a step, or of one (datum, particle)."""
    counts = {what: sum(n.flops(gradients) for n in layers) for what, (layers, gradients) in matmul_layers(s).items()}
    return counts | {"log p(x)": counts["log p(x)"] / CELL}
