"""The explorer of the report: p(x | z) under the pointer on a map of a latent, and each datum's dims on sliders.

All values are computed here and are part of the page, as pictures in one sprite or as 16-bit numbers; `explorer.js`
draws them. Between two computed values the page shows a linear blend of them. Where the likelihood's mean is a
multilayer perceptron of z, its weights are part of the page, which then moves several dims together.
"""

import base64
import io
import json
import math
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ppvae import generate
from ppvae.plots.latents import MOST_CLASSES
from ppvae.report.decoder import decoder_numbers
from ppvae.report.run_data import RunData, SectionUnavailable

MAX_VALUES = 12_000_000  # numbers of all data and means together, which bound the size of the page
MAX_POINTS = 240  # data that can be chosen
MAX_SIDE = 24  # computed values along each axis of the map
MAX_DIMS = 16  # dims with a slider, the most active first
STEPS = 7  # computed values along a slider
NEIGHBOURS = 6
MISSING = 65535  # a missing value among 16-bit numbers


@dataclass(frozen=True)
class Plane:
    """The plane of the map: a point (a, b) is the latent origin + a axes[0] + b axes[1].

    Attributes:
        origin: [D]; `axes`: [2, D]; `points`: the means in the plane, [N, 2].
        names: of the axes.
    """

    origin: Tensor
    axes: Tensor
    points: Tensor
    names: tuple[str, str]


def explorer(run_data: RunData) -> str:
    """The HTML of the explorer for the first latent vector, a continuous one where there is one.

    Raises SectionUnavailable where it cannot be.
    """
    names = sorted(run_data.means, key=run_data.is_discrete)
    if not names:
        raise SectionUnavailable("No latent is a vector of real numbers per datum.")
    if run_data.needs_all_data:
        raise SectionUnavailable("The pair must be called with the whole data set.")
    content = json.dumps(_content(run_data, names[0]), allow_nan=False, separators=(",", ":"))
    content = content.replace("</", "<\\/")  # no word of the data ends the script
    style, script = (files("ppvae.report").joinpath(f"explorer.{kind}").read_text("utf-8") for kind in ("css", "js"))
    return (
        f"<style>{style}</style>\n"
        '<div id="explorer-app" class="explorer"><noscript>The explorer needs JavaScript.</noscript></div>\n'
        f'<script type="application/json" id="explorer-data">{content}</script>\n'
        f"<script>{script}</script>"
    )


def _content(run_data: RunData, site: str) -> dict[str, Any]:
    """What the page draws, as JSON values."""
    means = run_data.means[site]
    plane = _plane(means, site)
    size = run_data.size
    dims = means.var(0, correction=0).argsort(descending=True)[:MAX_DIMS].tolist()
    decoder = _decoder(run_data, site)
    side = max(6, min(MAX_SIDE, math.isqrt(MAX_VALUES // 8 // size)))
    height = 1 if means.shape[1] == 1 else side
    room = MAX_VALUES // size - side * height
    count = max(2, min(MAX_POINTS, len(means), room // (2 if decoder else STEPS * len(dims) + 2)))
    rows = torch.linspace(0, len(means) - 1, count).round().long().unique()
    batch, _ = run_data.batch_of(rows)

    def means_at(z: Tensor, of: Tensor) -> Tensor:
        return run_data.like_data(
            generate.decode(run_data.run.model, run_data.run.guide, batch, z, rows=of, site=site, seed=run_data.seed)
        ).reshape(len(z), -1)

    z, places = means[rows], plane.points[rows]
    low, high = plane.points.amin(0), plane.points.amax(0)
    margin = (0.06 * (high - low)).clamp(min=1e-3)
    low, high = low - margin, high + margin
    across = torch.linspace(float(low[0]), float(high[0]), side)
    upward = torch.linspace(float(low[1]), float(high[1]), height)
    lattice = torch.cartesian_prod(upward, across).flip(1)  # row by row, from the bottom
    on_map = plane.origin + lattice @ plane.axes
    lows, highs = _ranges(means)
    moved = z[:, None, None].repeat(1, len(dims), STEPS, 1)
    for i, d in enumerate(dims):
        moved[:, i, :, d] = torch.linspace(float(lows[d]), float(highs[d]), STEPS)
    own = torch.arange(len(rows))
    pictures = [
        means_at(on_map, torch.cdist(lattice, places).argmin(1)),
        run_data.values(rows).reshape(len(rows), -1).float(),
        means_at(z, own),
    ]
    if decoder is None:
        pictures.append(means_at(moved.flatten(0, 2), own.repeat_interleave(len(dims) * STEPS)))
    values = torch.cat(pictures)
    distances = torch.cdist(z, z).fill_diagonal_(torch.inf)
    near = distances.argsort(1)[:, : min(NEIGHBOURS, len(rows) - 1)]
    return {
        "site": site,
        "axes": plane.names,
        "extent": _numbers(torch.stack([low, high], 1).flatten()),
        "side": [side, height],
        "points": [_numbers(places[:, 0]), _numbers(places[:, 1])],
        "others": [_numbers(plane.points[:, 0], 2), _numbers(plane.points[:, 1], 2)],
        "rows": rows.tolist(),
        "z": [_numbers(row[dims]) for row in z],
        "dims": [
            {"dim": d, "low": float(lows[d]), "high": float(highs[d]), "spread": float(means[:, d].std(correction=0))}
            for d in dims
        ],
        "numDims": means.shape[1],
        "steps": STEPS,
        "near": near.tolist(),
        "decoder": decoder and {**decoder, "z": [_numbers(row) for row in z], "limits": run_data.limits},
        **_labels(run_data, rows),
        **_estimates(run_data, rows),
        **(_sprite(run_data, values) if run_data.event is not None else _curves(run_data, values)),
    }


def _decoder(run_data: RunData, site: str) -> dict[str, Any] | None:
    """The decoder as JSON values; None where it is no multilayer perceptron of this latent alone."""
    means, pair = run_data.means[site], (run_data.run.model, run_data.run.guide)
    few = torch.linspace(0, len(means) - 1, min(32, len(means))).round().long().unique()
    batch, own = run_data.batch_of(few)[0], torch.arange(len(few))

    def decode(z: Tensor) -> Tensor:
        return run_data.like_data(generate.decode(*pair, batch, z, rows=own, site=site, seed=run_data.seed))

    return decoder_numbers(decode, means[few].flip(0))  # each datum with the latent of another


def _plane(means: Tensor, site: str) -> Plane:
    """The two latent dims, or the plane of the first two principal components; a line for one dim."""
    size = means.shape[1]
    if size == 1:
        jitter = torch.rand(len(means), 1, generator=torch.Generator().manual_seed(0))
        points = torch.cat([means, jitter], 1)
        return Plane(means.new_zeros(1), torch.tensor([[1.0], [0.0]]), points, (f"{site}[0]", ""))
    if size == 2:
        return Plane(means.new_zeros(2), torch.eye(2), means, (f"{site}[0]", f"{site}[1]"))
    origin = means.mean(0)
    _, s, v = torch.linalg.svd(means - origin, full_matrices=False)
    axes = v[:2] * v[:2].gather(1, v[:2].abs().argmax(1, keepdim=True)).sign()
    share = 100 * s[:2].square() / s.square().sum().clamp(min=1e-30)
    names = tuple(f"principal component {i} of {site} ({float(p):.0f} %)" for i, p in enumerate(share, 1))
    return Plane(origin, axes, (means - origin) @ axes.T, (names[0], names[1]))


def _ranges(means: Tensor) -> tuple[Tensor, Tensor]:
    """The ends of the slider of each dim: a little beyond the posterior means."""
    low, high = means.amin(0), means.amax(0)
    width = (high - low).clamp(min=0.05 * float((high - low).max()) + 1e-6)
    return low - 0.15 * width, high + 0.15 * width


def _labels(run_data: RunData, rows: Tensor) -> dict[str, Any]:
    if run_data.labels is None or len(run_data.labels.unique()) > MOST_CLASSES:
        return {}
    names = getattr(run_data.columns[0], "classes", ())
    found = run_data.labels.unique().tolist()
    words = [str(names[int(c)]) if 0 <= c < len(names) else f"{c:g}" for c in found]
    return {"labels": [found.index(c) for c in run_data.labels[rows].tolist()], "classes": words}


def _estimates(run_data: RunData, rows: Tensor) -> dict[str, Any]:
    est = run_data.estimate
    if est is None or run_data.mismatch:
        return {}
    return {
        "logPx": _numbers(est.log_px[rows], 2),
        "kHat": _numbers(est.k_hat[rows], 2),
        "reliable": est.reliable[rows].tolist(),
    }


def _sprite(run_data: RunData, values: Tensor) -> dict[str, Any]:
    """All images side by side in one picture of 8-bit levels."""
    assert run_data.event is not None
    channels, height, width = run_data.event
    low, high = run_data.limits
    levels = ((values - low) / (high - low) * 255).nan_to_num(0).clamp(0, 255).round().to(torch.uint8)
    columns = math.isqrt(len(values) * height // width) + 1  # about a square
    count = -(-len(values) // columns) * columns
    tiles = np.zeros((count, channels, height, width), np.uint8)
    tiles[: len(values)] = levels.reshape(-1, channels, height, width).numpy()
    rows = tiles.reshape(count // columns, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    pixels = rows.reshape(count // columns * height, columns * width, channels)
    image, buffer = Image.fromarray(pixels[..., 0] if channels == 1 else pixels), io.BytesIO()
    image.save(buffer, "WEBP", quality=70, method=4)
    return {
        "kind": "image",
        "shape": [height, width],
        "columns": columns,
        "sprite": base64.b64encode(buffer.getvalue()).decode(),
    }


def _curves(run_data: RunData, values: Tensor) -> dict[str, Any]:
    """All vectors as 16-bit numbers between the limits of each number, or of all where they have no names."""
    names = run_data.names or getattr(run_data.columns[0], "columns", ())
    event = (len(names),) if run_data.names else tuple(run_data.columns[0].shape[1:])
    known = torch.where(values.isfinite(), values, torch.nan)
    low = known.nan_to_num(torch.inf).amin(0)
    high = known.nan_to_num(-torch.inf).amax(0)
    if not names:  # one unit
        low, high = (torch.full_like(low, float(v)) for v in (low.min(), high.max()))
    scaled = ((known - low) / (high - low).clamp(min=1e-12) * (MISSING - 1)).round()
    coded = scaled.nan_to_num(MISSING).clamp(0, MISSING).to(torch.int32).numpy().astype("<u2")
    return {
        "kind": "curve",
        "shape": list(event),
        "names": list(names),
        "low": _numbers(low),
        "high": _numbers(high),
        "values": base64.b64encode(coded.tobytes()).decode(),
    }


def _numbers(values: Tensor, digits: int = 3) -> list[float | None]:
    """Rounded numbers; None for those that are not finite."""
    return [round(v, digits) if math.isfinite(v) else None for v in values.double().tolist()]
