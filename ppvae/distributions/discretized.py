"""Distributions over equally spaced levels: categorical, discretised logistic, mixtures of discretised logistics."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

from ppvae.distributions.batch_shape import ParametricDistribution
from ppvae.distributions.constraints import EquallySpacedLevels
from ppvae.errors.ranges import check_numbers


def check_levels(levels: int) -> int:
    """A number of levels, if it is at least 2; UsageError otherwise."""
    check_numbers(levels=levels)
    return levels


class Levels(ParametricDistribution):
    """A categorical distribution over L levels 0, top / (L - 1), ..., top, p(k top / (L - 1)) = softmax(logits)_k.

    Raises ValueError for a value that is not a level, where validation is on.

    Args:
        logits: [*batch, L].
        top: the highest level; 1 for pixels scaled to [0, 1], L - 1 for whole numbers.

    >>> Levels(torch.zeros(256)).log_prob(torch.tensor([0.0, 7 / 255, 1.0]))
    tensor([-5.5452, -5.5452, -5.5452])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"logits": constraints.real_vector}
    parameter_dims: ClassVar[dict[str, int]] = {"logits": 1}

    def __init__(self, logits: Tensor, top: float = 1.0, validate_args: bool | None = None):
        if logits.shape[-1] < 2:
            raise ValueError(f"logits: expected at least 2 levels in the last dim, found {logits.shape[-1]}")
        self.logits, self.top = logits, top
        super().__init__(logits.shape[:-1], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Any:
        return EquallySpacedLevels(self.logits.shape[-1], self.top)

    @property
    def probs(self) -> Tensor:
        """The mass of each level, [*batch, L]."""
        return self.logits.softmax(-1)

    @property
    def mean(self) -> Tensor:
        count = self.logits.shape[-1]
        levels = torch.linspace(0, self.top, count, dtype=self.logits.dtype, device=self.logits.device)
        return self.probs @ levels

    @property
    def mode(self) -> Tensor:
        return self.logits.argmax(-1) * (self.top / (self.logits.shape[-1] - 1))

    def _log_prob(self, value: Tensor) -> Tensor:
        count = self.logits.shape[-1]
        index = (value * ((count - 1) / self.top)).round().long()
        shape = torch.broadcast_shapes(self.batch_shape, index.shape)
        selected = self.logits.expand(*shape, count).gather(-1, index.expand(shape).unsqueeze(-1)).squeeze(-1)
        return selected - self.logits.logsumexp(-1)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            categorical = torch.distributions.Categorical(logits=self.logits, validate_args=False)
            index = categorical.sample(torch.Size(sample_shape))
            return index.to(self.logits.dtype) * (self.top / (self.logits.shape[-1] - 1))


def discretized_logistic_log_prob(value: Tensor, loc: Tensor, log_scale: Tensor, levels: int) -> Tensor:
    """The log-mass of a logistic in the bin of a level; the two end bins are unbounded. Accurate in both tails.

    With a, b the ends of the bin in units of the scale, sigma(a) - sigma(b) = sigma(a) sigma(-b) (1 - e^-(a - b)); at
    the lowest level sigma(b) = 0, at the highest sigma(a) = 1.
    """
    largest, half = torch.finfo(log_scale.dtype).max, 0.5 / (levels - 1)
    # scales are clamped at e^-66 (float32): the masses are the same, and nothing overflows
    per_scale = torch.exp((-log_scale).clamp(max=0.75 * math.log(largest)))
    highest, lowest = (value > 1 - half).to(log_scale.dtype), (value < half).to(log_scale.dtype)
    above = (value + half - loc) * per_scale + highest * (largest / 2)
    below = (value - half - loc) * per_scale - lowest * (largest / 2)
    width = torch.log(-torch.expm1(-(2 * half * per_scale).clamp(min=torch.finfo(log_scale.dtype).tiny)))
    return (1 - lowest - highest) * width - F.softplus(-above, threshold=40) - F.softplus(below, threshold=40)


def _discretized_logistic_mean(loc: Tensor, log_scale: Tensor, levels: int) -> Tensor:
    """sum_k P(x >= level k) / (levels - 1), k from 1."""
    per_scale, step = torch.exp(-log_scale), 1 / (levels - 1)
    mean = torch.zeros_like(loc)
    for k in range(1, levels):
        mean = mean + step * torch.sigmoid((loc - (k - 0.5) * step) * per_scale)
    return mean


def _sample_discretized_logistic(loc: Tensor, log_scale: Tensor, levels: int) -> Tensor:
    """A logistic draw, rounded to its level."""
    info = torch.finfo(loc.dtype)
    u = torch.rand_like(loc).clamp(info.tiny, 1 - info.eps)
    x = loc + log_scale.exp() * torch.logit(u)
    return (x * (levels - 1)).round().clamp(0, levels - 1) / (levels - 1)


class DiscretizedLogistic(ParametricDistribution):
    """A logistic distribution in L bins around the levels 0, 1 / (L - 1), ..., 1.

    p(x) = sigma((x + h - loc) / s) - sigma((x - h - loc) / s), h = 1 / (2 (L - 1)), s = exp(log_scale); the two end
    bins are unbounded, so that it sums to one. loc and s are in units of the data. Raises ValueError for a value that
    is not a level, where validation is on.

    Source: Kingma et al. 2016 (arXiv 1606.04934), appendix; Salimans et al. 2017 (arXiv 1701.05517) on the end bins.

    >>> fn = DiscretizedLogistic(torch.tensor(0.5), torch.tensor(-2.0), levels=3)
    >>> fn.log_prob(torch.tensor([0.0, 0.5, 1.0])).exp()
    tensor([0.1362, 0.7276, 0.1362])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"loc": constraints.real, "log_scale": constraints.real}
    parameter_dims: ClassVar[dict[str, int]] = {"loc": 0, "log_scale": 0}

    def __init__(self, loc: Tensor, log_scale: Tensor, levels: int = 256, validate_args: bool | None = None):
        self.loc, self.log_scale = torch.broadcast_tensors(loc, log_scale)
        self.levels = check_levels(levels)
        super().__init__(self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Any:
        return EquallySpacedLevels(self.levels)

    @property
    def mean(self) -> Tensor:
        return _discretized_logistic_mean(self.loc, self.log_scale, self.levels)

    @property
    def probs(self) -> Tensor:
        """The mass of each level, [*batch, L]."""
        levels = torch.linspace(0, 1, self.levels, dtype=self.loc.dtype, device=self.loc.device)
        return self._log_prob(levels.reshape(-1, *(1 for _ in self.batch_shape))).exp().movedim(0, -1)

    @property
    def mode(self) -> Tensor:
        """The level next to loc, or an end bin, which is unbounded, where it has more mass."""
        nearest = (self.loc * (self.levels - 1)).round().clamp(0, self.levels - 1) / (self.levels - 1)
        candidates = torch.stack([nearest, torch.zeros_like(nearest), torch.ones_like(nearest)])
        return candidates.gather(0, self._log_prob(candidates).argmax(0, keepdim=True)).squeeze(0)

    def _log_prob(self, value: Tensor) -> Tensor:
        return discretized_logistic_log_prob(value, self.loc, self.log_scale, self.levels)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            return _sample_discretized_logistic(self.loc.expand(shape), self.log_scale.expand(shape), self.levels)


class MixtureOfDiscretizedLogistics(ParametricDistribution):
    """Pixels of C coupled channels, each a mixture of M discretised logistics: an event [C, P] of P pixels.

    p(x) = prod_p sum_m softmax(logits)_mp prod_c DL(x_cp; loc_mcp + sum_{j<c} coupling_mcjp x_jp, log_scale_mcp).
    The mixture is over pixels; the location of a channel is linear in the previous channels. Raises ValueError for a
    value that is not a level, where validation is on.

    Args:
        logits: [*batch, M, P].
        loc, log_scale: [*batch, M, C, P], in units of the data.
        coupling: [*batch, M, C (C - 1) / 2, P]: of channel 1 with 0, 2 with 0, 2 with 1, ...
        event_shape: the shape of the C * P elements of one datum, channels outermost; [C, P] by default.

    Source: Salimans et al. 2017 (arXiv 1701.05517), equations 1-3.

    >>> fn = MixtureOfDiscretizedLogistics(
    ...     torch.zeros(5, 4), torch.zeros(5, 3, 4), torch.zeros(5, 3, 4), torch.zeros(5, 3, 4), event_shape=(3, 2, 2)
    ... )
    >>> fn.sample().shape, fn.log_prob(torch.zeros(7, 3, 2, 2)).shape
    (torch.Size([3, 2, 2]), torch.Size([7]))
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "logits": constraints.independent(constraints.real, 2),
        "loc": constraints.independent(constraints.real, 3),
        "log_scale": constraints.independent(constraints.real, 3),
        "coupling": constraints.independent(constraints.real, 3),
    }
    parameter_dims: ClassVar[dict[str, int]] = {"logits": 2, "loc": 3, "log_scale": 3, "coupling": 3}

    def __init__(
        self,
        logits: Tensor,
        loc: Tensor,
        log_scale: Tensor,
        coupling: Tensor,
        levels: int = 256,
        event_shape: Sequence[int] | None = None,
        validate_args: bool | None = None,
    ):
        channels, pixels = loc.shape[-2:]
        event = torch.Size((channels, pixels) if event_shape is None else event_shape)
        if event.numel() != channels * pixels:
            raise ValueError(f"event_shape: expected {channels} channels of {pixels} pixels, found {list(event)}")
        self.logits, self.loc, self.log_scale, self.coupling = logits, loc, log_scale, coupling
        self.levels = check_levels(levels)
        super().__init__(logits.shape[:-2], event, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True)
    def support(self) -> Any:
        return constraints.independent(EquallySpacedLevels(self.levels), self.event_dim)

    @property
    def mean(self) -> Tensor:
        """The mean, for one channel; NotImplementedError for coupled channels."""
        if self.loc.shape[-2] > 1:
            raise NotImplementedError("the mean of coupled channels has no closed form")
        component_means = _discretized_logistic_mean(self.loc.squeeze(-2), self.log_scale.squeeze(-2), self.levels)
        return (self.logits.softmax(-2) * component_means).sum(-2).reshape(self.shape())

    def _conditional_loc(self, loc: Tensor, coupling: Tensor, x: Tensor, channel: int) -> Tensor:
        """The locations [..., P] of a channel given the previous channels of x [..., C, P]."""
        first = channel * (channel - 1) // 2
        moved = loc[..., channel, :]
        for j in range(channel):
            moved = moved + coupling[..., first + j, :] * x[..., j, :]
        return moved

    def _log_prob(self, value: Tensor) -> Tensor:
        channels, pixels = self.loc.shape[-2:]
        x = value.reshape(*value.shape[: value.dim() - self.event_dim], 1, channels, pixels)
        log_prob = self.logits.log_softmax(-2)
        for c in range(channels):
            loc = self._conditional_loc(self.loc, self.coupling, x, c)
            log_prob = log_prob + discretized_logistic_log_prob(
                x[..., c, :], loc, self.log_scale[..., c, :], self.levels
            )
        return log_prob.logsumexp(-2).sum(-1)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            lead = torch.Size(sample_shape) + self.batch_shape
            channels = self.loc.shape[-2]
            logits = self.logits.expand(*lead, *self.logits.shape[-2:]).movedim(-2, -1)
            component = torch.distributions.Categorical(logits=logits, validate_args=False).sample()[..., None, None, :]

            def selected(parameter: Tensor) -> Tensor:
                rows, columns = parameter.shape[-2:]
                index = component.expand(*lead, 1, rows, columns)
                return parameter.expand(*lead, *parameter.shape[-3:]).gather(-3, index).squeeze(-3)

            loc, log_scale, coupling = (selected(t) for t in (self.loc, self.log_scale, self.coupling))
            x = torch.zeros_like(loc)
            for c in range(channels):
                x[..., c, :] = _sample_discretized_logistic(
                    self._conditional_loc(loc, coupling, x, c), log_scale[..., c, :], self.levels
                )
            return x.reshape(*lead, *self.event_shape)
