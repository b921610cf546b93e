"""The reader of columns: tensors or splits of equal length, read by rows, whole or in shuffled batches on a device."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ppvae.data.admission import admit, column_names
from ppvae.data.checks import check_rows_of_columns, digest, first_rows, validated
from ppvae.data.lazy import ImageFiles, LazySplit
from ppvae.errors import DataError, count_of
from ppvae.rng import derive_seed


def data_columns(
    data: Any, seed: int | None = None, name: str = "data", program: Callable[..., Any] | None = None
) -> tuple[Any, ...]:
    """The columns of data, admitted, checked and of equal length; with a `seed`, noise that a split redraws is drawn
    once. `program` is the model, whose arguments decide what lists and dicts mean (`admit`).

    Raises:
        UsageError: something that cannot be taken for data; DataError: other numbers of rows, or values not allowed.
    """
    given = admit(data, name, program)
    names = column_names(data, program) or range(len(given))
    columns: list[Any] = []
    for key, column in zip(names, given, strict=True):
        place = name if len(given) == 1 else f"{name}[{key!r}]"
        if seed is not None and getattr(column, "noise", None):
            column = column.fixed(seed)
        if isinstance(column, Tensor):
            column = validated(column, place)
        if len(column) != len(given[0]):
            raise DataError(
                f"{place}: expected {count_of(len(given[0]), 'row')} as in the first column, found {len(column)}"
            )
        columns.append(column)
    check_rows_of_columns(columns, name)
    return tuple(columns)


def read_rows(column: Any, rows: Tensor | None, device: torch.device) -> Tensor:
    """Some rows of a column, or all of them, as a plain tensor on a device; splits draw their noise, if any."""
    if hasattr(column, "read"):
        value = column.read(rows)
        if isinstance(column, LazySplit):  # files of whole numbers have no floating type of their own
            value = value.to(torch.get_default_dtype())
    else:
        value = column if rows is None else column[rows.to(column.device)]
    return value.to(device)


def as_single_batch(data: Any, seed: int, device: torch.device) -> tuple[Tensor, ...]:
    """All rows of checked data as one batch on a device."""
    return tuple(read_rows(column, None, device) for column in data_columns(data, seed))


def column_digests(columns: Sequence[Any]) -> list[str]:
    """The SHA-256 of each column."""
    return [c.digest if hasattr(c, "digest") else digest(c) for c in columns]


def data_digest(columns: Sequence[Any]) -> str:
    """The SHA-256 of the data of a result: that of the column, or of several columns' digests."""
    digests = column_digests(columns)
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


class DataLoader:
    """Shuffled batches of columns, in an `order` that is a function of seed and epoch.

    Columns in memory are moved to the device once, where they fit; images on disk are read ahead by torch's DataLoader.
    A split with noise redraws it at every read.
    """

    def __init__(self, data: Any, name: str, device: torch.device):
        self.device = device
        self.columns = tuple(
            _to_device(c, device) if isinstance(c, Tensor) and _fits(c, device) else c
            for c in data_columns(data, name=name)
        )

    def __len__(self) -> int:
        return len(self.columns[0])

    def check_shapes(self, other: DataLoader) -> None:
        """Raises DataError unless these data have the event shapes of `other`, the training data."""
        found, expected = ([list(c.shape[1:]) for c in loader.columns] for loader in (self, other))
        if found != expected:
            raise DataError(f"valid: expected data of shapes {expected} as in the training data, found {found}")

    @property
    def lazy(self) -> bool:
        """Whether some columns stay on disk."""
        return any(isinstance(column, LazySplit) for column in self.columns)

    def read(self, rows: Tensor) -> tuple[Tensor, ...]:
        first, *context = self.columns
        return read_rows(first, rows, self.device), *(self._read_context(c, rows) for c in context)

    def read_first(self, count: int) -> tuple[Tensor, ...]:
        """The rows on which a pair is inspected, among them one for every pattern of missing values."""
        return self.read(first_rows(self.columns, count))

    def read_all(self) -> tuple[Tensor, ...]:
        return tuple(read_rows(column, None, self.device) for column in self.columns)

    def order(self, batch_size: int, seed: int, epoch: int, num_ranks: int = 1) -> list[Tensor]:
        """The rows of each batch of one pass over the data, in an order that is a function of seed and epoch.

        A full batch keeps the order of the data.
        """
        generator = torch.Generator().manual_seed(derive_seed(seed, epoch, "order"))
        full = batch_size >= len(self)  # programs for full batches may have a parameter for each row
        draw = functools.partial(torch.randperm, generator=generator)
        order = list((torch.arange if full else draw)(len(self), device="cpu").split(batch_size))
        if len(order) > 1 and len(order[-1]) < 2 * num_ranks:  # batch norm needs two data at least
            order[-2:] = [torch.cat(order[-2:])]
        return order

    def batches(self, order: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        if any(isinstance(c, LazySplit) and isinstance(c.pictures, ImageFiles) for c in self.columns):
            yield from torch.utils.data.DataLoader(
                _RowsDataset(self), batch_sampler=[rows.tolist() for rows in order], collate_fn=lambda batch: batch
            )
        else:
            for rows in order:
                yield self.read(rows.to(self.device))

    def _read_context(self, column: Any, rows: Tensor) -> Tensor:
        """Rows of a column after the first; a single row that is expanded to all data stays one row in memory."""
        if isinstance(column, Tensor) and not hasattr(column, "read") and _is_expanded(column):
            return column[:1].clone().expand(len(rows), *column.shape[1:]).to(self.device)
        return read_rows(column, rows, self.device)


def _to_device(column: Tensor, device: torch.device) -> Tensor:
    """The column on a device; a single row that is expanded to all data is moved as one row."""
    return column[:1].to(device).expand(column.shape) if _is_expanded(column) else column.to(device)


def _is_expanded(column: Tensor) -> bool:
    return len(column) > 1 and column.stride(0) == 0


def _fits(values: Tensor, device: torch.device) -> bool:
    """Whether the data take less than half of the device's free memory."""
    return device.type != "cuda" or values.numel() * values.element_size() < torch.cuda.mem_get_info(device)[0] / 2


class _RowsDataset(torch.utils.data.Dataset):
    """The rows of a batch, read together by torch's DataLoader."""

    def __init__(self, loader: DataLoader):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, ...]:
        return self.loader.read(torch.tensor(rows))
