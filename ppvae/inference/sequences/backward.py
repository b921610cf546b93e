"""Draws of whole sequences given all data, from the particles of a filter: backward sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ppvae.inference.particle_layout import ParticleLayout, with_sampled_sites
from ppvae.inference.sequences.partial_replay import broadcast_steps, select_particles
from ppvae.inference.sequences.steps import Steps, log_joint_of
from ppvae.inference.sites import Site
from ppvae.inference.structure import ParticlePlacement, Structure
from ppvae.inference.terms import evaluate_terms
from ppvae.inference.tracing import Program


@dataclass(frozen=True)
class FilterHistory:
    """The particles of a filter at each step before they were resampled: K T latents and ancestors of each datum.

    Backward sampling chooses among the particles of every step, so that the memory grows with K T.

    Attributes:
        sites: of the guide; the values at a step are those of the particles before the next resampling.
        steps: those of the sequence.
        ancestors: the indices drawn after each step, [T, K, batch]; a particle's own where it was not resampled.
        rounds: (step after which each datum was resampled, [batch], or the last one; log-weights there, [K, batch]).
    """

    sites: Mapping[str, Site]
    steps: Steps
    ancestors: Tensor
    rounds: tuple[tuple[Tensor, Tensor], ...]

    @staticmethod
    def start(sites: Mapping[str, Site], steps: Steps) -> FilterHistory:
        """The history before the first step."""
        own = torch.arange(steps.log_weight.shape[1], device=steps.log_weight.device)[:, None]
        return FilterHistory(sites, steps, own.expand(steps.log_weight.shape), ())

    def extend(
        self, sites: Mapping[str, Site], last: Tensor, at: Tensor, log_weight: Tensor, ancestors: Tensor, s: Structure
    ) -> FilterHistory:
        """The history after the steps `last` + 1 to `at` of each datum, [batch], and the `ancestors` drawn then."""
        times = torch.arange(self.steps.count, device=at.device)[:, None, None]
        new = ((times > last) & (times <= at)).expand(self.ancestors.shape)
        layout = ParticleLayout(
            replace(with_sampled_sites(s, sites), layout=ParticlePlacement.VECTORIZED), *at.shape * 2
        )
        held = {}
        for name, site in sites.items():
            mask = broadcast_steps(layout, new, name, self.steps.of_guide[name])
            held[name] = replace(site, value=torch.where(mask, site.value, self.sites[name].value))
        drawn = torch.where(times == at, ancestors, self.ancestors)
        return replace(self, sites=held, ancestors=drawn, rounds=(*self.rounds, (at, log_weight)))

    def select_rows(self, rows: Tensor, s: Structure) -> FilterHistory:
        """The history of these rows of the batch, which may be repeated."""
        s, sites = with_sampled_sites(s, self.sites), {}
        for name, site in self.sites.items():
            data = site.value.dim() - s.event_dims[name] - 1
            value = site.value if site.value.shape[data] == 1 else site.value.index_select(data, rows)
            sites[name] = replace(site, value=value)
        rounds = tuple((at[rows], log_weight[:, rows]) for at, log_weight in self.rounds)
        return replace(self, sites=sites, ancestors=self.ancestors[..., rows], rounds=rounds)

    def lineages(self, at: Tensor) -> Tensor:
        """Of the particles at step `at` of each datum, the index of the particle that each earlier step is of.

        [T, K, batch]; a particle's own index at later steps.
        """
        own = torch.arange(self.ancestors.shape[1], device=at.device)[:, None].expand(self.ancestors.shape[1:])
        indices = [own]
        for t in range(self.steps.count - 1, 0, -1):
            indices.append(torch.where(t <= at, self.ancestors[t - 1].gather(0, indices[-1]), own))
        return torch.stack(indices[::-1])


def sample_backward(
    model: Program,
    guide: Program,
    batch: tuple[Any, ...],
    history: FilterHistory,
    *,
    structure: Structure,
    index: Tensor | None = None,
) -> dict[str, Tensor]:
    """A draw of all latents given all data for each datum: {site: value [1, (inner plates,) batch, *event]}.

    From the last particles on backwards, the ancestor at each resampling step is drawn anew in proportion to
    w^i p(later latents, later data | earlier latents and data of particle i), of all K particles, where a trajectory
    of the filter itself has the one that it descends from. One run of the model on the K joined sequences gives the
    densities of one resampling step; the model need not be Markov.

    Source: Godsill, Doucet and West 2004, "Monte Carlo smoothing for nonlinear time series"; Lindsten, Jordan and Schön
    2014 (arXiv 1401.0604) for models that are not Markov.
    """
    h, s = history, with_sampled_sites(structure, history.sites)
    count, num_particles, size = h.ancestors.shape
    times = torch.arange(count, device=h.ancestors.device)[:, None, None]
    path = torch.zeros(count, 1, size, dtype=torch.long, device=times.device)
    for at, log_weight in reversed(h.rounds):
        joined = torch.where(times <= at, h.lineages(at), path)
        if bool((at < count - 1).any()):
            values = select_particles(h.sites, joined, h.steps, s)
            sites = {name: replace(site, value=values[name]) for name, site in h.sites.items()}
            t = evaluate_terms(model, guide, batch, num_particles, structure=s, index=index, guide_sites=sites)
            log_weight = log_weight + torch.where(times > at, log_joint_of(t, h.steps), 0.0).sum(0)
        share = log_weight.nan_to_num(-torch.inf).softmax(0).nan_to_num(1.0)
        path = joined.gather(1, share.T.multinomial(1).T.expand(count, 1, -1))
    return select_particles(h.sites, path, h.steps, s)
