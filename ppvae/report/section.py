"""A section of the report: a figure with a caption, or the reason why it is not available."""

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from ppvae import plots
from ppvae.data.checks import one_line
from ppvae.errors import PpvaeError
from ppvae.report.run_data import RunData, SectionUnavailable

logger = logging.getLogger("ppvae")
MAX_SITES = 3  # latents that have a section each


@dataclass(frozen=True)
class CaptionedFigure:
    """A figure, its caption, and the generated values that it shows, if any."""

    figure: Figure
    caption: str
    values: Tensor | None = None

    @property
    def full_caption(self) -> str:
        """The caption, and what the figure leaves out."""
        return " ".join([self.caption, *(as_sentence(text) for text in plots.notes(self.figure))])


@dataclass(frozen=True)
class Section:
    """A section of the report: a figure (`content`) or HTML (`markup`), or neither, and `reason` says why."""

    key: str
    title: str
    content: CaptionedFigure | None = None
    reason: str = ""
    markup: str = ""


def build_section(key: str, title: str, draw: Callable[[], CaptionedFigure | str]) -> Section:
    """A section with the figure, or the HTML, that `draw` returns, or with the reason why it raised.

    Every exception is caught, so that a failing figure does not prevent the report; one of foreign code is logged.
    """
    try:
        made = draw()
        return Section(key, title, markup=made) if isinstance(made, str) else Section(key, title, made)
    except (SectionUnavailable, PpvaeError) as error:
        return Section(key, title, reason=one_line(error, 400))
    except Exception as error:
        logger.warning("report: %s could not be drawn (%s: %s)", key, type(error).__name__, one_line(error))
        return Section(key, title, reason=f"The figure could not be drawn ({type(error).__name__}: {one_line(error)}).")


def sections_of_sites(
    key: str, title: str, sites: Iterable[str], draw: Callable[[str], CaptionedFigure]
) -> Iterator[Section]:
    """One section for each latent, `MAX_SITES` at most."""
    for i, name in enumerate(itertools.islice(sites, MAX_SITES)):
        draw_site = functools.partial(draw, name)
        yield build_section(f"{key}_{i + 1}" if i else key, f"{title} of {name}", draw_site)


def image_grid(run_data: RunData, images: Any, **options: Any) -> Figure:
    """`plots.image_grid` with the event shape and the limits of the data; `options` are its other arguments."""
    assert run_data.event is not None
    return plots.image_grid(images, run_data.event, limits=run_data.limits, **options)


def capitalized(text: str) -> str:
    """The text with a capital first letter; the other letters stay.

    >>> capitalized("log p(x) of MNIST")
    'Log p(x) of MNIST'
    """
    return f"{text[:1].upper()}{text[1:]}"


def as_sentence(text: str) -> str:
    """The text with a capital first letter and a full stop."""
    return f"{capitalized(text)}."
