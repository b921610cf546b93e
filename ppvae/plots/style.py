"""The common style of all figures: a colour-blind safe palette, fonts, sizes, and number formats."""

import functools
import io
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ppvae.errors import UsageError

P = ParamSpec("P")

DPI = 200  # a page shows 100 pixels per inch, so that text is sharp on high-density screens

# Okabe and Ito 2008, Color universal design
BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7"
INK, FAINT = "#222222", "#767676"
# Tol 2021, Colour schemes (muted), with a darker grey
CLASSES = (
    "#332288", "#DDCC77", "#88CCEE", "#CC6677", "#117733", "#AA4499", "#44AA99", "#882255", "#999933", "#777777",
)  # fmt: skip
ORDERED = "viridis"
SERIES = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY)  # results beside each other

log = logging.getLogger("ppvae")

_RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#888888",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": "#888888",
    "ytick.color": "#888888",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """A drawing function under the library's style, whose figure a notebook displays; matplotlib's settings stay."""

    @functools.wraps(draw)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(_RC):
            fig = draw(*args, **kwargs)
        if kwargs.get("ax") is not None:
            return fig
        vars(fig)["_repr_png_"] = functools.partial(to_png, fig)  # notebooks display figures only with pyplot loaded
        return fig

    return wrapped


def figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches, with constrained layout."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def open_axes(ax: Any, width: float, height: float, count: int = 1, **layout: Any) -> tuple[Figure, list[Any]]:
    """The given axes with their figure, or `count` axes in a row of a new figure of a size in inches.

    Raises UsageError for another number of axes.
    """
    if ax is None:
        fig = figure(width, height)
        return fig, list(np.ravel(fig.subplots(1, count, **layout)))
    axes = list(np.ravel(ax))
    if len(axes) != count:
        raise UsageError(f"ax: expected {count} axes, one for each panel, found {len(axes)}")
    return axes[0].figure, axes


def legend(fig: Figure, ax: Any, axes: Sequence[Any], loc: str, **options: Any) -> None:
    """One legend of the entries of all axes: outside a figure of our own, in the first axes where `ax` was given."""
    entries = {label: handle for one in axes for handle, label in zip(*one.get_legend_handles_labels(), strict=True)}
    if not entries:
        return
    if ax is None:
        fig.legend(entries.values(), entries, loc=loc, **options)
    else:
        axes[0].legend(entries.values(), entries)


def legend_beside(ax: Any, given: Any) -> None:
    """The legend of axes: to their right in a figure of our own; inside them where `ax` was given."""
    if given is None:
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    else:
        ax.legend(fontsize=7)


def to_png(fig: Figure) -> bytes:
    """The figure as PNG bytes, without metadata that varies."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(_RC):
        fig.savefig(buffer, format="png", dpi=fig.dpi, metadata={"Software": None})
    return buffer.getvalue()


def array(values: Any) -> np.ndarray:
    """A tensor of any device, or array-like values, as a numpy array."""
    if isinstance(values, torch.Tensor):
        values = values.detach().as_subclass(torch.Tensor).cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values
    return np.asarray(values)


def number(value: float, digits: int = 2) -> str:
    """A number as text, with a typographic minus sign; "none" for NaN.

    >>> number(-1.25, 1), number(float("-inf"))
    ('−1.2', '−∞')
    """
    if math.isnan(value):
        return "none"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.{digits}f}".replace("-", "−")


def decimal_log_ticks(axis: Any) -> None:
    """Decimal tick labels on a logarithmic axis: 1, 10, 100, and multiples of 2 and 5 over a short range."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 2000 * low else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def caveat(ax: Any, text: str) -> None:
    """A warning about a figure, which goes to `notes` (and, as information, to the log), and not into the figure."""
    if text:
        vars(ax.figure).setdefault("ppvae_notes", []).append(text)
        log.info("ppvae: plot: %s", text)


def notes(fig: Figure) -> list[str]:
    """What a caption has to say about a figure: what is not shown, and why a ranking is doubtful.

    >>> from ppvae import plots
    >>> plots.notes(plots.curves([{"epoch": 1, "loss": 2.0}]))
    []
    """
    return list(vars(fig).get("ppvae_notes", []))


def note(ax: Any, text: str) -> None:
    """Text above the upper right corner of the axes."""
    if text:
        ax.annotate(
            text, (1, 1), (0, 3), xycoords="axes fraction", textcoords="offset points", ha="right", va="bottom",
            fontsize=8, color=FAINT,
        )  # fmt: skip
