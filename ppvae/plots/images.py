"""Grids of images, in which each image pixel covers a whole number of figure pixels."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ppvae.errors import UsageError
from ppvae.errors.ranges import check_ranges, check_sequences
from ppvae.plots.style import DPI, INK, VERMILLION, array, styled

WIDTH = 1936  # pixels of a full-width figure
GAP = 4  # pixels between images
FONT_SIZE = 8.0  # points
_EM = FONT_SIZE * DPI / 72  # pixels


@styled
def image_grid(
    images: Any,
    event_shape: Sequence[int],
    *,
    rows: int | None = None,
    cols: int | None = None,
    titles: Sequence[str] | None = None,
    row_titles: Sequence[str] | None = None,
    col_titles: Sequence[str] | None = None,
    limits: tuple[float, float] = (0.0, 1.0),
    ax: Any = None,
) -> Figure:
    """Images [N, ...] or [R, C, ...] as a grid, flat or shaped; values are clipped to `limits`, black to white.

    Args:
        event_shape: (C, H, W) or (H, W), C = 1 (grey) or 3 (red, green, blue).
        rows, cols: of the grid where images are [N, ...]; 16 columns at most by default.
        titles: text below each image; `row_titles` left of each row, `col_titles` above each column.

    NaN pixels are vermillion; an image that is all NaN is left blank.
    """
    check_ranges(rows=rows, cols=cols)
    check_sequences(event_shape=event_shape, limits=limits)
    if len(limits) != 2:
        raise UsageError(f"limits: expected two numbers, found {limits}")
    limits = float(limits[0]), float(limits[1])
    pixels, shape = _to_grid(array(images), tuple(event_shape), rows, cols)
    (rows, cols), (height, width) = shape, pixels.shape[1:3]
    lines = max((t.count("\n") + 1 for t in titles), default=0) if titles else 0
    left = round(max(map(len, row_titles)) * 0.62 * _EM + _EM) if row_titles else 0
    top = round(1.6 * _EM) if col_titles else 0
    tile = min(190 if titles else 144, (WIDTH - left) // cols - GAP)
    scale = max(1, tile // max(width, height))
    width, height = width * scale, height * scale
    below = round((1.3 * lines + 0.9) * _EM) if lines else 0
    pitch = max(width, 190) + 3 * GAP if titles else width + GAP, height + GAP + below
    canvas = np.ones((top + rows * pitch[1] - GAP, left + cols * pitch[0] - GAP, 3), np.float32)
    places = [(left + (i % cols) * pitch[0], top + (i // cols) * pitch[1]) for i in range(len(pixels))]
    for image, (x, y) in zip(_to_rgb(pixels, limits), places, strict=True):
        canvas[y : y + height, x : x + width] = image.repeat(scale, 0).repeat(scale, 1)
    fig, ax = _pixel_exact_figure(canvas, ax)
    for title, (x, y) in zip(titles or (), places, strict=False):
        for i, line in enumerate(title.split("\n"), 1):  # matplotlib's own line height depends on accents
            ax.text(x, y + height + 1.3 * i * _EM, line, va="baseline", fontsize=FONT_SIZE, color=INK)
    for title, y in zip(row_titles or (), range(top, canvas.shape[0], pitch[1]), strict=False):
        ax.text(left - 0.6 * _EM, y + height / 2, title, va="center", ha="right", fontsize=FONT_SIZE, color=INK)
    for title, x in zip(col_titles or (), range(left, canvas.shape[1], pitch[0]), strict=False):
        ax.text(x + width / 2, top - 0.4 * _EM, title, va="bottom", ha="center", fontsize=FONT_SIZE, color=INK)
    return fig


def _to_grid(
    images: np.ndarray, event_shape: tuple[int, ...], rows: int | None, cols: int | None
) -> tuple[np.ndarray, tuple[int, int]]:
    """(images as [N, H, W, C], (rows, cols) of the grid)."""
    shape = (1, *event_shape) if len(event_shape) == 2 else event_shape
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise UsageError(f"event_shape: expected (C, H, W) with C = 1 or 3, or (H, W), found {event_shape}")
    size = math.prod(shape)
    event_shapes = ((size,), shape, shape[1:] if shape[0] == 1 else shape)
    inner = next((len(k) for k in event_shapes if images.ndim > len(k) and images.shape[-len(k) :] == k), None)
    if inner is None or images.ndim - inner > 2 or not images.size:
        raise UsageError(f"images: expected [N, ...] or [R, C, ...] of event {shape}, found {list(images.shape)}")
    lead = images.shape[:-inner]
    if len(lead) == 2:
        rows, cols = lead
    else:
        cols = cols or (math.ceil(lead[0] / rows) if rows else min(lead[0], 16))
        rows = math.ceil(lead[0] / cols)
    return images.reshape(-1, *shape).transpose(0, 2, 3, 1), (rows, cols)


def _to_rgb(pixels: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Pixels [N, H, W, C] as RGB in [0, 1]."""
    low, high = limits
    scaled = np.clip((pixels.astype(np.float32) - low) / (high - low or 1.0), 0, 1)
    rgb = np.broadcast_to(scaled, (*scaled.shape[:3], 3)).copy()
    missing = np.isnan(rgb).any(-1)
    rgb[missing] = [int(VERMILLION[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    rgb[missing.all((1, 2))] = 1
    return rgb


def _pixel_exact_figure(canvas: np.ndarray, ax: Any) -> tuple[Figure, Any]:
    """(a figure whose pixels are those of the canvas, axes in pixel coordinates), or given axes and their figure."""
    height, width = canvas.shape[:2]
    if ax is None:
        fig = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
        ax, aspect = fig.add_axes((0, 0, 1, 1)), "auto"
    else:
        fig, aspect = ax.figure, "equal"
    ax.imshow(canvas, interpolation="none", aspect=aspect, extent=(0, width, height, 0))
    ax.set_axis_off()
    return fig, ax
