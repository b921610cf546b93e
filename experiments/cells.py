"""The cells of a table: each is computed once and stored as JSON, with everything needed to compute it again.

A script has a frozen dataclass of settings, a function `compute` for one cell, a function `table` that turns cells into
markdown, and a `main` of three lines; `python -m experiments.readme` collects the tables. The axes of a table are the
settings' tuples: the axis "seed" runs over the field `seeds`, and a cell has one value of each."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from experiments.bench import processor
from ppvae import fit
from ppvae.cli.flags import HelpShown, parse
from ppvae.errors import UsageError
from ppvae.evaluation.estimate import Estimate
from ppvae.storage import write_json
from ppvae.training.run import Run, versions

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "experiments" / "results"
GROUPS = 100

Cells = list[dict[str, Any]]


@dataclass(frozen=True)
class Workspace:
    """Where a cell is computed: the `folder` of its resumable runs, the `root` of the data, and the `device`; and the
    folder of the table's `results`."""

    folder: Path
    root: Path | None
    device: str | None
    results: Path


def run(
    name: str,
    cls: type,
    axes: Sequence[str],
    compute: Callable[..., dict[str, Any]],
    table: Callable[[Cells], str],
    smoke: Mapping[str, Any],
    doc: str | None,
    args: list[str] | None = None,
) -> tuple[Cells, Path]:
    """Reads the flags, computes the cells that are not stored yet, prints the table; returns cells and folder.

    Args:
        axes: the columns that tell cells apart, outermost first; axis "seed" runs over the field `seeds` of `cls`.
        compute: called as compute(settings, workspace, seed=..., ...); returns the numbers of one cell, with the
            "digest" of the data. It trains in `workspace.folder` with `resume=True`. A cell that needs a package which
            is not installed, and raises ModuleNotFoundError, is skipped.
        table: cells as markdown.
        smoke: the settings of `--smoke`, which takes seconds on data that need no download. Its results are under
            runs/smoke, and are removed at the start.
    """
    options: dict[str, tuple[Any, Any, str]] = {
        "smoke": (bool, False, "a run of seconds that only tests that everything works"),
        "again": (bool, False, "recompute stored cells under runs/again, and compare them with the stored ones"),
        "root": (Path | None, None, "the folder that holds the data; PPVAE_DATA by default"),
        "device": (str | None, None, "the device, such as cuda; the CPU by default"),
        "shard": (str | None, None, "I/N: every N-th cell from the I-th on, as one of N processes or machines"),
    }
    prog = f"python -m experiments.{name}"
    try:
        settings, given = parse(cls, sys.argv[1:] if args is None else args, prog, doc or "", options)
        shard, num_shards = parse_shard(given["shard"])
    except HelpShown:
        raise SystemExit(0) from None
    except UsageError as error:
        raise SystemExit(f"{prog}: {error}") from None
    defaults, results, runs = cls(), RESULTS / name, Path("runs") / "experiments" / name
    if given["smoke"]:
        chosen = _differing(settings, defaults)
        defaults = dataclasses.replace(defaults, **smoke)
        settings = dataclasses.replace(settings, **{k: v for k, v in smoke.items() if k not in chosen})
        results = runs = Path("runs") / "smoke" / name
        shutil.rmtree(runs, ignore_errors=True)
    elif given["again"]:
        results = runs = Path("runs") / "again" / name
    cells, commit = [], _commit()  # read before computing: that of the loaded code
    for number, point in enumerate(itertools.product(*(getattr(settings, f"{axis}s") for axis in axes))):
        cell = dict(zip(axes, point, strict=True))
        one = dataclasses.replace(settings, **{f"{axis}s": (value,) for axis, value in cell.items()})
        others = _as_json({k: v for k, v in dataclasses.asdict(one).items() if k.removesuffix("s") not in axes})
        stem = "-".join(map(str, point)) + "".join(f",{k}={v}" for k, v in _differing(one, defaults, axes).items())
        stem = stem.replace("/", " ").replace(" ", "")
        path = results / f"{stem}.json"
        known = _read(path)
        if known is None or known["settings"] != others:
            if number % num_shards != shard:
                continue
            workspace = Workspace(runs / stem, given["root"] or _root(), given["device"], results)
            print(f"{name} {stem}", flush=True)
            start = time.perf_counter()
            try:
                result = compute(one, workspace, **cell)
            except ModuleNotFoundError as error:
                print(f"{name} {stem}: skipped, {error.name} is not installed", flush=True)
                continue
            known = {
                "experiment": name,
                "cell": cell,
                "folder": str(workspace.folder),
                "command": " ".join([prog, *(["--smoke"] if given["smoke"] else []), *_flags(one, defaults)]),
                "settings": others,
                "result": _as_json(result),
                "commit": commit,
                "machine": processor() if given["device"] is None else torch.cuda.get_device_name(),
                "threads": torch.get_num_threads(),
                "versions": versions(),
                "duration": round(time.perf_counter() - start, 1),
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, known)
        cells.append(known)
        if given["again"] and (stored := _read(RESULTS / name / path.name)) is not None:
            print(f"{stem}: {compare_with_stored(known, stored)}", flush=True)
    if cells:
        print(table(cells))
    return cells, results


def parse_shard(text: str | None) -> tuple[int, int]:
    """(index of the shard, counted from 0; number of shards).

    >>> parse_shard("2/3"), parse_shard(None)
    ((1, 3), (0, 1))
    """
    if text is None:
        return 0, 1
    first, _, among = text.partition("/")
    if not (first.isdigit() and among.isdigit() and 1 <= int(first) <= int(among)):
        raise UsageError(f"--shard: expected I/N with I from 1 to N, found {text!r}")
    return int(first) - 1, int(among)


def compare_with_stored(again: dict[str, Any], stored: dict[str, Any]) -> str:
    """The difference between a recomputed cell and the stored one, as text."""
    if again["settings"] != stored["settings"] or again["result"].get("digest") != stored["result"].get("digest"):
        return "computed with other settings or data than the stored cell"
    new, old = again["result"], stored["result"]
    error = math.hypot(new["nll_std_error"], old["nll_std_error"])
    apart = abs(new["nll"] - old["nll"]) / error if error else math.inf
    return f"NLL {new['nll']:.3f}, stored {old['nll']:.3f}: {apart:.2f} standard errors apart"


def train(
    vae: Any,
    data: Any,
    valid: Any,
    workspace: Workspace,
    *,
    epochs: int,
    lr: float,
    untimed: Sequence[Callable[[Run, dict[str, Any]], None]] = (),
    **options: Any,
) -> Run:
    """Fits in the cell's folder and resumes there; with Adam and cosine decay, unless `options` say otherwise.

    `untimed` are callbacks whose time is not counted as that of training.
    """
    clock = [time.process_time()]

    def timed(run: Run, metrics: dict[str, Any]) -> None:
        metrics["cpu_seconds"] = time.process_time() - clock[0]  # unlike wall time, does not depend on the load
        for callback in untimed:
            callback(run, metrics)
        clock[0] = time.process_time()

    defaults = {
        "optimizer": functools.partial(torch.optim.Adam, lr=lr),
        "scheduler": functools.partial(CosineAnnealingLR, T_max=epochs),
    }
    where = {"device": workspace.device, "directory": workspace.folder, "resume": True}
    return fit(
        vae.model, vae.guide, data, valid=valid, epochs=epochs, callbacks=(timed,), **where, **(defaults | options)
    )


def training_summary(*runs: Run) -> dict[str, Any]:
    """Time and epochs of training, in one run or several consecutive ones, and the final validation ELBO, by which
    settings are chosen."""
    epochs = [epoch for run in runs for epoch in run.history]
    cpu = sum(epoch["cpu_seconds"] for epoch in epochs)
    return {
        "valid_elbo": runs[-1].metrics["valid_elbo"],
        "epochs": len(epochs),
        "training_seconds": round(sum(epoch["seconds"] for epoch in epochs), 1),
        "training_cpu_seconds": round(cpu, 1),
        "cpu_ms_per_step": round(1000 * cpu / sum(run.metrics["step"] for run in runs), 2),
    }


def estimate_summary(est: Estimate) -> dict[str, Any]:
    """The numbers over the data set, and `groups`: log p(x) averaged over 100 groups of consecutive data, whose
    differences between two cells on the same data give the paired standard error without storing every datum."""
    groups = est.log_px.tensor_split(min(GROUPS, len(est.log_px)))
    return est.attributes() | {"groups": [round(float(g.mean()), 5) for g in groups]}


def load_cells(folder: Path, defaults: Any) -> Cells:
    """All cells of a results folder, in the order of the tuples of the default settings."""

    def place(axis: str, value: Any) -> int:
        known = getattr(defaults, f"{axis}s")
        return known.index(value) if value in known else len(known)

    cells = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return sorted(cells, key=lambda c: [(place(axis, value), str(value)) for axis, value in c["cell"].items()])


def group_cells(cells: Cells, *axes: str) -> dict[tuple[Any, ...], Cells]:
    """Cells grouped by their values along some axes: rows, each with its seeds, in the order of the cells."""
    rows: dict[tuple[Any, ...], Cells] = {}
    for c in cells:
        rows.setdefault(tuple(c["cell"][axis] for axis in axes), []).append(c)
    return rows


def values(cells: Cells, key: str) -> list[float]:
    """A number of each cell."""
    return [float(c["result"][key]) for c in cells]


def mean(cells: Cells, key: str = "nll") -> float:
    """The mean of a number over cells, such as seeds."""
    return statistics.fmean(values(cells, key))


def standard_error(cells: Cells) -> float:
    """Of the mean NLL over seeds, in nats: sqrt(variance over seeds / seeds + variance over data / data)."""
    nlls = values(cells, "nll")
    seeds = statistics.variance(nlls) / len(nlls) if len(nlls) > 1 else 0.0
    return math.sqrt(seeds + mean(cells, "nll_std_error") ** 2)


def difference(a: Cells, b: Cells) -> tuple[float, float]:
    """(NLL of b minus NLL of a, its standard error): positive where a is better; nats.

    A difference counts as resolved beyond 2 sqrt(seed variance / seeds + paired variance), with three seeds or more per
    row. The paired variance is that of the groups' differences, averaged over seeds. Raises ValueError for rows of
    different data.
    """
    if len({c["result"]["digest"] for c in a + b}) > 1:
        raise ValueError(f"the rows {a[0]['cell']} and {b[0]['cell']} were evaluated on different data")
    of_groups = [
        statistics.fmean(c["result"]["groups"][i] for c in a) - statistics.fmean(c["result"]["groups"][i] for c in b)
        for i in range(len(a[0]["result"]["groups"]))
    ]
    variance = statistics.variance(of_groups) / len(of_groups)
    variance += sum(statistics.variance(values(r, "nll")) / len(r) for r in (a, b) if len(r) > 1)
    return mean(b) - mean(a), math.sqrt(variance)


def compare_rows(a: Cells, b: Cells, min_seeds: int = 3) -> str:
    """The difference as text: by how much a is better than b, and whether it is resolved."""
    delta, error = difference(a, b)
    seeds = min(len(a), len(b))
    says = "not resolved" if abs(delta) <= 2 * error else "better" if delta > 0 else "worse"
    if seeds < min_seeds:
        says = f"undecided: {seeds} seed{'s' * (seeds > 1)}"
    return f"{delta:+.2f} ± {error:.2f} ({says})"


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A markdown table; the first column is aligned left, the others right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _root() -> Path | None:
    """None if PPVAE_DATA is set (`data.load` reads it), else a data folder beside the repository, if there is one."""
    shared = REPOSITORY.parent / "shared" / "data"
    return shared if "PPVAE_DATA" not in os.environ and shared.is_dir() else None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def _as_json(content: dict[str, Any]) -> dict[str, Any]:
    """The content as JSON stores it: tuples become lists."""
    return json.loads(json.dumps(content, allow_nan=False))


def _differing(settings: Any, defaults: Any, axes: Sequence[str] = ()) -> dict[str, Any]:
    """The settings that differ from the defaults, without the axes."""
    known = dataclasses.asdict(defaults)
    return {k: v for k, v in dataclasses.asdict(settings).items() if v != known[k] and k.removesuffix("s") not in axes}


def _flags(settings: Any, defaults: Any) -> list[str]:
    out = []
    for key, value in _differing(settings, defaults).items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            out.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            out += [f"--{flag}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return out


def _commit() -> str:
    """The commit of the code, with "-dirty" if a Python file differs from it."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=REPOSITORY, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
        return (git("rev-parse", "HEAD") or "unknown") + ("-dirty" if dirty else "")
    except OSError:
        return "unknown"
