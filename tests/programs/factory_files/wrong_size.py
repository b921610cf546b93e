"""Broken on digits: networks for images of 784 pixels."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn


def wrong_size(latent: int = 3):
    encoder, decoder = nn.Linear(784, latent), nn.Linear(latent, 784)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(latent), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))

    return model, guide
