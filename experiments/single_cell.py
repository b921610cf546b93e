"""Simulated counts of single cells: four cell types in two batches, which shift genes and differ in depth; three in ten
counts are lost (zero-inflated), or none. A `CountVAE` is given the batch, or a constant in its place (Lopez et al.
2018). "Batch in z" is the accuracy of 15 nearest neighbours in predicting the batch of test cells from z (chance: 50
%), "types" the adjusted Rand index of k-means on z with the true cell types."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from experiments.cells import (
    Cells,
    Workspace,
    compare_rows,
    estimate_summary,
    group_cells,
    markdown,
    mean,
    run,
    standard_error,
    train,
)
from ppvae import generate, likelihoods, log_marginal, nn, posteriors, priors
from ppvae.models import CountVAE
from ppvae.plots.style import BLUE, CLASSES, VERMILLION, figure, styled

NAMES = ("NegativeBinomial", "ZeroInflatedNegativeBinomial")


@dataclass(frozen=True)
class Settings:
    """The simulation, and the training budget, the same for every model."""

    sources: tuple[str, ...] = NAMES
    likelihoods: tuple[str, ...] = NAMES
    corrections: tuple[str, ...] = ("given", "ignored")
    seeds: tuple[int, ...] = (0, 1, 2)
    genes: int = 60
    types: int = 4
    num_train: int = 3000
    concentration: float = 2.0
    dropout: float = 0.3
    latent: int = 4
    hidden: tuple[int, ...] = (64,)
    epochs: int = 40
    lr: float = 2e-3
    particles: int = 500


SMOKE = {"sources": NAMES[1:], "likelihoods": NAMES[1:], "seeds": (0,), "num_train": 80, "epochs": 1, "particles": 25}


def true_distribution(
    s: Settings, source: str, kind: Tensor, t: Tensor, batch: Tensor, library: Tensor
) -> dist.TorchDistribution:
    """p(x | type, t, batch, library) of the simulation, in Pyro's own distributions: all [...] -> event [genes]."""
    start, slope, shift = torch.randn(3, 2 * s.types, s.genes, generator=torch.Generator().manual_seed(0)).double()
    log_share = start[kind] + 0.4 * slope[kind] * t[..., None] + 0.6 * shift[batch]
    log_rate = log_share.log_softmax(-1) + library.log()[..., None]
    fn: Any = dist.NegativeBinomial(s.concentration, logits=log_rate - math.log(s.concentration))
    if source.startswith("ZeroInflated"):
        fn = dist.ZeroInflatedDistribution(fn, gate=torch.tensor(s.dropout).double())
    return fn.to_event(1)


def simulate(s: Settings, source: str, count: int, seed: int) -> dict[str, Tensor]:
    """Counts, batches, library sizes and the true types."""
    torch.manual_seed(seed)
    kind, batch, t = torch.randint(s.types, (count,)), torch.randint(2, (count,)), torch.randn(count).double()
    library = (5.0 + 0.5 * batch + 0.4 * torch.randn(count)).double().exp()
    x = true_distribution(s, source, kind, t, batch, library).sample()
    return {"x": x.float(), "batch": batch, "library": library.float(), "kind": kind}


def true_log_px(s: Settings, source: str, x: Tensor, batch: Tensor, library: Tensor) -> Tensor:
    """log p(x | batch, library) of the simulation, by quadrature over t, [N]."""
    grid = torch.linspace(-5, 5, 201).double()[:, None]
    log_mass = dist.Normal(0.0, 1.0).log_prob(grid) + math.log(10 / 200 / s.types)
    each = [
        true_distribution(s, source, torch.full_like(batch, c), grid, batch, library).log_prob(x)
        for c in range(s.types)
    ]
    return torch.stack([log_lik + log_mass for log_lik in each]).logsumexp((0, 1))


def compute(
    s: Settings, workspace: Workspace, source: str, likelihood: str, correction: str, seed: int
) -> dict[str, Any]:
    """Trains one model; its log p(x) of test cells, and the information on batch and type in z."""
    of = [simulate(s, source, size, i) for i, size in enumerate((s.num_train, s.num_train // 6, s.num_train // 6))]
    told = [c["batch"] if correction == "given" else 0 * c["batch"] for c in of]
    fitted, valid, test = ((c["x"], b, c["library"]) for c, b in zip(of, told, strict=True))
    torch.manual_seed(seed)
    batches = 2 if correction == "given" else 1
    decoder = nn.mlp(s.latent + batches, (1 + NAMES.index(likelihood)) * s.genes, hidden=s.hidden)
    vae = CountVAE(
        priors.StandardNormal(s.latent),
        getattr(likelihoods, likelihood)(decoder, concentration=(s.genes,), library=True),
        posteriors.DiagonalNormal(nn.mlp(s.genes + batches, 2 * s.latent, hidden=s.hidden)),
        batches,
    )
    trained = train(vae, fitted, valid, workspace, epochs=s.epochs, lr=s.lr, seed=seed)
    pair = trained.model, trained.guide
    est = log_marginal(*pair, test, num_particles=s.particles, seed=seed, proposal="guide")
    known, z = (generate.posterior_means(*pair, cells)["z"].cpu().numpy() for cells in (fitted, test))
    neighbours = KNeighborsClassifier(15).fit(known, of[0]["batch"])
    found = KMeans(s.types, n_init=10, random_state=0).fit_predict(z)
    np.savez(workspace.folder / "shown.npz", z=PCA(2).fit_transform(z), batch=of[2]["batch"], type=of[2]["kind"])
    behind = true_log_px(s, source, of[2]["x"], of[2]["batch"], of[2]["library"].double()) - est.log_px
    return estimate_summary(est) | {
        "behind": float(behind.mean()),
        "behind_error": float(behind.std()) / math.sqrt(len(z)),
        "batch_in_z": float(neighbours.score(z, of[2]["batch"])),
        "rand": float(adjusted_rand_score(of[2]["kind"], found)),
    }


def table(cells: Cells) -> str:
    """One row per likelihood and use of the batch, a table per source."""
    header = (
        "cells",
        "likelihood",
        "batch",
        "seeds",
        "test NLL",
        "excess over the truth",
        "gain on NegativeBinomial",
    )
    lines = []
    for key, r in (rows := group_cells(cells, "source", "likelihood", "correction")).items():
        other = rows.get((key[0], NAMES[0], key[2]))
        gain = compare_rows(r, other) if other and r is not other else ""
        behind = f"{mean(r, 'behind'):.2f} ± {mean(r, 'behind_error'):.2f}"
        nll, told = f"{mean(r):.2f} ± {standard_error(r):.2f}", f"{100 * mean(r, 'batch_in_z'):.0f} %"
        doubt = f"{100 * mean(r, 'unreliable') / mean(r, 'num_data'):.0f} %"
        lines.append((*key, len(r), nll, behind, gain, told, f"{mean(r, 'rand'):.2f}", doubt))
    return markdown((*header, "batch in z", "types", "unreliable"), lines)


@styled
def draw_figure(cells: Cells) -> Any:
    """Test cells in two principal components of z, coloured by batch and by type, with and without the batch given."""
    drawn = [c for c in cells if (Path(c["folder"]) / "shown.npz").exists()]
    rows = group_cells([c for c in drawn if {c["cell"]["source"], c["cell"]["likelihood"]} == {NAMES[1]}], "correction")
    fig = figure(6.4, 3.0 * len(rows))
    for axes, ((told,), r) in zip(fig.subplots(len(rows), 2, squeeze=False), rows.items(), strict=True):
        held = np.load(Path(r[0]["folder"]) / "shown.npz")
        for ax, key, colours in zip(axes, ("batch", "type"), ((BLUE, VERMILLION), CLASSES), strict=True):
            for value in np.unique(held[key]):
                ax.plot(*held["z"][held[key] == value].T, ".", color=colours[value], markersize=4)
            ax.set(title=f"batch {told}, by {key}", xlabel="PC 1 of z", ylabel="PC 2")
    return fig


def main(args: list[str] | None = None) -> None:
    """Computes the table and draws the figure."""
    axes = "source", "likelihood", "correction", "seed"
    cells, folder = run("single_cell", Settings, axes, compute, table, SMOKE, __doc__, args)
    draw_figure(cells).savefig(folder / "single_cell.png")


if __name__ == "__main__":
    main()
