"""Clustering of handwritten digits by a deep mixture (GMVAE: p(z | y) is a normal for each cluster y, and y is summed
out), compared with a mixture of normals on the same images and with k-means. The GMVAE is initialised from a VAE and a
mixture of its latent means, as in Jiang et al. 2017 (arXiv 1611.05148). "Purity" is the share of test images whose
digit is the most frequent one of their cluster; "accuracy" is that of the best assignment of clusters to digits.
Training uses no labels."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture as Mixture
from torch import Tensor

from experiments import cells
from experiments.cells import Cells, Workspace
from ppvae import VAE, data, likelihoods, log_marginal, nn, objectives, posteriors, priors
from ppvae.models import DeepMixture, GaussianMixture
from ppvae.plots import image_grid


@dataclass(frozen=True)
class Settings:
    """The data, the networks and the training budget."""

    rows: tuple[str, ...] = ("GMVAE", "mixture of normals", "k-means")
    seeds: tuple[int, ...] = (0, 1, 2)
    data: str = "digits"
    clusters: int = 10
    latent: int = 12
    hidden: tuple[int, ...] = (200,)
    epochs: int = 60
    batch_size: int = 100
    lr: float = 3e-3
    num_test: int = 360
    particles: int = 500


SMOKE = {"seeds": (0,), "clusters": 3, "latent": 2, "hidden": (8,), "epochs": 1, "num_test": 20, "particles": 25}


def cluster_scores(cluster: Tensor, digit: Tensor) -> dict[str, float]:
    """Purity and accuracy of clusters [N] of digits [N]."""
    counts = np.zeros((int(cluster.max()) + 1, int(digit.max()) + 1))
    np.add.at(counts, (cluster.numpy(), digit.numpy()), 1)
    best = linear_sum_assignment(-counts)
    return {"purity": float(counts.max(1).sum() / len(digit)), "accuracy": float(counts[best].sum() / len(digit))}


def initialise_mixture(s: Settings, workspace: Workspace, folder: Path, x: Tensor, seed: int) -> DeepMixture:
    """p(y) p(z | y) p(x | z) with q(y | x) q(z | x), initialised from a VAE and a mixture of its latent means."""
    features = x.shape[1]
    likelihood = likelihoods.DiscretizedLogistic(nn.mlp(s.latent, 2 * features, hidden=s.hidden), levels=17)
    posterior = posteriors.DiagonalNormal(nn.mlp(features, 2 * s.latent, hidden=s.hidden))
    classifier = nn.mlp(features, s.clusters, hidden=s.hidden)
    vae, inside = (
        VAE(priors.StandardNormal(s.latent), likelihood, posterior),
        dataclasses.replace(workspace, folder=folder),
    )
    cells.train(vae, x, None, inside, epochs=s.epochs, lr=s.lr, batch_size=s.batch_size, seed=seed)
    with torch.no_grad():
        z = posterior(x).mean
    start = Mixture(s.clusters, covariance_type="diag", n_init=5, random_state=seed).fit(z.numpy())
    parts = np.concatenate([start.means_, np.log(start.covariances_) / 2], 1)
    components = torch.nn.Linear(s.clusters, 2 * s.latent)
    with torch.no_grad():
        components.weight.copy_(torch.from_numpy(parts).T)
        components.bias.zero_()
    adam, cluster = torch.optim.Adam(classifier.parameters(), lr=s.lr), torch.from_numpy(start.predict_proba(z.numpy()))
    for _ in range(200):
        adam.zero_grad()
        torch.nn.functional.cross_entropy(classifier(x), cluster.float()).backward()
        adam.step()
    return DeepMixture(
        clusters=priors.OneHot(s.clusters, learned=True),
        prior=priors.ConditionalNormal(components),
        likelihood=likelihood,
        posterior=posterior,
        classifier=posteriors.OneHot(classifier, s.clusters),
    )


def compute(s: Settings, workspace: Workspace, row: str, seed: int) -> dict[str, Any]:
    """Clusters by the method of one row; if it is a model, also log p(x) of the first test images."""
    train, valid, test = data.load(s.data, workspace.root, dequantize=row == "mixture of normals")
    digit, x = test.labels.long(), test.as_subclass(Tensor)
    torch.manual_seed(seed)
    if row == "k-means":
        found = KMeans(s.clusters, n_init=10, random_state=seed).fit(train.numpy())
        return {"digest": test.digest, **cluster_scores(torch.from_numpy(found.predict(test.numpy())).long(), digit)}
    values = train.fixed(0).as_subclass(Tensor)
    pair: Any = GaussianMixture.from_data(values, s.clusters, rank=0, seed=seed)
    if row == "GMVAE":
        pair = initialise_mixture(s, workspace, workspace.folder / "vae", values, seed)
    trained = cells.train(
        pair, train, valid, workspace, epochs=s.epochs, lr=s.lr, objective=objectives.ELBO(), batch_size=s.batch_size,
        seed=seed,
    )  # fmt: skip
    est = log_marginal(
        trained.model, trained.guide, test.head(s.num_test), num_particles=s.particles, seed=seed, proposal="guide"
    )
    with torch.no_grad():
        if row == "GMVAE":
            cluster = pair.classifier.net(x).argmax(-1)
            y = torch.eye(s.clusters).repeat_interleave(8, 0)
            drawn = pair.likelihood(pair.prior(context=y).sample()).mean
        else:
            cluster = pair.posterior(x).probs.argmax(-1)
            drawn = pair.component(torch.arange(s.clusters).repeat_interleave(8)).sample()
    np.save(workspace.folder / "samples.npy", drawn.reshape(s.clusters, 8, *test.event_shape).numpy())
    return cells.estimate_summary(est) | cells.training_summary(trained) | cluster_scores(cluster, digit)


def table(found: Cells) -> str:
    """One row per kind."""
    lines = []
    for (name,), r in cells.group_cells(found, "row").items():
        words = []
        for key in ("purity", "accuracy"):
            shares = [100 * v for v in cells.values(r, key)]
            spread = f" ± {statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
            words.append(f"{statistics.fmean(shares):.1f}{spread} %")
        known = "nll" in r[0]["result"]
        lines.append((
            name, len(r), *words, f"{cells.mean(r):.2f} ± {cells.standard_error(r):.2f}" if known else "",
            f"{cells.mean(r, 'bits_per_dim'):.3f}" if known else "",
        ))  # fmt: skip
    header = ("", "seeds", "purity", "accuracy", "test NLL", "bits per dim")
    return cells.markdown(header, lines) + "\n\nThe NLL of a mixture of normals is of a density."


def draw_figure(found: Cells, folder: Path) -> None:
    """Samples of each cluster of the first GMVAE, one column per cluster."""
    paths = [Path(c["folder"]) / "samples.npy" for c in found if c["cell"]["row"] == "GMVAE"]
    if paths and paths[0].exists():
        images = np.load(paths[0]).swapaxes(0, 1)
        image_grid(images, images.shape[2:]).savefig(folder / "clusters.png")


def main(args: list[str] | None = None) -> None:
    """Computes the table and draws the figure."""
    found, folder = cells.run("clusters", Settings, ("row", "seed"), compute, table, SMOKE, __doc__, args)
    draw_figure(found, folder)


if __name__ == "__main__":
    main()
