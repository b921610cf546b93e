"""Deltas that map auxiliary sites of a guide to latents: a density by change of variables, with the right Jacobian.

An auxiliary site h with density q(h) and a site z ~ Delta(g(h), log_density=c) are together a density of z exactly if g
is one to one, reaches all of z's support, and c = -log |det dg/dh|. Autograd gives the Jacobian of a run. Values on
thin sets, such as a simplex or Cholesky factors, are measured by the coordinates of `biject_to`, as densities are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import Transform, identity_transform

from ppvae.errors import ContractError, site_error
from ppvae.inference.contract.support import base_distribution, base_support, mask_of
from ppvae.inference.sites import graph_leaves
from ppvae.inference.structure import Structure
from ppvae.inference.tracing import Nodes, Program, event_dim, node_log_prob, sample_sites, support_of, trace_program

FAR = 1e12  # a coordinate as good as infinite


@dataclass(frozen=True)
class Maps:
    """One run of a guide on auxiliary values that gradients are taken for.

    Attributes:
        nodes: the guide's sites.
        leaves: free coordinates of the auxiliary sites, by name.
        model: the model's sites, whose supports the latents have.
        plate: name of the data plate, whose rows are mapped each by itself; None to take all values together.
    """

    nodes: Nodes
    leaves: Mapping[str, Tensor]
    model: Nodes
    plate: str | None

    def by_row(self, name: str) -> bool:
        return any(f.name == self.plate for f in self.nodes[name]["cond_indep_stack"])

    def transform(self, name: str) -> Transform:
        return _coordinates_of(self.nodes[name] if name in self.leaves else self.model[name])

    def rows(self, name: str, tensor: Tensor, event_dims: int) -> Tensor:
        """[*plates, *event] -> [rows, dims], with one row for each datum where the site stands in the data plate."""
        if not self.by_row(name):
            return tensor.reshape(1, -1)
        return tensor.movedim(-1 - event_dims, 0).reshape(tensor.shape[-1 - event_dims], -1)

    def coordinates(self, name: str) -> Tensor:
        free = self.leaves.get(name)
        if free is None:
            free = self.transform(name).inv(self.nodes[name]["value"])
        return self.as_coordinates(name, free)

    def as_coordinates(self, name: str, free: Tensor) -> Tensor:
        """A tensor in the shape of a site's free coordinates, such as their gradient, as [rows, dims]."""
        transform = self.transform(name)
        dims = event_dim(self.nodes[name]) - transform.codomain.event_dim + transform.domain.event_dim
        return self.rows(name, free, dims)

    def log_det(self, name: str) -> Tensor:
        """log |d value / d coordinates| of a site, [rows]."""
        transform, value = self.transform(name), self.nodes[name]["value"]
        log_det = transform.log_abs_det_jacobian(transform.inv(value), value)
        return self.rows(name, log_det, event_dim(self.nodes[name]) - transform.codomain.event_dim).sum(-1)

    def log_prob(self, name: str) -> Tensor:
        return self.rows(name, node_log_prob(self.nodes[name]), 0).sum(-1)


def _coordinates_of(node: dict[str, Any]) -> Transform:
    """The map from free coordinates to a site's values: `biject_to` for thin sets, the identity elsewhere."""
    support = support_of(node["fn"])
    base = base_support(support)
    if base is None or base.event_dim == 0:
        return identity_transform
    try:
        return biject_to(support)
    except NotImplementedError:
        return identity_transform


def check_change_of_variables(
    guide: Program, batch: Sequence[Any], model: Nodes, guide_nodes: Nodes, points: Sequence[str],
    auxiliary: Sequence[str], plate: str, joint: bool,
) -> None:  # fmt: skip
    """The Deltas `points` on continuous latents are the images of the guide's auxiliary sites, with their Jacobian.

    Args:
        plate: name of the data plate.
        joint: weights are joint, so that latents of single data may be images of an auxiliary site of all data.
    """
    auxiliary = [n for n in auxiliary if not isinstance(base_distribution(guide_nodes[n]["fn"]), dist.Delta)]
    if not auxiliary:
        raise point_mass(points[0], model)

    def run(start: Callable[[Tensor], Tensor]) -> Maps:
        return _run_on_leaves(guide, batch, guide_nodes, auxiliary, start, model, plate)

    maps = run(torch.clone)
    systems = [
        ([n for n in auxiliary if maps.by_row(n) is rows], [n for n in points if maps.by_row(n) is rows])
        for rows in (False, True)
    ]
    if joint and any(_size(maps, helpers) != _size(maps, images) for helpers, images in systems):
        maps = replace(maps, plate=None)
        systems = [(auxiliary, list(points))]
    for helpers, images in systems:
        check_each_is_mapped(maps, helpers, images, points)
        if images:
            jacobian = Jacobian(maps, helpers, images)
            check_rows_are_mapped_alone(maps, helpers, images)
            check_log_density(maps, helpers, images, jacobian)
            if jacobian.elementwise:
                check_reaches_prior(images, maps, [run(partial(torch.add, other=far)) for far in (-FAR, FAR)])


def find_learned_maps(
    guide: Program, batch: Sequence[Any], model: Nodes, guide_nodes: Nodes, auxiliary: Sequence[str], plate: str
) -> tuple[str, ...]:
    """The Deltas that depend on parameters beside those of the auxiliary sites' distributions, by name."""
    if not auxiliary:
        return ()
    maps = _run_on_leaves(guide, batch, guide_nodes, auxiliary, torch.clone, model, plate)
    leaves = {id(leaf) for leaf in maps.leaves.values()}
    points = (n for n, node in maps.nodes.items() if isinstance(base_distribution(node["fn"]), dist.Delta))
    return tuple(n for n in points if any(id(v) not in leaves for v in graph_leaves(maps.nodes[n]["value"])))


def _run_on_leaves(
    guide: Program, batch: Sequence[Any], guide_nodes: Nodes, auxiliary: Sequence[str],
    start: Callable[[Tensor], Tensor], model: Nodes, plate: str,
) -> Maps:  # fmt: skip
    """A run of the guide whose auxiliary values are functions of leaves, which start at a function of their draws."""
    leaves: dict[str, Tensor] = {}

    def on_leaf(name: str, value: Tensor) -> Tensor:
        if name not in auxiliary or not value.is_floating_point():
            return value
        transform = _coordinates_of(guide_nodes[name])
        leaves[name] = start(transform.inv(value.detach())).requires_grad_()
        return transform(leaves[name])

    with pyro.validation_enabled(False):
        trace = trace_program(guide, batch, Structure(), {}, transform=on_leaf)
    return Maps(dict(sample_sites(trace)), leaves, model, plate)


def _size(maps: Maps, names: Sequence[str]) -> int:
    """The number of free coordinates of a row of sites; of discrete sites, which have none, the size of the event."""
    return sum(maps.coordinates(name).shape[1] for name in names)


def _gradients(maps: Maps, helpers: Sequence[str], total: Tensor) -> Tensor:
    """The gradient of a number by the coordinates of auxiliary sites, [rows, dims]."""
    leaves = {n: maps.leaves[n] for n in helpers if n in maps.leaves}
    if not (leaves and total.requires_grad):
        return torch.zeros(1, max(_size(maps, helpers), 1))
    grads = torch.autograd.grad(total, list(leaves.values()), retain_graph=True, allow_unused=True)
    found = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves.values(), strict=True)]
    return torch.cat([maps.as_coordinates(n, g) for n, g in zip(leaves, found, strict=True)], -1)


class Jacobian:
    """d images / d auxiliary values of the rows of one run: log |det|, [rows], and whether it is elementwise."""

    def __init__(self, maps: Maps, helpers: Sequence[str], images: Sequence[str]):
        u = torch.cat([maps.coordinates(n) for n in images], -1)
        probes = [torch.randn_like(u) for _ in range(2)]
        first, second = (_gradients(maps, helpers, (u * v).sum()) / v for v in probes)
        self.elementwise = torch.allclose(first, second, rtol=1e-3)
        if self.elementwise:
            self.log_det = first.abs().log().sum(-1)
            return
        columns = [_gradients(maps, helpers, u[:, j].sum()) for j in range(u.shape[1])]
        self.log_det = torch.linalg.slogdet(torch.stack(columns, 1)).logabsdet


def point_mass(name: str, model: Nodes) -> ContractError:
    """The refusal of a Delta that is no image of an auxiliary site."""
    return site_error(
        name,
        f"a guide absolutely continuous with its prior {type(base_distribution(model[name]['fn'])).__name__}",
        "a Delta (point mass), under which importance weights look perfect and are wrong",
        "use a guide with a density to estimate log p(x); Delta can still be trained (MAP)",
    )


def check_each_is_mapped(maps: Maps, helpers: Sequence[str], images: Sequence[str], points: Sequence[str]) -> None:
    """Each Delta depends on auxiliary values of as many dims as all Deltas have, and each auxiliary value is used.

    `points` are the Deltas at any place, `images` those beside these helpers.
    """
    for name in images:
        u = maps.coordinates(name)
        if not bool(_gradients(maps, helpers, (u * torch.randn_like(u)).sum()).any()):
            raise point_mass(name, maps.model)
    given, found = _size(maps, helpers), _size(maps, images)
    if found > given:
        raise point_mass(images[0], maps.model)
    if found < given:
        raise site_error(
            helpers[0],
            "a helper that a Delta site turns into a latent, dim for dim",
            f"{given - found} dims {'a datum' if maps.by_row(helpers[0]) else 'in all'} without a density in the model",
            "give the latent a density of its own in the guide, as AutoNormal does"
            if points
            else "remove it where no latent is drawn from it; else sample it in the model, too, by a density given it",
        )


def check_rows_are_mapped_alone(maps: Maps, helpers: Sequence[str], images: Sequence[str]) -> None:
    """A datum's latents are images of its own auxiliary values."""
    u = torch.cat([maps.coordinates(n) for n in images], -1)
    others = _gradients(maps, helpers, (u[0] * torch.randn_like(u[0])).sum())[1:]
    if bool(others.any()):
        raise site_error(
            images[0], f"an image of its own datum's {helpers[0]!r}", "one that depends on the helpers of other data",
            "map the helper of each row by itself",
        )  # fmt: skip


def check_log_density(maps: Maps, helpers: Sequence[str], images: Sequence[str], jacobian: Jacobian) -> None:
    """The log_density of Deltas is that of the change of variables."""
    with torch.no_grad():
        expected = -jacobian.log_det
        found = torch.zeros_like(expected)
        for name in helpers:
            expected = expected + maps.log_det(name)
        for name in images:
            expected, found = expected - maps.log_det(name), found + maps.log_prob(name)
        rounding = 1e-6 if found.dtype is torch.float64 else 1e-3
        wrong = ~((found - expected).abs() <= rounding * (1 + expected.abs())) & _unmasked(maps, [*helpers, *images])
        if not bool(expected[wrong].isfinite().all()):  # a singular map
            raise point_mass(images[0], maps.model)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise site_error(
                images[-1],
                f"log_density = -log |det d{images[-1]}/d{helpers[-1]}|, {expected[row]:.4g} at a draw",
                f"{found[row]:.4g}",
                "pass the Delta this log_density, or sample the latent from a TransformedDistribution",
            )


def check_reaches_prior(images: Sequence[str], maps: Maps, ends: Sequence[Maps]) -> None:
    """An elementwise map reaches wherever the prior has mass, as its auxiliary values go to both infinities."""
    for name in images:
        with torch.no_grad():
            low, high = torch.stack([run.coordinates(name) for run in ends]).aminmax(dim=0)
            draws = [maps.transform(name).inv(maps.model[name]["fn"].sample()) for _ in range(64)]
            inside = [((d >= low) & (d <= high)) for d in (maps.as_coordinates(name, d) for d in draws)]
            reached = torch.stack(inside).all() | low.isnan().any() | high.isnan().any()
        if not bool(reached):
            raise site_error(
                name, "a Delta that its helper moves over all of the prior's support",
                "one that stays within a part of it",
                "choose a map onto the support, as torch.distributions.biject_to gives one",
            )  # fmt: skip


def _unmasked(maps: Maps, names: Sequence[str]) -> Tensor:
    """The rows, [rows], in which no site is masked."""
    kept = torch.ones((), dtype=torch.bool)
    for name in names:
        mask = mask_of(maps.nodes[name])
        if mask is False:
            mask = torch.zeros((), dtype=torch.bool)
        if isinstance(mask, Tensor):
            node = maps.nodes[name]
            whole = mask.expand(node_log_prob(node).shape)
            kept = kept & maps.rows(name, whole, 0).all(-1)
    return kept
