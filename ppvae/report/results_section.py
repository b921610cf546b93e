"""Sections on results in the run's folder: inference gaps, the representation, calibration, predictive checks."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from ppvae import plots
from ppvae.data.checks import one_line
from ppvae.errors import PpvaeError, count_of
from ppvae.evaluation.calibration import Calibration
from ppvae.evaluation.gradient_audit.result import GradientAudit
from ppvae.evaluation.local.gaps import Gaps
from ppvae.evaluation.predictive.result import PredictiveCheck
from ppvae.evaluation.representation import Representation
from ppvae.evaluation.results import kind_of
from ppvae.report.run_data import RunData
from ppvae.report.section import CaptionedFigure, Section, build_section, capitalized, sections_of_sites

T = TypeVar("T", Representation, Calibration, PredictiveCheck)


def results_sections(run_data: RunData) -> Iterator[Section]:
    """A section for each kind of result in the run's folder."""
    if run_data.run.directory is None:
        return
    paths: dict[str, dict[str, Path]] = {}
    for path in sorted((Path(run_data.run.directory) / "results").glob("*.json")):
        kind = kind_of(path)
        paths.setdefault(kind, {})[_variant(path, kind)] = path
    if "Gaps" in paths:
        yield build_section("gaps", "Inference gaps", functools.partial(_gaps, paths["Gaps"]))
    if "Representation" in paths:
        found = paths["Representation"]
        yield build_section("rate_distortion", "Rate and distortion", functools.partial(_rate_distortion, found))
        yield from _sections_of_sites("kl", "Rate of each dim", next(iter(found.values())), Representation, _kl)
    if "Calibration" in paths:
        path, title = next(iter(paths["Calibration"].values())), "Calibration on simulated data"
        yield from _sections_of_sites("calibration", title, path, Calibration, _calibration)
    if "PredictiveCheck" in paths:
        path, title = next(iter(paths["PredictiveCheck"].values())), "Predictive check"
        yield from _sections_of_sites("predictive_check", title, path, PredictiveCheck, _predictive_check)
    if "GradientAudit" in paths:
        path = next(iter(paths["GradientAudit"].values()))
        yield build_section("gradients", "Noise of gradients", functools.partial(_gradients, path))


def _variant(path: Path, kind: str) -> str:
    """The part of a file's name that distinguishes results of one kind: "train" of "gaps_train"."""
    return path.stem.lower().removeprefix(kind.lower()).strip("_-") or path.stem


def _sections_of_sites(
    key: str, title: str, path: Path, cls: type[T], draw: Callable[[T, str], CaptionedFigure]
) -> Iterator[Section]:
    """One section for each latent (or statistic) of a result, `MAX_SITES` at most."""
    try:
        result = cls.load(path)
    except PpvaeError as error:
        yield Section(key, title, reason=one_line(error, 400))
        return
    names = result.statistics if isinstance(result, PredictiveCheck) else result.sites
    yield from sections_of_sites(key, title, names, functools.partial(draw, result))


def _gaps(paths: dict[str, Path]) -> CaptionedFigure:
    gaps = {name: Gaps.load(path) for name, path in paths.items()}
    summary = "; ".join(f"{name}: {one.summary().splitlines()[0]}" for name, one in gaps.items())
    bad = sum(int((~one.reliable).sum()) for one in gaps.values())
    count = sum(len(one.elbo) for one in gaps.values())
    warning = f" log p(x) is unreliable for {bad} of {count_of(count)}: their gaps may be larger." if bad else ""
    return CaptionedFigure(
        plots.gap_bars(gaps),
        f"{summary}. Look for the larger part: an amortisation gap calls for a better encoder (for more data, if it "
        "is larger on test than on train), an approximation gap for a more flexible posterior. The amortisation gap "
        f"is a lower bound, from a refit where {next(iter(gaps.values())).refit}.{warning}",
    )


def _rate_distortion(paths: dict[str, Path]) -> CaptionedFigure:
    results = {name: Representation.load(path) for name, path in paths.items()}
    rows = []
    for name, result in results.items():
        table = result.table()
        if "mutual information" in table:
            parts = (f"{part} {table[part]}" for part in ("mutual information", "marginal KL"))
            rows.append(f"{name}: {', '.join(parts)}")
    surgery = f" ELBO surgery bounds both from either side on average ({'; '.join(rows)})." if rows else ""
    return CaptionedFigure(
        plots.rate_distortion(results),
        "Look for a rate near zero (the decoder ignores the latents), and for a mutual information far below the "
        f"rate: the difference, the marginal KL, is the divergence of the aggregate posterior from the prior.{surgery}",
    )


def _kl(representation: Representation, site: str) -> CaptionedFigure:
    return CaptionedFigure(
        plots.kl_per_dim(representation, site),
        f"The rate of each dim of {site} with its standard error over the data, and the variance of its posterior "
        "mean. Look for dims without a rate, which the decoder does not use, and for dims near the threshold, for "
        "which the number of active dims depends on the threshold.",
    )


def _calibration(calibration: Calibration, site: str) -> CaptionedFigure:
    table = calibration.table()
    return CaptionedFigure(
        plots.calibration_ranks(calibration, site),
        f"Ranks of the latents of {table['data']} among {calibration.num_draws} draws of the guide, "
        f"{table['verdict']}: {table[site]}. Look for lines outside the band. The test concerns data simulated from "
        "the model, and a guide that ignores the data passes it.",
    )


def _gradients(path: Path) -> CaptionedFigure:
    audit = GradientAudit.load(path)
    notes = f" {len(audit.notes)} notes are in {path.name}." if audit.notes else ""
    return CaptionedFigure(
        plots.gradient_noise(audit),
        f"Gradient estimators of {audit.objective} on one batch, {audit.draws} steps each. Look at the right: an "
        "estimator with half the number needs half the time for the same noise. Rings are estimators that are biased "
        f"against enumeration.{notes}",
    )


def _predictive_check(check: PredictiveCheck, statistic: str) -> CaptionedFigure:
    table = check.table()
    return CaptionedFigure(
        plots.predictive_checks(check, statistic),
        f"{capitalized(statistic)} of {table['data']}, and of data that the model replicates: {table['verdict']}. Look "
        "for a line of the data outside the band, which means that the model's data have another "
        f"{statistic}. Replicates from posteriors are closer to the data than those from the prior, since each datum "
        "has chosen its latents: a difference that they show too is not mended by a better guide.",
    )
