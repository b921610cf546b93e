"""The rate of each latent dim, and rate against distortion."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ppvae.errors import UsageError
from ppvae.evaluation.representation import ACTIVE, Representation
from ppvae.evaluation.results import mean_and_error
from ppvae.plots.style import BLUE, FAINT, INK, ORANGE, SKY, VERMILLION, array, legend, note, number, open_axes, styled

MOST_DIMS = 100


@styled
def kl_per_dim(result: Representation, site: str, *, ax: Any = None) -> Figure:
    """The rate of each dim of a latent, largest first, and the variance of its posterior mean over the data.

    Dims with Var_x(E_q[u | x]) above 0.01 are active (Burda et al. 2016).
    """
    if site not in result.kl:
        raise UsageError(f"site: expected one of {sorted(result.kl)}, found {site!r}")
    kl, error = array(result.kl[site]), array(result.kl_error[site])
    variance = array(result.variance[site]) if site in result.variance else None
    split = variance is not None and len(variance) == len(kl)
    fig, axes = open_axes(ax, 9.6, 3.2, 2, width_ratios=(3, 2))
    order = np.argsort(-kl)[:MOST_DIMS]
    on = variance[order] > ACTIVE if split and variance is not None else np.ones(len(order), dtype=bool)
    place = np.arange(len(order))
    words = {True: "active", False: "not active"} if split else {True: "the whole latent"}
    for which, label in words.items():
        chosen = on == which
        if chosen.any():
            axes[0].bar(place[chosen], kl[order][chosen], 0.8, color=BLUE if which else FAINT, label=label)
    axes[0].errorbar(place, kl[order], yerr=error[order], fmt="none", color=INK, linewidth=0.8)
    axes[0].set_xlabel(f"dim of {site}, largest first")
    axes[0].set_ylabel("KL (nats per datum)")
    axes[0].set_xticks(place if len(place) <= 12 else [], [str(d) for d in order] if len(place) <= 12 else [])
    axes[0].legend()
    note(axes[0], f"sum {number(float(kl.sum()))}" + ("" if len(order) == len(kl) else f"; first {len(order)} shown"))
    if variance is None:
        axes[1].set_axis_off()
        return fig
    shown = np.log10(np.clip(variance, 1e-6, None))
    axes[1].hist(shown, np.linspace(-6, max(1.0, shown.max()), 29), color=BLUE)
    axes[1].axvline(math.log10(ACTIVE), color=VERMILLION, linestyle="--", linewidth=1.2)
    axes[1].set_xticks(range(-6, 2, 2), ["≤ 1e−6", "1e−4", "0.01", "1"])
    axes[1].set_xlabel(r"variance of $\mathrm{E}_q[u\,|\,x]$ over the data")
    axes[1].set_ylabel("number of dims")
    axes[1].yaxis.get_major_locator().set_params(integer=True)
    note(axes[1], f"{int((variance > ACTIVE).sum())} of {len(variance)} active (> {ACTIVE:g})")
    return fig


@styled
def rate_distortion(results: Mapping[str, Representation], *, ax: Any = None) -> Figure:
    """Rate against distortion, a point with standard errors per result, on lines of equal ELBO; nats per datum.

    Where the rate was decomposed, a bar at the bottom spans the bounds of the mutual information.
    """
    if not results:
        raise UsageError("results: expected at least one, found none")
    given = ax
    fig, (ax,) = open_axes(ax, 5.6, 4.2)
    colors = (BLUE, VERMILLION, ORANGE, SKY, FAINT, INK)
    for i, (name, one) in enumerate(results.items()):
        (rate, rate_error), (distortion, error) = mean_and_error(one.rate), mean_and_error(one.distortion)
        color = colors[i % len(colors)]
        ax.errorbar(rate, distortion, xerr=rate_error, yerr=error, color=color, marker="o", markersize=5, capsize=2.5,
                    linestyle="none", label=f"{name}: ELBO {number(-rate - distortion)}")  # fmt: skip
    ax.margins(0.35)
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    left = min(
        left, *(float(o.information_lower.mean()) for o in results.values() if o.information_lower is not None), right
    )
    left = max(0.0, left - 0.08 * (right - left))
    for i, one in enumerate(results.values()):
        mean, color = float(one.rate.mean() + one.distortion.mean()), colors[i % len(colors)]
        ax.plot([left, right], [mean - left, mean - right], color=color, linewidth=0.8, linestyle=":")
        if one.information_lower is not None:
            ends = [float(v.mean()) for v in one.information]
            height = low + (0.04 + 0.04 * i) * (high - low)
            ax.plot(ends, [height] * 2, color=color, linewidth=4, solid_capstyle="butt",
                    label="mutual information" if i == 0 else None)  # fmt: skip
    ax.set_xlim(left, right)
    ax.set_ylim(low, high)
    ax.set_xlabel("rate (nats per datum)")
    ax.set_ylabel("distortion (nats)")
    legend(fig, given, [ax], "outside upper left", ncols=2)
    return fig
