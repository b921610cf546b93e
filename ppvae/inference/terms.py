"""Terms of a pair whose structure is known: the one place where log-densities are added up, [particles, batch]."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from ppvae.inference.contract.absolute_continuity import check_same_mask
from ppvae.inference.contract.dynamic_structure import with_dynamic_structure
from ppvae.inference.enumeration import sum_out_enumerated
from ppvae.inference.particle_layout import ParticleLayout, num_enumerated_dims, particle_dim
from ppvae.inference.sites import Site, closed_form_kl, concatenate_particles, copy_distribution
from ppvae.inference.structure import ParticlePlacement, Role, Structure
from ppvae.inference.tracing import (
    Program,
    SubstituteValues,
    as_batch,
    check_has_inverse,
    find_subsample,
    lone_guide_sites,
    sample_sites,
    trace_pair,
    trace_program,
)

LatentHook = Callable[[str, Tensor, ParticleLayout], Tensor]  # (site name, sampled value, layout) -> value


@dataclass(frozen=True)
class Terms:
    """Log-densities of a pair on one batch, per site and summed, in nats.

    `model` and `guide` hold each `Site` by name. `log_lik`, `log_prior`, `log_guide` and `log_weight` are
    [particles, batch] in float64, and log_weight = log_lik + log_prior - log_guide, with enumerated sites summed out
    exactly. With a global latent the weight is joint: [particles, 1]. Inner plates and events are summed, the data
    plate's `scale` is divided out, masks count.
    """

    model: dict[str, Site]
    guide: dict[str, Site]
    num_particles: int
    batch_size: int
    scale: float
    has_global_latents: bool
    contraction: tuple[Tensor, Tensor] | None = field(default=None, repr=False)  # (log_weight, elbo) if enumerated
    kl: Mapping[str, Tensor] = field(default_factory=dict, repr=False)  # closed-form KL(q || p), [*factors, K, batch]
    structure: Structure = field(default_factory=Structure, repr=False)  # of this batch, which may have further sites

    def _sum(self, sites: Mapping[str, Site], *roles: Role) -> Tensor:
        """The sum of the log-densities of all sites of some roles, [particles, batch]."""
        width = 1 if self.has_global_latents else self.batch_size
        total: Tensor | None = None
        for site in sites.values():
            if site.role in roles:
                term = site.log_prob.double()
                if self.has_global_latents:
                    term = term.sum(-1, keepdim=True)
                total = term if total is None else total + term
        if total is None:
            device = next(iter((self.model or self.guide).values())).log_prob.device
            return torch.zeros(self.num_particles, width, device=device).double()
        return total.expand(*total.shape[:-1], width)

    @property
    def log_lik(self) -> Tensor:
        """log p(x | z), [particles, batch], the model's factors counted in."""
        return self._sum(self.model, Role.OBSERVED, Role.FACTOR)

    @property
    def log_prior(self) -> Tensor:
        """log p(z), [particles, batch]."""
        return self._sum(self.model, Role.LATENT) + self._sum(self.model, Role.ENUMERATED)

    @property
    def log_guide(self) -> Tensor:
        """log q(z | x), [particles, batch]."""
        latent, auxiliary = self._sum(self.guide, Role.LATENT), self._sum(self.guide, Role.AUXILIARY)
        return latent + auxiliary + self._sum(self.guide, Role.ENUMERATED)

    @property
    def guide_factors(self) -> Tensor | None:
        """What the guide adds to the loss beside its density (`pyro.factor`), [particles, batch]; None for nothing."""
        if not any(site.role is Role.FACTOR for site in self.guide.values()):
            return None
        return self._sum(self.guide, Role.FACTOR)

    @property
    def log_weight(self) -> Tensor:
        """log p(x, z) - log q(z | x), [particles, batch], enumerated sites summed out."""
        return self.contraction[0] if self.contraction else self.log_lik + self.log_prior - self.log_guide

    @property
    def elbo(self) -> Tensor:
        """One sample of the evidence lower bound per particle and datum; E_q over sites enumerated in the guide."""
        return self.contraction[1] if self.contraction else self.log_weight

    def rates(self) -> dict[str, Tensor]:
        """The rate of each latent, [*factors, particles, batch]: its closed-form KL, else log q(z | x) - log p(z).

        Factor dims are present where `events` or `kl` were requested and both densities factorise over the event.
        """
        return {name: self._rate(q, self.model[name]) for name, q in self.guide.items() if q.role is Role.LATENT}

    def _rate(self, q: Site, p: Site) -> Tensor:
        if q.name in self.kl:
            return self.kl[q.name].double()
        if q.event_log_prob is not None and p.event_log_prob is not None:
            return q.event_log_prob.double() - p.event_log_prob.double()
        return q.log_prob.double() - p.log_prob.double()


def evaluate_terms(
    model: Program,
    guide: Program,
    batch: Tensor | Sequence[Any],
    num_particles: int = 1,
    *,
    structure: Structure,
    values: Mapping[str, Tensor] | None = None,
    frozen: Sequence[str] = (),
    index: Tensor | None = None,
    guide_sites: Mapping[str, Site] | None = None,
    latent_hook: LatentHook | None = None,
    events: bool = False,
    kl: bool = False,
) -> Terms:
    """`ppvae.inference.terms` of a pair whose structure is known; arguments as there, under these names.

    Args:
        guide_sites: the guide's sites from `sample_guide`, in place of a run of the guide (`drawn` there).
        latent_hook: a function of (site name, sampled value, layout) that returns the value which every density is
            evaluated at (`entry` there); the guide runs twice.
    """
    batch, s = as_batch(batch), structure
    if num_particles < 1:
        raise ValueError(f"num_particles: expected at least 1, found {num_particles}")
    if guide_sites is not None:
        s = with_sampled_sites(s, guide_sites)
    substituted = dict(values or {}) if guide_sites is None else {n: site.value for n, site in guide_sites.items()}
    if index is not None:
        substituted[s.plate] = index

    def run(rows: Sequence[Any], at: Mapping[str, Tensor], particles: int | None, layout: ParticleLayout) -> Terms:
        if guide_sites is not None:
            t = _terms_of(trace_program(model, rows, s, at, num_particles=particles), None, layout, events, kl)
            _check_same_masks(t.model, guide_sites, s)
            return t
        hook = None
        if latent_hook is not None:
            hook = lambda name, value, at: latent_hook(name, value, replace(layout, s=at))  # noqa: E731
        t = _terms_of(*trace_pair(model, guide, rows, s, at, frozen, particles, hook), layout, events, kl)
        _check_same_masks(t.model, t.guide, s)
        return t

    layout = ParticleLayout(s, num_particles, s.batch_size(batch) if index is None else len(index))
    runs = [run(*arguments) for arguments in layout.runs(batch, substituted)]
    t = _concatenate_terms(runs, runs[0].structure) if s.layout is ParticlePlacement.ONE_BY_ONE else runs[0]
    return t if guide_sites is None else replace(t, guide=dict(guide_sites))


def _terms_of(model_trace: Any, guide_trace: Any, layout: ParticleLayout, events: bool, kl: bool) -> Terms:
    """The terms of one run; the guide's trace is None where its sites are known."""
    p, q = dict(sample_sites(model_trace)), dict(sample_sites(guide_trace)) if guide_trace is not None else None
    s = with_dynamic_structure(layout.s, p, q)
    layout = replace(layout, s=s)
    model_sites = {n: layout.site(n, node, s.model_roles[n], events) for n, node in p.items()}
    guide_sites = {n: layout.site(n, node, s.guide_roles[n], events) for n, node in (q or {}).items()}
    divergences = _closed_form_kls(model_trace, guide_trace, layout) if kl and guide_trace is not None else {}
    contraction = None
    if s.enumerated:
        contraction = sum_out_enumerated(model_trace, guide_trace, layout)
    return Terms(
        model_sites, guide_sites, layout.num_particles, layout.size, s.scale, s.has_global_latents, contraction,
        divergences, s,
    )  # fmt: skip


def _check_same_masks(model: Mapping[str, Site], guide: Mapping[str, Site], s: Structure) -> None:
    """A latent has one mask on both sides in every batch: one that the inspected batch leaves unmasked, too."""
    for name, q in guide.items() if not s.weights_refusal else ():
        if name in model and (model[name].mask is None) != (q.mask is None):
            check_same_mask(name, model[name].mask, q.mask)


def _closed_form_kls(model_trace: Any, guide_trace: Any, layout: ParticleLayout) -> dict[str, Tensor]:
    """KL(q || p) of the latents that have it in closed form, [*factors, particles, batch].

    The closed form equals E_q[log q - log p] of a site only where the guide samples the site after all latents that the
    model conditions it on: in a bottom-up guide, z2 of p(z1 | z2) is sampled given z1.
    """
    guide_nodes = dict(sample_sites(guide_trace))
    order = {name: i for i, name in enumerate(guide_nodes)}
    latest = -1  # the latest place in the guide of a latent that the model has sampled already
    out = {}
    for name, p in sample_sites(model_trace):
        if name in order and layout.s.guide_roles[name] is Role.LATENT:
            q = guide_nodes[name]
            if latest < order[name] and (kl := closed_form_kl(q["fn"], p["fn"])) is not None:
                out[name] = layout.per_factor(*kl, q["mask"])
            latest = max(latest, order[name])
    return out


def _concatenate_terms(runs: Sequence[Terms], s: Structure) -> Terms:
    """Joins the terms of single-particle runs."""
    pairs = [t.contraction for t in runs if t.contraction]
    return replace(
        runs[0],
        model=_concatenate_sites([t.model for t in runs], s),
        guide=_concatenate_sites([t.guide for t in runs], s),
        num_particles=len(runs),
        contraction=(torch.cat([w for w, _ in pairs]), torch.cat([elbo for _, elbo in pairs])) if pairs else None,
        kl={n: torch.cat([t.kl[n] for t in runs], -2) for n in runs[0].kl},
    )


def _concatenate_sites(runs: Sequence[Mapping[str, Site]], s: Structure) -> dict[str, Site]:
    return concatenate_particles(runs, {n: num_enumerated_dims(site.value, s, n) for n, site in runs[0].items()})


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
    """The guide's sites alone, as `evaluate_terms(..., guide_sites=...)` takes them, without enumerated sites.

    `values` evaluates the guide at given latents, `events` adds log-densities per factor of an event, as in `terms`.
    """
    s = structure
    check_has_inverse(s, values or ())
    substituted = {**(values or {}), **({} if index is None else {s.plate: index})}
    runs = []
    layout = ParticleLayout(s, num_particles, s.batch_size(batch) if index is None else len(index))
    for rows, at, particles, piece in layout.runs(batch, substituted):
        trace = trace_program(guide, rows, s, at, num_particles=particles)
        s = s.with_guide_sites(lone_guide_sites(trace))
        piece = replace(piece, s=s)
        nodes = [(n, node) for n, node in sample_sites(trace) if n not in s.enumerated and not node["is_observed"]]
        runs.append({n: piece.site(n, node, s.guide_roles[n], events) for n, node in nodes})
    return _concatenate_sites(runs, s) if s.layout is ParticlePlacement.ONE_BY_ONE else runs[0]


def with_sampled_sites(s: Structure, sites: Mapping[str, Site]) -> Structure:
    """The structure of the batch that a guide's sites were sampled for, which may have further ones."""
    if sites.keys() <= s.guide_roles.keys():
        return s
    return s.with_guide_sites({n: (site.role, len(site.distribution.event_shape)) for n, site in sites.items()})


def slice_particles(sites: Mapping[str, Site], s: Structure, start: int, count: int) -> dict[str, Site]:
    """`count` particles of a guide's sites, from `start` on."""
    out, s = {}, with_sampled_sites(s, sites)
    for name, site in sites.items():
        value = site.value.narrow(particle_dim(site.value, s, name), start, count)
        out[name] = replace(site, value=value, traced_value=value, log_prob=site.log_prob.narrow(-2, start, count))
    return out


def cache_encoder(guide: Program, batch: tuple[Any, ...], s: Structure, index: Tensor | None = None) -> Program:
    """A guide that samples from the distribution which `guide` computes on this batch, without running its network.

    Only a guide with a single unmasked latent is cached; a network of a hierarchical guide depends on earlier latents,
    and such a guide is returned as it is.
    """
    if s.layout is not ParticlePlacement.VECTORIZED or s.enumerated or s.has_global_latents or len(s.guide_roles) != 1:
        return guide
    trace = trace_program(guide, batch, s, {} if index is None else {s.plate: index})
    name, node = next(sample_sites(trace))
    if node["mask"] is not None:
        return guide
    frames = [f for f in node["cond_indep_stack"] if f.dim is not None]

    def cached(*_: Any) -> Tensor:
        with ExitStack() as stack:
            for f in frames:
                drawn, size = find_subsample(trace, f.name), int(f.full_size or f.size)
                rows = None if drawn is None else drawn["value"]
                stack.enter_context(pyro.plate(f.name, size if size > 0 else None, subsample=rows, dim=f.dim))
            return pyro.sample(name, copy_distribution(node["fn"]))

    return cached


def simulate(
    model: Program, batch: Tensor | Sequence[Any], values: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Samples every latent and every observed site from the model: {site: value [batch, *event]}.

    The batch gives the shapes and the model's conditioning inputs; its observed values are not used. `values` holds
    latents to condition on.

    >>> from ppvae.models import LinearGaussian
    >>> sorted(simulate(LinearGaussian(3, 2).model, torch.zeros(4, 3)).items())[0][1].shape
    torch.Size([4, 3])
    """
    with poutine.trace() as tracer, poutine.uncondition(), SubstituteValues(values or {}):
        model(*as_batch(batch))
    return {name: node["value"] for name, node in sample_sites(tracer.get_trace())}
