"""The table and the figure of the benchmark."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
from pathlib import Path
from typing import Any

import torch

from experiments.bench import SMOKE, Settings, __doc__, ppvae_and_pyro, processor
from experiments.bench.contenders import CURVES, Key, contenders, flops
from experiments.bench.cost_figure import costs
from experiments.bench.processes import rounds
from ppvae import plots


def table_row(what: str, who: str, times: list[float], ratio: float, count: float | None) -> str:
    """A row of the table."""
    median = statistics.median(times)
    unit = f"{median:8.2f} us per (datum, particle)" if "log p(x)" in what else f"{median * 1e3:8.2f} ms per step"
    rate = "" if count is None else f"{count / (median * (1e-6 if 'log p(x)' in what else 1)) / 1e9:6.0f} GFLOP/s"
    return f"{what:20} {who:21} {unit:36} {ratio:5.2f} of hand-written {rate}"


def main(args: list[str] | None = None) -> None:
    """Prints the table, and writes it with the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, as a test of the code")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", metavar="WHAT", help="only the rows of the table that begin with WHAT, such as IWAE")
    parser.add_argument("--output", type=Path, default=Path("runs/bench.json"))
    given = parser.parse_args(args)
    s = SMOKE if given.smoke else Settings()
    keys = contenders(s, given.threads).keys()
    table = [what for what in dict.fromkeys(str(key[0]) for key in keys) if what not in CURVES]
    if given.only:
        table = [what for what in table if what.startswith(given.only)]
        if not table:
            parser.error(f"--only: expected the beginning of a row's name, as in 'IWAE', found {given.only!r}")

    def timed(what: str, values: tuple[int, ...] = ()) -> dict[Key, list[float]]:
        of_it = [key for key in keys if key[0] == what and (len(key) == 2 or key[2] in values)]
        try:
            return rounds(of_it, s, given.threads)
        except RuntimeError as error:
            parser.exit(1, f"{error}\n")

    rows: list[dict[str, Any]] = []
    print(f"{processor()}, {given.threads} threads, torch {torch.__version__}")
    for what in table:
        times = timed(what)
        base = statistics.median(times[what, "hand-written"])
        for (_, who), taken in times.items():
            ratio = statistics.median(taken) / base
            rows.append({"what": what, "who": who, "ratio": ratio, "rounds": taken})
            print(table_row(what, str(who), taken, ratio, flops(s).get(what)), flush=True)
    if given.only:
        return
    memory = {k: ppvae_and_pyro.peak_memory(k) for k in ((25, 50) if given.smoke else (500, 5000, 50_000))}
    print("peak memory of log_marginal: " + ", ".join(f"{mb:.0f} MB at K = {k}" for k, mb in memory.items()))
    found: dict[str, dict[str, dict[int, float]]] = {axis: {} for axis in CURVES}
    for axis, values in CURVES.items():
        for (_, who, value), taken in timed(axis, values[:1] if given.smoke else values).items():
            found[axis].setdefault(str(who), {})[value] = statistics.median(taken)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    content = {"settings": dataclasses.asdict(s), "machine": processor(), "threads": given.threads, "rows": rows}
    given.output.write_text(json.dumps(content | {"peak_memory_mb": memory, "curves": found}, indent=2) + "\n")
    given.output.with_suffix(".png").write_bytes(plots.to_png(costs(found)))
    print(f"results: {given.output} and .png")


if __name__ == "__main__":
    main()
