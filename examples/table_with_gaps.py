"""A table of real, binary and categorical columns with gaps: log p(x observed), and the gaps filled.

python examples/table_with_gaps.py --epochs 200
"""

import torch
import tyro
from sklearn.datasets import load_wine

from ppvae import data, fit, log_marginal
from ppvae.evaluation import impute
from ppvae.models import TableVAE


def main(epochs: int = 200, missing: float = 0.2, latent: int = 3, hidden: int = 64, seed: int = 0) -> float:
    """Returns the root mean squared error of imputed real values, in standard deviations of their columns."""
    frame = load_wine(as_frame=True).frame
    real = torch.tensor(frame.drop(columns="target").to_numpy()).float()
    real = (real - real.mean(0)) / real.std(0)
    table = torch.cat([real, real[:, :1].gt(0).float(), torch.tensor(frame["target"].to_numpy())[:, None]], -1)

    generator = torch.Generator().manual_seed(seed)
    gaps = torch.rand(table.shape, generator=generator) < missing
    holes = data.with_missing(table.masked_fill(gaps, torch.nan))

    torch.manual_seed(seed)
    pair = TableVAE(["real"] * 13 + ["binary", ("categorical", 3)], latent=latent, hidden=(hidden,))
    run = fit(pair.model, pair.guide, holes, epochs=epochs, batch_size=32, seed=seed)
    est = log_marginal(run.model, run.guide, holes, num_particles=1000, proposal="refined", seed=seed)
    filled = impute(run.model, run.guide, holes, num_particles=1000, draws=10, seed=seed)

    error = (filled.mean[:, :13] - real)[gaps[:, :13]].square().mean().sqrt()
    naive = real[gaps[:, :13]].square().mean().sqrt()
    print(est.summary())
    print(f"error of imputed values {error:.2f} standard deviations; of column means {naive:.2f}")
    return float(error)


if __name__ == "__main__":
    tyro.cli(main)
