"""Table 1 of Burda et al. 2016 (arXiv 1509.00519) on MNIST binarised at random, one and two stochastic layers, after
a shortened schedule: ours beside the paper's, and whether it is within 1.5 nats.

784-200-200-(50), or 784-200-200-(100)-100-100-(50), tanh, decoders mirrored and started at the mean image. 50,000
training images, Adam with eps 1e-4, its rate falling from `--lr` along a cosine; fewer epochs of smaller batches
for more draws, as the table says, 300,000 steps for all, and the rate by the root of the batch; with 50 draws, which
gain most from more steps, the rate falls once more, from 3e-4 over 300,000 steps (Loshchilov and Hutter 2017, arXiv
1608.03983): from 1.4e-3 the training loss rose. Products in bfloat16, evaluation in float32. `--paper` runs the
paper's schedule: 3^i passes at 1e-3 * 10^(-i/7), i = 0 .. 7, 3280 in all, in batches of 20, in float32.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from experiments import cells, iwae
from experiments.cells import Cells, Here
from ppvae import VAE, data, generate, likelihoods, log_marginal, nn, posteriors, priors
from ppvae.models import HierarchicalVAE

TOLERANCE = 1.5  # nats


@dataclass(frozen=True)
class Settings:
    """The schedule; an epoch of K draws counts for as many passes as its `epochs` say."""

    layers: tuple[int, ...] = (1, 2)
    rows: tuple[str, ...] = ("VAE-1", "IWAE-5", "IWAE-50")
    seeds: tuple[int, ...] = (0,)
    data: str = "mnist"
    hidden: tuple[int, ...] = (200, 200)
    paper: bool = False
    lr: float = 2e-3
    epochs: int = 600  # and batch size with one draw; with more, shares of both
    batch_size: int = 100
    eps: float = 1e-4
    num_test: int = 10_000
    particles: int = 5000


SMOKE = {
    "rows": ("VAE-1", "IWAE-5"), "data": "digits", "hidden": (8, 8), "epochs": 3, "batch_size": 200, "num_test": 20,
    "particles": 50,
}  # fmt: skip

# NLL, and active units by layer
PUBLISHED = {
    (1, "VAE-1"): (86.76, "19"), (1, "IWAE-5"): (85.54, "22"), (1, "IWAE-50"): (84.78, "25"),
    (2, "VAE-1"): (85.33, "16+5"), (2, "IWAE-5"): (83.89, "21+5"), (2, "IWAE-50"): (82.90, "26+7"),
}  # fmt: skip
SHARES = {1: 1.0, 5: 0.5, 50: 0.2}  # by draws, of `epochs` and of `batch_size`: as many steps for all
AGAIN = {50: (0.2, 0.15)}  # by draws, of `epochs` and of `lr`, for a second run from where the first ended


def pair_of(s: Settings, layers: int, mean: torch.Tensor) -> VAE | HierarchicalVAE:
    """The paper's networks."""
    dims, (wide, narrow) = len(mean), (100, 50) if layers == 2 else (50, 0)
    decoder = nn.mlp(wide, dims, hidden=s.hidden[::-1])
    nn.set_output_bias(decoder, mean.clamp(1e-3, 1 - 1e-3).logit())
    posterior = posteriors.DiagonalNormal(nn.mlp(dims, 2 * wide, hidden=s.hidden))
    if layers == 1:
        return VAE(priors.StandardNormal(wide), likelihoods.Bernoulli(decoder), posterior)
    half = tuple(h // 2 for h in s.hidden)
    return HierarchicalVAE(
        priors.StandardNormal(narrow),
        [posteriors.DiagonalNormal(nn.mlp(narrow, 2 * wide, hidden=half))],
        likelihoods.Bernoulli(decoder),
        [posterior, posteriors.DiagonalNormal(nn.mlp(wide, 2 * narrow, hidden=half))],
    )


def compute(s: Settings, here: Here, layer: int, row: str, seed: int) -> dict[str, Any]:
    """Trains one row and evaluates it on the test images."""
    images, valid, test = data.load(s.data, here.root, binarize="dynamic")
    torch.manual_seed(seed)
    pair = pair_of(s, layer, images.as_subclass(torch.Tensor).mean(0))
    name, k = row.split("-")
    options: dict[str, Any] = {"precision": "bf16"}
    part = SHARES[int(k)]
    lr, batch, epochs = s.lr * part**0.5, max(1, round(s.batch_size * part)), max(1, round(s.epochs * part))
    if s.paper:
        stage = [i for i in range(8) for _ in range(3**i)]
        lr, batch, epochs = 1e-3, 20, len(stage)
        rate = functools.partial(LambdaLR, lr_lambda=lambda epoch: 10 ** (-stage[min(epoch, len(stage) - 1)] / 7))
        options = {"scheduler": rate}
    again = {} if s.paper else AGAIN
    plan = [(here, epochs, lr, seed)]
    if int(k) in again:
        more, rate = again[int(k)]
        folder = here.folder / "again"
        plan.append((dataclasses.replace(here, folder=folder), max(1, round(s.epochs * more)), s.lr * rate, seed + 1))
    runs = [
        cells.train(
            pair, images, valid, place, epochs=epochs, lr=lr, objective=iwae.OBJECTIVES[name](int(k)),
            optimizer=functools.partial(torch.optim.Adam, lr=lr, eps=s.eps), batch_size=batch, seed=start, **options,
        )
        for place, epochs, lr, start in plan
    ]  # fmt: skip
    trained = runs[-1]
    est = log_marginal(trained.model, trained.guide, test.head(s.num_test), num_particles=s.particles, seed=seed)
    means = generate.posterior_means(trained.model, trained.guide, test)
    active = "+".join(str(int((z.var(0) > 0.01).sum())) for _, z in sorted(means.items()))
    return cells.of_estimate(est) | cells.of_run(*runs) | {"active": active, "batch_size": batch}


def table(found: Cells) -> str:
    """One row a number of layers and an objective, beside the paper's."""
    lines = []
    for (layers, row), r in cells.collected(found, "layer", "row").items():
        nll, units = PUBLISHED[layers, row]
        behind = cells.mean(r) - nll
        reached = "reached" if behind <= TOLERANCE else "not reached"
        first = r[0]["result"]
        steps = f"{first['epochs']} x {first.get('batch_size', r[0]['settings']['batch_size'])}"
        published = (f"{nll:.2f} ({units})", f"{behind:+.2f}", reached)
        if r[0]["settings"]["data"] != "mnist":
            published = ("", "", "")
        lines.append((
            layers, row, len(r), steps, f"{cells.mean(r):.2f} ± {cells.standard_error(r):.2f}", first["active"],
            *published, f"{first['training_cpu_seconds'] / 60:.0f}",
        ))  # fmt: skip
    header = (
        "layers", "objective", "seeds", "epochs x batch", "test NLL", "active units", "published",
        "difference", f"within {TOLERANCE}", "CPU minutes",
    )  # fmt: skip
    first = found[0]["result"]
    says = f"NLL is L_{first['num_particles']} on {first['num_data']} test images; the paper's after 3280 epochs."
    return f"{says}\n\n{cells.markdown(header, lines)}"


def main(args: list[str] | None = None) -> None:
    """Fills the table."""
    cells.run("table1", Settings, ("layer", "row", "seed"), compute, table, SMOKE, __doc__, args)


if __name__ == "__main__":
    main()
