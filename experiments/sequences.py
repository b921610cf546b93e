"""Sequences of a linear and of a nonlinear system, and rows of digits: guides trained by the ELBO, the IWAE bound and
FIVO (Maddison et al. 2017, arXiv 1705.09279), and log p(x) by particle filters and by importance sampling of as many
draws, as T grows.

"linear": z_t = 0.9 z_(t-1) + 0.6 noise, x_t = z_t + 0.8 noise, whose log p(x) the Kalman filter gives. "nonlinear":
z_t = z_(t-1) / 2 + 25 z_(t-1) / (1 + z_(t-1)^2) + noise of variance 10, x_t = z_t^2 / 20 + noise of variance 1 (after
Gordon et al. 1993, without its drive). Of these two the model is known, and the guide q(z_t | z_(t-1), x_t), a network,
is trained on 25 steps. "digits": eight rows of eight binary pixels, whose model is trained too."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from experiments import cells
from experiments.cells import Cells, Workspace
from ppvae import data, likelihoods, log_marginal, nn, objectives, posteriors
from ppvae.models import DeepMarkovModel


@dataclass(frozen=True)
class Settings:
    """The systems, the objectives, the lengths, and the schedule."""

    sources: tuple[str, ...] = ("linear", "nonlinear", "digits")
    objectives: tuple[str, ...] = ("ELBO", "IWAE", "FIVO")
    seeds: tuple[int, ...] = (0, 1, 2)
    lengths: tuple[int, ...] = (5, 25, 50, 100, 200)
    sequences: int = 500
    num_test: int = 10
    draws: int = 8  # of IWAE and FIVO; the ELBO averages as many
    hidden: int = 32
    epochs: int = 50
    batch_size: int = 50
    lr: float = 3e-3
    particles: int = 1000


SMOKE = {
    "seeds": (0,), "lengths": (4, 6), "sequences": 20, "num_test": 4, "draws": 2, "hidden": 4, "epochs": 1,
    "particles": 50,
}  # fmt: skip
TRAINED_STEPS = 25


class Linear(torch.nn.Module):
    """p(z_t | z_(t-1)) of the linear system."""

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        return dist.Normal(0.9 * z, 0.6).to_event(1)


class Growth(torch.nn.Module):
    """p(z_t | z_(t-1)) of the nonlinear system."""

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        return dist.Normal(z / 2 + 25 * z / (1 + z.square()), math.sqrt(10)).to_event(1)


class Observe(torch.nn.Module):
    """p(x_t | z_t) of the two systems."""

    def __init__(self, squared: bool):
        super().__init__()
        self.squared = squared

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        return dist.Normal(z.square() / 20, 1.0).to_event(1) if self.squared else dist.Normal(z, 0.8).to_event(1)


def simulate(source: str, count: int, steps: int, seed: int) -> Tensor:
    """Sequences [count, steps, 1] of a system, from z_0 = 0."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        transition, emission = system(source)
        z, x = torch.zeros(count, 1), []
        for _ in range(steps):
            z = transition(z).sample()
            x.append(emission(z).sample())
    return torch.stack(x, 1)


def system(source: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Transition and emission of a system."""
    return (Linear(), Observe(squared=False)) if source == "linear" else (Growth(), Observe(squared=True))


def kalman(x: Tensor) -> Tensor:
    """log p(x) of each sequence under the linear system, [batch] nats."""
    mean, var, total = torch.zeros(len(x)).double(), 0.0, torch.zeros(len(x)).double()
    for now in x[..., 0].double().unbind(1):
        mean, var = 0.9 * mean, 0.81 * var + 0.36
        total = total + dist.Normal(mean, math.sqrt(var + 0.64)).log_prob(now)
        gain = var / (var + 0.64)
        mean, var = mean + gain * (now - mean), var - gain * var
    return total


def build(s: Settings, source: str) -> DeepMarkovModel:
    """A pair of the model of a source and a guide that reads x_t."""
    latent, size = (4, 8) if source == "digits" else (1, 1)
    net = functools.partial(nn.mlp, hidden=(s.hidden,))
    if source == "digits":
        parts = posteriors.DiagonalNormal(net(latent, 2 * latent)), likelihoods.Bernoulli(net(latent, size))
    else:
        parts = system(source)
    pair = DeepMarkovModel(
        latent, *parts, net(size, s.hidden), posteriors.DiagonalNormal(net(latent + s.hidden, 2 * latent))
    )
    if source != "digits":
        pair.start.value.requires_grad_(False)
    return pair


def load(s: Settings, source: str) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """Sequences for training and validation, and test sequences by their length."""
    if source != "digits":
        train, valid = (simulate(source, s.sequences, TRAINED_STEPS, seed) for seed in (0, 1))
        return train, valid, {steps: simulate(source, s.num_test, steps, 2) for steps in s.lengths}
    counts = (s.sequences, s.num_test, s.num_test)
    images = [d.head(n).read() for d, n in zip(data.load(source, binarize="fixed"), counts, strict=True)]
    train, valid, test = (x.reshape(len(x), 8, 8) for x in images)
    return train, valid, {8: test}


def compute(s: Settings, workspace: Workspace, source: str, objective: str, seed: int) -> dict[str, Any]:
    """Trains a guide, and evaluates log p(x) of test sequences of each length by both methods."""
    train, valid, tests = load(s, source)
    torch.manual_seed(seed)
    run = cells.train(
        build(s, source), train, valid, workspace, epochs=s.epochs, lr=s.lr, batch_size=s.batch_size, seed=seed,
        objective=getattr(objectives, objective)(s.draws),
    )  # fmt: skip
    found: dict[str, Any] = {}
    for steps, x in tests.items():
        options: dict[str, Any] = {"num_particles": s.particles, "seed": seed}
        est = log_marginal(run.model, run.guide, x, method="particle_filter", **options)
        plain = log_marginal(run.model, run.guide, x, proposal="guide", **options)
        found |= cells.estimate_summary(est)
        found |= {f"filter_{steps}": est.nll, f"filter_unreliable_{steps}": float((~est.reliable).double().mean())}
        found |= {f"plain_{steps}": plain.nll, f"plain_unreliable_{steps}": float((~plain.reliable).double().mean())}
        found |= {f"ess_{steps}": float(est.ess.median())}
        if source == "linear":
            found[f"exact_{steps}"] = -float(kalman(x).mean())
    return found | {"steps": list(tests)} | cells.training_summary(run)


def table(found: Cells) -> str:
    """One row per source, length and objective; a cell may have some of the lengths alone."""
    header = ("sequences", "T", "objective", "seeds", "NLL by particle filters", "unreliable", "smallest ess")
    header += ("NLL by importance sampling", "unreliable", "exact NLL")
    lines = []
    for (source, objective), every in cells.group_cells(found, "source", "objective").items():
        for t in sorted({t for c in every for t in c["result"]["steps"]}):
            r = [c for c in every if t in c["result"]["steps"]]
            numbers = [f"{cells.mean(r, f'filter_{t}'):.2f}", f"{cells.mean(r, f'filter_unreliable_{t}'):.0%}"]
            numbers += [f"{cells.mean(r, f'ess_{t}'):.0f}"]
            numbers += [f"{cells.mean(r, f'plain_{t}'):.2f}", f"{cells.mean(r, f'plain_unreliable_{t}'):.0%}"]
            exact = f"{cells.mean(r, f'exact_{t}'):.2f}" if source == "linear" else ""
            lines.append((source, t, objective, len(r), *numbers, exact))
    text = cells.markdown(header, lines)
    rows = cells.group_cells(found, "source", "objective")
    for source in dict.fromkeys(of for of, _ in rows):
        steps = max(t for c in found if c["cell"]["source"] == source for t in c["result"]["steps"])
        own = {o: [c for c in r if steps in c["result"]["steps"]] for (of, o), r in rows.items() if of == source}
        others = [o for o in ("IWAE", "ELBO") if own.get("FIVO") and own.get(o)]
        gains = ", ".join(f"{o} {cells.compare_rows(own['FIVO'], own[o])}" for o in others)
        if gains:
            text += f"\n\n{source}, T = {steps}, log p(x) by particle filters, a guide by FIVO over one by {gains}."
    return text


def main(args: list[str] | None = None) -> None:
    """Computes the table."""
    cells.run("sequences", Settings, ("source", "objective", "seed"), compute, table, SMOKE, __doc__, args)


if __name__ == "__main__":
    main()
