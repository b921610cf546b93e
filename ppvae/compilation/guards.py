"""Guards on the Python state that a captured function reads: whether it has changed since the capture."""

import enum
import functools
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from operator import is_
from typing import Any, final

import torch
from pyro.infer import SVI
from pyro.optim import PyroOptim
from torch import Tensor

# packages whose code is taken to be constant; instances of their classes are guarded all the same
_CONSTANT_PACKAGES = set(sys.stdlib_module_names) - {"__main__"}
_CONSTANT_PACKAGES |= {"torch", "pyro", "numpy", "scipy", "pandas", "sklearn", "tqdm", "ppvae"}
_PLAIN_TYPES = (int, float, complex, str, bytes, type(None), range, slice, enum.Enum, torch.dtype, torch.device)
_TRAINING_TYPES = (SVI, PyroOptim, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)  # change at each step
_LISTS = (list, set, deque)
_MAX_VALUES = 20_000  # values


@final
class Guards:
    """Records the Python state reachable from functions and objects, and reports what has changed.

    Guarded: numbers, strings and flags in attributes of objects and of their classes, lists and dicts, closures,
    defaults, and the globals that code names; the identity of tensors, not their values. Not guarded: the state of
    iterators, files, clocks and extension modules, and of what trains the function: an SVI, optimizers, schedulers.

    Attributes:
        tensors: ids of the tensors that are inputs of the graph; any other object in their place is a change.
        read: tensors whose values were read into Python, which must not change in place.

    Raises ValueError where there is more state than can be compared at every step.
    """

    def __init__(self, **roots: Any):
        self._dicts: dict[str, dict[Any, Any]] = {}  # by name; they hold most of the values
        self._empty: list[Any] = []  # dicts, lists and sets that are: most of all, such as the hooks of modules
        self._names_of_empty: list[str] = []
        self._values: tuple[Any, ...] = ()
        self._readings: list[_Reading] = []
        self._visited: dict[int, Any] = {}
        self.tensors: set[int] = set()
        self.read: list[tuple[Tensor, int]] = []
        count, waiting = 0, deque(roots.items())
        while waiting:
            name, thing = waiting.popleft()
            if isinstance(thing, tuple | frozenset):  # it cannot change; whatever holds it is guarded
                waiting.extend((name, value) for value in self._once(thing))
                continue
            for where, own in self._state_of(name, thing):
                if isinstance(own, (dict, *_LISTS)) and not own:
                    self._empty.append(own)
                    self._names_of_empty.append(where)
                elif isinstance(own, dict):
                    count += len(own)
                    self._dicts[where if where not in self._dicts else f"{where} ({len(self._dicts)})"] = own
                    waiting.extend((f"{where}.{key}", value) for key, value in own.items())
                else:
                    reading = _Reading(where, *((functools.partial(tuple, own),) if isinstance(own, _LISTS) else own))
                    self._readings.append(reading)
                    count += len(reading.seen)
                    waiting.extend((reading.place(i), value) for i, value in enumerate(reading.seen))
            if count > _MAX_VALUES:
                raise ValueError(f"{name}: more Python state than can be watched at every step")
        self._watched = list(self._dicts.values())
        self._values = self._now()
        self._sizes = [len(d) for d in self._watched]

    def add(self, name: str, read: Callable[[], tuple[Any, ...]], labels: list[str]) -> None:
        self._readings.append(_Reading(name, read, labels))

    def _now(self) -> tuple[Any, ...]:
        return tuple(chain.from_iterable(map(dict.values, self._watched)))

    def read_changed(self) -> str:
        """What `changed` says of tensors whose values were read into Python."""
        return "a tensor whose values were read into Python" if any(t._version != v for t, v in self.read) else ""

    def changed(self) -> str:
        """The name of something that has changed, or nothing."""
        if what := self.read_changed():
            return what
        if any(self._empty):
            return next(name for name, own in zip(self._names_of_empty, self._empty, strict=True) if own)
        now = self._now()
        same = len(now) == len(self._values) and all(map(is_, now, self._values))
        if not same and (what := self._changed_in_dicts()):
            return what
        for reading in self._readings:
            current, seen = reading.read(), reading.seen
            if len(current) == len(seen) and all(map(is_, current, seen)):
                continue
            if len(current) != len(seen):
                return reading.name
            for i, (a, b) in enumerate(zip(current, seen, strict=True)):
                if not self._equal(a, b, 6):
                    return reading.place(i)
        return ""

    def _changed_in_dicts(self) -> str:
        place = 0
        for (name, own), size in zip(self._dicts.items(), self._sizes, strict=True):
            if len(own) != size:
                return name
            for (key, now), seen in zip(own.items(), self._values[place : place + size], strict=True):
                if not self._equal(now, seen, 6):
                    return f"{name}.{key}"
            place += size
        return ""

    def _equal(self, now: Any, seen: Any, depth: int) -> bool:
        """Whether the captured function would behave the same with either value."""
        if now is seen:
            return True
        if isinstance(now, Tensor) and isinstance(seen, Tensor):
            return id(seen) not in self.tensors
        if type(now) is not type(seen) or depth == 0:
            return False
        if isinstance(now, _PLAIN_TYPES):
            return bool(now == seen)
        if isinstance(now, Mapping):
            return list(now) == list(seen) and self._equal(tuple(now.values()), tuple(seen.values()), depth - 1)
        if isinstance(now, tuple | list | set | frozenset | deque):
            return len(now) == len(seen) and all(self._equal(a, b, depth - 1) for a, b in zip(now, seen, strict=True))
        if isinstance(now, types.FunctionType | types.MethodType | type) or not hasattr(now, "__dict__"):
            return bool(id(seen) not in self._visited)
        return self._equal(vars(now), vars(seen), depth - 1)

    def _once(self, thing: Any) -> Iterable[Any]:
        """What a tuple or a set that cannot change holds, if it was not visited before."""
        known = id(thing) in self._visited
        self._visited[id(thing)] = thing
        return () if known else thing

    def _state_of(self, name: str, thing: Any) -> Iterator[tuple[str, Any]]:
        """The state that an object holds directly: a dict, or (a function that reads values, their labels)."""
        if isinstance(thing, (*_PLAIN_TYPES, *_TRAINING_TYPES, Tensor, types.ModuleType)) or id(thing) in self._visited:
            return
        self._visited[id(thing)] = thing
        if isinstance(thing, dict):
            yield name, thing
        elif isinstance(thing, Mapping):
            yield name, (lambda: tuple(thing.values()), [*map(str, thing)])
        elif isinstance(thing, _LISTS):
            yield name, thing
        elif isinstance(thing, functools.partial):
            yield name, (lambda: (thing.func, thing.args, thing.keywords), None)
        elif isinstance(thing, types.MethodType):
            yield name, (lambda: (thing.__self__, thing.__func__), None)
        elif isinstance(thing, types.FunctionType):
            if not _is_constant(thing.__module__):
                yield from _state_of_function(thing)
        elif isinstance(thing, property):
            yield name, (lambda: (thing.fget,), None)
        elif isinstance(thing, staticmethod | classmethod):
            yield name, (lambda: (thing.__func__,), None)
        elif isinstance(thing, type):
            for base in thing.__mro__ if not issubclass(thing, _TRAINING_TYPES) else ():
                if not _is_constant(base.__module__):
                    own = vars(base)
                    names = [n for n in own if n not in ("__dict__", "__weakref__", "__doc__", "_abc_impl")]
                    yield base.__name__, (functools.partial(_get_items, own, names), names)
        elif type(thing).__module__ not in ("logging", "threading", "weakref", "random"):
            if isinstance(
                attributes := getattr(thing, "__dict__", None), dict
            ):  # of `list[int]` it is that of the class list
                yield name, attributes
            if not _is_constant(type(thing).__module__):
                slots = [n for base in type(thing).__mro__ for n in _slots(base)]
                if slots:
                    yield name, (lambda: tuple(getattr(thing, n, None) for n in slots), slots)
            yield from self._state_of(type(thing).__name__, type(thing))


@final
class _Reading:
    """Values that one object holds: a function that reads them, and the values at capture."""

    def __init__(self, name: str, read: Callable[[], tuple[Any, ...]], labels: list[str] | None = None):
        self.name, self.read, self.labels = name, read, labels
        self.seen = read()

    def place(self, i: int) -> str:
        return f"{self.name}.{self.labels[i]}" if self.labels and i < len(self.labels) else self.name


def _get_items(own: Mapping[str, Any], names: list[str]) -> tuple[Any, ...]:
    return tuple(map(own.get, names))


def _slots(kind: type) -> Iterable[str]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else [n for n in slots if n not in ("__dict__", "__weakref__")]


def _is_constant(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _CONSTANT_PACKAGES


def _state_of_function(fn: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The state that a function reads besides its arguments: closure, defaults, attributes, and named globals."""
    if fn.__closure__:
        cells = fn.__closure__
        yield fn.__name__, (lambda: tuple(map(_cell_contents, cells)), list(fn.__code__.co_freevars))
    yield fn.__name__, (lambda: (fn.__code__.co_code, fn.__defaults__, fn.__kwdefaults__, fn.__dict__), None)
    named = _global_names(fn.__code__)
    present = [n for n in named if n in fn.__globals__]
    modules = [v for n in present if isinstance(v := fn.__globals__[n], types.ModuleType)]
    yield fn.__module__, (functools.partial(_get_items, fn.__globals__, present), present)
    for module in [m for m in modules if not _is_constant(m.__name__)]:
        used = [n for n in named if n in vars(module)]
        yield module.__name__, (functools.partial(_get_items, vars(module), used), used)


def _global_names(code: types.CodeType) -> list[str]:
    """The names of globals and attributes in code, inner functions included."""
    inner = [n for c in code.co_consts if isinstance(c, types.CodeType) for n in _global_names(c)]
    return list(dict.fromkeys((*code.co_names, *inner)))


def _cell_contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # still empty
        return None
