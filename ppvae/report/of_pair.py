"""What a trained pair generates, and where its guide puts the data."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ppvae import generate, plots
from ppvae.plots.latents import MOST_CLASSES
from ppvae.plots.style import number
from ppvae.report.parts import Drawn, grid
from ppvae.report.subject import ACTIVE, LeftOut, Subject

MOST_DIMS, LINES = 10, 100
STEPS = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)


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
            grid(s, made),
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
        grid(s, lines, row_titles=titles),
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
        grid(s, torch.cat([ends_of[0], made, ends_of[1]], 1), col_titles=titles),
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
        return Drawn(grid(s, made, row_titles=titles, col_titles=steps), caption, made)
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
