"""Distributions over counts: Poisson, negative binomial, their zero-inflated forms, multinomial."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from ppvae.distributions.batch_shape import ParametricDistribution, collapse_expanded_dims, no_closed_form
from ppvae.distributions.constraints import CountsWithTotal, ZeroOr
from ppvae.distributions.log_gamma import log_rising_factorial_ratio

_MAX_DRAWS = 2**22  # categorical draws of a multinomial in memory at a time


class Poisson(ParametricDistribution):
    """The Poisson distribution over 0, 1, 2, ..., log p(x) = x log_rate - exp(log_rate) - log x!.

    Parametrised by the log-rate, so that a rate that underflows still has a log-mass and a gradient (Pyro's gives
    -inf); log_rate = -inf is the point mass at 0. Raises ValueError for any other value, where validation is on.

    >>> Poisson(torch.tensor([0.0, -120.0])).log_prob(torch.tensor([0.0, 2.0]))
    tensor([  -1.0000, -240.6931])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"log_rate": constraints.real}
    support = constraints.nonnegative_integer
    parameter_dims: ClassVar[dict[str, int]] = {"log_rate": 0}

    def __init__(self, log_rate: Tensor, validate_args: bool | None = None):
        self.log_rate = log_rate
        super().__init__(log_rate.shape, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        return self.log_rate.exp()

    @property
    def variance(self) -> Tensor:
        return self.mean

    @property
    def mode(self) -> Tensor:
        return self.mean.floor()

    def _log_prob(self, value: Tensor) -> Tensor:
        power = torch.where(value == 0, 0.0, value * self.log_rate)
        return power - self.log_rate.exp() - torch.lgamma(value + 1)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return torch.poisson(self.mean.expand(self._extended_shape(torch.Size(sample_shape))))


class NegativeBinomial(ParametricDistribution):
    """The negative binomial over 0, 1, 2, ... with mean m and concentration c: a Poisson with a gamma rate.

    log p(x) = log [Gamma(x + c) / (Gamma(c) c^x x!)] + x log m - (x + c) log(1 + m / c), variance m + m^2 / c.
    Accurate up to the Poisson limit c -> infinity, where torch's and Pyro's cancel (by 1.4 nats in float32 at c = 1e7).
    Raises ValueError for a value outside the support, where validation is on.

    Args:
        log_mean: log m. -inf is the point mass at 0.
        log_concentration: log c, the inverse dispersion (theta of scVI).

    Source: Lopez et al. 2018, "Deep generative modeling for single-cell transcriptomics".

    >>> NegativeBinomial(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 20.0])).log_prob(torch.tensor([0.0, 0.0]))
    tensor([-0.6931, -1.0000])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"log_mean": constraints.real, "log_concentration": constraints.real}
    support = constraints.nonnegative_integer
    parameter_dims: ClassVar[dict[str, int]] = {"log_mean": 0, "log_concentration": 0}

    def __init__(self, log_mean: Tensor, log_concentration: Tensor, validate_args: bool | None = None):
        self.log_mean, self.log_concentration = torch.broadcast_tensors(log_mean, log_concentration)
        super().__init__(self.log_mean.shape, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        return self.log_mean.exp()

    @property
    def probs(self) -> Tensor:
        """m / (m + c), the parameter that torch's NegativeBinomial has under this name."""
        return (self.log_mean - self.log_concentration).sigmoid()

    @property
    def mode(self) -> Tensor:
        """The integer part of m (c - 1) / c, and 0 for c <= 1."""
        return (self.mean * -torch.expm1(-self.log_concentration)).clamp(min=0).floor()

    def _log_prob(self, value: Tensor) -> Tensor:
        log_c = collapse_expanded_dims(self.log_concentration)
        c = log_c.exp()
        power = torch.where(value == 0, 0.0, value * self.log_mean)
        norm = (value + c) * F.softplus(self.log_mean - log_c, threshold=40)
        return log_rising_factorial_ratio(c, value) - torch.lgamma(value + 1) + power - norm

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            c = self.log_concentration.exp().expand(shape)
            return torch.poisson(torch._standard_gamma(c) * (self.log_mean - self.log_concentration).exp())


class ZeroInflated(ParametricDistribution):
    """Zero-inflated counts, p(x) = s(g) [x = 0] + s(-g) base(x), s the sigmoid; or a mass at zero beside a density.

    As Pyro's, but exact at any gate: gate_logits = -inf gives the base, where Pyro's gives NaN. A continuous base, such
    as Gamma or LogNormal, has no mass at zero: p(0) = s(g), a mass, and p(x) = s(-g) base(x) elsewhere, a density,
    whether zero is in the base's support or not; Pyro's adds the base's density at zero to the mass. Raises
    ValueError for a value outside the support, where validation is on.

    Args:
        base: a distribution over counts or real numbers, of event shape [].
        gate_logits: g, the log-odds of an extra zero.

    Source: Lambert 1992, "Zero-inflated Poisson regression".

    >>> ZeroInflated(Poisson(torch.zeros(2)), torch.tensor([0.0, -torch.inf])).log_prob(torch.zeros(2))
    tensor([-0.3799, -1.0000])
    >>> ZeroInflated(torch.distributions.Exponential(torch.ones(2)), torch.zeros(2)).log_prob(torch.tensor([0.0, 1.0]))
    tensor([-0.6931, -1.6931])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"gate_logits": constraints.real}
    parameter_dims: ClassVar[dict[str, int]] = {"gate_logits": 0, "base": 0}

    def __init__(self, base: TorchDistribution, gate_logits: Tensor, validate_args: bool | None = None):
        if base.event_shape:
            raise ValueError(f"base: expected event shape [], found {list(base.event_shape)}")
        shape = torch.broadcast_shapes(base.batch_shape, gate_logits.shape)
        self.base, self.gate_logits = base.expand(shape), gate_logits.expand(shape)
        super().__init__(shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Any:
        return ZeroOr(self.base.support) if self._is_continuous else self.base.support

    @property
    def _is_continuous(self) -> bool:
        return not self.base.support.is_discrete

    @property
    def mean(self) -> Tensor:
        return torch.sigmoid(-self.gate_logits) * self.base.mean

    @property
    def mode(self) -> Tensor:
        """0, or the mode of the base where it has more mass; a density has none."""
        if self._is_continuous:
            raise no_closed_form(self, "mode")
        mode = self.base.mode
        zero = torch.zeros_like(mode)
        return torch.where(self._log_prob(zero) >= self._log_prob(mode), zero, mode)

    def _log_prob(self, value: Tensor) -> Tensor:
        extra = -F.softplus(-self.gate_logits, threshold=40)
        if self._is_continuous:  # at zero the base is computed at another number, so that its gradient is finite
            inside = torch.where(value == 0, _inner_number(self.base.support), value)
            density = self.base.log_prob(inside) - F.softplus(self.gate_logits, threshold=40)
            return torch.where(value == 0, extra, density)
        counted = self.base.log_prob(value) - F.softplus(self.gate_logits, threshold=40)
        return torch.where(value == 0, torch.logaddexp(extra, counted), counted)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            counts = self.base.sample(torch.Size(sample_shape))
            inflated = torch.rand_like(counts) < torch.sigmoid(self.gate_logits)
            return torch.where(inflated, torch.zeros_like(counts), counts)


def _inner_number(support: Any) -> float:
    """A number inside a continuous support."""
    low, high = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    if isinstance(low, int | float):
        return (low + high) / 2 if isinstance(high, int | float) else low + 1.0
    return 1.0 if high is None else float(high) - 1.0


class Multinomial(ParametricDistribution):
    """Counts [D] of N draws from D kinds, log p(x | N) = log N! - sum_d log x_d! + sum_d x_d log softmax(logits)_d.

    With the multinomial coefficient, so that it sums to one over all counts of total N; other counts have log-mass
    -inf. Pyro's takes a single N for the batch. Raises ValueError for counts that do not sum to N, where validation is
    on.

    Args:
        total: N of each datum, [*batch].
        logits: [*batch, D].

    >>> fn = Multinomial(torch.tensor([2.0, 3.0]), torch.zeros(2, 2))
    >>> fn.log_prob(torch.tensor([[1.0, 1.0], [3.0, 0.0]])).exp()
    tensor([0.5000, 0.1250])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "total": constraints.nonnegative_integer,
        "logits": constraints.real_vector,
    }
    parameter_dims: ClassVar[dict[str, int]] = {"total": 0, "logits": 1}

    def __init__(self, total: Tensor, logits: Tensor, validate_args: bool | None = None):
        shape = torch.broadcast_shapes(total.shape, logits.shape[:-1])
        self.total, self.logits = total.expand(shape).to(logits.dtype), logits.expand(*shape, logits.shape[-1])
        super().__init__(shape, logits.shape[-1:], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> Any:
        return constraints.independent(CountsWithTotal(self.total), 1)

    @property
    def mean(self) -> Tensor:
        return self.total.unsqueeze(-1) * self.probs

    @property
    def probs(self) -> Tensor:
        return self.logits.softmax(-1)

    @property
    def mode(self) -> Tensor:
        """The integer part of N p, and the rest one by one to the kind of largest p / (x + 1) (Finucan 1964)."""
        probs = self.probs
        counts = self.mean.floor()
        for _ in range(int((self.total - counts.sum(-1)).max()) if counts.numel() else 0):
            left = (self.total - counts.sum(-1)).unsqueeze(-1) > 0
            best = (probs / (counts + 1)).argmax(-1, keepdim=True)
            counts = counts.scatter_add(-1, best, left.to(counts))
        return counts

    def _log_prob(self, value: Tensor) -> Tensor:
        log_probs = self.logits.log_softmax(-1)
        powers = torch.where(value == 0, 0.0, value * log_probs).sum(-1)
        log_prob = torch.lgamma(self.total + 1) - torch.lgamma(value + 1).sum(-1) + powers
        return torch.where(value.sum(-1) == self.total, log_prob, -torch.inf)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            probs = self.logits.softmax(-1).expand(shape).reshape(-1, shape[-1])
            left = self.total.expand(shape[:-1]).reshape(-1, 1)
            counts = torch.zeros_like(probs)
            width = max(_MAX_DRAWS // max(len(probs), 1), 1)
            for start in range(0, int(left.max()) if left.numel() else 0, width):
                size = min(width, int(left.max()) - start)
                categories = torch.multinomial(probs, size, replacement=True)
                valid = start + torch.arange(size, device=probs.device) < left
                counts.scatter_add_(-1, categories, valid.to(probs.dtype))
            return counts.reshape(shape)
