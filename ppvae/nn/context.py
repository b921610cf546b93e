"""Contexts, such as labels or features: which modules take one, and how one is concatenated to an input."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ppvae.errors import DataError, UsageError
from ppvae.errors.ranges import SEED, check_numbers


def _context_parameter(part: nn.Module) -> inspect.Parameter | None:
    return _context_of(getattr(part.forward, "__func__", part.forward))


@functools.lru_cache(maxsize=256)  # a signature takes longer than a small part does
def _context_of(function: Callable[..., Any]) -> inspect.Parameter | None:
    return inspect.signature(function).parameters.get("context")


def takes_context(part: nn.Module) -> bool:
    """Whether the `forward` of a module declares `context`."""
    return _context_parameter(part) is not None


def needs_context(part: nn.Module) -> bool:
    """Whether a module requires a context: it, or a submodule that it passes the context to, declares no default.

    >>> from ppvae import priors
    >>> needs_context(priors.StandardNormal(2)), needs_context(priors.ConditionalNormal.of_labels(10, latent=2))
    (False, True)
    """
    declared = _context_parameter(part)
    if declared is None:
        return False
    return declared.default is declared.empty or any(map(needs_context, part.children()))


def call_with_context(part: nn.Module, *args: Tensor, context: Tensor | None) -> Any:
    """Calls a module, with the context if its `forward` declares one (a default may stand in for None).

    Raises `UsageError` for a context of None where there is no default.
    """
    declared = _context_parameter(part)
    if declared is None or (context is None and declared.default is not declared.empty):
        return part(*args)
    if context is None:
        raise UsageError(
            f"{type(part).__name__}: expected a context, the batch's second tensor; found a batch of one tensor: "
            f"pass (x, labels), or --labels or --context on the command line"
        )
    return part(*args, context=context)


class Labels(nn.Module):
    """Labels 0 .. classes - 1 [...] as one-hot vectors [..., classes].

    Raises DataError for a label outside the classes, by its row, and for labels that are not integers.
    Source: Sohn et al. 2015, Learning structured output representation using deep conditional generative models.

    >>> Labels(3)(torch.tensor([2, 0])).tolist()
    [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """

    def __init__(self, classes: int):
        check_numbers(classes=classes)
        super().__init__()
        self.table = nn.Buffer(torch.eye(classes), persistent=False)

    def forward(self, labels: Tensor) -> Tensor:
        return rows_of(self.table, labels, "labels: expected classes 0 to {last}").to(self.table)


def rows_of(table: Tensor, index: Tensor, expected: str, first: int = 0) -> Tensor:
    """Rows of a table [last - first + 1, *] selected by indices `first` .. `last` [...]: [..., *].

    Raises DataError, with the text `expected`, for an index outside. No value is read on the host unless an index is
    wrong, so that a step can be captured as a graph.
    """
    SEED.check_number("first", first)
    last = first + len(table) - 1
    expected = expected.format(first=first, last=last)
    if index.is_floating_point():
        cure = ".nan_to_num(nan=-1).long()" if first < 0 else ".long()"
        raise DataError(
            f"{expected} in whole numbers, found {index.dtype}: pass it with {cure} (of an array or a Series y, "
            f"torch.tensor(numpy.asarray(y)){cure})"
        )
    try:
        return table.index_select(0, index.reshape(-1) - first).reshape(*index.shape, *table.shape[1:])
    except (IndexError, RuntimeError):
        wrong = ((index < first) | (index > last)).nonzero()
        if not len(wrong):
            raise
        at = wrong[0].tolist()
        raise DataError(f"{expected}, found {int(index[tuple(at)])} at row {at[-1]} of the batch") from None


class ConcatContext(nn.Module):
    """Concatenates the context to the input of a conditional or a network, module([x, of(context)]), on the last dim.

    The leading dims of x [..., x] and of the features [..., features] broadcast.

    Args:
        module: takes [..., x + features].
        of: maps the context to features [..., features], such as `Labels(classes)`; the identity by default.
        event_dim: 1, or 3 for images [..., C, H, W], where features become further channels.

    Source: Sohn et al. 2015, Learning structured output representation using deep conditional generative models.

    >>> from ppvae import likelihoods
    >>> from ppvae.nn import mlp
    >>> part = ConcatContext(likelihoods.Bernoulli(mlp(8 + 10, 64)), of=Labels(10))
    >>> part(torch.zeros(5, 8), context=torch.arange(5)).shape()
    torch.Size([5, 64])
    """

    def __init__(self, module: nn.Module, of: nn.Module | None = None, event_dim: int = 1):
        check_numbers(event_dim=event_dim)
        super().__init__()
        self.module, self.of, self.event_dim = module, nn.Identity() if of is None else of, event_dim

    def forward(self, x: Tensor, *, context: Tensor) -> object:
        features = self.of(context)
        lead = torch.broadcast_shapes(x.shape[: x.dim() - self.event_dim], features.shape[:-1])
        x, space = x.expand(*lead, *x.shape[x.dim() - self.event_dim :]), x.shape[x.dim() - self.event_dim + 1 :]
        features = features.reshape(*features.shape, *(1,) * len(space)).expand(*lead, features.shape[-1], *space)
        return self.module(torch.cat([x, features.to(x.dtype)], -self.event_dim))
