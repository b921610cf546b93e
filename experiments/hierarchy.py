"""Hierarchies of latents on MNIST compared with the one-layer VAE, with the same number of epochs, batches and latent
dims: two layers with a bottom-up guide (Burda et al. 2016), and two with a top-down guide, whose latents are added to
one stream of features (Child 2021). All rows have the same free bits per latent dim, and the learning rate that is best
for the one-layer VAE; both were chosen on the validation images."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import GELU, Sequential

from experiments import cells
from experiments.cells import Cells, Workspace
from ppvae import VAE, data, likelihoods, log_marginal, nn, objectives, posteriors, priors
from ppvae.models import Block, HierarchicalVAE, TopDownVAE


@dataclass(frozen=True)
class Settings:
    """Sizes and training budget, the same for every row."""

    rows: tuple[str, ...] = ("one layer", "bottom-up", "top-down")
    seeds: tuple[int, ...] = (0, 1, 2)
    data: str = "mnist"
    latents: tuple[int, ...] = (25, 25)  # from the layer next to the data upward; the one-layer VAE has their sum
    hidden: int = 200
    epochs: int = 8
    batch_size: int = 100
    lr: float = 2e-3
    free_bits: float = 0.1  # nats of rate per latent dim without penalty
    num_test: int = 1000
    particles: int = 500


SMOKE = {
    "seeds": (0,), "data": "digits", "latents": (3, 2), "hidden": 8, "epochs": 1, "num_test": 20, "particles": 30,
}  # fmt: skip


def build_pair(s: Settings, row: str, images: Any) -> Any:
    """The pair of a row, two hidden layers between data and latents and between layers."""
    dims, h, every = images.shape[1], s.hidden, sum(s.latents)
    net = functools.partial(nn.mlp, activation=torch.nn.GELU)

    def normal(inputs: int, latent: int) -> torch.nn.Module:
        return posteriors.DiagonalNormal(net(inputs, 2 * latent, hidden=(h, h)))

    def likelihood(decoder: torch.nn.Module) -> torch.nn.Module:  # starts at the mean image
        nn.set_output_bias(decoder, images.as_subclass(torch.Tensor).mean(0).clamp(1e-3, 1 - 1e-3).logit())
        return likelihoods.Bernoulli(decoder)

    def block(latent: int, top: bool) -> Block:
        prior, first = net(h, 2 * latent, hidden=(h,)), () if top else (h,)
        with torch.no_grad():
            prior[-1].weight.mul_(0.1)  # starts near a standard normal
        posterior = net(2 * h, 2 * latent, hidden=first)
        return Block(
            posteriors.DiagonalNormal(Sequential(GELU(), prior)), posteriors.DiagonalNormal(posterior),
            nn.Added(net(latent, h, hidden=())),
        )  # fmt: skip

    def one_layer() -> VAE:
        decoder = net(every, dims, hidden=(h, h))
        return VAE(priors.StandardNormal(every), likelihood(decoder), normal(dims, every))

    def bottom_up() -> HierarchicalVAE:
        layers = [normal(above, below) for below, above in itertools.pairwise(s.latents)]
        up = [normal(below, above) for below, above in itertools.pairwise((dims, *s.latents))]
        decoder = net(s.latents[0], dims, hidden=(h, h))
        return HierarchicalVAE(priors.StandardNormal(s.latents[-1]), layers, likelihood(decoder), up)

    def top_down() -> TopDownVAE:
        blocks = [block(latent, i == 0) for i, latent in enumerate(reversed(s.latents))]
        decoder = Sequential(GELU(), net(h, dims, hidden=(h,)))
        encoder = Sequential(net(dims, h, hidden=(h,)), GELU())
        return TopDownVAE(torch.zeros(h), blocks, likelihood(decoder), encoder)

    return {"one layer": one_layer, "bottom-up": bottom_up, "top-down": top_down}[row]()


def compute(s: Settings, workspace: Workspace, row: str, seed: int) -> dict[str, Any]:
    """Trains one pair and evaluates it on the first test images."""
    images, valid, test = data.load(s.data, workspace.root, binarize="dynamic")
    torch.manual_seed(seed)
    vae = build_pair(s, row, images)
    trained = cells.train(
        vae, images, valid, workspace, epochs=s.epochs, lr=s.lr, objective=objectives.ELBO(free_bits=s.free_bits),
        batch_size=s.batch_size, seed=seed,
    )  # fmt: skip
    est = log_marginal(
        trained.model, trained.guide, test.head(s.num_test), num_particles=s.particles, seed=seed, proposal="guide"
    )
    kl = {k.removeprefix("valid_"): v for k, v in trained.metrics.items() if k.startswith("valid_kl_")}
    return (
        cells.estimate_summary(est)
        | cells.training_summary(trained)
        | kl
        | {"parameters": sum(p.numel() for p in vae.parameters())}
    )


def table(found: Cells) -> str:
    """One row per kind; KL in nats from the data upward."""
    rows = {name: r for (name,), r in cells.group_cells(found, "row").items()}
    plain = rows.get("one layer")
    header = ("layers", "seeds", "test NLL", "ELBO", "gain on one layer", "KL of each latent", "weights", "CPU ms/step")
    lines = []
    for name, r in rows.items():
        names = sorted(k for k in r[0]["result"] if k.startswith("kl_"))
        lines.append((
            name, len(r), f"{cells.mean(r):.2f} ± {cells.standard_error(r):.2f}", f"{cells.mean(r, 'elbo'):.2f}",
            cells.compare_rows(r, plain) if plain and r is not plain else "",
            ", ".join(f"{cells.mean(r, k):.1f}" for k in names), f"{cells.mean(r, 'parameters') / 1e6:.2f} M",
            f"{cells.mean(r, 'cpu_ms_per_step'):.1f}",
        ))  # fmt: skip
    return cells.markdown(header, lines)


def main(args: list[str] | None = None) -> None:
    """Computes the table."""
    cells.run("hierarchy", Settings, ("row", "seed"), compute, table, SMOKE, __doc__, args)


if __name__ == "__main__":
    main()
