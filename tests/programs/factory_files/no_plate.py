"""Broken: the whole batch is one event, and no plate says that the data are independent."""

import pyro
import pyro.distributions as dist
from torch import nn


def no_plate(latent: int = 3):
    encoder, decoder = nn.Linear(64, latent), nn.Linear(latent, 64)

    def model(x):
        pyro.module("decoder", decoder)
        z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), latent), 1.0).to_event(2))
        pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(2), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(2))

    return model, guide
