"""The sections of the report, in their order."""

import functools
import math
from collections.abc import Callable, Iterator

from ppvae import plots
from ppvae.data.checks import one_line
from ppvae.errors import PpvaeError
from ppvae.plots.style import number
from ppvae.report.annealing_section import annealing_sections
from ppvae.report.estimate_section import bounds, diagnosis, least_reliable_data, log_px
from ppvae.report.explorer import explorer
from ppvae.report.results_section import results_sections
from ppvae.report.run_data import RunData, SectionUnavailable
from ppvae.report.samples_section import interpolations, latent_map, reconstructions, samples, traversals
from ppvae.report.section import CaptionedFigure, Section, build_section, sections_of_sites


def all_sections(run_data: RunData) -> Iterator[Section]:
    """Every section of the report, in its order."""
    yield build_section("explorer", "Explorer", lambda: explorer(run_data))
    yield build_section("curves", "Training", lambda: training_curves(run_data))
    yield build_section("samples", "Samples", lambda: samples(run_data))
    yield build_section("reconstructions", "Reconstructions", lambda: reconstructions(run_data))
    yield build_section("interpolations", "Interpolations", lambda: interpolations(run_data))
    yield from sections_of_latents(run_data, "traversals", "Traversals", traversals)
    yield from sections_of_latents(run_data, "latent_map", "Latent map", latent_map)
    yield build_section("log_px", "Distribution of log p(x)", lambda: log_px(run_data))
    yield build_section("bounds", "Bound by number of particles", lambda: bounds(run_data))
    yield build_section("diagnosis", "Reliability of each log p(x)", lambda: diagnosis(run_data))
    yield build_section("worst", "Data with the largest k̂", lambda: least_reliable_data(run_data))
    yield from annealing_sections(run_data)
    yield from results_sections(run_data)


def sections_of_latents(
    run_data: RunData, key: str, title: str, draw: Callable[[RunData, str], CaptionedFigure]
) -> Iterator[Section]:
    """One section for each latent vector, `MAX_SITES` at most."""
    try:
        names = list(run_data.means)
    except (SectionUnavailable, PpvaeError) as error:
        yield Section(key, title, reason=one_line(error, 400))
        return
    if not names:
        yield Section(key, title, reason="No latent is a vector of real numbers per datum.")
    yield from sections_of_sites(key, title, names, functools.partial(draw, run_data))


def training_curves(run_data: RunData) -> CaptionedFigure:
    """Metrics over epochs."""
    history, metrics = run_data.run.history, run_data.run.metrics
    if not history:
        raise SectionUnavailable("The run has no history.")
    elbos = [(m["valid_elbo"], m["epoch"]) for m in history if math.isfinite(m.get("valid_elbo", math.nan))]
    signs = []
    if elbos:
        elbo, epoch = max(elbos)
        signs.append(
            "a validation curve that rises while the loss still falls, which means overfitting (the best validation "
            f"ELBO is {number(elbo)}, at epoch {epoch})"
        )
    if any(name.endswith("_rate") for name in metrics):
        signs.append("a rate near zero, which means that the decoder ignores the latents")
    text = ", and for ".join(signs) or "a loss that still falls at the end"
    return CaptionedFigure(plots.curves(history), f"Look for {text}.")
