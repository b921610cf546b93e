"""Pairs with known answers that several tests of objectives use."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae.models import LinearGaussian


def pair() -> tuple[LinearGaussian, Tensor]:
    torch.manual_seed(0)
    return LinearGaussian(5, 2).double(), torch.randn(6, 5).double()


def dims_pair():
    """Two dims, whose KLs are 0.5 (1 + log-free) each by hand: loc (0.2, 1.0), scale 1, against N(0, 1)."""
    loc = nn.Parameter(torch.tensor([0.2, 1.0]))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", loc) * torch.ones(2), 1.0).to_event(1))

    return model, guide, torch.zeros(4, 2), loc
