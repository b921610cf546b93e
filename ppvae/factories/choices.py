"""A constructor's arguments from its signature and docstring, and classes that are chosen by name from a module."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from ppvae.errors import UsageError

Argument = tuple[Any, Any, str]  # type, default (`inspect.Parameter.empty` where there is none), help


def arguments(function: Callable[..., Any], leave_out: Sequence[str] = ()) -> dict[str, Argument]:
    """The arguments of a function, class or classmethod: {name: (type, default, help)}.

    The type is the annotation, else that of the default, else None; of a whole number, any number. Help is what the
    docstring says, a classmethod's being completed by its class's.

    >>> def pair(latent: int, hidden=(8,)):
    ...     '''A pair.
    ...
    ...     Args:
    ...         latent: the size of z.
    ...     '''
    >>> arguments(pair)["latent"][2], arguments(pair)["hidden"][:2]
    ('the size of z.', (<class 'tuple'>, (8,)))
    """
    import docstring_parser

    hints = typing.get_type_hints(_function(function), include_extras=True)
    texts: dict[str, str] = {}
    for thing in (getattr(function, "__self__", None), function):
        for told in docstring_parser.parse(inspect.getdoc(thing) or "").params if thing is not None else ():
            texts |= {name.strip(): told.description or "" for name in told.arg_name.split(",")}
    found = {}
    for name, p in inspect.signature(function).parameters.items():
        if name in leave_out or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
            continue
        usual: Any = None if p.default in (p.empty, None) else type(p.default)
        usual = int | float if usual is int else usual
        found[name] = (hints.get(name, usual), p.default, " ".join(texts.get(name, "").split()))
    return found


def _function(thing: Callable[..., Any]) -> Any:
    return thing.__init__ if isinstance(thing, type) else thing  # type: ignore[misc]


@final
@dataclass(frozen=True)
class ClassChoice:
    """Annotates an argument that takes a class of some modules, by its name on the command line.

    `Annotated[Callable[..., Module], Among("my.nets", Module)]` makes `--net NAME` choose a class of `my.nets`, and the
    class's own arguments the flags `--net.ARGUMENT`; no list of names is kept. What is called by the function that has
    the argument is `functools.partial(the class, **the flags)`. Where a class cannot be made of flags and what it is
    given, its first classmethod that can be is taken; `NAME.classmethod` takes one by name.

    Args:
        modules: where names are looked up, the first that has it counts.
        kind: a class that all of them are subclasses of.
        given: arguments that the function gives by itself, which are therefore no flags.
    """

    modules: tuple[str, ...]
    kind: type
    given: tuple[str, ...] = ()

    @property
    def classes(self) -> dict[str, type]:
        """Every class that can be chosen, by name."""
        found: dict[str, type] = {}
        for module in map(importlib.import_module, self.modules):
            for name in getattr(module, "__all__", None) or sorted(vars(module)):
                value = getattr(module, name)
                if name[0] != "_" and isinstance(value, type) and issubclass(value, self.kind):
                    found.setdefault(name, value)
        return {n: c for n, c in found.items() if c is not self.kind and not inspect.isabstract(c)}

    def constructor(self, name: str, flag: str) -> Callable[..., Any]:
        """The class of that name, or the classmethod by which it can be made.

        Raises `UsageError`, by the name of the flag: there is none, with the nearest name; or it cannot be made here.
        """
        known = self.classes
        of_class, _, method = name.partition(".")
        if of_class not in known:
            near = difflib.get_close_matches(of_class, known, 1, 0.5)
            hint = f"; did you mean {near[0]!r}?" if near else f" (one of {', '.join(sorted(known))})"
            raise UsageError(f"--{flag}: no class {of_class!r} in {' or '.join(self.modules)}{hint}")
        cls = known[of_class]
        others = {n: getattr(cls, n) for n, v in vars(cls).items() if isinstance(v, classmethod) and n[0] != "_"}
        if method and method not in others:
            raise UsageError(f"--{flag}: {of_class} has no classmethod {method!r} (of {sorted(others) or 'none'})")
        choices = [others[method]] if method else [cls, *others.values()]
        lacking = [self._lacking(choice) for choice in choices]
        for choice, missing in zip(choices, lacking, strict=True):
            if not missing:
                return choice
        raise UsageError(
            f"--{flag} {name}: its argument {lacking[0][0]!r} cannot be given on the command line; "
            f"make the part in Python, in a factory of your own"
        )

    def _lacking(self, constructor: Callable[..., Any]) -> list[str]:
        told = arguments(constructor, self.given)
        return [
            n
            for n, (kind, default, _) in told.items()
            if default is inspect.Parameter.empty and not is_command_line_type(kind)
        ]

    def flags(self, constructor: Callable[..., Any]) -> dict[str, Argument]:
        """The constructor's own arguments that a command line can give."""
        told = {n: (command_line_type(kind), *rest) for n, (kind, *rest) in arguments(constructor, self.given).items()}
        return {n: (kind, default, text) for n, (kind, default, text) in told.items() if is_command_line_type(kind)}

    def chosen(self, value: Any, flag: str) -> Callable[..., Any]:
        """The constructor with its arguments, from {"name": ..., argument: ...}."""
        constructor = self.constructor(value["name"], flag)
        kinds = {n: kind for n, (kind, _, _) in self.flags(constructor).items()}
        own = {n: as_kind(v, kinds.get(n)) for n, v in value.items() if n != "name"}
        return functools.partial(constructor, **own)


def class_choice(kind: Any) -> ClassChoice | None:
    """What an annotation says of the names that it takes, if it does."""
    return next((m for m in getattr(kind, "__metadata__", ()) if isinstance(m, ClassChoice)), None)


def is_command_line_type(kind: Any) -> bool:
    """Whether a command line can give a value of a type: numbers, words, truth, and tuples of them.

    >>> is_command_line_type(float | Literal["learned"] | tuple[int, ...]), is_command_line_type(Callable[[int], int])
    (True, False)
    """
    origin = typing.get_origin(kind)
    if origin is Literal:
        return True
    if origin in (tuple, list, Sequence, typing.Union, types.UnionType):
        return all(k is Ellipsis or is_command_line_type(k) for k in typing.get_args(kind))
    return kind in (int, float, bool, str, type(None))


def command_line_type(kind: Any) -> Any:
    """What of a type a command line can give: of a union, the members that are words and numbers, if there are any.

    >>> command_line_type(str | Callable[[int], int]), command_line_type(Callable[[int], int] | None)
    (<class 'str'>, collections.abc.Callable[[int], int] | None)
    """
    if typing.get_origin(kind) not in (typing.Union, types.UnionType) or is_command_line_type(kind):
        return kind
    members = tuple(k for k in typing.get_args(kind) if is_command_line_type(k))
    return typing.Union[members] if set(members) - {type(None)} else kind  # noqa: UP007  of members found out now


def as_kind(value: Any, kind: Any) -> Any:
    """A value that has been JSON, which has no tuples, or flags, which have lists.

    >>> as_kind([8, 8], float | tuple[int, ...]), as_kind([8], list[int])
    ((8, 8), [8])
    """
    if isinstance(value, list) and list not in (kind, typing.get_origin(kind)):
        return tuple(value)
    return value


def accepted_arguments(part: Callable[..., Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the known arguments that a constructor (or a partial one) takes and does not have yet.

    >>> accepted_arguments(functools.partial(dict, a=1), {"a": 2})
    {}
    >>> accepted_arguments(lambda latent: 0, {"latent": 3, "net": None})
    {'latent': 3}
    """
    fixed = part.keywords if isinstance(part, functools.partial) else {}
    try:
        taken = inspect.signature(part).parameters
    except ValueError:
        return {}
    return {n: v for n, v in known.items() if n in taken and n not in fixed}
