"""Distributions over vectors of discrete variables, whose joint values can be enumerated for exact summation."""

from collections.abc import Sequence
from typing import Any, ClassVar, final

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions.kl import kl_divergence, register_kl

from ppvae.distributions.batch_shape import ParametricDistribution

MAX_JOINT_VALUES = 1 << 16  # a vector with more joint values is not enumerated


def joint_values(values: Tensor, variables: int) -> Tensor:
    """All vectors of `variables` elements with the given values [classes]: [classes^variables, variables].

    Raises NotImplementedError for more than 65536 of them.
    """
    if len(values) ** variables > MAX_JOINT_VALUES:
        raise NotImplementedError(f"more than {MAX_JOINT_VALUES} joint values of {variables} variables")
    return torch.cartesian_prod(*[values] * variables).reshape(-1, variables)


def enumerated_values(values: Tensor, batch_shape: torch.Size, expand: bool) -> Tensor:
    """Values [n, *event] in the shape of `enumerate_support`: [n, *batch (ones unless expanded), *event]."""
    shape = torch.Size([len(values)] + [1] * len(batch_shape)) + values.shape[1:]
    return values.reshape(shape).expand(shape[:1] + batch_shape + values.shape[1:] if expand else shape)


@final
class DiscreteVector(dist.Independent):
    """Independent discrete variables as one vector, `to_event(1)` that can be enumerated.

    log p(z) = sum_v log p_v(z_v). `enumerate_support` returns all classes^variables joint values, so that Pyro
    (`config_enumerate`) and `terms` sum the vector out exactly; NotImplementedError beyond 65536 of them.

    >>> DiscreteVector(dist.Bernoulli(logits=torch.zeros(2)), 1).enumerate_support()
    tensor([[0., 0.],
            [0., 1.],
            [1., 0.],
            [1., 1.]])
    """

    @property
    def probs(self) -> Tensor:
        """Of each variable: [..., variables] of Bernoulli ones, [..., variables, classes] of categorical ones."""
        return self.base_dist.probs

    @property
    def has_enumerate_support(self) -> bool:
        classes = self.base_dist.enumerate_support(expand=False).numel()
        return classes ** self.event_shape.numel() <= MAX_JOINT_VALUES

    def enumerate_support(self, expand: bool = True) -> Tensor:
        values = self.base_dist.enumerate_support(expand=False).flatten()
        return enumerated_values(joint_values(values, self.event_shape.numel()), self.batch_shape, expand)


class OneHotBlocksConstraint(constraints.Constraint):
    """Concatenated one-hot vectors of the same length."""

    is_discrete = True
    event_dim = 1

    def __init__(self, classes: int):
        self.classes = classes
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        blocks = value.unflatten(-1, (-1, self.classes))
        return (((blocks == 0) | (blocks == 1)).all(-1) & (blocks.sum(-1) == 1)).all(-1)

    def __repr__(self) -> str:
        return f"one-hot vectors of {self.classes}"


@final
class OneHotVector(ParametricDistribution):
    """A distribution over vectors of classes [variables], with classes as concatenated one-hot vectors.

    log p(z) = log p_base(classes of z). Event shape [variables * classes], in floating point: a network takes it.

    >>> base = DiscreteVector(dist.Categorical(logits=torch.zeros(2, 3)), 1)
    >>> OneHotVector(base, 3, torch.float32).log_prob(torch.tensor([0.0, 1, 0, 0, 0, 1])).exp()
    tensor(0.1111)
    """

    parameter_dims: ClassVar[dict[str, int]] = {"base": 0}

    def __init__(self, base: Any, classes: int, dtype: torch.dtype, validate_args: bool | None = None):
        self.base, self.classes, self.dtype = base, classes, dtype
        event = torch.Size([base.event_shape.numel() * classes])
        super().__init__(base.batch_shape, event, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> Any:
        return OneHotBlocksConstraint(self.classes)

    @property
    def probs(self) -> Tensor:
        """Of each class, as z has them, [..., variables * classes]; NotImplementedError for dependent variables."""
        if not isinstance(self.base, DiscreteVector):
            raise NotImplementedError("the probabilities of dependent variables have no closed form")
        return self.base.probs.flatten(-2)

    @property
    def mean(self) -> Tensor:
        return self.probs

    @property
    def mode(self) -> Tensor:
        return self._to_one_hot(self.base.mode)

    @property
    def has_enumerate_support(self) -> bool:
        return self.base.has_enumerate_support

    def _to_one_hot(self, index: Tensor) -> Tensor:
        return F.one_hot(index, self.classes).to(self.dtype).flatten(-2)

    def _log_prob(self, value: Tensor) -> Tensor:
        return self.base.log_prob(value.unflatten(-1, (-1, self.classes)).argmax(-1))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self._to_one_hot(self.base.sample(torch.Size(sample_shape)))

    def enumerate_support(self, expand: bool = True) -> Tensor:
        return self._to_one_hot(self.base.enumerate_support(expand))


@register_kl(OneHotVector, OneHotVector)
def _kl_one_hot(p: OneHotVector, q: OneHotVector) -> Tensor:
    return kl_divergence(p.base, q.base)
