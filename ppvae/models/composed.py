"""What models made of parts share: each part registers its parameters where it is called."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae.errors import ContractError, DataError
from ppvae.nn.conditional import call_with_context, takes_context
from ppvae.parameter_names import unique_name


class Composed(nn.Module):
    """A pair made of parts; a part that is called registers its parameters under a name unique to the object."""

    def __init__(self, name: str):
        super().__init__()
        self._name = unique_name(name)

    def _call(self, part: str, *args: Tensor, context: Tensor | None = None) -> Any:
        """What a part gives, by the name of the attribute; the context too if it declares one."""
        return self._part(part)(*args, context=context)

    def _part(self, part: str) -> Callable[..., Any]:
        """The call of a part that is registered now: a distribution that calls it does so outside the pair's run."""
        conditional = self.get_submodule(part)
        pyro.module(f"{self._name}.{part}", conditional)
        return partial(tried, conditional, "", name=f"{part}: ")


class Learned(nn.Module):
    """A part that gives a tensor, which is trained."""

    def __init__(self, value: Tensor):
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self) -> Tensor:
        return self.value


def tried(part: nn.Module, what: str = "", *args: Tensor, context: Tensor | None = None, name: str = "") -> Any:
    """What a part gives. ContractError, by the part and by `what` it was given, where it fails."""
    try:
        return call_with_context(part, *args, context=context)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, TypeError) as error:
        given = [f"{what} of {type_of(t)}" if what else type_of(t) for t in args]
        if context is not None and takes_context(part):
            given.append(f"a context of {type_of(context)}")
        what = " and ".join(given) or "nothing"
        text = " ".join(str(error).split())[:200]
        raise ContractError(f"{name}{type(part).__name__} does not take {what}: {text}") from error


def normal_of(fn: Any, part: str) -> Any:
    """The normal of independent dims that a part's distribution is. ContractError, by the part, for another."""
    base = getattr(fn, "base_dist", fn)
    if not isinstance(base, dist.Normal):
        raise ContractError(f"{part}: expected a normal with independent dims, found {type(base).__name__}")
    return base


def type_of(t: Tensor) -> str:
    """A tensor's type and shape as a message names them."""
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


def checked_counts(x: Tensor) -> Tensor:
    """The counts [batch, D] themselves. No value is read unless one is wrong, so that a step can be captured.

    Raises DataError for a number that is no count, and for a row in which nothing was counted, by the row.
    """
    if x.dim() != 2:
        raise DataError(f"x: expected rows of counts [batch, D], found {list(x.shape)}")
    counts = (x >= 0) & (x == x.floor())
    fine, rows = counts.all(-1) & (x.sum(-1) > 0), torch.arange(len(x), device=x.device)
    try:
        return x.index_select(0, torch.where(fine, rows, len(x)))  # a row that is wrong is looked for where none is
    except (IndexError, RuntimeError):
        if bool(fine.all()):
            raise
        row = int((~fine).nonzero()[0])
        if bool(counts[row].all()):
            raise DataError(f"x: expected a count in each row, found none at row {row} of the batch") from None
        column = int((~counts[row]).nonzero()[0])
        found = f"{x[row, column].item():g} at row {row} of the batch, column {column}"
        raise DataError(f"x: expected counts 0, 1, 2, ..., found {found}") from None
