"""What every annealed run shares: its settings, the pair on a block of data, and the plan that is fixed beforehand."""

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
from ppvae.evaluation.annealing.compiled_potential import CompiledPotential
from ppvae.evaluation.annealing.hmc import PILOT_CHAINS, Kernel, Plan, pilot
from ppvae.evaluation.annealing.potential import Potential, prior_of
from ppvae.evaluation.annealing.schedules import at_betas, equal_ess, named_schedule
from ppvae.evaluation.block_cache import BlockCache
from ppvae.evaluation.blocks import DATA_BLOCK, PARTICLE_BLOCK, Block, inspect_columns, program_device
from ppvae.inference.evaluation_mode import evaluation_mode, record_modules
from ppvae.inference.param_store import bind_program
from ppvae.inference.structure import Structure
from ppvae.inference.terms import cache_encoder, terms
from ppvae.inference.tracing import Program
from ppvae.rng import derive_seed


@dataclass(frozen=True)
class Settings:
    """Checked settings of an annealed run; `annealed` says what each means.

    Raises:
        UsageError: a setting that cannot be used, by its name.
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
        """Inverse temperatures [T + 1]; of the pilot run where the schedule is measured."""
        return named_schedule(self.schedule, self.num_temperatures)

    @property
    def chain_blocks(self) -> list[int]:
        """Chains that run together, and share a stream of noise; those that are resampled must all do so."""
        size = self.num_chains if self.resample else PARTICLE_BLOCK
        return [min(size, self.num_chains - first) for first in range(0, self.num_chains, size)]

    def attributes(self) -> dict[str, Any]:
        """The settings as strings and numbers."""
        schedule = self.schedule if isinstance(self.schedule, str) else "given"
        return {
            "num_chains": self.num_chains, "num_temperatures": self.num_temperatures, "start": self.start,
            "schedule": schedule, "resample": self.resample, "num_leapfrog": self.num_leapfrog,
            "target_acceptance": self.target_acceptance,
        }  # fmt: skip


@dataclass(frozen=True)
class Session:
    """A pair ready to be annealed on its data, block after block."""

    model: Program
    guide: Program
    s: Structure
    columns: tuple[Any, ...]
    size: int  # data in a block
    device: torch.device
    settings: Settings
    modules: Sequence[torch.nn.Module]
    points: CompiledPotential

    @property
    def blocks(self) -> int:
        """How many blocks the data make."""
        return -(-len(self.columns[0]) // self.size)

    def block(self, number: int) -> Block:
        """Some rows of the data."""
        first = number * self.size
        return Block(
            self.columns, first, min(first + self.size, len(self.columns[0])), number, self.s, self.device
        )  # fmt: skip

    def density(self, block: Block) -> Potential:
        """The start density and p(x, z) of a block, whose values are checked against the supports once."""
        rows = self.settings.rows or DATA_BLOCK * PARTICLE_BLOCK
        guide = cache_encoder(self.guide, block.batch, self.s, block.index)
        prior, cached = self.settings.start == "prior", guide is not self.guide
        density = Potential(
            self.model, guide, block.batch, self.s, block.index, rows, prior, cached, self.guide, self.points
        )
        if block.number == 0:
            density.check_steady()
        block.check_supports(terms(self.model, guide, block.batch, 1, structure=self.s, index=block.index))
        return density

    def noise(self, *key: Any) -> torch.Generator:
        """The stream that belongs to a key; torch's own generator, from which the pair draws, starts there too."""
        torch.manual_seed(derive_seed(self.settings.seed, *key))
        return torch.Generator(device=self.device).manual_seed(derive_seed(self.settings.seed, *key, "moves"))

    def plan(self, density: Potential, number: int, store: BlockCache, bar: Bar) -> Plan:
        """Inverse temperatures, step sizes and scales, from a pilot run whose chains are not used again."""
        settings = self.settings

        def made() -> dict[str, Tensor]:
            noise = self.noise(number, "pilot")
            scale = density.spread()
            betas = settings.betas.to(self.device)
            kernel = Kernel(density, scale, settings.num_leapfrog)
            start = density.start(PILOT_CHAINS)
            steps, spread = pilot(kernel, start, betas, settings.target_acceptance, noise, bar.update)
            wide = betas[:, None].expand(-1, spread.shape[1])
            if settings.schedule == "equal_ess":
                wide = equal_ess(betas, spread)
                steps = at_betas(steps, betas, wide)
            return {"betas": wide, "steps": steps, "scale": scale}

        if settings.num_temperatures == 1:
            wide = settings.betas.to(self.device)[:, None].expand(-1, density.size)
            scale = torch.ones(density.size, density.dims, dtype=density.dtype, device=self.device)
            return Plan(wide, torch.ones_like(wide), Kernel(density, scale, settings.num_leapfrog))
        part, there = store.part(f"plan-{number:05d}", made)
        if there:
            bar.update(settings.num_temperatures - 1)
        part = {name: value.to(self.device) for name, value in part.items()}
        return Plan(part["betas"], part["steps"], Kernel(density, part["scale"], settings.num_leapfrog))


@contextmanager
def session(
    model: Program, guide: Program, columns: tuple[Any, ...], settings: Settings, device: torch.device | str | None
) -> Iterator[Session]:
    """Everything that holds while a pair is annealed; the random state is the caller's to keep."""
    model, guide = bind_program(model), bind_program(guide)
    with evaluation_mode(model, guide):
        place = torch.device(device) if device is not None else program_device(model, guide, columns)
        with record_modules(model, guide) as modules:
            s, size = inspect_columns(model, guide, columns, place)
        if settings.start == "prior":
            if s.enumerated:
                raise UsageError(
                    f"start='prior': expected latents whose prior has a density of its own; sites {list(s.enumerated)} "
                    f"are summed out of it. Use start='guide'"
                )
            guide = prior_of(model, s.guide_roles)
            s, size = inspect_columns(model, guide, columns, place)
        with pyro.validation_enabled(False):  # the contract was checked once, and supports are checked once a block
            runs = -(-len(columns[0]) // size) * (1 + len(settings.chain_blocks))
            points = CompiledPotential(
                runs * settings.num_temperatures * settings.num_leapfrog if settings.compile else 0
            )
            yield Session(model, guide, s, columns, size, place, settings, modules, points)


class Bar:
    """Progress in transitions of whole blocks, with the running estimate."""

    def __init__(self, blocks: int, runs: int, settings: Settings, hidden: bool | None, what: str):
        total = blocks * (runs + 1) * max(settings.num_temperatures - 1, 1)
        self._bar = tqdm(total=total, desc=what, unit="step", disable=hidden)

    def update(self, count: int = 1) -> None:
        """So many transitions are done."""
        self._bar.update(count)

    def say(self, **values: str) -> None:
        """Figures at the end of the line."""
        if not self._bar.disable:
            self._bar.set_postfix(values)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()
