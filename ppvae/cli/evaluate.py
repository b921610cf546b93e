"""`ppvae evaluate RUN`: log p(x) by importance sampling, from proposals refined to each datum, with L_K of the guide
beside it; with annealing of the data that this fails on by `--method auto`; by the guide alone with `--proposal guide`;
by annealing with `--method annealed | smc | bdmc`; of sequences by `--method particle_filter`; predictive densities
given global latents by `--conditional`."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from typing import Any

import torch

from ppvae.cli.common import (
    evaluation_of,
    folder_of,
    head,
    load_trained,
    parse_run,
    print_report,
    print_table,
    results_of,
    run_data,
    write_report,
    write_report_of_results,
)
from ppvae.cli.option_checks import CHAINS, GIVEN_GLOBALS, check_evaluate
from ppvae.cli.options import Evaluate
from ppvae.distributed import leave_process_group
from ppvae.errors import ContractError, count_of
from ppvae.evaluation import annealed, bdmc, log_marginal, refined_log_marginal
from ppvae.evaluation.compare import looseness_notes
from ppvae.evaluation.evidence.refined import GUIDE_PARTICLES, REFINED_PARTICLES
from ppvae.inference.param_store import unwrap
from ppvae.inference.tracing import Program
from ppvae.storage import sha256
from ppvae.training.run import Run, cast_floating, default_dtype

FILTER_PARTICLES = 1000


def run(args: list[str]) -> int:
    """Prints and writes the estimate, and the report with it, on rank 0; returns the exit status."""
    settings, directory = parse_run("evaluate", args, Evaluate)
    check_evaluate(settings)
    dtype = getattr(torch, settings.dtype) if settings.dtype else None
    with default_dtype(dtype):
        trained = load_trained(directory, settings, dtype=dtype)
        columns = tuple(cast_floating(c, dtype) for c in run_data(trained, settings, settings.split))
        if settings.head is not None:
            columns = head(columns, settings.head)
        notes = [trained.stopped] if trained.stopped else []
        notes += [f"computed in {settings.dtype}"] if settings.dtype else []
        discrete = getattr(getattr(unwrap(trained.model), "__self__", None), "discrete", None)
        model, guide = (trained.model, trained.guide) if discrete is None else (discrete.model, discrete.guide)
        notes += _accuracy(model, columns[0])
        samples = settings.method in ("importance", "auto", "particle_filter")
        method = "log_marginal" if samples else settings.method
        name = method if settings.split == "test" else f"{method}_{settings.split}"
        with evaluation_of(trained, name):
            if samples:
                if discrete is not None:
                    notes.append("log p(x) of the discrete model, whose relaxed counterpart was trained")
                return _sampling(trained, model, guide, columns, settings, notes, name)
            return _annealing(trained, model, guide, columns, settings, discrete is not None, notes, name)


def _accuracy(model: Program, split: Any) -> list[str]:
    """The share of labels that a pair with a classifier gets right, as a note."""
    pair: Any = getattr(unwrap(model), "__self__", None)
    labels = getattr(split, "labels", None)
    if not hasattr(pair, "classify") or labels is None:
        return []
    found = pair.classify(split.read().to(next(pair.parameters()).device)).argmax(-1).cpu()
    share = float((found == labels).double().mean())
    return [f"the classifier gets {100 * share:.1f} % of {count_of(len(labels), 'label')} right"]


def _sampling(
    trained: Run, model: Program, guide: Program, columns: tuple[Any, ...], settings: Evaluate, notes: list[str],
    name: str,
) -> int:  # fmt: skip
    """Importance sampling or particle filters; the cache of finished blocks is removed once the result is written."""
    results = folder_of(trained) / "results"
    blocks = results / f"{name}_blocks" / _cache_key(trained, settings)
    options: dict[str, Any] = {
        "target_std_error": settings.target_std_error, "max_particles": settings.max_particles, "seed": settings.seed,
        "device": settings.device, "rows": settings.rows, "precision": settings.precision, "directory": blocks,
    }  # fmt: skip
    given, beside = settings.num_particles, settings.guide_particles
    shared = {key: getattr(settings, key) for key in GIVEN_GLOBALS}
    if shared != {key: getattr(Evaluate(), key) for key in GIVEN_GLOBALS}:
        est = log_marginal(model, guide, columns, num_particles=given or GUIDE_PARTICLES, **shared, **options)
    elif settings.method == "particle_filter":
        count = given or FILTER_PARTICLES
        est = log_marginal(model, guide, columns, num_particles=count, method="particle_filter", **options)
    elif settings.proposal == "guide":
        count = given or GUIDE_PARTICLES
        est = log_marginal(model, guide, columns, num_particles=count, proposal="guide", **options)
    else:
        if beside is None:
            beside = given if isinstance(given, int) else GUIDE_PARTICLES
        est = refined_log_marginal(
            model, guide, columns, num_particles=given or REFINED_PARTICLES, guide_particles=beside,
            bracket_data=settings.bracket, method="auto" if settings.method == "auto" else "importance", **options,
        )  # fmt: skip
    if not leave_process_group():
        return 0
    est = dataclasses.replace(est, notes=(*est.notes, *notes))
    with results_of(trained, name) as staged:
        est.save(folder_of(staged) / "results", name, trained.origin)
        print_table(est.table(), 18)
        if settings.report:
            write_report(staged, columns, est, settings.seed)
    shutil.rmtree(blocks, ignore_errors=True)
    with contextlib.suppress(OSError):  # blocks of an evaluation with other settings stay
        blocks.parent.rmdir()
    print(f"results: {results / name}.json")
    if settings.report:
        print_report(trained)
    return 0


def _cache_key(trained: Run, settings: Evaluate) -> str:
    """A digest of parameters and settings, as the name of the folder of finished blocks."""
    relevant = dataclasses.asdict(settings)
    for name in ("rows", "root", "runs", "report"):
        del relevant[name]
    return sha256(f"{relevant} {trained.checkpoint}.pt".encode())[:16]


def _annealing(
    trained: Run, model: Program, guide: Program, columns: tuple[Any, ...], settings: Evaluate, relaxed: bool,
    notes: list[str], name: str,
) -> int:  # fmt: skip
    """Annealing, with importance sampling of the same data beside it but for BDMC, whose data are simulated."""
    results = folder_of(trained) / "results"
    blocks, beside = results / f"{name}_blocks", None
    options = {key: getattr(settings, key) for key in (*CHAINS, "seed", "rows", "device")}
    if settings.method == "smc":
        options["resample"] = settings.resample
    try:
        result: Any = (bdmc if settings.method == "bdmc" else annealed)(
            model, guide, columns, directory=blocks, **options
        )
    except ContractError as error:
        if not relaxed:
            raise
        raise ContractError(
            f"{error}\nA relaxed run is evaluated as its discrete pair, which cannot be annealed: leave --method out"
        ) from error
    if settings.method == "bdmc":
        if not leave_process_group():
            return 0
        table = result.table() | {f"note on the run {i}": note for i, note in enumerate(notes, 1)}
    else:
        ks = sorted({int(settings.num_particles or GUIDE_PARTICLES), *settings.beside})
        beside = log_marginal(
            model, guide, columns, num_particles=ks[-1], proposal="guide", bounds=ks, seed=settings.seed,
            rows=settings.rows, device=settings.device,
        )  # fmt: skip
        if not leave_process_group():
            return 0
        result = dataclasses.replace(result, notes=(*result.notes, *looseness_notes(result, beside, ks), *notes))
        beside = dataclasses.replace(beside, notes=(*beside.notes, *notes))
        table = result.table()
    with results_of(trained, name) as staged:
        result.save(folder_of(staged) / "results", name, trained.origin)
        if beside is not None:
            beside.save(folder_of(staged) / "results", f"{name}_beside", trained.origin)
        print_table(table, 20)
        if settings.report:
            write_report_of_results(staged, settings)
    shutil.rmtree(blocks, ignore_errors=True)
    print(f"results: {results / name}.json")
    if settings.report:
        print_report(trained)
    return 0
