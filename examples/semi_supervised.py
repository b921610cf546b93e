"""Semi-supervised classification (M2, Kingma et al. 2014): a hundred labels, the others summed out.

python examples/semi_supervised.py --epochs 100
"""

import torch
import tyro

from ppvae import data, fit, likelihoods, log_marginal, nn, posteriors, priors
from ppvae.models import SemiSupervisedVAE
from ppvae.objectives import ELBO
from ppvae.objectives.auxiliary import AuxiliaryLoss


def main(epochs: int = 100, labels: int = 100, latent: int = 8, hidden: int = 200, seed: int = 0) -> float:
    """Returns the accuracy on test digits."""
    train, _, test = data.load("digits", binarize="fixed")
    y = train.labels.clone()
    y[labels:] = -1  # an unknown label is -1
    torch.manual_seed(seed)
    pair = SemiSupervisedVAE(
        priors.OneHot(10),  # p(y)
        priors.StandardNormal(latent),  # p(z)
        likelihoods.Bernoulli(nn.mlp(latent + 10, 64, hidden=(hidden,))),  # p(x | y, z)
        posteriors.DiagonalNormal(nn.mlp(64 + 10, 2 * latent, hidden=(hidden,))),  # q(z | x, y)
        posteriors.OneHot(nn.mlp(64, 10, hidden=(hidden,)), 10),  # q(y | x)
    )

    objective = AuxiliaryLoss(ELBO(), pair.log_label, weight=20.0)  # and log q(y | x) of the known labels
    run = fit(pair.model, pair.guide, (train, y), objective=objective, epochs=epochs, batch_size=200, seed=seed)
    accuracy = (pair.classify(test[:]).argmax(-1) == test.labels).double().mean()
    est = log_marginal(run.model, run.guide, test.head(50), num_particles=500, seed=seed)
    print(f"accuracy {accuracy:.1%} with {labels} labels; {est.nll:.2f} nats per image without its label")
    return float(accuracy)


if __name__ == "__main__":
    tyro.cli(main)
