"""Table 1 of Burda et al. 2016 (arXiv 1509.00519): dynamically binarised MNIST, one stochastic layer.

784-200-200-(50), tanh, a mirrored decoder whose output bias starts at the mean image; Adam with eps 1e-4, batches of
20, and eight learning rates lr * 10^(-i/7), i = 0 .. 7. With `--paper` lr = 1e-3 for 3^i passes each, 3280 in all; else
`--lr`, chosen by the validation ELBO of VAE-1, for `--passes` each. VAE-k averages the ELBO over k draws. A unit u is
active if Var_x(E_q[u | x]) > 0.01."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from experiments import cells
from experiments.cells import Cells, Workspace
from ppvae import VAE, data, generate, likelihoods, log_marginal, nn, objectives, posteriors, priors


@dataclass(frozen=True)
class Settings:
    """The schedule, the same for every row."""

    rows: tuple[str, ...] = ("VAE-1", "VAE-5", "VAE-50", "IWAE-5", "IWAE-50", "DReG-50")
    seeds: tuple[int, ...] = (0, 1, 2)
    data: str = "mnist"
    latent: int = 50
    hidden: tuple[int, ...] = (200, 200)
    paper: bool = False  # the learning rate and passes of the paper, in place of the next two
    lr: float = 2e-3
    passes: int = 1
    batch_size: int = 20
    eps: float = 1e-4
    num_test: int = 1000
    particles: int = 5000


SMOKE = {
    "rows": ("VAE-1", "IWAE-5"),
    "seeds": (0,),
    "data": "digits",
    "latent": 2,
    "hidden": (8,),
    "batch_size": 200,
    "num_test": 20,
    "particles": 50,
}

# NLL and active units; DReG, which is not in the paper, from another reproduction of its network
PUBLISHED = {
    "VAE-1": (86.76, 19),
    "VAE-5": (86.47, 20),
    "VAE-50": (86.35, 20),
    "IWAE-5": (85.54, 22),
    "IWAE-50": (84.78, 25),
    "DReG-50": (84.32, None),
}
OBJECTIVES = {
    "VAE": objectives.ELBO,
    "IWAE": objectives.IWAE,
    "DReG": functools.partial(objectives.IWAE, gradient="dreg"),
}


PAPER = [i for i in range(8) for _ in range(3**i)]  # the stage of each of the paper's epochs


def stepwise_decay(stage: list[int]) -> Callable[[torch.optim.Optimizer], LambdaLR]:
    """The learning rate of every epoch, 10^(-i/7) times the first in stage i."""
    return functools.partial(LambdaLR, lr_lambda=lambda epoch: 10 ** (-stage[min(epoch, len(stage) - 1)] / 7))


def compute(s: Settings, workspace: Workspace, row: str, seed: int) -> dict[str, Any]:
    """Trains one row and evaluates it on the first test images."""
    images, valid, test = data.load(s.data, workspace.root, binarize="dynamic")
    torch.manual_seed(seed)
    dims = images.shape[1]
    decoder = nn.mlp(s.latent, dims, hidden=s.hidden[::-1])
    nn.set_output_bias(decoder, images.as_subclass(torch.Tensor).mean(0).clamp(1e-3, 1 - 1e-3).logit())
    vae = VAE(
        priors.StandardNormal(s.latent),
        likelihoods.Bernoulli(decoder),
        posteriors.DiagonalNormal(nn.mlp(dims, 2 * s.latent, hidden=s.hidden)),
    )
    name, k = row.split("-")
    stage = PAPER if s.paper else [i for i in range(8) for _ in range(s.passes)]
    lr = 1e-3 if s.paper else s.lr
    trained = cells.train(
        vae,
        images,
        valid,
        workspace,
        epochs=len(stage),
        lr=lr,
        objective=OBJECTIVES[name](int(k)),
        optimizer=functools.partial(torch.optim.Adam, lr=lr, eps=s.eps),
        scheduler=stepwise_decay(stage),
        batch_size=s.batch_size,
        seed=seed,
    )
    est = log_marginal(
        trained.model, trained.guide, test.head(s.num_test), num_particles=s.particles, seed=seed, proposal="guide"
    )
    means = generate.posterior_means(trained.model, trained.guide, test)["z"]
    return cells.estimate_summary(est) | cells.training_summary(trained) | {"active": int((means.var(0) > 0.01).sum())}


def table(found: Cells) -> str:
    """One row an objective, beside the paper's; then differences of rows."""
    rows = {name: r for (name,), r in cells.group_cells(found, "row").items()}
    header = ("objective", "seeds", "test NLL", "active units", "published", "difference", "CPU ms/step")
    lines, known = [], PUBLISHED if found[0]["settings"]["data"] == "mnist" else {}
    for name, r in rows.items():
        nll, units = known.get(name, (None, None))
        active = " ".join(f"{a:.0f}" for a in cells.values(r, "active"))
        published = "" if nll is None else f"{nll:.2f}" + (f" ({units})" if units else "")
        behind = "" if nll is None else f"{cells.mean(r) - nll:+.2f}"
        lines.append((
            name, len(r), f"{cells.mean(r):.2f} ± {cells.standard_error(r):.2f}", active, published, behind,
            f"{cells.mean(r, 'cpu_ms_per_step'):.1f}",
        ))  # fmt: skip
    first = found[0]["result"]
    budget = (
        f"NLL is L_{first['num_particles']} on {first['num_data']} test images, after {first['epochs']} passes over "
        f"the training data; the published figures are L_5000 on 10000 images after 3280 passes."
    )
    pairs = [("IWAE-5", "VAE-1"), ("IWAE-50", "IWAE-5"), ("IWAE-50", "VAE-50"), ("DReG-50", "IWAE-50")]
    order = [(f"{a} over {b}", cells.compare_rows(rows[a], rows[b])) for a, b in pairs if a in rows and b in rows]
    return "\n\n".join(
        [budget, cells.markdown(header, lines), *([cells.markdown(("gain of", "nats"), order)] if order else [])]
    )


def main(args: list[str] | None = None) -> None:
    """Computes the table."""
    cells.run("iwae", Settings, ("row", "seed"), compute, table, SMOKE, __doc__, args)


if __name__ == "__main__":
    main()
