"""Concrete (Gumbel-softmax) distributions on the unit interval and on simplices, accurate at any logit."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from pyro.distributions import constraints
from torch import Tensor

from ppvae.distributions.batch_shape import ParametricDistribution
from ppvae.priors.simplex import SimplexBlocksConstraint


@final
class BinaryConcrete(ParametricDistribution):
    """A relaxed Bernoulli variable on (0, 1): z = sigmoid((logits + Logistic(0, 1)) / temperature).

    log p(z) = log t - softplus(d) - softplus(-d) - log z - log(1 - z), d = logits - t logit(z), t the temperature.
    Pyro's RelaxedBernoulli clips logits in sampling and overflows to -inf beyond logits of 88. Draws are clamped to
    [tiny, 1 - eps / 2], the numbers of the dtype strictly between 0 and 1.
    Source: Maddison et al. 2017 (arXiv 1611.00712); Jang et al. 2017 (arXiv 1611.01144).

    >>> BinaryConcrete(torch.tensor(1.0), torch.tensor(0.0)).log_prob(torch.tensor(0.3)).abs() < 1e-6
    tensor(True)
    """

    support = constraints.unit_interval
    has_rsample = True
    relaxes = True  # a stand-in for a discrete distribution
    parameter_dims: ClassVar[dict[str, int]] = {"logits": 0}

    def __init__(self, temperature: Tensor, logits: Tensor, validate_args: bool | None = None):
        self.temperature, self.logits = temperature, logits
        super().__init__(logits.shape, torch.Size(), validate_args=validate_args)

    @property
    def probs(self) -> Tensor:
        """Of the Bernoulli variable that is relaxed, P(z > 1/2); not the mean, which has no closed form."""
        return self.logits.sigmoid()

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = _clamp_to_open_unit_interval(torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device))
        logistic = noise.log() - torch.log1p(-noise)
        return _clamp_to_open_unit_interval(torch.sigmoid((self.logits + logistic) / self.temperature))

    def _log_prob(self, value: Tensor) -> Tensor:
        value = _clamp_to_open_unit_interval(value)
        log_z, log_rest = value.log(), torch.log1p(-value)
        d = self.logits - self.temperature * (log_z - log_rest)
        return self.temperature.log() - F.softplus(d) - F.softplus(-d) - log_z - log_rest


@final
class Concrete(ParametricDistribution):
    """Relaxed one-hot vectors, concatenated: each block z = softmax((logits + Gumbel) / temperature) on its simplex.

    Per block of C classes, log p(z) = log (C - 1)! + (C - 1) log t + sum_c (s_c - log z_c) - C logsumexp_c s_c,
    s = logits - t log z, with respect to the block's first C - 1 elements. `logits` are [..., variables, classes], the
    event shape is [variables * classes]. Pyro's RelaxedOneHotCategorical gives NaN where an element of a draw
    underflows; here elements are at least the smallest normal number of the dtype.
    Source: Maddison et al. 2017 (arXiv 1611.00712); Jang et al. 2017 (arXiv 1611.01144).

    >>> Concrete(torch.tensor(1.0), torch.zeros(1, 2)).log_prob(torch.tensor([0.3, 0.7])).abs() < 1e-6
    tensor(True)
    """

    has_rsample = True
    relaxes = True  # a stand-in for a discrete distribution
    parameter_dims: ClassVar[dict[str, int]] = {"logits": 2}

    def __init__(self, temperature: Tensor, logits: Tensor, validate_args: bool | None = None):
        self.temperature, self.logits = temperature, logits.log_softmax(-1)
        super().__init__(logits.shape[:-2], torch.Size([logits.shape[-2:].numel()]), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> Any:
        return SimplexBlocksConstraint(self.logits.shape[-1])

    @property
    def probs(self) -> Tensor:
        """Of the classes that are relaxed, as z has them, [..., variables * classes]; not the mean."""
        return self.logits.exp().flatten(-2)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.logits.shape
        noise = _clamp_to_open_unit_interval(torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device))
        gumbel = -(-noise.log()).log()
        return _clamp_to_positive(((self.logits + gumbel) / self.temperature).softmax(-1)).flatten(-2)

    def _log_prob(self, value: Tensor) -> Tensor:
        classes = self.logits.shape[-1]
        log_z = _clamp_to_positive(value.unflatten(-1, (-1, classes))).log()
        s = self.logits - self.temperature * log_z
        log_prob = (s - log_z).sum(-1) - classes * s.logsumexp(-1) + (classes - 1) * self.temperature.log()
        return (log_prob + math.lgamma(classes)).sum(-1)


def _clamp_to_open_unit_interval(z: Tensor) -> Tensor:
    """Clamps to the numbers of the dtype strictly between 0 and 1."""
    info = torch.finfo(z.dtype)
    return z.clamp(info.tiny, 1 - info.eps / 2)


def _clamp_to_positive(z: Tensor) -> Tensor:
    return z.clamp(min=torch.finfo(z.dtype).tiny)
