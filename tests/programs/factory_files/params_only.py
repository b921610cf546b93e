"""Probabilistic PCA by pyro.param alone, without a factory; the guide is linear in the data."""

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

LATENT = 2


def start(rows: int, columns: int) -> torch.Tensor:
    return 0.1 * torch.linspace(-1, 1, rows * columns).sin().reshape(rows, columns)


def model(x):
    features = x.shape[-1]
    loc = pyro.param("loc", lambda: torch.zeros(features))
    weight = pyro.param("weight", lambda: start(LATENT, features))
    scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ weight + loc, scale).to_event(1), obs=x)


def guide(x):
    features = x.shape[-1]
    slope = pyro.param("slope", lambda: start(features, LATENT))
    shift = pyro.param("shift", torch.zeros(LATENT))
    width = pyro.param("width", torch.ones(LATENT), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x @ slope + shift, width).to_event(1))
