"""Batch shapes of distributions: expanding parameters to them, and undoing that for a cheaper computation."""

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

Distribution = TypeVar("Distribution", bound=TorchDistribution)


class WithoutMoments(TorchDistribution):
    """A distribution that says where its mean, mode or variance has no closed form; a subclass defines those it has."""

    @property
    def mean(self) -> Tensor:
        raise no_closed_form(self, "mean")

    @property
    def mode(self) -> Tensor:
        raise no_closed_form(self, "mode")

    @property
    def variance(self) -> Tensor:
        raise no_closed_form(self, "variance")


class ParametricDistribution(WithoutMoments):
    """A distribution whose `expand` expands `parameter_dims`, {name: the event dims of a tensor; 0 of a distribution}.

    A subclass defines `_log_prob`, of a value that has been validated where validation is on.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    parameter_dims: ClassVar[dict[str, int]] = {}

    def expand(self: Distribution, batch_shape: Sequence[int], _instance: Any = None) -> Distribution:
        return expand_parameters(self, batch_shape, **self.parameter_dims)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self._log_prob(value)

    def _log_prob(self, value: Tensor) -> Tensor:
        raise NotImplementedError


def no_closed_form(fn: Any, moment: str) -> NotImplementedError:
    """The error for a mean, mode or variance without a closed form, with the cure.

    >>> from ppvae import priors
    >>> priors.LogisticNormal(3)().mean
    Traceback (most recent call last):
        ...
    NotImplementedError: LogisticNormalDistribution: its mean has no closed form; estimate it from .sample((1000,))
    """
    return NotImplementedError(
        f"{type(fn).__name__}: its {moment} has no closed form; estimate it from .sample((1000,))"
    )


def expand_parameters(fn: Distribution, batch_shape: Sequence[int], **event_dims: int) -> Distribution:
    """A shallow copy of a distribution with parameters expanded to a batch shape, given as name=its event dims."""
    new, shape = copy.copy(fn), torch.Size(batch_shape)
    for name, event_dim in event_dims.items():
        value: Any = getattr(fn, name)
        event = value.shape[value.dim() - event_dim :] if isinstance(value, Tensor) else torch.Size()
        setattr(new, name, value.expand(shape + event))
    new._batch_shape = shape
    return new


def collapse_expanded_dims(t: Tensor) -> Tensor:
    """The tensor with expanded dims (stride 0) at size one again, so that a function of it is computed once.

    >>> collapse_expanded_dims(torch.zeros(3).expand(100, 3)).shape
    torch.Size([1, 3])
    """
    for dim in range(t.dim()):
        if t.stride(dim) == 0 and t.shape[dim] > 1:
            t = t.narrow(dim, 0, 1)
    return t
