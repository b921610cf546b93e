"""Exceptions of ppvae; a message names the object, what was expected, what was found, and the usual cure."""

import difflib
from collections.abc import Iterable


class PpvaeError(Exception):
    """Base class of all exceptions that the library raises on purpose."""


class ContractError(PpvaeError, ValueError):
    """A model/guide pair violates the contract under which weights and log p(x) are right."""


class DataError(PpvaeError, ValueError):
    """A file or an array cannot be read as data."""


class CheckpointError(PpvaeError):
    """A checkpoint or run folder is missing, damaged, or does not fit the pair."""


class TrainingError(PpvaeError):
    """Training cannot continue, for example because a loss or a gradient is not finite."""


class UsageError(PpvaeError, ValueError):
    """An argument or option does not exist or is not valid."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The nearest of the known words as a hint for the end of a message, "; did you mean ...?"; empty without one."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def site_error(site: str, expected: str, found: str, cure: str) -> ContractError:
    """The ContractError for one site of a pair; `cure` is a sentence without capital letter and full stop."""
    return ContractError(f"site {site!r}: expected {expected}; found {found}. {cure[:1].upper()}{cure[1:]}.")
