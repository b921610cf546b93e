"""Sections on what a trained pair generates, and on where its guide places the data in latent space."""

import math
from typing import Any

import torch
from torch import Tensor

from ppvae import generate, plots
from ppvae.errors import count_of
from ppvae.evaluation.representation import ACTIVE
from ppvae.plots.latents import MOST_CLASSES
from ppvae.plots.style import number
from ppvae.report.run_data import RunData, SectionUnavailable
from ppvae.report.section import CaptionedFigure, image_grid

MAX_DIMS, MAX_LINES = 10, 100
TRAVERSAL = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)  # values that a latent dim takes


def samples(run_data: RunData, count: int = 64) -> CaptionedFigure:
    """Ancestral samples."""
    run, is_image = run_data.run, run_data.event is not None
    batch, _ = run_data.batch_of(torch.arange(min(count, len(run_data))))
    generated = generate.samples(run.model, run.guide, batch, count, mean=is_image, seed=run_data.seed)
    generated = run_data.like_data(generated)
    condition = ", each conditioned on the other columns of one of the first data" if run_data.has_context else ""
    if is_image:
        return CaptionedFigure(
            image_grid(run_data, generated),
            f"Means of p(x | z) for z sampled from the prior{condition}. Look for variety, and for samples that "
            "resemble no datum: they come from regions of the prior where the guide places no data.",
            generated,
        )
    data = run_data.values(torch.arange(min(MAX_LINES, len(run_data))))
    panels = {f"data (first {len(data)})": {"": data}, f"samples ({len(generated)})": {"": generated}}
    return CaptionedFigure(
        plots.parallel_coordinates(panels, cols=2),
        f"Data and samples of the model, each a line over the dims of x{condition}. Look for differences in spread and "
        "shape.",
        generated,
    )


def reconstructions(run_data: RunData, count: int = 24) -> CaptionedFigure:
    """Data and their reconstructions."""
    run, is_image = run_data.run, run_data.event is not None
    rows = torch.arange(min(count if is_image else min(count, 8), len(run_data)))
    batch, where = run_data.batch_of(rows)
    generated = run_data.like_data(generate.reconstructions(run.model, run.guide, batch, seed=run_data.seed)[where])
    data = run_data.values(rows).reshape(generated.shape)
    if not is_image:
        pairs = enumerate(zip(data, generated, strict=True))
        panels = {f"#{i}": {"data": x, "reconstruction": r} for i, (x, r) in pairs}
        return CaptionedFigure(
            plots.parallel_coordinates(panels),
            "Data and their reconstructions, the mean of p(x | z) for one z sampled from q(z | x). Look for dims "
            "that are not reconstructed.",
            generated,
        )
    images, titles = _alternating_rows(data, generated)
    return CaptionedFigure(
        image_grid(run_data, images, row_titles=titles),
        "Data, and below each its reconstruction, the mean of p(x | z) for one z sampled from q(z | x). Look for lost "
        "details, and for images that are reconstructed as something else.",
        generated,
    )


def _alternating_rows(data: Tensor, reconstructed: Tensor, cols: int = 12) -> tuple[Tensor, list[str]]:
    """Rows of data and of reconstructions in turn, [rows, cols, *event], padded with NaN; and the rows' titles."""
    cols = min(cols, len(data))
    padding = torch.full((-len(data) % cols, *data.shape[1:]), math.nan)
    both = torch.stack([torch.cat([t.float(), padding]) for t in (data, reconstructed)])
    rows = both.reshape(2, -1, cols, *data.shape[1:]).transpose(0, 1).flatten(0, 1)
    return rows, ["data", "reconstruction"] * (len(rows) // 2)


def interpolations(run_data: RunData, steps: int = 10) -> CaptionedFigure:
    """Interpolations between pairs of data, of different labels where there are labels."""
    run = run_data.run
    starts, ends = _interpolation_pairs(run_data, 6 if run_data.event else 4)
    if run_data.needs_all_data:
        order = torch.arange(len(run_data))
        order[starts] = ends
        first, last, where = run_data.read(torch.arange(len(run_data))), run_data.read(order), starts
    else:
        first, last, where = run_data.read(starts), run_data.read(ends), torch.arange(len(starts))
    generated = generate.interpolations(run.model, run.guide, first, last, steps, seed=run_data.seed)
    generated = run_data.like_data(generated[:, where].transpose(0, 1), lead=2)
    caption = "Means of p(x | z) along straight lines between the posterior means of two data. Look for gradual change"
    fractions = torch.linspace(0, 1, steps)
    if run_data.event is None:
        panels = {
            f"#{i} to #{j}": {f"{t:.1f}": x for t, x in zip(fractions, row, strict=True)}
            for i, j, row in zip(starts.tolist(), ends.tolist(), generated, strict=True)
        }
        return CaptionedFigure(plots.parallel_coordinates(panels), f"{caption}.", generated)
    shape = (len(generated), 1, *generated.shape[2:])
    start_images, end_images = (run_data.values(rows).reshape(shape).to(generated) for rows in (starts, ends))
    titles = ["datum", *(f"{t:.2g}" for t in fractions), "datum"]
    return CaptionedFigure(
        image_grid(run_data, torch.cat([start_images, generated, end_images], 1), col_titles=titles),
        f"{caption}, and for intermediate images that resemble no datum (a region of latent space that the prior "
        "covers and the data do not).",
        generated,
    )


def _interpolation_pairs(run_data: RunData, count: int) -> tuple[Tensor, Tensor]:
    """The first and the last rows of interpolations, no row twice, of different labels where there are labels."""
    if len(run_data) < 2:
        raise SectionUnavailable("An interpolation takes two data.")
    free = list(range(min(len(run_data), 20 * count)))
    starts: list[int] = []
    ends: list[int] = []
    while len(starts) < count and len(free) > 1:
        i = free.pop(0)
        others = [j for j in free if run_data.labels is None or run_data.labels[i] != run_data.labels[j]]
        j = (others or free)[0]
        free.remove(j)
        starts.append(i)
        ends.append(j)
    return torch.tensor(starts), torch.tensor(ends)


def traversals(run_data: RunData, site: str) -> CaptionedFigure:
    """One dim of a latent at a time over a range of values, the most active dims first."""
    run, variance = run_data.run, run_data.means[site].var(0, correction=0)
    if run_data.is_discrete(site):
        return _discrete_traversals(run_data, site)
    dims = variance.argsort(descending=True)[:MAX_DIMS].tolist()
    batch, _ = run_data.batch_of(torch.arange(1))
    generated = generate.traversals(
        run.model, run.guide, batch, site=site, dims=dims, values=TRAVERSAL, seed=run_data.seed
    )
    generated = run_data.like_data(generated, lead=2)
    titles = [f"{site}[{d}]: {float(variance[d]):.2g}" for d in dims]
    steps = [number(v, 0) for v in TRAVERSAL]
    shown = "" if len(dims) == len(variance) else f" (the first {len(dims)} of {len(variance)})"
    side = "left" if run_data.event is not None else "above"
    caption = (
        f"Means of p(x | z) as one dim of {site} at a time goes from −3 to 3, the other dims at the posterior mean of "
        f"datum 0. Look for rows without change: dims that the decoder does not use. Dims{shown} are in order of the "
        f"variance of their posterior mean ({side}); {active_dims(run_data, site)} are active (variance above "
        f"{ACTIVE})."
    )
    return CaptionedFigure(_draw_traversals(run_data, generated, titles, steps), caption, generated)


def _draw_traversals(run_data: RunData, generated: Tensor, titles: list[str], steps: list[str]) -> Any:
    """A row of pictures, or of profiles, for each title, with a column for each step."""
    if run_data.event is not None:
        return image_grid(run_data, generated, row_titles=titles, col_titles=steps)
    rows = zip(titles, generated, strict=True)
    return plots.parallel_coordinates({title: dict(zip(steps, row, strict=True)) for title, row in rows})


def _discrete_traversals(run_data: RunData, site: str) -> CaptionedFigure:
    """A discrete latent through its values: a row for each dim, or one of all classes."""
    run, (batch, _) = run_data.run, run_data.batch_of(torch.arange(1))
    generated = generate.traversals(run.model, run.guide, batch, site=site, seed=run_data.seed)
    generated = run_data.like_data(generated, lead=2)[:MAX_DIMS]
    titles = [f"{site}[{d}]" for d in range(len(generated))] if len(generated) > 1 else [site]
    steps = [str(value) for value in range(generated.shape[1])]
    caption = (
        f"Means of p(x | z) as the discrete latent {site} goes through its values, other latents at the posterior mean "
        "of datum 0. Look for values that give the same: the decoder does not tell them apart."
    )
    return CaptionedFigure(_draw_traversals(run_data, generated, titles, steps), caption, generated)


def active_dims(run_data: RunData, site: str) -> str:
    """The number of active dims of a latent, as text."""
    variance = run_data.means[site].var(0, correction=0)
    return f"{int((variance > ACTIVE).sum())} of {count_of(len(variance), 'dim')}"


def latent_map(run_data: RunData, site: str) -> CaptionedFigure:
    """Posterior means in the plane."""
    means, est, count = run_data.means[site], run_data.estimate, len(run_data)
    classes = run_data.labels.unique() if run_data.labels is not None else []
    labels = run_data.labels[: len(means)] if run_data.labels is not None and len(classes) <= MOST_CLASSES else None
    per_datum = est.log_px[: len(means)] if est is not None and not run_data.mismatch else None
    if labels is not None:
        look = "Look for classes that are separate (the latents carry the label) and for classes that mix"
    elif per_datum is not None:
        look = "Look for regions of low log p(x), and for outliers"
    else:
        look = "Look for clusters, and for outliers"
    if len(classes) > MOST_CLASSES:
        look += f"; {len(classes)} labels are too many for a colour each"
    names = getattr(run_data.columns[0], "classes", ())
    which = (
        ("the datum" if count == 1 else f"all {count} data")
        if len(means) == count
        else f"the first {count_of(len(means))}"
    )
    return CaptionedFigure(
        plots.latent_map(means, labels, log_px=per_datum, names=names, site=site),
        f"Posterior means of {site} for {which}. {look}.",
    )
