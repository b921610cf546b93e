"""Whose parameters: every run has its own part of Pyro's param store, so that experiments cannot leak."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from ppvae.errors import ContractError

_entered: list[ParamScope] = []
_PARTS = ("_params", "_constraints", "_param_to_name")


class ParamScope:
    """A private part of Pyro's param store: names, unconstrained tensors and constraints.

    >>> import pyro, torch
    >>> scope = ParamScope()
    >>> with scope.entered():
    ...     _ = pyro.param("loc", torch.zeros(2))
    >>> list(scope.params), "loc" in pyro.get_param_store()
    (['loc'], False)
    """

    def __init__(self, copy: ParamScope | None = None):
        self._parts: tuple[dict[Any, Any], ...] = tuple(dict(d) for d in copy._parts) if copy else ({}, {}, {})
        self._seal: dict[str, tuple[int, str, float]] | None = None

    @staticmethod
    def current() -> ParamScope:
        """A copy of the param store as it stands."""
        store, scope = pyro.get_param_store(), ParamScope()
        scope._parts = tuple(dict(getattr(store, name)) for name in _PARTS)
        return scope

    @property
    def params(self) -> dict[str, Tensor]:
        """The unconstrained tensors by name."""
        return self._parts[0]

    @contextmanager
    def entered(self) -> Iterator[ParamScope]:
        """Makes this scope Pyro's param store for the duration; entering it twice is harmless."""
        if _entered and _entered[-1] is self:
            yield self
            return
        # Pyro's own `scope` copies the store, and strips parameters of the reference that every optimizer asks for.
        store = pyro.get_param_store()
        before = [getattr(store, name) for name in _PARTS]
        for name, part in zip(_PARTS, self._parts, strict=True):
            setattr(store, name, part)
        _entered.append(self)
        try:
            yield self
        finally:
            _entered.pop()
            self._parts = tuple(getattr(store, name) for name in _PARTS)
            for name, part in zip(_PARTS, before, strict=True):
                setattr(store, name, part)

    def seal(self) -> None:
        """Remembers the state of every tensor, so that a later change in place is noticed."""
        self._seal = {name: _mark(p) for name, p in self.params.items()}

    def check_seal(self) -> None:
        """Raises ContractError if a parameter was changed after the run that owns this scope had ended."""
        for name, mark in (self._seal or {}).items():
            if _mark(self.params[name]) != mark:
                raise ContractError(
                    f"parameter {name!r} was changed after its run had ended, for example by another fit of the same "
                    f"modules; use the newer run's model and guide, or ppvae.load(directory) with fresh modules"
                )


def _mark(p: Tensor) -> tuple[int, str, float]:
    """What tells that a tensor was changed in place; a fused optimizer does not count its version up."""
    return p._version, str(p.dtype), float(p.detach().cpu().double().sum())


class BoundProgram:
    """A model or guide together with the parameters of the run that trained it; called like the function itself."""

    def __init__(self, function: Callable[..., Any], scope: ParamScope):
        self.function, self.scope = function, scope
        self.__name__ = getattr(function, "__name__", type(function).__name__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.scope.entered():
            return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Bound({self.__name__})"


# The newest scope in which a bare function was trained: {owner: {function name: scope}}; owners are held weakly.
_trained: weakref.WeakKeyDictionary[Any, dict[str, ParamScope]] = weakref.WeakKeyDictionary()


def _owner(function: Callable[..., Any]) -> tuple[Any, str]:
    instance = getattr(function, "__self__", None)
    return (function, "") if instance is None else (instance, getattr(function, "__name__", ""))


def remember_trained(function: Callable[..., Any], scope: ParamScope) -> None:
    """Notes that `function` was trained in `scope`, so that the bare function evaluates identically after `fit`."""
    owner, name = _owner(function)
    try:
        _trained.setdefault(owner, {})[name] = scope
    except TypeError:  # an owner that cannot be held weakly (or hashed) is reached through run.model only
        return


def bind_program(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function bound to the parameters it was last trained with, or itself where no run has trained it."""
    if isinstance(function, BoundProgram):
        return function
    owner, name = _owner(function)
    try:
        scope = _trained.get(owner, {}).get(name)
    except TypeError:
        scope = None
    return function if scope is None else BoundProgram(function, scope)


def unwrap(function: Callable[..., Any]) -> Callable[..., Any]:
    """The user's own function."""
    return function.function if isinstance(function, BoundProgram) else function


def program_device(model: Callable[..., Any], guide: Callable[..., Any], data: Any) -> torch.device:
    """The device of the pair's parameters, or else of the data, a tensor or several."""
    for function in (model, guide):
        if isinstance(function, BoundProgram):
            for p in function.scope.params.values():
                return p.device
        owner = getattr(unwrap(function), "__self__", unwrap(function))
        if isinstance(owner, nn.Module):
            for p in owner.parameters():
                return p.device
    first = data[0] if isinstance(data, list | tuple) and data else data
    return getattr(first, "device", torch.device("cpu"))
