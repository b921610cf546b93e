"""An objective of one's own is one method: here the mean of the bounds L_1, ..., L_K, from the same K draws.

python examples/custom_objective.py --epochs 30
"""

import torch
import tyro

from ppvae import VAE, data, fit, likelihoods, log_marginal, nn, objectives, posteriors, priors


class MeanOfBounds(objectives.Objective):
    """(1/K) sum_k L_k: between the ELBO, L_1, which trains the guide best, and IWAE, L_K, the tightest."""

    def reduce(self, log_weight):
        """Log-weights [K, batch] to the bound [batch], nats."""
        count = torch.arange(1, len(log_weight) + 1).to(log_weight)
        return (log_weight.logcumsumexp(0) - count.log()[:, None]).mean(0)


def main(epochs: int = 30, particles: int = 5, num_test: int = 100, seed: int = 0) -> dict[str, float]:
    """Returns the negative log-likelihood that each objective reaches, nats per datum."""
    train, valid, test = data.load("digits", binarize="fixed")
    reached = {}
    for objective in (objectives.IWAE(particles), MeanOfBounds(particles)):
        torch.manual_seed(seed)
        vae = VAE(
            prior=priors.StandardNormal(8),
            likelihood=likelihoods.Bernoulli(nn.mlp(8, 64, hidden=(200,))),
            posterior=posteriors.DiagonalNormal(nn.mlp(64, 16, hidden=(200,))),
        )
        run = fit(vae.model, vae.guide, train, valid=valid, objective=objective, epochs=epochs, seed=seed)
        est = log_marginal(run.model, run.guide, test.head(num_test), num_particles=1000, proposal="refined", seed=seed)
        reached[type(objective).__name__] = est.nll
        print(f"{type(objective).__name__}: NLL {est.nll:.2f}, {est.verdict}")
    return reached


if __name__ == "__main__":
    tyro.cli(main)
