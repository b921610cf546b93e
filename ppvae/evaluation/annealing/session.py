"""Settings, set-up and progress bar that annealed importance sampling and BDMC share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from ppvae.errors import UsageError
from ppvae.evaluation.annealing.chains import AnnealingPath
from ppvae.evaluation.annealing.compiled_potential import CompiledPotential
from ppvae.evaluation.annealing.hmc import PILOT_CHAINS, HMCKernel, adapt_step_sizes
from ppvae.evaluation.annealing.potential import Potential, prior_as_guide
from ppvae.evaluation.annealing.schedules import equal_ess, interpolate_step_sizes, named_schedule
from ppvae.evaluation.block_cache import BlockCache, cache_key
from ppvae.evaluation.blocks import DATA_BLOCK, PARTICLE_BLOCK, Block, inspect_columns
from ppvae.inference.evaluation_mode import evaluation_mode, record_modules
from ppvae.inference.param_store import bind_program, program_device
from ppvae.inference.structure import Structure
from ppvae.inference.terms import evaluate_terms
from ppvae.inference.tracing import Program
from ppvae.rng import derive_seed


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
        for name in ("num_chains", "num_temperatures", "num_leapfrog"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.rows is not None and self.rows < 1:
            raise UsageError(f"rows: expected at least 1, found {self.rows}")
        if self.start not in ("guide", "prior"):
            raise UsageError(f"start: expected 'guide' or 'prior', found {self.start!r}")
        if not 0 < self.target_acceptance < 1:
            raise UsageError(f"target_acceptance: expected a share between 0 and 1, found {self.target_acceptance}")
        if not 0 <= self.resample <= 1:
            raise UsageError(f"resample: expected a share from 0 to 1, found {self.resample}")
        _ = self.betas

    @property
    def betas(self) -> Tensor:
        """Inverse temperatures [T + 1]; those of the pilot run under schedule "equal_ess"."""
        return named_schedule(self.schedule, self.num_temperatures)

    @property
    def chain_blocks(self) -> list[int]:
        """Numbers of chains that run together on one noise stream; resampling needs all chains in one block."""
        size = self.num_chains if self.resample else PARTICLE_BLOCK
        return [min(size, self.num_chains - first) for first in range(0, self.num_chains, size)]

    def attributes(self) -> dict[str, Any]:
        """The settings as strings and numbers, for results and cache keys."""
        schedule = self.schedule if isinstance(self.schedule, str) else "given"
        return {
            "num_chains": self.num_chains, "num_temperatures": self.num_temperatures, "start": self.start,
            "schedule": schedule, "resample": self.resample, "num_leapfrog": self.num_leapfrog,
            "target_acceptance": self.target_acceptance,
        }  # fmt: skip


@dataclass(frozen=True)
class AnnealingSession:
    """A pair in evaluation mode, its data in blocks, and the annealing settings."""

    model: Program
    guide: Program
    s: Structure
    columns: tuple[Any, ...]
    size: int  # data in a block
    device: torch.device
    settings: AnnealingSettings
    modules: Sequence[torch.nn.Module]
    evaluate: CompiledPotential

    @property
    def blocks(self) -> int:
        """The number of data blocks."""
        return -(-len(self.columns[0]) // self.size)

    def block(self, number: int) -> Block:
        """One block of the data."""
        first = number * self.size
        stop = min(first + self.size, len(self.columns[0]))
        return Block(self.columns, first, stop, number, self.s, self.device)

    def cache_key(self, method: str) -> dict[str, Any]:
        """Everything that the chains depend on, as strings and numbers."""
        more = {"what": method, "seed": self.settings.seed, "betas": self.settings.betas.tolist()}
        return cache_key(self.columns, self.s, self.modules, self.settings.attributes() | more)

    def potential(self, block: Block) -> Potential:
        """The start density and p(x, z) of a block, with its values checked against the supports."""
        rows, from_prior = self.settings.rows or DATA_BLOCK * PARTICLE_BLOCK, self.settings.start == "prior"
        potential = Potential(
            self.model, self.guide, block, rows, from_prior=from_prior, cache=True, evaluate=self.evaluate
        )
        if block.number == 0:
            potential.check_deterministic()
        block._check(evaluate_terms(self.model, potential.guide, block.batch, 1, structure=self.s, index=block.index))
        return potential

    def noise(self, *key: Any) -> torch.Generator:
        """The transitions' noise stream of a key; the global generator, for draws of the pair, is seeded by it too."""
        torch.manual_seed(derive_seed(self.settings.seed, *key))
        return torch.Generator(device=self.device).manual_seed(derive_seed(self.settings.seed, *key, "moves"))

    def path(self, potential: Potential, number: int, cache: BlockCache, progress: AnnealingProgress) -> AnnealingPath:
        """Inverse temperatures, step sizes and scales from a pilot run, whose chains are then discarded."""
        settings = self.settings

        def run_pilot() -> dict[str, Tensor]:
            noise = self.noise(number, "pilot")
            scale = potential.start_scale()
            betas = settings.betas.to(self.device)
            kernel = HMCKernel(potential, scale, settings.num_leapfrog)
            start = potential.sample_start(PILOT_CHAINS)
            step_sizes, spread = adapt_step_sizes(
                kernel, start, betas, settings.target_acceptance, noise, progress.update
            )
            per_datum = betas[:, None].expand(-1, spread.shape[1])
            if settings.schedule == "equal_ess":
                per_datum = equal_ess(betas, spread)
                step_sizes = interpolate_step_sizes(step_sizes, betas, per_datum)
            return {"betas": per_datum, "steps": step_sizes, "scale": scale}

        if settings.num_temperatures == 1:
            per_datum = settings.betas.to(self.device)[:, None].expand(-1, potential.size)
            space = potential.space
            scale = torch.ones(potential.size, space.dims, dtype=space.dtype, device=self.device)
            kernel = HMCKernel(potential, scale, settings.num_leapfrog)
            return AnnealingPath(per_datum, torch.ones_like(per_datum), kernel)
        part, cached = cache.part(f"plan-{number:05d}", run_pilot)
        if cached:
            progress.update(settings.num_temperatures - 1)
        part = {name: value.to(self.device) for name, value in part.items()}
        kernel = HMCKernel(potential, part["scale"], settings.num_leapfrog)
        return AnnealingPath(part["betas"], part["steps"], kernel)


@contextmanager
def annealing_session(
    model: Program,
    guide: Program,
    columns: tuple[Any, ...],
    settings: AnnealingSettings,
    device: torch.device | str | None,
) -> Iterator[AnnealingSession]:
    """Puts a pair into evaluation mode and inspects it; the caller restores the random state."""
    model, guide = bind_program(model), bind_program(guide)
    with evaluation_mode(model, guide):
        device = torch.device(device) if device is not None else program_device(model, guide, columns)
        with record_modules(model, guide) as modules:
            s, size = inspect_columns(model, guide, columns, device)
        if settings.start == "prior":
            if s.enumerated:
                raise UsageError(
                    f"start='prior': expected latents whose prior has a density of its own; sites {list(s.enumerated)} "
                    f"are summed out of it. Use start='guide'"
                )
            guide = prior_as_guide(model, s.guide_roles)
            s, size = inspect_columns(model, guide, columns, device)
        with pyro.validation_enabled(False):  # the contract is checked above, and supports once per block
            runs = -(-len(columns[0]) // size) * (1 + len(settings.chain_blocks))
            gradients = runs * settings.num_temperatures * settings.num_leapfrog if settings.compile else 0
            evaluate = CompiledPotential(gradients)
            yield AnnealingSession(model, guide, s, columns, size, device, settings, modules, evaluate)


class AnnealingProgress:
    """A progress bar over transitions of whole blocks, with the running estimate."""

    def __init__(self, blocks: int, runs: int, settings: AnnealingSettings, hidden: bool | None, description: str):
        total = blocks * (runs + 1) * max(settings.num_temperatures - 1, 1)
        self._bar = tqdm(total=total, desc=description, unit="step", disable=hidden)

    def update(self, count: int = 1) -> None:
        """Advances by `count` transitions."""
        self._bar.update(count)

    def show(self, **values: str) -> None:
        """Shows values at the end of the line."""
        if not self._bar.disable:
            self._bar.set_postfix(values)

    def __enter__(self) -> AnnealingProgress:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()
