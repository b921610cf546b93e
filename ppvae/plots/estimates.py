"""What an estimate of log p(x) says, and how far it can be trusted."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ppvae.errors import UsageError
from ppvae.evaluation.estimate import Estimate
from ppvae.evaluation.reliability import MIN_ESS, format_particles
from ppvae.plots.style import BLUE, FAINT, INK, VERMILLION, array, figure, note, number, plain, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def log_px_histogram(estimate: Estimate) -> Figure:
    """How log p(x) is distributed over the data, unreliable data apart, with the means of ELBO and log p(x); nats."""
    log_px, good = array(estimate.log_px), array(estimate.reliable)
    finite = np.isfinite(log_px)
    fig = figure(7.2, 3.4)
    ax: Any = fig.add_subplot()
    if finite.any():
        edges = np.histogram_bin_edges(log_px[finite], bins=min(60, max(10, round(2 * math.sqrt(finite.sum())))))
        parts = [(log_px[finite & good], BLUE, "reliable"), (log_px[finite & ~good], VERMILLION, "not to be trusted")]
        parts = [part for part in parts if len(part[0])]
        ax.hist(
            [p[0] for p in parts], edges, stacked=True, color=[p[1] for p in parts], edgecolor="white", linewidth=0.4,
            label=[f"{p[2]} ({len(p[0])})" for p in parts],
        )  # fmt: skip
    for values, style, words in ((estimate.elbo, ":", "ELBO"), (estimate.log_px, "-", "log p(x)")):
        mean = float(array(values).mean())
        if math.isfinite(mean):
            ax.axvline(mean, color=INK, linestyle=style, linewidth=1.3, label=f"mean {words} = {number(mean)}")
    ax.set_xlabel("log p(x) (nats per datum)")
    ax.set_ylabel("number of data")
    ax.yaxis.get_major_locator().set_params(integer=True)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    note(ax, _missing(int((~finite).sum()), "no finite log p(x)"))
    return fig


@styled
def bound_curve(estimate: Estimate) -> Figure:
    """Mean L_k over the data against k, with the standard error over the data as a band; nats per datum.

    Data with an L_k that is not finite are left out at every k, and counted.
    """
    if len(estimate.bounds) < 2:
        raise UsageError(f"estimate: expected bounds at two k or more, found {sorted(estimate.bounds)}")
    ks = sorted(estimate.bounds)
    curve = np.stack([array(estimate.bounds[k]) for k in ks])
    kept = np.isfinite(curve).all(0) & np.isfinite(array(estimate.elbo))
    if not kept.any():
        raise UsageError("estimate: expected finite bounds for one datum at least, found none")
    curve, elbo = curve[:, kept], float(array(estimate.elbo)[kept].mean())
    mean = curve.mean(1)
    fig = figure(7.2, 3.4)
    ax: Any = fig.add_subplot()
    if kept.sum() > 1:
        error = curve.std(1, ddof=1) / math.sqrt(kept.sum())
        words = "± standard error over the data"
        ax.fill_between(ks, mean - error, mean + error, color=BLUE, alpha=0.15, linewidth=0, label=words)
    ax.plot(ks, mean, color=BLUE, marker="o", markersize=3.5, label="mean $L_k$")
    ax.plot([1], [elbo], "D", color=INK, markersize=6, fillstyle="none", label=f"ELBO = {number(elbo)}")
    ax.annotate(
        number(mean[-1]), (ks[-1], mean[-1]), (0, 7), textcoords="offset points", ha="center", color=BLUE, fontsize=8.5
    )
    ax.set_xscale("log")
    ax.margins(0.06, 0.12)
    plain(ax.xaxis)
    ax.set_xlabel("number of particles k")
    ax.set_ylabel(f"bound $L_k$ (nats {'for the whole data set' if estimate.joint else 'per datum'})")
    ax.legend(loc="lower right")
    note(ax, _missing(int((~kept).sum()), "a bound that is not finite"))
    return fig


@styled
def diagnosis(estimate: Estimate) -> Figure:
    """Per datum, k_hat against the effective sample size and against log p(x), with what counts as reliable shaded.

    A k_hat of -inf (equal weights, nothing to fit) is shown at the left edge, +inf at the right; NaN is counted.
    """
    k_hat, good = array(estimate.k_hat), array(estimate.reliable)
    at, left, right = _placed(k_hat)
    limit = estimate.k_hat_limit
    ess, log_px = array(estimate.ess), array(estimate.log_px)
    fig = figure(9.6, 3.8)
    axes: Any = fig.subplots(1, 2, sharex=True)
    for ax, values, words in (
        (axes[0], ess, f"effective sample size, ESS (of K = {format_particles(estimate.particles)})"),
        (axes[1], log_px, "log p(x) (nats per datum)"),
    ):
        shown = np.isfinite(at) & np.isfinite(values) & ((values > 0) if ax is axes[0] else True)
        _points(ax, at, values, shown & ~good, VERMILLION, "X", "not to be trusted")
        _points(ax, at, values, shown & good, BLUE, "o", "reliable")
        ax.set_xlabel(r"Pareto shape $\hat{k}$")
        ax.set_ylabel(words)
        if math.isfinite(limit):
            ax.axvline(limit, color=FAINT, linestyle="--", linewidth=1)
        note(ax, _missing(int((~shown).sum()), "no finite value"))
    _edges(axes[0], k_hat, left, right)
    axes[0].set_yscale("log")
    axes[0].axhline(MIN_ESS, color=FAINT, linestyle="--", linewidth=1)
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(min(low, 0.6 * MIN_ESS), max(high, 1.2 * estimate.num_particles))
    plain(axes[0].yaxis)
    if math.isfinite(limit):
        _shade(axes[0], limit)
    fig.legend(*_legend(axes), loc="outside upper right", ncols=2)
    return fig


def _placed(k_hat: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Where to draw each k_hat, and the places of -inf and +inf."""
    finite = k_hat[np.isfinite(k_hat)]
    low, high = (min(finite.min(), 0.0), max(finite.max(), 0.8)) if len(finite) else (0.0, 0.8)
    left, right = low - 0.12 * (high - low), high + 0.12 * (high - low)
    return np.where(np.isneginf(k_hat), left, np.where(np.isposinf(k_hat), right, k_hat)), left, right


def _points(ax: Any, x: np.ndarray, y: np.ndarray, which: np.ndarray, color: str, marker: str, words: str) -> None:
    if which.any():
        size = float(np.clip(4000 / len(x), 5, 22)) * (1.6 if marker == "X" else 1)
        alpha = float(np.clip(1500 / len(x), 0.2, 0.6))
        ax.scatter(x[which], y[which], s=size, color=color, marker=marker, alpha=alpha, linewidths=0, label=words)


def _edges(ax: Any, k_hat: np.ndarray, left: float, right: float) -> None:
    """Ticks for what is infinite, where there is any."""
    ticks = [t for t in ax.get_xticks() if left + 1e-9 < t < right - 1e-9]
    labels = [f"{t:g}".replace("-", "−") for t in np.round(ticks, 6)]
    if np.isneginf(k_hat).any():
        ticks, labels = [left, *ticks], ["−∞", *labels]
    if np.isposinf(k_hat).any():
        ticks, labels = [*ticks, right], [*labels, "∞"]
    span = right - left
    ax.set_xticks(ticks, labels)
    ax.set_xlim(left - 0.05 * span, right + 0.05 * span)


def _shade(ax: Any, limit: float) -> None:
    from matplotlib.patches import Rectangle

    (left, _), (_, high) = ax.get_xlim(), ax.get_ylim()
    place = (left, MIN_ESS), limit - left, high - MIN_ESS
    ax.add_patch(Rectangle(*place, color=BLUE, alpha=0.06, linewidth=0, zorder=0))
    ax.set_title(rf"shaded: reliable, $\hat{{k}}$ < {limit:.2f} and ESS ≥ {MIN_ESS:g}", fontsize=8, color=FAINT)


def _legend(axes: Any) -> tuple[list[Any], list[str]]:
    found = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    return list(found.values()), list(found)


def _missing(count: int, what: str) -> str:
    return f"{count} {'datum' if count == 1 else 'data'} with {what} not shown" if count else ""
