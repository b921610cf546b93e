"""The inference gap and its parts."""

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from ppvae.errors import UsageError
from ppvae.evaluation.local.gaps import Gaps
from ppvae.evaluation.results import mean_and_error
from ppvae.plots.style import BLUE, INK, ORANGE, SKY, legend, number, open_axes, styled


@styled
def gap_bars(results: Mapping[str, Gaps], *, ax: Any = None) -> Figure:
    """A stacked bar of the parts of the inference gap per result, with standard errors over the data; nats per datum.

    Where a richer family was fitted, the approximation gap is split at its ELBO.
    """
    if not results:
        raise UsageError("results: expected at least one, found none")
    given = ax
    fig, (ax,) = open_axes(ax, 7.2, 1.5 + 0.62 * len(results))
    labels: set[str] = set()
    rows = list(results.items())
    for y, (_, one) in enumerate(rows):
        parts = [("amortisation gap", one.amortisation, ORANGE)]
        if one.richer_elbo is None:
            parts.append(("approximation gap", one.approximation, BLUE))
        else:
            parts.append(("approximation gap, closed by the richer family", one.richer_elbo - one.best_elbo, SKY))
            parts.append(("approximation gap, beyond it", one.log_px - one.richer_elbo, BLUE))
        left = 0.0
        for words, values, color in parts:
            mean, _ = mean_and_error(values)
            if not math.isfinite(mean):
                continue
            label = None if words in labels else words
            labels.add(words)
            ax.barh(y, mean, 0.56, left=left, color=color, label=label)
            left += mean
        for height, values in ((-0.12, one.amortisation), (0.12, one.inference)):
            mean, error = mean_and_error(values)
            if math.isfinite(mean) and math.isfinite(error):
                ax.errorbar(mean, y + height, xerr=error, color=INK, capsize=2.5, linewidth=1)
        mean, error = mean_and_error(one.inference)
        words = f" {number(mean, 2)}" + (f" ± {number(error, 2)}" if math.isfinite(error) else "")
        ax.annotate(words, (max(left, 0.0) + (error if error == error else 0), y), (5, 0),
                    textcoords="offset points", va="center", fontsize=8.5)  # fmt: skip
    ax.set_yticks(range(len(rows)), [name for name, _ in rows])
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.margins(x=0.16)
    ax.set_xlim(left=min(0.0, ax.get_xlim()[0] if ax.get_xlim()[0] < -0.2 * ax.get_xlim()[1] else 0.0))
    ax.set_xlabel("log p(x) − ELBO (nats per datum)")
    if given is None:
        legend(fig, given, [ax], "outside upper left", ncols=2)
    elif labels:
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, fontsize=7)
    return fig
