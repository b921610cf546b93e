"""The search for the fastest particle layout that gives the densities of single-particle runs."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ppvae.errors import PpvaeError
from ppvae.errors.memory import memory_failure
from ppvae.inference.contract.run_failure import explain_failure
from ppvae.inference.second_run import ConstantNoise
from ppvae.inference.structure import ParticlePlacement, Role, Structure
from ppvae.inference.terms import Terms, evaluate_terms
from ppvae.inference.tracing import Program, RecordBaseDraws

log = logging.getLogger("ppvae")

NUM_PARTICLES = 3  # of each run that is compared


def find_particle_placement(model: Program, guide: Program, batch: tuple[Any, ...], s: Structure) -> ParticlePlacement:
    """Vectorized if the pair broadcasts over a particle plate, else folded into the batch, else one by one.

    A layout is accepted if its densities equal those of single-particle runs: a network may run on a tensor with a
    particle dim and take that dim for something else. A guide that draws random numbers outside of its sites, as one
    that adds noise to the data does, is compared with constants in their place; the particles of one run share them.

    Raises:
        ContractError: the pair fails on a single particle.
    """
    record = RecordBaseDraws(s.no_inverse)
    try:
        recorded = record(guide) if s.no_inverse else guide
        single = _Runs(model, recorded, batch, s)(ParticlePlacement.ONE_BY_ONE)
    except PpvaeError:
        raise
    except Exception as error:
        if memory_failure(error):
            raise
        raise explain_failure(error, model, guide, batch) from error
    values = _sampled_values(single, s) | {name: torch.stack(draws) for name, draws in record.draws.items()}
    at_values = _Runs(model, guide, batch, replace(s, from_base=s.no_inverse), values)
    layouts = [ParticlePlacement.VECTORIZED]
    if not (s.has_global_latents or s.draws_subsample):  # folding repeats the data
        layouts.append(ParticlePlacement.FOLDED)
    reason = ""
    for layout in layouts:
        try:
            agree = at_values.agree(layout, single)
            if not agree and at_values.noisy_sides() == {"guide"}:
                with ConstantNoise():
                    agree = at_values.agree(layout, None)
            if agree:
                _Runs(model, guide, batch, s)(layout)  # must sample
                if layout is ParticlePlacement.FOLDED:
                    log.warning("ppvae: the pair does not broadcast over particles (%s): folded into the batch", reason)
                return layout
            reason = "it gives other densities with a particle dim"
        except Exception as error:
            if memory_failure(error):  # the layout, and with it the order of noise, does not depend on memory
                raise
            reason = reason or f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
    log.warning("ppvae: the pair does not broadcast over particles (%s): taken one by one", reason)
    return ParticlePlacement.ONE_BY_ONE


def guide_draws_noise(model: Program, guide: Program, batch: tuple[Any, ...], s: Structure) -> bool:
    """Whether the guide's densities depend on random numbers that are drawn outside of its sites."""
    single = _Runs(model, guide, batch, s, count=1)(ParticlePlacement.ONE_BY_ONE)
    return "guide" in _Runs(model, guide, batch, s, _sampled_values(single, s), 1).noisy_sides()


def _sampled_values(t: Terms, s: Structure) -> dict[str, Tensor]:
    """The sampled values of both sides; with the first rows of the data where the plate draws a subsample."""
    sampled = (Role.LATENT, Role.AUXILIARY, Role.CANCELLED)
    sites = {name: site for name, site in {**t.model, **t.guide}.items() if site.role in sampled}
    values = {name: site.value for name, site in sites.items() if name not in s.enumerated}
    return values | ({s.plate: torch.arange(t.batch_size)} if s.draws_subsample else {})


@dataclass(frozen=True)
class _Runs:
    """The terms of a pair, at given values or its own draws, by particle layout."""

    model: Program
    guide: Program
    batch: tuple[Any, ...]
    s: Structure
    values: dict[str, Tensor] | None = None
    count: int = NUM_PARTICLES

    def __call__(self, layout: ParticlePlacement) -> Terms:
        s = replace(self.s, layout=layout)
        return evaluate_terms(self.model, self.guide, self.batch, self.count, values=self.values, structure=s)

    def agree(self, layout: ParticlePlacement, single: Terms | None) -> bool:
        """Whether a layout gives the densities of single-particle runs at the same values, which run here for None."""
        other = self(layout)
        if single is None or self.s.draws_subsample:  # `single` was evaluated at rows of its own
            single = self(ParticlePlacement.ONE_BY_ONE)
        return all(_close(a, b, single) for a, b in _log_prob_pairs(single, other))

    def noisy_sides(self) -> set[str]:
        """The sides whose densities differ from run to run at the same values."""
        one, two = self(ParticlePlacement.ONE_BY_ONE), self(ParticlePlacement.ONE_BY_ONE)
        sides = {"model": (one.model, two.model), "guide": (one.guide, two.guide)}
        return {
            side
            for side, (a, b) in sides.items()
            if not all(_close(site.log_prob, b[name].log_prob, one) for name, site in a.items())
        }


def _close(a: Tensor, b: Tensor, single: Terms) -> bool:
    if a.shape[-2:] != b.shape[-2:] and a.numel() != b.numel():
        return False
    double = next(iter(single.model.values())).log_prob.dtype is torch.float64
    near = (a - b).abs() <= a.new_tensor(1e-8 if double else 1e-3) * (1 + a.abs())
    return bool((near | (a == b) | (a.isnan() & b.isnan())).all())


def _log_prob_pairs(single: Terms, other: Terms) -> Iterator[tuple[Tensor, Tensor]]:
    """The log-weights, and the log-densities of each site, of both."""
    yield single.log_weight, other.log_weight
    if single.contraction:
        return
    for sites, other_sites in ((single.model, other.model), (single.guide, other.guide)):
        for name, site in sites.items():
            if site.role is not Role.CANCELLED:
                yield site.log_prob, other_sites[name].log_prob
