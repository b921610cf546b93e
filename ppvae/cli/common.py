"""Steps that several commands share: a pair from its name, a run and its data, tables and reports."""

import contextlib
import dataclasses
import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ppvae import data as datasets
from ppvae.cli.flags import check_flags_of, parse, read_settings
from ppvae.cli.option_checks import check_data
from ppvae.cli.options import Data
from ppvae.data.admission import argument_counts, check_argument_order, column_names
from ppvae.data.loader import column_digests
from ppvae.data.tables import KINDS, columns_of, is_table
from ppvae.distributed import DistributedContext
from ppvae.errors import DataError, UsageError
from ppvae.factories import pairs
from ppvae.factories.constructor_flags import Argument
from ppvae.factories.user_code import UntrustedCodeError
from ppvae.inference.device import find_device
from ppvae.inference.tracing import Program
from ppvae.run_folder.atomic_commit import remove_stagings, written_together
from ppvae.run_folder.identity import check_results
from ppvae.run_folder.lock import lock_folder
from ppvae.run_folder.trust import remember
from ppvae.training.run import Run, load

SPLITS = ("train", "valid", "test")


def parse_pair(
    command: str, args: list[str], cls: type, extra: Mapping[str, Argument] | None = None
) -> tuple[str, Any, Any, dict[str, Any]]:
    """Reads `PAIR [options]`: (pair's name, factory, settings, arguments of the factory and the extra ones)."""
    extra = dict(extra or {})
    name = first_argument(command, "PAIR", "a pair, as in `ppvae.models:vae`", args, cls, extra)
    factory = pairs.resolve(name)
    own = pairs.parameters(factory)
    for key, (kind, default, text) in extra.items():
        extra[key] = kind, getattr(factory, f"default_{key}", default), text
    for clash in own.keys() & extra.keys():
        raise UsageError(f"{name}: its argument {clash!r} is an option of ppvae {command}; give it another name")
    settings: Any
    settings, arguments = parse(cls, args[1:], f"ppvae {command} {name}", description(cls), own | extra)
    check_data(settings, settings.data)
    check_flags_of(factory, {key: value for key, value in arguments.items() if key in own})
    _check_device(settings)
    return name, factory, settings, arguments


def parse_run(command: str, args: list[str], cls: type) -> tuple[Any, Path]:
    """Reads `RUN [options]`: (settings, the run folder)."""
    name = first_argument(command, "RUN", "a run folder, as in `runs/NAME`", args, cls)
    settings: Any
    settings, _ = parse(cls, args[1:], f"ppvae {command} {name}", description(cls))
    _check_device(settings)
    return settings, find_run(name, settings.runs)


def _check_device(settings: Any) -> None:
    """Raises UsageError for a device that this machine does not have, before anything is loaded."""
    if getattr(settings, "device", None) is not None:
        find_device(settings.device, "--device")


def first_argument(
    command: str, what: str, expected: str, args: list[str], cls: type, extra: Mapping[str, Argument] | None = None
) -> str:
    """The positional argument; raises UsageError without one, and prints help where that is asked for."""
    if args and not args[0].startswith("-"):
        return args[0]
    if {"-h", "--help"} & set(args):
        parse(cls, args, f"ppvae {command} {what}", description(cls), extra)
    raise UsageError(f"ppvae {command}: expected {expected}; found {args[0] if args else 'nothing'}")


def description(cls: type) -> str:
    """The help text of a command: the docstring of its options."""
    return inspect.getdoc(cls) or ""


def find_run(name: str, runs: str) -> Path:
    """The folder of that name, or else the run of that name below the folder of runs."""
    path, below = Path(name), Path(runs) / name
    return below if not os.path.exists(path) and os.path.exists(below) else path


def load_trained(directory: Path, settings: Any, **options: Any) -> Run:
    """The run of a folder; on a terminal the user is asked whether to trust a Python file that it names.

    Raises:
        UntrustedCodeError: it is not trusted.
    """
    while True:
        try:
            return load(directory, best=settings.best or None, trust=settings.trust, **options)
        except UntrustedCodeError as error:
            if not (sys.stdin.isatty() and sys.stderr.isatty()):
                raise
            print(f"{directory} would run {error.path}\n(SHA-256 {error.digest}),", file=sys.stderr)
            print("which you have not trusted yet. Trust it, and run it? [y/N] ", end="", file=sys.stderr, flush=True)
            if sys.stdin.readline().strip().lower() not in ("y", "yes"):
                raise
            remember({str(error.path): error.digest})


def load_splits(settings: Any) -> Any:
    """Train, valid and test of the settings' data."""
    plain = settings.binarize == "none" or settings.dequantize or settings.missing or is_table(settings.data)
    return datasets.load(
        settings.data, root=settings.root, binarize=None if plain else settings.binarize,
        dequantize=settings.dequantize, flat=settings.flat, seed=settings.data_seed, missing=settings.missing,
        columns=_kinds(settings.columns), max_gigabytes=settings.max_gigabytes,
        lazy=settings.lazy,
    )  # fmt: skip


def _kinds(columns: tuple[str, ...]) -> dict[str, str] | None:
    """{name: kind} of `NAME=KIND ...`."""
    for text in columns:
        if not all(text.rpartition("=")):
            raise UsageError(f"--columns: expected NAME=KIND, as in age=real, found {text!r}")
    return {name: kind for name, _, kind in (text.rpartition("=") for text in columns)} or None


def print_columns(split: Any) -> None:
    """Prints the kind of each column of a table, and how to change one."""
    if split.table and os.environ.get("RANK", "0") == "0":
        print(f"columns: {split.table}")
        print(f"         (--columns NAME=KIND changes one: {', '.join(KINDS)})")


def with_columns(split: Any, settings: Any) -> tuple[Any, ...]:
    """The columns of a batch: the split, and its labels and further arrays where they are asked for."""
    if settings.labels and split.labels is None:
        raise UsageError(
            f"--labels: {split.description} has no labels. Of a table name their column, as --columns NAME=label"
        )
    for name in settings.context:
        if name not in split.attributes:
            known = ", ".join(split.attributes) or "none"
            raise UsageError(f"--context: {split.description} has no column {name!r}; it has {known}")
    labels = (known_labels(split, settings),) if settings.labels else ()
    return (split, *labels, *(split.attributes[name] for name in settings.context))


def by_argument(columns: tuple[Any, ...], model: Program, guide: Program) -> tuple[Any, ...]:
    """The columns of a table one by one, where the model's arguments have their names; otherwise as they are.

    Raises:
        UsageError: the model takes several arguments, and they are not the columns of the table.
    """
    table, names = columns[0], columns[0].columns
    required, _ = argument_counts(model)
    if len(columns) > 1 or (required < 2 and len(names) < 2):
        return columns
    found = column_names(dict.fromkeys(range(max(len(names) + 1, required))), model)
    if names and set(found) == set(names):
        by_name = columns_of(table)
        check_argument_order(by_name, model, guide)
        return tuple(by_name[name] for name in found)
    if required < 2:
        return columns
    if names:
        raise UsageError(
            f"the model takes {', '.join(found)}, and the table has {', '.join(names)}: give its arguments the names "
            "of the columns, of all of them (--columns NAME=skip leaves one out), or take one tensor, model(x)"
        )
    raise UsageError(
        f"the model takes {', '.join(found) or f'{required} arguments'}, and the data are one tensor: pass the labels "
        "as the second by --labels, further arrays of the file by --context NAME; or take one tensor, model(x)"
    )


def known_labels(split: Any, settings: Any) -> Any:
    """The labels [N]; with `--labelled N` those of N training rows, of each label about as many, and -1 elsewhere."""
    if settings.labelled is None:
        return split.labels
    out = torch.full_like(split.labels, -1)
    if split.name.endswith("/train"):
        if not 0 <= settings.labelled <= len(split):
            raise UsageError(f"--labelled: expected a number from 0 to {len(split)}, found {settings.labelled}")
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(settings.data_seed))
        rank = torch.empty_like(split.labels)  # of a row among those of its label
        for label in split.labels.unique():
            rows = order[split.labels[order] == label]
            rank[rows] = torch.arange(len(rows))
        kept = order[rank[order].argsort(stable=True)][: settings.labelled]
        out[kept] = split.labels[kept]
    return out


def num_labels(split: Any, labels: bool) -> int | None:
    """The number of different labels, where they are asked for."""
    if not labels or split.labels is None:
        return None
    return len(split.classes) or int(split.labels.max()) + 1


def run_data(run: Run, settings: Any, split: str) -> tuple[Any, ...]:
    """The columns of a split of a run's data.

    Raises:
        UsageError: the run was not started from the command line; DataError: the data have changed since.
    """
    if "data" not in run.config:
        raise UsageError(f"{run.directory}: the run was not started from the command line; evaluate it in Python")
    chosen = read_settings(Data, run.config["data"], f"{run.directory}: config.json, data")
    if settings.root is not None:
        chosen = dataclasses.replace(chosen, root=settings.root)
    splits = {
        name: by_argument(with_columns(s, chosen), run.model, run.guide)
        for name, s in zip(SPLITS, load_splits(chosen), strict=True)
    }
    fit = run.config["fit"]
    for name, digest in zip(SPLITS, (fit.get("digest"), fit.get("valid"), run.config.get("test")), strict=True):
        if digest is not None and name in {"train", split} and (now := joined_digest(splits[name])) != digest:
            raise DataError(
                f"{run.directory}: its {name} data are not what they were: expected SHA-256 {digest}, found {now}"
            )
    return splits[split]


def joined_digest(columns: tuple[Any, ...]) -> str:
    """The SHA-256 of each column, as config.json holds it."""
    return " ".join(column_digests(columns))


def head(columns: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """The first rows of every column."""
    return tuple(c.head(count) if hasattr(c, "head") else c[:count] for c in columns)


def print_table(table: Mapping[str, Any], width: int) -> None:
    """Prints a row for each entry."""
    for key, value in table.items():
        print(f"{key:{width}} {value}")


@contextlib.contextmanager
def results_of(run: Run, name: str) -> Iterator[Run]:
    """The run with a staging folder in place of its own, whose new files (`results/`, the report) appear together.

    They appear at the end of the block, or not at all; the results that the run has already are seen in it, too.

    Raises:
        CheckpointError: they could not be written; the earlier ones are kept.
    """
    with written_together(folder_of(run), name, view=("results",), whole=("pictures",)) as staging:
        yield dataclasses.replace(run, directory=staging)


@contextlib.contextmanager
def evaluation_of(run: Run, name: str) -> Iterator[None]:
    """The lock of an evaluation of that name, and checks of the other results in the folder; on rank 0.

    Raises:
        CheckpointError: another process writes the same results, or some are damaged or of another run.
    """
    if not DistributedContext().is_rank_zero:
        yield
        return
    folder = folder_of(run)
    with lock_folder(folder / "results", name):
        remove_stagings(folder, name)
        check_results(folder, run.origin, leave_out=name)
        yield


def folder_of(run: Run) -> Path:
    """The folder of a run, or the working directory where it has none."""
    return Path(run.directory or ".")


def write_report(run: Run, columns: tuple[Any, ...], estimate: Any, seed: int) -> None:
    """Writes report.html into the run's folder."""
    from ppvae import report

    report.write(run, data=columns, estimate=estimate, directory=run.directory, seed=seed)


def write_report_of_results(run: Run, settings: Any) -> None:
    """Writes the report with the estimate of the test data that the run's folder holds, if any."""
    from ppvae.evaluation.results import load_estimate

    test, est = run_data(run, settings, "test"), None
    for name in ("log_marginal", "annealed_beside", "smc_beside"):
        path = folder_of(run) / "results" / f"{name}.json"
        if not path.exists():
            continue
        est = load_estimate(path)
        test = head(test, len(est.log_px))
        break
    write_report(run, test, est, settings.seed)


def print_report(run: Run) -> None:
    """Prints the path of the report in a run's folder."""
    print(f"report: {os.fspath(folder_of(run) / 'report.html')}")
