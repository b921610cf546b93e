"""Maps of posterior means."""

from collections.abc import Sequence
from typing import Any

import matplotlib.patheffects as effects
import numpy as np
from matplotlib.figure import Figure

from ppvae.errors import UsageError
from ppvae.plots.style import CLASSES, INK, ORDERED, array, caveat, open_axes, styled

MOST_CLASSES = 20


@styled
def latent_map(
    means: Any, labels: Any = None, *, log_px: Any = None, names: Sequence[str] = (), site: str = "z", ax: Any = None
) -> Figure:
    """Posterior means [N, D] in the plane, projected on two principal components where D > 2.

    Args:
        labels: [N]; a colour per class, with its name at the class median (at most 20 classes).
        log_px: [N] nats, the colour without labels.
        names: the names of the labels 0, 1, ...
        site: the latent's name, for the axes.
    """
    points = array(means).astype(float)
    if points.ndim != 2 or not points.size:
        raise UsageError(f"means: expected [N, D], found {list(points.shape)}")
    projected, axis_labels = _project(points, site)
    size = float(np.clip(8000 / len(points), 8, 26))
    fig, (ax,) = open_axes(ax, 7.2, 5.6)
    classes = np.unique(array(labels)) if labels is not None else np.empty(0)
    if 0 < len(classes) <= MOST_CLASSES:
        _scatter_classes(ax, projected, array(labels), classes, names, size)
    elif log_px is not None:
        shown = ax.scatter(*projected.T, c=array(log_px), cmap=ORDERED, s=size, linewidths=0)
        fig.colorbar(shown, ax=ax, label="log p(x) (nats per datum)", shrink=0.8)
    else:
        ax.scatter(*projected.T, s=size, color=CLASSES[0], alpha=0.6, linewidths=0)
    if len(classes) > MOST_CLASSES:
        caveat(ax, f"{len(classes)} classes: too many for colours")
    ax.set_xlabel(axis_labels[0])
    ax.set_ylabel(axis_labels[1])
    if points.shape[1] > 1:
        ax.set_aspect("equal", adjustable="datalim")
    else:
        ax.set_yticks([])
    return fig


def _project(points: np.ndarray, site: str) -> tuple[np.ndarray, tuple[str, str]]:
    """(points [N, 2], axis labels)."""
    if points.shape[1] == 1:
        jitter = np.random.default_rng(0).uniform(size=len(points))
        return np.stack([points[:, 0], jitter], 1), (f"posterior mean of {site}", "random jitter")
    if points.shape[1] == 2:
        return points, (f"posterior mean of {site}[0]", f"posterior mean of {site}[1]")
    centred = points - points.mean(0)
    _, s, v = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(v[:2][[0, 1], np.abs(v[:2]).argmax(1)])
    share = 100 * s[:2] ** 2 / max(float((s**2).sum()), 1e-300)
    first, second = (
        f"principal component {i} of the means of {site} ({p:.0f} % of variance)" for i, p in enumerate(share, 1)
    )
    return centred @ (v[:2] * signs[:, None]).T, (first, second)


def _scatter_classes(
    ax: Any, points: np.ndarray, labels: np.ndarray, classes: np.ndarray, names: Sequence[str], size: float
) -> None:
    halo = [effects.withStroke(linewidth=2.5, foreground="white")]
    for i, c in enumerate(classes):
        members = points[labels == c]
        name = str(names[int(c)]) if 0 <= c < len(names) else str(c)
        marker = "o" if i < len(CLASSES) else "^"
        ax.scatter(
            *members.T, s=size, color=CLASSES[i % len(CLASSES)], marker=marker, alpha=0.8, linewidths=0, label=name
        )
        ax.annotate(
            name, np.median(members, 0), ha="center", va="center", fontsize=10, weight="bold", color=INK,
            path_effects=halo, zorder=5,
        )  # fmt: skip
    ax.legend(title="label", loc="center left", bbox_to_anchor=(1, 0.5), markerscale=1.6, handletextpad=0.2)
