"""Pairs by name: a factory function in a module or a file, its arguments from its signature."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import docstring_parser
import torch
from torch import Tensor

from ppvae.errors import UsageError

DATA_ARGUMENT = "train"  # a factory's parameter of this name gets the training data


def resolve(text: str) -> Any:
    """What a pair's name stands for: "package.module:factory", "file.py:factory", or "file.py" with one factory.

    Raises:
        UsageError: it cannot be found or imported; the message names the nearest name.
    """
    place, _, name = text.partition(":")
    module = _module(place)
    if not name:
        return _only(module, place)
    if not hasattr(module, name):
        near = difflib.get_close_matches(name, [n for n in vars(module) if not n.startswith("_")], 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"{text}: {place} has no {name!r}{hint}")
    return getattr(module, name)


def _module(place: str) -> Any:
    path = Path(place)
    try:
        if path.suffix == ".py" or path.exists():
            if not path.is_file():
                raise UsageError(f"{place}: expected a Python file, found none")
            spec = importlib.util.spec_from_file_location(f"ppvae_pair_{path.stem}", path.resolve())
            if spec is None or spec.loader is None:
                raise UsageError(f"{place}: expected a Python file")
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            sys.path.insert(0, str(path.resolve().parent))
            try:
                spec.loader.exec_module(module)
            finally:
                sys.path.pop(0)
            return module
        return importlib.import_module(place)
    except UsageError:
        raise
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{place}: could not be imported ({error}). Give a file, as in pairs.py:my_pair, or an importable module, "
            f"as in ppvae.models:vae"
        ) from error
    except (Exception, SystemExit) as error:
        raise UsageError(f"{place}: could not be imported ({type(error).__name__}: {_line(error)})") from error


def _only(module: Any, place: str) -> Any:
    if callable(getattr(module, "model", None)) and callable(getattr(module, "guide", None)):
        return module
    own = [
        n for n, v in vars(module).items()
        if inspect.isfunction(v) and v.__module__ == module.__name__ and not n.startswith("_")
    ]  # fmt: skip
    if len(own) == 1:
        return getattr(module, own[0])
    raise UsageError(
        f"{place}: expected functions model and guide, or one factory; found {sorted(own) or 'no function'}. "
        f"Name the factory, as in {place}:{own[0] if own else 'my_pair'}"
    )


def parameters(factory: Any) -> dict[str, tuple[Any, Any, str]]:
    """A factory's own arguments: {name: (type, default, help)}; `inspect.Parameter.empty` where there is no default.

    Raises:
        UsageError: an argument has neither a type nor a default.
    """
    if not callable(factory) or _is_pair(factory):
        return {}
    hints = typing.get_type_hints(factory if inspect.isroutine(factory) else factory.__init__)
    texts = {p.arg_name: p.description or "" for p in docstring_parser.parse(inspect.getdoc(factory) or "").params}
    found = {}
    for name, p in inspect.signature(factory).parameters.items():
        if name == DATA_ARGUMENT or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
            continue
        kind = hints.get(name, type(p.default) if p.default not in (p.empty, None) else None)
        if kind is None:
            raise UsageError(f"{getattr(factory, '__name__', factory)}: expected a type for its argument {name!r}")
        found[name] = (kind, p.default, texts.get(name, ""))
    return found


def build(factory: Any, arguments: Mapping[str, Any], train: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(model, guide) from a factory, or from something that has `.model` and `.guide` itself."""
    made = factory
    if callable(factory) and not _is_pair(factory):
        given = dict(arguments)
        if DATA_ARGUMENT in inspect.signature(factory).parameters:
            given[DATA_ARGUMENT] = train
        try:
            made = factory(**given)
        except (Exception, SystemExit) as error:
            name = getattr(factory, "__name__", factory)
            raise UsageError(f"{name}: the factory failed ({type(error).__name__}: {_line(error)})") from error
    if _is_pair(made):
        return made.model, made.guide
    if isinstance(made, tuple) and len(made) == 2 and all(map(callable, made)):
        return made
    raise UsageError(
        f"{getattr(factory, '__name__', factory)}: expected (model, guide), or something with .model and .guide; "
        f"found {type(made).__name__}"
    )


def _is_pair(thing: Any) -> bool:
    return (
        not isinstance(thing, type)
        and callable(getattr(thing, "model", None))
        and callable(getattr(thing, "guide", None))
    )


def rebuild(config: Mapping[str, Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The pair of a run, from its configuration; the training data are stood in for by their shape.

    The stand-in only sets shapes: every parameter is then read from the checkpoint.
    """
    entry = config["pair"]
    factory = resolve(entry["name"])
    kinds = parameters(factory)
    arguments = {n: _as_kind(v, kinds[n][0]) if n in kinds else v for n, v in entry["arguments"].items()}
    stand_in = [_stand_in(shape, dtype) for shape, dtype in entry["train"]]
    torch.manual_seed(0)
    return build(factory, arguments, stand_in[0] if len(stand_in) == 1 else tuple(stand_in))


def _stand_in(shape: list[int], dtype: str) -> Tensor:
    kind = getattr(torch, dtype)
    return torch.full((), 0.5 if kind.is_floating_point else 0, dtype=kind).expand(shape)


def _as_kind(value: Any, kind: Any) -> Any:
    """JSON has no tuples."""
    if isinstance(value, list) and (kind is tuple or typing.get_origin(kind) is tuple):
        return tuple(value)
    return value


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
