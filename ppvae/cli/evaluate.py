"""`ppvae evaluate RUN`: log p(x) by importance sampling, or by chains beside it (--method annealed | smc | bdmc)."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ppvae.cli.commands import _head, _of_run, _report
from ppvae.distributed import leave_process_group
from ppvae.errors import CheckpointError, ContractError, UsageError
from ppvae.inference.param_store import unwrap
from ppvae.training import load as load_run
from ppvae.training.run import Run, default_dtype, floating

if TYPE_CHECKING:
    from ppvae.cli.options import Evaluate

AUTO = ("target_std_error", "max_particles")
CHAINS = ("num_chains", "num_temperatures", "start", "schedule", "num_leapfrog")


def check_method(settings: Evaluate) -> None:
    """Raises UsageError for options that the method does not take, and for numbers of particles below one."""
    default = type(settings)()
    names = (*CHAINS, "resample", "beside", *AUTO, "precision")
    given = [name for name in names if getattr(settings, name) != getattr(default, name)]
    takes = {
        "importance": (*AUTO, "precision"),
        "annealed": (*CHAINS, "beside"),
        "smc": (*CHAINS, "resample", "beside"),
        "bdmc": CHAINS,
    }
    for name in given:
        if name not in takes[settings.method]:
            which = ", ".join(method for method, names in takes.items() if name in names)
            raise UsageError(f"--{name.replace('_', '-')}: goes with --method {which}; found {settings.method}")
    if settings.num_particles == "auto" and settings.method != "importance":
        raise UsageError(f"--num-particles auto: goes with --method importance; found {settings.method}")
    if settings.num_particles != "auto" and (alone := [name for name in AUTO if name in given]):
        raise UsageError(f"--{alone[0].replace('_', '-')}: goes with --num-particles auto")
    for name in ("num_particles", "beside"):  # importance sampling comes after annealing, which takes long
        ks = getattr(settings, name)
        if ks != "auto" and any(k < 1 for k in (ks if isinstance(ks, tuple) else (ks,))):
            raise UsageError(f"{name}: expected at least 1, found {ks}")


def estimate(settings: Evaluate, directory: Path) -> int:
    """`ppvae evaluate RUN`: its result and the report, written by the first of the processes that share the work."""
    check_method(settings)
    dtype = getattr(torch, settings.dtype) if settings.dtype else None
    with default_dtype(dtype):
        run = load_run(directory, best=settings.best or None, dtype=dtype)
        columns = tuple(floating(c, dtype) for c in _of_run(run, settings, settings.split))
        if settings.head is not None:
            columns = _head(columns, settings.head)
        notes = [run.stopped] if run.stopped else []
        notes += [f"computed in {settings.dtype}"] if settings.dtype else []
        discrete = getattr(getattr(unwrap(run.model), "__self__", None), "discrete", None)
        model, guide = (run.model, run.guide) if discrete is None else (discrete.model, discrete.guide)
        if settings.method != "importance":
            return by_chains(run, model, guide, columns, settings, discrete is not None, notes)
        if discrete is not None:
            notes.append("log p(x) of the discrete model, whose relaxed counterpart was trained")
        return by_weights(run, model, guide, columns, settings, notes)


def by_weights(run: Run, model: Any, guide: Any, columns: tuple[Any, ...], settings: Evaluate, notes: list[str]) -> int:
    """Importance sampling; finished blocks are kept until the result is written."""
    from ppvae.evaluation import log_marginal

    results = Path(run.directory or ".") / "results"
    name = "log_marginal" if settings.split == "test" else f"log_marginal_{settings.split}"
    blocks = results / f"{name}_blocks" / _key(run, settings)
    est = log_marginal(
        model, guide, columns, num_particles=settings.num_particles, target_std_error=settings.target_std_error,
        max_particles=settings.max_particles, seed=settings.seed, device=settings.device, rows=settings.rows,
        precision=settings.precision, directory=blocks,
    )  # fmt: skip
    if not leave_process_group():
        return 0
    est = dataclasses.replace(est, notes=(*est.notes, *notes))
    path = est.save(results, name)
    shutil.rmtree(blocks, ignore_errors=True)
    with contextlib.suppress(OSError):  # blocks of an evaluation with other settings stay
        blocks.parent.rmdir()
    for key, value in est.table().items():
        print(f"{key:18} {value}")
    print(f"results: {path}")
    if settings.report:
        _report(run, columns, est, settings.seed)
    return 0


def _key(run: Run, settings: Evaluate) -> str:
    """The name of the folder of blocks that belong to these settings and parameters."""
    given = dataclasses.asdict(settings)
    for name in ("rows", "root", "runs", "report"):
        del given[name]
    parameters = (Path(run.directory or ".") / "checkpoints" / "last").read_text()
    return hashlib.sha256(f"{given} {parameters}".encode()).hexdigest()[:16]


def by_chains(
    run: Run, model: Any, guide: Any, columns: tuple[Any, ...], settings: Evaluate, relaxed: bool, notes: list[str]
) -> int:
    """Runs the method, prints and writes its result and the report; finished blocks are kept until then."""
    from ppvae.evaluation import annealed, bdmc

    results = Path(run.directory or ".") / "results"
    name = settings.method if settings.split == "test" else f"{settings.method}_{settings.split}"
    words = {key: getattr(settings, key) for key in (*CHAINS, "seed", "rows", "device")}
    words["directory"] = results / f"{name}_blocks"
    if settings.method == "smc":
        words["resample"] = settings.resample
    try:
        found = (bdmc if settings.method == "bdmc" else annealed)(model, guide, columns, **words)
    except ContractError as error:
        if not relaxed:
            raise
        raise ContractError(
            f"{error}\nA relaxed run is evaluated as its discrete pair, which cannot be annealed: leave --method out"
        ) from error
    if settings.method == "bdmc":
        if not leave_process_group():
            return 0
        path = found.save(results, name)
    else:
        found, beside = _beside(found, model, guide, columns, settings)
        if not leave_process_group():
            return 0
        found, beside = (dataclasses.replace(e, notes=(*e.notes, *notes)) for e in (found, beside))
        path = found.save(results, name)
        beside.save(results, f"{name}_beside")
    shutil.rmtree(words["directory"], ignore_errors=True)
    told = {f"note on the run {i}": note for i, note in enumerate(notes, 1)} if settings.method == "bdmc" else {}
    for key, value in (found.table() | told).items():
        print(f"{key:20} {value}")
    print(f"results: {path}")
    if settings.report:
        report_kept(run, settings)
    return 0


def _beside(found: Any, model: Any, guide: Any, columns: tuple[Any, ...], settings: Evaluate) -> tuple[Any, Any]:
    """(the estimate with how loose importance sampling is in its notes, importance sampling on the same data)."""
    from ppvae.evaluation import log_marginal
    from ppvae.evaluation.compare import looseness_notes

    ks = {int(settings.num_particles), *settings.beside}
    est = log_marginal(
        model, guide, columns, num_particles=max(ks), bounds=sorted(ks), seed=settings.seed, rows=settings.rows,
        device=settings.device,
    )  # fmt: skip
    return dataclasses.replace(found, notes=(*found.notes, *looseness_notes(found, est, sorted(ks)))), est


def report_kept(run: Run, settings: Any) -> None:
    """Writes the report with what lies in the run's folder: the estimate of the test data, or another of them."""
    from ppvae.evaluation.results import load_estimate

    test, est = _of_run(run, settings, "test"), None
    for name in ("log_marginal", "annealed_beside", "smc_beside"):
        try:
            est = load_estimate(Path(run.directory or ".") / "results" / f"{name}.json")
        except CheckpointError:
            continue
        test = _head(test, len(est.log_px))
        break
    _report(run, test, est, settings.seed)
