"""Likelihoods of counts: on a simulated trajectory, where z ~ N(0, 1) moves the expected shares of the features along a
curve, and library sizes and log p(x) are known; and on scikit-learn's digits, as numbers of dark pixels among the 4 x 4
pixels of a scan."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor
from torch import nn as tnn

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
)
from ppvae import VAE, data, fit, generate, likelihoods, log_marginal, nn, posteriors, priors
from ppvae.plots.style import BLUE, GREEN, VERMILLION, figure, styled

NAMES = ("Poisson", "NegativeBinomial", "ZeroInflatedPoisson", "ZeroInflatedNegativeBinomial")


@dataclass(frozen=True)
class Settings:
    """The simulation, and the training budget, the same for every likelihood."""

    sources: tuple[str, ...] = ("NegativeBinomial", "ZeroInflatedNegativeBinomial", "digits")
    likelihoods: tuple[str, ...] = NAMES
    seeds: tuple[int, ...] = (0, 1, 2)
    features: int = 40
    num_train: int = 3000
    num_test: int = 500
    concentration: float = 2.0
    extra_zeros: float = 0.3
    latent: int = 4
    hidden: tuple[int, ...] = (64, 64)
    epochs: int = 60
    lr: float = 2e-3
    particles: int = 500


SMOKE = {"likelihoods": NAMES[::3], "seeds": (0,), "num_train": 60, "num_test": 20, "epochs": 1, "particles": 25}


def true_distribution(s: Settings, source: str, z: Tensor, library: Tensor) -> dist.TorchDistribution:
    """p(x | z) of the simulation, in Pyro's own distributions: z [...], library [...] -> event [features]."""
    slope, bend, start = torch.randn(3, s.features, generator=torch.Generator().manual_seed(0)).double()
    shares = (start + slope * z[..., None] + 0.5 * bend * z[..., None] ** 2).softmax(-1)
    logits = (library[..., None] * shares / s.concentration).log()
    fn: Any = dist.NegativeBinomial(s.concentration, logits=logits)
    if source.startswith("ZeroInflated"):
        fn = dist.ZeroInflatedDistribution(fn, gate=torch.tensor(s.extra_zeros).double())
    return fn.to_event(1)


def simulate(s: Settings, source: str, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts, library sizes, the true z and the true log p(x | library), by quadrature."""
    torch.manual_seed(seed)
    z, library = torch.randn(count).double(), (5.5 + 0.4 * torch.randn(count)).double().exp()
    x = true_distribution(s, source, z, library).sample()
    grid = torch.linspace(-6, 6, 601).double()
    prior = dist.Normal(0.0, 1.0).log_prob(grid) + math.log(float(grid[1] - grid[0]))
    log_px = [
        (true_distribution(s, source, grid[:, None], n[None]).log_prob(row[None]) + prior[:, None]).logsumexp(0)
        for row, n in zip(x.split(50), library.split(50), strict=True)
    ]
    return x.float(), library.float(), z, torch.cat(log_px)


def compute(s: Settings, workspace: Workspace, source: str, likelihood: str, seed: int) -> dict[str, Any]:
    """Trains one VAE and evaluates it on held-out counts."""
    if known := source != "digits":
        sizes = (s.num_train, s.num_test, s.num_test)
        (*train, _, _), (*valid, _, _), (*test, z, log_px) = (simulate(s, source, n, i) for i, n in enumerate(sizes))
    else:
        train, valid, test = ([(16 * part.read()).round()[: s.num_train]] for part in data.load("digits"))
    torch.manual_seed(seed)
    dims = train[0].shape[1]
    options = {"concentration": (dims,)} if "Binomial" in likelihood else {}
    build = functools.partial(getattr(likelihoods, likelihood), library=known, **options)
    (outputs,) = build(tnn.Identity()).output_shape((dims,))
    vae = VAE(
        priors.StandardNormal(s.latent),
        build(nn.mlp(s.latent, outputs, hidden=s.hidden)),
        posteriors.DiagonalNormal(tnn.Sequential(nn.Log1p(), nn.mlp(dims, 2 * s.latent, hidden=s.hidden))),
    )
    optimizer = functools.partial(torch.optim.Adam, lr=s.lr)
    trained = fit(
        vae.model, vae.guide, train, valid=valid, optimizer=optimizer, epochs=s.epochs, seed=seed,
        device=workspace.device, directory=workspace.folder, resume=True, patience=10,
    )  # fmt: skip
    est = log_marginal(trained.model, trained.guide, test, num_particles=s.particles, seed=seed, proposal="guide")
    result = estimate_summary(est) | {"valid_elbo": max(epoch["valid_elbo"] for epoch in trained.history)}
    if known:
        made = generate.reconstructions(trained.model, trained.guide, test, seed=seed)
        right, unit = true_distribution(s, source, z, test[1].double()).mean, test[1][:, None]
        np.savez(workspace.folder / "shown.npz", z=z, truth=right / unit, made=made.cpu() / unit)
        behind = log_px - est.log_px
        result |= {"behind": float(behind.mean()), "behind_error": float(behind.std()) / math.sqrt(len(z))}
    return result


def table(cells: Cells) -> str:
    """One row per likelihood, a table per source."""
    header = (
        "counts",
        "likelihood",
        "seeds",
        "test NLL",
        "excess over the truth",
        "gain on Poisson",
        "unreliable",
    )
    lines = []
    for (source, likelihood), r in (rows := group_cells(cells, "source", "likelihood")).items():
        poisson = rows.get((source, "Poisson"))
        gain = compare_rows(r, poisson) if poisson and r is not poisson else ""
        behind = f"{mean(r, 'behind'):.2f} ± {mean(r, 'behind_error'):.2f}" if "behind" in r[0]["result"] else ""
        share = f"{100 * mean(r, 'unreliable') / mean(r, 'num_data'):.0f} %"
        lines.append((source, likelihood, len(r), f"{mean(r):.2f} ± {standard_error(r):.2f}", behind, gain, share))
    return markdown(header, lines)


@styled
def draw_figure(cells: Cells) -> Any:
    """The expected shares of three features along the true z: lines are the truth, crosses the fitted likelihood."""
    drawn = [c for c in cells if (Path(c["folder"]) / "shown.npz").exists()]
    rows, shape = (
        group_cells(drawn, "source", "likelihood"),
        [len(group_cells(drawn, a)) for a in ("source", "likelihood")],
    )
    fig = figure(3.0 * shape[1], 2.6 * shape[0])
    for ax, ((source, name), r) in zip(fig.subplots(*shape, squeeze=False).flat, rows.items(), strict=False):
        held = np.load(Path(r[0]["folder"]) / "shown.npz")
        z, right, made = (held[key][held["z"].argsort()] for key in ("z", "truth", "made"))
        for d, colour in zip(right.mean(0).argsort()[::-1][:3], (BLUE, VERMILLION, GREEN), strict=True):
            ax.plot(z, made[:, d], "x", color=colour, markersize=2.5, alpha=0.5)
            ax.plot(z, right[:, d], color=colour)
        title = f"{name}\n{mean(r, 'behind'):.2f} nats behind"
        ax.set(title=title, xlabel=f"true z of {source}", ylabel="share of a feature", ylim=(0, 0.5))
    return fig


def main(args: list[str] | None = None) -> None:
    """Computes the table and draws the figure."""
    cells, folder = run("counts", Settings, ("source", "likelihood", "seed"), compute, table, SMOKE, __doc__, args)
    draw_figure(cells).savefig(folder / "counts.png")


if __name__ == "__main__":
    main()
