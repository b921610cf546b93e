"""Traces of a model and a guide: effect handlers, the sites of a trace and their log-densities."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import Independent, constraints

from ppvae.compilation.graph import is_capturing
from ppvae.errors import site_error
from ppvae.inference.param_store import is_effect_guide
from ppvae.inference.second_run import (
    DetachDraws,
    RestoreRandomStates,
    any_number_of_rows,
    buffer_copies,
    frozen_params,
    masked_log_prob,
)
from ppvae.inference.structure import Role, Structure, lone_role

PARTICLES = "_ppvae_particles"  # name of the particle plate
ANGLES = (dist.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)  # densities on a circle or a torus

Program = Callable[..., Any]  # a model or a guide
Node = dict[str, Any]  # a sample site of a Pyro trace
Nodes = Mapping[str, Node]  # sample sites by name


class SubstituteValues(Messenger):
    """Substitutes given values for samples, at latent sites and at a plate's subsample, whatever its subsample_size.

    At the sites `from_base`, the given value is a draw of the base distribution of a flow, and goes through the flow.
    """

    def __init__(self, values: Mapping[str, Tensor], from_base: Sequence[str] = ()):
        super().__init__()
        self.values, self.from_base = values, from_base

    def __enter__(self) -> SubstituteValues:
        self._rows = any_number_of_rows(lambda name: any(is_plate(name, plate) for plate in self.values))
        self._rows.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> Any:
        self._rows.__exit__(*exception)
        return super().__exit__(*exception)

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if isinstance(msg["fn"], _Subsample):
            name = next((plate for plate in self.values if is_plate(name, plate)), name)
        value = self.values.get(name)
        if value is None or msg["is_observed"]:
            return
        if msg["name"] in self.from_base:
            for transform in flow_of(msg["fn"]):
                value = transform(value)
        msg["value"], msg["done"] = snap_to_point_mass(msg["fn"], value), True


class RecordBaseDraws(Messenger):
    """Collects, run by run, the draws of the base distributions of flows without an inverse."""

    def __init__(self, names: Sequence[str]):
        super().__init__()
        self.draws: dict[str, list[Tensor]] = {name: [] for name in names}

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.draws and not msg["is_observed"] and not isinstance(msg["fn"], _Subsample):
            value = msg["value"]
            for transform in reversed(flow_of(msg["fn"])):
                value = transform.inv(value)  # from its cache
            self.draws[msg["name"]].append(value)


def flow_of(fn: Any) -> list[Any]:
    """The transforms of a flow, from its base distribution on; empty for any other distribution."""
    while isinstance(fn, Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    return list(getattr(fn, "transforms", ()))


def has_inverse(node: dict[str, Any]) -> bool:
    """Whether the density of a site can be evaluated at any value, and not at its own draws alone."""
    try:
        node["fn"].log_prob(node["value"].clone())
    except (KeyError, NotImplementedError):  # Pyro's flows look for a draw of theirs, and find none
        return False
    except (ValueError, RuntimeError, IndexError):
        return True
    return True


def check_has_inverse(s: Structure, names: Iterable[str]) -> None:
    """A guide site that is evaluated at given values has a density there."""
    for name in names:
        if name in s.no_inverse and name not in s.from_base:
            raise site_error(
                name, "a density that can be evaluated at given values, as sticking the landing, DReG, annealing and "
                "refinement need it", "a flow without an inverse",
                "use gradient='pathwise' and log_marginal by importance sampling, or a flow with an inverse",
            )  # fmt: skip


def is_plate(site: str, plate: str) -> bool:
    """Whether the site of a subsample is that of a plate; a scope renames the site, and not the plate."""
    return site == plate or site.endswith(f"/{plate}")


def find_subsample(trace: Any, plate: str) -> Any:
    """The site of a plate's subsample in a trace; None where the plate draws none."""
    nodes = (node for node in trace.nodes.values() if isinstance(node.get("fn"), _Subsample))
    return next((node for node in nodes if is_plate(node["name"], plate)), None)


def snap_to_point_mass(fn: Any, value: Tensor) -> Tensor:
    """A value for a site; under a Delta the point itself, where the two differ by rounding alone.

    A matrix product rounds differently for another number of rows, and a point mass has density zero one bit off.
    """
    while isinstance(fn, Independent):
        fn = fn.base_dist
    if not isinstance(fn, dist.Delta) or not value.is_floating_point():
        return value
    point = fn.v
    near = 64 * torch.finfo(value.dtype).eps * (point.abs() + value.abs()).clamp(min=1)
    return torch.where((value - point).abs() <= near, point, value)


class _ParallelEnumeration(Messenger):
    """Enumerates in parallel the sites that a guide marks for sequential enumeration."""

    def _pyro_sample(self, msg: Any) -> None:
        if (msg["infer"] or {}).get("enumerate") == "sequential":
            msg["infer"] = {**msg["infer"], "enumerate": "parallel"}


class TransformValues(Messenger):
    """Replaces each sampled value, after it is drawn, by transform(site name, value)."""

    def __init__(self, transform: Callable[[str, Tensor], Tensor]):
        super().__init__()
        self.transform = transform

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not isinstance(msg["fn"], _Subsample):
            msg["value"] = self.transform(msg["name"], msg["value"])


def sample_sites(trace: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The sample sites of a trace, without plates and deterministic sites."""
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or isinstance(node["fn"], _Subsample):
            continue
        if not ((node["infer"] or {}).get("_deterministic") or _is_function_of_others(node)):
            yield name, node


def _is_function_of_others(node: dict[str, Any]) -> bool:
    """Whether a site is what `poutine.reparam` leaves of a latent: an observed Delta under a mask that hides it."""
    fn, observed = node["fn"], node["is_observed"] or (node["infer"] or {}).get("was_observed")
    hidden = isinstance(fn, dist.MaskedDistribution) and fn._mask is False
    return bool(observed and hidden and isinstance(fn.base_dist, dist.Delta))


def lone_guide_sites(trace: Any) -> dict[str, tuple[Role, int]]:
    """(role, event dims) of a guide's sites by name, as far as the guide alone shows them."""
    return {name: (lone_role(node), event_dim(node)) for name, node in sample_sites(trace)}


def event_dim(node: dict[str, Any]) -> int:
    """The number of event dims of a site, rightmost in its value."""
    return len(getattr(node["fn"], "event_shape", ()))


def node_log_prob(node: dict[str, Any]) -> Tensor:
    """The log-density of a traced site with its mask and without its scale; -inf outside the support."""
    if "ppvae_log_prob" in node:
        return node["ppvae_log_prob"]
    fn, value = node["fn"], node["value"]
    outside = None
    if isinstance(fn, TorchDistributionMixin) and not isinstance(fn, dist.Delta):
        outside = _outside(fn, value) if not node["is_observed"] or has_dependent_support(fn) else None
    if outside is None:
        log_prob = masked_log_prob(fn, value, node)
    else:  # a value that the other side drew outside this support is legal and has weight zero
        validate, fn._validate_args = fn._validate_args, False
        try:
            log_prob = fn.log_prob(value, *node["args"], **node["kwargs"])
        finally:
            fn._validate_args = validate
        log_prob = torch.where(outside, torch.full_like(log_prob, -torch.inf), log_prob)
    return scale_and_mask(log_prob, 1.0, node["mask"])


def support_of(fn: Any) -> Any:
    """The support of a distribution, None where it declares none: Pyro asks for one only where it transforms a site."""
    try:
        return fn.support
    except (NotImplementedError, AttributeError):
        return None


def latent_support_of(fn: Any) -> Any:
    """As `support_of`; of an angle one period, [-pi, pi]: Pyro declares the line, on which the density repeats."""
    base = fn
    while base is not None and not isinstance(base, ANGLES):
        is_flow = isinstance(base, torch.distributions.TransformedDistribution)
        base = None if is_flow else getattr(base, "base_dist", getattr(base, "component_distribution", None))
    if base is None:
        return support_of(fn)
    return constraints.independent(constraints.interval(-math.pi, math.pi), len(fn.event_shape))


def has_dependent_support(fn: Any) -> bool:
    """Whether the support depends on the distribution's parameters, as a uniform's does, and so perhaps on a latent."""
    support = support_of(fn)
    support = getattr(support, "base_constraint", support)
    if hasattr(support, "cure"):  # a support of this library, set by the batch
        return False
    return any(isinstance(v, Tensor) and v.numel() > 1 for v in getattr(support, "__dict__", {}).values())


def _outside(fn: Any, value: Tensor) -> Tensor | None:
    """A mask of the elements outside the support; None where there are none, can be none, or the support is unknown."""
    support = latent_support_of(fn)
    base = getattr(support, "base_constraint", support)
    if base in (None, constraints.real, constraints.real_vector):
        return None
    if fn.has_enumerate_support or getattr(base, "is_discrete", False):
        return None
    inside = support.check(value)
    return None if not is_capturing() and bool(inside.all()) else ~inside


def trace_program(
    fn: Program,
    batch: Sequence[Any],
    s: Structure,
    values: Mapping[str, Tensor],
    replay_trace: Any = None,
    num_particles: int | None = None,
    transform: Callable[[str, Tensor], Tensor] | None = None,
    noise: RestoreRandomStates | None = None,
) -> Any:
    """The trace of one run of a model or guide, with a particle plate of size `num_particles` unless that is None."""
    with ExitStack() as stack:
        if noise is not None:
            stack.enter_context(noise)
        if transform is not None:  # outermost, so that the trace records the transformed value
            stack.enter_context(TransformValues(transform))
        if s.straight_through:
            stack.enter_context(DetachDraws(s.straight_through))
        if num_particles is not None:
            stack.enter_context(pyro.plate(PARTICLES, num_particles, dim=-1 - s.plate_nesting))
        tracer = stack.enter_context(poutine.trace())
        if replay_trace is not None:
            stack.enter_context(poutine.replay(trace=replay_trace))
        if values:
            stack.enter_context(SubstituteValues(values, s.from_base))
        if s.enumerated:  # innermost: it must see a site before a value is substituted there
            # the model takes the guide's enumeration dims, so that a replayed value means the same on both sides
            first = None if replay_trace is not None else -1 - s.plate_nesting - (num_particles is not None)
            stack.enter_context(poutine.enum(first_available_dim=first))
            stack.enter_context(_ParallelEnumeration())
        if is_effect_guide(fn):  # it runs the model, whose observed sites are none of the guide's
            stack.enter_context(poutine.block(hide_fn=lambda msg: msg["type"] == "sample" and msg["is_observed"]))
        fn(*batch)
        trace = tracer.get_trace()
    return trace


def trace_pair(
    model: Program,
    guide: Program,
    batch: Sequence[Any],
    s: Structure,
    values: Mapping[str, Tensor],
    frozen: Sequence[str] = (),
    num_particles: int | None = None,
    latent_hook: Callable[[str, Tensor, Structure], Tensor] | None = None,
) -> tuple[Any, Any]:
    """(model trace, guide trace) of one run of the pair; the model is replayed on the guide's latents.

    `num_particles` is the size of the particle plate, None for a run without one. With a frozen guide or a
    `latent_hook` the guide runs twice: the hook, a function of (site name, value, structure of this batch), maps the
    values of local latents of the first run to those that every density, the guide's included, is evaluated at.

    Given global latents act as parameters: a frozen guide, or `frozen=("globals",)`, has constant ones in its
    densities, and gradients of the model's densities reach them.
    """
    shared = {n: values[n] for n in s.global_sites if n in values}
    in_guide = {n: v.detach() for n, v in shared.items()} if {"guide", "globals"} & {*frozen} else shared
    live = None if in_guide is shared else lambda name, value: shared.get(name, value)
    detach = (lambda name, value: in_guide.get(name, value.detach())) if "latents" in frozen else None
    guide_values, noise = {**values, **in_guide}, None
    twice = "guide" in frozen or latent_hook is not None
    check_has_inverse(s, s.no_inverse if twice else values)
    if twice:
        noise = RestoreRandomStates(batch)
        with buffer_copies():
            samples = trace_program(guide, batch, s, values, None, num_particles, detach, noise)
        s = s.with_guide_sites(lone_guide_sites(samples))
        guide_values = {**values, **_latent_values(samples, s, latent_hook), **in_guide}
        noise.rewind()
    guide_trace = _trace_side("guide" in frozen, guide, batch, s, guide_values, None, num_particles, detach, noise)
    model_values = {name: value for name, value in values.items() if name not in guide_trace or name == s.plate}
    model_trace = _trace_side("model" in frozen, model, batch, s, model_values, guide_trace, num_particles, live)
    return model_trace, guide_trace


def _latent_values(
    guide_trace: Any, s: Structure, latent_hook: Callable[[str, Tensor, Structure], Tensor] | None
) -> dict[str, Tensor]:
    """The values of a guide's run, through the hook; with the subsample where the data plate draws one."""
    left = (Role.ENUMERATED, Role.FACTOR)
    values = {n: node["value"] for n, node in sample_sites(guide_trace) if s.guide_roles.get(n) not in left}
    # a view, never the value itself: a flow that caches its inverse would be differentiated by its live parameters
    plain = () if s.local_refusal else s.global_sites
    values = {n: latent_hook(n, v, s) if latent_hook and n not in plain else v.view_as(v) for n, v in values.items()}
    return values | ({s.plate: find_subsample(guide_trace, s.plate)["value"]} if s.draws_subsample else {})


def _trace_side(frozen: bool, fn: Program, batch: Sequence[Any], s: Structure, *arguments: Any) -> Any:
    """`trace_program` of one side of a pair; with `frozen`, its parameters are constant in every density."""
    # the current store's parameters, too: the pair may run in another scope than the one it was inspected in
    params = [*s.params.values(), *(p for _, p in pyro.get_param_store().named_parameters())] if frozen else []
    with frozen_params(params):
        trace = trace_program(fn, batch, s, *arguments)
        for _, node in sample_sites(trace) if frozen else ():  # some distributions call their network in log_prob
            node["ppvae_log_prob"] = node_log_prob(node)
        return trace


def as_batch(batch: Tensor | Sequence[Any]) -> tuple[Any, ...]:
    """A batch as the tuple of arguments that the pair is called with."""
    return tuple(batch) if isinstance(batch, list | tuple) else (batch,)
