"""Batches of a data set: an order that is a function of seed and epoch, on the device where the data fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ppvae import data as datasets
from ppvae.errors import DataError, UsageError
from ppvae.rng import derive_seed


class Columns:
    """Tensors or splits of equal length, read a batch at a time.

    In-memory data are moved to the device once; images left on disk are read ahead by a DataLoader.
    """

    def __init__(self, source: Any, name: str, device: torch.device):
        parts = tuple(source) if isinstance(source, list | tuple) else (source,)
        if not parts:
            raise UsageError(f"{name}: expected a tensor, a split, or a tuple of them; found an empty tuple")
        self.device = device
        self.parts: list[Any] = []
        for i, part in enumerate(parts):
            place = name if len(parts) == 1 else f"{name}[{i}]"
            if not isinstance(part, Tensor | datasets.LazySplit):
                raise UsageError(f"{place}: expected a tensor or a split, found {type(part).__name__}")
            if isinstance(part, Tensor):
                part = datasets.validated(part, place)
                part = _moved(part, device) if _fits(part, device) else part
            if len(part) != len(parts[0]):
                raise DataError(f"{place}: expected {len(parts[0])} rows as in the first tensor, found {len(part)}")
            self.parts.append(part)

    def __len__(self) -> int:
        return len(self.parts[0])

    def check_like(self, other: Columns) -> None:
        """Raises DataError unless these data have the shapes of others."""
        ours, theirs = ([list(p.shape[1:]) for p in c.parts] for c in (self, other))
        if ours != theirs:
            raise DataError(f"valid: expected data of shapes {theirs} as in the training data, found {ours}")

    @property
    def lazy(self) -> bool:
        """Whether some of the data stay on disk."""
        return any(isinstance(part, datasets.LazySplit) for part in self.parts)

    def read(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The rows of every column, on the device, with fresh noise where a split redraws its values."""
        return tuple(
            (part.read(rows) if hasattr(part, "read") else _taken(part, rows, i > 0)).to(self.device)
            for i, part in enumerate(self.parts)
        )

    def first(self, count: int) -> tuple[Tensor, ...]:
        """The rows on which a pair is looked at, with every gap that there is in the data."""
        return self.read(datasets.first_rows(self.parts, count))

    def whole(self) -> tuple[Tensor, ...]:
        """All rows, for a pair whose plate draws its own subsample."""
        return tuple((part.read() if hasattr(part, "read") else part).to(self.device) for part in self.parts)

    def batches(self, batch_size: int, seed: int, epoch: int, processes: int = 1) -> Iterator[tuple[Tensor, ...]]:
        """One pass over the data in an order that is a function of seed and epoch."""
        generator = torch.Generator().manual_seed(derive_seed(seed, epoch, "order"))
        order = list(torch.randperm(len(self), generator=generator).split(batch_size))
        if len(order) > 1 and len(order[-1]) < 2 * processes:  # batch norm cannot take a lone datum
            order[-2:] = [torch.cat(order[-2:])]
        if self.lazy:
            loader = torch.utils.data.DataLoader(
                _Read(self), batch_sampler=[rows.tolist() for rows in order], collate_fn=lambda batch: batch
            )
            yield from loader
        else:
            for rows in order:
                yield self.read(rows.to(self.device))


def _moved(column: Tensor, device: torch.device) -> Tensor:
    """A column on a device, one row that is expanded to all of it as such."""
    return column[:1].to(device).expand(column.shape) if _one_row(column) else column.to(device)


def _taken(column: Tensor, rows: Tensor, beside: bool) -> Tensor:
    """Some rows of a column; beside the data, one row that is expanded to all of it stays one in memory."""
    if beside and _one_row(column):
        return column[:1].clone().expand(len(rows), *column.shape[1:])
    return column[rows.to(column.device)]


def _one_row(column: Tensor) -> bool:
    return len(column) > 1 and column.stride(0) == 0


def _fits(values: Tensor, device: torch.device) -> bool:
    """Whether the data leave room on the device for the work itself."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return values.numel() * values.element_size() < free / 2


class _Read(torch.utils.data.Dataset):
    """Reads a batch's rows together, as a DataLoader asks for them."""

    def __init__(self, columns: Columns):
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns)

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, ...]:
        return self.columns.read(torch.tensor(rows))
