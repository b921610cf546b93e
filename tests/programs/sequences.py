"""Pairs of sequences in plain Pyro, whose log p(x) a Kalman filter or the forward pass of an HMM gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

A, Q, C, R = 0.9, 0.6, 1.0, 0.8  # z_t = A z_(t-1) + Q noise, x_t = C z_t + R noise, z_0 = 0
Program = Callable[..., Any]


def draw_linear(count: int, steps: int, seed: int = 0) -> Tensor:
    """Sequences [count, steps] of the linear model."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, count, steps, generator=generator, dtype=torch.float64)
    z, out = torch.zeros(count).double(), []
    for t in range(steps):
        z = A * z + Q * noise[0, :, t]
        out.append(C * z + R * noise[1, :, t])
    return torch.stack(out, 1)


def kalman(x: Tensor, lengths: Tensor | None = None) -> Tensor:
    """log p(x_1 .. x_n) of each sequence, [N]: predict, compare, update (Kalman 1960)."""
    mean, var, total = torch.zeros(len(x)).double(), torch.zeros(len(x)).double(), torch.zeros(len(x)).double()
    for t in range(x.shape[1]):
        mean, var = A * mean, A**2 * var + Q**2
        spread = C**2 * var + R**2
        log_prob = dist.Normal(C * mean, spread.sqrt()).log_prob(x[:, t])
        total = total + (log_prob if lengths is None else torch.where(t < lengths, log_prob, 0.0))
        gain = var * C / spread
        mean, var = mean + gain * (x[:, t] - C * mean), var - gain * C * var
    return total


def kalman_smoother(x: Tensor) -> tuple[Tensor, Tensor]:
    """Means and variances of z_t given all of x, [N, T] each (Rauch, Tung and Striebel 1965)."""
    mean, var, steps = torch.zeros(len(x)).double(), torch.zeros(len(x)).double(), []
    for t in range(x.shape[1]):
        mean, var = A * mean, A**2 * var + Q**2
        gain = var * C / (C**2 * var + R**2)
        mean, var = mean + gain * (x[:, t] - C * mean), var - gain * C * var
        steps.append((mean, var))
    smoothed = [steps[-1]]
    for mean, var in reversed(steps[:-1]):
        later_mean, later_var = smoothed[-1]
        gain = var * A / (A**2 * var + Q**2)
        smoothed.append((mean + gain * (later_mean - A * mean), var + gain**2 * (later_var - A**2 * var - Q**2)))
    means, variances = zip(*reversed(smoothed), strict=True)
    return torch.stack(means, 1), torch.stack(variances, 1)


def linear_pair(
    shift: float = 0.0, learned: bool = False, require: Callable[[Tensor, Tensor], bool] = lambda z, x: True
) -> tuple[Program, Program]:
    """(model, guide) with sites z_0, x_0, z_1, x_1, ...: the guide is p(z_t | z_(t-1), x_t) with a mean off by shift.

    Called with (x, lengths) sequences end at their lengths. Where it is learned: parameters "a", "shift".
    The programs take no shapes but those for which require(z_t, x) is true.
    """

    def model(x: Tensor, lengths: Tensor | None = None) -> None:
        a = pyro.param("a", torch.tensor(A).double()) if learned else A
        z = torch.zeros(()).double()
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                with poutine.mask(mask=True if lengths is None else t < lengths):
                    z = pyro.sample(f"z_{t}", dist.Normal(a * z, Q))
                    assert require(z, x)
                    pyro.sample(f"x_{t}", dist.Normal(C * z, R), obs=x[:, t])

    def guide(x: Tensor, lengths: Tensor | None = None) -> None:
        off = pyro.param("shift", torch.tensor(shift).double()) if learned else shift
        precision = 1 / Q**2 + C**2 / R**2
        z = torch.zeros(()).double()
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                with poutine.mask(mask=True if lengths is None else t < lengths):
                    loc = (A * z / Q**2 + C * x[:, t] / R**2) / precision
                    z = pyro.sample(f"z_{t}", dist.Normal(loc + off, precision**-0.5))
                    assert require(z, x)

    return model, guide


TRANSITION = torch.tensor([[0.8, 0.15, 0.05], [0.1, 0.8, 0.1], [0.25, 0.05, 0.7]]).double()
LOCS = torch.tensor([-1.5, 0.0, 2.0]).double()


def hmm_pair() -> tuple[Program, Program]:
    """A hidden Markov model of three states with normal observations; the guide is p(s_t | s_(t-1), x_t)."""

    def model(x: Tensor) -> None:
        s = torch.zeros((), dtype=torch.long)
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                s = pyro.sample(f"s_{t}", dist.Categorical(TRANSITION[s]))
                pyro.sample(f"x_{t}", dist.Normal(LOCS[s], 1.0), obs=x[:, t])

    def guide(x: Tensor) -> None:
        s = torch.zeros((), dtype=torch.long)
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                logits = TRANSITION[s].log() + dist.Normal(LOCS, 1.0).log_prob(x[:, t, None])
                s = pyro.sample(f"s_{t}", dist.Categorical(logits=logits))

    return model, guide


def forward_pass(x: Tensor) -> Tensor:
    """log p(x) of each sequence under the hidden Markov model, [N], by the forward recursion."""
    log_alpha = torch.tensor([0.0, -torch.inf, -torch.inf]).double().expand(len(x), 3)
    for t in range(x.shape[1]):
        moved = (log_alpha[:, :, None] + TRANSITION.log()).logsumexp(1)
        log_alpha = moved + dist.Normal(LOCS, 1.0).log_prob(x[:, t, None])
    return log_alpha.logsumexp(1)
