"""Statistics of replicated data beside those of the data."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ppvae.errors import UsageError
from ppvae.evaluation.predictive.result import PredictiveCheck
from ppvae.plots.style import BLUE, FAINT, INK, ORANGE, array, note, open_axes, styled

BINS = 24
BAND = (5, 95)  # percentiles of replicated histograms


@styled
def predictive_checks(result: PredictiveCheck, statistic: str, *, ax: Any = None) -> Figure:
    """A statistic of the data and of replicates: its histogram over the data, and its mean over the set.

    Left, the histogram of the data over the middle 90 % of histograms of data sets from the prior. Right, the values
    over the set of data sets replicated from the prior, and from the posteriors of the data, with that of the data.
    """
    if statistic not in result.observed:
        raise UsageError(f"statistic: expected one of {sorted(result.observed)}, found {statistic!r}")
    observed, prior = array(result.observed[statistic]), array(result.prior[statistic])
    fig, axes = open_axes(ax, 9.6, 3.2, 2, width_ratios=(3, 2))
    low, high = np.quantile(prior, (0.001, 0.999))
    edges = np.linspace(min(low, observed.min()), max(high, observed.max()) + 1e-9, BINS + 1)
    counts = np.stack([np.histogram(row, edges)[0] for row in prior])
    band = np.percentile(counts, BAND, axis=0)
    axes[0].stairs(band[1], edges, baseline=band[0], fill=True, color="#cfd8e3", label="90 % of data sets of the model")
    axes[0].stairs(np.median(counts, 0), edges, color=FAINT, linewidth=0.9)
    axes[0].stairs(np.histogram(observed, edges)[0], edges, color=BLUE, linewidth=1.6, label="data")
    axes[0].set_xlabel(statistic)
    axes[0].set_ylabel("number of data")
    axes[0].legend(loc="best")
    note(axes[0], f"p = {float(result.uniformity[statistic]):.2g} of uniform p-values")
    key = next(name for name in result.set_observed if name.startswith(f"{statistic}, "))
    _over_the_set(axes[1], result, key)
    return fig


def _over_the_set(ax: Any, result: PredictiveCheck, key: str) -> None:
    prior, posterior = array(result.set_prior[key]), array(result.set_posterior[key])
    observed = float(result.set_observed[key])
    values = np.concatenate([prior, posterior, [observed]])
    edges = np.linspace(values.min(), values.max() + 1e-9, BINS + 1)
    for replicated, color, words in ((prior, FAINT, "from the prior"), (posterior, ORANGE, "from posteriors")):
        ax.hist(replicated, edges, density=True, histtype="step", color=color, linewidth=1.4, label=words)
    ax.axvline(observed, color=INK, linewidth=1.4, label="data")
    ax.set_xlabel(key)
    ax.set_yticks([])
    ax.legend(loc="best")
    note(ax, f"p = {float(result.set_prior_p[key]):.3f} from the prior")
