"""Bounds of log p(x) on both sides: the result that they share, and how a proposal and a path give them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ppvae.evaluation.annealing.fitted_start import NUM_CHAINS, FittedStart, PilotSchedule
from ppvae.evaluation.importance.accumulators import LogWeightAccumulator, two_sided
from ppvae.evaluation.proposals.log_weights import Proposal, RefinedProposal
from ppvae.evaluation.results import SaveableResult, mean_and_error
from ppvae.rng import derive_seed, seed_all

Z_LIMITS = 3.0  # standard errors between a mean bound and its confidence limit
MOST_TEMPERATURES = 100  # of annealing from the refined proposal, where 'auto' has up to 400


@dataclass(frozen=True)
class TwoSidedBounds(SaveableResult):
    """Lower and upper bounds of log p(x) in expectation; nats per datum, float64, all [N].

    Attributes:
        lower, upper: the bounds.
        lower_std_error, upper_std_error: their Monte-Carlo standard errors.
        nonfinite: number of non-finite log-weights.
    """

    lower: Tensor
    upper: Tensor
    lower_std_error: Tensor
    upper_std_error: Tensor
    nonfinite: Tensor

    @property
    def gap(self) -> Tensor:
        """upper - lower, [N] nats; on average it bounds the error of either."""
        return self.upper - self.lower

    @property
    def width(self) -> float:
        """The mean of the gap, nats."""
        return mean_and_error(self.gap)[0]

    @property
    def width_std_error(self) -> float:
        """The standard error of `width` over the data; NaN for one datum."""
        return mean_and_error(self.gap)[1]

    @property
    def low(self) -> float:
        """The mean lower bound less three of its Monte-Carlo standard errors, nats."""
        return float(self.lower.mean()) - Z_LIMITS * _error_of_mean(self.lower_std_error)

    @property
    def high(self) -> float:
        """The mean upper bound plus three of its Monte-Carlo standard errors, nats."""
        return float(self.upper.mean()) + Z_LIMITS * _error_of_mean(self.upper_std_error)


def bounds_by_swap(proposal: Proposal, exact: Tensor, num_particles: int, noise: str) -> dict[str, Tensor]:
    """Both bounds of a block by field, from K draws and log-weights `exact` [M, N] of posterior draws.

    lower = log (1/K) sum_k w_k, and upper = the mean over m of log (1/K) (w(z*_m) + sum_{k < K} w_k), with the same
    draws. "exact_share" is the mean share of w(z*_m) in its sum.
    """
    block, done = proposal.block, 0
    lower, rest = (LogWeightAccumulator(num_particles, (), block.eps) for _ in range(2))
    for log_weight, _, _ in proposal.log_weights(num_particles, noise=noise):
        done += len(log_weight)
        lower.add(log_weight, log_weight)
        others = log_weight if done < num_particles else log_weight[:-1]
        if len(others):
            rest.add(others, others)
    below, without, exact = lower.result(), rest.result(), exact.cpu()
    log_rest = without["log_px"] + math.log(num_particles - 1)
    log_sums = torch.logaddexp(log_rest, exact)
    share = (exact - log_sums).exp()
    # of log sum: the relative error of the sum of the draws, and what one exact draw in place of another moves
    error = ((1 - share) * without["std_error"].nan_to_num(0.0)).square().mean(0) + share.square().mean(0) / len(exact)
    return {
        "lower": below["log_px"], "lower_std_error": below["std_error"],
        "upper": log_sums.mean(0) - math.log(num_particles), "upper_std_error": error.sqrt(),
        "exact_share": share.mean(0),
        "nonfinite": below["nonfinite"] + (~exact.isfinite()).sum(0),
    }  # fmt: skip


def bounds_by_annealing(forward: Tensor, reverse: Tensor, eps: float) -> dict[str, Tensor]:
    """`two_sided` of log-weights [chains, N] of forward chains, and of reverse ones from posterior draws."""
    lower, upper = (LogWeightAccumulator(len(forward), (), eps) for _ in range(2))
    lower.add(forward, forward)
    upper.add(-reverse, -reverse)
    return two_sided(lower, upper)


def annealed_gap(proposal: RefinedProposal, latents: Mapping[str, Tensor]) -> Tensor:
    """The gap of bidirectional Monte Carlo from a fitted proposal, with exact posterior draws; [N] nats."""
    block, seed = proposal.block, proposal.run.seed
    seed_all(derive_seed(seed, block.number, "bracket annealing"))
    path = PilotSchedule.by_pilot(FittedStart(proposal), derive_seed(seed, block.number, "bracket annealing pilot"))
    level = min(int(path.num_temperatures.max()), MOST_TEMPERATURES)
    u = proposal.state(latents).expand(NUM_CHAINS, -1, -1)
    forward = path.run(level, derive_seed(seed, block.number, "bracket forward"))["log_weight"]
    reverse = path.run_reverse(level, derive_seed(seed, block.number, "bracket reverse"), u)
    width = block.num_weights
    bounds = bounds_by_annealing(forward[:, :width], reverse[:, :width], block.eps)
    return bounds["upper"] - bounds["lower"]


def _error_of_mean(errors: Tensor) -> float:
    """The standard error of a mean of independent estimates."""
    return float(errors.square().sum().sqrt() / len(errors))
