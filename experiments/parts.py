"""Priors and posteriors on dynamically binarised MNIST, with the same networks, epochs, schedule and batches.

One table of test NLL at K = 500 particles, and a figure of samples of each pair. Beside an IAF, VampPrior is a mixture
of the base distribution of the flow at the pseudo-inputs: the density of a sample under 100 flows takes many seconds a
step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch

from experiments import cells
from experiments.cells import Cells, Workspace
from ppvae import VAE, data, generate, likelihoods, log_marginal, nn, posteriors, priors
from ppvae.plots import image_grid


@dataclass(frozen=True)
class Settings:
    """Sizes and training budget, the same for every pair."""

    priors: tuple[str, ...] = ("StandardNormal", "Mixture", "VampPrior", "MAF", "NeuralSpline")
    posteriors: tuple[str, ...] = ("DiagonalNormal", "IAF")
    seeds: tuple[int, ...] = (0,)
    data: str = "mnist"
    latent: int = 40
    hidden: tuple[int, ...] = (300, 300)
    components: int = 100
    epochs: int = 20
    batch_size: int = 100
    lr: float = 3e-3
    num_test: int = 10_000
    particles: int = 500


SMOKE = {"data": "digits", "latent": 4, "hidden": (16,), "components": 5, "epochs": 1, "num_test": 20, "particles": 25}


class FlowBase(torch.nn.Module):
    """The base distribution of an IAF, a diagonal normal, with the same network.

    The density of a sample under K flows would take K * latent passes.
    """

    def __init__(self, iaf: posteriors.IAF):
        super().__init__()
        self.iaf = iaf

    def forward(self, x: torch.Tensor) -> dist.TorchDistribution:
        loc, log_scale, _ = self.iaf.net(x).split([self.iaf.latent, self.iaf.latent, self.iaf.features], -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)


def vamp_prior(s: Settings, posterior: torch.nn.Module, train: Any) -> torch.nn.Module:
    """A VampPrior of the posterior, or of the base of its flow."""
    components = FlowBase(posterior) if isinstance(posterior, posteriors.IAF) else posterior
    return priors.VampPrior.from_data(components, train, s.components)


PRIORS: dict[str, Callable[[Settings, torch.nn.Module, Any], torch.nn.Module]] = {
    "StandardNormal": lambda s, posterior, train: priors.StandardNormal(s.latent),
    "Mixture": lambda s, posterior, train: priors.MixtureOfNormals(s.latent, s.components),
    "VampPrior": vamp_prior,
    "MAF": lambda s, posterior, train: priors.MAF(s.latent),
    "NeuralSpline": lambda s, posterior, train: priors.NeuralSpline(s.latent),
}
POSTERIORS: dict[str, Callable[[Settings, int], torch.nn.Module]] = {
    "DiagonalNormal": lambda s, dims: posteriors.DiagonalNormal(nn.mlp(dims, 2 * s.latent, hidden=s.hidden)),
    "IAF": lambda s, dims: posteriors.IAF(nn.mlp(dims, 3 * s.latent, hidden=s.hidden), s.latent, features=s.latent),
}


def compute(s: Settings, workspace: Workspace, prior: str, posterior: str, seed: int) -> dict[str, Any]:
    """Trains one pair and evaluates it on the test images."""
    images, valid, test = data.load(s.data, workspace.root, binarize="dynamic")
    torch.manual_seed(seed)
    dims = images.shape[1]
    decoder = nn.mlp(s.latent, dims, hidden=s.hidden)
    nn.set_output_bias(decoder, images.as_subclass(torch.Tensor).mean(0).clamp(1e-3, 1 - 1e-3).logit())
    q = POSTERIORS[posterior](s, dims)
    vae = VAE(PRIORS[prior](s, q, images), likelihoods.Bernoulli(decoder), q)
    trained = cells.train(vae, images, valid, workspace, epochs=s.epochs, lr=s.lr, batch_size=s.batch_size, seed=seed)
    drawn = generate.samples(trained.model, trained.guide, test[:1].to(workspace.device or "cpu"), 16, seed=seed)
    np.save(workspace.folder / "samples.npy", drawn.reshape(16, *test.event_shape).cpu().numpy())
    est = log_marginal(
        trained.model, trained.guide, test.head(s.num_test), num_particles=s.particles, seed=seed, proposal="guide"
    )
    return (
        cells.estimate_summary(est)
        | cells.training_summary(trained)
        | {
            "parameters": sum(p.numel() for p in vae.parameters()),
        }
    )


def table(found: Cells) -> str:
    """One row per pair, compared with the plain VAE."""
    rows = cells.group_cells(found, "prior", "posterior")
    plain = rows.get(("StandardNormal", "DiagonalNormal"))
    header = ("prior", "posterior", "seeds", "test NLL", "ELBO", "gain on the plain VAE", "unreliable", "CPU ms/step")
    lines = []
    for (prior, posterior), r in rows.items():
        gain = cells.compare_rows(r, plain) if plain and r is not plain else ""
        share = f"{100 * cells.mean(r, 'unreliable') / cells.mean(r, 'num_data'):.1f} %"
        nll = f"{cells.mean(r):.2f} ± {cells.standard_error(r):.2f}"
        elbo, ms = f"{cells.mean(r, 'elbo'):.2f}", f"{cells.mean(r, 'cpu_ms_per_step'):.1f}"
        lines.append((prior, posterior, len(r), nll, elbo, gain, share, ms))
    return cells.markdown(header, lines)


def draw_samples(folder: Path) -> None:
    """Sixteen samples per pair, from its first cell; cells without their run folder are left out."""
    rows = {}
    for (prior, posterior), row in cells.group_cells(
        cells.load_cells(folder, Settings()), "prior", "posterior"
    ).items():
        path = Path(row[0]["folder"]) / "samples.npy"
        if path.exists():
            rows[f"{prior}, {posterior}"] = np.load(path)
    if rows:
        images = np.stack(list(rows.values()))
        image_grid(images, images.shape[2:], row_titles=list(rows)).savefig(folder / "samples.png")


def main(args: list[str] | None = None) -> None:
    """Computes the table and draws the figure."""
    axes = ("prior", "posterior", "seed")
    _, folder = cells.run("parts", Settings, axes, compute, table, SMOKE, __doc__, args)
    draw_samples(folder)


if __name__ == "__main__":
    main()
