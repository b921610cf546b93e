"""Equality of compiled and eager training: the same VAE on scikit-learn's digits, three seeds each, with eager steps,
with the compiled graph, and with the compiled graph and matrix products in bfloat16. All are evaluated eagerly in
float32.

Within a seed, all rows have the same initial weights and noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from experiments import cells
from experiments.cells import Cells, Workspace
from ppvae import VAE, data, likelihoods, log_marginal, nn, objectives, posteriors, priors

KERNELS = {"eager": (False, "float32"), "compiled": (True, "float32"), "compiled, bf16": (True, "bf16")}


@dataclass(frozen=True)
class Settings:
    """Sizes and training budget, the same for every row."""

    rows: tuple[str, ...] = tuple(KERNELS)
    seeds: tuple[int, ...] = (0, 1, 2)
    data: str = "digits"
    latent: int = 8
    hidden: tuple[int, ...] = (200, 200)
    draws: int = 5
    epochs: int = 100
    batch_size: int = 50
    lr: float = 1e-3
    particles: int = 1000


SMOKE = {"seeds": (0,), "latent": 2, "hidden": (8,), "epochs": 1, "particles": 25}


def compute(s: Settings, workspace: Workspace, row: str, seed: int) -> dict[str, Any]:
    """Trains one row and evaluates it on the test images."""
    images, valid, test = data.load(s.data, workspace.root, binarize="dynamic")
    torch.manual_seed(seed)
    dims = images.shape[1]
    vae = VAE(
        priors.StandardNormal(s.latent),
        likelihoods.Bernoulli(nn.mlp(s.latent, dims, hidden=s.hidden)),
        posteriors.DiagonalNormal(nn.mlp(dims, 2 * s.latent, hidden=s.hidden)),
    )
    compiled, precision = KERNELS[row]
    trained = cells.train(
        vae, images, valid, workspace, epochs=s.epochs, lr=s.lr, objective=objectives.IWAE(s.draws),
        batch_size=s.batch_size, seed=seed, compile=compiled, precision=precision,
    )  # fmt: skip
    est = log_marginal(
        trained.model, trained.guide, test, num_particles=s.particles, seed=seed, compile=False, proposal="guide"
    )
    return cells.estimate_summary(est) | cells.training_summary(trained) | {"kernels": trained.config["kernels"]}


def table(found: Cells) -> str:
    """One row per kind of step, compared with the eager one."""
    rows = {row: r for (row,), r in cells.group_cells(found, "row").items()}
    lines = [
        (
            row, len(r), f"{cells.mean(r):.2f} ± {cells.standard_error(r):.2f}",
            cells.compare_rows(r, rows["eager"]) if row != "eager" and "eager" in rows else "",
            f"{cells.mean(r, 'cpu_ms_per_step'):.1f}",
        )
        for row, r in rows.items()
    ]  # fmt: skip
    return cells.markdown(("steps", "seeds", "test NLL", "gain on eager", "CPU ms/step"), lines)


def main(args: list[str] | None = None) -> None:
    """Computes the table."""
    cells.run("compiled", Settings, ("row", "seed"), compute, table, SMOKE, __doc__, args)


if __name__ == "__main__":
    main()
