"""Every part of the report, in its order."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

from ppvae import plots
from ppvae.data.checks import one_line
from ppvae.errors import PpvaeError
from ppvae.plots.style import number
from ppvae.report.of_chains import chains
from ppvae.report.of_estimate import bounds, diagnosis, log_px, worst_data
from ppvae.report.of_pair import interpolations, latent_map, reconstructions, samples, traversals
from ppvae.report.of_results import results
from ppvae.report.parts import Drawn, Section, section
from ppvae.report.subject import LeftOut, Subject

MOST_SITES = 3


def sections(s: Subject) -> Iterator[Section]:
    """Every part of the report, in its order."""
    yield section("curves", "Training", lambda: curves(s))
    yield section("samples", "Samples", lambda: samples(s))
    yield section("reconstructions", "Reconstructions", lambda: reconstructions(s))
    yield section("interpolations", "Interpolations", lambda: interpolations(s))
    yield from of_latents(s, "traversals", "Traversals", traversals)
    yield from of_latents(s, "latent_map", "Latent map", latent_map)
    yield section("log_px", "Distribution of log p(x)", lambda: log_px(s))
    yield section("bounds", "Bound against particles", lambda: bounds(s))
    yield section("diagnosis", "Diagnosis", lambda: diagnosis(s))
    yield section("worst", "Data with the worst k̂", lambda: worst_data(s))
    yield from chains(s)
    yield from results(s)


def of_latents(s: Subject, key: str, title: str, draw: Callable[[Subject, str], Drawn]) -> Iterator[Section]:
    """One section for each latent vector, a few at most."""
    try:
        names = list(s.means)[:MOST_SITES]
    except (LeftOut, PpvaeError) as error:
        yield Section(key, title, why=one_line(error, 400))
        return
    if not names:
        yield Section(key, title, why="No latent is a vector of real numbers per datum.")
    for i, name in enumerate(names):
        yield section(f"{key}_{i + 1}" if i else key, f"{title} of {name}", functools.partial(draw, s, name))


def curves(s: Subject) -> Drawn:
    """Metrics over epochs."""
    if not s.run.history:
        raise LeftOut("The run has no history.")
    best = [(m["valid_elbo"], m["epoch"]) for m in s.run.history if math.isfinite(m.get("valid_elbo", math.nan))]
    look = []
    if best:
        value, epoch = max(best)
        words = f"the best validation ELBO was {number(value)}, at epoch {epoch}"
        look.append(f"a validation curve that turns up while the loss still falls (overfitting; {words})")
    if any(name.endswith("_rate") for name in s.run.metrics):
        look.append("a rate near zero (the latents are ignored)")
    words = ", and for ".join(look) or "a loss that still falls at the end"
    return Drawn(plots.curves(s.run.history), f"Look for {words}.")
