"""Two latents, x <- z1 <- z2, registered by pyro.module; the plate knows the size of the whole training set."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn


class Gaussian(nn.Module):
    def __init__(self, inputs: int, outputs: int, hidden: int):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh())
        self.loc, self.log_scale = nn.Linear(hidden, outputs), nn.Linear(hidden, outputs)

    def forward(self, x):
        h = self.body(x)
        return dist.Normal(self.loc(h), self.log_scale(h).exp()).to_event(1)


def two_latents(train: torch.Tensor, z1: int = 6, z2: int = 3, hidden: int = 32):
    """A ladder of two latents on flat binary data.

    Args:
        train: the training data.
        z1: the size of the lower latent.
        z2: the size of the upper latent.
        hidden: the width of every network.
    """
    count, features = train.shape
    up, top, down = Gaussian(features, z1, hidden), Gaussian(z1, z2, hidden), Gaussian(z2, z1, hidden)
    out = nn.Sequential(nn.Linear(z1, hidden), nn.Tanh(), nn.Linear(hidden, features))

    def model(x):
        pyro.module("down", down)
        pyro.module("out", out)
        with pyro.plate("data", count, subsample=x):
            upper = pyro.sample("z2", dist.Normal(torch.zeros(z2), 1.0).to_event(1))
            lower = pyro.sample("z1", down(upper))
            pyro.sample("x", dist.Bernoulli(logits=out(lower)).to_event(1), obs=x)

    def guide(x):
        pyro.module("up", up)
        pyro.module("top", top)
        with pyro.plate("data", count, subsample=x):
            lower = pyro.sample("z1", up(x))
            pyro.sample("z2", top(lower))

    return model, guide
