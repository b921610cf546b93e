"""Annealing from a fitted proposal: few temperatures, in coordinates that the fit has whitened."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import pyro
import torch
from torch import Tensor

from ppvae.evaluation.annealing.chains import AnnealingPlan, forward_chains, run_reverse_chains
from ppvae.evaluation.annealing.hmc import HMCKernel, adapt_step_sizes
from ppvae.evaluation.annealing.schedules import equal_ess, interpolate_step_sizes, named_schedule, with_steps
from ppvae.evaluation.proposals.climbing import mean_and_scale
from ppvae.evaluation.proposals.fit import MOMENT_DRAWS
from ppvae.evaluation.proposals.log_weights import RefinedProposal
from ppvae.evaluation.unconstrained.chain_state import ChainState
from ppvae.rng import derive_seed, seed_all

NUM_CHAINS = 100
NUM_LEAPFROG = 5
TARGET_ACCEPTANCE = 0.8
PILOT_CHAINS = 16
TEMPERATURES = (25, 100, 400)  # of which the pilot run picks one per datum
TARGET_VARIANCE = 0.2  # of log w over chains: a standard error of 0.05 nats with 100 chains


@final
class FittedStart:
    """A fitted proposal q and p(x, z) as densities of v, u = loc + T v, with loc and T those of the fit.

    T is a diagonal where the scale of the fit has a low rank. Where the guide was the best candidate, loc and T are the
    mean and the standard deviations of its draws, made under torch's generator. States v are [chains, batch, dims];
    log |T| is left out of both densities.

    >>> from ppvae.evaluation.blocks import start_evaluation
    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2).double(), torch.ones(4, 3).double()
    >>> with start_evaluation(pair.model, pair.mean_field, x, seed=0) as run:
    ...     start = FittedStart(RefinedProposal(run, run.block(0), 1000))
    ...     state = start(start.sample_start(5))
    >>> bool((state.log_weight - pair.log_px(x)).abs().max() < 1.0)
    True
    """

    def __init__(self, proposal: RefinedProposal):
        self.proposal = proposal
        fitted = proposal.fitted
        loc, scale = mean_and_scale(proposal.sample_start(MOMENT_DRAWS))
        alone, of_fit = fitted.guide_share == 1, fitted.density.scale
        self.loc = torch.where(alone[:, None], loc, fitted.density.loc)
        if of_fit.dim() == 2:
            self.scale = torch.where(alone[:, None], scale, of_fit)
        else:
            self.scale = torch.where(alone[:, None, None], torch.diag_embed(scale), of_fit)

    def sample_start(self, num_chains: int) -> Tensor:
        """Draws from the proposal, [chains, batch, dims]."""
        return self.whiten(self.proposal.sample(num_chains))

    def whiten(self, u: Tensor) -> Tensor:
        """v of unconstrained coordinates u, both [chains, batch, dims]."""
        if self.scale.dim() == 2:
            return (u - self.loc) / self.scale
        centred = (u - self.loc).permute(1, 2, 0)
        return torch.linalg.solve_triangular(self.scale, centred, upper=False).permute(2, 0, 1)

    def unwhiten(self, v: Tensor) -> Tensor:
        """Unconstrained coordinates u of v, both [chains, batch, dims]."""
        return self.loc + (self.scale * v if self.scale.dim() == 2 else torch.einsum("nde,kne->knd", self.scale, v))

    def __call__(self, u: Tensor) -> ChainState:
        """log q and log p(x, z) at states, with their gradients."""
        v, u = u, self.unwhiten(u)
        with pyro.validation_enabled(False):
            state = self.proposal(u)
        fitted = self.proposal.fitted
        log_start = fitted.log_prob(u, state.log_start)
        gradients = fitted.grad_log_prob(u, state.log_start, state.grad_start), state.grad_joint
        diagonal = self.scale.dim() == 2
        whitened = (self.scale * g if diagonal else torch.einsum("nde,knd->kne", self.scale, g) for g in gradients)
        return ChainState(v, log_start, state.log_joint, *whitened)


@final
@dataclass(frozen=True)
class PilotSchedule:
    """What a pilot run of a few chains plans, [T + 1, batch], for chains of its own noise.

    Attributes:
        betas: inverse temperatures with an equal loss of effective sample size.
        step_sizes: of HMC at the pilot's temperatures.
        num_temperatures: [batch], of `TEMPERATURES` the fewest that keep the variance of log w within 0.2: with
            ideal transitions it is (int_0^1 sd_beta(log w) d beta)^2 / T.
    """

    start: FittedStart
    betas: Tensor
    step_sizes: Tensor
    num_temperatures: Tensor

    @classmethod
    def by_pilot(cls, start: FittedStart, seed: int) -> PilotSchedule:
        """Plans with chains whose noise is a function of the seed."""
        noise, device = _noise(seed, start.loc.device), start.loc.device
        first = named_schedule("sigmoid", TEMPERATURES[0]).to(device)
        kernel = HMCKernel(start, torch.ones_like(start.loc), NUM_LEAPFROG)
        chains = start.sample_start(PILOT_CHAINS)
        steps, spread = adapt_step_sizes(kernel, chains, first, TARGET_ACCEPTANCE, noise, lambda: None)
        length = (spread.nan_to_num(math.inf) * first.diff()[:, None]).sum(0)
        needed = (length.square() / TARGET_VARIANCE).cpu()
        levels = torch.tensor(TEMPERATURES)
        chosen = levels[torch.searchsorted(levels.double(), needed).clamp(max=len(levels) - 1)]
        betas = equal_ess(first, spread)
        return cls(start, betas, interpolate_step_sizes(steps, first, betas), chosen)

    def plan(self, num_temperatures: int) -> AnnealingPlan:
        """Inverse temperatures, step sizes and kernel of chains with as many temperatures."""
        betas = with_steps(self.betas, num_temperatures)
        steps = with_steps(self.step_sizes.log(), num_temperatures).exp()
        return AnnealingPlan(betas, steps, HMCKernel(self.start, torch.ones_like(self.start.loc), NUM_LEAPFROG))

    def select(self, rows: Tensor) -> tuple[PilotSchedule, Tensor]:
        """(the path of these rows of the block, their positions in it), as `Proposal.select`."""
        proposal, positions = self.start.proposal.select(rows)
        if proposal is self.start.proposal:
            return self, positions
        start = FittedStart.__new__(FittedStart)
        index = rows.to(self.start.loc.device)
        start.proposal, start.loc, start.scale = proposal, self.start.loc[index], self.start.scale[index]
        return PilotSchedule(
            start, self.betas[:, index], self.step_sizes[:, index], self.num_temperatures[rows]
        ), positions

    def run(self, num_temperatures: int, seed: int, num_chains: int = NUM_CHAINS) -> dict[str, Tensor]:
        """{"log_weight" [chains, batch], "u" [chains, batch, dims], "acceptance" [batch]} of fresh chains.

        E[w] = p(x), and the last states u have the weights w for the posterior.
        """
        noise = _noise(seed, self.start.loc.device)
        chains, v = forward_chains(
            self.plan(num_temperatures), self.start.sample_start(num_chains), 0.0, noise, lambda: None
        )
        return {"log_weight": chains.log_weight, "u": self.start.unwhiten(v), "acceptance": chains.acceptance}

    def run_reverse(self, num_temperatures: int, seed: int, u: Tensor) -> Tensor:
        """Log-weights [chains, batch] with E[1 / w] = 1 / p(x), from posterior draws u [chains, batch, dims]."""
        noise = _noise(seed, self.start.loc.device)
        return run_reverse_chains(self.plan(num_temperatures), self.start.whiten(u), noise, lambda: None)

    def move(self, u: Tensor, num_steps: int, seed: int) -> tuple[Tensor, Tensor]:
        """(states [chains, batch, dims] after HMC steps at p(z | x), their acceptance rate [batch])."""
        noise, plan = _noise(seed, self.start.loc.device), self.plan(TEMPERATURES[0])
        state, total = self.start(self.start.whiten(u)), torch.zeros_like(plan.step_sizes[-1])
        for _ in range(num_steps):
            state, accepted = plan.kernel(state, plan.betas[-1], plan.step_sizes[-1], noise)
            total = total + accepted.mean(0) / num_steps
        return self.start.unwhiten(state.u), total


def _noise(seed: int, device: torch.device) -> torch.Generator:
    """The transitions' noise; the global generators, for draws of the proposal, are seeded beside it."""
    seed_all(seed)
    return torch.Generator(device=device).manual_seed(derive_seed(seed, "moves"))
