"""Settings and set-up that annealed importance sampling, BDMC and quadrature share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppvae.errors import UsageError
from ppvae.errors.memory import explain_out_of_memory
from ppvae.errors.ranges import check_numbers, check_ranges
from ppvae.evaluation.annealing.chains import AnnealingPlan
from ppvae.evaluation.annealing.hmc import PILOT_CHAINS, HMCKernel, adapt_step_sizes
from ppvae.evaluation.annealing.schedules import equal_ess, interpolate_step_sizes, named_schedule
from ppvae.evaluation.block_cache import BlockContext
from ppvae.evaluation.blocks import DATA_BLOCK, PARTICLE_BLOCK, Block, Evaluation
from ppvae.evaluation.unconstrained.compiled_potential import CompiledPotential
from ppvae.evaluation.unconstrained.potential import Potential, prior_as_guide
from ppvae.inference.terms import evaluate_terms
from ppvae.rng import derive_seed, seed_all


@dataclass(frozen=True)
class AnnealingSettings:
    """Settings of an annealed run, checked; `annealed` documents each.

    Raises:
        UsageError: a setting out of its range, by its name.
    """

    num_chains: int
    num_temperatures: int
    start: str
    schedule: str | Sequence[float] | Tensor
    num_leapfrog: int
    target_acceptance: float
    seed: int
    rows: int | None
    resample: float = 0.0
    compile: bool = True

    def __post_init__(self) -> None:
        numbers = ("num_chains", "num_temperatures", "num_leapfrog", "seed", "target_acceptance", "resample")
        check_numbers(**{name: getattr(self, name) for name in numbers})
        check_ranges(rows=self.rows)
        if self.start not in ("guide", "prior"):
            raise UsageError(f"start: expected 'guide' or 'prior', found {self.start!r}")
        _ = self.betas

    @property
    def betas(self) -> Tensor:
        """Inverse temperatures [T + 1]; those of the pilot run under schedule "equal_ess"."""
        with explain_out_of_memory("the schedule of the annealing", "Lower num_temperatures"):
            return named_schedule(self.schedule, self.num_temperatures)

    @property
    def chain_blocks(self) -> list[int]:
        """Numbers of chains that run together on one noise stream; resampling needs all chains in one block."""
        size = self.num_chains if self.resample else PARTICLE_BLOCK
        return [min(size, self.num_chains - first) for first in range(0, self.num_chains, size)]

    def progress_steps(self, runs: int) -> int:
        """Steps of the progress bar per block of data: transitions of the pilot and of `runs` runs of chains."""
        return (runs + 1) * max(self.num_temperatures - 1, 1)

    def attributes(self) -> dict[str, Any]:
        """The settings as strings and numbers."""
        schedule = self.schedule if isinstance(self.schedule, str) else "given"
        return {
            "num_chains": self.num_chains, "num_temperatures": self.num_temperatures, "start": self.start,
            "schedule": schedule, "resample": self.resample, "num_leapfrog": self.num_leapfrog,
            "target_acceptance": self.target_acceptance,
        }  # fmt: skip

    def cache_key(self, method: str) -> dict[str, Any]:
        """The settings that the chains depend on, as strings and numbers."""
        return self.attributes() | {"what": method, "betas": self.betas.tolist()}


@dataclass(frozen=True)
class AnnealingSession:
    """A pair in evaluation mode on its data, and the annealing settings."""

    run: Evaluation
    settings: AnnealingSettings
    evaluate: CompiledPotential

    @classmethod
    def start(cls, run: Evaluation, settings: AnnealingSettings) -> AnnealingSession:
        """The session of an evaluation; under start="prior" its guide is replaced by the prior."""
        if settings.start == "prior":
            s = run.structure
            if s.enumerated:
                raise UsageError(
                    f"start='prior': expected latents whose prior has a density of its own; sites {list(s.enumerated)} "
                    f"are summed out of it. Use start='guide'"
                )
            run = run.with_pair(run.model, prior_as_guide(run.model, s.guide_roles))
        runs = run.num_blocks * (1 + len(settings.chain_blocks))
        gradients = runs * settings.num_temperatures * settings.num_leapfrog if settings.compile else 0
        return cls(run, settings, CompiledPotential(gradients))

    def potential(self, block: Block) -> Potential:
        """The start density and p(x, z) of a block, with its values checked against the supports."""
        rows, from_prior = self.settings.rows or DATA_BLOCK * PARTICLE_BLOCK, self.settings.start == "prior"
        potential = Potential(
            self.run.model, self.run.guide, block, rows, from_prior=from_prior, cache=True, evaluate=self.evaluate
        )
        if block.number == 0:
            potential.check_deterministic()
        block.check_supports(
            evaluate_terms(self.run.model, potential.guide, block.batch, 1, structure=block.s, index=block.index)
        )
        return potential

    def noise(self, *key: Any) -> torch.Generator:
        """The transitions' noise stream of a key; the global generator, for draws of the pair, is seeded by it too."""
        seed_all(derive_seed(self.settings.seed, *key))
        return torch.Generator(device=self.run.device).manual_seed(derive_seed(self.settings.seed, *key, "moves"))

    def path(self, potential: Potential, number: int, progress: BlockContext) -> AnnealingPlan:
        """Inverse temperatures, step sizes and scales from a pilot run, whose chains are then discarded."""
        settings = self.settings

        def run_pilot() -> dict[str, Tensor]:
            noise = self.noise(number, "pilot")
            scale = potential.start_scale()
            betas = settings.betas.to(self.run.device)
            kernel = HMCKernel(potential, scale, settings.num_leapfrog)
            start = potential.sample_start(PILOT_CHAINS)
            step_sizes, spread = adapt_step_sizes(
                kernel, start, betas, settings.target_acceptance, noise, progress.advance
            )
            per_datum = betas[:, None].expand(-1, spread.shape[1])
            if settings.schedule == "equal_ess":
                per_datum = equal_ess(betas, spread)
                step_sizes = interpolate_step_sizes(step_sizes, betas, per_datum)
            return {"betas": per_datum, "steps": step_sizes, "scale": scale}

        if settings.num_temperatures == 1:
            per_datum = settings.betas.to(self.run.device)[:, None].expand(-1, potential.size)
            space = potential.space
            scale = torch.ones(potential.size, space.dims, dtype=space.dtype, device=self.run.device)
            kernel = HMCKernel(potential, scale, settings.num_leapfrog)
            return AnnealingPlan(per_datum, torch.ones_like(per_datum), kernel)
        part = progress.part(f"plan-{number:05d}", run_pilot)
        part = {name: value.to(self.run.device) for name, value in part.items()}
        kernel = HMCKernel(potential, part["scale"], settings.num_leapfrog)
        return AnnealingPlan(part["betas"], part["steps"], kernel)
