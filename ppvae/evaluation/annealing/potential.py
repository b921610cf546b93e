"""The densities of a pair on a block of data as functions of real coordinates: what HMC and quadrature walk on."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from ppvae.errors import ContractError, UsageError, site_error
from ppvae.evaluation.annealing.chain_state import ChainState, concatenate_states
from ppvae.evaluation.annealing.compiled_potential import CompiledPotential
from ppvae.inference.contract.support import base_distribution, is_discrete, mask_of, support_name
from ppvae.inference.particle_layout import particle_dim, sum_inner_plates
from ppvae.inference.sites import Site
from ppvae.inference.structure import Role, Structure
from ppvae.inference.terms import evaluate_terms, sample_guide
from ppvae.inference.tracing import Program, frozen_params, node_log_prob, sample_sites, trace_program
from ppvae.rng import fork_rng

SCALE_DRAWS = 100  # draws from the start density that measure its spread


def prior_of(model: Program, guide_roles: Mapping[str, Role]) -> Program:
    """The model's prior over the guide's latents, as a guide."""
    latents = {name for name, role in guide_roles.items() if role is Role.LATENT}

    def hidden(message: Any) -> bool:
        plate = isinstance(message["fn"], _Subsample)
        return message["type"] == "sample" and not plate and message["name"] not in latents

    def prior(*batch: Any) -> None:
        with poutine.block(hide_fn=hidden):
            model(*batch)

    return prior


@dataclass(frozen=True)
class Coordinate:
    """Where one latent stands in a state [chains, batch, dims], and how it comes from real numbers."""

    name: str
    transform: Any
    first: int
    last: int
    shape: tuple[int, ...]  # of the coordinates without chains and batch, in the order in which the pair has them
    lead: int  # dims of the latent's value that are no event
    dims: tuple[int, int]  # of chains and batch in the latent's value; equal where the latent is shared by all data


class Potential:
    """log q(z | x) and log p(x, z) of a block of data as densities of u in R^dims, z = T(u), both with log |dz/du|.

    A state is [chains, batch, dims]: every latent that the guide samples, inner plates and helpers included, one after
    another; [chains, 1, dims] where a latent is shared by all data. A helper that a Delta turns into a latent is
    itself the coordinate. A latent that the guide draws once for each value of an enumerated site has coordinates for
    each of them. Sites enumerated in the model are summed out of log p(x, z).

    Args:
        model, guide: the pair, or the model and its `prior_of`, whose structure is then `s`.
        batch, index: the data, as `terms` takes them.
        rows: the most (chain, datum) rows that go through the pair at once.
        prior: the guide is the model's prior, which is then not run again.
        cached: the guide is `amortised`: its one distribution is the same at every step.
        whole: the guide that is run for every state where a graph is captured, in which nothing may be cached.
        points: what gives densities and gradients; by default `point` itself.

    Raises:
        ContractError: a latent that is discrete, or whose support has no transform, by the site's name.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        batch: tuple[Any, ...],
        s: Structure,
        index: Tensor | None,
        rows: int,
        prior: bool,
        cached: bool = False,
        whole: Program | None = None,
        points: CompiledPotential | None = None,
    ):
        self.model, self.guide, self.batch, self.s, self.index = model, guide, batch, s, index
        self.rows, self.prior, self.cached = rows, prior, cached
        self._whole, self._points = whole, points
        with fork_rng(), torch.no_grad():
            self._sites = sample_guide(guide, batch, 2, structure=s, index=index)
            nodes = self._nodes = self._traced()
            self._plain = all(s.guide_roles[n] is Role.LATENT for n in nodes) and nodes.keys() == self._sites.keys()
            self.size = 1 if s.has_global_latents else s.batch_size(batch) if index is None else len(index)
            self.coordinates: tuple[Coordinate, ...] = ()
            self.dims = 0
            for name, node in nodes.items():
                self._add(name, node, self._sites[name].value)
            value = self._sites[next(iter(nodes))].value
            self.dtype, self.device = value.dtype, value.device
            self.active = self._active(nodes)

    def _traced(self) -> dict[str, Any]:
        """The guide's sites that a state is made of, traced once for one particle."""
        s = self.s
        given = {} if self.index is None else {s.plate: self.index}
        first, second = (dict(sample_sites(trace_program(self.guide, self.batch, s, given))) for _ in range(2))
        nodes = {}
        for name, node in first.items():
            if s.guide_roles[name] is Role.ENUMERATED:
                continue
            fn = base_distribution(node["fn"])
            point = isinstance(fn, dist.Delta)
            if point and not s.lower_bound_only:  # it follows from its helper, which is the coordinate
                continue
            if point or is_discrete(fn) or getattr(fn, "has_enumerate_support", False):
                raise site_error(
                    name, "a continuous latent, or one that is summed out", f"a discrete one ({type(fn).__name__})",
                    "annealing follows gradients: mark the site infer={'enumerate': 'parallel'} in the model and leave "
                    "it out of the guide, or use log_marginal",
                )  # fmt: skip
            a, b = (_numbers(n["fn"].support) for n in (node, second[name]))
            if len(a) != len(b) or not all(torch.equal(i, j) for i, j in zip(a, b, strict=True)):
                raise site_error(
                    name, "a support that stays where it is", "one that moves with another latent",
                    "shift or scale a latent on a fixed support instead",
                )  # fmt: skip
            nodes[name] = node
        if not nodes:
            raise UsageError(
                "every latent of the pair is summed out: log p(x) is exact already, log_marginal(..., num_particles=1)"
            )
        return nodes

    def _add(self, name: str, node: dict[str, Any], value: Tensor) -> None:
        event = self.s.event_dims[name]
        support = node["fn"].support
        try:
            transform = torch.distributions.biject_to(support)
        except NotImplementedError:
            raise site_error(
                name, "a support with a transform to real numbers (torch.distributions.biject_to)",
                f"{type(base_distribution(node['fn'])).__name__} on {support_name(support)}",
                "use log_marginal for this pair",
            ) from None  # fmt: skip
        lead = value.dim() - event
        chains = particle_dim(value, self.s, name)
        batch = chains if self.s.has_global_latents else lead - 1
        free = transform.inverse_shape(value.shape)[lead:]
        shape = tuple(n for i, n in enumerate(value.shape[:lead]) if i not in (chains, batch)) + tuple(free)
        last = self.dims + torch.Size(shape).numel()
        self.coordinates += (Coordinate(name, transform, self.dims, last, shape, lead, (chains, batch)),)
        self.dims = last

    def _active(self, nodes: Mapping[str, Any]) -> Tensor | None:
        """Which coordinates count, [batch, dims]; None where all do. A masked latent stays where it was drawn."""
        masks = []
        for c in self.coordinates:
            mask, value = mask_of(nodes[c.name]), self._sites[c.name].value
            if mask is None or mask is True:
                mask = torch.ones((), dtype=torch.bool, device=self.device)
            mask = torch.as_tensor(mask, device=self.device)
            like = torch.ones(nodes[c.name]["fn"].batch_shape, dtype=torch.bool, device=self.device)
            if mask.dim() > like.dim():
                raise site_error(
                    c.name, "a mask over whole events", f"one of shape {list(mask.shape)} inside an event",
                    "put the masked parts into sites or an inner plate of their own",
                )  # fmt: skip
            lead = (mask & like).expand(value.shape[: c.lead]) if mask.dim() else mask.expand(value.shape[: c.lead])
            events = len(c.shape) - (c.lead - len(set(c.dims)))
            wide = lead.reshape(*lead.shape, *(1,) * events)
            wide = wide.expand(*lead.shape, *c.shape[len(c.shape) - events :])
            masks.append(self._flat(wide, c)[0])
        active = torch.cat(masks, -1)
        return None if bool(active.all()) else active

    def _flat(self, value: Tensor, c: Coordinate) -> Tensor:
        """[..., chains, *inner, batch, *event] -> [chains, batch, dims]."""
        if self.s.has_global_latents:
            value = value.movedim(c.dims[0], 0)
            return value.reshape(len(value), 1, -1)
        value = value.movedim(c.dims, (0, 1))
        return value.reshape(*value.shape[:2], -1)

    def _natural(self, u: Tensor, c: Coordinate) -> Tensor:
        """[chains, batch, dims] -> the coordinates of one latent as the pair has its dims."""
        own = u[..., c.first : c.last]
        if self.s.has_global_latents:
            return own.reshape(len(u), *c.shape).movedim(0, c.dims[0])
        return own.reshape(*u.shape[:2], *c.shape).movedim((0, 1), c.dims)

    def values(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """(latents by name as the pair has them, log |dz/du| [chains, batch] in float64)."""
        values, total = {}, torch.zeros(u.shape[:2], dtype=torch.float64, device=u.device)
        for c in self.coordinates:
            free = self._natural(u, c)
            value = values[c.name] = c.transform(free)
            log_det = c.transform.log_abs_det_jacobian(free, value).double()
            if log_det.dim() < c.lead:  # a constant
                log_det = log_det.expand(value.shape[: c.lead])
            if log_det.dim() > c.lead:
                log_det = log_det.sum(tuple(range(c.lead, log_det.dim())))
            flat = self._flat(log_det, c)
            if self.active is not None:
                count = flat.shape[-1]
                every = (c.last - c.first) // count  # coordinates that share one log-determinant
                flat = torch.where(self.active[:, c.first : c.last : every], flat, torch.zeros_like(flat))
            total = total + flat.sum(-1)
        return values, total

    def state(self, values: Mapping[str, Tensor]) -> Tensor:
        """The state of given latents, each [..., chains, *inner, batch, *event]."""
        flat = [self._flat(c.transform.inv(values[c.name]), c) for c in self.coordinates]
        return torch.cat([f.to(self.dtype) for f in flat], -1)

    def start(self, num_chains: int) -> Tensor:
        """Draws from the start density under torch's generator, [chains, batch, dims]."""
        with torch.no_grad():
            sites = sample_guide(self.guide, self.batch, num_chains, structure=self.s, index=self.index)
            return self.state({c.name: sites[c.name].value for c in self.coordinates})

    def single(self, values: Mapping[str, Tensor], num_chains: int) -> Tensor:
        """The state of one value of each latent, [*inner, batch, *event] as `simulate` gives it, for every chain."""
        out = {}
        for c in self.coordinates:
            like = self._sites[c.name].value
            out[c.name] = values[c.name].expand(like.shape[1:]).expand(num_chains, *like.shape[1:])
        return self.state(out)

    def spread(self) -> Tensor:
        """The start density's scale in each coordinate, half of its central 68 %; zero where masked; [batch, dims]."""
        u = self.start(SCALE_DRAWS).double()
        low, high = torch.quantile(u, torch.tensor([0.16, 0.84], dtype=u.dtype, device=u.device), dim=0)
        scale = (high - low) / 2
        scale = torch.where(scale.isfinite() & (scale > 0), scale, torch.ones_like(scale))
        return (scale if self.active is None else scale * self.active).to(self.dtype)

    def densities(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(log start, log joint) of a state, [chains, batch] in float64, both in the coordinates u."""
        values, log_det = self.values(u)
        count, s = len(u), self.s
        if self.prior or self.cached:
            drawn = {c.name: _at(self._sites[c.name], values[c.name]) for c in self.coordinates}
            t = evaluate_terms(
                self.model, self.guide, self.batch, count, structure=s, index=self.index, guide_sites=drawn
            )
            log_prior = log_start = t.log_prior
            if not self.prior:
                ((name, node),) = self._nodes.items()
                log_start = sum_inner_plates(node_log_prob({**node, "value": values[name]}).double(), s.plate_nesting)
            return log_start + log_det, log_prior + t.log_lik + log_det
        t = evaluate_terms(self.model, self.guide, self.batch, count, structure=s, index=self.index, values=values)
        log_start = log_det
        for c in self.coordinates:
            log_prob = t.guide[c.name].log_prob.double()
            log_prob = log_prob.sum(tuple(range(log_prob.dim() - 2))) if log_prob.dim() > 2 else log_prob
            log_start = log_start + (log_prob.sum(-1, keepdim=True) if s.has_global_latents else log_prob)
        if self._plain and t.contraction is None:  # the guide's network is then no part of the joint density's graph
            return log_start, t.log_lik + t.log_prior + log_det
        return log_start, log_start + t.log_weight

    def elbo(self, u: Tensor) -> Tensor:
        """One sample of the evidence lower bound of the start density for each chain and datum, at draws from it."""
        with torch.no_grad():
            parts = []
            for part in u.split(self._step):
                at = self.values(part)[0]
                t = evaluate_terms(
                    self.model, self.guide, self.batch, len(part), values=at, structure=self.s, index=self.index
                )
                parts.append(t.elbo)
        return torch.cat(parts)[:, : self.size]

    @property
    def _step(self) -> int:
        """Chains that go through the pair at once."""
        return max(1, self.rows // (self.s.batch_size(self.batch) if self.index is None else len(self.index)))

    def __call__(self, u: Tensor) -> ChainState:
        """Densities and gradients, a few chains at a time; no parameter gets a gradient."""
        with torch.enable_grad(), frozen_params(self.s.params.values()):
            at = self.point if self._points is None else partial(self._points, self)
            return concatenate_states([at(part) for part in u.split(self._step)])

    @property
    def capturable(self) -> bool:
        """Whether a graph of `point` would serve other blocks of data of the same shape, too."""
        return self.active is None and self.index is None and not self.s.has_global_latents

    def run_whole(self) -> Potential:
        """The same densities, with nothing in them that was computed before."""
        other = copy(self)
        other.guide, other.prior, other.cached = self._whole or self.guide, False, False
        return other

    def point(self, u: Tensor) -> ChainState:
        """Densities and gradients of a state [chains, batch, dims], by a run of the pair."""
        u = u.detach().requires_grad_()
        log_start, log_joint = self.densities(u)
        (grad_start,) = torch.autograd.grad(log_start.sum(), u, retain_graph=True, materialize_grads=True)
        (grad_joint,) = torch.autograd.grad(log_joint.sum(), u, materialize_grads=True)
        return ChainState(u.detach(), log_start.detach(), log_joint.detach(), grad_start, grad_joint)

    def check_steady(self) -> None:
        """Raises ContractError for densities that differ from run to run at the same latents."""
        with torch.no_grad():
            u = self.start(1)
            one, two = (torch.cat(self.densities(u)) for _ in range(2))
        same = (one - two).abs() <= 1e-3 * (1 + one.abs())
        if not bool((same | (one == two) | one.isnan()).all()):
            drawn = [n for n, role in self.s.model_roles.items() if role is Role.CANCELLED]
            raise ContractError(
                "expected the same density at the same latents; found another at every run"
                + (f": what follows depends on {drawn}, which the model draws anew each time" if drawn else "")
                + ". Annealing needs every random choice to be a latent of the guide; use log_marginal"
            )


def _at(site: Site, value: Tensor) -> Site:
    return replace(site, value=value, traced_value=value)


def _numbers(support: Any) -> list[Tensor]:
    """The numbers that a support is made of."""
    support = getattr(support, "base_constraint", support)
    return [
        torch.as_tensor(v) for v in getattr(support, "__dict__", {}).values() if isinstance(v, Tensor | float | int)
    ]
