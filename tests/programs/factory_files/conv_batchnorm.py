"""Convolutions and batch norm on images [N, 1, 8, 8]; the decoder's view takes one batch dim and no more."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn


class Decoder(nn.Module):
    def __init__(self, latent: int, channels: int):
        super().__init__()
        self.channels = channels
        self.dense = nn.Linear(latent, channels * 16)
        self.norm = nn.BatchNorm1d(channels * 16)
        self.up = nn.ConvTranspose2d(channels, 1, 4, stride=2, padding=1)

    def forward(self, z):
        batch = z.shape[0]
        h = torch.relu(self.norm(self.dense(z)))
        return self.up(h.view(batch, self.channels, 4, 4))


class Encoder(nn.Module):
    def __init__(self, latent: int, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, channels, 4, stride=2, padding=1), nn.BatchNorm2d(channels), nn.ReLU(), nn.Flatten()
        )
        self.head = nn.Linear(channels * 16, 2 * latent)

    def forward(self, x):
        return self.head(self.body(x)).chunk(2, dim=-1)


def conv_batchnorm(latent: int = 4, channels: int = 4):
    encoder, decoder = Encoder(latent, channels), Decoder(latent, channels)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(torch.zeros(latent), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(3), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", x.shape[0]):
            loc, log_scale = encoder(x)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide
