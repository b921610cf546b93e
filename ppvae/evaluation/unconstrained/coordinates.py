"""Unconstrained coordinates: the bijection between the latents of a block of data and states [chains, batch, dims]."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.constraints import MixtureSameFamilyConstraint

from ppvae.errors import UsageError, site_error, support_name
from ppvae.evaluation.unconstrained.stereographic import InverseStereographic
from ppvae.inference.contract.support import base_distribution, is_discrete, mask_of
from ppvae.inference.particle_layout import particle_dim, with_sampled_sites
from ppvae.inference.structure import Role, Structure
from ppvae.inference.terms import sample_guide
from ppvae.inference.tracing import Program, check_has_inverse, latent_support_of, sample_sites, trace_program
from ppvae.rng import fork_rng

SUMMED_OUT = "every latent of the pair is summed out: log p(x) is exact already"


@dataclass(frozen=True)
class LatentColumns:
    """The columns of a state that belong to one latent, and the transform from real numbers to its support."""

    name: str
    transform: Any
    start: int
    stop: int
    shape: tuple[int, ...]  # inner plates and unconstrained event, in the order of the latent's dims
    batch_ndim: int  # dims of the latent's value to the left of its event
    chain_dim: int
    data_dim: int  # equal to chain_dim where a latent of the pair is shared by all data

    def flatten(self, value: Tensor) -> Tensor:
        """[..., chains, *inner, batch, *event] -> [chains, batch, columns]."""
        if self.chain_dim == self.data_dim:
            value = value.movedim(self.chain_dim, 0)
            return value.reshape(len(value), 1, -1)
        value = value.movedim((self.chain_dim, self.data_dim), (0, 1))
        return value.reshape(*value.shape[:2], -1)

    def unflatten(self, u: Tensor) -> Tensor:
        """The latent's columns of a state [chains, batch, dims] -> [..., chains, *inner, batch, *event]."""
        columns = u[..., self.start : self.stop]
        if self.chain_dim == self.data_dim:
            return columns.reshape(len(u), *self.shape).movedim(0, self.chain_dim)
        return columns.reshape(*u.shape[:2], *self.shape).movedim((0, 1), (self.chain_dim, self.data_dim))


class UnconstrainedSpace:
    """The space R^dims of a block's latents: a state u [chains, batch, dims] holds all latents that the guide samples.

    The latents stand one after another, auxiliary sites and inner plates included; where a latent is shared by all
    data, a state is [chains, 1, dims]. Of a Delta site that transforms an auxiliary site, the auxiliary site is the
    coordinate. A latent that the guide draws once for each value of an enumerated site has coordinates for each value.

    Attributes:
        s: the structure of the pair on this block, which may have sites that the inspected batch had not.
        latents: one `LatentColumns` per latent.
        nodes: the guide's trace nodes of these latents, for one particle.
        sites: the guide's sites for two particles, which give the latents' shapes.
        active: [batch, dims], False for the coordinates of masked latents and of the elements of an event that its
            density ignores (the attribute `counted` of a distribution on real numbers); None where all are True.

    Raises:
        ContractError: a latent that is discrete, whose support depends on another latent, or whose support has no
            transform, by the site's name; UsageError: every latent is summed out.
    """

    def __init__(self, guide: Program, batch: tuple[Any, ...], s: Structure, index: Tensor | None):
        check_has_inverse(s, s.no_inverse)
        with fork_rng(), torch.no_grad():
            self.sites = sample_guide(guide, batch, 2, structure=s, index=index)
            self.s = s = with_sampled_sites(s, self.sites)
            self.nodes = _continuous_nodes(guide, batch, s, index)
            self.latents: list[LatentColumns] = []
            self.dims = 0
            for name, node in self.nodes.items():
                self.latents.append(_coordinates(name, node, self.sites[name].value, s, self.dims))
                self.dims = self.latents[-1].stop
        value = self.sites[next(iter(self.nodes))].value
        self.dtype, self.device = value.dtype, value.device
        active = torch.cat([self._active(latent) for latent in self.latents], -1)
        self.active = None if bool(active.all()) else active

    def _active(self, latent: LatentColumns) -> Tensor:
        """Which columns of a latent are not masked, [batch, columns]."""
        node, shape = self.nodes[latent.name], self.sites[latent.name].value.shape[: latent.batch_ndim]
        mask = mask_of(node)
        if mask is None or mask is True:
            mask = torch.ones((), dtype=torch.bool, device=self.device)
        mask = torch.as_tensor(mask, device=self.device)
        over_batch = torch.ones(node["fn"].batch_shape, dtype=torch.bool, device=self.device)
        plates = max(mask.dim() - len(node["fn"].event_shape), 0)
        if mask.shape[plates:].numel() > 1:
            raise site_error(
                latent.name, "a mask over whole events", f"one of shape {list(mask.shape)} inside an event",
                "put the masked parts into sites or an inner plate of their own",
            )  # fmt: skip
        mask = mask.reshape(mask.shape[:plates])
        per_event = (mask & over_batch).expand(shape) if mask.dim() else mask.expand(shape)
        event_ndim = len(latent.shape) - (latent.batch_ndim - len({latent.chain_dim, latent.data_dim}))
        per_column = per_event.reshape(*shape, *(1,) * event_ndim)
        per_column = per_column.expand(*shape, *latent.shape[len(latent.shape) - event_ndim :])
        counted = getattr(base_distribution(node["fn"]), "counted", None)
        return latent.flatten(per_column if counted is None else per_column & counted)[0]

    def inactive_log_density(self, u: Tensor) -> Tensor | float:
        """The standard normal log-density of the coordinates that are not active, [chains, batch].

        Added to log p(x, z) and to log q(z | x), it makes both densities of the whole state with the same log p(x).
        """
        if self.active is None:
            return 0.0
        log_normal = -0.5 * (u.double().square() + math.log(2 * math.pi))
        return torch.where(self.active, torch.zeros_like(log_normal), log_normal).sum(-1)

    def fill_inactive(self, u: Tensor) -> Tensor:
        """A state whose coordinates that are not active are drawn from their standard normal."""
        return u if self.active is None else torch.where(self.active, u, torch.randn_like(u))

    def constrain(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """(latents by name as the pair has them, log |dz/du| [chains, batch] in float64)."""
        values, total = {}, torch.zeros(u.shape[:2], dtype=torch.float64, device=u.device)
        for latent in self.latents:
            unconstrained = latent.unflatten(u)
            value = values[latent.name] = latent.transform(unconstrained)
            log_det = latent.transform.log_abs_det_jacobian(unconstrained, value).double()
            if log_det.dim() < latent.batch_ndim:  # a constant
                log_det = log_det.expand(value.shape[: latent.batch_ndim])
            if log_det.dim() > latent.batch_ndim:
                log_det = log_det.sum(tuple(range(latent.batch_ndim, log_det.dim())))
            flat = latent.flatten(log_det)
            if self.active is not None:
                stride = (latent.stop - latent.start) // flat.shape[-1]  # columns per log-determinant
                active = self.active[:, latent.start : latent.stop : stride]
                flat = torch.where(active, flat, torch.zeros_like(flat))
            total = total + flat.sum(-1)
        return values, total

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """The state of given latents, each [..., chains, *inner, batch, *event]."""
        columns = [latent.flatten(latent.transform.inv(values[latent.name])) for latent in self.latents]
        return torch.cat([column.to(self.dtype) for column in columns], -1)

    def expand(self, values: Mapping[str, Tensor], num_chains: int) -> Tensor:
        """The same latents, [*inner, batch, *event] as `simulate` gives them, as the state of every chain."""
        out = {}
        for latent in self.latents:
            shape = self.sites[latent.name].value.shape[1:]
            out[latent.name] = values[latent.name].expand(shape).expand(num_chains, *shape)
        return self.unconstrain(out)


def _continuous_nodes(
    guide: Program, batch: tuple[Any, ...], s: Structure, index: Tensor | None
) -> dict[str, dict[str, Any]]:
    """The guide's trace nodes for one particle, without enumerated sites and transforms of auxiliary sites."""
    given = {} if index is None else {s.plate: index}
    first, second = (dict(sample_sites(trace_program(guide, batch, s, given))) for _ in range(2))
    nodes = {}
    for name, node in first.items():
        if s.guide_roles[name] in (Role.ENUMERATED, Role.FACTOR):
            continue
        fn = base_distribution(node["fn"])
        is_delta = isinstance(fn, dist.Delta)
        if is_delta and not s.lower_bound_only:  # a transform of an auxiliary site, which is the coordinate
            continue
        if is_delta or is_discrete(fn) or getattr(fn, "has_enumerate_support", False):
            raise site_error(
                name, "a continuous latent, or one that is summed out", f"a discrete one ({type(fn).__name__})",
                "gradients are followed: mark the site infer={'enumerate': 'parallel'} in the model and leave "
                "it out of the guide, or use log_marginal with proposal='guide'",
            )  # fmt: skip
        a, b = (_support_bounds(latent_support_of(n["fn"])) for n in (node, second[name]))
        if len(a) != len(b) or not all(torch.equal(i, j) for i, j in zip(a, b, strict=True)):
            raise site_error(
                name, "a support that is the same for every draw", "one that moves with another latent",
                "shift or scale a latent on a fixed support instead",
            )  # fmt: skip
        nodes[name] = node
    if not nodes:
        raise UsageError(f"{SUMMED_OUT}, log_marginal(..., num_particles=1)")
    return nodes


def _coordinates(name: str, node: dict[str, Any], value: Tensor, s: Structure, start: int) -> LatentColumns:
    support = latent_support_of(node["fn"])
    if isinstance(support, MixtureSameFamilyConstraint):  # the support of every component
        support = support.base_constraint
    if support is None:
        raise site_error(
            name, "a guide's distribution that declares its support, in whose coordinates annealing moves",
            f"{type(base_distribution(node['fn'])).__name__}, which declares none",
            "give it a support, as torch.distributions.constraints.real, or use log_marginal",
        )  # fmt: skip
    try:
        is_sphere = isinstance(support, type(dist.constraints.sphere))
        transform = InverseStereographic() if is_sphere else torch.distributions.biject_to(support)
    except NotImplementedError:
        raise site_error(
            name, "a support with a transform to real numbers (torch.distributions.biject_to)",
            f"{type(base_distribution(node['fn'])).__name__} on {support_name(support)}",
            "use log_marginal for this pair",
        ) from None  # fmt: skip
    batch_ndim = value.dim() - s.event_dims[name]
    chain_dim = particle_dim(value, s, name)
    data_dim = chain_dim if s.has_global_latents else batch_ndim - 1
    inner = tuple(n for i, n in enumerate(value.shape[:batch_ndim]) if i not in (chain_dim, data_dim))
    shape = inner + tuple(transform.inverse_shape(value.shape)[batch_ndim:])
    stop = start + torch.Size(shape).numel()
    return LatentColumns(name, transform, start, stop, shape, batch_ndim, chain_dim, data_dim)


def _support_bounds(support: Any) -> list[Tensor]:
    """The numbers that define a support, such as the ends of an interval."""
    support = getattr(support, "base_constraint", support)
    return [
        torch.as_tensor(v) for v in getattr(support, "__dict__", {}).values() if isinstance(v, Tensor | float | int)
    ]
