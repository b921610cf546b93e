"""Hamiltonian Monte Carlo between the start density and p(x, z), and its step sizes from a pilot run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ppvae.evaluation.unconstrained.chain_state import ChainState

PILOT_CHAINS = 4
WARM_UP_TRANSITIONS = 30  # at the first inverse temperature, with a larger gain
MIN_PILOT_TRANSITIONS = 100  # in a pilot run, however few its temperatures
GAIN = 0.2  # of log step size per unit of acceptance
JITTER = 0.2  # relative range of the step size of one transition, against periodic trajectories


class Densities(Protocol):
    """What chains move on, such as a `Potential`."""

    def __call__(self, u: Tensor) -> ChainState:
        """Start density and p(x, z) at states [chains, batch, dims], with their gradients."""


@dataclass(frozen=True)
class HMCKernel:
    """HMC transitions that leave the tempered densities of a block of data invariant.

    `scale` [batch, dims] is the diagonal of the mass matrix to the power -1/2; zero for a coordinate that stays fixed.
    Source: Neal 2011 (arXiv 1206.1901).
    """

    potential: Densities
    scale: Tensor
    num_leapfrog: int

    def __call__(
        self, state: ChainState, beta: Tensor, step_size: Tensor, noise: torch.Generator
    ) -> tuple[ChainState, Tensor]:
        """One transition at inverse temperatures [batch]: (new state, acceptance probability [chains, batch])."""
        u, like = state.u, state.log_joint
        momentum = torch.randn(u.shape, generator=noise, dtype=u.dtype, device=u.device)
        uniform = torch.rand(like.shape, generator=noise, dtype=like.dtype, device=u.device)
        jitter = torch.rand(like.shape, generator=noise, dtype=like.dtype, device=u.device)
        length = step_size * (1 - JITTER + 2 * JITTER * jitter)
        step = length.to(u.dtype)[..., None] * self.scale
        log_density, gradient = state.tempered(beta)
        log_before = log_density - _kinetic_energy(momentum)
        proposal = state
        momentum = momentum + 0.5 * step * gradient
        for i in range(self.num_leapfrog):
            proposal = self.potential(proposal.u + step * momentum)
            log_density, gradient = proposal.tempered(beta)
            momentum = momentum + (0.5 if i == self.num_leapfrog - 1 else 1.0) * step * gradient
        log_ratio = log_density - _kinetic_energy(momentum) - log_before
        acceptance = torch.where(log_ratio.isnan(), -torch.inf, log_ratio).clamp(max=0).exp()
        return proposal.where(uniform < acceptance, state), acceptance


def _kinetic_energy(momentum: Tensor) -> Tensor:
    return 0.5 * momentum.double().square().sum(-1)


def adapt_step_sizes(
    kernel: HMCKernel,
    start: Tensor,
    betas: Tensor,
    target: float,
    noise: torch.Generator,
    on_transition: Callable[[], None],
) -> tuple[Tensor, Tensor]:
    """Step sizes from a pilot run along `betas` [T + 1]: (step sizes [T + 1, N], sd of log w over chains [T, N]).

    After each transition, log step size += gain (acceptance - target), per datum.
    """
    state = kernel.potential(start)
    count, total = state.log_joint.shape[1], len(betas) - 1
    per_datum = betas[:, None].expand(-1, count).to(state.u.device)
    log_step = torch.zeros(count, dtype=torch.float64, device=state.u.device)
    repeats = -(-MIN_PILOT_TRANSITIONS // total)
    log_steps, spread = [log_step], [state.log_weight.std(0)]

    def transition(state: ChainState, beta: Tensor, gain: float) -> ChainState:
        nonlocal log_step
        state, acceptance = kernel(state, beta, log_step.exp(), noise)
        log_step = (log_step + gain * (acceptance.mean(0) - target)).clamp(-14.0, 4.0)
        return state

    for i in range(WARM_UP_TRANSITIONS if total > 1 else 0):
        state = transition(state, per_datum[1], max(GAIN, 2.0 / (1 + i / 2)))
    for t in range(1, total):
        for _ in range(repeats):
            state = transition(state, per_datum[t], GAIN)
        log_steps.append(log_step)
        spread.append(state.log_weight.std(0))
        on_transition()
    return torch.stack([*log_steps, log_step]).exp(), torch.stack(spread)
