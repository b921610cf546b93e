"""What is given beside the data, a label or features: written as numbers, and put beside a module's input."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ppvae.errors import DataError, UsageError


def _context_parameter(part: nn.Module) -> inspect.Parameter | None:
    return inspect.signature(part.forward).parameters.get("context")


def takes_context(part: nn.Module) -> bool:
    """Whether a module's call declares `context`."""
    return _context_parameter(part) is not None


def needs_context(part: nn.Module) -> bool:
    """Whether a module cannot do without a context: it declares one that has no default, or hands it on to such.

    >>> from ppvae import priors
    >>> needs_context(priors.StandardNormal(2)), needs_context(priors.ConditionalNormal.of_labels(10, latent=2))
    (False, True)
    """
    declared = _context_parameter(part)
    if declared is None:
        return False
    return declared.default is declared.empty or any(map(needs_context, part.children()))


def call_with_context(part: nn.Module, *args: Tensor, context: Tensor | None) -> Any:
    """The part's result, given the context if it declares one, and without it where there is none and it has a default.

    Raises `UsageError` where there is none and it has no default.
    """
    declared = _context_parameter(part)
    if declared is None or (context is None and declared.default is not declared.empty):
        return part(*args)
    if context is None:
        raise UsageError(
            f"{type(part).__name__}: expected a context, the batch's second tensor; found a batch of one tensor"
        )
    return part(*args, context=context)


class Labels(nn.Module):
    """Labels 0 .. classes - 1 [...] as one-hot vectors [..., classes].

    Raises DataError for a label outside the classes, naming its row, and for labels that are not whole numbers.
    Source: Sohn et al. 2015, Learning structured output representation using deep conditional generative models.

    >>> Labels(3)(torch.tensor([2, 0])).tolist()
    [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """

    table: Tensor

    def __init__(self, classes: int):
        super().__init__()
        self.register_buffer("table", torch.eye(classes), persistent=False)

    def forward(self, labels: Tensor) -> Tensor:
        return rows_of(self.table, labels, "labels: expected classes 0 to {last}").to(self.table)


def rows_of(table: Tensor, index: Tensor, expected: str, first: int = 0) -> Tensor:
    """The rows of a table [last - first + 1, *] at numbers `first` .. `last` [...]: [..., *].

    Raises DataError that begins with the words `expected` for numbers that it has no row for. No value is read unless
    one is wrong, so that a step can be captured.
    """
    last = first + len(table) - 1
    expected = expected.format(first=first, last=last)
    if index.is_floating_point():
        raise DataError(f"{expected} in whole numbers, found {index.dtype}")
    try:
        return table.index_select(0, index.reshape(-1) - first).reshape(*index.shape, *table.shape[1:])
    except (IndexError, RuntimeError):
        wrong = ((index < first) | (index > last)).nonzero()
        if not len(wrong):
            raise
        at = wrong[0].tolist()
        raise DataError(f"{expected}, found {int(index[tuple(at)])} at row {at[-1]} of the batch") from None


class ConcatContext(nn.Module):
    """Gives a module the batch's second tensor beside its input, module([x, of(context)]), on the last dim.

    Wraps a conditional, or a network. Leading dims of x [..., x] and of the features [..., features] broadcast.

    Args:
        module: takes [..., x + features].
        of: maps the context to features [..., features]: `Labels(classes)`; by default the context is features itself.
        event_dim: 1; for images [..., C, H, W] it is 3, and features are put beside the channels.

    Source: Sohn et al. 2015, Learning structured output representation using deep conditional generative models.

    >>> from ppvae import likelihoods
    >>> from ppvae.nn import mlp
    >>> part = ConcatContext(likelihoods.Bernoulli(mlp(8 + 10, 64)), of=Labels(10))
    >>> part(torch.zeros(5, 8), context=torch.arange(5)).shape()
    torch.Size([5, 64])
    """

    def __init__(self, module: nn.Module, of: nn.Module | None = None, event_dim: int = 1):
        super().__init__()
        self.module, self.of, self.event_dim = module, nn.Identity() if of is None else of, event_dim

    def forward(self, x: Tensor, *, context: Tensor) -> object:
        features = self.of(context)
        lead = torch.broadcast_shapes(x.shape[: x.dim() - self.event_dim], features.shape[:-1])
        x, space = x.expand(*lead, *x.shape[x.dim() - self.event_dim :]), x.shape[x.dim() - self.event_dim + 1 :]
        features = features.reshape(*features.shape, *(1,) * len(space)).expand(*lead, features.shape[-1], *space)
        return self.module(torch.cat([x, features.to(x.dtype)], -self.event_dim))
