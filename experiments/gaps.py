"""Inference gaps on MNIST, after Cremer et al. 2018: log p(x) - ELBO of a diagonal, an IAF and a semi-amortised guide,
split into approximation gap and amortisation gap, on training and test images. The semi-amortised guide takes three
gradient steps per image."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.cells import Cells, Workspace, estimate_summary, group_cells, markdown, mean, run
from experiments.cells import train as train_pair
from ppvae import VAE, data, likelihoods, log_marginal, nn, plots, posteriors, priors
from ppvae.evaluation.local.full_rank import JointNormalFamily
from ppvae.evaluation.local.gaps import Gaps, gaps

# Cremer et al. 2018 (arXiv 1801.03558), MNIST, factorised Gaussian guide, quoted from memory, not verified
PUBLISHED = {"log p": -89.80, "best": -91.23, "elbo": -92.57}


@dataclass(frozen=True)
class Settings:
    """Networks and batches of the paper; cosine decay of the learning rate over fewer epochs."""

    guides: tuple[str, ...] = ("DiagonalNormal", "IAF", "SemiAmortized")
    splits: tuple[str, ...] = ("train", "test")
    seeds: tuple[int, ...] = (0,)
    data: str = "mnist"
    latent: int = 50
    hidden: tuple[int, ...] = (200, 200)
    epochs: int = 40
    batch_size: int = 100
    lr: float = 1e-3
    refits: int = 100
    networks: int = 5
    steps: int = 300
    rounds: int = 8
    particles: int = 5000


SMOKE = {"data": "digits", "latent": 2, "hidden": (16,), "epochs": 1, "refits": 4, "networks": 2, "steps": 5}
SMOKE |= {"rounds": 1, "particles": 50}


def build_posterior(s: Settings, name: str, dims: int, prior: Any, likelihood: Any) -> torch.nn.Module:
    """The posterior of a name."""
    net = functools.partial(nn.mlp, dims, hidden=s.hidden, activation=torch.nn.ELU)
    make: dict[str, Callable[[], torch.nn.Module]] = {
        "DiagonalNormal": lambda: posteriors.DiagonalNormal(net(2 * s.latent)),
        "IAF": lambda: posteriors.IAF(net(3 * s.latent), s.latent, features=s.latent),
        "SemiAmortized": lambda: posteriors.SemiAmortized(net(2 * s.latent), prior, likelihood, steps=3),
    }
    return make[name]()


def compute(s: Settings, workspace: Workspace, guide: str, split: str, seed: int) -> dict[str, Any]:
    """Trains one pair (once for both splits) and refits its guide on the first images of a split.

    An IAF has its network refit, image by image, on `networks` images, and no richer family; the others on `refits`.
    """
    train, valid, test = data.load(s.data, workspace.root, binarize="fixed")
    torch.manual_seed(seed)
    dims = train.shape[1]
    prior = priors.StandardNormal(s.latent)
    likelihood = likelihoods.Bernoulli(nn.mlp(s.latent, dims, hidden=s.hidden, activation=torch.nn.ELU))
    vae = VAE(prior, likelihood, build_posterior(s, guide, dims, prior, likelihood))
    trained = train_pair(
        vae,
        train,
        valid,
        dataclasses.replace(workspace, folder=workspace.folder.parent / f"{guide}-{seed}"),
        epochs=s.epochs,
        lr=s.lr,
        batch_size=s.batch_size,
        seed=seed,
    )
    images = {"train": train, "test": test}[split].head(s.networks if guide == "IAF" else s.refits)
    pair = trained.model, trained.guide
    richer = None if guide == "IAF" else JointNormalFamily  # a full-rank normal is not more flexible than a flow
    found = gaps(
        *pair, images, num_particles=s.particles, steps=s.steps, rounds=s.rounds, richer=richer, seed=seed,
        directory=workspace.folder / "blocks",
    )  # fmt: skip
    found.save(workspace.folder, "gaps")
    est = log_marginal(*pair, images, num_particles=s.particles, seed=seed, proposal="guide")
    parts = {"log_px": found.log_px, "elbo": found.elbo, "best_elbo": found.best_elbo, "inference": found.inference}
    parts |= {"approximation": found.approximation, "amortisation": found.amortisation, "gained": found.gained}
    if found.richer_elbo is not None:
        parts["beyond_richer"] = found.log_px - found.richer_elbo
    numbers = {f"gap_{name}": float(values.mean()) for name, values in parts.items()}
    errors = {f"gap_{name}_error": float(values.std() / math.sqrt(len(values))) for name, values in parts.items()}
    words = {"refit": found.refit, "rounds": found.rounds, "untrusted": int((~found.reliable).sum())}
    return estimate_summary(est) | numbers | errors | words


def table(cells: Cells) -> str:
    """One row per guide and split, and the paper's."""
    header = (
        "guide",
        "images",
        "log p(x)",
        "best ELBO",
        "ELBO",
        "approximation gap",
        "amortisation gap",
        "full rank leaves",
    )
    lines: list[tuple[Any, ...]] = []
    for (guide, split), r in group_cells(cells, "guide", "split").items():
        values = [f"{mean(r, f'gap_{name}'):.2f}" for name in ("log_px", "best_elbo", "elbo")]
        gap = [
            f"{mean(r, f'gap_{n}'):.2f} ± {mean(r, f'gap_{n}_error'):.2f}" for n in ("approximation", "amortisation")
        ]
        rest = f"{mean(r, 'gap_beyond_richer'):.2f}" if "gap_beyond_richer" in r[0]["result"] else ""
        lines.append((guide, f"{split}, {r[0]['result']['num_data']}", *values, *gap, rest))
    p = PUBLISHED
    published = (f"{v:.2f}" for v in (p["log p"], p["best"], p["elbo"], p["log p"] - p["best"], p["best"] - p["elbo"]))
    lines.append(("Cremer et al., diagonal (from memory)", "test", *published, ""))
    return markdown(header, lines)


def draw_figure(cells: Cells, folder: Path) -> None:
    """A bar per guide and split, for the first seed."""
    found = {}
    for (guide, split), row in group_cells(cells, "guide", "split").items():
        path = Path(row[0]["folder"]) / "gaps.json"
        if path.exists():
            found[f"{guide}, {split}"] = Gaps.load(path)
    if found:
        plots.gap_bars(found).savefig(folder / "gaps.png")


def main(args: list[str] | None = None) -> None:
    """Computes the table and draws the figure."""
    cells, folder = run("gaps", Settings, ("guide", "split", "seed"), compute, table, SMOKE, __doc__, args)
    draw_figure(cells, folder)


if __name__ == "__main__":
    main()
