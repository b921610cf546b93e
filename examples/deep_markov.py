"""A deep Markov model of sequences of different lengths: what the latents of a walk say.

python examples/deep_markov.py --epochs 100
"""

import torch
import tyro
from torch.nn import GRU

from ppvae import fit, likelihoods, log_marginal, nn, posteriors
from ppvae.models import DeepMarkovModel
from ppvae.objectives import ELBO
from ppvae.objectives.schedules import Linear


def walks(count: int, steps: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Binary readings [count, steps, 8] of a random walk, padded with zeros, and lengths [count]."""
    generator = torch.Generator().manual_seed(seed)
    position = torch.randn(count, steps, 1, generator=generator).cumsum(1)
    lengths = torch.randint(4, steps + 1, (count,), generator=generator)
    x = (position > torch.linspace(-3, 3, 8)).float()
    return x * (torch.arange(steps) < lengths[:, None])[..., None], lengths


def main(epochs: int = 100, count: int = 500, latent: int = 2, hidden: int = 32, seed: int = 0) -> float:
    """Returns the negative log-likelihood of test sequences, nats per step."""
    train, test = walks(count, seed=seed), walks(100, seed=seed + 1)
    torch.manual_seed(seed)
    dmm = DeepMarkovModel(
        latent,
        posteriors.DiagonalNormal(nn.mlp(latent, 2 * latent, hidden=(hidden,))),  # p(z_t | z_t-1)
        likelihoods.Bernoulli(nn.mlp(latent, 8, hidden=(hidden,))),  # p(x_t | z_t)
        nn.Backward(GRU(8, hidden, batch_first=True)),  # reads x_t .. x_T
        posteriors.DiagonalNormal(nn.mlp(latent + hidden, 2 * latent, hidden=(hidden,))),  # q(z_t | z_t-1, x)
    )
    objective = ELBO(beta=Linear(steps=200))  # warm-up of beta
    run = fit(dmm.model, dmm.guide, train, objective=objective, epochs=epochs, batch_size=50, seed=seed)
    est = log_marginal(run.model, run.guide, test, num_particles=2000, proposal="refined", seed=seed)
    nats = -float(est.log_px.sum() / test[1].sum())
    print(f"{nats:.3f} nats per step; {est.verdict}")
    return nats


if __name__ == "__main__":
    tyro.cli(main)
