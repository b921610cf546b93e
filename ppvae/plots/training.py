"""Training curves."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ppvae.errors import UsageError
from ppvae.plots.style import BLUE, GREEN, INK, ORANGE, caveat, figure, open_axes, styled


@styled
def curves(history: Sequence[Mapping[str, Any]], *, ax: Any = None) -> Figure:
    """Loss and negative ELBO over epochs, and rate and distortion where they were recorded; nats per datum.

    With rate and distortion there are three panels: losses, distortion, rate. rate + distortion = -ELBO (Alemi et al.
    2018, arXiv 1711.00464).
    """
    if not history:
        raise UsageError("history: expected at least one epoch, found none")
    epochs = [m.get("epoch", i) for i, m in enumerate(history, 1)]
    which, words = ("valid", "validation") if any("valid_elbo" in m for m in history) else ("train", "training")
    split = any(f"{which}_rate" in m for m in history)
    if ax is None:
        fig = figure(9.6 if split else 6.4, 3.3)
        grid = fig.add_gridspec(2, 2 if split else 1)
        main = fig.add_subplot(grid[:, 0])
        low_panels = [fig.add_subplot(grid[i, 1], sharex=main) for i in range(2)] if split else []
    else:
        fig, (main, *low_panels) = open_axes(ax, 0, 0, 3 if split else 1)
    series = [("loss (training objective)", _series(history, "loss"), BLUE)]
    elbo = _series(history, f"{which}_elbo")
    if np.isfinite(elbo).any():
        series.append((f"−ELBO ({words} data)", -elbo, INK))
    _lines(main, epochs, series, "nats per datum")
    main.set_xlabel("epoch")
    if split:
        top, low = low_panels
        _lines(top, epochs, [(f"distortion ({words} data)", _series(history, f"{which}_distortion"), ORANGE)], "nats")
        _lines(low, epochs, [(f"rate ({words} data)", _series(history, f"{which}_rate"), GREEN)], "nats")
        low.set_xlabel("epoch")
        if ax is None:
            top.tick_params(labelbottom=False)
            fig.align_ylabels([top, low])
    return fig


def _series(history: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """One metric over epochs, [epochs], NaN where it was not recorded."""
    return np.array([float(m[name]) if m.get(name) is not None else math.nan for m in history])


def _lines(ax: Any, epochs: Sequence[int], series: Sequence[tuple[str, np.ndarray, str]], unit: str) -> None:
    few = len(epochs) < 15
    for label, values, color in series:
        ax.plot(epochs, values, color=color, label=label, marker="o" if few else None, markersize=3.5)
    ax.set_ylabel(unit)
    ax.margins(x=0.02)
    ax.xaxis.get_major_locator().set_params(integer=True)
    if len(epochs) == 1:
        ax.set_xlim(0.5 * epochs[0], 1.5 * epochs[0])
    ax.legend(loc="best")
    _clip_first_epochs(ax, epochs, [v for _, v, _ in series])


def _clip_first_epochs(ax: Any, epochs: Sequence[int], series: Sequence[np.ndarray]) -> None:
    """Fits the y axis to all but the first twentieth of epochs where those lie far outside, with a note."""
    start = len(epochs) // 20
    later = np.concatenate([v[start:] for v in series])
    values = np.concatenate(series)
    if not start or not np.isfinite(later).any():
        return
    low, high = np.nanmin(later[np.isfinite(later)]), np.nanmax(later[np.isfinite(later)])
    margin = 0.06 * (high - low)
    outside = np.isfinite(values) & ((values > high) | (values < low))
    excess = max(np.nanmax(values[outside], initial=high) - high, low - np.nanmin(values[outside], initial=low))
    if high > low and excess > 0.5 * (high - low):
        ax.set_ylim(low - margin, high + margin)
        caveat(ax, f"the first {'epoch' if start == 1 else f'{start} epochs'} beyond the axis")
