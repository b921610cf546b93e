"""Sections on estimates of log p(x) by annealing, beside importance sampling on the same data, and on BDMC bounds."""

import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ppvae import plots
from ppvae.data.checks import one_line
from ppvae.errors import PpvaeError, count_of
from ppvae.evaluation.annealing.bdmc import HOLDS_FOR, Bracket
from ppvae.evaluation.estimate import Estimate
from ppvae.evaluation.results import kind_of, load_estimate
from ppvae.plots.style import number
from ppvae.report.html import Card
from ppvae.report.run_data import RunData
from ppvae.report.section import CaptionedFigure, Section, as_sentence, build_section, capitalized

EstimatePairs = dict[str, tuple[Estimate, Estimate]]


def load_estimate_pairs(run_data: RunData) -> tuple[EstimatePairs, dict[str, str]]:
    """({name: (annealed estimate, importance sampling on the same data)}, {name: error of an unreadable file})."""
    pairs: EstimatePairs = {}
    errors: dict[str, str] = {}
    for path in sorted(_results_folder(run_data).glob("*_beside.json")):
        name = path.stem.removesuffix("_beside")
        try:
            pairs[name] = load_estimate(path.with_name(f"{name}.json")), load_estimate(path)
        except PpvaeError as error:
            errors[name] = one_line(error, 400)
    return pairs, errors


def annealing_cards(run_data: RunData) -> list[Card]:
    """The negative log-likelihood by annealing, and that by importance sampling on the same data."""
    pairs, _ = load_estimate_pairs(run_data)
    return [
        Card(
            f"NLL by {annealed.method}", number(annealed.nll, 3),
            "" if math.isnan(annealed.nll_std_error) else f"± {number(annealed.nll_std_error, 3)}",
            f"over {count_of(len(est.log_px))}; by L_{est.num_particles} on the same data {number(est.nll, 3)}",
        )
        for annealed, est in pairs.values()
    ]  # fmt: skip


def annealing_remarks(run_data: RunData) -> list[str]:
    """The notes of annealed estimates that concern log p(x) or the NLL."""
    pairs, _ = load_estimate_pairs(run_data)
    return [
        " ".join(as_sentence(note) for note in annealed.notes if "log p(x)" in note or "NLL" in note)
        for annealed, _ in pairs.values()
    ]


def annealing_sections(run_data: RunData) -> Iterator[Section]:
    """A section for each annealed estimate and for each bracket in the run's folder."""
    pairs, errors = load_estimate_pairs(run_data)
    for name, pair in pairs.items():
        title = f"Importance sampling compared with {pair[0].method}"
        yield build_section(name, title, functools.partial(_comparison, *pair))
    for name, reason in errors.items():
        yield Section(name, f"Importance sampling compared with {name}", reason=reason)
    for path in sorted(_results_folder(run_data).glob("*.json")):
        if kind_of(path) == "Bracket":
            draw = functools.partial(_bracket, path, [pair[0] for pair in pairs.values()])
            yield build_section(path.stem, "Bounds on log p(x) of simulated data", draw)


def _results_folder(run_data: RunData) -> Path:
    return Path(run_data.run.directory or "") / "results"


def _comparison(annealed: Estimate, est: Estimate) -> CaptionedFigure:
    todo = annealed.reliability.recommendation
    return CaptionedFigure(
        plots.looseness_curve(annealed, est),
        f"{as_sentence('; '.join(annealed.notes))} Reliability of annealing: "
        f"{annealed.reliability.summary}{f' ({todo})' if todo else ''}. Look for a curve that still rises at its "
        "right end, for its distance from the line, and for whether importance sampling is loose on the data for "
        f"which it is unreliable. {count_of(annealed.num_particles, 'chain')}, {_settings(annealed.settings)}.",
    )


def _bracket(path: Path, estimates: list[Estimate]) -> CaptionedFigure:
    bracket = Bracket.load(path)
    methods = [e.method for e in estimates if all(e.settings.get(k) == v for k, v in bracket.settings.items())]
    which = f"the settings of {' and '.join(methods)} above" if methods else "settings of no estimate of this run"
    return CaptionedFigure(
        plots.bracket(bracket),
        f"{bracket.summary().splitlines()[0]}. An exact posterior sample of each simulated datum is known, so chains "
        f"run in both directions, with {which} ({_settings(bracket.settings)}). Look for a mean gap near zero, which "
        f"bounds the mean error of both directions. {capitalized(HOLDS_FOR)}.",
    )


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())
