"""Student's t distribution, accurate at many degrees of freedom."""

import math

import pyro.distributions as dist
import torch
from torch import Tensor

from ppvae.distributions.batch_shape import collapse_expanded_dims
from ppvae.distributions.log_gamma import log_rising_factorial_ratio


class StudentT(dist.StudentT):
    """Student's t distribution, log p(x) = log [Gamma((v + 1) / 2) / Gamma(v / 2)] - log(v pi s^2) / 2
    - (v + 1) / 2 log(1 + ((x - loc) / s)^2 / v), with v degrees of freedom and scale s.

    Accurate up to the normal limit v -> infinity, where Pyro's cancels (in float32 by 0.005 nats at v = 1e4, 0.08 at
    1e6).

    >>> StudentT(torch.tensor([1.0, 1e8])).log_prob(torch.tensor(0.0))
    tensor([-1.1447, -0.9189])
    """

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        df, scale = collapse_expanded_dims(self.df), collapse_expanded_dims(self.scale)
        y = (value - self.loc) / scale
        ratio = log_rising_factorial_ratio(0.5 * df, torch.full_like(df, 0.5))
        return ratio - scale.log() - 0.5 * math.log(2 * math.pi) - 0.5 * (df + 1) * torch.log1p(y.square() / df)
