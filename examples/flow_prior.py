"""Is a flow a better prior than the standard normal? Two VAEs, three seeds, paired by datum.

python examples/flow_prior.py --epochs 40
"""

import torch
import tyro

from ppvae import VAE, data, fit, likelihoods, log_marginal, nn, posteriors, priors
from ppvae.evaluation import compare

PRIORS = {"standard normal": priors.StandardNormal, "flow": priors.MAF}


def main(epochs: int = 40, latent: int = 8, hidden: int = 200, seeds: int = 3, num_test: int = 200) -> float:
    """Returns the gain of the flow, nats per datum."""
    train, valid, test = data.load("digits", binarize="fixed")
    estimates = {name: [] for name in PRIORS}
    for name, prior in PRIORS.items():
        for seed in range(seeds):
            torch.manual_seed(seed)
            vae = VAE(
                prior=prior(latent),
                likelihood=likelihoods.Bernoulli(nn.mlp(latent, 64, hidden=(hidden,))),
                posterior=posteriors.DiagonalNormal(nn.mlp(64, 2 * latent, hidden=(hidden,))),
            )
            run = fit(vae.model, vae.guide, train, valid=valid, epochs=epochs, seed=seed)
            head = test.head(num_test)
            estimates[name].append(
                log_marginal(run.model, run.guide, head, num_particles=1000, proposal="refined", seed=seed)
            )
    found = compare(estimates)
    for key, text in found.table().items():
        print(f"{key}: {text}")
    return found.difference("flow", "standard normal")[0]


if __name__ == "__main__":
    tyro.cli(main)
