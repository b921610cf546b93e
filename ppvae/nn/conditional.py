"""The protocol of conditionals: modules whose call returns a distribution, some of which are given a context."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from ppvae.errors import UsageError


def _declared(part: nn.Module) -> inspect.Parameter | None:
    return inspect.signature(part.forward).parameters.get("context")


def takes_context(part: nn.Module) -> bool:
    """Whether a module's call declares `context`."""
    return _declared(part) is not None


def needs_context(part: nn.Module) -> bool:
    """Whether a module cannot do without a context: it declares one that has no default, or hands it on to such.

    >>> from ppvae import priors
    >>> needs_context(priors.StandardNormal(2)), needs_context(priors.ConditionalNormal.of_labels(10, latent=2))
    (False, True)
    """
    declared = _declared(part)
    if declared is None:
        return False
    return declared.default is declared.empty or any(map(needs_context, part.children()))


def call_with_context(part: nn.Module, *args: Tensor, context: Tensor | None) -> Any:
    """The part's result, given the context if it declares one, and without it where there is none and it has a default.

    Raises `UsageError` where there is none and it has no default.
    """
    declared = _declared(part)
    if declared is None or (context is None and declared.default is not declared.empty):
        return part(*args)
    if context is None:
        raise UsageError(
            f"{type(part).__name__}: expected a context, the batch's second tensor; found a batch of one tensor"
        )
    return part(*args, context=context)
