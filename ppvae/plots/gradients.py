"""The noise of gradient estimators."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ppvae.evaluation.gradient_audit.result import GradientAudit
from ppvae.plots.style import FAINT, INK, SERIES, array, legend, open_axes, styled


@styled
def gradient_noise(result: GradientAudit, *, ax: Any = None) -> Figure:
    """The variance of each gradient estimator by site, and its variance times the time of a step.

    Left, the variance of the gradient of one step, summed over the parameters of a site; a ring for an estimator that
    is biased against enumeration. Right, the same times the CPU time of a step, relative to the smallest of the site:
    averaged over steps, estimators of the same number there have the same noise after the same time.
    """
    given, count = ax, len(result.estimators)
    fig, axes = open_axes(ax, 9.6, 1.2 + 0.32 * count, 2, sharey=True)
    rows = np.arange(count)
    for i, (site, variance) in enumerate(result.variance.items()):
        color = SERIES[i % len(SERIES)]
        cost = array(variance * result.seconds)
        positive = cost[cost > 0]
        axes[0].plot(array(variance), rows, "o", color=color, label=site)
        biased = array(result.biased[site])
        axes[0].plot(array(variance)[biased], rows[biased], "o", ms=11, mfc="none", mec=INK)
        axes[1].plot(cost / (positive.min() if len(positive) else 1.0), rows, "o", color=color)
    for one in axes:
        one.set_xscale("symlog" if any(float(v.max()) == 0 for v in result.variance.values()) else "log")
        one.set_yticks(rows, result.estimators)
        one.set_ylim(count - 0.5, -0.5)
    axes[1].axvline(1.0, color=FAINT, linewidth=0.8)
    axes[0].set_xlabel("variance of the gradient, per datum")
    axes[1].set_xlabel("variance × time, relative to the smallest")
    legend(fig, given, axes, "outside upper left", ncols=len(result.variance))
    return fig
