"""The report's pictures: what is drawn, and one sentence on what to look for."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppvae import generate, plots
from ppvae.data.checks import one_line
from ppvae.errors import PpvaeError
from ppvae.evaluation.estimate import MIN_ESS, Estimate
from ppvae.plots.estimates import k_hat_limit
from ppvae.plots.latents import MOST_CLASSES
from ppvae.plots.style import number
from ppvae.report.subject import ACTIVE, LeftOut, Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger("ppvae")

NO_ESTIMATE = "There is no estimate of log p(x); see the top of the page."
MOST_SITES, MOST_DIMS, LINES = 3, 10, 100
STEPS = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)


@dataclass(frozen=True)
class Drawn:
    """A figure, what to look for in it, and the numbers that it shows where they were generated."""

    figure: Figure
    caption: str
    values: Tensor | None = None


@dataclass(frozen=True)
class Section:
    """A part of the report: a drawing, or one sentence on why there is none."""

    key: str
    title: str
    drawn: Drawn | None = None
    why: str = ""


def section(key: str, title: str, draw: Callable[[], Drawn]) -> Section:
    """Draws, or says in a sentence what hindered it: a picture must not cost a finished run its report."""
    try:
        return Section(key, title, draw())
    except (LeftOut, PpvaeError) as error:
        return Section(key, title, why=one_line(error, 400))
    except Exception as error:
        log.warning("report: %s could not be drawn (%s: %s)", key, type(error).__name__, one_line(error))
        return Section(key, title, why=f"It could not be drawn ({type(error).__name__}: {one_line(error)}).")


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
        one = section(f"{key}_{i + 1}" if i else key, f"{title} of {name}", lambda name=name: draw(s, name))  # type: ignore[misc]
        yield one


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
    if any("rate" in name for name in s.run.metrics):
        look.append("a rate near zero (the latents are ignored)")
    words = ", and for ".join(look) or "a loss that still falls at the end"
    return Drawn(plots.curves(s.run.history), f"Look for {words}.")


def samples(s: Subject, count: int = 64) -> Drawn:
    """Ancestral samples."""
    batch, _ = s.called_with(torch.arange(min(count, len(s))))
    image = s.event is not None
    made = s.like_data(generate.samples(s.run.model, s.run.guide, batch, count, mean=image, seed=s.seed))
    if len(s.columns) > 1:
        given = ", each given what comes with one of the first data besides x"
    else:
        given = ""
    if s.event is not None:
        return Drawn(
            _grid(s, made),
            f"Means of p(x | z) for z drawn from the prior{given}: look for variety, and for samples that no datum "
            "resembles; they come from regions of the prior where no datum is encoded.",
            made,
        )
    data = s.values(torch.arange(min(LINES, len(s))))
    return Drawn(
        plots.profiles({f"data (first {len(data)})": {"": data}, f"samples ({len(made)})": {"": made}}, cols=2),
        f"Data and draws from the model, each a line over the dims of x{given}: look for other spreads and shapes.",
        made,
    )


def reconstructions(s: Subject, count: int = 24) -> Drawn:
    """Data above, what comes back below."""
    rows = torch.arange(min(count if s.event else min(count, 8), len(s)))
    batch, where = s.called_with(rows)
    made = s.like_data(generate.reconstructions(s.run.model, s.run.guide, batch, seed=s.seed)[where])
    data = s.values(rows).reshape(made.shape)
    how = "mean of p(x | z) for one z drawn from q(z | x)"
    if s.event is None:
        panels = {f"#{i}": {"data": x, "reconstruction": r} for i, (x, r) in enumerate(zip(data, made, strict=True))}
        return Drawn(plots.profiles(panels), f"Data and {how}: look for dims that do not come back.", made)
    lines, titles = _in_pairs(data, made)
    return Drawn(
        _grid(s, lines, row_titles=titles),
        f"Data above, {how}, below: look for details that are lost, and for images that come back as something else.",
        made,
    )


def _in_pairs(data: Tensor, made: Tensor, cols: int = 12) -> tuple[Tensor, list[str]]:
    """Rows of data and of what was made of them in turn, [rows, cols, *event], the last ones filled up with NaN."""
    cols = min(cols, len(data))
    fill = -len(data) % cols
    blank = torch.full((fill, *data.shape[1:]), math.nan)
    both = torch.stack([torch.cat([t.float(), blank]) for t in (data, made)])
    paired = both.reshape(2, -1, cols, *data.shape[1:]).transpose(0, 1).flatten(0, 1)
    return paired, ["data", "reconstruction"] * (len(paired) // 2)


def interpolations(s: Subject, steps: int = 10) -> Drawn:
    """Between pairs of data, of different labels where there are labels."""
    starts, ends = _pairs(s, 6 if s.event else 4)
    if s.whole:
        order = torch.arange(len(s))
        order[starts] = ends
        first, last, where = s.read(torch.arange(len(s))), s.read(order), starts
    else:
        first, last, where = s.read(starts), s.read(ends), torch.arange(len(starts))
    made = generate.interpolations(s.run.model, s.run.guide, first, last, steps, seed=s.seed)[:, where].transpose(0, 1)
    made = s.like_data(made, lead=2)
    if s.event is None:
        panels = {
            f"#{i} to #{j}": {f"{t:.1f}": x for t, x in zip(torch.linspace(0, 1, steps), row, strict=True)}
            for i, j, row in zip(starts.tolist(), ends.tolist(), made, strict=True)
        }
        return Drawn(
            plots.profiles(panels),
            "Means of p(x | z) on straight lines between the posterior means of two data: look for gradual change.",
            made,
        )
    shape = (len(made), 1, *made.shape[2:])
    ends_of = [s.values(rows).reshape(shape).to(made) for rows in (starts, ends)]
    titles = ["datum", *(f"{t:.2g}" for t in torch.linspace(0, 1, steps)), "datum"]
    return Drawn(
        _grid(s, torch.cat([ends_of[0], made, ends_of[1]], 1), col_titles=titles),
        "Means of p(x | z) on straight lines between the posterior means of two data: look for gradual change, and for "
        "in-between images that are like no datum (a region that the prior fills and the data do not).",
        made,
    )


def _pairs(s: Subject, count: int) -> tuple[Tensor, Tensor]:
    """Rows to start from and rows to end at, no row twice, of different labels where there are labels."""
    if len(s) < 2:
        raise LeftOut("It takes two data to go from one to the other.")
    free = list(range(min(len(s), 20 * count)))
    starts: list[int] = []
    ends: list[int] = []
    while len(starts) < count and len(free) > 1:
        i = free.pop(0)
        other = [j for j in free if s.labels is None or s.labels[i] != s.labels[j]]
        j = (other or free)[0]
        free.remove(j)
        starts.append(i)
        ends.append(j)
    return torch.tensor(starts), torch.tensor(ends)


def traversals(s: Subject, site: str) -> Drawn:
    """One dim at a time, the most active first."""
    variance = s.means[site].var(0, correction=0)
    dims = variance.argsort(descending=True)[:MOST_DIMS].tolist()
    batch, _ = s.called_with(torch.arange(1))
    made = generate.traversals(s.run.model, s.run.guide, batch, site=site, dims=dims, values=STEPS, seed=s.seed)
    made = s.like_data(made, lead=2)
    titles = [f"{site}[{d}]: {float(variance[d]):.2g}" for d in dims]
    steps = [number(v, 0) for v in STEPS]
    shown = "" if len(dims) == len(variance) else f" (the first {len(dims)} of {len(variance)})"
    caption = (
        f"Means of p(x | z) as one dim of {site} at a time goes from −3 to 3 and the rest stays at the posterior mean "
        f"of datum 0: look for rows without change, dims that the decoder does not use; dims{shown} are in order of "
        f"the variance of their posterior mean (left), and {active(s, site)} are active (variance above {ACTIVE})."
    )
    if s.event is not None:
        return Drawn(_grid(s, made, row_titles=titles, col_titles=steps), caption, made)
    panels = {t: dict(zip(steps, row, strict=True)) for t, row in zip(titles, made, strict=True)}
    return Drawn(plots.profiles(panels), caption.replace("(left)", "(above)"), made)


def active(s: Subject, site: str) -> str:
    """How many dims of a latent are active, in words."""
    variance = s.means[site].var(0, correction=0)
    return f"{int((variance > ACTIVE).sum())} of {len(variance)} dims"


def latent_map(s: Subject, site: str) -> Drawn:
    """Posterior means in the plane."""
    means = s.means[site]
    classes = s.labels.unique() if s.labels is not None else []
    labels = s.labels[: len(means)] if s.labels is not None and len(classes) <= MOST_CLASSES else None
    per_datum = s.estimate.log_px[: len(means)] if s.estimate is not None and not s.matched else None
    names = getattr(s.columns[0], "classes", ())
    which = "all" if len(means) == len(s) else f"the first {len(means)}"
    if labels is not None:
        look = "look for classes that lie apart (the latents carry the label) and for those that mix"
    elif per_datum is not None:
        look = "look for regions of low log p(x), and for data far from the rest"
    else:
        look = "look for clusters, and for data far from the rest"
    if len(classes) > MOST_CLASSES:
        look += f" ({len(classes)} labels are too many for colours)"
    return Drawn(
        plots.latent_map(means, labels, log_px=per_datum, names=names, site=site),
        f"Posterior means of {site} for {which} {len(s) if which == 'all' else ''} data: {look}.".replace("  ", " "),
    )


def log_px(s: Subject) -> Drawn:
    """The distribution over the data."""
    return Drawn(
        plots.log_px_histogram(_per_datum(s)),
        "Look for a long tail to the left (data that surprise the model), and for where the data lie that are not to "
        "be trusted: their log p(x) may be far too low.",
    )


def bounds(s: Subject) -> Drawn:
    """L_k against k."""
    if s.estimate is None:
        raise LeftOut(NO_ESTIMATE)
    if s.estimate.num_particles < 2:
        raise LeftOut("One particle gives one bound, the ELBO.")
    band = len(s.estimate.log_px) > 1
    return Drawn(
        plots.bound_curve(s.estimate),
        "Look for a curve that still rises at its right end, where more particles would raise the estimate"
        + (
            "; the band is the spread of the data, common to all k: the shape is better known than the height."
            if band
            else "."
        ),
    )


def diagnosis(s: Subject) -> Drawn:
    """Which data can be trusted, and why not."""
    est = _per_datum(s)
    limit = k_hat_limit(est.num_particles)
    if limit is None:
        raise LeftOut(f"K = {est.num_particles} is too few particles to judge any datum; it takes 25.")
    return Drawn(
        plots.diagnosis(est),
        f"Look for data outside the shaded region (k̂ ≥ {limit:.2f} or an effective sample size below {MIN_ESS:g}): few "
        "particles carry their weight, and more particles or a better guide would change their log p(x).",
    )


def worst_data(s: Subject, count: int = 16) -> Drawn:
    """The data with the largest k_hat, with their numbers."""
    est = _per_datum(s)
    if s.matched:
        raise LeftOut(s.matched)
    rows = worst(est, count if s.event else 8)
    values = s.values(torch.tensor(rows))
    titles = [_numbers(s, est, i) for i in rows]
    bad = int((~est.reliable).sum())
    caption = (
        f"The data with the largest k̂ ({bad} of {len(s)} are not to be trusted), worst first, each with its row, "
        "k̂, effective sample size (ESS) and log p(x) in nats: look for what they share, such as a rare style or damage."
    )
    if s.event is not None:
        return Drawn(_grid(s, values, cols=8, titles=titles), caption)
    panels = {t.replace("\n", ", ", 1): {"": v} for t, v in zip(titles, values, strict=True)}
    return Drawn(plots.profiles(panels), caption)


def worst(est: Estimate, count: int) -> list[int]:
    """Rows in order of how little they can be trusted: weights not finite, then the largest k_hat, then the least ess.

    A k_hat of NaN (fewer than 25 particles) counts as the largest.
    """
    k_hat, ess, broken = est.k_hat.tolist(), est.ess.tolist(), (est.nonfinite > 0).tolist()

    def trust(i: int) -> tuple[bool, float, float]:
        return not broken[i], -math.inf if math.isnan(k_hat[i]) else -k_hat[i], ess[i] if ess[i] == ess[i] else -1.0

    return sorted(range(len(k_hat)), key=trust)[:count]


def _numbers(s: Subject, est: Estimate, i: int) -> str:
    label = "" if s.labels is None else f", label {s.labels[i].item():g}"
    k, ess, value = (float(t[i]) for t in (est.k_hat, est.ess, est.log_px))
    return f"#{i}{label}\nk̂ {number(k, 2)}\nESS {number(ess, 0)}\nlog p(x) {number(value, 1)}"


def _per_datum(s: Subject) -> Estimate:
    if s.estimate is None:
        raise LeftOut(NO_ESTIMATE)
    if s.estimate.joint:
        raise LeftOut("Weights are joint over the data set, so that no datum has a log p(x) of its own.")
    return s.estimate


def _grid(s: Subject, images: Any, **words: Any) -> Figure:
    assert s.event is not None
    return plots.image_grid(images, s.event, limits=s.limits, **words)
