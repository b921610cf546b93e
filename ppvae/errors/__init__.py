"""Exceptions of ppvae; a message names the object, what was expected, what was found, and the usual cure."""

import difflib
from collections.abc import Iterable
from typing import Any


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


def count_of(count: int, one: str = "datum", many: str = "") -> str:
    """A number with what it counts, and a verb where there is one, in the singular for 1.

    >>> count_of(1), count_of(0), count_of(1, "datum is", "data are"), count_of(3, "run")
    ('1 datum', '0 data', '1 datum is', '3 runs')
    """
    plural = many or ("data" if one == "datum" else f"{one}s")
    return f"{count} {one if count == 1 else plural}"


def support_name(support: Any) -> str:
    """The short name of the support of one element of an event, for messages: real, positive numbers, {0, 1}, ...

    >>> from torch.distributions import constraints
    >>> support_name(constraints.independent(constraints.real, 1)), support_name(constraints.integer_interval(0, 2))
    ('real', '{0, ..., 2}')
    """
    kind = type(support).__name__.lstrip("_")
    if kind in ("IndependentConstraint", "MixtureSameFamilyConstraint"):
        return support_name(support.base_constraint)
    low, high = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    names = {
        "Real": "real", "Boolean": "{0, 1}", "Simplex": "the simplex", "Sphere": "the sphere",
        "OneHot": "one-hot vectors",
        "IntegerInterval": f"{{{low}, ..., {high}}}", "Interval": f"[{_bound(low)}, {_bound(high)}]",
        "HalfOpenInterval": f"[{_bound(low)}, {_bound(high)})", "IntegerGreaterThan": f"{{{low}, {_next(low)}, ...}}",
        "GreaterThan": "positive numbers" if _bound(low) == "0" else f"above {_bound(low)}",
        "GreaterThanEq": "nonnegative numbers" if _bound(low) == "0" else f"at least {_bound(low)}",
    }  # fmt: skip
    return names.get(kind, str(support).removeprefix("<").removesuffix(">").removesuffix("()").lower())


def _bound(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else "a bound of its own"


def _next(value: Any) -> Any:
    return value + 1 if isinstance(value, int) else "..."


def site_error(site: str, expected: str, found: str, cure: str) -> ContractError:
    """The ContractError for one site of a pair; `cure` is a sentence without capital letter and full stop."""
    return ContractError(f"site {site!r}: expected {expected}; found {found}. {cure[:1].upper()}{cure[1:]}.")
