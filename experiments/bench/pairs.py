"""The pairs that are timed, for ppvae and Pyro."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from experiments.bench import Settings
from ppvae import VAE, likelihoods, nn, posteriors, priors

_numbers = itertools.count()


@dataclass(frozen=True)
class TwoLayers:
    """z2 ~ N(0, I), z1 | z2 ~ N(., .), x | z1 ~ Bernoulli, and q(z1 | x) q(z2 | z1), as two plain Pyro functions."""

    networks: torch.nn.ModuleDict
    latent: int
    name: str  # of its parameters, unique to the object

    def model(self, x: Tensor) -> None:
        pyro.module(self.name, self.networks)
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(self.latent // 2), 1.0).to_event(1))
            z1 = pyro.sample("z1", normal(self.networks["above"](z2)))
            pyro.sample(
                "x", dist.Bernoulli(logits=self.networks["decoder"](z1), validate_args=False).to_event(1), obs=x
            )

    def guide(self, x: Tensor) -> None:
        pyro.module(self.name, self.networks)
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", normal(self.networks["encoder"](x)))
            pyro.sample("z2", normal(self.networks["second"](z1)))


def normal(outputs: Tensor) -> dist.TorchDistribution:
    """A diagonal normal; the two halves of the outputs are location and log-scale."""
    loc, log_scale = outputs.chunk(2, dim=-1)
    return dist.Normal(loc, log_scale.exp()).to_event(1)


def build(kind: str, s: Settings) -> VAE | TwoLayers:
    """A pair of a kind, with the same weights at every call."""
    torch.manual_seed(0)
    if kind == "two layers":
        half, hidden = s.latent // 2, tuple(h // 2 for h in s.hidden)
        networks = {
            "encoder": nn.mlp(784, 2 * s.latent, hidden=s.hidden),
            "second": nn.mlp(s.latent, 2 * half, hidden=hidden),
            "above": nn.mlp(half, 2 * s.latent, hidden=hidden),
            "decoder": nn.mlp(s.latent, 784, hidden=s.hidden),
        }
        return TwoLayers(torch.nn.ModuleDict(networks), s.latent, f"two layers {next(_numbers)}")
    if kind == "convolutional":
        encoder, decoder = nn.conv_encoder((1, 32, 32), 2 * s.latent), nn.conv_decoder(s.latent, (1, 32, 32))
    else:
        encoder = nn.mlp(784, 2 * s.latent, hidden=s.hidden)
        decoder = nn.mlp(s.latent, 784, hidden=s.hidden)
    return VAE(priors.StandardNormal(s.latent), likelihoods.Bernoulli(decoder), posteriors.DiagonalNormal(encoder))


def data(kind: str, count: int) -> Tensor:
    """Binary images of the shape of a kind."""
    shape = (count, 1, 32, 32) if kind == "convolutional" else (count, 784)
    return torch.bernoulli(torch.full(shape, 0.13), generator=torch.Generator().manual_seed(0))
