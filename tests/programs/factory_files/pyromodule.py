"""A PyroModule whose own parameters are PyroParams; the factory returns an object with .model and .guide."""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam, pyro_method
from torch import nn
from torch.distributions import constraints


class Pair(PyroModule):
    def __init__(self, features: int, latent: int, hidden: int):
        super().__init__()
        self.latent = latent
        self.decoder = PyroModule[nn.Sequential](
            PyroModule[nn.Linear](latent, hidden), PyroModule[nn.Tanh](), PyroModule[nn.Linear](hidden, features)
        )
        self.encoder = PyroModule[nn.Linear](features, latent)
        self.width = PyroParam(torch.ones(latent), constraint=constraints.positive)
        self.noise = PyroParam(torch.tensor(0.5), constraint=constraints.positive)

    @pyro_method
    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.latent), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), self.noise).to_event(1), obs=x)

    @pyro_method
    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), self.width).to_event(1))


def pyromodule(train: torch.Tensor, latent: int = 3, hidden: int = 16) -> Pair:
    return Pair(train.shape[1], latent, hidden)
