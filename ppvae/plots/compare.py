"""Differences of models in log p(x) on the same data."""

import math
from typing import Any

from matplotlib.figure import Figure

from ppvae.evaluation.compare import Comparison
from ppvae.plots.style import BLUE, FAINT, caveat, number, open_axes, styled

MAX_NAME = 15  # letters of a name that stands in the line of a title
BEHIND = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}


@styled
def differences(result: Comparison, *, ax: Any = None) -> Figure:
    """Mean log p(x) of each model minus that of the best, with two standard errors of the difference; nats."""
    fig, (ax,) = open_axes(ax, 7.2, 1.2 + 0.42 * len(result.names))
    best, shown = result.names[0], []
    for y, name in enumerate(result.names):
        delta, error = result.difference(name, best) if y else (0.0, 0.0)
        if math.isfinite(delta):
            ax.errorbar(delta, y, xerr=2 * error if math.isfinite(error) else 0.0, color=BLUE, marker="o",
                        markersize=4.5, capsize=3)  # fmt: skip
            words = number(delta, 3) if y else f"log p(x) = {number(float(result.log_px[0].mean()))}"
            shown.append((delta, y, words))
    ax.axvline(0, color=FAINT, linewidth=0.8, linestyle="--")
    ax.set_yticks(range(len(result.names)), result.names)
    ax.invert_yaxis()
    ax.margins(0.12, 0.3)
    ax.grid(visible=False, axis="y")
    middle = sum(ax.get_xlim()) / 2
    for delta, y, words in shown:  # towards the middle, so that the text stays in narrow axes
        ax.annotate(words, (delta, y), (0, 6), textcoords="offset points", fontsize=8,
                    ha="right" if delta > middle else "left", bbox=BEHIND)  # fmt: skip
    ax.set_title(f"log p(x) minus that of{' ' if len(best) <= MAX_NAME else chr(10)}{best}", loc="center")
    ax.set_xlabel("nats per datum, ± two standard errors")
    count = len(result.warnings)
    caveat(ax, f"{count} warning{'s' * (count > 1)}, see the table" if count else "")
    return fig
