"""Amortised and per-datum posteriors: the ELBO on one set of images by passes and CPU time, and the amortisation gap.

The same model is trained on the same 1000 images with three guides: separate parameters for each image (classical
variational inference), a network that maps images to parameters, and a network followed by three gradient steps per
image. The first has no amortisation gap at convergence, but takes one step per image and pass, and does not apply to
new images; the second has a gap, which is larger on images outside the training set. ELBOs are those of the training
images: the experiment compares speed, not generalisation."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from experiments import cells
from experiments.cells import Cells, Workspace
from ppvae import VAE, data, likelihoods, nn, posteriors, priors
from ppvae.evaluation.local.gaps import gaps
from ppvae.plots.style import BLUE, GREEN, VERMILLION, decimal_log_ticks, figure, styled

NAMES = {"PerDatum": "one by one", "DiagonalNormal": "amortised", "SemiAmortized": "semi-amortised"}
COLOURS = dict(zip(NAMES, (VERMILLION, BLUE, GREEN), strict=True))


@dataclass(frozen=True)
class Settings:
    """Sizes and training budget, the same for every guide."""

    guides: tuple[str, ...] = tuple(NAMES)
    seeds: tuple[int, ...] = (0,)
    data: str = "mnist"
    num_data: int = 1000
    latent: int = 20
    hidden: tuple[int, ...] = (200, 200)
    passes: int = 300
    batch_size: int = 100
    lr: float = 1e-3
    table_lr: float = 0.1  # of the parameters of every image; with 0.03 the ELBO is lower throughout
    refits: int = 100
    steps: int = 200
    rounds: int = 5
    particles: int = 500


SMOKE = {"data": "digits", "num_data": 50, "latent": 2, "hidden": (16,), "passes": 3, "refits": 4, "steps": 3}
SMOKE |= {"rounds": 1, "particles": 50}


def build_posterior(s: Settings, name: str, dims: int, prior: Any, likelihood: Any) -> torch.nn.Module:
    """The posterior of a name."""
    net = nn.mlp(dims, 2 * s.latent, hidden=s.hidden)
    make: dict[str, Callable[[], torch.nn.Module]] = {
        "PerDatum": lambda: posteriors.PerDatum(s.num_data, 2 * s.latent),
        "DiagonalNormal": lambda: posteriors.DiagonalNormal(net),
        "SemiAmortized": lambda: posteriors.SemiAmortized(net, prior, likelihood, steps=3),
    }
    return make[name]()


def build_optimizer(s: Settings, table: set[int], params: list[torch.Tensor]) -> torch.optim.Adam:
    """Adam, with a separate learning rate for the per-image parameters."""
    rates = {s.lr: [p for p in params if id(p) not in table], s.table_lr: [p for p in params if id(p) in table]}
    return torch.optim.Adam([{"params": own, "lr": lr} for lr, own in rates.items() if own])


def compute(s: Settings, workspace: Workspace, guide: str, seed: int) -> dict[str, Any]:
    """Trains the model with one guide; refits the guide on some training images and, where possible, on new ones."""
    train, _, test = data.load(s.data, workspace.root, binarize="fixed")
    images = train.head(s.num_data)
    torch.manual_seed(seed)
    dims = images.shape[1]
    decoder = nn.mlp(s.latent, dims, hidden=s.hidden)
    nn.set_output_bias(decoder, images.as_subclass(torch.Tensor).mean(0).clamp(1e-2, 1 - 1e-2).logit())
    prior, likelihood = priors.StandardNormal(s.latent), likelihoods.Bernoulli(decoder)
    vae = VAE(prior, likelihood, build_posterior(s, guide, dims, prior, likelihood))
    alone = guide == "PerDatum"
    batch: Any = data.indexed(images) if alone else images
    table = {id(p) for p in vae.posterior.parameters()} if alone else set()
    trained = cells.train(
        vae, batch, None, workspace, epochs=s.passes, lr=s.lr, batch_size=s.batch_size, seed=seed,
        optimizer=functools.partial(build_optimizer, s, table),
        scheduler=functools.partial(CosineAnnealingLR, T_max=s.passes),
    )  # fmt: skip
    cpu = list(itertools.accumulate(epoch["cpu_seconds"] for epoch in trained.history))
    elbo = [epoch["train_elbo"] for epoch in trained.history]
    result = {"digest": data.digest(images), "elbo": elbo[-1], "cpu": cpu[-1], "curve": elbo, "cpu_curve": cpu}
    seen = tuple(t[: s.refits] for t in batch) if alone else images.head(s.refits)
    for part, x in {"seen": seen, **({} if alone else {"new": test.head(s.refits)})}.items():
        found = gaps(
            trained.model, trained.guide, x, num_particles=s.particles, steps=s.steps, rounds=s.rounds, richer=None,
            log_px=torch.zeros(s.refits), seed=seed, directory=workspace.folder / "blocks" / part,
        )  # fmt: skip
        result[f"{part}_elbo"] = float(found.elbo.mean())
        result[f"{part}_gap"] = float(found.amortisation.mean())
        result[f"{part}_gap_error"] = float(found.amortisation.std() / len(found.elbo) ** 0.5)
    return result


def table(found: Cells) -> str:
    """One row per guide: the ELBO by passes and CPU time, and the gain of a refit of each image."""
    longest = len(found[0]["result"]["curve"])
    passes = [p for p in (1, 10, 100, 300) if p <= longest]
    seconds = [5, 20]
    header = ("guide", *(f"pass {p}" for p in passes), *(f"{t} CPU s" for t in seconds))
    header += ("CPU s in all", "gap, these images", "gap, new images")
    lines = []
    for (guide,), r in cells.group_cells(found, "guide").items():
        curve, cpu = (np.mean([c["result"][key] for c in r], 0) for key in ("curve", "cpu_curve"))
        at = [f"{curve[p - 1]:.1f}" for p in passes]
        by = [f"{curve[cpu <= t][-1]:.1f}" if cpu[0] <= t < cpu[-1] else "" for t in seconds]
        parts = [part for part in ("seen", "new") if f"{part}_gap" in r[0]["result"]]
        gap = [f"{cells.mean(r, f'{p}_gap'):.2f} ± {cells.mean(r, f'{p}_gap_error'):.2f}" for p in parts]
        gap += ["none: knows no new images"] * (2 - len(gap))
        lines.append((NAMES[guide], *at, *by, f"{cells.mean(r, 'cpu'):.0f}", *gap))
    return cells.markdown(header, lines)


@styled
def draw_figure(found: Cells) -> Any:
    """The ELBO of the training images by passes and by CPU time."""
    fig = figure(7.6, 3.0)
    axes = fig.subplots(1, 2, sharey=True)
    for (guide,), r in cells.group_cells(found, "guide").items():
        curve, cpu = r[0]["result"]["curve"], r[0]["result"]["cpu_curve"]
        for ax, x in zip(axes, (range(1, len(curve) + 1), cpu), strict=True):
            ax.plot(x, curve, color=COLOURS[guide], label=NAMES[guide])
    for ax, words in zip(axes, ("passes", "CPU seconds"), strict=True):
        ax.set(xscale="log", xlabel=words)
        decimal_log_ticks(ax.xaxis)
    axes[0].set_ylabel("ELBO of the images (nats)")
    axes[1].legend(loc="lower right")
    return fig


def main(args: list[str] | None = None) -> None:
    """Computes the table and draws the figure."""
    found, folder = cells.run("amortised", Settings, ("guide", "seed"), compute, table, SMOKE, __doc__, args)
    draw_figure(found).savefig(Path(folder) / "amortised.png")


if __name__ == "__main__":
    main()
