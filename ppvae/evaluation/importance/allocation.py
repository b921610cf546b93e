"""Allocations of particles: the same number for every datum, or as many as a pilot run calls for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ppvae.errors import UsageError
from ppvae.errors.ranges import check_numbers, check_ranges
from ppvae.evaluation.blocks import PARTICLE_BLOCK
from ppvae.evaluation.importance.accumulators import LogWeightAccumulator
from ppvae.evaluation.proposals.log_weights import Proposal
from ppvae.evaluation.reliability import MAX_K_HAT, MIN_ESS

MAX_EXTRAPOLATION = 4  # the largest factor from the particles of the pilot to those of the estimate
MARGIN = 0.8  # the planned standard error in units of the target: that of the estimate varies about the pilot's


@dataclass(frozen=True)
class FixedAllocation:
    """The same number of particles for every datum.

    Raises:
        UsageError: fewer than one particle.
    """

    max_particles: int
    adaptive: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_numbers(num_particles=self.max_particles)

    def settings(self) -> dict[str, Any]:
        """The settings that an estimate reports beside its number of particles."""
        return {}

    def allocate(self, proposal: Proposal) -> dict[str, Tensor]:
        """{"num_particles": [N]} of a block's data."""
        return {"num_particles": torch.full((proposal.block.num_weights,), self.max_particles)}


@dataclass(frozen=True)
class AdaptiveAllocation:
    """As many particles for each datum as a target standard error calls for, judged by a pilot run.

    Raises:
        UsageError: settings that cannot be used, by their names.
    """

    target_std_error: float
    max_particles: int
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_numbers(target_std_error=self.target_std_error, max_particles=self.max_particles)

    def settings(self) -> dict[str, Any]:
        """The settings that an estimate reports beside its number of particles."""
        return {
            "particles": "by need", "target_std_error": self.target_std_error, "max_particles": self.max_particles,
        }  # fmt: skip

    def required_particles(self, statistics: dict[str, Tensor], count: int) -> Tensor:
        """The number of particles that a pilot of `count` calls for, [N] float64; +inf where no number suffices.

        The standard error falls as 1 / sqrt(K), ess grows as K, and k_hat must be below 1 - 1 / log10 K and 0.6:
        K > 10^(1 / (1 - k_hat)). Rounded up to 100, 200, 400, ...
        """
        by_error = count * (statistics["std_error"] / (MARGIN * self.target_std_error)).square()
        by_ess = count * MIN_ESS / (MARGIN * statistics["ess"])
        k_hat = statistics["k_hat"]
        by_tail = torch.where(k_hat < MAX_K_HAT, 10 ** (1 / (1 - k_hat)), torch.inf)
        largest = torch.stack([by_error, by_ess, by_tail]).amax(0).clamp(min=PARTICLE_BLOCK)  # NaN stays
        doublings = (largest / PARTICLE_BLOCK).log2().ceil()
        return torch.where(largest.isfinite(), PARTICLE_BLOCK * 2**doublings, torch.inf)

    def allocate(self, proposal: Proposal) -> dict[str, Tensor]:
        """{"num_particles": of the estimate, "pilot_particles": of the pilot run} of a block's data, [N] each.

        "over_budget" [N] is True where the pilot calls for more particles than there may be, or none suffice.

        The pilot doubles its particles; a datum leaves it once at most 4 times those are called for, or once they are
        a fourth of the budget, all of which its estimate then gets. A datum with a NaN or infinite weight, which no
        number of particles cures, gets as many as its pilot. The draws of the pilot are not used again.
        """
        block = proposal.block
        counts, pilot = torch.zeros(2, block.num_weights, dtype=torch.long)
        over_budget = torch.zeros(block.num_weights, dtype=torch.bool)
        active, done = torch.arange(block.num_weights), 0
        weights = LogWeightAccumulator(self.max_particles, (), block.eps)
        while len(active):
            count = min(2 * done or PARTICLE_BLOCK, self.max_particles)
            part, positions = proposal.select(active)
            for log_weight, elbo, _ in part.log_weights(count, start=done, noise="pilot"):
                index = positions.to(log_weight.device)
                weights.add(log_weight[:, index], elbo[:, index])
            done = count
            statistics = weights.result()
            required = self.required_particles(statistics, done)
            broken = (statistics["nonfinite"] > 0) & ~statistics["log_px"].isneginf()
            over_budget[active] = broken | ~(required <= self.max_particles)
            required = torch.where(broken, float(done), required).clamp(max=self.max_particles)
            reach = MAX_EXTRAPOLATION * done
            finished = (required <= reach) | (reach >= self.max_particles)
            counts[active[finished]], pilot[active[finished]] = required[finished].long(), done
            active = active[~finished]
            weights = weights.select(~finished)
        return {"num_particles": counts, "pilot_particles": pilot, "over_budget": over_budget}


Allocation = FixedAllocation | AdaptiveAllocation


def make_allocation(
    num_particles: int | Literal["auto"], target_std_error: float = 0.05, max_particles: int = 20_000
) -> Allocation:
    """The allocation of `log_marginal`'s arguments.

    Raises:
        UsageError: an argument that cannot be used, by its name.
    """
    check_numbers(target_std_error=target_std_error, max_particles=max_particles)
    if isinstance(num_particles, str) and num_particles == "auto":
        return AdaptiveAllocation(target_std_error, max_particles)
    if not hasattr(num_particles, "__index__"):
        raise UsageError(f"num_particles: expected a number or 'auto', found {num_particles!r}")
    check_ranges(num_particles=num_particles)
    return FixedAllocation(int(num_particles))
