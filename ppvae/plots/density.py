"""Maps of densities over the plane, beside data."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from ppvae.errors import UsageError
from ppvae.errors.ranges import check_numbers
from ppvae.plots.style import GREEN, INK, array, figure, open_axes, styled


def plane(reach: float = 4.0, count: int = 100) -> torch.Tensor:
    """The lattice over [-reach, reach]^2, [count * count, 2], on which `density_maps` takes densities.

    >>> plane(1.0, 2).tolist()
    [[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]]
    """
    check_numbers(reach=reach, count=count)
    line = torch.linspace(-float(reach), float(reach), count)
    return torch.cartesian_prod(line, line).flip(1)


@styled
def density_maps(
    panels: Mapping[str, Any],
    *,
    reach: float = 4.0,
    cols: int = 3,
    marks: Mapping[str, Any] | None = None,
    ax: Any = None,
) -> Figure:
    """Panels over [-reach, reach]^2, {title: log-densities [count^2] at `plane(reach, count)`, or data [N, 2]}.

    All densities share one colour scale, from zero to the smallest maximum among the panels.

    Args:
        marks: {title: points [M, 2]}, drawn as crosses.
    """
    check_numbers(reach=reach, cols=cols)
    reach = float(reach)
    if not panels:
        raise UsageError("panels: expected at least one, found none")
    arrays = {title: array(values).astype(float) for title, values in panels.items()}
    for title, values in arrays.items():
        if values.shape[1:] != (2,) and (values.ndim != 1 or math.isqrt(len(values)) ** 2 != len(values)):
            raise UsageError(f"{title}: expected [count^2] log-densities or data [N, 2], found {list(values.shape)}")
    cols = min(cols, len(arrays))
    rows = math.ceil(len(arrays) / cols)
    if ax is None:
        fig = figure(0.2 + 2.6 * cols, 0.1 + 2.75 * rows)
        axes = list(np.ravel(fig.subplots(rows, cols, sharex=True, sharey=True)))
    else:
        fig, axes = open_axes(ax, 0, 0, len(arrays))
    vmax = min((np.exp(np.nanmax(values)) for values in arrays.values() if values.ndim == 1), default=1.0)
    for ax, (title, values) in zip(axes, arrays.items(), strict=False):
        if values.ndim == 1:
            side = math.isqrt(len(values))
            ax.imshow(
                np.exp(values).reshape(side, side), origin="lower", extent=(-reach, reach) * 2, vmin=0, vmax=vmax,
                cmap="magma_r", interpolation="bilinear",
            )  # fmt: skip
        else:
            ax.scatter(*values.T, s=float(np.clip(4000 / len(values), 1.5, 12)), color=INK, alpha=0.5, linewidths=0)
        if marks is not None and title in marks:
            size = 6 if len(marks[title]) < 50 else 3
            ax.plot(*array(marks[title]).T, "+", color=GREEN, markersize=size, markeredgewidth=size / 5)
        ax.set(title=title, xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
        ax.grid(visible=False)
    for ax in axes[len(arrays) :]:
        ax.set_axis_off()
    return fig
