"""Terms of a pair whose structure is known: the one place where log-densities are added up, [particles, batch]."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Self

import pyro
import torch
from pyro import poutine
from torch import Tensor

from ppvae.errors import ContractError
from ppvae.errors.ranges import check_numbers
from ppvae.inference.contract.absolute_continuity import check_same_mask
from ppvae.inference.contract.batch_dependent_sites import with_dynamic_structure
from ppvae.inference.enumeration import sum_out_enumerated
from ppvae.inference.particle_layout import (
    ParticleLayout,
    num_enumerated_dims,
    repeat_particles,
    with_sampled_sites,
)
from ppvae.inference.second_run import buffer_copies
from ppvae.inference.sites import Site, closed_form_kls, concatenate_particles, copy_distribution
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

    With global latents theta, log w = sum_n log w_n + log p(theta) - log q(theta), where w_n = p(x_n, z_n | theta) /
    q(z_n | x_n, theta): `local` are the terms of the sites inside the data plate, weights [particles, batch], `globals`
    those of the sites outside, [particles, 1]. Particles stand in groups that share a draw of theta.
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
    local_contraction: tuple[Tensor, Tensor] | None = field(default=None, repr=False)  # the same given global latents
    particles_per_draw: int = 1  # of the global latents

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
    def local(self) -> Self:
        """The terms of the sites inside the data plate; these terms themselves where no latent is global.

        Raises:
            ContractError: given the global latents, no datum has a weight of its own; the message says why.
        """
        if not self.has_global_latents:
            return self
        if self.structure.local_refusal:
            raise ContractError(self.structure.local_refusal)
        local = replace(self, has_global_latents=False, contraction=self.local_contraction, local_contraction=None)
        return local._at_sites(lambda name: name not in self.structure.global_sites)

    @property
    def globals(self) -> Self:
        """The terms of the sites outside the data plate."""
        return replace(self, contraction=None)._at_sites(self.structure.global_sites.__contains__)

    def _at_sites(self, keep: Callable[[str], bool]) -> Self:
        model, guide = ({n: site for n, site in sites.items() if keep(n)} for sites in (self.model, self.guide))
        return replace(self, model=model, guide=guide, kl={n: v for n, v in self.kl.items() if keep(n)})

    @property
    def local_log_weight(self) -> Tensor:
        """log p(x_n, z_n | theta) - log q(z_n | x_n, theta), [draws of theta, particles of each, batch]."""
        return self.local.log_weight.unflatten(0, (-1, self.particles_per_draw))

    @property
    def global_log_ratio(self) -> Tensor:
        """log p(theta) - log q(theta), [draws of theta]."""
        return self.globals.log_weight[:: self.particles_per_draw, 0]

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
    global_draws: int | None = None,
) -> Terms:
    """`ppvae.inference.terms` of a pair whose structure is known; arguments as there, under these names.

    Args:
        guide_sites: the guide's sites from `sample_guide`, in place of a run of the guide (`drawn` there).
        latent_hook: a function of (site name, sampled value, layout) that returns the value which the density of a
            local latent is evaluated at (`entry` there); the guide runs twice.
    """
    batch, s = as_batch(batch), structure
    check_numbers(num_particles=num_particles)
    if global_draws is not None and s.has_global_latents:
        drawn = sample_globals(guide, batch, global_draws, num_particles, structure=s, index=index)
        given = {**(values or {}), **{name: site.value for name, site in drawn.items()}}
        t = evaluate_terms(
            model, guide, batch, global_draws * num_particles, structure=s, values=given, frozen=frozen, index=index,
            latent_hook=latent_hook, events=events, kl=kl,
        )  # fmt: skip
        return replace(t, guide={**t.guide, **drawn}, particles_per_draw=num_particles)
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
    divergences = {}
    if kl and guide_trace is not None:
        divergences = closed_form_kls(model_trace, guide_trace, s.guide_roles, layout.per_factor)
    t = Terms(
        model_sites, guide_sites, layout.num_particles, layout.size, s.plate_scale(layout.size), s.has_global_latents,
        kl=divergences, structure=s,
    )  # fmt: skip
    if not s.enumerated:
        return t
    contraction = sum_out_enumerated(model_trace, guide_trace, layout)
    if not s.has_global_latents or any(name in s.global_sites for name in s.enumerated):
        return replace(t, contraction=contraction)
    log_weight, elbo = (local.sum(-1, keepdim=True) + t.globals.log_weight for local in contraction)
    return replace(t, contraction=(log_weight, elbo), local_contraction=contraction)


def _check_same_masks(model: Mapping[str, Site], guide: Mapping[str, Site], s: Structure) -> None:
    """A latent has one mask on both sides in every batch: one that the inspected batch leaves unmasked, too."""
    for name, q in guide.items() if not s.weights_refusal else ():
        if name in model and (model[name].mask is None) != (q.mask is None):
            check_same_mask(name, model[name].mask, q.mask)


def _concatenate_terms(runs: Sequence[Terms], s: Structure) -> Terms:
    """Joins the terms of single-particle runs."""
    return replace(
        runs[0],
        model=_concatenate_sites([t.model for t in runs], s),
        guide=_concatenate_sites([t.guide for t in runs], s),
        num_particles=len(runs),
        contraction=_concatenate_pairs([t.contraction for t in runs]),
        local_contraction=_concatenate_pairs([t.local_contraction for t in runs]),
        kl={n: torch.cat([t.kl[n] for t in runs], -2) for n in runs[0].kl},
    )


def _concatenate_pairs(pairs: Sequence[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor] | None:
    held = [pair for pair in pairs if pair is not None]
    return (torch.cat([w for w, _ in held]), torch.cat([elbo for _, elbo in held])) if held else None


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


def sample_globals(
    guide: Program, batch: tuple[Any, ...], num_draws: int, particles_per_draw: int = 1, **options: Any
) -> dict[str, Site]:
    """The guide's global sites from `num_draws` draws, each repeated for its particles; options as `sample_guide`'s."""
    s = options["structure"]
    with buffer_copies():
        sites = sample_guide(guide, batch, num_draws, **options)
    return {n: repeat_particles(site, particles_per_draw, s) for n, site in sites.items() if n in s.global_sites}


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
