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
from experiments.cells import markdown
from ppvae import plots

HEADER = ("", "contender", "median", "of hand-written", "of the fastest other", "GFLOP/s")


def is_baseline(who: str) -> bool:
    """Whether a contender is another library or a hand-written step: neither ppvae nor products alone."""
    return not who.startswith(("ppvae", "products"))


def rows_of(what: str, times: dict[str, list[float]], count: float | None) -> list[dict[str, Any]]:
    """The rows of one kind of step: medians and ratios to the hand-written one and to the fastest of all baselines."""
    medians = {who: statistics.median(taken) for who, taken in times.items()}
    fastest = min(median for who, median in medians.items() if is_baseline(who))
    return [
        {
            "what": what, "who": who, "median": median, "ratio": median / medians["hand-written"],
            "ratio_to_fastest": median / fastest, "rounds": times[who],
            "gflops": None if count is None else count / (median * (1e-6 if "log p(x)" in what else 1)) / 1e9,
        }
        for who, median in medians.items()
    ]  # fmt: skip


def table_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """The cells of a row of the table."""
    in_us = "log p(x)" in row["what"]
    return (
        row["what"], row["who"], f"{row['median']:.2f} us" if in_us else f"{row['median'] * 1e3:.2f} ms",
        f"{row['ratio']:.2f}", f"{row['ratio_to_fastest']:.2f}",
        "" if row["gflops"] is None else f"{row['gflops']:.0f}",
    )  # fmt: skip


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
        found_now = rows_of(what, {str(who): taken for (_, who), taken in times.items()}, flops(s).get(what))
        rows += found_now
        print(
            "\n".join(markdown(HEADER, map(table_cells, found_now)).splitlines()[0 if what == table[0] else 2 :]),
            flush=True,
        )
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
    given.output.with_suffix(".md").write_text(markdown(HEADER, map(table_cells, rows)) + "\n")
    print(f"results: {given.output}, .md and .png")


if __name__ == "__main__":
    main()
