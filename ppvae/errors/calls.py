"""Calls with arguments that a function does not take, answered by a sentence that shows one it takes."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from ppvae.errors import UsageError, did_you_mean

P = ParamSpec("P")
R = TypeVar("R")


def shows_call(example: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a public function, whose wrong calls are UsageErrors that show the example of a right one.

    Wrong are arguments that the signature does not take, and a `model` or `guide` that cannot be called.

    >>> @shows_call("area(width, height)")
    ... def area(width, height):
    ...     return width * height
    >>> area(2, 3)
    6
    >>> area(2)
    Traceback (most recent call last):
    ...
    ppvae.errors.UsageError: area: missing a required argument: 'height'. Call it as area(width, height)
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        names = signature.parameters

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            problem = next((f"it has no argument {k!r}{did_you_mean(k, names)}" for k in kwargs if k not in names), "")
            if not problem:
                try:
                    given = signature.bind(*args, **kwargs).arguments
                except TypeError as error:
                    problem = str(error)
                else:
                    wrong = [side for side in ("model", "guide") if side in given and not _is_program(given[side])]
                    problem = "".join(
                        f"{side}: expected a Pyro function, found an object of {type(given[side]).__name__}"
                        for side in wrong[:1]
                    )
            if problem:
                end = "" if problem.endswith("?") else "."
                raise UsageError(f"{function.__name__}: {problem}{end} Call it as {example}")
            return function(*args, **kwargs)

        return call

    return decorate


def _is_program(side: Any) -> bool:
    """Whether an object can be called as a program: a module without `forward` cannot."""
    return callable(side) and getattr(getattr(side, "forward", None), "__name__", "") != "_forward_unimplemented"
