"""The importance weights of one block of data after another, reduced to what is reported of each datum."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppvae.compilation.precision import layer_precision
from ppvae.evaluation.blocks import DATA_BLOCK, PARTICLE_BLOCK, Block
from ppvae.evaluation.importance.accumulators import LogWeightAccumulator, recorded_bounds
from ppvae.evaluation.importance.allocation import AdaptiveAllocation, pilot
from ppvae.evaluation.importance.compiled_weights import CompiledWeights
from ppvae.evaluation.importance.resampling import PosteriorReservoir
from ppvae.inference.structure import Structure
from ppvae.inference.tracing import Program
from ppvae.rng import derive_seed


@dataclass(frozen=True)
class ImportanceSampler:
    """A pair on its data, and how many particles are drawn: so many for every datum, or as each needs."""

    model: Program
    guide: Program
    s: Structure
    columns: tuple[Any, ...]
    size: int  # data in a block
    device: torch.device
    particles: int | AdaptiveAllocation
    bounds: Sequence[int]
    posterior_draws: int
    seed: int
    rows: int
    precision: str = "float32"

    @property
    def blocks(self) -> int:
        """How many blocks the data make."""
        return -(-len(self.columns[0]) // self.size)

    def settings(self) -> dict[str, Any]:
        """What a result is a function of, beside pair and data."""
        return {
            "num_particles": self.particles if isinstance(self.particles, int) else "auto", "seed": self.seed,
            "posterior_draws": self.posterior_draws, "bounds": sorted(self.bounds), **self.chosen(),
        }  # fmt: skip

    def chosen(self) -> dict[str, Any]:
        """What was asked for beside so many particles in float32."""
        need = {} if isinstance(self.particles, int) else self.particles.settings()
        return need | ({} if self.precision == "float32" else {"precision": self.precision})

    def cells(self, blocks: int) -> CompiledWeights | None:
        """Compiled weights for so many blocks, where they can be used."""
        k = self.particles
        if isinstance(k, AdaptiveAllocation) or self.posterior_draws or self.rows < PARTICLE_BLOCK * DATA_BLOCK:
            return None
        total = min(blocks, len(self.columns[0]) // DATA_BLOCK) * (k // PARTICLE_BLOCK)
        return CompiledWeights(self.model, self.guide, self.s, PARTICLE_BLOCK, total, self.precision)

    def rounding_note(self) -> tuple[str, ...]:
        """How far log p(x) of the first data is from float32, with the same noise; nothing where it is float32."""
        if self.precision == "float32":
            return ()
        few = dataclasses.replace(self, particles=PARTICLE_BLOCK, bounds=(), posterior_draws=0)
        moved = few(0)["log_px"] - dataclasses.replace(few, precision="float32")(0)["log_px"]
        if not moved.any():
            return (f"products in {self.precision} change nothing here: there is no layer in float32",)
        who = "all data" if self.s.has_global_latents else f"the first {len(moved)} data"
        return (
            f"products in {self.precision}: with {PARTICLE_BLOCK} particles log p(x) of {who} is "
            f"{float(moved.mean()):+.4f} nats from float32 on average, {float(moved.abs().max()):.4f} at most",
        )

    def __call__(self, number: int, cells: CompiledWeights | None = None) -> dict[str, Tensor]:
        """All that is reported of a block's data, [N] by name; latents [draws, N, ...] as "posterior/name"."""
        with layer_precision(self.precision):
            return self._weighed(number, cells)

    def _weighed(self, number: int, cells: CompiledWeights | None) -> dict[str, Tensor]:
        first = number * self.size
        block = Block(
            self.columns, first, min(first + self.size, len(self.columns[0])), number, self.s, self.device
        )  # fmt: skip
        width = 1 if self.s.has_global_latents else block.size
        if isinstance(self.particles, int):
            counts, told = torch.full((width,), self.particles), {}
        else:
            counts, spent = pilot(block, self.model, self.guide, self.particles, self.seed, self.rows)
            told = {"num_particles": counts, "pilot_particles": spent}
        levels = sorted(set(counts.tolist()))
        ks = [k for k in {*recorded_bounds(levels[0]), *self.bounds} if 1 <= k <= levels[0]]
        tallies = {k: _Tally(self, block, k, (counts == k).nonzero()[:, 0], ks) for k in levels}
        drawn = missing = 0
        for level in levels:  # data that have had their particles drop out
            rows = (counts >= level).nonzero()[:, 0]
            part, at = block.select_rows(rows)
            for log_weight, elbo, t in part.weights(
                self.model, self.guide, level, self.seed, self.rows, cells, start=drawn
            ):
                for k in levels[levels.index(level) :]:
                    tallies[k].add(log_weight, elbo, t, at[counts[rows] == k])
            missing = part.missing if not drawn else missing  # which the first draws have counted in all rows
            drawn = level
        found = _joined([tally.result() for tally in tallies.values()], width)
        return found | told | {"missing": torch.tensor(missing)}


class _Tally:
    """What is kept of the data of a block that have the same number of particles."""

    def __init__(self, w: ImportanceSampler, block: Block, count: int, rows: Tensor, ks: Sequence[int]):
        self.rows = rows
        self.weights = LogWeightAccumulator(count, sorted(ks), block.eps)
        which = (count,) if isinstance(w.particles, AdaptiveAllocation) else ()
        noise = derive_seed(w.seed, block.number, "posterior", *which)
        self.kept = PosteriorReservoir(w.posterior_draws, noise, w.s) if w.posterior_draws else None

    def add(self, log_weight: Tensor, elbo: Tensor, t: Any, at: Tensor) -> None:
        """Takes in log-weights and ELBO [particles, batch] of the columns `at`, and the terms that they are of."""
        if len(at) < log_weight.shape[1]:
            at = at.to(log_weight.device)
            log_weight, elbo = log_weight[:, at], elbo[:, at]
        self.weights.add(log_weight, elbo)
        if self.kept and t is not None:
            self.kept.add(log_weight, t, at.cpu())

    def result(self) -> dict[str, Tensor]:
        found = {name: value.cpu() for name, value in self.weights.result().items()}
        draws = self.kept.values if self.kept else {}
        return found | {"rows": self.rows} | {f"posterior/{name}": value for name, value in draws.items()}


def _joined(parts: Sequence[dict[str, Tensor]], width: int) -> dict[str, Tensor]:
    """Results of some data each, in the order of the data."""
    order = torch.cat([part["rows"] for part in parts]).argsort()
    assert len(order) == width
    out = {}
    for name in parts[0].keys() - {"rows"}:
        dim = int(name.startswith("posterior/"))
        out[name] = torch.cat([part[name] for part in parts], dim).index_select(dim, order)
    return {name: out[name] for name in parts[0] if name in out}
