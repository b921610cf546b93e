"""Chains from a start density to p(x, z) and back: HMC between tempered densities, step sizes, resampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ppvae.evaluation.annealing.chain_state import ChainState
from ppvae.evaluation.annealing.potential import Potential

PILOT_CHAINS = 4
WARM_UP = 30  # transitions that find the first step size
ADAPTING = 100  # a pilot makes at least as many transitions, however few its temperatures
GAIN = 0.2  # of log step size per unit of acceptance
JITTER = 0.2  # each transition's step size varies by up to this share, so that no trajectory closes on itself

Tick = Callable[[], None]


@dataclass(frozen=True)
class Kernel:
    """HMC that leaves tempered densities of a block of data invariant; its settings are frozen.

    `scale` [batch, dims] is a unit of length for each coordinate, zero for one that stays where it is.
    Source: Neal 2011 (arXiv 1206.1901).
    """

    density: Potential
    scale: Tensor
    num_leapfrog: int

    def __call__(self, at: ChainState, beta: Tensor, step: Tensor, noise: torch.Generator) -> tuple[ChainState, Tensor]:
        """One transition at inverse temperatures [batch]: (where the chains are, acceptance [chains, batch])."""
        u, like = at.u, at.log_joint
        momentum = torch.randn(u.shape, generator=noise, dtype=u.dtype, device=u.device)
        uniform = torch.rand(like.shape, generator=noise, dtype=like.dtype, device=u.device)
        jitter = torch.rand(like.shape, generator=noise, dtype=like.dtype, device=u.device)
        length = step * (1 - JITTER + 2 * JITTER * jitter)
        move = length.to(u.dtype)[..., None] * self.scale
        before, gradient = at.tempered(beta)
        before = before - _kinetic(momentum)
        point = at
        momentum = momentum + 0.5 * move * gradient
        for i in range(self.num_leapfrog):
            point = self.density(point.u + move * momentum)
            after, gradient = point.tempered(beta)
            momentum = momentum + (0.5 if i == self.num_leapfrog - 1 else 1.0) * move * gradient
        log_ratio = after - _kinetic(momentum) - before
        acceptance = torch.where(log_ratio.isnan(), -torch.inf, log_ratio).clamp(max=0).exp()
        return point.where(uniform < acceptance, at), acceptance


def _kinetic(momentum: Tensor) -> Tensor:
    return 0.5 * momentum.double().square().sum(-1)


@dataclass(frozen=True)
class Plan:
    """What is fixed before the chains run: inverse temperatures, step sizes [T + 1, batch], and the kernel."""

    betas: Tensor
    steps: Tensor
    kernel: Kernel


@dataclass(frozen=True)
class Chains:
    """What a run of chains leaves: [chains, batch] log-weights whose mean estimates p(x), and how it went.

    After resampling, a log-weight belongs to a first draw and holds all of its descendants, so that log-weights of
    different rows are as good as independent.
    """

    log_weight: Tensor
    acceptance: Tensor  # [batch], the mean over chains and temperatures
    resampled: Tensor  # [batch], how often


def pilot(
    kernel: Kernel, start: Tensor, betas: Tensor, target: float, noise: torch.Generator, tick: Tick
) -> tuple[Tensor, Tensor]:
    """Runs a few chains along `betas` [T + 1] and adapts step sizes: (steps [T + 1, N], sd of log w [T, N]).

    After each transition, log step += gain (acceptance - target), per datum.
    """
    point = kernel.density(start)
    count, total = point.log_joint.shape[1], len(betas) - 1
    wide = betas[:, None].expand(-1, count).to(point.u.device)
    log_step = torch.zeros(count, dtype=torch.float64, device=point.u.device)
    repeats = -(-ADAPTING // total)
    steps, spread = [log_step], [point.log_weight.std(0)]

    def adapted(at: ChainState, beta: Tensor, gain: float) -> ChainState:
        nonlocal log_step
        at, acceptance = kernel(at, beta, log_step.exp(), noise)
        log_step = (log_step + gain * (acceptance.mean(0) - target)).clamp(-14.0, 4.0)
        return at

    for i in range(WARM_UP if total > 1 else 0):
        point = adapted(point, wide[1], max(GAIN, 2.0 / (1 + i / 2)))
    for t in range(1, total):
        for _ in range(repeats):
            point = adapted(point, wide[t], GAIN)
        steps.append(log_step)
        spread.append(point.log_weight.std(0))
        tick()
    return torch.stack([*steps, log_step]).exp(), torch.stack(spread)


def forward(plan: Plan, start: Tensor, resample: float, noise: torch.Generator, tick: Tick) -> Chains:
    """Annealed importance sampling: log w = sum_t (beta_t - beta_{t-1}) (log p(x, z_{t-1}) - log q(z_{t-1} | x)).

    z_0 is drawn from q, and z_t moves under (1 - beta_t) log q + beta_t log p. Where a datum's effective sample size
    falls under the share `resample`, its chains are drawn anew in proportion to their weights (systematic resampling),
    and exp of the estimate stays unbiased. Source: Neal 2001 (arXiv physics/9803008); Del Moral et al. 2006.
    """
    point = plan.kernel.density(start)
    count, like = len(start), point.log_joint
    log_weight, log_past = torch.zeros_like(like), torch.zeros_like(like[0])
    acceptance, resampled = torch.zeros_like(log_past), torch.zeros_like(log_past)
    ancestor = torch.arange(count, device=like.device)[:, None].expand_as(like)
    for t in range(1, len(plan.betas)):
        log_weight = log_weight + (plan.betas[t] - plan.betas[t - 1]) * point.log_weight
        if t == len(plan.betas) - 1:
            break
        if resample:
            low = _ess(log_weight) < resample * count
            uniform = torch.rand(low.shape, generator=noise, dtype=like.dtype, device=like.device)
            if bool(low.any()):
                index = torch.where(
                    low, _systematic(log_weight, uniform), torch.arange(count, device=low.device)[:, None]
                )
                point, ancestor = point.taken(index), ancestor.gather(0, index)
                log_past = torch.where(low, log_past + _log_mean(log_weight), log_past)
                log_weight = torch.where(low, torch.zeros_like(log_weight), log_weight)
                resampled = resampled + low
        point, accepted = plan.kernel(point, plan.betas[t], plan.steps[t], noise)
        acceptance = acceptance + accepted.mean(0)
        tick()
    moves = max(1, len(plan.betas) - 2)
    if resample:
        log_weight = _families(log_weight, ancestor) + log_past
    return Chains(log_weight, acceptance / moves, resampled)


def backward(plan: Plan, start: Tensor, noise: torch.Generator, tick: Tick) -> Tensor:
    """The forward run in reverse from a draw of p(z | x): log-weights [chains, batch] with E[1 / w] = 1 / p(x).

    The draw must be exact, so that x is simulated together with it. Source: Grosse et al. 2015 (arXiv 1511.02543).
    """
    point = plan.kernel.density(start)
    log_weight = torch.zeros_like(point.log_weight)
    for t in range(len(plan.betas) - 1, 0, -1):
        log_weight = log_weight + (plan.betas[t] - plan.betas[t - 1]) * point.log_weight
        if t > 1:
            point, _ = plan.kernel(point, plan.betas[t - 1], plan.steps[t - 1], noise)
            tick()
    return log_weight


def _ess(log_weight: Tensor) -> Tensor:
    return (2 * log_weight.logsumexp(0) - (2 * log_weight).logsumexp(0)).exp()


def _log_mean(log_weight: Tensor) -> Tensor:
    return log_weight.logsumexp(0) - torch.tensor(float(len(log_weight)), dtype=torch.float64).log()


def _systematic(log_weight: Tensor, uniform: Tensor) -> Tensor:
    """Indices [chains, batch] drawn in proportion to the weights, from one uniform number per datum."""
    count = len(log_weight)
    total = log_weight.nan_to_num(-torch.inf, torch.inf, -torch.inf).softmax(0).cumsum(0)
    places = (torch.arange(count, device=uniform.device)[:, None] + uniform) / count * total[-1]
    return torch.searchsorted(total.T.contiguous(), places.T.contiguous(), right=True).T.clamp(max=count - 1)


def _families(log_weight: Tensor, ancestor: Tensor) -> Tensor:
    """Log-weights summed over the chains that descend from one first draw, -inf for a draw without any."""
    largest = log_weight.amax(0)
    shift = torch.where(largest.isfinite(), largest, torch.zeros_like(largest))
    return torch.zeros_like(log_weight).scatter_add(0, ancestor, (log_weight - shift).exp()).log() + shift
