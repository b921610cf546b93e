"""Who is timed at what: how each is made ready, by name."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import TypeAlias

from experiments.bench import Settings, Timed, by_hand, by_others, by_ppvae
from ppvae.compilation.runtime import prepare_process
from ppvae.evaluation.blocks import DATA_BLOCK, PARTICLE_BLOCK

Key: TypeAlias = tuple[Hashable, ...]  # (what, who, ...)
Contenders: TypeAlias = dict[Key, Callable[[], Timed]]

STEPS = {"VAE step": "one layer", "convolutional step": "convolutional", "hierarchical step": "two layers"}
CURVES = {"batch": (25, 50, 100, 200, 400), "particles": (1, 2, 5, 10, 20, 50), "latent": (10, 25, 50, 100, 200)}
CELL = DATA_BLOCK * PARTICLE_BLOCK  # log-weights at a time


def contenders(s: Settings, threads: int) -> Contenders:
    """{(what, who): how it is made ready} of the table and {(axis, who, value): the same} of the curves."""
    made: Contenders = {}
    kinds = {**{what: (kind, 1) for what, kind in STEPS.items()}, f"IWAE-{s.iwae} step": ("one layer", s.iwae)}
    for what, (kind, k) in kinds.items():
        made[what, "hand-written"] = functools.partial(by_hand.step, kind, s, k, False)
        made[what, "torch.compile"] = functools.partial(by_hand.step, kind, s, k, True)
        made[what, "Pyro's SVI"] = functools.partial(by_ppvae.pyro_step, kind, s, k)
        for kernels in ("eager", "compiled"):
            made[what, f"ppvae {kernels}"] = functools.partial(by_ppvae.step, kind, s, k, kernels)
        made[what, "ppvae compiled, bf16"] = functools.partial(by_ppvae.step, kind, s, k, "compiled", "bf16")
    made["log p(x)", "hand-written"] = functools.partial(by_hand.log_px, s, False)
    made["log p(x)", "torch.compile"] = functools.partial(by_hand.log_px, s, True)
    made["log p(x)", "ppvae eager"] = functools.partial(by_ppvae.log_px, s)
    made["log p(x)", "ppvae compiled"] = functools.partial(by_ppvae.compiled_log_px, s)
    made["log p(x)", "ppvae compiled, bf16"] = functools.partial(by_ppvae.compiled_log_px, s, "bf16")
    for what, who in [key for key in made if key[1] == "hand-written"]:
        made[what, f"{who}, warm"] = functools.partial(_warm, made[what, who])
    made |= by_others.contenders(s, threads)
    for what, (layers, gradients) in bare(s).items():
        repeats = s.steps if what == "VAE step" else s.steps_of(s.iwae)
        per = 1e6 / CELL if what == "log p(x)" else 1.0
        for who, onednn in (("products, usual", False), ("products, oneDNN", True)):
            alone = functools.partial(by_hand.products, layers, gradients, onednn, repeats, per)
            made[what, who] = functools.partial(_warm, alone)  # a bound is not to pay for fresh pages of memory
    for axis, values in CURVES.items():
        for value in values:
            one = s if axis == "particles" else dataclasses.replace(s, **{axis: value})
            k = value if axis == "particles" else 1
            made[axis, "hand-written", value] = functools.partial(by_hand.step, "one layer", one, k, False)
            made[axis, "ppvae compiled", value] = functools.partial(by_ppvae.step, "one layer", one, k, "compiled")
    return made


def _warm(make: Callable[[], Timed]) -> Timed:
    """A contender in a process that ppvae has prepared as it does for its own runs."""
    prepare_process()
    return make()


def bare(s: Settings) -> dict[str, tuple[list[by_hand.Layer], bool]]:
    """{what: (its layers, whether with gradients)} of what bare matrix products are timed of."""
    return {
        "VAE step": (by_hand.layers(s, (s.batch, s.batch)), True),
        f"IWAE-{s.iwae} step": (by_hand.layers(s, (s.batch, s.batch * s.iwae)), True),
        "log p(x)": (by_hand.layers(s, (0, CELL)), False),
    }


def flops(s: Settings) -> dict[str, float]:
    """Of the products of a step, or of one (datum, particle)."""
    counts = {what: sum(n.flops(gradients) for n in layers) for what, (layers, gradients) in bare(s).items()}
    return counts | {"log p(x)": counts["log p(x)"] / CELL}
