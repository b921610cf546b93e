"""Runs of a pair over a few steps of a sequence, and how far back a step depends on latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from ppvae.inference.param_store import is_effect_guide
from ppvae.inference.particle_layout import fold_value, insert_plate_dims, particle_dim, with_sampled_sites
from ppvae.inference.sequences.partial_replay import continue_guide, select_particles
from ppvae.inference.sequences.steps import Steps, log_guide_of, log_joint_of, steps_of
from ppvae.inference.sites import Site
from ppvae.inference.structure import ParticlePlacement, Structure
from ppvae.inference.terms import Terms, evaluate_terms, sample_guide
from ppvae.inference.tracing import Program
from ppvae.rng import fork_rng

PROBES = 4  # particles of which the latents are exchanged
MOST_TESTS, STEP_ROWS = 16, 2**20  # exchanges of latents, and (datum, particle, step) rows, in one run of the pair


class _EndOfWindow(Exception):
    """Ends the run of a program at the first site after its window."""


class _Window(Messenger):
    """Hides the sites before a window, which get given values, and ends the run after it; the first step stays."""

    def __init__(self, step_of: Mapping[str, int | None], steps: range, value: Callable[[str], Tensor | None]):
        super().__init__()
        self.step_of, self.steps, self.value = step_of, steps, value

    def _pyro_sample(self, msg: Any) -> None:
        step = None if isinstance(msg["fn"], _Subsample) else self.step_of.get(msg["name"])
        if not step or step in self.steps:
            return
        if step >= self.steps.stop:
            raise _EndOfWindow
        value = self.value(msg["name"])
        if value is not None and not msg["is_observed"]:
            msg["value"] = value
        msg["done"], msg["stop"] = msg["is_observed"] or value is not None, True


def limit_to_window(
    program: Program,
    step_of: Mapping[str, int | None],
    steps: range,
    values: Mapping[str, Tensor],
    s: Structure,
    num_particles: int,
) -> Program:
    """The program with the sites of the first step and of `steps` alone; `values` are those of earlier latents."""

    def value(name: str) -> Tensor | None:
        v = values.get(name)
        if v is None or s.layout is ParticlePlacement.VECTORIZED:
            return None if v is None else insert_plate_dims(v, s, name)
        dim = particle_dim(v, s, name)
        if s.layout is ParticlePlacement.ONE_BY_ONE:
            return v.select(dim, 0)
        return fold_value(v.expand(*v.shape[:dim], num_particles, *v.shape[dim + 1 :]), s, name)

    def run(*batch: Any) -> None:
        with suppress(_EndOfWindow), _Window(step_of, steps, value):
            program(*batch)

    return run


class HeldLatents:
    """The latents of a filter by step: of the first and of the last steps for all particles, of others for one."""

    def __init__(self, steps: Steps, s: Structure):
        self.steps, self.s = steps, s
        self._values: dict[tuple[str, int], Tensor] = {}  # [K or 1, (inner plates,) batch, *event of the step]

    def slices(self, sites: Mapping[str, Site], window: range) -> dict[tuple[str, int], Tensor]:
        """The latents of a run by site and step; of a chain, those of the window."""
        found = {}
        for name, site in sites.items():
            step = self.steps.of_guide[name]
            if step is not None:
                found[name, step] = site.value
                continue
            dim = site.value.dim() - self.s.event_dims[name]
            found |= {(name, t): site.value.select(dim, t).clone() for t in window}
        return found

    def update(self, runs: Sequence[dict[tuple[str, int], Tensor]]) -> None:
        """Takes over the latents of runs of some particles each."""
        self._values |= runs[0] if len(runs) == 1 else {key: torch.cat([run[key] for run in runs]) for key in runs[0]}

    def select(self, index: Tensor) -> None:
        """Replaces the particles of each datum by those of `index` [K, batch]."""
        for key, value in self._values.items():
            if len(value) == len(index):
                dims = self._event_dims(key[0])
                at = index.reshape(len(index), *(1,) * (value.dim() - dims - 2), index.shape[1], *(1,) * dims)
                shape = torch.broadcast_shapes(value.shape[1:], at.shape[1:])
                self._values[key] = value.expand(-1, *shape).gather(0, at.expand(-1, *shape))

    def forget(self, before: int) -> None:
        """Keeps one particle of the steps before this one, the first step apart."""
        for (name, t), value in self._values.items():
            if 0 < t < before and len(value) > 1:
                self._values[name, t] = value[:1].clone()

    def particles(self, window: range, first: int, count: int) -> dict[str, Tensor]:
        """`count` particles from the first on, of the sites of the first step and of the window, [count, ...].

        A chain has all its steps: those held for one particle as those of that one, later ones as zeros.
        """
        out: dict[str, Tensor] = {}
        chains: dict[str, dict[int, Tensor]] = {}
        for (name, t), value in self._values.items():
            if self.steps.of_guide[name] is None:
                chains.setdefault(name, {})[t] = value[first : first + count] if len(value) > 1 else value
            elif t == 0 or t in window:
                out[name] = value[first : first + count]
        for name, held in chains.items():
            shape = torch.broadcast_shapes(*(v.shape for v in held.values()))
            zero = held[0].new_zeros(()).expand(shape)
            parts = [held[t].expand(shape) if t in held else zero for t in range(self.steps.count)]
            out[name] = torch.stack(parts, len(shape) - self._event_dims(name))
        return out

    def of_one(self) -> dict[str, Tensor]:
        """The latents of one particle by site, [1, ...], without chains."""
        return {n: v[:1] for (n, _), v in self._values.items() if self.steps.of_guide[n] is not None}

    def _event_dims(self, name: str) -> int:
        return self.s.event_dims[name] - (self.steps.of_guide[name] is None)


@dataclass(frozen=True)
class Dependence:
    """The steps of a pair, and the largest number of steps back whose latents a step depends on, the first step apart.

    `lag` is None where it is the whole sequence, as in a model that is not Markov, or where a step reads the sum of all
    earlier latents.
    """

    steps: Steps
    structure: Structure  # with the sites of this batch
    lag: int | None


def find_dependence(
    model: Program, guide: Program, batch: tuple[Any, ...], *, structure: Structure, index: Tensor | None = None
) -> Dependence:
    """How far back a pair's steps depend on latents, found by runs of the pair.

    A few particles are compared with the same ones whose latents are exchanged between them at some steps, the first
    apart: what does not read these latents has the same density bit for bit. Exchanging all steps up to each of about
    sqrt(T) bounds the lag, by B. Exchanging every (B + 1)-th step, from each possible beginning, then tells the one
    step that a change comes from. A latent that is read only at values that no particle has is not found.
    """
    with fork_rng(), torch.no_grad():
        probes = _Probes(model, guide, batch, structure, index)
        count, times = probes.steps.count, torch.arange(probes.steps.count)
        if count < 4:
            return Dependence(probes.steps, probes.structure, None)
        spacing = math.isqrt(count)
        middles = torch.arange(spacing, count - 1, spacing)
        changed = probes.changed((times > 0) & (times <= middles[:, None])) & (times > middles[:, None])
        bound = spacing - 1 + int(torch.where(changed, times - middles[:, None], 1).max())
        period = min(bound + 1, count)
        since = (times - torch.arange(period)[:, None]) % period  # steps since the last one that is exchanged
        changed = probes.changed((since == 0) & (times > 0)) & (times > since)
        lag = max(1, int(torch.where(changed, since, 0).max()))
    whole = lag > count // 2 or is_effect_guide(guide)
    return Dependence(probes.steps, probes.structure, None if whole else lag)


class _Probes:
    """A few particles of a pair, whose latents are exchanged between them at some steps."""

    def __init__(
        self, model: Program, guide: Program, batch: tuple[Any, ...], structure: Structure, index: Tensor | None
    ):
        self.model, self.guide, self.batch, self.index = model, guide, batch, index
        self.sites = sample_guide(guide, batch, PROBES, structure=structure, index=index)
        t = self._weigh(self.sites, PROBES, with_sampled_sites(structure, self.sites))
        self.structure, self.steps, self.size = t.structure, steps_of(t), t.batch_size
        alone = self.structure.layout is ParticlePlacement.ONE_BY_ONE
        held = STEP_ROWS // (PROBES * self.size * self.steps.count)
        self.together = 1 if alone else max(1, min(MOST_TESTS, held))  # tests in one run
        self._as_drawn = self._densities(torch.zeros(self.together, self.steps.count, dtype=torch.bool))

    def changed(self, exchanged: Tensor) -> Tensor:
        """The steps whose densities change, [tests, T], when the latents of some steps are exchanged, [tests, T]."""
        found = []
        for tests in exchanged.split(self.together):
            rest = tests.new_zeros(self.together - len(tests), self.steps.count)  # runs of the same shape
            differ = self._densities(torch.cat([tests, rest])) != self._as_drawn
            found.append(differ.any(0).unflatten(1, (-1, PROBES)).any(3).any(2).T[: len(tests)].cpu())
        return torch.cat(found)

    def _densities(self, exchanged: Tensor) -> Tensor:
        """Log-densities of model and guide, [2, T, tests x PROBES, batch]."""
        device = self.steps.log_weight.device
        own = torch.arange(PROBES)[None, None, :]
        index = torch.where(exchanged.T[..., None], (own + 1) % PROBES, own).flatten(1).to(device)
        values = select_particles(
            self.sites, index[..., None].expand(*index.shape, self.size), self.steps, self.structure
        )
        last = torch.full((self.size,), self.steps.count - 1, device=device)
        sites = continue_guide(
            self.guide, self.batch, values, last, self.steps, structure=self.structure, index=self.index
        )
        t = self._weigh(sites, index.shape[1], self.structure)
        return torch.stack([log_joint_of(t, self.steps), log_guide_of(t, self.steps)]).nan_to_num(0.0)

    def _weigh(self, sites: dict[str, Site], count: int, s: Structure) -> Terms:
        return evaluate_terms(
            self.model, self.guide, self.batch, count, structure=s, index=self.index, guide_sites=sites
        )
