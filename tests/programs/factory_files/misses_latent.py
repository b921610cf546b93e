"""Broken: the guide samples one of the model's two latents."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn


def misses_latent(latent: int = 3):
    encoder, decoder = nn.Linear(64, latent), nn.Linear(2 * latent, 64)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            style = pyro.sample("style", dist.Normal(torch.zeros(latent), 1.0).to_event(1))
            content = pyro.sample("content", dist.Normal(torch.zeros(latent), 1.0).to_event(1))
            logits = decoder(torch.cat(torch.broadcast_tensors(style, content), -1))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("style", dist.Normal(encoder(x), 1.0).to_event(1))

    return model, guide
