"""A pair with a global latent: the mean of all data."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn


class SharedMean(nn.Module):
    """x_n ~ N(mean, scale^2), mean ~ N(0, 4), both guided by their own normal."""

    def __init__(self, size: int, features: int, scale: float):
        super().__init__()
        self.size, self.scale = size, scale
        self.loc, self.log_scale = nn.Parameter(torch.zeros(features)), nn.Parameter(torch.full((features,), -1.0))

    def model(self, x: Tensor) -> None:
        pyro.module("shared_mean", self)
        mean = pyro.sample("mean", dist.Normal(torch.zeros_like(self.loc), 2.0).to_event(1))
        with pyro.plate("data", max(self.size, len(x)), subsample=x):
            pyro.sample("x", dist.Normal(mean, self.scale).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("shared_mean", self)
        pyro.sample("mean", dist.Normal(self.loc, self.log_scale.exp()).to_event(1))


def pair(train: Tensor, scale: float = 1.0) -> SharedMean:
    """The pair for a data set of the size of the training data."""
    return SharedMean(len(train), train.shape[1], scale)
