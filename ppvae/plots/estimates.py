"""An estimate of log p(x): its distribution over the data, its bounds, and its diagnostics."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ppvae.errors import UsageError, count_of
from ppvae.evaluation.estimate import Estimate
from ppvae.evaluation.reliability import MIN_ESS, format_particles
from ppvae.plots.style import (
    BLUE,
    FAINT,
    INK,
    ORANGE,
    SERIES,
    VERMILLION,
    array,
    caveat,
    decimal_log_ticks,
    legend,
    legend_beside,
    number,
    open_axes,
    styled,
)

Estimates = Estimate | Mapping[str, Estimate]  # one, or several by name


@styled
def log_px_histogram(estimate: Estimates, *, ax: Any = None) -> Figure:
    """Histogram of log p(x) over the data, by reliability, with the means of ELBO and log p(x); nats per datum.

    Of several estimates, {name: estimate}, the outlines of their histograms, and the means of log p(x).
    """
    given = ax
    fig, (ax,) = open_axes(ax, 7.2, 3.4)
    if isinstance(estimate, Estimate):
        log_px, good = array(estimate.log_px), array(estimate.reliable)
        finite = np.isfinite(log_px)
        reliability_histogram(ax, log_px[finite], good[finite], max_bins=60)
        elbo = estimate.elbo
        for values, style, words in ((elbo, ":", "ELBO"), (estimate.log_px, "-", "log p(x)")):
            mean = float(array(values).mean())
            if math.isfinite(mean):
                ax.axvline(mean, color=INK, linestyle=style, linewidth=1.3, label=f"mean {words} = {number(mean)}")
        caveat(ax, _not_shown(int((~finite).sum()), "no finite log p(x)"))
    else:
        _outlines(ax, estimate)
    ax.set_xlabel("log p(x) (nats per datum)")
    if ax.get_legend_handles_labels()[0]:
        legend_beside(ax, given)
    return fig


def _named(estimates: Mapping[str, Estimate]) -> list[tuple[str, Estimate, str]]:
    """(name, estimate, colour) of several estimates; raises UsageError for none."""
    if not estimates:
        raise UsageError("estimate: expected one estimate or more, found none")
    return [(name, one, SERIES[i % len(SERIES)]) for i, (name, one) in enumerate(estimates.items())]


def _outlines(ax: Any, estimates: Mapping[str, Estimate]) -> None:
    """Adds the outline of each histogram of log p(x), all in the same bins."""
    named = _named(estimates)
    values = {name: array(one.log_px) for name, one, _ in named}
    finite = {name: v[np.isfinite(v)] for name, v in values.items()}
    together = np.concatenate(list(finite.values()))
    edges = np.histogram_bin_edges(together, bins=min(60, max(10, round(2 * math.sqrt(len(together) / len(named))))))
    for name, _, color in named:
        mean = float(finite[name].mean()) if len(finite[name]) else math.nan
        label = f"{name}, mean {number(mean)}"
        ax.hist(finite[name], edges, histtype="stepfilled", color=color, alpha=0.12)
        ax.hist(finite[name], edges, histtype="step", color=color, linewidth=1.4, label=label)
        if math.isfinite(mean):
            ax.axvline(mean, color=color, linewidth=1.2, linestyle="--")
        caveat(ax, _not_shown(len(values[name]) - len(finite[name]), f"no finite log p(x) of {name}"))
    ax.set_ylabel("number of data")
    ax.yaxis.get_major_locator().set_params(integer=True)


def reliability_histogram(ax: Any, values: np.ndarray, reliable: np.ndarray, max_bins: int) -> None:
    """Adds a stacked histogram of finite values [N], with reliable and unreliable data in their own colours."""
    if len(values):
        edges = np.histogram_bin_edges(values, bins=min(max_bins, max(10, round(2 * math.sqrt(len(values))))))
        groups = [(values[reliable], BLUE, "reliable"), (values[~reliable], VERMILLION, "not reliable")]
        groups = [group for group in groups if len(group[0])]
        ax.hist(
            [g[0] for g in groups], edges, stacked=True, color=[g[1] for g in groups], edgecolor="white",
            linewidth=0.4, label=[f"{g[2]} ({len(g[0])})" for g in groups],
        )  # fmt: skip
    ax.set_ylabel("number of data")
    ax.yaxis.get_major_locator().set_params(integer=True)


@styled
def bound_curve(estimate: Estimates, *, ax: Any = None) -> Figure:
    """Mean L_k against k, with the standard error over the data as a band; nats per datum.

    L_k of refined proposals lies above that of the guide, which is drawn beside it where it is known. Several
    estimates, {name: estimate}, have a curve each. Data with a non-finite L_k are left out at every k.
    """
    single = isinstance(estimate, Estimate)
    named = [("", estimate, BLUE)] if isinstance(estimate, Estimate) else _named(estimate)
    fig, (ax,) = open_axes(ax, 7.2, 3.4)
    for name, one, color in named:
        _add_bound_curve(ax, one, color, name)
    ax.set_xscale("log")
    ax.margins(0.06, 0.12)
    decimal_log_ticks(ax.xaxis)
    ax.set_xlabel("number of particles k")
    ax.set_ylabel(f"$L_k$ (nats {'for the whole data set' if named[0][1].joint else 'per datum'})")
    ax.legend(loc="lower right" if single else "best")
    return fig


def _add_bound_curve(ax: Any, estimate: Estimate, color: str, name: str) -> None:
    """Adds a curve, its band and, for a single estimate without a name, the ELBO and the curve of the guide."""
    where = f"{name}: " if name else ""
    if len(estimate.bounds) < 2:
        raise UsageError(f"{where}estimate: expected bounds at two k or more, found {sorted(estimate.bounds)}")
    ks = sorted(estimate.bounds)
    curve = np.stack([array(estimate.bounds[k]) for k in ks])
    finite = np.isfinite(curve).all(0) & np.isfinite(array(estimate.elbo))
    if not finite.any():
        raise UsageError(f"{where}estimate: expected finite bounds for at least one datum, found none")
    curve, elbo = curve[:, finite], float(array(estimate.elbo)[finite].mean())
    mean = curve.mean(1)
    if finite.sum() > 1:
        error = curve.std(1, ddof=1) / math.sqrt(finite.sum())
        words = None if name else "± standard error over the data"
        ax.fill_between(ks, mean - error, mean + error, color=color, alpha=0.15, linewidth=0, label=words)
    ax.plot(ks, mean, color=color, marker="o", markersize=3.5, label=name or "mean $L_k$")
    ax.annotate(
        number(mean[-1]), (ks[-1], mean[-1]), (0, 7), textcoords="offset points", ha="center", color=color, fontsize=8.5
    )
    if not name:
        ax.plot([1], [elbo], "D", color=INK, markersize=6, fillstyle="none", label=f"ELBO = {number(elbo)}")
    if not name and (guide := estimate.guide_estimate) is not None and len(guide.bounds) > 1:
        of_guide = [float(array(guide.bounds[k])[finite].mean()) for k in sorted(guide.bounds)]
        ax.plot(sorted(guide.bounds), of_guide, color=ORANGE, marker="s", markersize=3, label="mean $L_k$ of the guide")
    caveat(ax, where + _not_shown(int((~finite).sum()), "a bound that is not finite") if not finite.all() else "")


@styled
def diagnosis(estimate: Estimates, *, ax: Any = None) -> Figure:
    """Effective sample size and log p(x) against k_hat, per datum, with the limits of either shaded; two panels.

    Colours show the reliability, which a limit of k_hat from all data decides: single data beyond may be reliable. Of
    several estimates, {name: estimate}, colours show which, and crosses the data that are not reliable.

    A k_hat of -inf (equal weights) is drawn at the left edge, +inf at the right edge; NaN is not shown.
    """
    named = [("", estimate, BLUE)] if isinstance(estimate, Estimate) else _named(estimate)
    fig, axes = open_axes(ax, 9.6, 3.8, 2, sharex=True)
    together = np.concatenate([array(one.k_hat) for _, one, _ in named])
    left, right = _k_hat_edges(together)
    limits = {one.k_hat_limit for _, one, _ in named}
    limit = limits.pop() if len(limits) == 1 else -math.inf
    for name, one, color in named:
        x, good = _k_hat_positions(array(one.k_hat), left, right), array(one.reliable)
        for i, values in enumerate((array(one.ess), array(one.log_px))):
            shown = np.isfinite(x) & np.isfinite(values) & ((values > 0) if i == 0 else True)
            for chosen, mark, words in ((shown & ~good, "X", "not reliable"), (shown & good, "o", "reliable")):
                shade = color if name or mark == "o" else VERMILLION
                _scatter(axes[i], x, values, chosen, shade, mark, f"{name}, {words}" if name else words)
            caveat(axes[i], _not_shown(int((~shown).sum()), "no finite value"))
    for one_ax, words in ((axes[0], _ess_label(named)), (axes[1], "log p(x) (nats per datum)")):
        one_ax.set_xlabel(r"Pareto shape $\hat{k}$")
        one_ax.set_ylabel(words)
        if math.isfinite(limit):
            one_ax.axvline(limit, color=FAINT, linestyle="--", linewidth=1)
    _infinity_ticks(axes[0], together, left, right)
    axes[0].set_yscale("log")
    axes[0].axhline(MIN_ESS, color=FAINT, linestyle="--", linewidth=1)
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(min(low, 0.6 * MIN_ESS), max(high, 1.2 * max(one.num_particles for _, one, _ in named)))
    decimal_log_ticks(axes[0].yaxis)
    if math.isfinite(limit):
        _shade_limits(axes[0], limit)
    legend(fig, ax, axes, "outside upper right", ncols=2)
    return fig


def _ess_label(named: Sequence[tuple[str, Estimate, str]]) -> str:
    particles = {format_particles(one.particles) for _, one, _ in named}
    return "effective sample size, ESS" + (f" (of K = {particles.pop()})" if len(particles) == 1 else "")


def _k_hat_edges(k_hat: np.ndarray) -> tuple[float, float]:
    """The x positions of -inf and +inf, beyond all finite values."""
    finite = k_hat[np.isfinite(k_hat)]
    low, high = (min(finite.min(), 0.0), max(finite.max(), 0.8)) if len(finite) else (0.0, 0.8)
    return low - 0.12 * (high - low), high + 0.12 * (high - low)


def _k_hat_positions(k_hat: np.ndarray, left: float, right: float) -> np.ndarray:
    """The x position of each k_hat."""
    return np.where(np.isneginf(k_hat), left, np.where(np.isposinf(k_hat), right, k_hat))


def _scatter(ax: Any, x: np.ndarray, y: np.ndarray, shown: np.ndarray, color: str, marker: str, label: str) -> None:
    if shown.any():
        size = float(np.clip(4000 / len(x), 5, 22)) * (1.6 if marker == "X" else 1)
        alpha = float(np.clip(1500 / len(x), 0.2, 0.6))
        ax.scatter(x[shown], y[shown], s=size, color=color, marker=marker, alpha=alpha, linewidths=0, label=label)


def _infinity_ticks(ax: Any, k_hat: np.ndarray, left: float, right: float) -> None:
    """Adds ticks for infinite k_hat, where there is any."""
    ticks = [t for t in ax.get_xticks() if left + 1e-9 < t < right - 1e-9]
    labels = [f"{t:g}".replace("-", "−") for t in np.round(ticks, 6)]
    if np.isneginf(k_hat).any():
        ticks, labels = [left, *ticks], ["−∞", *labels]
    if np.isposinf(k_hat).any():
        ticks, labels = [*ticks, right], [*labels, "∞"]
    span = right - left
    ax.set_xticks(ticks, labels)
    ax.set_xlim(left - 0.05 * span, right + 0.05 * span)


def _shade_limits(ax: Any, limit: float) -> None:
    (left, _), (_, high) = ax.get_xlim(), ax.get_ylim()
    ax.add_patch(
        Rectangle((left, MIN_ESS), limit - left, high - MIN_ESS, color=BLUE, alpha=0.06, linewidth=0, zorder=0)
    )
    ax.set_title(rf"shaded: $\hat{{k}}$ < {limit:.2f} and ESS ≥ {MIN_ESS:g}", fontsize=8, color=FAINT)


def _not_shown(count: int, what: str) -> str:
    return f"{count_of(count)} with {what} not shown" if count else ""
