"""Climbing a target: what it is, Adam per datum, the way to a mode, and the ELBO of a density."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ppvae.evaluation.proposals.densities import Density

MODE_STEPS, MODE_RATE = 40, 0.1


class Target(Protocol):
    """What a proposal is fitted to: the densities of guide and model on a block of data, as `Potential` gives them."""

    def sample_start(self, num_chains: int) -> Tensor:
        """Draws of the guide, [particles, batch, dims]."""

    def log_densities(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """log q(u | x) and log p(x, u), [particles, batch]."""

    def log_joint(self, u: Tensor) -> Tensor:
        """log p(x, u), [particles, batch]."""

    def gradient(self, u: Tensor) -> Tensor:
        """The gradient of log p(x, u), [particles, batch, dims]."""


def mean_and_scale(u: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [batch, dims] of draws [particles, batch, dims]; 0 and 1 where not finite."""
    loc, scale = u.mean(0), u.std(0)
    loc = torch.where(loc.isfinite(), loc, torch.zeros_like(loc))
    return loc, torch.where(scale.isfinite() & (scale > 0), scale, torch.ones_like(scale))


def ascend(target: Target, u: Tensor, scale: Tensor) -> Tensor:
    """Adam's way from u [batch, dims] towards the mode of log p(x, u), in units of the scale."""
    x = torch.zeros_like(u)
    step = adam(x, MODE_RATE, MODE_STEPS)
    for _ in range(MODE_STEPS):
        gradient = target.gradient((u + scale * x)[None])[0] * scale
        step(-gradient)
    return u + scale * x


def elbo(target: Target, q: Density, num_particles: int) -> Tensor:
    """The ELBO of each datum under q, [batch], a Monte Carlo estimate."""
    u = q.sample(num_particles)
    return (target.log_joint(u) - q.log_prob(u)).nan_to_num(nan=-math.inf).mean(0)


def adam(parameter: Tensor, rate: float, num_steps: int) -> Callable[[Tensor], None]:
    """Steps of Adam down given gradients, in place, with a rate that falls to zero by a cosine.

    Gradients that are not finite count as zero, so that one datum cannot break another. torch's optimizer takes
    gradients from `.grad` of leaves and one state for a parameter as a whole; here each datum is by itself.
    """
    optimizer = torch.optim.Adam([parameter], lr=rate, betas=(0.9, 0.99), eps=1e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)

    def step(gradient: Tensor) -> None:
        parameter.grad = gradient.nan_to_num(0.0, 0.0, 0.0)
        optimizer.step()
        cosine.step()
        parameter.grad = None

    return step
