"""Likelihoods of grey levels in bits per dimension: MNIST, Frey faces and Fashion-MNIST, the same steps for each.

A mass of the 256 levels is exact. A density is of dequantised data, v -> (v + u) / 256, and its figure an upper bound
on the bits of the mass that it defines on the levels, P(v) = integral of p over v's bin (Theis et al. 2016, arXiv
1511.01844). The two are different measures, so that each kind is ranked by itself. A Bernoulli takes binary data only,
and is refused here: what it would give for grey values is the log-likelihood of nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn as tnn

from experiments import cells
from experiments.cells import Cells, Here
from ppvae import VAE, data, generate, likelihoods, log_marginal, nn, posteriors, priors

Build = Callable[[tnn.Module, int], tnn.Module]
MASSES: dict[str, Build] = {
    "DiscretizedLogistic": lambda net, levels: likelihoods.DiscretizedLogistic(net, levels=levels),
    "MixtureOfDiscretizedLogistics": lambda net, levels: likelihoods.MixtureOfDiscretizedLogistics(net, levels=levels),
    "Categorical": lambda net, levels: likelihoods.Categorical(net, levels=levels),
}
DENSITIES: dict[str, Build] = {
    "Normal": lambda net, levels: likelihoods.Normal(net, scale="network"),
    "Laplace": lambda net, levels: likelihoods.Laplace(net, scale="network"),
    "StudentT": lambda net, levels: likelihoods.StudentT(net, scale="network", df="learned"),
    "Beta": lambda net, levels: likelihoods.Beta(net),
    "ContinuousBernoulli": lambda net, levels: likelihoods.ContinuousBernoulli(net),
}


@dataclass(frozen=True)
class Settings:
    """The budget that every likelihood gets on a data set."""

    names: tuple[str, ...] = ("freyfaces", "mnist", "fashion-mnist")
    likelihoods: tuple[str, ...] = (*MASSES, *DENSITIES)
    seeds: tuple[int, ...] = (0,)
    latent: int = 20
    encoder: tuple[int, ...] = (200, 200)
    decoder: tuple[int, ...] = (200, 64)
    steps: int = 2000
    batch_size: int = 100
    lr: float = 1e-3
    clip: float = 1000.0
    num_test: int = 1000
    particles: int = 200


SMOKE = {"names": ("digits",), "latent": 2, "encoder": (16,), "decoder": (8,), "steps": 13, "num_test": 20}
SMOKE |= {"particles": 25}


def compute(s: Settings, here: Here, name: str, likelihood: str, seed: int) -> dict[str, Any]:
    """Trains one VAE and evaluates it on the first test images."""
    images, valid, test = data.load(name, here.root, dequantize=likelihood in DENSITIES)
    torch.manual_seed(seed)
    dims = images.shape[1]
    build = (MASSES | DENSITIES)[likelihood]
    (outputs,) = build(tnn.Identity(), images.levels).output_shape((dims,))
    vae = VAE(
        priors.StandardNormal(s.latent),
        build(nn.mlp(s.latent, outputs, hidden=s.decoder), images.levels),
        posteriors.DiagonalNormal(nn.mlp(dims, 2 * s.latent, hidden=s.encoder)),
    )
    epochs = math.ceil(s.steps / math.ceil(len(images) / s.batch_size))
    trained = cells.train(
        vae, images, valid, here, epochs=epochs, lr=s.lr, batch_size=s.batch_size, clip=s.clip, seed=seed
    )
    held_out = test.head(s.num_test)
    est = log_marginal(trained.model, trained.guide, held_out, num_particles=s.particles, seed=seed, rows=500)
    own = {
        "kind": "mass" if likelihood in MASSES else "density",
        "levels": images.levels,
        "at_floor": at_floor(vae, trained, held_out),
        "parameters": sum(p.numel() for p in vae.parameters()),
    }
    return cells.of_estimate(est) | cells.of_run(trained) | own


@torch.no_grad()
def at_floor(vae: VAE, trained: Any, x: torch.Tensor) -> float | None:
    """The share of the scales at the posterior means that have come within 10 % of their floor, if there is one."""
    floor = getattr(vae.likelihood, "floor", None)
    if floor is None:
        return None
    z = generate.posterior_means(trained.model, trained.guide, x)["z"]
    return float((vae.likelihood(z).base_dist.scale <= 1.1 * floor).double().mean())


def table(found: Cells) -> str:
    """Two tables a data set: masses and densities, each ranked by itself."""
    kinds = {
        "mass": "log-mass of the {} levels, exact",
        "density": "density of dequantised data, an upper bound on the bits of {} levels: not to be ranked with masses",
    }
    header = ("", "likelihood", "seeds", "bits per dim", "behind the first", "at floor", "not reliable", "CPU ms/step")
    out = []
    for (name,), of_data in cells.collected(found, "name").items():
        for kind, title in kinds.items():
            some = [c for c in of_data if c["result"]["kind"] == kind]
            rows = sorted(
                cells.collected(some, "likelihood").items(), key=lambda row: cells.mean(row[1], "bits_per_dim")
            )
            lines = [line(rank, likelihood, r, rows[0][1]) for rank, ((likelihood,), r) in enumerate(rows, 1)]
            if rows:
                title = title.format(some[0]["result"]["levels"])
                out.append(f"**{name}**: {title}\n\n{cells.markdown(header, lines)}\n")
    return "\n".join(out)


def line(rank: int, likelihood: str, row: Cells, first: Cells) -> tuple[Any, ...]:
    """A likelihood's line; how far it is behind the first of its kind, with the paired standard error."""
    unit = cells.mean(row, "dims") * math.log(2)
    behind, error = cells.difference(first, row) if row is not first else (0.0, 0.0)
    floor = row[0]["result"]["at_floor"]
    return (
        rank,
        likelihood,
        len(row),
        f"{cells.mean(row, 'bits_per_dim'):.3f} ± {cells.standard_error(row) / unit:.3f}",
        f"{behind / unit:.3f} ± {error / unit:.3f}" if row is not first else "",
        "" if floor is None else f"{100 * floor:.0f} % of scales",
        f"{100 * cells.mean(row, 'unreliable') / cells.mean(row, 'num_data'):.0f} %",
        f"{cells.mean(row, 'cpu_ms_per_step'):.1f}",
    )


def main(args: list[str] | None = None) -> None:
    """Fills the table."""
    cells.run("likelihoods", Settings, ("name", "likelihood", "seed"), compute, table, SMOKE, __doc__, args)


if __name__ == "__main__":
    main()
