"""Hierarchies of latents on MNIST beside the one-layer VAE, in as many passes over the same data in the same batches:
two layers inferred bottom-up (Burda et al. 2016), two top-down by a ladder (Sonderby et al. 2016), and blocks that
write into one stream (Child 2021). Learning rate and sizes were chosen on the validation images.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from experiments import cells
from experiments.cells import Cells, Here
from ppvae import VAE, data, likelihoods, log_marginal, nn, objectives, posteriors, priors
from ppvae.models import Block, HierarchicalVAE, LadderVAE, TopDownVAE


@dataclass(frozen=True)
class Settings:
    """Sizes, and the budget that every row gets."""

    rows: tuple[str, ...] = ("one layer", "bottom-up", "ladder", "stream")
    seeds: tuple[int, ...] = (0, 1, 2)
    data: str = "mnist"
    latents: tuple[int, ...] = (50, 25)  # next to the data, then above
    blocks: int = 4
    hidden: int = 200
    epochs: int = 15
    batch_size: int = 100
    lr: float = 1e-3
    num_test: int = 1000
    particles: int = 1000


SMOKE = {
    "seeds": (0,), "data": "digits", "latents": (3, 2), "blocks": 2, "hidden": 8, "epochs": 1, "num_test": 20,
    "particles": 30,
}  # fmt: skip


def made(s: Settings, row: str, images: Any) -> Any:
    """The pair of a row; the last layer of every likelihood starts at the mean image."""
    dims, first, h = images.shape[1], s.latents[0], s.hidden
    net = functools.partial(nn.mlp, activation=torch.nn.GELU)

    def normal(inputs: int, latent: int, hidden: tuple[int, ...] = (h, h)) -> torch.nn.Module:
        return posteriors.DiagonalNormal(net(inputs, 2 * latent, hidden=hidden))

    def likelihood(inputs: int, hidden: tuple[int, ...] = (h, h)) -> torch.nn.Module:
        decoder = net(inputs, dims, hidden=hidden)
        nn.set_output_bias(decoder, images.as_subclass(torch.Tensor).mean(0).clamp(1e-3, 1 - 1e-3).logit())
        return likelihoods.Bernoulli(decoder)

    def layers() -> list[torch.nn.Module]:
        return [normal(above, below) for below, above in itertools.pairwise(s.latents)]

    def block() -> Block:
        size = first // 2
        change = nn.Added(net(size, h, hidden=()), Changed(net(h, h, hidden=(h,))))
        return Block(normal(h, size, (h,)), normal(2 * h, size, (h,)), change)

    top = priors.StandardNormal(s.latents[-1])
    kinds: dict[str, Callable[[], Any]] = {
        "one layer": lambda: VAE(priors.StandardNormal(first), likelihood(first), normal(dims, first)),
        "bottom-up": lambda: HierarchicalVAE(
            top, layers(), likelihood(first), [normal(a, b) for a, b in itertools.pairwise((dims, *s.latents))]
        ),
        "ladder": lambda: LadderVAE(
            top, layers(), likelihood(first),
            [net(inputs, h, hidden=(h,)) for inputs in (dims, *[h] * (len(s.latents) - 1))],
            [normal(h, latent, ()) for latent in s.latents],
        ),
        "stream": lambda: TopDownVAE(
            torch.zeros(h), [block() for _ in range(s.blocks)], likelihood(h, (h,)), net(dims, h, hidden=(h, h))
        ),
    }  # fmt: skip
    return kinds[row]()


class Changed(torch.nn.Module):
    """h + net(gelu(h))."""

    def __init__(self, net: torch.nn.Module):
        super().__init__()
        self.net = net

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.net(torch.nn.functional.gelu(h))


def compute(s: Settings, here: Here, row: str, seed: int) -> dict[str, Any]:
    """Trains one pair and evaluates it on the first test images."""
    images, valid, test = data.load(s.data, here.root, binarize="dynamic")
    torch.manual_seed(seed)
    vae = made(s, row, images)
    trained = cells.train(
        vae, images, valid, here, epochs=s.epochs, lr=s.lr, objective=objectives.ELBO(), batch_size=s.batch_size,
        seed=seed,
    )  # fmt: skip
    est = log_marginal(trained.model, trained.guide, test.head(s.num_test), num_particles=s.particles, seed=seed)
    kl = {k.removeprefix("valid_"): v for k, v in trained.metrics.items() if k.startswith("valid_kl_")}
    return (
        cells.of_estimate(est) | cells.of_run(trained) | kl | {"parameters": sum(p.numel() for p in vae.parameters())}
    )


def table(found: Cells) -> str:
    """One row a kind; KL in nats from the data upward."""
    rows = {name: r for (name,), r in cells.collected(found, "row").items()}
    plain = rows.get("one layer")
    header = ("layers", "seeds", "test NLL", "ELBO", "gain on one layer", "KL of each latent", "weights", "CPU ms/step")
    lines = []
    for name, r in rows.items():
        names = sorted(k for k in r[0]["result"] if k.startswith("kl_"))
        lines.append((
            name, len(r), f"{cells.mean(r):.2f} ± {cells.standard_error(r):.2f}", f"{cells.mean(r, 'elbo'):.2f}",
            cells.verdict(r, plain) if plain and r is not plain else "",
            ", ".join(f"{cells.mean(r, k):.1f}" for k in names), f"{cells.mean(r, 'parameters') / 1e6:.2f} M",
            f"{cells.mean(r, 'cpu_ms_per_step'):.1f}",
        ))  # fmt: skip
    return cells.markdown(header, lines)


def main(args: list[str] | None = None) -> None:
    """Fills the table."""
    cells.run("hierarchy", Settings, ("row", "seed"), compute, table, SMOKE, __doc__, args)


if __name__ == "__main__":
    main()
