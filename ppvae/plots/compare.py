"""Models compared by log p(x) on the same data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ppvae.evaluation.compare import Comparison
from ppvae.plots.style import BLUE, FAINT, figure, note, number, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def differences(found: Comparison) -> Figure:
    """Each model's mean log p(x) minus the best's, with two standard errors of the difference; nats per datum."""
    fig = figure(7.2, 1.2 + 0.42 * len(found.names))
    ax: Any = fig.add_subplot()
    best = found.names[0]
    for y, name in enumerate(found.names):
        delta, error = found.difference(name, best) if y else (0.0, 0.0)
        if math.isfinite(delta):
            ax.errorbar(delta, y, xerr=2 * error if math.isfinite(error) else 0.0, color=BLUE, marker="o",
                        markersize=4.5, capsize=3)  # fmt: skip
            words = number(delta, 3) if y else f"log p(x) = {number(float(found.log_px[0].mean()))}"
            ax.annotate(words, (delta, y), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    ax.axvline(0, color=FAINT, linewidth=0.8, linestyle="--")
    ax.set_yticks(range(len(found.names)), found.names)
    ax.invert_yaxis()
    ax.margins(0.12, 0.3)
    ax.grid(visible=False, axis="y")
    ax.set_xlabel(f"log p(x) minus that of {best} (nats per datum; bars: two standard errors)")
    note(ax, f"{len(found.warnings)} warning{'s' * (len(found.warnings) > 1)}, see the table" if found.warnings else "")
    return fig
