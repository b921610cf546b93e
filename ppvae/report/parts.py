"""A part of the report: a picture and one sentence on what to look for, or one sentence on why there is none."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ppvae import plots
from ppvae.data.checks import one_line
from ppvae.errors import PpvaeError
from ppvae.report.subject import LeftOut, Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger("ppvae")


@dataclass(frozen=True)
class Drawn:
    """A figure, what to look for in it, and the numbers that it shows where they were generated."""

    figure: Figure
    caption: str
    values: Tensor | None = None


@dataclass(frozen=True)
class Section:
    """A part of the report: a drawing, or one sentence on why there is none."""

    key: str
    title: str
    drawn: Drawn | None = None
    why: str = ""


def section(key: str, title: str, draw: Callable[[], Drawn]) -> Section:
    """Draws, or says in a sentence what hindered it: a picture must not cost a finished run its report."""
    try:
        return Section(key, title, draw())
    except (LeftOut, PpvaeError) as error:
        return Section(key, title, why=one_line(error, 400))
    except Exception as error:
        log.warning("report: %s could not be drawn (%s: %s)", key, type(error).__name__, one_line(error))
        return Section(key, title, why=f"It could not be drawn ({type(error).__name__}: {one_line(error)}).")


def grid(s: Subject, images: Any, **words: Any) -> Figure:
    """Images as the subject's data are shown."""
    assert s.event is not None
    return plots.image_grid(images, s.event, limits=s.limits, **words)
