"""Whether the Python state that a run of a pair can see has changed since a graph was captured from it."""

from __future__ import annotations

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
from torch import Tensor

# code that does not change while a program runs; objects made from it are looked into all the same
_STILL = {*sys.stdlib_module_names, "torch", "pyro", "numpy", "scipy", "pandas", "sklearn", "tqdm", "ppvae"} - {
    "__main__"
}
_PLAIN = (int, float, complex, str, bytes, type(None), range, slice, enum.Enum, torch.dtype, torch.device)
_MOST = 20_000  # values


@final
class Guards:
    """Remembers the plain values reachable from functions and objects, and says what has changed since.

    Looked at: attributes of objects and of their classes, lists and dicts, closures, defaults, and the globals that
    code names, numbers, strings and flags in them, and which tensor stands where; a tensor's values are not.
    Not seen: what hides in iterators, files, clocks and extension modules.

    Attributes:
        tensors: the ids of the tensors of which it matters that they are the same objects.
        read: tensors whose values were read into Python, which must not change in place.

    Raises ValueError where there is more than can be watched at every step.
    """

    def __init__(self, **roots: Any):
        self._dicts: dict[str, dict[Any, Any]] = {}  # by name; most of what is watched is their values
        self._values: tuple[Any, ...] = ()
        self._readings: list[_Reading] = []
        self._met: dict[int, Any] = {}
        self.tensors: set[int] = set()
        self.read: list[tuple[Tensor, int]] = []
        count, waiting = 0, deque(roots.items())
        while waiting:
            name, thing = waiting.popleft()
            for where, own in self._looked_into(name, thing):
                if isinstance(own, dict):
                    count += len(own)
                    self._dicts[where if where not in self._dicts else f"{where} ({len(self._dicts)})"] = own
                    waiting.extend((f"{where}.{key}", value) for key, value in own.items())
                else:
                    self._readings.append(reading := _Reading(where, *own))
                    count += len(reading.seen)
                    waiting.extend((reading.place(i), value) for i, value in enumerate(reading.seen))
            if count > _MOST:
                raise ValueError(f"{name}: more Python state than can be watched at every step")
        self._held = list(self._dicts.values())
        self._values = self._now()
        self._sizes = [len(d) for d in self._held]

    def also(self, name: str, read: Callable[[], tuple[Any, ...]], labels: list[str]) -> None:
        """Watches further values."""
        self._readings.append(_Reading(name, read, labels))

    def _now(self) -> tuple[Any, ...]:
        return tuple(chain.from_iterable(map(dict.values, self._held)))

    def changed(self) -> str:
        """The name of something that has changed, or nothing."""
        for t, version in self.read:
            if t._version != version:
                return "a tensor whose values were read into Python"
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
                if not self._same(a, b, 6):
                    return reading.place(i)
        return ""

    def _changed_in_dicts(self) -> str:
        place = 0
        for (name, own), size in zip(self._dicts.items(), self._sizes, strict=True):
            if len(own) != size:
                return name
            for (key, now), seen in zip(own.items(), self._values[place : place + size], strict=True):
                if not self._same(now, seen, 6):
                    return f"{name}.{key}"
            place += size
        return ""

    def _same(self, now: Any, seen: Any, depth: int) -> bool:
        """Whether a run of the pair would take one for the other."""
        if now is seen:
            return True
        if isinstance(now, Tensor) and isinstance(seen, Tensor):
            return id(seen) not in self.tensors
        if type(now) is not type(seen) or depth == 0:
            return False
        if isinstance(now, _PLAIN):
            return bool(now == seen)
        if isinstance(now, Mapping):
            return list(now) == list(seen) and self._same(tuple(now.values()), tuple(seen.values()), depth - 1)
        if isinstance(now, tuple | list | set | frozenset | deque):
            return len(now) == len(seen) and all(self._same(a, b, depth - 1) for a, b in zip(now, seen, strict=True))
        if isinstance(now, types.FunctionType | types.MethodType | type) or not hasattr(now, "__dict__"):
            return bool(id(seen) not in self._met)
        return self._same(vars(now), vars(seen), depth - 1)

    def _looked_into(self, name: str, thing: Any) -> Iterator[tuple[str, Any]]:
        """What one thing holds itself: a dict, or (how to read values, their labels)."""
        if isinstance(thing, (*_PLAIN, Tensor, types.ModuleType)) or id(thing) in self._met:
            return
        self._met[id(thing)] = thing
        if isinstance(thing, dict):
            yield name, thing
        elif isinstance(thing, Mapping):
            yield name, (lambda: tuple(thing.values()), [*map(str, thing)])
        elif isinstance(thing, tuple | list | set | frozenset | deque):
            yield name, (lambda: tuple(thing), None)
        elif isinstance(thing, functools.partial):
            yield name, (lambda: (thing.func, thing.args, thing.keywords), None)
        elif isinstance(thing, types.MethodType):
            yield name, (lambda: (thing.__self__, thing.__func__), None)
        elif isinstance(thing, types.FunctionType):
            if not _still(thing.__module__):
                yield from _of_code(thing)
        elif isinstance(thing, property):
            yield name, (lambda: (thing.fget,), None)
        elif isinstance(thing, staticmethod | classmethod):
            yield name, (lambda: (thing.__func__,), None)
        elif isinstance(thing, type):
            for base in thing.__mro__:
                if not _still(base.__module__):
                    own = vars(base)
                    names = [n for n in own if n not in ("__dict__", "__weakref__", "__doc__", "_abc_impl")]
                    yield base.__name__, (functools.partial(_picked, own, names), names)
        elif type(thing).__module__ not in ("logging", "threading", "weakref", "random"):
            if hasattr(thing, "__dict__"):
                yield name, vars(thing)
            if not _still(type(thing).__module__):
                slots = [n for base in type(thing).__mro__ for n in _slots(base)]
                if slots:
                    yield name, (lambda: tuple(getattr(thing, n, None) for n in slots), slots)
            yield from self._looked_into(type(thing).__name__, type(thing))


@final
class _Reading:
    """Values that one thing holds: how to read them, and what they were."""

    def __init__(self, name: str, read: Callable[[], tuple[Any, ...]], labels: list[str] | None = None):
        self.name, self.read, self.labels = name, read, labels
        self.seen = read()

    def place(self, i: int) -> str:
        """The name of one of the values."""
        return f"{self.name}.{self.labels[i]}" if self.labels and i < len(self.labels) else self.name


def _picked(own: Mapping[str, Any], names: list[str]) -> tuple[Any, ...]:
    return tuple(map(own.get, names))


def _slots(kind: type) -> Iterable[str]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else [n for n in slots if n not in ("__dict__", "__weakref__")]


def _still(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _STILL


def _of_code(fn: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function sees besides its arguments: closure, defaults, attributes, and the globals that it names."""
    if fn.__closure__:
        cells = fn.__closure__
        yield fn.__name__, (lambda: tuple(map(_contents, cells)), list(fn.__code__.co_freevars))
    yield fn.__name__, (lambda: (fn.__code__.co_code, fn.__defaults__, fn.__kwdefaults__, fn.__dict__), None)
    named = _named(fn.__code__)
    present = [n for n in named if n in fn.__globals__]
    modules = [v for n in present if isinstance(v := fn.__globals__[n], types.ModuleType) and not _still(v.__name__)]
    yield fn.__module__, (functools.partial(_picked, fn.__globals__, present), present)
    for module in modules:
        used = [n for n in named if n in vars(module)]
        yield module.__name__, (functools.partial(_picked, vars(module), used), used)


def _named(code: types.CodeType) -> list[str]:
    """The names that code looks up beyond its locals, inner functions included."""
    inner = [n for c in code.co_consts if isinstance(c, types.CodeType) for n in _named(c)]
    return list(dict.fromkeys((*code.co_names, *inner)))


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # still empty
        return None
