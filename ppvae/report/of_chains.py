"""What chains say of log p(x), where a run's folder has it: annealing beside importance sampling, and the bracket."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ppvae import plots
from ppvae.data.checks import one_line
from ppvae.errors import PpvaeError
from ppvae.evaluation.annealing.bdmc import HOLDS_FOR, Bracket
from ppvae.evaluation.estimate import Estimate
from ppvae.evaluation.results import kind_of, load_estimate
from ppvae.plots.style import number
from ppvae.report.page import Card
from ppvae.report.parts import Drawn, Section, section
from ppvae.report.subject import Subject

Pairs = dict[str, tuple[Estimate, Estimate]]


def beside(s: Subject) -> tuple[Pairs, dict[str, str]]:
    """({result's name: (estimate by chains, importance sampling on the same data)}, {name: why it cannot be read})."""
    found: Pairs = {}
    failed: dict[str, str] = {}
    for path in sorted(_folder(s).glob("*_beside.json")):
        name = path.stem.removesuffix("_beside")
        try:
            found[name] = load_estimate(path.with_name(f"{name}.json")), load_estimate(path)
        except PpvaeError as error:
            failed[name] = one_line(error, 400)
    return found, failed


def cards(s: Subject) -> list[Card]:
    """The negative log-likelihood by chains, with that by importance sampling on the same data below it."""
    found, _ = beside(s)
    return [
        Card(
            f"NLL by {tighter.method}", number(tighter.nll, 3),
            "" if math.isnan(tighter.nll_std_error) else f"± {number(tighter.nll_std_error, 3)}",
            f"of {len(est.log_px)} data; by L_{est.num_particles} there {number(est.nll, 3)}",
        )
        for tighter, est in found.values()
    ]  # fmt: skip


def remarks(s: Subject) -> list[str]:
    """What annealing says of the headline number."""
    found, _ = beside(s)
    return [
        " ".join(f"{note[:1].upper()}{note[1:]}." for note in tighter.notes if "log p(x)" in note or "NLL" in note)
        for tighter, _ in found.values()
    ]


def chains(s: Subject) -> Iterator[Section]:
    """A section for each estimate by chains and each bracket in the run's folder."""
    found, failed = beside(s)
    for name, pair in found.items():
        yield section(name, f"Importance sampling beside {pair[0].method}", functools.partial(_beside, *pair))
    for name, why in failed.items():
        yield Section(name, f"Importance sampling beside {name}", why=why)
    for path in sorted(_folder(s).glob("*.json")):
        if kind_of(path) == "Bracket":
            pairs = [pair[0] for pair in found.values()]
            draw = functools.partial(_bracket, path, pairs)
            yield section(path.stem, "log p(x) of simulated data between two bounds", draw)


def _folder(s: Subject) -> Path:
    return Path(s.run.directory or "") / "results"


def _beside(tighter: Estimate, est: Estimate) -> Drawn:
    words = "; ".join(note for note in tighter.notes)
    todo = tighter.reliability.recommendation
    return Drawn(
        plots.looseness_curve(tighter, est),
        f"{words[:1].upper()}{words[1:]}. Of annealing: {tighter.reliability.summary}{f' ({todo})' if todo else ''}. "
        f"Look for a "
        f"curve that still rises at its right end, for its distance from the line, and for whether the data that "
        f"importance sampling does not trust are those where it is loose. {tighter.num_particles} chains, "
        f"{_settings(tighter.settings)}.",
    )


def _bracket(path: Path, estimates: list[Estimate]) -> Drawn:
    found = Bracket.load(path)
    same = [e.method for e in estimates if all(e.settings.get(k) == v for k, v in found.settings.items())]
    which = f"the settings of {' and '.join(same)} above" if same else "settings that no estimate of this run has"
    return Drawn(
        plots.bracket(found),
        f"{found.summary().splitlines()[0]}. The latents of simulated data are known, so that chains can run both "
        f"ways; with {which} ({_settings(found.settings)}). Look for a mean gap near zero, which bounds the mean "
        f"error of either. {HOLDS_FOR[:1].upper()}{HOLDS_FOR[1:]}.",
    )


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())
