"""Parameter scopes: every run has a param store of its own, so that experiments in one process share no parameter."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from ppvae.errors import ContractError

_active_scopes: list[ParamScope] = []
_STORE_TABLES = ("_params", "_constraints", "_param_to_name")  # attributes of Pyro's store that hold its state


class ParamScope:
    """A private copy of the state of Pyro's param store: names, unconstrained tensors and constraints.

    >>> import pyro, torch
    >>> scope = ParamScope()
    >>> with scope.entered():
    ...     _ = pyro.param("loc", torch.zeros(2))
    >>> list(scope.params), "loc" in pyro.get_param_store()
    (['loc'], False)
    """

    def __init__(self, copy: ParamScope | None = None):
        self._tables: tuple[dict[Any, Any], ...] = tuple(dict(d) for d in copy._tables) if copy else ({}, {}, {})
        self._fingerprints: dict[str, tuple[int, str, float]] = {}

    @staticmethod
    def of_current_store() -> ParamScope:
        """A scope with the present content of Pyro's param store."""
        store, scope = pyro.get_param_store(), ParamScope()
        scope._tables = tuple(dict(getattr(store, name)) for name in _STORE_TABLES)
        return scope

    @property
    def params(self) -> dict[str, Tensor]:
        """The unconstrained tensors by name."""
        return self._tables[0]

    @contextmanager
    def entered(self) -> Iterator[ParamScope]:
        """Makes this scope Pyro's param store for the duration; nesting the same scope has no effect."""
        if _active_scopes and _active_scopes[-1] is self:
            yield self
            return
        # Pyro's own `scope` copies the store and drops the attribute by which optimizers look parameters up
        store = pyro.get_param_store()
        before = [getattr(store, name) for name in _STORE_TABLES]
        for name, table in zip(_STORE_TABLES, self._tables, strict=True):
            setattr(store, name, table)
        _active_scopes.append(self)
        try:
            yield self
        finally:
            _active_scopes.pop()
            self._tables = tuple(getattr(store, name) for name in _STORE_TABLES)
            for name, table in zip(_STORE_TABLES, before, strict=True):
                setattr(store, name, table)

    def record_fingerprints(self) -> None:
        """Records a fingerprint of every tensor, so that `check_unchanged` detects a later change in place."""
        self._fingerprints = {name: _fingerprint(p) for name, p in self.params.items()}

    def check_unchanged(self) -> None:
        """Raises ContractError if a parameter changed after the run that owns this scope had ended."""
        for name, fingerprint in self._fingerprints.items():
            if _fingerprint(self.params[name]) != fingerprint:
                raise ContractError(
                    f"parameter {name!r} was changed after its run had ended, for example by another fit of the same "
                    f"modules; use the newer run's model and guide, or ppvae.load(directory) with fresh modules"
                )


def _fingerprint(p: Tensor) -> tuple[int, str, float]:
    """(version, dtype, sum); the sum, because a fused optimizer does not increment the version."""
    return p._version, str(p.dtype), float(p.detach().cpu().double().sum())


class BoundProgram:
    """A model or guide bound to the param scope of the run that trained it; called like the function itself."""

    def __init__(self, function: Callable[..., Any], scope: ParamScope):
        self.function, self.scope = function, scope
        self.__name__ = getattr(function, "__name__", type(function).__name__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.scope.entered():
            return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Bound({self.__name__})"


# The scope of the latest run of each trained function: {owner: {function name: scope}}, owners by weak reference.
_trained_scopes: weakref.WeakKeyDictionary[Any, dict[str, ParamScope]] = weakref.WeakKeyDictionary()


def _owner(function: Callable[..., Any]) -> tuple[Any, str]:
    """(object that holds a function, name of the method); a plain function holds itself."""
    instance = getattr(function, "__self__", None)
    return (function, "") if instance is None else (instance, getattr(function, "__name__", ""))


def record_trained(function: Callable[..., Any], scope: ParamScope) -> None:
    """Records the scope that `function` was trained in, so that the bare function evaluates identically after `fit`."""
    owner, name = _owner(function)
    try:
        _trained_scopes.setdefault(owner, {})[name] = scope
    except TypeError:  # an owner without weak references or hash: only run.model has the parameters
        return


def bind_program(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function bound to the scope of the latest run that trained it; the function itself where none did."""
    if isinstance(function, BoundProgram):
        return function
    owner, name = _owner(function)
    try:
        scope = _trained_scopes.get(owner, {}).get(name)
    except TypeError:
        scope = None
    return function if scope is None else BoundProgram(function, scope)


def unwrap(function: Callable[..., Any]) -> Callable[..., Any]:
    """The user's function inside a `BoundProgram`; any other function as it is."""
    return function.function if isinstance(function, BoundProgram) else function


def unconstrained(value: Tensor) -> Tensor:
    """The unconstrained tensor of the value of a param site; a module's own parameter is its own."""
    source: Tensor | None = getattr(value, "_pyro_unconstrained_param", None)  # a plate's value is an indexed copy
    if source is None:
        source = value.unconstrained() if hasattr(value, "unconstrained") else value
    return source


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
