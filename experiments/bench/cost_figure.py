"""A figure of the cost of a step by batch size, particles and latent size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ppvae.plots.style import BLUE, VERMILLION, decimal_log_ticks, figure, styled

COLOURS = {"hand-written": VERMILLION, "ppvae compiled": BLUE}
NAMES = {"batch": "batch", "particles": "particles (batch 100)", "latent": "size of z"}


@styled
def costs(found: Mapping[str, Mapping[str, Mapping[int, float]]]) -> Any:
    """A panel per axis {axis: {contender: {value: seconds per step}}}; both axes of a panel are logarithmic."""
    fig = figure(3.3 * len(found), 3.1)
    axes = fig.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for ax, (what, lines) in zip(axes, found.items(), strict=True):
        for (who, points), marker in zip(lines.items(), "so", strict=False):
            at, ms = list(points), [1e3 * seconds for seconds in points.values()]
            ax.plot(at, ms, color=COLOURS.get(who), marker=marker, markersize=4, label=who)
        first = next(iter(lines.values()))
        low, high = min(first), max(first)
        ax.plot([low, high], [1.0, high / low], color="#999999", linestyle=":", linewidth=1, label="proportional")
        ax.set(xscale="log", yscale="log", xlabel=NAMES.get(what, what))
        decimal_log_ticks(ax.xaxis)
        decimal_log_ticks(ax.yaxis)
    axes[0].set_ylabel("ms per step")
    axes[0].legend()
    return fig
