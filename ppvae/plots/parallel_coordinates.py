"""Parallel coordinates: each datum a line over its dims, for data that are not images."""

import math
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ppvae.errors import UsageError
from ppvae.errors.ranges import check_numbers
from ppvae.plots.style import BLUE, INK, ORDERED, array, figure, legend, open_axes, styled


@styled
def parallel_coordinates(panels: Mapping[str, Mapping[str, Any]], *, cols: int = 4, ax: Any = None) -> Figure:
    """Panels of lines over the dims of x, {title: {label: [*event] or [n, *event]}}, with common axes.

    Two labels differ in colour and marker; more labels are a sequence, from dark to bright.
    """
    check_numbers(cols=cols)
    if not panels:
        raise UsageError("panels: expected at least one, found none")
    cols = min(cols, len(panels))
    rows = math.ceil(len(panels) / cols)
    if ax is None:
        fig = figure(min(9.6, 4.4 * cols), 0.5 + 2.0 * rows + (0.6 if rows == 1 else 0))
        axes = list(np.ravel(fig.subplots(rows, cols, sharex=True, sharey=True)))
    else:
        fig, axes = open_axes(ax, 0, 0, len(panels))
    for one, (title, lines) in zip(axes, panels.items(), strict=False):
        one.set_title(title)
        _draw_lines(one, lines)
    for one in axes[len(panels) :]:
        one.set_axis_off()
    for i, one in enumerate(axes[: len(panels)]):
        if i + cols >= len(panels) or ax is not None:
            one.set_xlabel("dim of x")
            one.tick_params(labelbottom=True)
        if i % cols == 0:
            one.set_ylabel("value")
    count = len(axes[0].get_legend_handles_labels()[1])
    if count > 1:
        legend(fig, ax, axes[:1], "outside lower center", ncols=min(count, 10))
    return fig


def _draw_lines(ax: Any, lines: Mapping[str, Any]) -> None:
    count = len(lines)
    for i, (label, values) in enumerate(lines.items()):
        values = np.atleast_1d(array(values))
        values = values.reshape(1, -1) if values.ndim == 1 else values.reshape(len(values), -1)
        color = (INK, BLUE)[i] if count <= 2 else matplotlib.colormaps[ORDERED](0.92 * i / (count - 1))
        dims = values.shape[1]
        many = len(values) > 1
        dots = ("o", "s")[i % 2] if dims <= 30 and not many and count <= 2 else None
        ax.plot(
            range(dims), values.T, color=BLUE if many and count == 1 else color,
            alpha=min(1.0, max(0.08, 12 / len(values))) if many else 1.0, linewidth=0.8 if many else 1.4,
            marker="_" if dims == 1 else dots, markersize=3.2,
        )  # fmt: skip
        ax.lines[-1].set_label(label)
    ax.xaxis.get_major_locator().set_params(integer=True)
