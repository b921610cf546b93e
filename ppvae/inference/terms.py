"""The one place where log-densities are added up: per-site terms of a model/guide pair, [particles, batch]."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from ppvae.inference.enumeration import sum_out_enumerated
from ppvae.inference.particle_layout import ParticleLayout, enumerated_dims, particle_dim
from ppvae.inference.sites import Site, closed_form_kl, concatenate_sites
from ppvae.inference.structure import Structure
from ppvae.inference.tracing import Program, Substitute, as_batch, sample_sites, trace_pair, trace_program

Entry = Callable[
    [str, Tensor, ParticleLayout], Tensor
]  # what a latent's value passes through as it enters the densities


@dataclass(frozen=True)
class Terms:
    """Log-densities of a pair on one batch, per site and summed; everything in nats.

    `log_lik`, `log_prior`, `log_guide` and `log_weight` are [particles, batch] in float64 and
    log_weight = log_lik + log_prior - log_guide, with enumerated sites summed out exactly. Where a latent is shared by
    all data, the weight is joint: [particles, 1]. `kl` holds KL(q || p) of the latents that have it in closed form,
    where it was asked for: [*parts, particles, batch].
    """

    model: dict[str, Site]
    guide: dict[str, Site]
    num_particles: int
    batch_size: int
    scale: float
    has_global_latents: bool
    contracted: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    kl: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def _sum(self, sites: Iterable[Site], role: str) -> Tensor:
        total: Tensor | None = None
        for site in sites:
            if site.role == role:
                term = site.log_prob.double()
                if self.has_global_latents:
                    term = term.sum(-1, keepdim=True)
                total = term if total is None else total + term
        if total is None:
            some = next(iter((self.model or self.guide).values())).log_prob
            return torch.zeros(
                self.num_particles, 1 if self.has_global_latents else self.batch_size, device=some.device
            ).double()
        return total.expand(*total.shape[:-1], 1 if self.has_global_latents else self.batch_size)

    @property
    def log_lik(self) -> Tensor:
        """log p(x | z), [particles, batch]."""
        return self._sum(self.model.values(), "observed")

    @property
    def log_prior(self) -> Tensor:
        """log p(z), [particles, batch]."""
        return self._sum(self.model.values(), "latent") + self._sum(self.model.values(), "enumerated")

    @property
    def log_guide(self) -> Tensor:
        """log q(z | x), [particles, batch]."""
        return (
            self._sum(self.guide.values(), "latent")
            + self._sum(self.guide.values(), "auxiliary")
            + self._sum(self.guide.values(), "enumerated")
        )

    @property
    def log_weight(self) -> Tensor:
        """log p(x, z) - log q(z | x), [particles, batch], enumerated sites summed out."""
        return self.contracted[0] if self.contracted else self.log_lik + self.log_prior - self.log_guide

    @property
    def elbo(self) -> Tensor:
        """One sample of the evidence lower bound per particle and datum; E_q over sites enumerated in the guide."""
        return self.contracted[1] if self.contracted else self.log_weight

    def rates(self) -> dict[str, Tensor]:
        """log q(z | x) - log p(z) of each latent by itself, [*parts, particles, batch]; its KL where that is known.

        Parts are there where they were asked for, and both densities are products over the latent's event.
        """
        out = {}
        for name, q in self.guide.items():
            if q.role == "latent":
                p = self.model[name]
                if name in self.kl:
                    out[name] = self.kl[name].double()
                elif q.events is not None and p.events is not None:
                    out[name] = q.events.double() - p.events.double()
                else:
                    out[name] = q.log_prob.double() - p.log_prob.double()
        return out


def terms(
    model: Program,
    guide: Program,
    batch: Tensor | Sequence[Any],
    num_particles: int = 1,
    *,
    values: Mapping[str, Tensor] | None = None,
    frozen: Sequence[str] = (),
    structure: Structure | None = None,
    index: Tensor | None = None,
    drawn: Mapping[str, Site] | None = None,
    entry: Entry | None = None,
    events: bool = False,
    kl: bool = False,
) -> Terms:
    """Traces guide and model on one batch under a particle plate and gives their log-densities per site.

    Args:
        batch: the tensors that the pair is called with, `model(*batch)`; a tensor is a batch of one.
        num_particles: K, the number of draws per datum.
        values: latents [particles, (inner plates,) batch, *event] to evaluate at, instead of the guide's draws.
        frozen: "guide" or "model": that side is run again with its parameters held constant, so that sampled values
            keep their gradient paths (sticking the landing: Roeder et al. 2017, arXiv 1703.09194). "latents": what the
            guide draws is held constant.
        structure: what `inspect` found of this pair, to save finding it again.
        index: for a plate that draws its own subsample of the data: the rows to take, [batch].
        drawn: the guide's side as `sample_guide` gave it; the guide is not run again. Not for pairs with
            enumerated sites.
        entry: what every sampled value passes through before any density sees it; the guide is run twice.
        events: log-densities of latents per part of their event, too, where they are products over it.
        kl: KL divergences in closed form, too, where the two sites have one.

    Raises:
        ContractError: the pair breaks the contract; the message names the site.

    >>> import torch
    >>> from ppvae.models import LinearGaussian
    >>> pair = LinearGaussian(3, 2)
    >>> t = terms(pair.model, pair.guide, torch.zeros(4, 3), num_particles=5)
    >>> t.log_weight.shape, sorted(t.model)
    (torch.Size([5, 4]), ['x', 'z'])
    """
    from ppvae.inference.inspection import inspect

    batch = as_batch(batch)
    if num_particles < 1:
        raise ValueError(f"num_particles: expected at least 1, found {num_particles}")
    s = structure or inspect(model, guide, batch)
    given = dict(values or {}) if drawn is None else {name: site.value for name, site in drawn.items()}
    if index is not None:
        given[s.plate] = index

    def run(rows: Sequence[Any], at: Mapping[str, Tensor], particles: int | None, piece: ParticleLayout) -> Terms:
        if drawn is not None:
            return _assemble(trace_program(model, rows, s, at, num_particles=particles), None, piece, events, kl)
        enters = None if entry is None else lambda name, value: entry(name, value, piece)
        return _assemble(*trace_pair(model, guide, rows, s, at, frozen, particles, enters), piece, events, kl)

    laid = ParticleLayout(s, num_particles, s.size_of(batch) if index is None else len(index))
    parts = [run(*way) for way in laid.runs(batch, given)]
    t = parts[0] if len(parts) == 1 and s.layout != "one by one" else _stacked(parts, s)
    return t if drawn is None else replace(t, guide=dict(drawn))


def _assemble(model_trace: Any, guide_trace: Any, laid: ParticleLayout, events: bool, kl: bool) -> Terms:
    s = laid.s
    model_sites = {n: laid.site(n, node, s.model_roles[n], events) for n, node in sample_sites(model_trace)}
    guide_sites = {}
    if guide_trace is not None:
        guide_sites = {n: laid.site(n, node, s.guide_roles[n], events) for n, node in sample_sites(guide_trace)}
    closed = _divergences(model_trace, guide_trace, laid) if kl and guide_trace is not None else {}
    contracted = None
    if s.enumerated:
        contracted = sum_out_enumerated(model_trace, guide_trace, s, laid.num_particles, laid.size, laid.unfold)
    return Terms(
        model_sites, guide_sites, laid.num_particles, laid.size, s.scale, s.has_global_latents, contracted, closed
    )


def _divergences(model_trace: Any, guide_trace: Any, laid: ParticleLayout) -> dict[str, Tensor]:
    """KL(q || p) of the latents that have it in closed form, [*parts, particles, batch].

    It stands for E_q[log q - log p] of a site only where whatever the site depends on in the model is drawn before it
    in the guide: in a bottom-up guide, what p(z1 | z2) is given has been drawn given z1.
    """
    drawn: dict[str, set[str]] = {}
    for name, _ in sample_sites(guide_trace):
        drawn[name] = set(drawn)
    before: set[str] = set()
    out = {}
    guide_nodes = dict(sample_sites(guide_trace))
    for name, p in sample_sites(model_trace):
        if name in drawn and laid.s.guide_roles[name] == "latent":
            q = guide_nodes[name]
            found = closed_form_kl(q["fn"], p["fn"]) if before <= drawn[name] else None
            if found is not None:
                out[name] = laid.per_datum(*found, q["mask"])
            before.add(name)
    return out


def _stacked(parts: list[Terms], s: Structure) -> Terms:
    """Terms of single particles as the terms of all of them."""
    both = [p.contracted for p in parts if p.contracted]
    contracted = (torch.cat([c[0] for c in both]), torch.cat([c[1] for c in both])) if both else None
    model, guide = _joined([p.model for p in parts], s), _joined([p.guide for p in parts], s)
    kl = {n: torch.cat([p.kl[n] for p in parts], -2) for n in parts[0].kl}
    return replace(parts[0], model=model, guide=guide, num_particles=len(parts), contracted=contracted, kl=kl)


def _joined(parts: Sequence[Mapping[str, Site]], s: Structure) -> dict[str, Site]:
    return concatenate_sites(parts, {n: enumerated_dims(site.value, s, n) for n, site in parts[0].items()})


def sample_guide(
    guide: Program,
    batch: tuple[Any, ...],
    num_particles: int,
    *,
    structure: Structure,
    index: Tensor | None = None,
    values: Mapping[str, Tensor] | None = None,
    events: bool = False,
) -> dict[str, Site]:
    """The guide's side alone, as `terms(..., drawn=...)` takes it; enumerated sites are left out.

    `values` evaluates it at given latents, `events` gives log-densities per part of an event: as in `terms`.
    """
    s = structure
    given = {**(values or {}), **({} if index is None else {s.plate: index})}
    laid = ParticleLayout(s, num_particles, s.size_of(batch) if index is None else len(index))
    parts = []
    for rows, at, particles, piece in laid.runs(batch, given):
        trace = trace_program(guide, rows, s, at, num_particles=particles)
        nodes = [(n, node) for n, node in sample_sites(trace) if n not in s.enumerated]
        parts.append({n: piece.site(n, node, s.guide_roles[n], events) for n, node in nodes})
    return _joined(parts, s) if s.layout == "one by one" else parts[0]


def slice_particles(drawn: Mapping[str, Site], s: Structure, start: int, count: int) -> dict[str, Site]:
    """Some of the particles of a guide's side."""
    out = {}
    for name, site in drawn.items():
        value = site.value.narrow(particle_dim(site.value, s, name), start, count)
        out[name] = replace(site, value=value, traced=value, log_prob=site.log_prob.narrow(-2, start, count))
    return out


def cache_encoder(guide: Program, batch: tuple[Any, ...], s: Structure, index: Tensor | None = None) -> Program:
    """The guide with its network already run on this batch, where one latent is all that it samples.

    A guide of several latents may feed one into the next, and is returned as it is.
    """
    if s.layout != "vectorized" or s.enumerated or s.has_global_latents or len(s.guide_roles) != 1:
        return guide
    trace = trace_program(guide, batch, s, {} if index is None else {s.plate: index})
    name, node = next(sample_sites(trace))
    if node["mask"] is not None:
        return guide
    frames = [f for f in node["cond_indep_stack"] if f.dim is not None]

    def cached(*_: Any) -> Tensor:
        with ExitStack() as stack:
            for f in frames:
                rows = trace.nodes[f.name]["value"] if f.name in trace.nodes else None
                stack.enter_context(pyro.plate(f.name, int(f.full_size or f.size), subsample=rows, dim=f.dim))
            return pyro.sample(name, node["fn"])

    return cached


def simulate(
    model: Program, batch: Tensor | Sequence[Any], values: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Draws every latent and every observed site from the model: {site: value [batch, *event]}.

    The batch gives the shape and whatever the model is conditioned on; its observed values are not used.
    `values` holds some latents fixed.

    >>> import torch
    >>> from ppvae.models import LinearGaussian
    >>> sorted(simulate(LinearGaussian(3, 2).model, torch.zeros(4, 3)).items())[0][1].shape
    torch.Size([4, 3])
    """
    with poutine.trace() as tracer, poutine.uncondition(), Substitute(values or {}):
        model(*as_batch(batch))
    return {name: node["value"] for name, node in sample_sites(tracer.get_trace())}
