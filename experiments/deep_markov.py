"""Deep Markov models (Krishnan et al. 2017, arXiv 1609.09869) beside the same that sees nothing of other steps.
"linear" is simulated: two latents that turn and decay, seen through noise, 5 to 20 steps; the truth's log p(x) comes
from the Kalman filter. "digits": 8 rows of 8 bits.
"""

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
from experiments.cells import Cells, Here
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
    warmup: int = 400  # steps in which beta rises
    epochs: int = 80
    batch_size: int = 100
    lr: float = 3e-3
    particles: int = 500


SMOKE = {"seeds": (0,), "sequences": 100, "num_test": 10, "hidden": 8, "epochs": 1, "particles": 50}
TURN = 0.95 * torch.tensor([[math.cos(0.6), -math.sin(0.6)], [math.sin(0.6), math.cos(0.6)]])
LOOK = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.7, -0.7]])
STEP, NOISE = 0.3, 0.5  # scales: of what a step adds to z, and of what is added to x


class Blind(torch.nn.Module):
    """A network [..., unseen + seen] -> [..., outputs] that sees nothing of what comes first."""

    def __init__(self, net: torch.nn.Module, unseen: int):
        super().__init__()
        self.net, self.unseen = net, unseen

    def forward(self, x: Tensor) -> Tensor:
        return self.net(torch.where(torch.arange(x.shape[-1], device=x.device) < self.unseen, 0.0, x))


def simulated(count: int, seed: int, steps: int = 20) -> tuple[Tensor, Tensor]:
    """Sequences of the linear model from z_0 = (1, 0), and their lengths."""
    noise = torch.Generator().manual_seed(seed)
    z, x = torch.tensor([1.0, 0.0]).expand(count, 2), []
    for _ in range(steps):
        z = z @ TURN.T + STEP * torch.randn(count, 2, generator=noise)
        x.append(z @ LOOK.T + NOISE * torch.randn(count, 3, generator=noise))
    lengths = torch.randint(5, steps + 1, (count,), generator=noise)
    return torch.where(nn.known_times(steps, lengths).unsqueeze(-1), torch.stack(x, 1), 0.0), lengths


def kalman(x: Tensor, lengths: Tensor) -> Tensor:
    """log p(x) of each sequence under the linear model, [batch] nats."""
    turn, look, total = TURN.double(), LOOK.double(), torch.zeros(len(x)).double()
    mean, cov = torch.tensor([1.0, 0.0]).double().expand(len(x), 2), torch.zeros(2, 2).double()
    for t, now in enumerate(x.double().unbind(1)):
        mean, cov = mean @ turn.T, turn @ cov @ turn.T + STEP**2 * torch.eye(2)
        spread = look @ cov @ look.T + NOISE**2 * torch.eye(3)
        step = torch.distributions.MultivariateNormal(mean @ look.T, spread).log_prob(now)
        total = total + torch.where(t < lengths, step, 0.0)
        gain = cov @ look.T @ torch.linalg.inv(spread)
        mean, cov = mean + (now - mean @ look.T) @ gain.T, cov - gain @ look @ cov
    return total


def loaded(s: Settings, source: str) -> list[tuple[Tensor, Tensor]]:
    """Training, validation and test sequences, with their lengths."""
    if source == "linear":
        return [simulated(n, seed) for seed, n in enumerate((s.sequences, s.num_test, s.num_test))]
    splits = zip(data.load(source, binarize="fixed"), (s.sequences, s.num_test, s.num_test), strict=True)
    images = [d.head(min(n, len(d))).read().reshape(-1, *d.event_shape[1:]) for d, n in splits]
    return [(x, torch.full((len(x),), x.shape[1])) for x in images]


def compute(s: Settings, here: Here, source: str, model: str, seed: int) -> dict[str, Any]:
    """Trains one model on one kind of sequence; log p(x) on others."""
    train, valid, test = loaded(s, source)
    torch.manual_seed(seed)
    size, static, net = train[0].shape[-1], model == "VAE of each step", functools.partial(nn.mlp, hidden=(s.hidden,))
    transition, emission = net(s.latent, 2 * s.latent), net(s.latent, size)
    combiner = net(s.latent + s.hidden, 2 * s.latent)
    pair = DeepMarkovModel(
        s.latent,
        posteriors.DiagonalNormal(Blind(transition, s.latent) if static else transition),
        likelihoods.Normal(emission, scale="learned") if source == "linear" else likelihoods.Bernoulli(emission),
        net(size, s.hidden) if static else nn.Backward(torch.nn.GRU(size, s.hidden, batch_first=True)),
        posteriors.DiagonalNormal(Blind(combiner, s.latent) if static else combiner),
    )
    trained = cells.train(
        pair, train, valid, here, epochs=s.epochs, lr=s.lr, batch_size=s.batch_size, seed=seed,
        objective=objectives.ELBO(warmup=s.warmup),
    )  # fmt: skip
    own, like = (trained.model, trained.guide), (test[0][:1], test[1].max()[None])
    est = log_marginal(*own, test, num_particles=s.particles, seed=seed)
    drawn = generate.samples(*own, like, 16, mean=False, seed=seed)
    np.save(here.folder / "samples.npy", torch.stack([test[0][:16], drawn[: len(test[0])]]).numpy())
    best = {"best": -float(kalman(*test).mean())} if source == "linear" else {}
    return cells.of_estimate(est) | cells.of_run(trained) | {"steps": float(test[1].double().mean())} | best


def table(found: Cells) -> str:
    """One row a model and its data."""
    header = ("sequences", "model", "seeds", "test NLL of a sequence", "of a step", "ELBO", "not reliable")
    header += ("gain on the VAE of each step", "above the Kalman filter")
    lines, rows = [], cells.collected(found, "source", "model")
    for (source, model), r in rows.items():
        plain = rows.get((source, "VAE of each step"), r)
        total, share = cells.mean(r), cells.mean(r, "unreliable") / cells.mean(r, "num_data")
        numbers = [f"{total:.2f} ± {cells.standard_error(r):.2f}", f"{total / cells.mean(r, 'steps'):.3f}"]
        numbers += [f"{cells.mean(r, 'elbo'):.2f}", f"{share:.0%}", cells.verdict(r, plain) if r is not plain else ""]
        last = f"{total - cells.mean(r, 'best'):.2f}" if source == "linear" else ""
        lines.append((source, model, len(r), *numbers, last))
    return cells.markdown(header, lines)


def picture(found: Cells, folder: Path) -> None:
    """Sixteen test images of digits, and draws of each model, row by row."""
    digits = [c for c in found if c["cell"]["source"] == "digits" and c["cell"]["seed"] == found[0]["cell"]["seed"]]
    paths = {c["cell"]["model"]: Path(c["folder"]) / "samples.npy" for c in digits}
    if drawn := {model: np.load(path) for model, path in paths.items() if path.exists()}:
        images = np.stack([next(iter(drawn.values()))[0], *(own[1] for own in drawn.values())])
        image_grid(images, images.shape[2:], row_titles=["digits", *drawn]).savefig(folder / "samples.png")


def main(args: list[str] | None = None) -> None:
    """Fills the table and draws the picture."""
    picture(*cells.run("deep_markov", Settings, ("source", "model", "seed"), compute, table, SMOKE, __doc__, args))


if __name__ == "__main__":
    main()
