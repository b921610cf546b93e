"""Deep Markov models (Krishnan et al. 2017, arXiv 1609.09869) compared with the same model without dependence on other
time steps. "linear" is simulated: two latents that rotate and decay, observed with noise over 5 to 20 steps; log p(x)
of the true model is given by the Kalman filter. "digits": sequences of 8 rows of 8 binary pixels."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments import cells
from experiments.cells import Cells, Workspace
from ppvae import data, generate, likelihoods, log_marginal, nn, objectives, posteriors
from ppvae.models import DeepMarkovModel
from ppvae.plots import image_grid


@dataclass(frozen=True)
class Settings:
    """The data, the models, and the schedule."""

    sources: tuple[str, ...] = ("linear", "digits")
    models: tuple[str, ...] = ("VAE of each step", "deep Markov model")
    seeds: tuple[int, ...] = (0, 1, 2)
    sequences: int = 1500
    num_test: int = 300
    latent: int = 8
    hidden: int = 100
    warmup: int = 400  # steps of the warm-up of beta
    epochs: int = 80
    batch_size: int = 100
    lr: float = 3e-3
    particles: int = 500


SMOKE = {"seeds": (0,), "sequences": 100, "num_test": 10, "hidden": 8, "epochs": 1, "particles": 50}
TRANSITION = 0.95 * torch.tensor([[math.cos(0.6), -math.sin(0.6)], [math.sin(0.6), math.cos(0.6)]])
EMISSION = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.7, -0.7]])
STEP_SCALE, NOISE_SCALE = 0.3, 0.5  # standard deviations of the transition and of the observation


class MaskedInput(torch.nn.Module):
    """A network [..., unseen + seen] -> [..., outputs] whose first `unseen` inputs are set to zero."""

    def __init__(self, net: torch.nn.Module, unseen: int):
        super().__init__()
        self.net, self.unseen = net, unseen

    def forward(self, x: Tensor) -> Tensor:
        return self.net(torch.where(torch.arange(x.shape[-1], device=x.device) < self.unseen, 0.0, x))


def simulate(count: int, seed: int, steps: int = 20) -> tuple[Tensor, Tensor]:
    """Sequences of the linear model from z_0 = (1, 0), and their lengths."""
    noise = torch.Generator().manual_seed(seed)
    z, x = torch.tensor([1.0, 0.0]).expand(count, 2), []
    for _ in range(steps):
        z = z @ TRANSITION.T + STEP_SCALE * torch.randn(count, 2, generator=noise)
        x.append(z @ EMISSION.T + NOISE_SCALE * torch.randn(count, 3, generator=noise))
    lengths = torch.randint(5, steps + 1, (count,), generator=noise)
    return torch.where(nn.known_times(steps, lengths).unsqueeze(-1), torch.stack(x, 1), 0.0), lengths


def kalman(x: Tensor, lengths: Tensor) -> Tensor:
    """log p(x) of each sequence under the linear model, [batch] nats."""
    turn, look, total = TRANSITION.double(), EMISSION.double(), torch.zeros(len(x)).double()
    mean, cov = torch.tensor([1.0, 0.0]).double().expand(len(x), 2), torch.zeros(2, 2).double()
    for t, now in enumerate(x.double().unbind(1)):
        mean, cov = mean @ turn.T, turn @ cov @ turn.T + STEP_SCALE**2 * torch.eye(2)
        spread = look @ cov @ look.T + NOISE_SCALE**2 * torch.eye(3)
        step = torch.distributions.MultivariateNormal(mean @ look.T, spread).log_prob(now)
        total = total + torch.where(t < lengths, step, 0.0)
        gain = cov @ look.T @ torch.linalg.inv(spread)
        mean, cov = mean + (now - mean @ look.T) @ gain.T, cov - gain @ look @ cov
    return total


def load_sequences(s: Settings, source: str) -> list[tuple[Tensor, Tensor]]:
    """Training, validation and test sequences, with their lengths."""
    if source == "linear":
        return [simulate(n, seed) for seed, n in enumerate((s.sequences, s.num_test, s.num_test))]
    splits = zip(data.load(source, binarize="fixed"), (s.sequences, s.num_test, s.num_test), strict=True)
    images = [d.head(min(n, len(d))).read().reshape(-1, *d.event_shape[1:]) for d, n in splits]
    return [(x, torch.full((len(x),), x.shape[1])) for x in images]


def compute(s: Settings, workspace: Workspace, source: str, model: str, seed: int) -> dict[str, Any]:
    """Trains one model on one kind of sequences and evaluates log p(x) of test sequences."""
    train, valid, test = load_sequences(s, source)
    torch.manual_seed(seed)
    size, static, net = train[0].shape[-1], model == "VAE of each step", functools.partial(nn.mlp, hidden=(s.hidden,))
    transition, emission = net(s.latent, 2 * s.latent), net(s.latent, size)
    combiner = net(s.latent + s.hidden, 2 * s.latent)
    pair = DeepMarkovModel(
        s.latent,
        posteriors.DiagonalNormal(MaskedInput(transition, s.latent) if static else transition),
        likelihoods.Normal(emission, scale="learned") if source == "linear" else likelihoods.Bernoulli(emission),
        net(size, s.hidden) if static else nn.Backward(torch.nn.GRU(size, s.hidden, batch_first=True)),
        posteriors.DiagonalNormal(MaskedInput(combiner, s.latent) if static else combiner),
    )
    trained = cells.train(
        pair, train, valid, workspace, epochs=s.epochs, lr=s.lr, batch_size=s.batch_size, seed=seed,
        objective=objectives.ELBO(warmup=s.warmup),
    )  # fmt: skip
    own, like = (trained.model, trained.guide), (test[0][:1], test[1].max()[None])
    est = log_marginal(*own, test, num_particles=s.particles, seed=seed, proposal="guide")
    drawn = generate.samples(*own, like, 16, mean=False, seed=seed)
    np.save(workspace.folder / "samples.npy", torch.stack([test[0][:16], drawn[: len(test[0])]]).numpy())
    best = {"best": -float(kalman(*test).mean())} if source == "linear" else {}
    return (
        cells.estimate_summary(est) | cells.training_summary(trained) | {"steps": float(test[1].double().mean())} | best
    )


def table(found: Cells) -> str:
    """One row per model and its data."""
    header = ("sequences", "model", "seeds", "test NLL of a sequence", "of a step", "ELBO", "unreliable")
    header += ("gain on the VAE of each step", "above the Kalman filter")
    lines, rows = [], cells.group_cells(found, "source", "model")
    for (source, model), r in rows.items():
        plain = rows.get((source, "VAE of each step"), r)
        total, share = cells.mean(r), cells.mean(r, "unreliable") / cells.mean(r, "num_data")
        numbers = [f"{total:.2f} ± {cells.standard_error(r):.2f}", f"{total / cells.mean(r, 'steps'):.3f}"]
        numbers += [
            f"{cells.mean(r, 'elbo'):.2f}",
            f"{share:.0%}",
            cells.compare_rows(r, plain) if r is not plain else "",
        ]
        last = f"{total - cells.mean(r, 'best'):.2f}" if source == "linear" else ""
        lines.append((source, model, len(r), *numbers, last))
    return cells.markdown(header, lines)


def draw_figure(found: Cells, folder: Path) -> None:
    """Sixteen test images of digits, and samples of each model, row by row."""
    digits = [c for c in found if c["cell"]["source"] == "digits" and c["cell"]["seed"] == found[0]["cell"]["seed"]]
    paths = {c["cell"]["model"]: Path(c["folder"]) / "samples.npy" for c in digits}
    if drawn := {model: np.load(path) for model, path in paths.items() if path.exists()}:
        images = np.stack([next(iter(drawn.values()))[0], *(own[1] for own in drawn.values())])
        image_grid(images, images.shape[2:], row_titles=["digits", *drawn]).savefig(folder / "samples.png")


def main(args: list[str] | None = None) -> None:
    """Computes the table and draws the figure."""
    draw_figure(*cells.run("deep_markov", Settings, ("source", "model", "seed"), compute, table, SMOKE, __doc__, args))


if __name__ == "__main__":
    main()
