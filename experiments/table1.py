"""Table 1 of Burda et al. 2016 (arXiv 1509.00519) on dynamically binarised MNIST, one and two stochastic layers, with a
shortened schedule: our results beside the paper's, and whether they agree within 1.5 nats.

784-200-200-(50), or 784-200-200-(100)-100-100-(50), tanh, mirrored decoders whose output bias starts at the mean image.
50,000 training images, Adam with eps 1e-4 and cosine decay from `--lr`. VAE-1 and IWAE-5 take the same number of steps,
IWAE-5 with half the batch size and epochs, and a learning rate scaled by the square root of the batch size. IWAE-50,
whose epochs cost most, starts with 5 draws, and both its stages use doubly reparameterised gradients (Tucker et al.
2019, arXiv 1810.04152), of lower variance for the same bound (with pathwise gradients, one layer reached 86.53 in 240
epochs of 50 draws). Matrix products in bfloat16, evaluation in float32. `--paper` runs the paper's schedule: 3^i passes
at 1e-3 * 10^(-i/7), i = 0 .. 7, 3280 in all, in batches of 20, with pathwise gradients in float32."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from experiments import cells, iwae
from experiments.cells import Cells, Workspace
from ppvae import VAE, data, generate, likelihoods, log_marginal, nn, posteriors, priors
from ppvae.models import HierarchicalVAE

TOLERANCE = 1.5  # nats


@dataclass(frozen=True)
class Settings:
    """The schedule; rows with several draws have shares of epochs and batch size, see `stages`."""

    layers: tuple[int, ...] = (1, 2)
    rows: tuple[str, ...] = ("VAE-1", "IWAE-5", "IWAE-50")
    seeds: tuple[int, ...] = (0,)
    data: str = "mnist"
    hidden: tuple[int, ...] = (200, 200)
    paper: bool = False
    lr: float = 2e-3
    epochs: int = 600  # with one draw, as is the batch size; shares of both with more draws
    batch_size: int = 100
    eps: float = 1e-4
    num_test: int = 10_000
    particles: int = 5000


SMOKE = {"data": "digits", "hidden": (8, 8), "epochs": 3, "batch_size": 200, "num_test": 20, "particles": 50}

# NLL, and active units, by objective for one and two layers
PUBLISHED = {
    "VAE-1": ("86.76 (19)", "85.33 (16+5)"), "VAE-5": ("86.47 (20)", "85.01 (17+5)"),
    "VAE-50": ("86.35 (20)", "84.78 (17+5)"), "IWAE-5": ("85.54 (22)", "83.89 (21+5)"),
    "IWAE-50": ("84.78 (25)", "82.90 (26+7)"),
}  # fmt: skip
HEADER = "layers", "objective", "seeds", "epochs x batch (draws)", "test NLL", "active units", "published", "difference"


class Stage(NamedTuple):
    """One run of training, by an objective of `iwae.OBJECTIVES` with that many draws."""

    objective: str
    draws: int
    epochs: int
    batch: int
    lr: float


def stages(s: Settings, row: str) -> list[Stage]:
    """The stages of a row; each continues from the parameters of the last."""
    name, draws = row.split("-")
    if s.paper:
        return [Stage(name, int(draws), len(iwae.PAPER), 20, 1e-3)]
    part = {1: 1.0, 5: 0.5, 50: 0.2}[int(draws)]
    shares = [(name, int(draws), part, part, part**0.5)]
    if row == "IWAE-50":
        shares = [("DReG", 5, 2 / 3, 0.5, 1.0), ("DReG", 50, 1 / 8, 0.2, 0.2)]
    return [
        Stage(name, k, max(1, round(s.epochs * epochs)), max(1, round(s.batch_size * batch)), s.lr * lr)
        for name, k, epochs, batch, lr in shares
    ]


def build_pair(s: Settings, layers: int, mean: torch.Tensor) -> VAE | HierarchicalVAE:
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


def compute(s: Settings, workspace: Workspace, layer: int, row: str, seed: int) -> dict[str, Any]:
    """Trains one row and evaluates it on the test images."""
    images, valid, test = data.load(s.data, workspace.root, binarize="dynamic")
    torch.manual_seed(seed)
    vae = build_pair(s, layer, images.as_subclass(torch.Tensor).mean(0))
    options: dict[str, Any] = {"scheduler": iwae.stepwise_decay(iwae.PAPER)} if s.paper else {"precision": "bf16"}
    runs = [
        cells.train(
            vae, images, valid.head(2000), dataclasses.replace(workspace, folder=workspace.folder / str(number)),
            epochs=stage.epochs, lr=stage.lr, objective=iwae.OBJECTIVES[stage.objective](stage.draws),
            optimizer=functools.partial(torch.optim.Adam, lr=stage.lr, eps=s.eps), batch_size=stage.batch,
            seed=seed + number, **options,
        )
        for number, stage in enumerate(stages(s, row))
    ]  # fmt: skip
    est = log_marginal(
        vae.model, vae.guide, test.head(s.num_test), num_particles=s.particles, seed=seed, proposal="guide"
    )
    means = generate.posterior_means(vae.model, vae.guide, test)
    active = "+".join(str(int((z.var(0) > 0.01).sum())) for _, z in sorted(means.items()))
    return cells.estimate_summary(est) | cells.training_summary(*runs) | {"active": active}


def table(found: Cells) -> str:
    """One row per number of layers and an objective, beside the paper's."""
    lines = []
    for (layers, row), r in cells.group_cells(found, "layer", "row").items():
        first, s = r[0]["result"], Settings(**r[0]["settings"])
        published: tuple[str, ...] = ("", "", "")
        if s.data == "mnist" and row in PUBLISHED:
            theirs = PUBLISHED[row][layers - 1]
            behind = cells.mean(r) - float(theirs.split()[0])
            published = (theirs, f"{behind:+.2f}", "reached" if behind <= TOLERANCE else "not reached")
        steps = ", ".join(f"{stage.epochs} x {stage.batch} ({stage.draws})" for stage in stages(s, row))
        lines.append((
            layers, row, len(r), steps, f"{cells.mean(r):.2f} ± {cells.standard_error(r):.2f}", first["active"],
            *published, f"{first['training_cpu_seconds'] / 60:.0f}",
        ))  # fmt: skip
    first = found[0]["result"]
    says = f"NLL is L_{first['num_particles']} on {first['num_data']} test images; the paper's after 3280 epochs."
    return f"{says}\n\n{cells.markdown((*HEADER, f'within {TOLERANCE}', 'CPU minutes'), lines)}"


def main(args: list[str] | None = None) -> None:
    """Computes the table."""
    cells.run("table1", Settings, ("layer", "row", "seed"), compute, table, SMOKE, __doc__, args)


if __name__ == "__main__":
    main()
