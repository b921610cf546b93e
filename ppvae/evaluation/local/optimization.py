"""Optimisation of the ELBO of each datum over a guide's local parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import pyro
import torch
from torch import Tensor

from ppvae.evaluation.blocks import PARTICLE_BLOCK
from ppvae.rng import derive_seed, seed_all

GRADIENT_PARTICLES = 10  # per datum and step
SELECTION_PARTICLES = 1000  # per datum, for the ELBO that selects the better of two parameters
MIN_GAIN = 0.002  # nats per datum: rounds end once one gains less on average
LEARNING_RATE = ADAM_EPS = (
    0.05  # whitened parameters have unit scale; at this eps, steps of small gradients are Newton's
)


class OptimizableGuide(Protocol):
    """A guide for one block of data, with parameters of its own for each datum."""

    params: Sequence[Tensor]
    data_dims: Sequence[int | None]  # the dim of each parameter that indexes data; None for a block of one datum
    learning_rate: float
    adam_eps: float

    def elbo(self, num_particles: int) -> Tensor:
        """One-sample ELBOs from fresh draws, [num_particles, N]."""

    def backward(self, num_particles: int) -> None:
        """Accumulates the path derivative of minus the ELBO, summed over data, into the parameters' `.grad`.

        The path derivative is unbiased, and zero without noise where the guide is exact.
        Source: Roeder, Wu and Duvenaud 2017 (arXiv 1703.09194).
        """

    def log_weights(self, num_particles: int, seed: int, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(log-weights, elbo) of some particles at a time, both [particles, N]."""


def optimize_local_elbo(
    guide: OptimizableGuide, *, steps: int, rounds: int, seed: int, on_step: Callable[[], Any] = lambda: None
) -> tuple[Tensor, int]:
    """Maximises every datum's ELBO over the guide's parameters: (gain of the last round [N] nats, number of rounds).

    Each round takes `steps` steps of Adam from the best parameters so far, with a cosine schedule from `learning_rate`
    to zero. A datum keeps the parameters at the end of a round only where they raise its ELBO on draws common to all
    rounds. Optimisation ends after `rounds` rounds, or once one gains less than 0.002 nats on average. `on_step` is
    called at every step.
    """
    with pyro.validation_enabled(False):  # the contract was checked once
        best, done = _selection_elbo(guide, seed), 0
        gain = torch.zeros_like(best)
        if not guide.params:
            return gain, 0
        best_params = [param.detach().clone() for param in guide.params]
        for done in range(1, rounds + 1):
            seed_all(derive_seed(seed, "climb", done))
            _run_adam(guide, steps, on_step)
            new = _selection_elbo(guide, seed)
            better = new > best
            gain = torch.where(better, new - best, torch.zeros_like(best)).nan_to_num(0.0, 0.0)
            best = torch.where(better, new, best)
            with torch.no_grad():
                for param, old, dim in zip(guide.params, best_params, guide.data_dims, strict=True):
                    old.copy_(_select(better, param, old, dim))
                    param.copy_(old)
            if float(gain.mean()) < MIN_GAIN:
                break
        return gain, done


def _run_adam(guide: OptimizableGuide, steps: int, on_step: Callable[[], Any]) -> None:
    adam = torch.optim.Adam(guide.params, lr=guide.learning_rate, eps=guide.adam_eps)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        adam.zero_grad()
        guide.backward(GRADIENT_PARTICLES)
        for param in guide.params:
            if param.grad is not None:  # the parameters of a datum without a finite ELBO stay fixed
                param.grad.nan_to_num_(0.0, 0.0, 0.0)
        adam.step()
        schedule.step()
        on_step()


def _selection_elbo(guide: OptimizableGuide, seed: int) -> Tensor:
    """The ELBO from common random numbers, [N]."""
    seed_all(derive_seed(seed, "selection"))
    runs = SELECTION_PARTICLES // PARTICLE_BLOCK
    return torch.stack([guide.elbo(PARTICLE_BLOCK).mean(0) for _ in range(runs)]).mean(0)


def _select(better: Tensor, new: Tensor, old: Tensor, data_dim: int | None) -> Tensor:
    """The new parameter for the data where it is better, the old one elsewhere."""
    if data_dim is None:
        return new if bool(better.all()) else old
    mask = torch.zeros(new.shape[data_dim], dtype=torch.bool, device=new.device)
    mask[: len(better)] = better
    return torch.where(mask.reshape(*(-1 if i == data_dim else 1 for i in range(new.dim()))), new, old)
