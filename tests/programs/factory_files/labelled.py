"""A pair that is called with a datum and its label, conditional on the label."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn


def labelled(train: torch.Tensor, latent: int = 4, classes: int = 10, hidden: int = 32):
    features = train.shape[1]
    encoder = nn.Sequential(nn.Linear(features + classes, hidden), nn.Tanh(), nn.Linear(hidden, 2 * latent))
    decoder = nn.Sequential(nn.Linear(latent + classes, hidden), nn.Tanh(), nn.Linear(hidden, features))

    def with_label(t, y):
        code = nn.functional.one_hot(y, classes).to(t.dtype)
        return torch.cat([t, code.expand(*t.shape[:-1], classes)], -1)

    def model(x, y):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(latent), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(with_label(z, y))).to_event(1), obs=x)

    def guide(x, y):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(with_label(x, y)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide
