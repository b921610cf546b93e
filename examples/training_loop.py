"""A training loop of one's own, with `ppvae.inference.SVI` in the place of `pyro.infer.SVI`.

python examples/training_loop.py --steps 2000
"""

import pyro
import torch
import tyro

from ppvae import VAE, data, likelihoods, log_marginal, nn, posteriors, priors
from ppvae.inference import SVI
from ppvae.objectives import ELBO, IWAE


def main(steps: int = 2000, batch_size: int = 100, num_test: int = 100, seed: int = 0) -> float:
    """Returns the negative log-likelihood of test images, nats per datum."""
    train, valid, test = data.load("digits", binarize="fixed")
    pyro.clear_param_store()
    torch.manual_seed(seed)
    vae = VAE(
        prior=priors.StandardNormal(8),
        likelihood=likelihoods.Bernoulli(nn.mlp(8, 64, hidden=(200,))),
        posterior=posteriors.DiagonalNormal(nn.mlp(64, 16, hidden=(200,))),
    )
    # a function of parameters that makes a torch optimizer, or one of pyro.optim
    objective = IWAE(num_particles=5, gradient="dreg")
    svi = SVI(vae.model, vae.guide, lambda parameters: torch.optim.AdamW(parameters, lr=1e-3), objective)
    judge = SVI(vae.model, vae.guide, torch.optim.Adam, ELBO(num_particles=10))
    best, stale = float("inf"), 0
    for step in range(steps):
        svi.step(train[torch.randint(len(train), (batch_size,))])
        if step % 200 == 199:
            loss = judge.evaluate_loss(valid[:]) / len(valid)
            stale = 0 if loss < best else stale + 1
            best = min(best, loss)
            print(f"step {step + 1}: validation ELBO {-loss:.2f}")
            if stale == 3:
                break
    est = log_marginal(vae.model, vae.guide, test.head(num_test), num_particles=1000, proposal="refined", seed=seed)
    print(est.summary())
    return est.nll


if __name__ == "__main__":
    tyro.cli(main)
