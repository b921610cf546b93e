"""Annealed chains from the start density to p(x, z) and in reverse, with their log-weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ppvae.evaluation.annealing.hmc import HMCKernel
from ppvae.inference.sequences.resampling import effective_sample_size, systematic_resampling


@dataclass(frozen=True)
class AnnealingPlan:
    """Inverse temperatures and step sizes, both [T + 1, batch], and the HMC kernel, all fixed before the chains run."""

    betas: Tensor
    step_sizes: Tensor
    kernel: HMCKernel


@dataclass(frozen=True)
class ChainsResult:
    """Log-weights [chains, batch] whose mean weight estimates p(x), and diagnostics.

    After resampling, a log-weight belongs to a first draw and sums the weights of all its descendants, so that
    log-weights of different rows are nearly independent.
    """

    log_weight: Tensor
    acceptance: Tensor  # [batch], the mean over chains and temperatures
    resampled: Tensor  # [batch], number of resampling steps


def run_forward_chains(
    path: AnnealingPlan, start: Tensor, resample: float, noise: torch.Generator, on_transition: Callable[[], None]
) -> ChainsResult:
    """The log-weights of `forward_chains`."""
    return forward_chains(path, start, resample, noise, on_transition)[0]


def forward_chains(
    path: AnnealingPlan, start: Tensor, resample: float, noise: torch.Generator, on_transition: Callable[[], None]
) -> tuple[ChainsResult, Tensor]:
    """Annealed importance sampling: log w = sum_t (beta_t - beta_{t-1}) (log p(x, z_{t-1}) - log q(z_{t-1} | x)).

    Returns the log-weights and the last states [chains, batch, dims].

    z_0 is drawn from q, and z_t moves under (1 - beta_t) log q + beta_t log p. Where a datum's effective sample size
    falls under the share `resample` of the chains, they are resampled in proportion to their weights (systematic
    resampling), and exp of the estimate stays unbiased. Without resampling the last states have these weights.
    Source: Neal 2001 (arXiv physics/9803008); Del Moral, Doucet and Jasra 2006.
    """
    state = path.kernel.potential(start)
    count, like = len(start), state.log_joint
    log_weight, log_past = torch.zeros_like(like), torch.zeros_like(like[0])
    acceptance, resampled = torch.zeros_like(log_past), torch.zeros_like(log_past)
    ancestor = torch.arange(count, device=like.device)[:, None].expand_as(like)
    for t in range(1, len(path.betas)):
        log_weight = log_weight + (path.betas[t] - path.betas[t - 1]) * state.log_weight
        if t == len(path.betas) - 1:
            break
        if resample:
            low = effective_sample_size(log_weight) < resample * count
            uniform = torch.rand(low.shape, generator=noise, dtype=like.dtype, device=like.device)
            if bool(low.any()):
                identity = torch.arange(count, device=low.device)[:, None]
                index = torch.where(low, systematic_resampling(log_weight, uniform), identity)
                state, ancestor = state.select_chains(index), ancestor.gather(0, index)
                log_past = torch.where(low, log_past + _log_mean(log_weight), log_past)
                log_weight = torch.where(low, torch.zeros_like(log_weight), log_weight)
                resampled = resampled + low
        state, accepted = path.kernel(state, path.betas[t], path.step_sizes[t], noise)
        acceptance = acceptance + accepted.mean(0)
        on_transition()
    transitions = max(1, len(path.betas) - 2)
    if resample:
        log_weight = _sum_by_ancestor(log_weight, ancestor) + log_past
    return ChainsResult(log_weight, acceptance / transitions, resampled), state.u


def run_reverse_chains(
    path: AnnealingPlan, start: Tensor, noise: torch.Generator, on_transition: Callable[[], None]
) -> Tensor:
    """The forward chains in reverse from a draw of p(z | x): log-weights [chains, batch] with E[1 / w] = 1 / p(x).

    The draw must be exact, so that x is simulated together with it. Source: Grosse et al. 2015 (arXiv 1511.02543).
    """
    state = path.kernel.potential(start)
    log_weight = torch.zeros_like(state.log_weight)
    for t in range(len(path.betas) - 1, 0, -1):
        log_weight = log_weight + (path.betas[t] - path.betas[t - 1]) * state.log_weight
        if t > 1:
            state, _ = path.kernel(state, path.betas[t - 1], path.step_sizes[t - 1], noise)
            on_transition()
    return log_weight


def _log_mean(log_weight: Tensor) -> Tensor:
    return log_weight.logsumexp(0) - torch.tensor(float(len(log_weight)), dtype=torch.float64).log()


def _sum_by_ancestor(log_weight: Tensor, ancestor: Tensor) -> Tensor:
    """Log-weights summed over the descendants of each first draw, -inf for a draw without descendants."""
    largest = log_weight.amax(0)
    shift = torch.where(largest.isfinite(), largest, torch.zeros_like(largest))
    return torch.zeros_like(log_weight).scatter_add(0, ancestor, (log_weight - shift).exp()).log() + shift
