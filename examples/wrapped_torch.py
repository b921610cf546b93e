"""A VAE trained in plain torch, evaluated by ppvae: its networks as a model and a guide.

python examples/wrapped_torch.py --epochs 50
"""

import pyro
import pyro.distributions as dist
import torch
import tyro
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ppvae import data, log_marginal
from ppvae.evaluation import bracket

LATENT = 8


def main(epochs: int = 50, num_test: int = 100, particles: int = 1000, seed: int = 0) -> float:
    """Returns the negative log-likelihood of test images, nats per datum."""
    train, _, test = data.load("digits", binarize="fixed")
    torch.manual_seed(seed)
    net = nn.ModuleDict({
        "encoder": nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 2 * LATENT)),
        "decoder": nn.Sequential(nn.Linear(LATENT, 200), nn.ReLU(), nn.Linear(200, 64)),
    })  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(epochs):  # nothing of ppvae in here
        for rows in torch.randperm(len(train)).split(100):
            x = train[rows]
            mu, logvar = net["encoder"](x).chunk(2, -1)
            logits = net["decoder"](mu + (logvar / 2).exp() * torch.randn_like(mu))
            kl = (mu**2 + logvar.exp() - logvar - 1).sum() / 2
            optimizer.zero_grad()
            ((binary_cross_entropy_with_logits(logits, x, reduction="sum") + kl) / len(x)).backward()
            optimizer.step()

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=net["decoder"](z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            mu, logvar = net["encoder"](x).chunk(2, -1)
            pyro.sample("z", dist.Normal(mu, (logvar / 2).exp()).to_event(1))

    est = log_marginal(model, guide, test.head(num_test), num_particles=particles, proposal="refined", seed=seed)
    print(est.summary())
    print(bracket(model, guide, test.head(20), num_data=20, num_particles=particles, seed=seed).summary())
    return est.nll


if __name__ == "__main__":
    tyro.cli(main)
