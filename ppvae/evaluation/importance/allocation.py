"""How many particles each datum needs for a target standard error, by a pilot whose draws are not used again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppvae.errors import UsageError
from ppvae.evaluation.blocks import PARTICLE_BLOCK, Block
from ppvae.evaluation.importance.accumulators import LogWeightAccumulator
from ppvae.evaluation.reliability import MAX_K_HAT, MIN_ESS
from ppvae.inference.tracing import Program

REACH = 4  # a pilot says what up to so many times its own particles would do
MARGIN = 0.8  # of the target standard error that is planned for: the estimate's own is another draw


@dataclass(frozen=True)
class AdaptiveAllocation:
    """A standard error for every datum, and the most particles that a datum's estimate may take.

    Raises:
        UsageError: numbers that cannot be used, by their names.
    """

    std_error: float
    max_particles: int

    def __post_init__(self) -> None:
        if not 0 < self.std_error < float("inf"):
            raise UsageError(f"target_std_error: expected a positive number of nats, found {self.std_error}")
        if self.max_particles < PARTICLE_BLOCK:
            raise UsageError(f"max_particles: expected at least {PARTICLE_BLOCK}, found {self.max_particles}")

    def settings(self) -> dict[str, Any]:
        """The target as numbers."""
        return {"target_std_error": self.std_error, "max_particles": self.max_particles}

    def particles(self, found: dict[str, Tensor], count: int) -> Tensor:
        """How many particles a pilot of so many calls for, [N] in float64; +inf where no number will do.

        The standard error falls as 1 / sqrt(K), ess grows as K, and k_hat is to be below 1 - 1 / log10 K and 0.7:
        K > 10^(1 / (1 - k_hat)). Rounded up to 100, 200, 400, ...
        """
        by_error = count * (found["std_error"] / (MARGIN * self.std_error)).square()
        by_ess = count * MIN_ESS / (MARGIN * found["ess"])
        by_tail = torch.where(found["k_hat"] < MAX_K_HAT, 10 ** (1 / (1 - found["k_hat"])), torch.inf)
        most = torch.stack([by_error, by_ess, by_tail]).amax(0).clamp(min=PARTICLE_BLOCK)  # NaN stays
        doublings = (most / PARTICLE_BLOCK).log2().ceil()
        return torch.where(most.isfinite(), PARTICLE_BLOCK * 2**doublings, torch.inf)


def pilot(
    block: Block, model: Program, guide: Program, need: AdaptiveAllocation, seed: int, rows: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(particles for the estimate, particles of the pilot), [N] each, of a block's data.

    The pilot doubles its particles, and a datum drops out once no more than 4 times those are called for, or a fourth
    of the budget is spent: all of the budget then goes into its estimate. A datum with a NaN or infinite weight, which
    no number of particles mends, gets as many as its pilot.
    """
    width = 1 if block.s.has_global_latents else block.size
    counts, spent = torch.zeros(2, width, dtype=torch.long)
    active, done = torch.arange(width), 0
    weights = LogWeightAccumulator(need.max_particles, (), block.eps)
    while len(active):
        count = min(2 * done or PARTICLE_BLOCK, need.max_particles)
        part, at = block.select_rows(active)
        for log_weight, elbo, _ in part.weights(model, guide, count, seed, rows, start=done, noise="pilot"):
            where = at.to(log_weight.device)
            weights.add(log_weight[:, where], elbo[:, where])
        done = count
        found = {name: value.cpu() for name, value in weights.result().items()}
        wanted = need.particles(found, done)
        broken = (found["nonfinite"] > 0) & ~found["log_px"].isneginf()
        wanted = torch.where(broken, float(done), wanted).clamp(max=need.max_particles)
        over = (wanted <= REACH * done) | (REACH * done >= need.max_particles)
        counts[active[over]], spent[active[over]] = wanted[over].long(), done
        active = active[~over]
        weights = weights.select(~over)
    return counts, spent
