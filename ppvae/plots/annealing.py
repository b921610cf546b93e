"""Annealed estimates of log p(x): the looseness of importance sampling against them, and the BDMC bracket."""

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ppvae.errors import UsageError, count_of
from ppvae.evaluation.annealing.bdmc import Bracket
from ppvae.evaluation.compare import looseness, looseness_and_error
from ppvae.evaluation.estimate import Estimate
from ppvae.evaluation.evidence.two_sided import TwoSidedBounds
from ppvae.evaluation.results import mean_and_error
from ppvae.plots.estimates import reliability_histogram
from ppvae.plots.style import (
    BLUE,
    INK,
    ORANGE,
    array,
    caveat,
    decimal_log_ticks,
    legend_beside,
    number,
    open_axes,
    styled,
)


@styled
def looseness_curve(tighter: Estimate, est: Estimate, *, ax: Any = None) -> Figure:
    """Mean L_k against k below a tighter estimate for the same data, and a histogram of the difference at K; nats.

    The band is two paired standard errors of the difference. Colours show the reliability of importance sampling.
    """
    ks = sorted(est.bounds)
    if len(ks) < 2:
        raise UsageError(f"est: expected bounds at two k or more, found {ks}")
    pairs = [looseness_and_error(tighter, est, k) for k in ks]
    high = float(tighter.log_px.mean())
    low, error = np.array([high - mean for mean, _ in pairs]), np.array([e for _, e in pairs])
    fig, axes = open_axes(ax, 9.6, 3.6, 2)
    ax = axes[0]
    ax.fill_between(ks, low - 2 * error, low + 2 * error, color=BLUE, alpha=0.15, linewidth=0,
                    label="two standard errors of the difference")  # fmt: skip
    ax.plot(ks, low, color=BLUE, marker="o", markersize=3.5, label="mean $L_k$, importance sampling")
    ax.axhline(high, color=ORANGE, linewidth=1.6, label=f"{tighter.method}, {number(high)}")
    ax.set_xscale("log")
    ax.margins(0.06, 0.14)
    decimal_log_ticks(ax.xaxis)
    ax.set_xlabel("number of particles k")
    ax.set_ylabel(f"log p(x) (nats {'for the whole data set' if est.joint else 'per datum'})")
    ax.legend(loc="lower right")
    gap, reliable = array(looseness(tighter, est)), array(est.reliable)
    shown = np.isfinite(gap)
    reliability_histogram(axes[1], gap[shown], reliable[shown], max_bins=50)
    axes[1].axvline(0, color=INK, linewidth=0.8, linestyle=":")
    mean, error_at = pairs[-1]
    axes[1].axvline(mean, color=INK, linewidth=1.3, label=f"mean {number(mean, 3)} ± {number(error_at, 3)}")
    axes[1].set_xlabel(f"log p(x) by annealing − $L_{{{ks[-1]}}}$ (nats)")
    axes[1].legend()
    caveat(
        axes[1],
        count_of(int((~shown).sum()), "datum that is", "data that are") + " not finite not shown"
        if (~shown).any()
        else "",
    )
    return fig


@styled
def bracket(result: Bracket | TwoSidedBounds, *, ax: Any = None) -> Figure:
    """The gap between the bounds of log p(x) against the lower bound, per datum; nats.

    Bars are two Monte-Carlo standard errors of both bounds; the band is two standard errors of the mean gap.
    """
    gap, lower = array(result.gap), array(result.lower)
    bars = 2 * np.hypot(array(result.lower_std_error), array(result.upper_std_error))
    shown = np.isfinite(gap) & np.isfinite(lower)
    given = ax
    fig, (ax,) = open_axes(ax, 7.2, 3.4)
    ax.errorbar(lower[shown], gap[shown], yerr=np.nan_to_num(bars[shown]), fmt="o", color=BLUE, markersize=3.5,
                linewidth=0.7, alpha=0.7, label="a datum")  # fmt: skip
    mean, error = mean_and_error(result.gap)
    if math.isfinite(mean):
        words = f"mean {number(mean, 3)}" + (f" ± {number(error, 3)}" if math.isfinite(error) else "")
        ax.axhline(mean, color=ORANGE, linewidth=1.6, label=words)
    if math.isfinite(error):
        ax.axhspan(mean - 2 * error, mean + 2 * error, color=ORANGE, alpha=0.2, linewidth=0)
    ax.axhline(0, color=INK, linewidth=0.8, linestyle=":")
    ax.set_xlabel("log p(x) from below (nats)")
    ax.set_ylabel("gap of the bounds (nats)")
    legend_beside(ax, given)
    caveat(
        ax,
        count_of(int((~shown).sum()), "datum that is", "data that are") + " not finite not shown"
        if (~shown).any()
        else "",
    )
    return fig
