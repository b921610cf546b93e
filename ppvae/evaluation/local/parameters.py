"""A guide's distributions with their learned arguments free for every datum."""

from __future__ import annotations

import inspect as signatures
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor, nn
from torch.distributions import constraints, transform_to

from ppvae.inference.structure import Structure
from ppvae.inference.tracing import Program, sample_sites, trace_program

Build = Callable[[int], Any]


class NotParameterized(Exception):
    """Why a distribution cannot be refit by its arguments, in a few words."""


class PerDatumDistribution:
    """A site's distribution with its learned arguments free for every datum, in unconstrained space.

    An argument is free if it depends on learned parameters or differs between data; a constant stays. Locations move in
    units of the scale, and a covariance by a factor, so that a step means the same for every datum and dim.
    """

    def __init__(self, fn: Any):
        self.leaves: list[Tensor] = []
        self.start: list[Tensor] = []
        self.data_dim = len(fn.batch_shape) - 1
        self._build = self._lift(fn, fn.batch_shape)

    def __call__(self, copies: int = 1) -> Any:
        """The distribution, its data dim repeated for so many particles folded into the batch."""
        return self._build(copies)

    def _lift(self, fn: Any, batch: torch.Size) -> Build:
        if isinstance(fn, torch.distributions.Independent):
            count = fn.reinterpreted_batch_ndims
            inner = self._lift(fn.base_dist, batch + fn.base_dist.batch_shape[-count:])
            return lambda copies: inner(copies).to_event(count)
        if isinstance(fn, dist.MaskedDistribution):
            inner, mask = self._lift(fn.base_dist, batch), torch.as_tensor(fn._mask).expand(batch)
            return lambda copies: inner(copies).mask(self._tiled(mask, copies))
        if isinstance(fn, ExpandedDistribution):
            return self._lift(fn.base_dist, batch)
        if isinstance(fn, torch.distributions.MultivariateNormal):
            return self._normal(fn, batch)
        free, held = _arguments(fn, batch)
        if not free and isinstance(fn, torch.distributions.TransformedDistribution):
            if not all(map(_plain, fn.transforms)):
                raise NotParameterized("a transform with parameters")
            inner = self._lift(fn.base_dist, batch)
            return lambda copies: dist.TransformedDistribution(inner(copies), fn.transforms)
        units = _units(fn, free)
        built = {name: self._argument(value, c, units.get(name)) for name, (value, c) in free.items()}
        return lambda copies: type(fn)(**{n: build(copies) for n, build in built.items()}, **held)

    def _argument(self, value: Tensor, constraint: Any, unit: Tensor | None) -> Build:
        self.start.append(value.detach())
        if not self._learned(value):
            return lambda copies: self._tiled(value.detach(), copies)
        value = value.detach()
        if unit is not None:
            leaf = self._leaf(torch.zeros_like(value))
            return lambda copies: self._tiled(value + unit * leaf, copies)
        try:
            to = transform_to(constraint)
        except NotImplementedError:
            raise NotParameterized(f"an argument without a transform ({constraint})") from None
        leaf = self._leaf(to.inv(value))
        if bool(leaf.isinf().any()):
            raise NotParameterized("an argument at the edge of its support")
        return lambda copies: self._tiled(to(leaf), copies)

    def _normal(self, fn: Any, batch: torch.Size) -> Build:
        size = fn.event_shape[0]
        loc, scale = fn.loc.expand(*batch, size), fn.scale_tril.expand(*batch, size, size)
        self.start += [loc.detach(), scale.detach()]
        affine = Affine(loc.detach(), scale.detach(), self._learned(loc), self._learned(scale))
        self.leaves += affine.leaves

        def build(copies: int) -> Any:
            loc, scale = affine.arguments()
            return dist.MultivariateNormal(self._tiled(loc, copies), scale_tril=self._tiled(scale, copies))

        return build

    def _leaf(self, value: Tensor) -> Tensor:
        self.leaves.append(value.clone().requires_grad_())
        return self.leaves[-1]

    def _learned(self, value: Tensor) -> bool:
        first = value.detach().narrow(self.data_dim, 0, 1)
        return value.requires_grad or not bool((value.detach() == first).all())

    def _tiled(self, value: Tensor, copies: int) -> Tensor:
        return value.repeat(*(copies if i == self.data_dim else 1 for i in range(value.dim()))) if copies > 1 else value


class Affine:
    """Location and lower-triangular scale of normals, [..., D] and [..., D, D], moved in units of where they start."""

    def __init__(self, loc: Tensor, scale_tril: Tensor, free_loc: bool = True, free_scale: bool = True):
        self.loc, self.scale_tril = loc, scale_tril
        self.shift, self.factor = torch.zeros_like(loc), torch.zeros_like(scale_tril)
        self.leaves = [t.requires_grad_() for t, free in ((self.shift, free_loc), (self.factor, free_scale)) if free]

    def arguments(self) -> tuple[Tensor, Tensor]:
        """Where location and scale are now."""
        factor = self.factor.tril(-1) + torch.diag_embed(self.factor.diagonal(dim1=-2, dim2=-1).exp())
        loc = self.loc + (self.scale_tril @ self.shift.unsqueeze(-1)).squeeze(-1)
        return loc, self.scale_tril @ factor


def _arguments(fn: Any, batch: torch.Size) -> tuple[dict[str, tuple[Tensor, Any]], dict[str, Any]]:
    """What a distribution is made again from: ({argument: (value over the whole batch, constraint)}, the rest)."""
    try:
        known = dict(fn.arg_constraints)
    except NotImplementedError:
        known = {}
    free: dict[str, tuple[Tensor, Any]] = {}
    held: dict[str, Any] = {}
    if not known and isinstance(fn, torch.distributions.TransformedDistribution):
        return free, held
    for name, parameter in signatures.signature(type(fn).__init__).parameters.items():
        if name in ("self", "validate_args") or (name == "probs" and "logits" in known):
            continue
        value, constraint = getattr(fn, name, parameter.default), known.get(name)
        if value is parameter.empty:
            raise NotParameterized(f"{type(fn).__name__} does not keep its argument {name!r}")
        if not isinstance(value, Tensor):
            held[name] = value
        elif constraint is None or getattr(constraint, "is_discrete", False):
            if value.requires_grad or value.numel() > 1:
                raise NotParameterized(f"an argument of {type(fn).__name__} without a constraint ({name})")
            held[name] = value
        else:
            events = constraint.event_dim
            free[name] = (value.expand(*batch, *value.shape[value.dim() - events :]), constraint)
    if not free:
        raise NotParameterized(f"{type(fn).__name__} does not say what its arguments are")
    return free, held


def _units(fn: Any, free: Mapping[str, tuple[Tensor, Any]]) -> dict[str, Tensor]:
    """How far a step of one goes, for arguments that are locations or factors of a covariance."""
    if "loc" in free and "scale" in free:
        return {"loc": free["scale"][0].detach()}
    if isinstance(fn, torch.distributions.LowRankMultivariateNormal):
        scale = fn.stddev.detach().expand_as(free["loc"][0])
        return {"loc": scale, "cov_factor": scale.unsqueeze(-1)}
    return {}


def _plain(transform: Any) -> bool:
    """Whether a transform has nothing in it that could be learned."""
    if isinstance(transform, nn.Module):
        return False
    for name, value in vars(transform).items():
        if name.startswith("_cached") or name in ("_inv", "_inverse"):
            continue
        for part in value if isinstance(value, list | tuple) else (value,):
            if isinstance(part, torch.distributions.Transform):
                if not _plain(part):
                    return False
            elif isinstance(part, nn.Module | Tensor) or (callable(part) and not _is_constraint(part)):
                return False
    return True


def _is_constraint(value: Any) -> bool:
    return isinstance(value, constraints.Constraint)


def per_datum_distribution(
    guide: Program, batch: tuple[Any, ...], s: Structure, index: Tensor | None
) -> dict[str, PerDatumDistribution]:
    """The guide's sites as distributions with free parameters, none where nothing is to be refit.

    An argument counts as learned where it depends on the guide's parameters or on the data.

    Raises:
        Unliftable: a distribution cannot be made from its arguments, or one depends on the latents drawn before it.
    """
    plain, given = replace(s, enumerated=()), {} if index is None else {s.plate: index}
    with torch.enable_grad(), trace_arguments(s.guide_params):
        batch = tuple(_followed(t) for t in batch)
        first, other = (dict(sample_sites(trace_program(guide, batch, plain, given))) for _ in range(2))
        points = {n for n, node in first.items() if isinstance(node["fn"], dist.Delta)}
        fixed = {n: node["value"].detach() for n, node in first.items() if n not in points}
        nodes = dict(sample_sites(trace_program(guide, batch, plain, {**given, **fixed})))
        out = {}
        for name, node in nodes.items():
            fn = node["fn"]
            if name in points:  # it carries a helper's value over: nothing to refit, unless it has parameters
                if fn.v.requires_grad or torch.as_tensor(fn.log_density).requires_grad:
                    raise NotParameterized(f"{name!r} is a helper's value moved by a transform with parameters")
                continue
            try:
                out[name] = PerDatumDistribution(fn)
                start, again = out[name].start, PerDatumDistribution(other[name]["fn"]).start
                with torch.no_grad():
                    before, after = fn.log_prob(node["value"]), out[name]().log_prob(node["value"])
            except NotParameterized as error:
                raise NotParameterized(f"{name!r}: {error}") from None
            except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
                raise NotParameterized(f"{name!r}: {type(fn).__name__} could not be made again ({error})") from None
            if not all(
                a.shape == b.shape and torch.allclose(a, b, equal_nan=True) for a, b in zip(start, again, strict=True)
            ):
                raise NotParameterized(f"{name!r} depends on the latents drawn before it")
            if not torch.allclose(before, after, rtol=1e-3, atol=1e-3, equal_nan=True):
                raise NotParameterized(f"{name!r}: {type(fn).__name__} is not what its arguments say")
    return out


def _followed(value: Any) -> Any:
    """Data whose influence shows: a copy that takes a gradient."""
    real = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().requires_grad_().clone() if real else value


@contextmanager
def trace_arguments(params: Mapping[str, Tensor]) -> Iterator[None]:
    """Lets every parameter take a gradient meanwhile, so that what depends on one shows."""
    frozen = [p for p in params.values() if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
