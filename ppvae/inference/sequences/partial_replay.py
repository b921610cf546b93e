"""Draws of a guide that continue given ones: the first steps of a sequence kept, the others drawn anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from ppvae.inference.particle_layout import ParticleLayout, particle_dim, with_sampled_sites
from ppvae.inference.sequences.steps import Steps, is_chain
from ppvae.inference.sites import Site
from ppvae.inference.structure import ParticlePlacement, Structure
from ppvae.inference.terms import sample_guide
from ppvae.inference.tracing import Program


class PartialReplay(Messenger):
    """Draws each latent, and replaces the draw by a given value where its step is kept.

    Args:
        values: the latents, in the shapes of the run.
        kept: by site, [*batch of the run] with a dim of size one for each event dim; of a chain [*batch, T].
    """

    def __init__(self, values: Mapping[str, Tensor], kept: Mapping[str, Tensor]):
        super().__init__()
        self.values, self.kept = values, kept

    def _pyro_sample(self, msg: Any) -> None:
        value = self.values.get(msg["name"])
        if value is None or msg["done"] or msg["is_observed"] or isinstance(msg["fn"], _Subsample):
            return
        kept = self.kept[msg["name"]]
        if is_chain(msg["fn"]):
            msg["value"] = msg["fn"].continue_from(value, kept)
        elif bool(kept.all()):
            msg["value"] = value
        else:
            msg["value"] = torch.where(kept, value, msg["fn"](*msg["args"], **msg["kwargs"]))
        msg["done"] = True


def broadcast_steps(layout: ParticleLayout, by_step: Tensor, name: str, step: int | None) -> Tensor:
    """Numbers of each step, [T, particles, batch], in a shape that broadcasts with a latent's value in the run.

    `step` is that of the latent; None for a chain, whose steps are its first event dim.
    """
    if step is not None:
        return layout.broadcast_weights(by_step[step], name)
    return torch.cat([layout.broadcast_weights(each, name) for each in by_step], -layout.s.event_dims[name])


def select_particles(sites: Mapping[str, Site], index: Tensor, steps: Steps, s: Structure) -> dict[str, Tensor]:
    """The values of a guide's sites at the particles `index` [T, particles, batch] of each step and datum."""
    s = with_sampled_sites(s, sites)
    layout = ParticleLayout(replace(s, layout=ParticlePlacement.VECTORIZED), *index.shape[1:])
    out = {}
    for name, site in sites.items():
        at = broadcast_steps(layout, index, name, steps.of_guide[name])
        shape = torch.broadcast_shapes(site.value.shape[1:], at.shape[1:])
        out[name] = site.value.expand(-1, *shape).gather(0, at.expand(-1, *shape))
    return out


def continue_guide(
    guide: Program,
    batch: tuple[Any, ...],
    values: Mapping[str, Tensor],
    last: Tensor,
    steps: Steps,
    *,
    structure: Structure,
    index: Tensor | None = None,
    end: int | None = None,
) -> dict[str, Site]:
    """The guide's sites, as `sample_guide` gives them, of draws that keep all steps of `values` up to `last`, [batch].

    Args:
        values: of the guide's sites, [K, (inner plates,) batch, *event].
        last: the last step that is kept of each datum; -1 for none.
        steps: those of `values`.
        end: the first step of a chain that is kept again; None for none.
    """
    name = next(iter(values))
    count = values[name].shape[particle_dim(values[name], structure, name)]
    layout = ParticleLayout(structure, count, len(last))
    times = torch.arange(steps.count, device=last.device)[:, None, None]
    upto = ((times <= last) | (times >= (steps.count if end is None else end))).expand(-1, count, -1)
    runs = []
    for _, at, _, piece in layout.runs(batch, values):
        kept = {}
        for site in at:
            step = steps.of_guide[site]
            kept[site] = broadcast_steps(piece, upto, site, step)
            if step is None:
                kept[site] = kept[site].flatten(kept[site].dim() - structure.event_dims[site])
        with PartialReplay(at, kept):
            runs.append(sample_guide(guide, batch, piece.num_particles, structure=structure, index=index))
    return runs[0] if len(runs) == 1 else _join(runs, structure)


def _join(runs: list[dict[str, Site]], s: Structure) -> dict[str, Site]:
    """The sites of single-particle runs as one."""
    out = {}
    for name, site in runs[0].items():
        sites = [run[name] for run in runs]
        out[name] = replace(
            site, value=torch.cat([x.value for x in sites], particle_dim(site.value, s, name)),
            log_prob=torch.cat([x.log_prob for x in sites], -2),
            particle_sites=tuple(part for x in sites for part in x.particle_sites),
        )  # fmt: skip
    return out
