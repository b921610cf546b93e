"""Pairs from the names of their factories: resolve a name, build the pair, rebuild that of a run."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ppvae.errors import CheckpointError, UsageError
from ppvae.errors.memory import explain_out_of_memory, memory_failure
from ppvae.factories.constructor_flags import Argument, as_kind, class_choice, constructor_arguments
from ppvae.factories.imports import add_to_import_path, import_named, import_place, portable_name
from ppvae.factories.user_code import admit_object, admit_place, code_of_run

DATA_ARGUMENT = "train"  # a factory's parameter of this name gets the training data
LABELS_ARGUMENT = "num_labels"  # the number of labels, None where batches have no labels
COLUMNS_ARGUMENT = "columns"  # the kinds of the columns of a table, None for other data
ROWS_OF_STORED = 10_000  # that a factory gets of data that are read from disk on demand
Factory = TypeVar("Factory", bound=Callable[..., Any])
SUPPLIED = (DATA_ARGUMENT, LABELS_ARGUMENT, COLUMNS_ARGUMENT)


def trained_with(objective: str) -> Callable[[Factory], Factory]:
    """Marks a factory whose pairs are trained with another objective than Trace_ELBO by default, by its name."""

    def mark(factory: Factory) -> Factory:
        vars(factory)["default_objective"] = objective
        return factory

    return mark


def resolve(text: str) -> Any:
    """The factory or pair of a name: "package.module:factory", "file.py:factory", or "file.py" with one factory.

    Raises:
        UsageError: it cannot be found or imported; the message names the nearest name.
    """
    place, _, name = text.partition(":")
    if name:
        return import_named(text, fresh=True)
    admit_place(place)
    found = _only_factory(import_place(place, fresh=True), place)
    admit_object(portable_name(place), found)
    return found


def _only_factory(module: Any, place: str) -> Any:
    if callable(getattr(module, "model", None)) and callable(getattr(module, "guide", None)):
        return module
    functions = [
        n for n, v in vars(module).items()
        if inspect.isfunction(v) and v.__module__ == module.__name__ and not n.startswith("_")
    ]  # fmt: skip
    if len(functions) == 1:
        return getattr(module, functions[0])
    raise UsageError(
        f"{place}: expected functions model and guide, or one factory; found {sorted(functions) or 'no function'}. "
        f"Name the factory, as in {place}:{functions[0] if functions else 'my_pair'}"
    )


def parameters(factory: Any) -> dict[str, Argument]:
    """A factory's own arguments: {name: (type, default, help)}; `inspect.Parameter.empty` where there is no default.

    Raises:
        UsageError: an argument has neither a type nor a default.
    """
    if not callable(factory) or _is_pair(factory):
        return {}
    arguments = constructor_arguments(factory, SUPPLIED)
    for name, (kind, _, _) in arguments.items():
        if kind is None:
            raise UsageError(f"{getattr(factory, '__name__', factory)}: expected a type for its argument {name!r}")
    return arguments


def build(
    factory: Any,
    given: Mapping[str, Any],
    train: Any,
    num_labels: int | None = None,
    columns: Sequence[Any] | None = None,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(model, guide) from a factory, or from something that has `.model` and `.guide` itself.

    An argument whose type is a `choices.ClassChoice` is {"name": the class, its arguments}. Of training data that stay
    on disk, a factory gets the first 10,000 rows as a tensor.

    Raises:
        UsageError: the factory fails, or makes no pair.
    """
    pair = factory
    if callable(factory) and not _is_pair(factory):
        kinds = parameters(factory)
        arguments = {n: _convert(n, v, kinds[n][0] if n in kinds else None) for n, v in given.items()}
        kinds_of_columns = [tuple(c) if isinstance(c, list) else c for c in columns] if columns else None
        if hasattr(train, "read") and not isinstance(train, Tensor):
            train = train.head(ROWS_OF_STORED).read(generator=torch.Generator().manual_seed(0))
        supplied = dict(zip(SUPPLIED, (train, num_labels, kinds_of_columns), strict=True))
        accepted = inspect.signature(factory).parameters
        try:
            pair = factory(**arguments, **{name: value for name, value in supplied.items() if name in accepted})
        except (UsageError, CheckpointError):  # of an argument; of a module that may not be imported
            raise
        except (Exception, SystemExit) as error:
            if memory_failure(error):
                sizes = ", ".join(_sizes(given))
                with explain_out_of_memory("building the pair", f"Lower its sizes ({sizes or 'none was given'})"):
                    raise
            name = getattr(factory, "__name__", factory)
            raise UsageError(f"{name}: the factory failed ({type(error).__name__}: {_one_line(error)})") from error
    if _is_pair(pair):
        return pair.model, pair.guide
    if isinstance(pair, tuple) and len(pair) == 2 and all(map(callable, pair)):
        return pair
    raise UsageError(
        f"{getattr(factory, '__name__', factory)}: expected (model, guide), or something with .model and .guide; "
        f"found {type(pair).__name__}"
    )


def _is_pair(thing: Any) -> bool:
    return (
        not isinstance(thing, type)
        and callable(getattr(thing, "model", None))
        and callable(getattr(thing, "guide", None))
    )


def rebuild(
    config: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    folder: Path | None = None,
    trust: bool = False,
    recorded: Sequence[str] | None = None,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The pair of a run from its configuration; a tensor of the same shape replaces the training data.

    That tensor only sets shapes: every parameter is read from the checkpoint afterwards. `dtype` is its floating type.
    `folder` is that of the run, whose code is run only if it is trusted and among the digests `recorded`, or with
    `trust`; the digests are those in `config` by default.

    Raises:
        UntrustedCodeError, CheckpointError: the run would run code that is not trusted, or that has changed.
    """
    entry = config["pair"]
    columns = [_placeholder(shape, getattr(torch, kind), dtype) for shape, kind in entry["train"]]
    train = columns[0] if len(columns) == 1 else tuple(columns)
    with code_of_run(folder, config, trust, recorded):
        add_to_import_path(entry.get("path", ()))
        torch.manual_seed(0)
        factory = resolve(entry["name"])
        return build(factory, entry["arguments"], train, entry.get("num_labels"), entry.get("columns"))


def _placeholder(shape: list[int], kind: torch.dtype, dtype: torch.dtype | None) -> Tensor:
    kind = dtype if dtype and kind.is_floating_point else kind
    return torch.full((), 0.5 if kind.is_floating_point else 0, dtype=kind).expand(shape)


def _convert(name: str, value: Any, kind: Any) -> Any:
    choice = class_choice(kind)
    return choice.build(value, name) if choice is not None and isinstance(value, Mapping) else as_kind(value, kind)


def _sizes(given: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The numbers among the arguments, those of chosen classes as `prior.components`, for a message."""
    out = []
    for name, value in given.items():
        if isinstance(value, Mapping):
            out += _sizes(value, f"{prefix}{name}.")
        elif isinstance(value, int | float | tuple | list) and not isinstance(value, bool):
            out.append(f"{prefix}{name} = {value}")
    return out


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
