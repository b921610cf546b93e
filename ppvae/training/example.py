"""The batch that a run's pair is traced on as it is loaded: one row of the run's data, repeated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ppvae.data.loader import DataLoader
from ppvae.errors import CheckpointError
from ppvae.rng import derive_seed, fork_rng, seed_all

Shapes = Sequence[tuple[Sequence[int], str]]  # (shape, dtype) of each tensor of a batch, as config.json holds them


def read_example(train: DataLoader, whole: bool, seed: int) -> tuple[Tensor, ...]:
    """The first two rows of the training data, or the whole of them, the same for a seed: some draw noise as read."""
    with fork_rng():
        seed_all(derive_seed(seed, "example"))
        return train.read_all() if whole else train.read(torch.arange(2) % len(train))


def shapes_of(batch: Sequence[Tensor]) -> list[list[Any]]:
    """[shape, dtype] of each tensor of a batch."""
    return [[list(t.shape), str(t.dtype).removeprefix("torch.")] for t in batch]


def first_row(batch: Sequence[Tensor]) -> list[Tensor]:
    """A copy of the first row of each tensor, [1, ...], on the CPU."""
    return [t[:1].cpu().clone() for t in batch]


def batch_like(shapes: Shapes, row: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    """A batch of these shapes whose rows are all the given one, which the pair takes as it took the data.

    Zeros need not be data of the pair: a length, a count of a document or a modality of a datum may have to be
    positive. They stand in for the row in checkpoints that hold none, those of earlier versions.

    Raises:
        CheckpointError: the row is not one of such a batch.
    """
    if row is None:
        return tuple(torch.zeros(shape, dtype=getattr(torch, kind)) for shape, kind in shapes)
    expected, found = shapes_of([torch.empty(1, *s[1:], dtype=getattr(torch, k)) for s, k in shapes]), shapes_of(row)
    if found != expected:
        raise CheckpointError(f"the checkpoint's row of data: expected shapes {expected}, found {found}")
    return tuple(t.repeat(shape[0], *(1,) * (t.dim() - 1)) for t, (shape, _) in zip(row, shapes, strict=True))
