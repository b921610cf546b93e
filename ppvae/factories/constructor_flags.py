"""Arguments of constructors, read from signature and docstring, and choices of a class by its name in a module."""

import difflib
import functools
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from pyro.infer import ELBO

from ppvae.errors import UsageError
from ppvae.factories.imports import import_named

Argument = tuple[Any, Any, str]  # type, default (`inspect.Parameter.empty` where there is none), help


def constructor_arguments(function: Callable[..., Any], leave_out: Sequence[str] = ()) -> dict[str, Argument]:
    """The arguments of a function, class or classmethod: {name: (type, default, help)}.

    The type is the annotation, else the type of the default (int | float for int), else None. Help comes from the
    docstring; a classmethod's arguments may also be described in its class's docstring.

    >>> def pair(latent: int, hidden=(8,)):
    ...     '''A pair.
    ...
    ...     Args:
    ...         latent: the size of z.
    ...     '''
    >>> constructor_arguments(pair)["latent"][2], constructor_arguments(pair)["hidden"][:2]
    ('the size of z.', (<class 'tuple'>, (8,)))
    """
    import docstring_parser

    annotated: Any = function.__init__ if isinstance(function, type) else function  # type: ignore[misc]
    hints = typing.get_type_hints(annotated, include_extras=True)
    texts: dict[str, str] = {}
    for owner in (getattr(function, "__self__", None), function):
        for param in docstring_parser.parse(inspect.getdoc(owner) or "").params if owner is not None else ():
            texts |= {name.strip(): param.description or "" for name in param.arg_name.split(",")}
    out: dict[str, Argument] = {}
    for name, p in inspect.signature(function).parameters.items():
        if name in leave_out or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
            continue
        inferred: Any = None if p.default in (p.empty, None) else type(p.default)
        inferred = int | float if inferred is int else inferred
        out[name] = (hints.get(name, inferred), p.default, " ".join(texts.get(name, "").split()))
    return out


@final
@dataclass(frozen=True)
class ClassChoice:
    """Annotates an argument whose value is a class, chosen by its name on the command line.

    With `Annotated[Callable[..., Module], ClassChoice(("my.nets",), Module)]`, `--net NAME` chooses a class of
    `my.nets`, and `--net.ARGUMENT` sets an argument of its constructor; no list of names is kept. The function gets
    `functools.partial(class, **flags)`. A class whose constructor needs an argument that is neither a flag nor `given`
    is built by its first classmethod that needs none; `NAME.classmethod` chooses one by name. A class of the user's own
    is "file.py:Class" or "package.module:Class".

    Args:
        modules: the modules that are searched for a name, in order.
        kind: the base class of all choices.
        given: arguments that the function itself passes, which are therefore no flags.
        leave_out: classes that are no choice.
    """

    modules: tuple[str, ...]
    kind: type
    given: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()

    @property
    def classes(self) -> dict[str, type]:
        classes: dict[str, type] = {}
        for module in map(importlib.import_module, self.modules):
            for name in getattr(module, "__all__", None) or sorted(vars(module)):
                value = getattr(module, name)
                is_choice = name[0] != "_" and name not in self.leave_out
                if is_choice and isinstance(value, type) and issubclass(value, self.kind):
                    classes.setdefault(name, value)
        return {n: c for n, c in classes.items() if c is not self.kind and not inspect.isabstract(c)}

    def constructor(self, name: str, flag: str) -> Callable[..., Any]:
        """The class of that name, or the classmethod that builds it.

        Raises `UsageError`, naming the flag: no such class, with the nearest name; or no constructor takes flags alone.
        """
        place, colon, of_class = name.rpartition(":")
        of_class, _, method = of_class.partition(".")
        cls = self._own_class(f"{place}:{of_class}", flag) if colon else self._known_class(name, of_class, flag)
        others = {n: getattr(cls, n) for n, v in vars(cls).items() if isinstance(v, classmethod) and n[0] != "_"}
        if method and method not in others:
            raise UsageError(f"--{flag}: {of_class} has no classmethod {method!r} (of {sorted(others) or 'none'})")
        constructors = [others[method]] if method else [cls, *others.values()]
        required = [self._required_objects(constructor) for constructor in constructors]
        for constructor, names in zip(constructors, required, strict=True):
            if not names:
                return constructor
        raise UsageError(
            f"--{flag} {name}: its argument {required[0][0]!r} cannot be given on the command line; "
            f"make the part in Python, in a factory of your own"
        )

    def _known_class(self, name: str, of_class: str, flag: str) -> type:
        known = self.classes
        if of_class in known:
            return known[of_class]
        near = difflib.get_close_matches(of_class, known, 1, 0.5)
        hint = (
            f"; did you mean {near[0]!r}?"
            if near
            else f" (one of {', '.join(sorted(known))}; or of your own, file.py:Class)"
        )
        if name.endswith(".py"):
            hint = f"; a class of a file is named with it, as in {name}:MyClass"
        raise UsageError(f"--{flag}: no class {of_class!r} in {' or '.join(self.modules)}{hint}")

    def _own_class(self, name: str, flag: str) -> type:
        try:
            cls = import_named(name)
        except UsageError as error:
            raise UsageError(f"--{flag} {error}") from error
        expected = f"a class derived from {self.kind.__module__.partition('.')[0]}'s {self.kind.__name__}"
        if not (isinstance(cls, type) and issubclass(cls, self.kind)):
            found = f"the class {cls.__name__}" if isinstance(cls, type) else f"a {type(cls).__name__}"
            in_python = inspect.isfunction(cls) and self.kind is ELBO
            cure = ". In Python ppvae.fit(..., objective=function) takes it" if in_python else ""
            raise UsageError(f"--{flag} {name}: expected {expected}, found {found}{cure}")
        if inspect.isabstract(cls):
            missing = ", ".join(sorted(getattr(cls, "__abstractmethods__", ())))
            raise UsageError(f"--{flag} {name}: expected {expected} that defines {missing}, found it not defined")
        return cls

    def _required_objects(self, constructor: Callable[..., Any]) -> list[str]:
        """The required arguments that a command line cannot give."""
        return [
            n
            for n, (kind, default, _) in constructor_arguments(constructor, self.given).items()
            if default is inspect.Parameter.empty and not is_command_line_type(kind)
        ]

    def flags(self, constructor: Callable[..., Any]) -> dict[str, Argument]:
        flags = {
            n: (command_line_type(kind), default, text)
            for n, (kind, default, text) in constructor_arguments(constructor, self.given).items()
        }
        return {n: flag for n, flag in flags.items() if is_command_line_type(flag[0])}

    def build(self, value: Any, flag: str) -> Callable[..., Any]:
        """The constructor with its arguments, from {"name": ..., argument: ...}."""
        constructor = self.constructor(value["name"], flag)
        kinds = {n: kind for n, (kind, _, _) in self.flags(constructor).items()}
        return functools.partial(constructor, **{n: as_kind(v, kinds.get(n)) for n, v in value.items() if n != "name"})


def class_choice(kind: Any) -> ClassChoice | None:
    """The choice of an annotation, if it has one."""
    return next((m for m in getattr(kind, "__metadata__", ()) if isinstance(m, ClassChoice)), None)


def is_command_line_type(kind: Any) -> bool:
    """Whether a command line can give a value of a type: numbers, strings, booleans, and tuples of them.

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
    """The part of a type that a command line can give: of a union, the members that it can give, if there are any.

    >>> command_line_type(str | Callable[[int], int]), command_line_type(Callable[[int], int] | None)
    (<class 'str'>, collections.abc.Callable[[int], int] | None)
    """
    if typing.get_origin(kind) not in (typing.Union, types.UnionType) or is_command_line_type(kind):
        return kind
    members = tuple(k for k in typing.get_args(kind) if is_command_line_type(k))
    return typing.Union[members] if set(members) - {type(None)} else kind  # noqa: UP007  its members are known at run time


def as_kind(value: Any, kind: Any) -> Any:
    """A value read from JSON or flags, with a tuple in place of a list unless the type is a list.

    >>> as_kind([8, 8], float | tuple[int, ...]), as_kind([8], list[int])
    ((8, 8), [8])
    """
    if isinstance(value, list) and list not in (kind, typing.get_origin(kind)):
        return tuple(value)
    return value


def accepted_arguments(part: Callable[..., Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the known arguments that a constructor, or a partial one, accepts and does not have yet.

    >>> accepted_arguments(functools.partial(dict, a=1), {"a": 2})
    {}
    >>> accepted_arguments(lambda latent: 0, {"latent": 3, "net": None})
    {'latent': 3}
    """
    fixed = part.keywords if isinstance(part, functools.partial) else {}
    try:
        accepted = inspect.signature(part).parameters
    except ValueError:
        return {}
    return {n: v for n, v in known.items() if n in accepted and n not in fixed}
