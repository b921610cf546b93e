"""Likelihoods of grey levels in bits per dimension: MNIST, Frey faces and Fashion-MNIST, with the same number of steps
each.

A mass on the 256 levels is exact. A density is that of dequantised data, v -> (v + u) / 256; its bits per dim are an
upper bound on those of the mass that it defines on the levels, P(v) = integral of p over the bin of v (Theis et al.
2016, arXiv 1511.01844). The two have different base measures, so each kind is ranked separately. A Bernoulli takes
binary data only and is refused here. Parameters are those of the last step, also where a likelihood overfits: the
categorical one has 143,360 outputs for some 1,200 Frey faces, and ends above the 8 bits of a uniform mass."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn as tnn

from experiments import cells
from experiments.cells import Cells, Workspace
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


def initial_bias(likelihood: str, x: torch.Tensor, levels: int) -> torch.Tensor:
    """An output bias close to the marginal distribution of each pixel; without it some likelihoods never use z."""
    mean, std = x.mean(0).clamp(1 / levels, 1 - 1 / levels), x.std(0).clamp(min=1 / levels)
    if likelihood == "Categorical":
        level = (x * (levels - 1)).round()
        return torch.cat([((level == k).sum(0) + 1.0).log() for k in range(levels)])
    if likelihood == "MixtureOfDiscretizedLogistics":  # 5 logits, 5 locations, 5 log-scales
        return torch.cat([0 * mean] * 5 + [mean + q * std for q in (-1, -0.5, 0, 0.5, 1)] + [(std / 3).log()] * 5)
    if likelihood == "Beta":
        total = (mean * (1 - mean) / std**2 - 1).clamp(min=0.1)
        return torch.cat([(mean * total).log(), ((1 - mean) * total).log()])
    return mean.logit() if likelihood == "ContinuousBernoulli" else torch.cat([mean, (std / 2).log()])


@dataclass(frozen=True)
class Settings:
    """Sizes and training budget, the same for every likelihood of a data set."""

    names: tuple[str, ...] = ("freyfaces", "mnist", "fashion-mnist")
    likelihoods: tuple[str, ...] = (*MASSES, *DENSITIES)
    seeds: tuple[int, ...] = (0, 1, 2)
    latent: int = 20
    encoder: tuple[int, ...] = (200, 200)
    decoder: tuple[int, ...] = (200, 100)
    steps: int = 2000
    batch_size: int = 100
    lr: float = 1e-3
    clip: float = 1000.0
    num_test: int = 1000
    particles: int = 200


SMOKE = {"names": ("digits",), "latent": 2, "steps": 13, "num_test": 20, "particles": 25}


def compute(s: Settings, workspace: Workspace, name: str, likelihood: str, seed: int) -> dict[str, Any]:
    """Trains one VAE and evaluates it on the first test images."""
    images, valid, test = data.load(name, workspace.root, dequantize=likelihood in DENSITIES)
    torch.manual_seed(seed)
    dims = images.shape[1]
    build = (MASSES | DENSITIES)[likelihood]
    (outputs,) = build(tnn.Identity(), images.levels).output_shape((dims,))
    decoder = nn.mlp(s.latent, outputs, hidden=s.decoder, activation=tnn.ELU)
    nn.set_output_bias(decoder, initial_bias(likelihood, images.as_subclass(torch.Tensor), images.levels))
    encoder = nn.mlp(dims, 2 * s.latent, hidden=s.encoder, activation=tnn.ELU)
    prior, posterior = priors.StandardNormal(s.latent), posteriors.DiagonalNormal(encoder)
    vae = VAE(prior, build(decoder, images.levels), posterior)
    epochs = math.ceil(s.steps / math.ceil(len(images) / s.batch_size))
    trained = cells.train(
        vae, images, valid, workspace, epochs=epochs, lr=s.lr, batch_size=s.batch_size, clip=s.clip, seed=seed
    )
    held_out = test.head(s.num_test)
    est = log_marginal(
        trained.model, trained.guide, held_out, num_particles=s.particles, seed=seed, rows=500, proposal="guide"
    )
    kind = "mass" if likelihood in MASSES else "density"
    own = {"kind": kind, "levels": images.levels, "at_floor": share_at_floor(vae, trained, held_out)}
    return cells.estimate_summary(est) | cells.training_summary(trained) | own


@torch.no_grad()
def share_at_floor(vae: VAE, trained: Any, x: torch.Tensor) -> float | None:
    """The share of scales at the posterior means within 10 % of their floor, if there is one."""
    floor = getattr(vae.likelihood, "floor", None)
    if floor is None:
        return None
    z = generate.posterior_means(trained.model, trained.guide, x)["z"]
    return float((vae.likelihood(z).base_dist.scale <= 1.1 * floor).double().mean())


def table(found: Cells) -> str:
    """Two tables per data set: masses and densities, ranked separately."""
    kinds = {
        "mass": "log-mass of the {} levels, exact",
        "density": "density of dequantised data, an upper bound on the bits of {} levels, not comparable with masses",
    }
    header = (
        "",
        "likelihood",
        "seeds",
        "bits per dim",
        "excess over the best",
        "at floor",
        "unreliable",
        "CPU ms/step",
    )
    out = []
    for (name,), of_data in cells.group_cells(found, "name").items():
        for kind, title in kinds.items():
            some = [c for c in of_data if c["result"]["kind"] == kind]
            rows = sorted(
                cells.group_cells(some, "likelihood").items(), key=lambda row: cells.mean(row[1], "bits_per_dim")
            )
            lines = [table_row(rank, likelihood, r, rows[0][1]) for rank, ((likelihood,), r) in enumerate(rows, 1)]
            if rows:
                title = title.format(some[0]["result"]["levels"])
                out.append(f"**{name}**: {title}\n\n{cells.markdown(header, lines)}\n")
    return "\n".join(out)


def table_row(rank: int, likelihood: str, row: Cells, first: Cells) -> tuple[Any, ...]:
    """The row of a likelihood; its excess over the best of its kind, with the paired standard error."""
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
    """Computes the table."""
    cells.run("likelihoods", Settings, ("name", "likelihood", "seed"), compute, table, SMOKE, __doc__, args)


if __name__ == "__main__":
    main()
