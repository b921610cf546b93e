"""Whose parameters: every run has its own part of Pyro's param store, so that experiments cannot leak."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from ppvae.errors import ContractError

_entered: list[Scope] = []
_PARTS = ("_params", "_constraints", "_param_to_name")


class Scope:
    """A private part of Pyro's param store: names, unconstrained tensors and constraints.

    >>> import pyro, torch
    >>> scope = Scope()
    >>> with scope.entered():
    ...     _ = pyro.param("loc", torch.zeros(2))
    >>> list(scope.params), "loc" in pyro.get_param_store()
    (['loc'], False)
    """

    def __init__(self, copy: Scope | None = None):
        self._parts: tuple[dict[Any, Any], ...] = tuple(dict(d) for d in copy._parts) if copy else ({}, {}, {})
        self._seal: dict[str, int] | None = None

    @staticmethod
    def current() -> Scope:
        """A copy of the param store as it stands."""
        store, scope = pyro.get_param_store(), Scope()
        scope._parts = tuple(dict(getattr(store, name)) for name in _PARTS)
        return scope

    @property
    def params(self) -> dict[str, Tensor]:
        """The unconstrained tensors by name."""
        return self._parts[0]

    @contextmanager
    def entered(self) -> Iterator[Scope]:
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
        self._seal = {name: p._version for name, p in self.params.items()}

    def check_seal(self) -> None:
        """Raises ContractError if a parameter was changed after the run that owns this scope had ended."""
        for name, version in (self._seal or {}).items():
            if self.params[name]._version != version:
                raise ContractError(
                    f"parameter {name!r} was changed after its run had ended, for example by another fit of the same "
                    f"modules; use the newer run's model and guide, or ppvae.load(directory) with fresh modules"
                )


class Bound:
    """A model or guide together with the parameters of the run that trained it; called like the function itself."""

    def __init__(self, function: Callable[..., Any], scope: Scope):
        self.function, self.scope = function, scope
        self.__name__ = getattr(function, "__name__", type(function).__name__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.scope.entered():
            return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Bound({self.__name__})"


# The newest scope in which a bare function was trained: {owner: {function name: scope}}; owners are held weakly.
_trained: weakref.WeakKeyDictionary[Any, dict[str, Scope]] = weakref.WeakKeyDictionary()


def _owner(function: Callable[..., Any]) -> tuple[Any, str]:
    instance = getattr(function, "__self__", None)
    return (function, "") if instance is None else (instance, getattr(function, "__name__", ""))


def remember(function: Callable[..., Any], scope: Scope) -> None:
    """Notes that `function` was trained in `scope`, so that the bare function evaluates identically after `fit`."""
    owner, name = _owner(function)
    try:
        _trained.setdefault(owner, {})[name] = scope
    except TypeError:  # an owner that cannot be held weakly (or hashed) is reached through run.model only
        return


def bound(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function bound to the parameters it was last trained with, or itself where no run has trained it."""
    if isinstance(function, Bound):
        return function
    owner, name = _owner(function)
    try:
        scope = _trained.get(owner, {}).get(name)
    except TypeError:
        scope = None
    return function if scope is None else Bound(function, scope)


def unbound(function: Callable[..., Any]) -> Callable[..., Any]:
    """The user's own function."""
    return function.function if isinstance(function, Bound) else function


def _taken(name: str) -> ContractError:
    return ContractError(
        f"parameter {name!r} is registered already for another module: Pyro would silently keep the old parameters; "
        f"give each module a name of its own, or call pyro.clear_param_store()"
    )


class Registration(Messenger):
    """Watches parameter statements: refuses a name used for two tensors and, where `create` is false, new names.

    `pyro.module` called again under a used name silently keeps the old parameters, so that the new module would never
    be trained; and an evaluation that creates a parameter would report on an initial value.
    """

    def __init__(self, create: bool):
        super().__init__()
        self.create = create
        self.params: dict[str, Tensor] = {}
        self._met: dict[int, tuple[PyroModule, dict[str, Any]]] = {}

    def __enter__(self) -> Any:
        self._hook = nn.modules.module.register_module_forward_pre_hook(self._meet)
        return super().__enter__()

    def __exit__(self, kind: Any, *rest: Any) -> Any:
        self._hook.remove()
        result = super().__exit__(kind, *rest)
        taken = ""
        for module, before in self._met.values():
            for name, p in before.items():
                if module._parameters[name] is not p:  # Pyro has put the store's tensor in its place
                    module._parameters[name], taken = p, name.removesuffix("_unconstrained")
        if taken and kind is None:
            raise _taken(taken)
        return result

    def _meet(self, module: nn.Module, _: Any) -> None:
        if isinstance(module, PyroModule) and id(module) not in self._met:
            own = {n: p for n, p in module._parameters.items() if n.endswith("_unconstrained")}
            self._met[id(module)] = (module, own)

    def _pyro_param(self, msg: Any) -> None:
        name = msg["name"]
        init = msg["args"][1] if len(msg["args"]) > 1 else msg["kwargs"].get("init_tensor")
        store = dict(pyro.get_param_store().named_parameters())
        stored = store.get(name)
        if stored is not None:
            if isinstance(init, nn.Parameter) and stored is not init:
                raise _taken(name)
        elif not self.create and not isinstance(init, nn.Parameter):
            raise ContractError(
                f"parameter {name!r} does not exist: evaluating a pair must not create parameters; "
                f"evaluate run.model and run.guide of the run that trained it, or train the pair first"
            )

    def _pyro_post_param(self, msg: Any) -> None:
        value = msg["value"]
        # the attribute is a weak reference; plates may hand out an indexed copy that names its source differently
        source = getattr(value, "_pyro_unconstrained_param", None)
        if source is None:
            source = value.unconstrained() if hasattr(value, "unconstrained") else value
        self.params[msg["name"]] = source


@contextmanager
def ambient(*functions: Callable[..., Any]) -> Iterator[None]:
    """A copy of the surrounding param store, so that what the bare functions register in it is gone afterwards."""
    for function in functions:
        if isinstance(function, Bound):
            function.scope.check_seal()
    with Scope.current().entered():
        yield


def modules_within(*functions: Callable[..., Any]) -> list[nn.Module]:
    """The modules that functions own, close over or name globally, with those inside them, each once."""
    found: dict[int, nn.Module] = {}
    for function in functions:
        fn = unbound(function)
        things = [fn, getattr(fn, "__self__", None)]
        code = getattr(getattr(fn, "__func__", fn), "__code__", None)
        if code is not None:
            plain = getattr(fn, "__func__", fn)
            for cell in plain.__closure__ or ():
                with suppress(ValueError):  # a cell may still be empty
                    things.append(cell.cell_contents)
            things += [plain.__globals__[n] for n in code.co_names if n in plain.__globals__]
        for thing in things:
            owner = getattr(thing, "__self__", thing)
            if isinstance(owner, nn.Module):
                found |= {id(m): m for m in owner.modules()}
    return list(found.values())


@contextmanager
def eval_mode(*functions: Callable[..., Any]) -> Iterator[None]:
    """Puts every module that is called meanwhile into evaluation mode, and restores each afterwards.

    A pair of plain functions does not say which modules it uses, so each is met when it is called.
    """
    changed: dict[int, nn.Module] = {}

    def quiet(module: nn.Module) -> None:
        if module.training:
            changed[id(module)] = module
            module.training = False

    for module in modules_within(*functions):
        quiet(module)
    hook = nn.modules.module.register_module_forward_pre_hook(lambda module, _: quiet(module))
    try:
        yield
    finally:
        hook.remove()
        for module in changed.values():
            module.training = True


@contextmanager
def modules_called(*functions: Callable[..., Any]) -> Iterator[list[nn.Module]]:
    """Collects the modules that are called meanwhile, after those that own the functions, each once and in order."""
    modules = modules_within(*functions)
    found = {id(m): m for m in modules}

    def note(module: nn.Module, _: Any) -> None:
        if id(module) not in found:
            found[id(module)] = module
            modules.append(module)

    hook = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield modules
    finally:
        hook.remove()


@contextmanager
def evaluating(model: Callable[..., Any], guide: Callable[..., Any]) -> Iterator[None]:
    """Everything that holds while a pair is evaluated: modules in evaluation mode, no gradient, no new parameter."""
    with ExitStack() as stack:
        stack.enter_context(ambient(model, guide))
        stack.enter_context(eval_mode(model, guide))
        stack.enter_context(Registration(create=False))
        stack.enter_context(torch.no_grad())
        yield
