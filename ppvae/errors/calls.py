"""Calls with arguments missing or unknown, said in one sentence that shows how the function is called."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from ppvae.errors import UsageError, did_you_mean

P = ParamSpec("P")
R = TypeVar("R")


def explain_call(function: Callable[P, R]) -> Callable[P, R]:
    """A function of a pair whose call without its arguments raises UsageError in one sentence, in place of TypeError.

    >>> @explain_call
    ... def f(model, guide, data, *, rows=None, epochs): ...
    >>> f(print, print, epochs=3)
    Traceback (most recent call last):
    ppvae.errors.UsageError: f: expected f(model, guide, data, epochs=...), found a call without data
    """
    signature = inspect.signature(function)
    needed = [p for p in signature.parameters.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    usage = ", ".join(p.name if p.kind is p.POSITIONAL_OR_KEYWORD else f"{p.name}=..." for p in needed)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        name = function.__name__
        try:
            arguments = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            given = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD][: len(args)]
            missing = [p.name for p in needed if p.name not in given and p.name not in kwargs]
            unknown = [name for name in kwargs if name not in signature.parameters]
            if unknown:
                found = f"{unknown[0]}={did_you_mean(unknown[0], signature.parameters)}"
            else:
                found = f"a call without {', '.join(missing)}" if missing else f"a call with {error}"
            hint = _hint(args[0]) if args else ""
            raise UsageError(f"{name}: expected {name}({usage}), found {found}{hint}") from None
        for side in ("model", "guide"):
            if side in arguments and not _is_program(program := arguments[side]):
                found = f"found an object of {type(program).__name__}{_hint(program)}"
                raise UsageError(f"{name}: {side}: expected a Pyro function, {found}")
        return function(*args, **kwargs)

    return call


def _hint(pair: Any) -> str:
    return ". Pass a pair as pair.model, pair.guide" if hasattr(pair, "model") and hasattr(pair, "guide") else ""


def _is_program(side: Any) -> bool:
    """Whether an object can be called as a program: a module without `forward`, or a call of its own, cannot."""
    without = getattr(getattr(side, "forward", None), "__name__", "") == "_forward_unimplemented"
    of_module = getattr(type(side).__call__, "__qualname__", "").partition(".")[0] in ("Module", "PyroModule")
    return callable(side) and not (without and of_module)
