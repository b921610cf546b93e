"""Autoregressive distributions, defined by a function that returns all conditionals in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from ppvae.distributions.batch_shape import ParametricDistribution, expand_parameters

Conditionals = Callable[[Tensor], TorchDistribution]


class Autoregressive(ParametricDistribution):
    """An autoregressive distribution, p(x) = prod_i p(x_i | x_<i), whose conditionals come from one call.

    `log_prob` calls `conditionals` once; `sample` is ancestral and calls it once for each element, in order.

    Args:
        conditionals: maps values [..., *event] to a factorised distribution over the event, in which the factor of an
            element depends on earlier elements only. Otherwise the result is not a density;
            `nn.sees_only_the_past` tests it.
        start: zeros [*batch, *event] with the dtype and device of the values.
        order: positions in the flattened event, from the first element to the last, [numel].
        support: the joint support of the factors; its event dims are those of one datum.

    Source: Germain et al. 2015 (arXiv 1502.03509).

    >>> from ppvae.distributions import Bernoulli
    >>> copying = lambda x: Bernoulli(logits=torch.stack([0 * x[..., 0], 50 * x[..., 0] - 25], -1)).to_event(1)
    >>> support = constraints.independent(constraints.boolean, 1)
    >>> x = Autoregressive(copying, torch.zeros(100, 2), torch.tensor([0, 1]), support).sample()
    >>> bool((x[:, 0] == x[:, 1]).all())
    True
    """

    def __init__(
        self,
        conditionals: Conditionals,
        start: Tensor,
        order: Tensor,
        support: Constraint,
        validate_args: bool | None = None,
    ):
        self.conditionals, self.start, self.order, self._support = conditionals, start, order, support
        batch = start.dim() - support.event_dim
        super().__init__(start.shape[:batch], start.shape[batch:], validate_args=validate_args)

    @constraints.dependent_property
    def support(self) -> Any:
        return self._support

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Autoregressive:
        return expand_parameters(self, batch_shape, start=self.event_dim)

    def log_prob(self, value: Tensor) -> Tensor:
        log_prob = self.conditionals(value).log_prob(value)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            x = self.start.expand(self._extended_shape(torch.Size(sample_shape))).clone()
            lead = x.shape[: x.dim() - self.event_dim]
            for i in self.order.tolist():
                x.view(*lead, -1)[..., i] = self.conditionals(x).sample().reshape(*lead, -1)[..., i]
            return x
