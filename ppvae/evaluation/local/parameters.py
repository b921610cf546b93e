"""A guide's distributions with free arguments for every datum."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
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

Builder = Callable[[int], Any]  # number of copies of the data -> distribution


class UnsupportedDistribution(Exception):
    """The reason why a distribution has no free arguments for each datum, in a few words."""


class PerDatumDistribution:
    """A site's distribution whose learned arguments are free for every datum, in unconstrained space.

    An argument is learned if it depends on learned parameters or differs between data; other arguments stay constant.
    Locations are in units of the initial scale and covariances in units of the initial covariance (whitened), so that
    a step has the same size for every datum and dim.

    Attributes:
        params: the free arguments, unconstrained.
        initial: the arguments of the distribution itself.
        data_dim: the dim of each parameter that indexes data.
    """

    def __init__(self, fn: Any):
        self.params: list[Tensor] = []
        self.initial: list[Tensor] = []
        self.data_dim = len(fn.batch_shape) - 1
        self._build = self._parameterize(fn, fn.batch_shape)

    def __call__(self, copies: int = 1) -> Any:
        """The distribution, its data dim repeated `copies` times, for particles folded into the batch."""
        return self._build(copies)

    def _parameterize(self, fn: Any, batch: torch.Size) -> Builder:
        if isinstance(fn, torch.distributions.Independent):
            count = fn.reinterpreted_batch_ndims
            base = self._parameterize(fn.base_dist, batch + fn.base_dist.batch_shape[-count:])
            return lambda copies: base(copies).to_event(count)
        if isinstance(fn, dist.MaskedDistribution):
            base, mask = self._parameterize(fn.base_dist, batch), torch.as_tensor(fn._mask).expand(batch)
            return lambda copies: base(copies).mask(self._repeat(mask, copies))
        if isinstance(fn, ExpandedDistribution):
            return self._parameterize(fn.base_dist, batch)
        if isinstance(fn, torch.distributions.MultivariateNormal):
            return self._parameterize_normal(fn, batch)
        tensors, constants = _arguments(fn, batch)
        if not tensors and isinstance(fn, torch.distributions.TransformedDistribution):
            if not all(map(_is_parameter_free, fn.transforms)):
                raise UnsupportedDistribution("a transform with parameters")
            base = self._parameterize(fn.base_dist, batch)
            return lambda copies: dist.TransformedDistribution(base(copies), fn.transforms)
        scales = _location_scales(fn, tensors)
        builders = {name: self._argument(value, c, scales.get(name)) for name, (value, c) in tensors.items()}
        return lambda copies: type(fn)(**{n: build(copies) for n, build in builders.items()}, **constants)

    def _argument(self, value: Tensor, constraint: Any, scale: Tensor | None) -> Builder:
        learned, value = self._is_learned(value), value.detach()
        self.initial.append(value)
        if not learned:
            return lambda copies: self._repeat(value, copies)
        if scale is not None:
            shift = self._parameter(torch.zeros_like(value))
            return lambda copies: self._repeat(value + scale * shift, copies)
        try:
            transform = transform_to(constraint)
        except NotImplementedError:
            raise UnsupportedDistribution(f"an argument without a transform ({constraint})") from None
        param = self._parameter(transform.inv(value))
        if bool(param.isinf().any()):
            raise UnsupportedDistribution("an argument at the edge of its support")
        return lambda copies: self._repeat(transform(param), copies)

    def _parameterize_normal(self, fn: Any, batch: torch.Size) -> Builder:
        size = fn.event_shape[0]
        loc, scale = fn.loc.expand(*batch, size), fn.scale_tril.expand(*batch, size, size)
        self.initial += [loc.detach(), scale.detach()]
        normal = WhitenedNormal(loc.detach(), scale.detach(), self._is_learned(loc), self._is_learned(scale))
        self.params += normal.params

        def build(copies: int) -> Any:
            loc, scale = normal.arguments()
            return dist.MultivariateNormal(self._repeat(loc, copies), scale_tril=self._repeat(scale, copies))

        return build

    def _parameter(self, value: Tensor) -> Tensor:
        self.params.append(value.clone().requires_grad_())
        return self.params[-1]

    def _is_learned(self, value: Tensor) -> bool:
        first = value.detach().narrow(self.data_dim, 0, 1)
        return value.requires_grad or not bool((value.detach() == first).all())

    def _repeat(self, value: Tensor, copies: int) -> Tensor:
        return value.repeat(*(copies if i == self.data_dim else 1 for i in range(value.dim()))) if copies > 1 else value


class WhitenedNormal:
    """Location [..., D] and lower-triangular scale [..., D, D] of normals, parameterised relative to initial ones.

    loc = loc_0 + L_0 m and scale = L_0 S, with m = 0 and S = I at the start.
    """

    def __init__(self, loc: Tensor, scale_tril: Tensor, learn_loc: bool = True, learn_scale: bool = True):
        self.loc, self.scale_tril = loc, scale_tril
        self.shift, self.factor = torch.zeros_like(loc), torch.zeros_like(scale_tril)
        learned = ((self.shift, learn_loc), (self.factor, learn_scale))
        self.params = [param.requires_grad_() for param, learn in learned if learn]

    def arguments(self) -> tuple[Tensor, Tensor]:
        """The current location and scale."""
        factor = self.factor.tril(-1) + torch.diag_embed(self.factor.diagonal(dim1=-2, dim2=-1).exp())
        loc = self.loc + (self.scale_tril @ self.shift.unsqueeze(-1)).squeeze(-1)
        return loc, self.scale_tril @ factor


def _arguments(fn: Any, batch: torch.Size) -> tuple[dict[str, tuple[Tensor, Any]], dict[str, Any]]:
    """The constructor arguments of a distribution: ({name: (value over the whole batch, constraint)}, constants)."""
    try:
        arg_constraints = dict(fn.arg_constraints)
    except NotImplementedError:
        arg_constraints = {}
    tensors: dict[str, tuple[Tensor, Any]] = {}
    constants: dict[str, Any] = {}
    if not arg_constraints and isinstance(fn, torch.distributions.TransformedDistribution):
        return tensors, constants
    for name, parameter in inspect.signature(type(fn).__init__).parameters.items():
        if name in ("self", "validate_args") or (name == "probs" and "logits" in arg_constraints):
            continue
        value, constraint = getattr(fn, name, parameter.default), arg_constraints.get(name)
        if value is parameter.empty:
            raise UnsupportedDistribution(f"{type(fn).__name__} does not keep its argument {name!r}")
        if not isinstance(value, Tensor):
            constants[name] = value
        elif constraint is None or getattr(constraint, "is_discrete", False):
            if value.requires_grad or value.numel() > 1:
                raise UnsupportedDistribution(f"an argument of {type(fn).__name__} without a constraint ({name})")
            constants[name] = value
        else:
            event_dim = constraint.event_dim
            tensors[name] = (value.expand(*batch, *value.shape[value.dim() - event_dim :]), constraint)
    if not tensors:
        raise UnsupportedDistribution(f"{type(fn).__name__} does not declare its arguments (arg_constraints)")
    return tensors, constants


def _location_scales(fn: Any, tensors: Mapping[str, tuple[Tensor, Any]]) -> dict[str, Tensor]:
    """The unit of each argument that is a location or a factor of a covariance."""
    if "loc" in tensors and "scale" in tensors:
        return {"loc": tensors["scale"][0].detach()}
    if isinstance(fn, torch.distributions.LowRankMultivariateNormal):
        scale = fn.stddev.detach().expand_as(tensors["loc"][0])
        return {"loc": scale, "cov_factor": scale.unsqueeze(-1)}
    return {}


def _is_parameter_free(transform: Any) -> bool:
    """Whether a transform holds no module, tensor or function that could be learned."""
    if isinstance(transform, nn.Module):
        return False
    for name, value in vars(transform).items():
        if name.startswith("_cached") or name in ("_inv", "_inverse"):
            continue
        for part in value if isinstance(value, list | tuple) else (value,):
            if isinstance(part, torch.distributions.Transform):
                if not _is_parameter_free(part):
                    return False
            elif isinstance(part, nn.Module | Tensor) or (
                callable(part) and not isinstance(part, constraints.Constraint)
            ):
                return False
    return True


def _is_constraint(value: Any) -> bool:
    return isinstance(value, constraints.Constraint)


def per_datum_distributions(
    guide: Program, batch: tuple[Any, ...], s: Structure, index: Tensor | None
) -> dict[str, PerDatumDistribution]:
    """The distributions of the guide's sites with free arguments for every datum, by site.

    An argument counts as learned where it depends on the guide's parameters or on the data.

    Raises:
        UnsupportedDistribution: a distribution cannot be rebuilt from its arguments, or depends on other latents.
    """
    plain, given = replace(s, enumerated=()), {} if index is None else {s.plate: index}
    with torch.enable_grad(), require_grad(s.guide_params.values()):
        batch = tuple(_with_grad(t) for t in batch)
        first, second = (dict(sample_sites(trace_program(guide, batch, plain, given))) for _ in range(2))
        deltas = {n for n, node in first.items() if isinstance(node["fn"], dist.Delta)}
        values = {n: node["value"].detach() for n, node in first.items() if n not in deltas}
        nodes = dict(sample_sites(trace_program(guide, batch, plain, {**given, **values})))
        out = {}
        for name, node in nodes.items():
            fn = node["fn"]
            if name in deltas:  # a transform of an auxiliary site's value, without arguments of its own
                if fn.v.requires_grad or torch.as_tensor(fn.log_density).requires_grad:
                    raise UnsupportedDistribution(f"{name!r} is an auxiliary site under a transform with parameters")
                continue
            try:
                out[name] = PerDatumDistribution(fn)
                once, again = out[name].initial, PerDatumDistribution(second[name]["fn"]).initial
                with torch.no_grad():
                    before, after = fn.log_prob(node["value"]), out[name]().log_prob(node["value"])
            except UnsupportedDistribution as error:
                raise UnsupportedDistribution(f"{name!r}: {error}") from None
            except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
                raise UnsupportedDistribution(
                    f"{name!r}: {type(fn).__name__} cannot be rebuilt from its arguments ({error})"
                ) from None
            if not all(
                a.shape == b.shape and torch.allclose(a, b, equal_nan=True) for a, b in zip(once, again, strict=True)
            ):
                raise UnsupportedDistribution(f"{name!r} depends on the latents drawn before it")
            if not torch.allclose(before, after, rtol=1e-3, atol=1e-3, equal_nan=True):
                raise UnsupportedDistribution(f"{name!r}: {type(fn).__name__} differs from the one its arguments give")
    return out


def _with_grad(value: Any) -> Any:
    """A copy of floating-point data that requires a gradient, so that arguments that depend on it do too."""
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().requires_grad_().clone() if is_float else value


@contextmanager
def require_grad(params: Iterable[Tensor]) -> Iterator[None]:
    """Every parameter requires a gradient inside, and as before outside."""
    frozen = [p for p in params if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
