"""What else was found out about a run and lies in its folder: gaps, latents, calibration."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from ppvae import plots
from ppvae.data.checks import one_line
from ppvae.errors import PpvaeError
from ppvae.evaluation.calibration import Calibration
from ppvae.evaluation.local.gaps import Gaps
from ppvae.evaluation.representation import Representation
from ppvae.evaluation.results import kind_of
from ppvae.report.parts import Drawn, Section, section
from ppvae.report.subject import Subject

MOST_SITES = 3

T = TypeVar("T", Representation, Calibration)


def results(s: Subject) -> Iterator[Section]:
    """A section for each kind of result in the run's folder; none for what was never asked."""
    if s.run.directory is None:
        return
    found: dict[str, dict[str, Path]] = {}
    for path in sorted((Path(s.run.directory) / "results").glob("*.json")):
        kind = kind_of(path)
        found.setdefault(kind, {})[_name(path, kind)] = path
    if "Gaps" in found:
        yield section("gaps", "Where the nats go", functools.partial(_gaps, found["Gaps"]))
    if "Representation" in found:
        paths = found["Representation"]
        yield section("rate_distortion", "Rate and distortion", functools.partial(_rate_distortion, paths))
        yield from _sites("kl", "Rate of each dim", next(iter(paths.values())), Representation, _kl)
    if "Calibration" in found:
        path = next(iter(found["Calibration"].values()))
        yield from _sites("calibration", "Calibration on simulated data", path, Calibration, _calibration)


def _name(path: Path, kind: str) -> str:
    """What tells results of one kind apart: "gaps_train" is "train"."""
    return path.stem.lower().removeprefix(kind.lower()).strip("_-") or path.stem


def _sites(key: str, title: str, path: Path, cls: type[T], draw: Callable[[T, str], Drawn]) -> Iterator[Section]:
    """One section for each latent of a result, a few at most."""
    try:
        one = cls.load(path)
    except PpvaeError as error:
        yield Section(key, title, why=one_line(error, 400))
        return
    for i, name in enumerate(list(one.sites)[:MOST_SITES]):
        yield section(f"{key}_{i + 1}" if i else key, f"{title} of {name}", functools.partial(draw, one, name))


def _gaps(paths: dict[str, Path]) -> Drawn:
    found = {name: Gaps.load(path) for name, path in paths.items()}
    words = "; ".join(f"{name}: {one.summary().splitlines()[0]}" for name, one in found.items())
    first = next(iter(found.values()))
    bad = sum(int((~one.reliable).sum()) for one in found.values())
    count = sum(len(one.elbo) for one in found.values())
    trust = f" Of {bad} of {count} data log p(x) is not to be trusted: their gaps may be larger." if bad else ""
    return Drawn(
        plots.gap_bars(found),
        f"{words}. Look for the larger part: an amortisation gap asks for a better encoder (for more data, where it is "
        f"larger on test than on train), an approximation gap for a richer posterior. The amortisation gap is a lower "
        f"bound, from a refit where {first.refit}.{trust}",
    )


def _rate_distortion(paths: dict[str, Path]) -> Drawn:
    found = {name: Representation.load(path) for name, path in paths.items()}
    words = []
    for name, one in found.items():
        table = one.table()
        if "mutual information" in table:
            parts = (f"{part} {table[part]}" for part in ("mutual information", "marginal KL"))
            words.append(f"{name}: {', '.join(parts)}")
    split = f" ELBO surgery bounds both from either side on average ({'; '.join(words)})." if words else ""
    return Drawn(
        plots.rate_distortion(found),
        "Look for a rate near zero (the latents are ignored), and for a mutual information far below the rate: the "
        f"rest, the marginal KL, is paid for an aggregate posterior that is not the prior.{split}",
    )


def _kl(found: Representation, site: str) -> Drawn:
    return Drawn(
        plots.kl_per_dim(found, site),
        f"The rate of each dim of {site} with its standard error over the data, and how much its posterior mean "
        "varies: look for dims without a rate, which the decoder does not use, and for dims near the threshold, which "
        "make the count of active ones a matter of taste.",
    )


def _calibration(found: Calibration, site: str) -> Drawn:
    table = found.table()
    return Drawn(
        plots.calibration_ranks(found, site),
        f"Ranks of the latents of {table['data']} among {found.num_draws} draws of the guide, {table['verdict']}: "
        f"{table[site]}. Look for lines outside the band; it holds for data of the model's own, and a guide that "
        f"ignores the data passes.",
    )
