"""Counts of single cells in two batches (scVI): latents without the batch in them; an AnnData where it is installed.

python examples/cell_counts.py --epochs 100
"""

import numpy as np
import torch
import tyro
from sklearn.neighbors import KNeighborsClassifier

from ppvae import fit, generate, likelihoods, log_marginal, nn, posteriors, priors
from ppvae.models import CountVAE

GENES, BATCHES = 40, 2


def cells(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts [count, 40] of three types in two batches, which differ in half of the genes, and the batch [count]."""
    generator = torch.Generator().manual_seed(seed)
    types = torch.randint(3, (count,), generator=generator)
    batch = torch.randint(BATCHES, (count,), generator=generator)
    profiles = torch.randn(3, GENES, generator=torch.Generator().manual_seed(1))
    shift = torch.randn(BATCHES, GENES, generator=torch.Generator().manual_seed(2)) * (torch.arange(GENES) % 2)
    return torch.poisson((1 + profiles[types] + 0.7 * shift[batch]).exp(), generator=generator), batch


def main(epochs: int = 100, count: int = 1000, latent: int = 5, hidden: int = 64, seed: int = 0) -> float:
    """Returns the accuracy of predicting the batch from the latents; chance is a half."""
    x, batch = cells(count, seed)
    try:
        import anndata

        counts = anndata.AnnData(x.numpy().astype(np.float32))  # goes to fit as it is
    except ImportError:
        counts = x
    torch.manual_seed(seed)
    encoder = torch.nn.Sequential(nn.Log1p(), nn.mlp(GENES + BATCHES, 2 * latent, hidden=(hidden,)))
    decoder = nn.mlp(latent + BATCHES, GENES, hidden=(hidden,))
    likelihood = likelihoods.NegativeBinomial(decoder, concentration=(GENES,), library=True)
    vae = CountVAE(priors.StandardNormal(latent), likelihood, posteriors.DiagonalNormal(encoder), BATCHES)
    columns = (counts, batch, x.sum(-1))
    run = fit(vae.model, vae.guide, columns, epochs=epochs, seed=seed)
    head = tuple(column[:100] for column in (x, *columns[1:]))
    print(log_marginal(run.model, run.guide, head, num_particles=1000, proposal="refined", seed=seed).summary())
    z = generate.posterior_means(run.model, run.guide, (x, *columns[1:]))["z"]
    neighbours = KNeighborsClassifier(15).fit(z[::2], batch[::2])
    accuracy = float(neighbours.score(z[1::2], batch[1::2]))
    print(f"batch predicted from z: {accuracy:.0%} of cells")
    return accuracy


if __name__ == "__main__":
    tyro.cli(main)
