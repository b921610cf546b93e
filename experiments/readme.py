"""Writes experiments/README.md: the tables of every experiment from its cells in experiments/results."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
from types import ModuleType
from typing import Any

import experiments
from experiments.cells import RESULTS, Cells, load_cells

INTRODUCTION = """# Experiments

Written by `python -m experiments.readme` from the files in `results/`: do not edit.

One script per table or figure: `python -m experiments.NAME` from the root of the repository; `--smoke` runs it in
seconds on data that need no download, `--help` lists its settings; data are read from `PPVAE_DATA` (or `--root`). A
cell that is stored with the same settings is not computed again, and an interrupted cell resumes from its last
checkpoint in `runs/`, so that a table can be computed in several sessions. `--again` recomputes cells under
`runs/again` and compares them with the stored ones. Each cell is a file with its command, settings, seed, commit, the
SHA-256 of the evaluated data, machine, threads, versions and duration.

NLL is in nats per datum, log p(x) by importance sampling; ± is one standard error, over test data and, if there are
several, over seeds; differences are paired over test data. "Better" and "worse" mean a difference beyond twice its
standard error, with three seeds or more per row; with fewer seeds the comparison is undecided. "Unreliable" is the
share of data whose estimate the importance weights do not support (`~est.reliable`): their NLL is an upper bound,
possibly a loose one.
"""


def text() -> str:
    """The content of the file."""
    names = sorted(module.name for module in pkgutil.iter_modules(experiments.__path__))
    modules = [importlib.import_module(f"experiments.{name}") for name in names]
    sections = [section(module) for module in modules if hasattr(module, "Settings") and hasattr(module, "table")]
    return "\n\n".join([INTRODUCTION.strip(), *filter(None, sections)]) + "\n"


def main() -> None:
    """Writes the file."""
    path = RESULTS.parent / "README.md"
    path.write_text(text())
    print(path)


def section(module: ModuleType) -> str:
    """The description, command, tables (one per combination of settings) and figures; "" without cells."""
    name = module.__name__.rpartition(".")[2]
    cells = load_cells(RESULTS / name, module.Settings())
    if not cells:
        return ""
    parts = [f"## {name}", (module.__doc__ or "").strip(), f"`python -m experiments.{name}`"]
    defaults = as_json(dataclasses.asdict(module.Settings()))
    for settings, group in group_by_settings(cells, defaults):
        parts += [f"With {settings}:"] if settings else []
        parts += [module.table(group).strip(), provenance(group)]
    pictures = sorted((RESULTS / name).glob("*.png"))
    return "\n\n".join(filter(None, parts + [f"![{p.stem}]({p.relative_to(RESULTS.parent)})" for p in pictures]))


def as_json(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON stores them: tuples become lists."""
    return json.loads(json.dumps(settings))


def group_by_settings(cells: Cells, defaults: dict[str, Any]) -> list[tuple[str, Cells]]:
    """(settings that differ from the defaults, cells) for each combination of settings, the defaults first."""
    groups: dict[str, Cells] = {}
    for c in cells:
        changed = {k: v for k, v in c["settings"].items() if defaults.get(k) != v}
        groups.setdefault(", ".join(f"{k} = {v}" for k, v in changed.items()), []).append(c)
    return sorted(groups.items(), key=lambda group: group[0])


def provenance(cells: Cells) -> str:
    """Machine, commit and duration of a table's cells."""
    machines = sorted({f"{c['machine']}, {c['threads']} thread{'s' * (c['threads'] > 1)}" for c in cells})
    commits = sorted({c["commit"][:10] + "-dirty" * c["commit"].endswith("-dirty") for c in cells})
    seconds = sum(c["duration"] for c in cells)
    took = f"{seconds / 60:.0f} minutes" if seconds > 120 else f"{seconds:.0f} seconds"
    count = f"{len(cells)} cell{'s' * (len(cells) > 1)}"
    return f"<sub>{count}, {took}; {'; '.join(machines)}; commit {', '.join(commits)}.</sub>"


if __name__ == "__main__":
    main()
