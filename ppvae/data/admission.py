"""The columns of data in whatever people hold them: a column, a tuple, a list, a dict, a data set, its loader.

`admit` is the one door for training, evaluation, generation and `check`. It takes what has one meaning, as it is; what
has two, or none, is refused with the way to say which.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from ppvae.data.column_conversion import PAD, as_column
from ppvae.data.lazy import LazySplit
from ppvae.errors import DataError, UsageError


def admit(data: Any, name: str = "data", program: Callable[..., Any] | None = None) -> tuple[Any, ...]:
    """The columns of data, each a tensor or a split: the pair is called with a batch of each, `model(*batch)`.

    A tuple holds columns. A list holds columns where it holds tensors that cannot be rows, and rows where they cannot
    be columns; a dict and samples that are dicts name the arguments. A data set is read once, whole; of a loader the
    data set is taken. Numbers keep their precision.

    Args:
        program: the model, whose arguments say what a list or a dict means where that is open.

    >>> import numpy as np
    >>> [c.shape for c in admit((np.zeros((4, 3)), [0, 1, 0, 1]))]
    [torch.Size([4, 3]), torch.Size([4])]
    """
    if isinstance(data, DataLoader):
        return _from_loader(data, name, program)
    if isinstance(data, Dataset) and not isinstance(data, LazySplit):
        return _from_dataset(data, default_collate, name, program)
    if isinstance(data, PackedSequence):
        raise DataError(
            f"{name}: packed sequences: x, lengths = pad_packed_sequence(data, batch_first=True), and pass (x, lengths)"
        )
    if isinstance(data, Mapping):
        return _from_mapping(data, name, program)
    if isinstance(data, list):
        return _from_list(data, name, program)
    if isinstance(data, tuple):
        return _from_tuple(data, name)
    return (as_column(data, name),)


def check_batch_size(data: Any, batch_size: int) -> None:
    """Raises UsageError where data are a loader of batches of another size than those of training."""
    if isinstance(data, DataLoader) and data.batch_size != batch_size:
        raise UsageError(
            f"data: a DataLoader of batches of {data.batch_size}, but batch_size={batch_size}: pass "
            f"batch_size={data.batch_size} too, or loader.dataset"
        )


def _from_tuple(columns: Sequence[Any], name: str) -> tuple[Any, ...]:
    if not columns:
        raise UsageError(
            f"{name}: expected a tensor, a split, or a tuple of them; found an empty {type(columns).__name__}"
        )
    if len(columns) == 1:
        return (as_column(columns[0], name),)
    return tuple(as_column(column, f"{name}[{i}]") for i, column in enumerate(columns))


def _from_list(values: list[Any], name: str, program: Callable[..., Any] | None) -> tuple[Any, ...]:
    if values and not any(_is_column(v) for v in values):
        _check_not_one_nested_list(values, name)
        return (as_column(values, name),)
    shapes = [tuple(getattr(v, "shape", ())) for v in values]
    if values and not any(shapes):
        return (as_column(values, name),)
    if len(values) < 2 or not all(shapes) or len({shape[1:] for shape in shapes}) > 1:
        return _from_tuple(values, name)
    check_equal_lengths(shapes, name)
    required, most = argument_counts(program)
    if required <= 1 and most < len(values):
        return (as_column(values, name),)
    check_are_columns(required, shapes, name)
    return _from_tuple(values, name)


def _is_column(value: Any) -> bool:
    """Whether a value can be a column by itself: a tensor, an array, a table, and no list of numbers."""
    return isinstance(value, Tensor | LazySplit) or hasattr(value, "__array__") or hasattr(value, "toarray")


def check_equal_lengths(shapes: Sequence[tuple[int, ...]], name: str) -> None:
    """Raises DataError for a list of tensors that are alike but for their numbers of rows, as sequences are."""
    if len({shape[0] for shape in shapes}) > 1:
        lengths = ", ".join(str(shape[0]) for shape in shapes[:4]) + (", ..." if len(shapes) > 4 else "")
        raise DataError(
            f"{name}: a list of tensors of {lengths} rows: as columns they need as many each; if they are sequences, "
            f"{PAD}"
        )


def check_are_columns(required: int, shapes: Sequence[tuple[int, ...]], name: str) -> None:
    """Raises DataError for a list of tensors of one shape, unless the model needs so many that they are columns."""
    if required <= 1:
        raise DataError(
            f"{name}: a list of {len(shapes)} tensors of shape {list(shapes[0])} can hold columns or rows: pass a "
            f"tuple for columns of a batch, torch.stack(x) for rows; if they are sequences, {PAD}"
        )


def _check_not_one_nested_list(values: list[Any], name: str) -> None:
    if len(values) == 1 and isinstance(values[0], list) and values[0] and isinstance(values[0][0], list):
        raise UsageError(
            f"{name}: expected a tensor or a split, found a list that holds one nested list, which can be one datum or "
            "one column: pass torch.tensor(x) for the datum, torch.tensor(x[0]) for the column"
        )


def argument_counts(program: Callable[..., Any] | None) -> tuple[int, float]:
    """(how many columns a model must be called with, how many it can be called with); (0, inf) where nothing is known.

    >>> argument_counts(lambda x, lengths=None: None)
    (1, 2)
    """
    positional = _positional(program)
    if positional is None:
        return 0, math.inf
    return sum(p.default is p.empty for p in positional), len(positional)


def _parameters(program: Callable[..., Any] | None) -> list[inspect.Parameter] | None:
    """The arguments of a model; None where they are not known."""
    try:
        return None if program is None else list(inspect.signature(program).parameters.values())
    except (TypeError, ValueError):
        return None


def _positional(program: Callable[..., Any] | None) -> list[inspect.Parameter] | None:
    """The arguments that a model takes by position; None where they are not known or any number."""
    if isinstance(program, torch.nn.Module):
        program = program.forward
    parameters = _parameters(program)
    if parameters is None or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _from_mapping(data: Mapping[Any, Any], name: str, program: Callable[..., Any] | None) -> tuple[Any, ...]:
    """The columns of a dict: its one entry, or those that the model's arguments name, in their order."""
    if len(data) == 1:
        return _from_tuple(tuple(data.values()), name)
    names = [p.name for p in _positional(program) or ()]
    required, most = argument_counts(program)
    used = names[: len(data)]
    if names and set(used) == set(data) and required <= len(data) <= most:
        return tuple(as_column(data[key], f"{name}[{key!r}]") for key in used)
    by_name = [p.name for p in _parameters(program) or () if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if by_name:
        raise UsageError(
            f"{name}: the model takes {', '.join(by_name)} by name alone, and is called as model(*batch): leave out "
            "the * before them in model and guide"
        )
    wanted = f"; the model's arguments are {', '.join(names)}" if names else ""
    absent, further = ([repr(n) for n in a if n not in b] for a, b in ((names[:required], data), (data, names)))
    cure = "pass a tuple of its columns in the order of those arguments"
    if names and absent and len(data) < required:
        cure = f"add {', '.join(absent)}, or leave out the argument of model and guide"
    elif further and not absent and len(data) > most:
        cure = f"leave {', '.join(further)} out"
    raise UsageError(f"{name}: a dict with {', '.join(map(repr, data)) or 'nothing'}{wanted}: {cure}")


def column_names(data: Any, program: Callable[..., Any] | None) -> tuple[str, ...]:
    """The names of the columns of a dict, in the order in which the model takes them; none for other data.

    >>> column_names({"y": [1.0], "x": [2.0]}, lambda x, y: None)
    ('x', 'y')
    """
    if not isinstance(data, Mapping):
        return ()
    if len(data) == 1:
        return tuple(map(str, data))
    return tuple(p.name for p in _positional(program) or ())[: len(data)]


def check_argument_order(data: Any, model: Callable[..., Any], guide: Callable[..., Any]) -> None:
    """Raises UsageError where data with names would reach model and guide in different orders."""
    if not isinstance(data, Mapping) or len(data) == 1:
        return
    of_model, of_guide = ([p.name for p in _positional(side) or ()] for side in (model, guide))
    moved = [n for n in of_guide if n in of_model and of_guide.index(n) != of_model.index(n)]
    if moved:
        raise UsageError(
            f"data: a dict, whose entries reach model and guide by position: argument {moved[0]!r} is number "
            f"{of_model.index(moved[0]) + 1} of the model ({', '.join(of_model)}) and number "
            f"{of_guide.index(moved[0]) + 1} of the guide ({', '.join(of_guide)}). Give both one order"
        )


# -- data sets --------------------------------------------------------------------------------------------------------


def _from_loader(loader: DataLoader, name: str, program: Callable[..., Any] | None) -> tuple[Any, ...]:
    check_visits_every_row(loader, name)
    dataset = loader.dataset
    if isinstance(dataset, Dataset) and not isinstance(dataset, LazySplit):
        return _from_dataset(dataset, loader.collate_fn, name, program)
    if loader.collate_fn is default_collate and isinstance(dataset, Tensor | LazySplit):
        return (as_column(dataset, name),)
    return _from_samples(dataset, loader.collate_fn, name, program)


def check_visits_every_row(loader: DataLoader, name: str) -> None:
    """Raises UsageError where a loader leaves rows out or repeats them."""
    sampler = loader.sampler
    every = isinstance(sampler, SequentialSampler) or (
        isinstance(sampler, RandomSampler) and not sampler.replacement and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    )
    standard = type(loader.batch_sampler) in (type(None), torch.utils.data.BatchSampler)
    if isinstance(loader.dataset, IterableDataset):
        check_is_map_style(loader.dataset, name)
    if loader.batch_size is None:
        raise UsageError(
            f"{name}: a DataLoader with batch_size=None, whose samples can be batches or single data: pass "
            "loader.dataset where they are single data"
        )
    if not (every and standard):
        odd = sampler if standard else loader.batch_sampler
        raise UsageError(
            f"{name}: a DataLoader whose {type(odd).__name__} chooses rows: pass loader.dataset for each row once, or "
            "a torch.utils.data.Subset of it"
        )
    if loader.drop_last and len(loader.dataset) % (loader.batch_size or 1):  # type: ignore[arg-type]
        raise UsageError(f"{name}: a DataLoader with drop_last=True leaves rows out: pass loader.dataset for all rows")


def check_is_map_style(dataset: Any, name: str) -> None:
    """A data set has a length and items by number."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise UsageError(
            f"{name}: {type(dataset).__name__} has no rows by number: read it, and pass "
            "torch.utils.data.default_collate(list(dataset)), in tuple(...) where a sample has several columns"
        )


def _from_dataset(
    dataset: Any, collate: Callable[[list[Any]], Any], name: str, program: Callable[..., Any] | None
) -> tuple[Any, ...]:
    if isinstance(dataset, TensorDataset) and collate is default_collate:
        columns = _from_tuple(dataset.tensors, name)
        check_count_of_columns(columns, name, program)
        return columns
    return _from_samples(dataset, collate, name, program)


def _from_samples(
    dataset: Any, collate: Callable[[list[Any]], Any], name: str, program: Callable[..., Any] | None
) -> tuple[Any, ...]:
    """All samples of a map-style data set, put together as its loader would."""
    check_is_map_style(dataset, name)
    samples = [dataset[i] for i in range(len(dataset))]
    if not samples:
        raise DataError(f"{name}: expected at least one row, found an empty {type(dataset).__name__}")
    try:
        batch = collate(samples)
    except TypeError:
        raise DataError(
            f"{name}: samples that are no numbers ({type(samples[0]).__name__}): give the data set a transform, such "
            "as torchvision.transforms.ToTensor()"
        ) from None
    except (RuntimeError, ValueError):
        raise DataError(f"{name}: samples of different shapes: {PAD}, or give the DataLoader a collate_fn") from None
    _check_stays(collate([samples[0]]), collate([dataset[0]]), name)
    if isinstance(batch, Mapping):
        return _from_mapping(batch, name, program)
    columns = _from_tuple(tuple(batch), name) if isinstance(batch, list | tuple) else (as_column(batch, name),)
    check_count_of_columns(columns, name, program)
    return columns


def _check_stays(first: Any, again: Any, name: str) -> None:
    if not _same(first, again):
        read = "torch.utils.data.default_collate([dataset[i] for i in range(len(dataset))])"
        read = f"tuple({read})" if isinstance(first, list | tuple) else read
        raise UsageError(
            f"{name}: its samples change each time they are read, and log p(x) is one of fixed data: pass {read}, read "
            "once, or leave the random transform out"
        )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(((a == b) | (a != a)).all())
    if isinstance(a, Mapping):
        return all(_same(a[key], b[key]) for key in a)
    return all(_same(x, y) for x, y in zip(a, b, strict=True)) if isinstance(a, list | tuple) else True


def check_count_of_columns(columns: Sequence[Any], name: str, program: Callable[..., Any] | None) -> None:
    """Raises UsageError where the samples of a data set are more or fewer numbers than the model takes."""
    required, most = argument_counts(program)
    if not required <= len(columns) <= most:
        expected = f"{required}" if required == most else f"{required} to {most}"
        raise UsageError(
            f"{name}: samples of {len(columns)} columns, and the model takes {expected}: pass those that it takes, as "
            "torch.stack([dataset[i][0] for i in range(len(dataset))]) for the first"
        )
