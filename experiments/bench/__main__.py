"""The benchmark's table and picture."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from experiments.bench import SMOKE, Settings, Timed, __doc__, by_hand, by_others, by_ppvae, processor
from experiments.bench.picture import costs
from ppvae import plots
from ppvae.evaluation.blocks import DATA_BLOCK, PARTICLE_BLOCK

STEPS = {"VAE step": "one layer", "convolutional step": "convolutional", "hierarchical step": "two layers"}
CURVES = {"batch": (25, 50, 100, 200, 400), "particles": (1, 2, 5, 10, 20, 50), "latent": (10, 25, 50, 100, 200)}


def contenders(s: Settings, threads: int) -> tuple[dict[tuple[str, str], Callable[[], Timed]], dict[str, float]]:
    """({(what, who): how it is made ready}, flops of what there are bare products of)."""
    made: dict[tuple[str, str], Callable[[], Timed]] = {}
    kinds = {**{what: (kind, 1) for what, kind in STEPS.items()}, f"IWAE-{s.iwae} step": ("one layer", s.iwae)}
    for what, (kind, k) in kinds.items():
        made[what, "hand-written"] = lambda kind=kind, k=k: by_hand.step(kind, s, k, False)
        made[what, "torch.compile"] = lambda kind=kind, k=k: by_hand.step(kind, s, k, True)
        made[what, "Pyro's SVI"] = lambda kind=kind, k=k: by_ppvae.pyro_step(kind, s, k)
        for kernels in ("eager", "compiled"):
            made[what, f"ppvae {kernels}"] = lambda kind=kind, k=k, n=kernels: by_ppvae.step(kind, s, k, n)
        made[what, "ppvae compiled, bf16"] = lambda kind=kind, k=k: by_ppvae.step(kind, s, k, "compiled", "bf16")
    made["log p(x)", "hand-written"] = lambda: by_hand.log_px(s, False)
    made["log p(x)", "torch.compile"] = lambda: by_hand.log_px(s, True)
    made["log p(x)", "ppvae eager"] = lambda: by_ppvae.log_px(s)
    made["log p(x)", "ppvae compiled"] = lambda: by_ppvae.compiled_log_px(s)
    made["log p(x)", "ppvae compiled, bf16"] = lambda: by_ppvae.compiled_log_px(s, "bf16")
    made |= by_others.contenders(s, threads)
    cell, flops = DATA_BLOCK * PARTICLE_BLOCK, {}
    shapes = {"VAE step": ((s.batch, s.batch), True), f"IWAE-{s.iwae} step": ((s.batch, s.batch * s.iwae), True)}
    for what, (rows, back) in (shapes | {"log p(x)": ((0, cell), False)}).items():
        per = 1e6 / cell if what == "log p(x)" else 1.0
        for onednn, who in ((False, "products, usual"), (True, "products, oneDNN")):
            run, count = by_hand.products(s, rows, back, onednn)
            made[what, who] = lambda run=run, per=per: lambda: per * run()
            flops[what] = count / cell if what == "log p(x)" else count
    return made, flops


def medians(made: dict[Any, Callable[[], Timed]], rounds: int) -> dict[Any, list[float]]:
    """Rounds of everything, interleaved; the first one warms up."""
    ready = {key: make() for key, make in made.items()}
    times: dict[Any, list[float]] = {key: [] for key in ready}
    for round_ in range(rounds + 1):
        for key, run in ready.items():
            seconds = run()
            if round_:
                times[key].append(seconds)
    return times


def curves(s: Settings, which: dict[str, tuple[int, ...]]) -> dict[str, dict[str, dict[int, float]]]:
    """{what changes: {who: {its value: seconds per step}}}."""
    made: dict[tuple[str, str, int], Callable[[], Timed]] = {}
    for axis, values in which.items():
        for value in values:
            one = s if axis == "particles" else dataclasses.replace(s, **{axis: value})
            k = value if axis == "particles" else 1
            made[axis, "hand-written", value] = lambda one=one, k=k: by_hand.step("one layer", one, k, False)
            made[axis, "ppvae", value] = lambda one=one, k=k: by_ppvae.step("one layer", one, k, "compiled")
    found: dict[str, dict[str, dict[int, float]]] = {axis: {} for axis in which}
    for (axis, who, value), seconds in medians(made, s.rounds).items():
        found[axis].setdefault(who, {})[value] = statistics.median(seconds)
    return found


def printed(what: str, who: str, times: list[float], ratio: float, flops: float | None) -> str:
    """One line of the table."""
    median = statistics.median(times)
    unit = f"{median:8.2f} us per (datum, particle)" if what == "log p(x)" else f"{median * 1e3:8.2f} ms per step"
    rate = "" if flops is None else f"{flops / (median * (1e-6 if what == 'log p(x)' else 1)) / 1e9:6.0f} GFLOP/s"
    return f"{what:20} {who:21} {unit:36} {ratio:5.2f} of hand-written {rate}"


def main(args: list[str] | None = None) -> None:
    """Prints the table, and writes it with the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything; the figures mean nothing")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, default=Path("runs/bench.json"))
    given = parser.parse_args(args)
    torch.set_num_threads(given.threads)
    s = SMOKE if given.smoke else Settings()
    made, flops = contenders(s, given.threads)
    times = medians(made, s.rounds)
    rows = []
    print(f"{processor()}, {given.threads} threads, torch {torch.__version__}")
    for what, who in sorted(times, key=lambda key: list(dict.fromkeys(w for w, _ in times)).index(key[0])):
        ratio = statistics.median(times[what, who]) / statistics.median(times[what, "hand-written"])
        rows.append({"what": what, "who": who, "ratio": ratio, "rounds": times[what, who]})
        print(printed(what, who, times[what, who], ratio, flops.get(what)))
    memory = {k: by_ppvae.peak_memory(k) for k in ((25, 50) if given.smoke else (500, 5000, 50_000))}
    print("peak memory of log_marginal: " + ", ".join(f"{mb:.0f} MB at K = {k}" for k, mb in memory.items()))
    found = curves(s, {axis: values[:1] for axis, values in CURVES.items()} if given.smoke else CURVES)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    content = {"settings": dataclasses.asdict(s), "machine": processor(), "threads": given.threads, "rows": rows}
    given.output.write_text(json.dumps(content | {"peak_memory_mb": memory, "curves": found}, indent=2) + "\n")
    given.output.with_suffix(".png").write_bytes(plots.to_png(costs(found)))
    print(f"results: {given.output} and .png")


if __name__ == "__main__":
    main()
