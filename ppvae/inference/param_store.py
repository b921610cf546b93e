"""Parameter scopes: every run has a param store of its own, so that experiments in one process share no parameter."""

from __future__ import annotations

import functools
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FunctionType, MethodType
from typing import Any, TypeAlias

import pyro
import torch
from pyro import poutine
from pyro.poutine.guide import GuideMessenger
from torch import Tensor, nn

from ppvae.errors import ContractError

Fingerprint: TypeAlias = tuple[tuple[int, ...], str, int]

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
        self._fingerprints: dict[str, Fingerprint] = {}
        self._in_store: dict[str, tuple[Tensor, Fingerprint]] = {}  # the store's parameters as the run ended
        self._device: torch.device | None = None

    @staticmethod
    def of_current_store() -> ParamScope:
        """A scope with the present content of Pyro's param store."""
        store, scope = pyro.get_param_store(), ParamScope()
        scope._tables = tuple(dict(getattr(store, name)) for name in _STORE_TABLES)
        return scope

    @property
    def params(self) -> dict[str, Tensor]:
        """The unconstrained tensors by name."""
        is_active = bool(_active_scopes) and _active_scopes[-1] is self
        params: dict[str, Tensor] = pyro.get_param_store()._params if is_active else self._tables[0]
        return params

    @property
    def device(self) -> torch.device | None:
        """The device of the first parameter; None without one."""
        return next((p.device for p in self.params.values()), self._device)

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

    def record_end_of_run(self) -> None:
        """Records every parameter, here and in the current store, so that later changes of either are noticed."""
        self._fingerprints = {name: _fingerprint(p) for name, p in self.params.items()}
        store = pyro.get_param_store()._params
        self._in_store = {name: (p, _fingerprint(p)) for name, p in store.items() if name in self.params}

    def check_unchanged(self) -> None:
        """Raises ContractError if a parameter changed after the run that owns this scope had ended."""
        for name, fingerprint in self._fingerprints.items():
            if _fingerprint(self.params[name]) != fingerprint:
                raise ContractError(
                    f"parameter {name!r} was changed after its run had ended, by another fit of the same modules, a "
                    f"loaded state dict or an optimizer; for the parameters as they are now, evaluate the model and "
                    f"guide that were passed to fit; for those of the run, ppvae.load(directory) with fresh modules"
                )

    def present(self) -> ParamScope:
        """The parameters of the run as they are now, for programs that are not bound to it.

        Those of modules are left out: the programs register what the modules hold now, or, where Pyro's store has got
        another tensor for one since the run ended, are refused by `Registration` unless it is the module's.

        Raises:
            ContractError: a parameter of `pyro.param` has got another value in Pyro's store since the run ended.
        """
        scope, store = ParamScope(self), pyro.get_param_store()
        scope._device = self.device
        for name, p in self.params.items():
            if self._is_newer_in_store(name):
                if not isinstance(p, nn.Parameter):
                    raise ContractError(
                        f"parameter {name!r} has two values: that of the run which trained this pair, and another that "
                        f"Pyro's param store has got since; evaluate run.model and run.guide for the run's, and for "
                        f"the store's the pair that ppvae.inference.from_param_store(model, guide) returns"
                    )
                scope._set(name, store._params[name], store._constraints[name])
            elif isinstance(p, nn.Parameter):
                scope._remove(name)
        return scope

    def _is_newer_in_store(self, name: str) -> bool:
        """Whether Pyro's store has another tensor for a parameter, and has got it or its value after the run ended."""
        stored: Tensor | None = pyro.get_param_store()._params.get(name)
        if stored is None or stored is self.params[name]:
            return False
        before, fingerprint = self._in_store.get(name, (None, None))
        return stored is not before or _fingerprint(before) != fingerprint

    def _set(self, name: str, p: Tensor, constraint: Any) -> None:
        self._remove(name)
        params, constraints, names = self._tables
        params[name], constraints[name], names[p] = p, constraint, name

    def _remove(self, name: str) -> None:
        params, constraints, names = self._tables
        if name in params:
            names.pop(params.pop(name), None)
            constraints.pop(name, None)

    def forget_weak_references(self) -> None:
        """Removes Pyro's weak reference from every parameter, which pickle and copies of a module cannot take."""
        for p in self.params.values():
            p.__dict__.pop("unconstrained", None)

    def __deepcopy__(self, memo: dict[int, Any]) -> ParamScope:
        """A scope of the copied modules' parameters, and of copies of the others.

        A parameter of a module that is not copied, as a plain function refers to it, is shared.
        """
        copied = memo[id(self)] = ParamScope()
        copied._fingerprints, copied._in_store = dict(self._fingerprints), dict(self._in_store)
        copied._device = self._device
        for name, p in self._tables[0].items():
            q = memo.get(id(p), p) if isinstance(p, nn.Parameter) else _leaf_copy(p, memo)
            copied._set(name, q, self._tables[1][name])
        return copied


def _fingerprint(p: Tensor) -> Fingerprint:
    """(shape, dtype, checksum of the values)."""
    data = p.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return tuple(p.shape), str(p.dtype), zlib.crc32(data.numpy().data)


def _leaf_copy(p: Tensor, memo: dict[int, Any]) -> Tensor:
    if id(p) not in memo:
        memo[id(p)] = p.detach().clone().requires_grad_(p.requires_grad)
    copied: Tensor = memo[id(p)]
    return copied


class BoundProgram:
    """A model or guide bound to the param scope of the run that trained it; called like the function itself."""

    def __init__(self, function: Callable[..., Any], scope: ParamScope):
        self.function, self.scope = function, scope
        self.__name__ = getattr(function, "__name__", type(function).__name__)
        self.__wrapped__ = function  # whose signature it has

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.scope.entered():
            return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Bound({self.__name__})"


# The scope of the latest run of each trained function: {owner: {function name: scope}}, owners by weak reference.
_trained_scopes: weakref.WeakKeyDictionary[Any, dict[str, ParamScope]] = weakref.WeakKeyDictionary()
DEPTH = 4  # of wrappers in one another


def _owner(function: Callable[..., Any]) -> tuple[Any, str]:
    """(object that holds a function, name of the method); a plain function holds itself."""
    instance = getattr(function, "__self__", None)
    return (function, "") if instance is None else (instance, getattr(function, "__name__", ""))


def record_trained(function: Callable[..., Any], scope: ParamScope) -> None:
    """Records the scope that `function`, and what it wraps, was trained in: the bare function evaluates identically."""
    for inner in _levels([function], _wrapped):
        for program in inner:
            owner, name = _owner(program)
            with suppress(TypeError):  # an owner without weak references or hash: only run.model has the parameters
                _trained_scopes.setdefault(owner, {})[name] = scope


def bind_pair(model: Callable[..., Any], guide: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The pair, each side bound to the latest run that trained it, or else to that of the other side.

    A side that wraps a trained function (functools.partial, a handler of Pyro, a lambda) counts as that function.
    Where no run trained either, and within a scope, as in a callback of `fit`, both are returned as they are.
    """
    if _active_scopes:
        return model, guide
    scopes = [f.scope if isinstance(f, BoundProgram) else _present_scope(f) for f in (model, guide)]
    bound = [s or scopes[1 - i] for i, s in enumerate(scopes)]
    model, guide = (
        f if s is None or isinstance(f, BoundProgram) else BoundProgram(f, s)
        for f, s in zip((model, guide), bound, strict=True)
    )
    return model, guide


def starting_scope(model: Callable[..., Any], guide: Callable[..., Any]) -> ParamScope:
    """What training of a pair starts from: copies of the parameters that its sides are bound to; else nothing.

    Parameters of modules are not copied, as the modules themselves are trained.

    Raises:
        ContractError: the sides are bound to two runs that both have a parameter of a name.
    """
    start = ParamScope()
    memo: dict[int, Any] = {}
    for scope in {id(f.scope): f.scope for f in (model, guide) if isinstance(f, BoundProgram)}.values():
        for name, p in scope.params.items():
            q = p if isinstance(p, nn.Parameter) else _leaf_copy(p, memo)
            if start.params.setdefault(name, q) is not q:
                raise ContractError(
                    f"parameter {name!r}: model and guide are bound to two runs that both have it; expected the model "
                    f"and guide of one run"
                )
            start._set(name, q, scope._tables[1][name])
    return start


def from_param_store(model: Callable[..., Any], guide: Callable[..., Any]) -> tuple[BoundProgram, BoundProgram]:
    """The pair bound to the present parameters of Pyro's param store, as `pyro.infer.SVI` or `load` has left them.

    >>> import pyro, torch
    >>> _ = pyro.param("loc", torch.ones(2))
    >>> model, guide = from_param_store(lambda: pyro.param("loc"), lambda: None)
    >>> pyro.clear_param_store()
    >>> model().tolist()
    [1.0, 1.0]
    """
    scope = ParamScope.of_current_store()
    return BoundProgram(unwrap(model), scope), BoundProgram(unwrap(guide), scope)


def _present_scope(function: Callable[..., Any]) -> ParamScope | None:
    """The present parameters of the latest run of a function, or of the function that it wraps; None without a run."""
    for level in _levels([function], _reached):
        scopes = {id(s): s for s in map(recorded_scope, level) if s is not None}
        if scopes:
            return next(iter(scopes.values())).present() if len(scopes) == 1 else None
    return None


def recorded_scope(function: Callable[..., Any]) -> ParamScope | None:
    """The scope of the latest run of a function; None where no run trained it."""
    if isinstance(function, BoundProgram):
        return function.scope
    owner, name = _owner(function)
    try:
        return _trained_scopes.get(owner, {}).get(name)
    except TypeError:
        return None


def _levels(functions: list[Any], inner: Callable[[Any], Iterable[Any]]) -> Iterator[list[Any]]:
    """The functions; what they call, by `inner`; what that calls; each function once."""
    seen: set[int] = set()
    for _ in range(DEPTH):
        functions = [f for f in functions if callable(f) and not isinstance(f, type) and id(f) not in seen]
        seen |= {id(f) for f in functions}
        yield functions
        functions = [f for function in functions for f in inner(function)]


def _wrapped(function: Any) -> list[Any]:
    """The functions that a partial, a handler of Pyro or a decorator wraps."""
    if isinstance(function, functools.partial):  # a handler is a partial of (handler, function), by a function of Pyro
        parts = [function.func, *function.args]
        return [f for f in parts if not str(getattr(f, "__module__", "")).startswith("pyro.poutine")]
    return [getattr(function, name) for name in ("__wrapped__", "fn") if hasattr(function, name)]


def _reached(function: Any) -> list[Any]:
    """The same, the functions that a function closes over or names as globals, and those that an object holds."""
    reached = _wrapped(function)
    plain = function.__func__ if isinstance(function, MethodType) else function
    if isinstance(plain, FunctionType):
        for cell in plain.__closure__ or ():
            with suppress(ValueError):  # a cell may still be empty
                reached.append(cell.cell_contents)
        reached += [plain.__globals__[n] for n in plain.__code__.co_names if n in plain.__globals__]
    elif not isinstance(plain, nn.Module):
        reached += list(getattr(plain, "__dict__", {}).values())
    return reached


def unwrap(function: Callable[..., Any]) -> Callable[..., Any]:
    """The user's function inside a `BoundProgram`; any other function as it is."""
    return function.function if isinstance(function, BoundProgram) else function


def is_effect_guide(function: Callable[..., Any]) -> bool:
    """Whether a guide is a messenger that runs the model, perhaps within handlers or bound to a run."""
    inner = poutine.unwrap(unwrap(function))
    return isinstance(inner, GuideMessenger) if inner is function else is_effect_guide(inner)


def unconstrained(value: Tensor) -> Tensor:
    """The unconstrained tensor of the value of a param site; a module's own parameter is its own."""
    source: Tensor | None = getattr(value, "_pyro_unconstrained_param", None)  # a plate's value is an indexed copy
    if source is None:
        source = value.unconstrained() if hasattr(value, "unconstrained") else value
    return source


def program_device(model: Callable[..., Any], guide: Callable[..., Any], data: Any) -> torch.device:
    """The device of the pair's parameters, or else of the data, a tensor or several."""
    for function in (model, guide):
        if isinstance(function, BoundProgram) and function.scope.device is not None:
            return function.scope.device
        owner = getattr(unwrap(function), "__self__", unwrap(function))
        if isinstance(owner, nn.Module):
            for p in owner.parameters():
                return p.device
    first = data[0] if isinstance(data, list | tuple) and data else data
    return getattr(first, "device", torch.device("cpu"))
