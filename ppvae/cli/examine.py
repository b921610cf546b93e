"""`ppvae examine RUN`: inference gaps, information in the latents, calibration, predictive checks, gradient noise."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    write_report_of_results,
)
from ppvae.cli.option_checks import check_examine
from ppvae.cli.options import Examine
from ppvae.errors import ContractError, UsageError
from ppvae.evaluation.calibration import MIN_REPLICATIONS, calibration
from ppvae.evaluation.evidence.refined import refined_log_marginal, why_not_refined
from ppvae.evaluation.gradient_audit.audit import MIN_DRAWS, gradients
from ppvae.evaluation.gradient_audit.result import GradientAudit
from ppvae.evaluation.local.gaps import Gaps, gaps
from ppvae.evaluation.predictive.check import predictive_check
from ppvae.evaluation.representation import representation
from ppvae.objectives import ELBO, IWAE
from ppvae.objectives.gradients import ARMS, UnorderedSet
from ppvae.training.run import Run

AUDITED = 50  # test data in the batch of the audit of gradients


def _gaps(trained: Run, rows: Any, *, directory: Path, **options: Any) -> Gaps:
    """The gaps to log p(x) by refined proposals, where the pair has them; else by the refit guides."""
    pair, common = (trained.model, trained.guide, rows), {key: options[key] for key in ("seed", "device")}
    log_px = None
    if not why_not_refined(*pair, **common):
        log_px = refined_log_marginal(*pair, guide_particles=0, directory=directory / "log_px", **common)
    return gaps(*pair, log_px=log_px, directory=directory, **options)


def _gradients(trained: Run, rows: Any, draws: int, **options: Any) -> GradientAudit:
    """The estimators that the latents allow: of an ELBO of two draws if one has no path, else of IWAE with 8."""
    pair, common = (trained.model, trained.guide, rows), {"draws": draws, **options}
    try:
        return gradients(*pair, IWAE(8), ["pathwise", "stl", "dreg", "gdreg"], **common)
    except ContractError:
        names = ["score", "vimco", "vargrad", "disarm", "double_cv", "rebar", "relax", "straight_through"]
        return gradients(*pair, ELBO(2), [*names, ARMS(4), UnorderedSet(4)], **common)


def run(args: list[str]) -> int:
    """Prints and writes the results, and the report with them; returns the exit status."""
    settings, directory = parse_run("examine", args, Examine)
    check_examine(settings)
    if 0 < settings.replications < MIN_REPLICATIONS:
        raise UsageError(f"--replications: expected 0 or at least {MIN_REPLICATIONS}, found {settings.replications}")
    if 0 < settings.gradients < MIN_DRAWS:
        raise UsageError(f"--gradients: expected 0 or at least {MIN_DRAWS} steps, found {settings.gradients}")
    trained = load_trained(directory, settings)
    options: dict[str, Any] = {"seed": settings.seed, "device": settings.device}
    results = directory / "results"
    test = run_data(trained, settings, "test")
    evaluations: dict[str, Callable[[], Any]] = {}
    if settings.gaps:
        for split in ("train", "test"):
            rows = head(test if split == "test" else run_data(trained, settings, split), settings.gaps)
            evaluations[f"gaps_{split}"] = functools.partial(
                _gaps, trained, rows, num_particles=settings.num_particles, steps=settings.steps,
                directory=results / f"gaps_{split}_blocks", **options,
            )  # fmt: skip
    if settings.latents:
        rows = head(test, settings.latents)
        evaluations["representation"] = functools.partial(representation, trained.model, trained.guide, rows, **options)
    if settings.replications:
        evaluations["calibration"] = functools.partial(
            calibration, trained.model, trained.guide, test, replications=settings.replications, **options
        )
    if settings.checks:
        evaluations["predictive_check"] = functools.partial(
            predictive_check, trained.model, trained.guide, head(test, settings.checks), **options
        )
    if settings.gradients:
        rows = head(test, AUDITED)
        evaluations["gradients"] = functools.partial(_gradients, trained, rows, settings.gradients, **options)
    with evaluation_of(trained, "examine"):
        last: tuple[str, Any] | None = None  # it appears together with the report
        for name, evaluate in evaluations.items():
            try:
                result = evaluate()
            except ContractError as error:  # the pair does not allow this evaluation; the others go on
                print(f"{name}: {error}")
                continue
            table = result.table()
            print_table(table, max(24, *(len(row) for row in table)))
            print(f"results: {results / name}.json\n")
            if last is not None:
                _save(trained, results, *last)
            last = name, result
        if not settings.report:
            if last is not None:
                _save(trained, results, *last)
            return 0
        with results_of(trained, "examine") as staged:
            if last is not None:
                _save(trained, folder_of(staged) / "results", *last)
            write_report_of_results(staged, settings)
        if last is not None:
            shutil.rmtree(results / f"{last[0]}_blocks", ignore_errors=True)
        print_report(trained)
    return 0


def _save(trained: Run, folder: Path, name: str, result: Any) -> None:
    """Writes a result, and removes the finished blocks behind it, which lie in the same folder."""
    result.save(folder, name, trained.origin)
    shutil.rmtree(folder / f"{name}_blocks", ignore_errors=True)
