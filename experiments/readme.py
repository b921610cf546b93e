"""Writes experiments/README.md: the tables of every experiment from its cells in experiments/results."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
from types import ModuleType
from typing import Any

import experiments
from experiments.cells import RESULTS, Cells

INTRODUCTION = """# Experiments

Written by `python -m experiments.readme` from the files in `results/`: do not edit.

One script a table or figure: `python -m experiments.NAME` from the root of the repository; `--smoke` runs it in seconds
on data that need no download, `--help` lists its settings, and the data are looked for in `PPVAE_DATA` (or `--root`).
A cell that is there already, with the same settings, is not computed again, and one that was interrupted goes on from
its last checkpoint in `runs/`: a table can fill over several sittings. Each cell is a file with its command, settings,
seed, commit, the SHA-256 of the data that it was evaluated on, machine, threads, versions and duration.

NLL is in nats per datum, log p(x) by importance sampling; ± is one standard error, over test data and over seeds where
there are several; differences are paired over test data. "Better" and "worse" mean beyond twice the standard error of
the difference, with three seeds or more a row; with fewer nothing is decided. Data are "not reliable" where the
importance weights do not support the estimate (`est.reliable`): their NLL is an upper bound, possibly a loose one.
"""


def text() -> str:
    """The whole file."""
    names = sorted(module.name for module in pkgutil.iter_modules(experiments.__path__))
    modules = [importlib.import_module(f"experiments.{name}") for name in names]
    sections = [section(module) for module in modules if hasattr(module, "Settings") and hasattr(module, "table")]
    return "\n\n".join([INTRODUCTION.strip(), *filter(None, sections)]) + "\n"


def main() -> None:
    """Collects the tables."""
    path = RESULTS.parent / "README.md"
    path.write_text(text())
    print(path)


def section(module: ModuleType) -> str:
    """An experiment's description, command, tables (one for each settings) and pictures; "" without cells."""
    name = module.__name__.rpartition(".")[2]
    cells = [json.loads(path.read_text()) for path in sorted((RESULTS / name).glob("*.json"))]
    if not cells:
        return ""
    parts = [f"## {name}", (module.__doc__ or "").strip(), f"`python -m experiments.{name}`"]
    usual = plain(dataclasses.asdict(module.Settings()))
    for settings, group in grouped(ordered(cells, usual), usual):
        parts += [f"With {settings}:"] if settings else []
        parts += [module.table(group).strip(), provenance(group)]
    pictures = sorted((RESULTS / name).glob("*.png"))
    return "\n\n".join(filter(None, parts + [f"![{p.stem}]({p.relative_to(RESULTS.parent)})" for p in pictures]))


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON has them."""
    return json.loads(json.dumps(settings))


def ordered(cells: Cells, usual: dict[str, Any]) -> Cells:
    """Cells in the order of the settings' tuples."""

    def place(axis: str, value: Any) -> int:
        known = usual[f"{axis}s"]
        return known.index(value) if value in known else len(known)

    return sorted(cells, key=lambda c: [(place(axis, value), str(value)) for axis, value in c["cell"].items()])


def grouped(cells: Cells, usual: dict[str, Any]) -> list[tuple[str, Cells]]:
    """(what is not as usual, cells) for each combination of settings, the usual one first."""
    groups: dict[str, Cells] = {}
    for c in cells:
        unusual = {k: v for k, v in c["settings"].items() if usual.get(k) != v}
        groups.setdefault(", ".join(f"{k} = {v}" for k, v in unusual.items()), []).append(c)
    return sorted(groups.items(), key=lambda group: group[0])


def provenance(cells: Cells) -> str:
    """Where a table's cells were computed, with what code, and for how long."""
    machines = sorted({f"{c['machine']}, {c['threads']} thread{'s' * (c['threads'] > 1)}" for c in cells})
    commits = sorted({c["commit"][:10] + "-dirty" * c["commit"].endswith("-dirty") for c in cells})
    seconds = sum(c["duration"] for c in cells)
    took = f"{seconds / 60:.0f} minutes" if seconds > 120 else f"{seconds:.0f} seconds"
    count = f"{len(cells)} cell{'s' * (len(cells) > 1)}"
    return f"<sub>{count}, {took}; {'; '.join(machines)}; commit {', '.join(commits)}.</sub>"


if __name__ == "__main__":
    main()
