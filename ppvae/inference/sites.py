"""Sites of a pair: values, log-densities, KL divergences of two, and the places of observed values in the batch."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import Distribution, Independent, kl_divergence

from ppvae.inference.structure import Role, Structure
from ppvae.inference.tracing import Program, SubstituteValues, sample_sites


@dataclass(frozen=True)
class Site:
    """One named site of the model or the guide, evaluated for every particle and datum.

    `log_prob` is [particles, batch] (`[particles, 1]` for a site outside the data plate), summed over the site's own
    event and inner plates. `value` is [particles, (inner plates,) batch, *event]; dims of enumerated sites stand left
    of the particles.
    """

    name: str
    role: Role
    value: Tensor
    distribution: Any
    log_prob: Tensor
    traced_value: Tensor = field(repr=False)  # the value in the shape of the run, as `distribution.log_prob` takes it
    event_log_prob: Tensor | None = field(default=None, repr=False)  # [*event, particles, batch], where requested
    particle_sites: tuple[Site, ...] = field(default=(), repr=False)  # one per particle, where each has its own run
    mask: Any = field(default=None, repr=False)  # as `mask_of` gives it

    def per_event(self) -> Tensor:
        """Log-densities before the sum over the event, [..., *event], of a distribution that factorises over it."""
        base, reinterpreted = event_factors(self.distribution)
        if not reinterpreted:
            raise ValueError(f"site {self.name!r}: {type(base).__name__} does not factorise over its event")
        return base.log_prob(self.traced_value)


def event_factors(distribution: Any) -> tuple[Any, int]:
    """(distribution of one factor of the event, number of dims over which the event is a product of such factors)."""
    reinterpreted = 0
    while isinstance(distribution, Independent):
        reinterpreted += distribution.reinterpreted_batch_ndims
        distribution = distribution.base_dist
    return distribution, reinterpreted


def graph_leaves(*outputs: Tensor) -> Iterator[Tensor]:
    """The leaves of the autograd graph of tensors: what they depend on that takes a gradient."""
    stack = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if hasattr(node, "variable"):
            yield node.variable
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)


def copy_distribution(fn: Any) -> Any:
    """A copy whose expansion leaves the original as it is: Pyro's `ExpandedDistribution.expand` changes its object."""
    new = copy.copy(fn)
    if hasattr(fn, "base_dist"):
        new.base_dist = copy_distribution(fn.base_dist)
    return new


def closed_form_kl(q: Distribution, p: Distribution) -> tuple[Tensor, int] | None:
    """(KL(q || p) [*batch, *factors], number of factor dims); None where torch and Pyro have no closed form."""
    shape = torch.broadcast_shapes(q.batch_shape, p.batch_shape)  # Pyro leaves out plates where a value is given
    q, p = copy_distribution(q), copy_distribution(p)
    (q_base, q_dims), (p_base, p_dims) = event_factors(q.expand(shape)), event_factors(p.expand(shape))
    if isinstance(q_base, Delta):
        return None
    try:
        if q_dims == p_dims:
            return kl_divergence(q_base, p_base), q_dims
        return kl_divergence(q.expand(shape), p.expand(shape)), 0
    except NotImplementedError:
        return None


def closed_form_kls(
    model_trace: Any, guide_trace: Any, roles: Mapping[str, Role], per_factor: Callable[[Tensor, int, Any], Tensor]
) -> dict[str, Tensor]:
    """KL(q || p) of the latents that have it in closed form, [*factors, particles, batch].

    The closed form equals E_q[log q - log p] of a site only where the guide samples the site after all latents that the
    model conditions it on: in a bottom-up guide, z2 of p(z1 | z2) is sampled given z1.

    Args:
        roles: of the guide's sites.
        per_factor: (divergence, number of factor dims, mask) -> [*factors, particles, batch].
    """
    guide_nodes = dict(sample_sites(guide_trace))
    order = {name: i for i, name in enumerate(guide_nodes)}
    latest = -1  # the latest place in the guide of a latent that the model has sampled already
    out = {}
    for name, p in sample_sites(model_trace):
        if name in order and roles[name] is Role.LATENT:
            q = guide_nodes[name]
            if latest < order[name] and (kl := closed_form_kl(q["fn"], p["fn"])) is not None:
                out[name] = per_factor(*kl, q["mask"])
            latest = max(latest, order[name])
    return out


def concatenate_particles(runs: Sequence[Mapping[str, Site]], dims: Mapping[str, int]) -> dict[str, Site]:
    """Joins the sites of single-particle runs; `dims` holds the dim of each site's value at which particles stack."""
    out = {}
    for name, site in runs[0].items():
        sites = tuple(run[name] for run in runs)
        event_log_probs = [s.event_log_prob for s in sites if s.event_log_prob is not None]
        out[name] = replace(
            site,
            value=site.value if site.role is Role.OBSERVED else torch.stack([s.value for s in sites], dims[name]),
            log_prob=torch.cat([s.log_prob for s in sites], dim=-2),
            event_log_prob=torch.cat(event_log_probs, -2) if event_log_probs else None,
            particle_sites=sites,
        )
    return out


@dataclass(frozen=True)
class Place:
    """Where numbers of an observed site are in the batch: in a column of the site's shape, or numbers of a column.

    Attributes:
        column: the number of the column.
        of_column, of_site: positions [n] in a row of the column, and in a datum [*inner, *event] of the site, that hold
            the same numbers; None where the column is the site's value as a whole.
    """

    column: int
    of_column: Tensor | None = None
    of_site: Tensor | None = None

    def write(self, value: Tensor, column: Tensor, s: Structure, name: str) -> Tensor:
        """A copy of the column [N, ...] with the site's value at its place."""
        if self.of_column is None or self.of_site is None:
            return value.to(column)
        out = column.flatten(1) if column.dim() > 1 else column[:, None]
        out = out.index_copy(1, self.of_column, rows_first(value, s, name)[:, self.of_site].to(out))
        return out.reshape(column.shape)


def find_places(
    model: Program, s: Structure, batch: Sequence[Tensor], index: Tensor | None = None
) -> dict[str, tuple[list[Place], Tensor]]:
    """{observed site: (places in the batch, value)}; no places where its numbers are not those of the batch.

    A site's value is every column that equals it, or consists of numbers of columns: of those that the model stacks
    or joins, or of a part of one. Where the batch is NaN, it equals any number. `index` are the rows of the batch that
    the plate is given, where it would draw them.
    """
    rows = [c if index is None else c[index] for c in batch]
    flat = [c.reshape(len(c), -1) for c in rows]
    found, taken = {}, set[tuple[int, int]]()
    for name, value in site_values(model, batch, {} if index is None else {s.plate: index}).items():
        if s.model_roles.get(name) is not Role.OBSERVED:
            continue
        alike = [i for i, c in enumerate(rows) if c.shape == value.shape]
        places = [Place(i) for i in alike if bool(((rows[i].to(value) == value) | rows[i].isnan()).all())]
        found[name] = places or _numbers_of_columns(rows_first(value, s, name), flat, taken), value
    return found


def cover_gaps(places: Sequence[Place], gaps: Tensor) -> bool:
    """Whether places hold all numbers of a column that have gaps, [numbers] bool."""
    covered = torch.zeros_like(gaps)
    for place in places:
        covered[slice(None) if place.of_column is None else place.of_column] = True
    return not bool((gaps & ~covered).any())


def site_values(model: Program, batch: Sequence[Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of the model's sample sites in one run."""
    with poutine.trace() as tracer, SubstituteValues(given):
        model(*batch)
    return {name: node["value"] for name, node in sample_sites(tracer.get_trace())}


def rows_first(value: Tensor, s: Structure, name: str) -> Tensor:
    """A site's value [*inner, N, *event] as numbers of each datum, [N, D]."""
    return value.movedim(value.dim() - s.event_dims[name] - 1, 0).reshape(value.shape[-1 - s.event_dims[name]], -1)


def _numbers_of_columns(value: Tensor, columns: Sequence[Tensor], taken: set[tuple[int, int]]) -> list[Place]:
    """The places of a site's numbers [N, D] in columns [N, d]; an empty list where one has none.

    Of several equal numbers of the batch, the one after the last found is taken, or the first that no site has yet.
    """
    order = [(i, k) for i, c in enumerate(columns) for k in range(c.shape[1])]
    after = dict(itertools.pairwise(order))
    found: list[tuple[int, int]] = []
    for j in range(value.shape[1]):
        options = _equal_numbers(value[:, j : j + 1], columns)
        following = after.get(found[-1]) if found else None
        if following in options:
            found.append(following)
            continue
        free = [place for place in options if place not in taken and place not in found] or options
        if not free:
            return []
        found.append(free[0])
    taken |= set(found)
    return [
        Place(
            i,
            torch.tensor([k for c, k in found if c == i], device=value.device),
            torch.tensor([j for j, (c, _) in enumerate(found) if c == i], device=value.device),
        )
        for i in sorted({c for c, _ in found})
    ]


def _equal_numbers(value: Tensor, columns: Sequence[Tensor]) -> list[tuple[int, int]]:
    """(column, position) of the numbers that equal a value [N, 1] where they are known, fully missing ones last."""
    known: list[tuple[int, int]] = []
    missing: list[tuple[int, int]] = []
    for i, column in enumerate(columns):
        if len(column) != len(value):
            continue
        gaps = column.isnan()
        for k in ((column.to(value) == value) | gaps).all(0).nonzero().flatten().tolist():
            (missing if bool(gaps[:, k].all()) else known).append((i, k))
    return known + missing
