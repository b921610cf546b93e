"""Schedules of inverse temperatures: by name, as given, or with equal loss of effective sample size per step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ppvae.errors import UsageError

SCHEDULES = ("sigmoid", "linear", "equal_ess")
SIGMOID_SCALE = 4.0
SMOOTHING_WINDOW = 4  # temperatures on either side over which the pilot's standard deviation is averaged
LINEAR_SHARE = 0.1  # share of the steps that are linear in beta


def named_schedule(schedule: str | Sequence[float] | Tensor, num_temperatures: int) -> Tensor:
    """Inverse temperatures 0 = beta_0 < ... < beta_T = 1, [T + 1] in float64.

    "sigmoid": sigmoid(4 (2 t / T - 1)), shifted and scaled to [0, 1], denser at both ends (Grosse et al. 2015, arXiv
    1511.02543); "linear": t / T; a sequence of numbers: as given. "equal_ess" starts as "sigmoid", see `equal_ess`.

    Raises:
        UsageError: an unknown name, or numbers that do not rise from 0 to 1.

    >>> named_schedule("linear", 4).tolist(), [round(b, 3) for b in named_schedule("sigmoid", 4).tolist()]
    ([0.0, 0.25, 0.5, 0.75, 1.0], [0.0, 0.105, 0.5, 0.895, 1.0])
    """
    linear = torch.linspace(0, 1, num_temperatures + 1, dtype=torch.float64)
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise UsageError(f"schedule: expected one of {list(SCHEDULES)} or numbers from 0 to 1, found {schedule!r}")
        if schedule == "linear":
            return linear
        ends = 1 / (1 + math.exp(SIGMOID_SCALE)), 1 / (1 + math.exp(-SIGMOID_SCALE))
        betas = (torch.sigmoid(SIGMOID_SCALE * (2 * linear - 1)) - ends[0]) / (ends[1] - ends[0])
        betas[0], betas[-1] = 0.0, 1.0
        return betas
    try:
        betas = torch.as_tensor(schedule).double().flatten()
    except (TypeError, ValueError, RuntimeError):
        raise UsageError(
            f"schedule: expected one of {list(SCHEDULES)} or numbers from 0 to 1, found {schedule!r}"
        ) from None
    increasing = len(betas) > 1 and bool((betas.diff() > 0).all()) and float(betas[0]) == 0 and float(betas[-1]) == 1
    if not increasing:
        raise UsageError(f"schedule: expected numbers that rise from 0 to 1, found {betas.tolist()[:8]}")
    if len(betas) != num_temperatures + 1:
        raise UsageError(
            f"schedule: expected num_temperatures + 1 = {num_temperatures + 1} numbers, found {len(betas)}"
        )
    return betas


def equal_ess(betas: Tensor, spread: Tensor) -> Tensor:
    """Inverse temperatures per datum between which the effective sample size falls by a constant factor.

    A step of d beta multiplies it by about exp(-Var(log w) (d beta)^2), the variance taken at beta: the steps are equal
    in sqrt(Var(log w)) d beta (Zhou et al. 2016, arXiv 1303.3123; Grosse et al. 2013).

    Args:
        betas: inverse temperatures of the pilot run, [T + 1].
        spread: standard deviation of log w over the pilot's chains at beta_0 .. beta_{T-1}, [T, N].

    Returns:
        [T + 1, N].
    """
    steps, count = len(betas) - 1, spread.shape[1]
    grid, out = betas.cpu().numpy(), np.empty((steps + 1, count))
    kernel = np.ones(2 * min(SMOOTHING_WINDOW, (steps - 1) // 2) + 1)
    for n in range(count):
        speed = spread[:, n].nan_to_num(0.0, 0.0, 0.0).cpu().numpy()
        speed = np.maximum(speed, 1e-12 + 1e-3 * speed.max())
        # standard deviations over a few chains are noisy, and vary slowly with beta
        speed = np.exp(
            np.convolve(np.log(speed), kernel, mode="same") / np.convolve(np.ones(steps), kernel, mode="same")
        )
        length = np.cumsum(speed * np.diff(grid))
        length = np.concatenate([[0.0], length]) / length[-1] + LINEAR_SHARE * grid
        out[:, n] = np.interp(np.linspace(0, length[-1], steps + 1), length, grid)
    out[0], out[-1] = 0.0, 1.0
    return torch.from_numpy(out).to(betas.device)


def with_steps(betas: Tensor, num_temperatures: int) -> Tensor:
    """The same schedule per datum [T + 1, N] with another number of steps, interpolated linearly.

    >>> with_steps(torch.tensor([[0.0], [0.2], [1.0]]), 4)[:, 0].tolist()
    [0.0, 0.1..., 0.2..., 0.6..., 1.0]
    """
    old, new = np.linspace(0, 1, len(betas)), np.linspace(0, 1, num_temperatures + 1)
    columns = [np.interp(new, old, column) for column in betas.T.double().cpu().numpy()]
    return torch.from_numpy(np.stack(columns, 1)).to(betas.device)


def interpolate_step_sizes(step_sizes: Tensor, betas: Tensor, new_betas: Tensor) -> Tensor:
    """Step sizes [T + 1, N] at `betas` [T + 1], interpolated on a log scale at `new_betas` [T + 1, N]."""
    grid, logs = betas.cpu().numpy(), step_sizes.log().double().cpu().numpy()
    columns = [np.interp(new_betas[:, n].cpu().numpy(), grid, logs[:, n]) for n in range(step_sizes.shape[1])]
    return torch.from_numpy(np.stack(columns, 1)).exp().to(step_sizes)
