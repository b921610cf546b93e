"""Pyro's VAE: a module with a model and a guide, as in Pyro's tutorial, trained and evaluated by ppvae.

python examples/pyro_vae.py --epochs 50
"""

import pyro
import pyro.distributions as dist
import torch
import tyro
from torch import nn

from ppvae import data, fit, log_marginal


class PyroVAE(nn.Module):
    """p(x, z) = N(z; 0, I) Bernoulli(x; decoder(z)), q(z | x) = N(z; loc(x), scale(x))."""

    def __init__(self, features: int = 64, latent: int = 8, hidden: int = 200):
        super().__init__()
        self.latent = latent
        self.encoder = nn.Sequential(nn.Linear(features, hidden), nn.Softplus(), nn.Linear(hidden, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.Softplus(), nn.Linear(hidden, features))

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(len(x), self.latent), 1.0).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("latent", dist.Normal(loc, log_scale.exp()).to_event(1))


def main(epochs: int = 50, particles: int = 1000, seed: int = 0) -> float:
    """Returns the negative log-likelihood of the test images, nats per datum."""
    train, valid, test = data.load("digits", binarize="fixed")
    torch.manual_seed(seed)
    vae = PyroVAE()
    run = fit(vae.model, vae.guide, train, valid=valid, epochs=epochs, seed=seed)
    est = log_marginal(run.model, run.guide, test, num_particles=particles, proposal="refined", seed=seed)
    print(est.summary())
    return est.nll


if __name__ == "__main__":
    tyro.cli(main)
