"""`ppvae evaluate RUN --method annealed | smc | bdmc`: log p(x) by chains, beside importance sampling."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppvae.commands import _head, _of_run, _report
from ppvae.errors import CheckpointError, ContractError, UsageError
from ppvae.training.run import Run

if TYPE_CHECKING:
    from ppvae.commands import Evaluate

CHAINS = ("num_chains", "num_temperatures", "start", "schedule", "num_leapfrog")


def check_method(settings: Evaluate) -> None:
    """Raises UsageError for options that the method does not take, and for numbers of particles below one."""
    default = type(settings)()
    given = [name for name in (*CHAINS, "resample", "beside") if getattr(settings, name) != getattr(default, name)]
    takes = {"importance": (), "annealed": (*CHAINS, "beside"), "smc": (*CHAINS, "resample", "beside"), "bdmc": CHAINS}
    for name in given:
        if name not in takes[settings.method]:
            which = ", ".join(method for method, names in takes.items() if name in names)
            raise UsageError(f"--{name.replace('_', '-')}: goes with --method {which}; found {settings.method}")
    for name in ("num_particles", "beside"):  # importance sampling comes after annealing, which takes long
        ks = getattr(settings, name)
        if any(k < 1 for k in (ks if isinstance(ks, tuple) else (ks,))):
            raise UsageError(f"{name}: expected at least 1, found {ks}")


def by_chains(run: Run, model: Any, guide: Any, columns: tuple[Any, ...], settings: Evaluate, relaxed: bool) -> int:
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
        path = found.save(results, name)
    else:
        found, beside = _beside(found, model, guide, columns, settings)
        path = found.save(results, name)
        beside.save(results, f"{name}_beside")
    shutil.rmtree(words["directory"], ignore_errors=True)
    for key, value in found.table().items():
        print(f"{key:20} {value}")
    print(f"results: {path}")
    if settings.report:
        report_kept(run, settings)
    return 0


def _beside(found: Any, model: Any, guide: Any, columns: tuple[Any, ...], settings: Evaluate) -> tuple[Any, Any]:
    """(the estimate with how loose importance sampling is in its notes, importance sampling on the same data)."""
    from ppvae.evaluation import log_marginal
    from ppvae.evaluation.tightness import in_words

    ks = {settings.num_particles, *settings.beside}
    est = log_marginal(
        model, guide, columns, num_particles=max(ks), bounds=sorted(ks), seed=settings.seed, rows=settings.rows,
        device=settings.device,
    )  # fmt: skip
    return dataclasses.replace(found, notes=(*found.notes, *in_words(found, est, sorted(ks)))), est


def report_kept(run: Run, settings: Any) -> None:
    """Writes the report with what lies in the run's folder: the estimate of the test data, or another of them."""
    from ppvae.evaluation.loading import load_estimate

    test, est = _of_run(run, settings, "test"), None
    for name in ("log_marginal", "annealed_beside", "smc_beside"):
        try:
            est = load_estimate(Path(run.directory or ".") / "results" / f"{name}.json")
        except CheckpointError:
            continue
        test = _head(test, len(est.log_px))
        break
    _report(run, test, est, settings.seed)
