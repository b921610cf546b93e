"""Ranks of simulation-based calibration."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ppvae.errors import UsageError, count_of
from ppvae.evaluation.calibration import Calibration, band, bounds, pointwise_p_values
from ppvae.plots.style import BLUE, FAINT, INK, VERMILLION, array, note, open_axes, styled

MAX_LABELS = 4  # dims in the legend
MAX_BARS = 20
BAND_COLOR = "#dddddd"


@styled
def calibration_ranks(result: Calibration, site: str, *, ax: Any = None) -> Figure:
    """Ranks of a latent's dims: their ECDF minus the uniform CDF, and the histogram of the worst dim.

    A dim departs from uniformity where its line leaves the grey band, which contains all dims of an exact guide jointly
    with probability 1 - alpha. A line above zero has too many low ranks: the guide's draws are too high. A line that
    rises and then falls below zero has too many ranks at both ends: the draws are too narrow.
    """
    if site not in result.ranks:
        raise UsageError(f"site: expected one of {sorted(result.ranks)}, found {site!r}")
    ranks, p_values = array(result.ranks[site]), array(result.p_values[site])
    count, bins = len(ranks), result.num_draws + 1
    table = pointwise_p_values(count, bins)
    low, high = (array(b) / count for b in band(result.level, count, bins, table))
    edges = np.arange(1, bins) / bins
    fig, axes = open_axes(ax, 9.6, 3.4, 2, width_ratios=(3, 2))
    axes[0].fill_between(
        edges, low - edges, high - edges, color=BAND_COLOR, linewidth=0, step="mid" if bins < 20 else None
    )
    order = np.argsort(p_values)
    for i in order[::-1]:
        counts = np.bincount(ranks[:, i], minlength=bins).cumsum()[:-1] / count
        failed, labelled = p_values[i] < result.level, i in order[:MAX_LABELS]
        words = f"{site}[{i}]: {result.verdict(site, int(i))}" if failed and labelled else None
        color, width = (VERMILLION, 1.4) if failed else (BLUE, 0.8)
        axes[0].plot(edges, counts - edges, color=color, linewidth=width, alpha=1.0 if failed else 0.6, label=words)
    axes[0].axhline(0, color=INK, linewidth=0.7)
    axes[0].set_xlim(0, 1)
    axes[0].set_xlabel("rank of the simulated value among the guide's draws (as a share)")
    axes[0].set_ylabel("ECDF − uniform")
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(loc="best")
    failed = int((p_values < result.level).sum())
    note(
        axes[0],
        f"{failed} of {count_of(len(p_values), 'dim')} depart{'s' * (failed == 1)} "
        f"(band: {100 * (1 - result.alpha):g} % for all dims together)",
    )
    _histogram(axes[1], ranks[:, order[0]], result, f"{site}[{order[0]}]", float(p_values[order[0]]))
    return fig


def _histogram(ax: Any, ranks: np.ndarray, result: Calibration, words: str, p_value: float) -> None:
    """Histogram of the ranks of one dim, with the band that contains each single bar with probability 0.99."""
    count, bins = len(ranks), result.num_draws + 1
    bars = min(MAX_BARS, bins)
    jitter = np.random.default_rng(0).uniform(size=count)  # within a rank, so that bars need not divide the ranks
    heights, edges = np.histogram((ranks + jitter) / bins, np.linspace(0, 1, bars + 1))
    limits = [int(b[0]) for b in bounds(0.01, pointwise_p_values(count, bars))]
    ax.axhspan(*limits, color=BAND_COLOR, linewidth=0)
    ax.axhline(count / bars, color=FAINT, linewidth=0.8)
    ax.bar(edges[:-1], heights, 1 / bars, align="edge", color=VERMILLION if p_value < result.level else BLUE,
           edgecolor="white", linewidth=0.4)  # fmt: skip
    ax.set_xlim(0, 1)
    ax.set_xlabel(f"rank of {words}, the worst (as a share)")
    ax.set_ylabel("number of replications")
    note(ax, f"p = {p_value:.2g}")
