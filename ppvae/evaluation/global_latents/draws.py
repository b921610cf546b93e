"""Draws of the global latents from the guide, the same for every block of data."""

from __future__ import annotations

from typing import final

import pyro
import torch
from torch import Tensor

from ppvae.evaluation.blocks import PARTICLE_BLOCK, Evaluation
from ppvae.inference.particle_layout import particle_dim
from ppvae.inference.terms import sample_globals
from ppvae.inference.tracing import sample_sites, trace_program
from ppvae.rng import derive_seed, fork_all_rngs, seed_all


@final
class GlobalDraws:
    """Values of the guide's global sites by draw, made in blocks of 100 whose noise is a function of the seed.

    Memory holds one block of draws, whatever their number.

    Args:
        run: the evaluation; the guide draws global latents given its first block of data.
        particles_per_draw: K, of the local latents; particle k has draw k // K.
    """

    def __init__(self, run: Evaluation, particles_per_draw: int = 1):
        self.run, self.particles_per_draw = run, particles_per_draw
        self._first = run.block(0)
        self._held: tuple[int, dict[str, Tensor]] = (-1, {})

    def __call__(self, first: int, count: int) -> dict[str, Tensor]:
        """The values of `count` particles, from particle `first` on."""
        draws = torch.arange(first, first + count) // self.particles_per_draw
        parts = []
        for number in (draws // PARTICLE_BLOCK).unique().tolist():
            mine = draws[draws // PARTICLE_BLOCK == number] - number * PARTICLE_BLOCK
            parts.append({n: v.index_select(0, mine.to(v.device)) for n, v in self._block(number).items()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _block(self, number: int) -> dict[str, Tensor]:
        """The values of a block of draws, [draws, (plates,) *event]."""
        if self._held[0] != number:
            run, s, block = self.run, self.run.structure, self._first
            with fork_all_rngs(), torch.no_grad(), pyro.validation_enabled(False):
                seed_all(derive_seed(run.seed, "globals", number))
                sites = sample_globals(run.guide, block.batch, PARTICLE_BLOCK, structure=s, index=block.index)
            values = {n: site.value.movedim(particle_dim(site.value, s, n), 0) for n, site in sites.items()}
            self._held = number, values
        return self._held[1]

    def latents(self, count: int) -> dict[str, Tensor]:
        """The first `count` draws of each global latent, [draws, (plates,) *event], without the guide's helpers."""
        run, s, block = self.run, self.run.structure, self._first
        with fork_all_rngs(), torch.no_grad(), pyro.validation_enabled(False):
            given = {} if block.index is None else {s.plate: block.index}
            single = dict(sample_sites(trace_program(run.guide, block.batch, s, given)))
        blocks = [self._block(number) for number in range(-(-count // PARTICLE_BLOCK))]
        names = [n for n in blocks[0] if n in s.model_roles]
        draws = {n: torch.cat([values[n] for values in blocks])[:count].cpu() for n in names}
        return {n: value.reshape(count, *single[n]["value"].shape) for n, value in draws.items()}
