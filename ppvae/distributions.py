"""Distributions that Pyro lacks, or whose log-density it computes in a way that is slow or wrong."""

from __future__ import annotations

import pyro.distributions as dist
import torch.nn.functional as F
from torch import Tensor


class Bernoulli(dist.Bernoulli):
    """A Bernoulli distribution over {0, 1} with log p(x) = -softplus((1 - 2 x) logits).

    The same density as Pyro's, in half the passes over memory; exact to rounding at any logit.
    Raises ValueError for a value that is neither 0 nor 1, where validation is on.

    >>> import torch
    >>> Bernoulli(logits=torch.tensor([0.0, 50.0])).log_prob(torch.tensor([1.0, 0.0]))
    tensor([ -0.6931, -50.0000])
    """

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        # softplus keeps its input for the backward pass, not its output, so that the sign can be turned in place
        return F.softplus((1 - 2 * value) * self.logits, threshold=40).neg_()
