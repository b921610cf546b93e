"""Running a model and a guide: traces, the densities of their sites, and values put in place of draws."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
from torch.distributions import Independent

from ppvae.compilation.graph import is_capturing
from ppvae.errors import ContractError, refused
from ppvae.inference.replay import ReplayNoise, buffer_copies
from ppvae.inference.structure import Structure

PARTICLES = "_ppvae_particles"


Program = Callable[..., Any]


class Substitute(Messenger):
    """Sets latent sites (and a plate's subsample) to given values instead of sampling them."""

    def __init__(self, values: Mapping[str, Tensor]):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        value = self.values.get(msg["name"])
        if value is not None and not msg["is_observed"]:
            msg["value"], msg["done"] = at_the_point(msg["fn"], value), True


def at_the_point(fn: Any, value: Tensor) -> Tensor:
    """A value for a site; that of a point mass itself where the two differ by rounding alone.

    A point that a product of matrices gives is rounded in another way where rows are more or fewer, and the density of
    a point mass anywhere else is zero.
    """
    while isinstance(fn, Independent):
        fn = fn.base_dist
    if not isinstance(fn, dist.Delta) or not value.is_floating_point():
        return value
    point = fn.v
    near = 64 * torch.finfo(value.dtype).eps * (point.abs() + value.abs()).clamp(min=1)
    return torch.where((value - point).abs() <= near, point, value)


class _Parallel(Messenger):
    """Enumerates at once what a guide asks to be enumerated one value after another."""

    def _pyro_sample(self, msg: Any) -> None:
        if (msg["infer"] or {}).get("enumerate") == "sequential":
            msg["infer"] = {**msg["infer"], "enumerate": "parallel"}


class TransformValues(Messenger):
    """Puts something else in the place of sampled values, after they are drawn: value(site, drawn)."""

    def __init__(self, value: Callable[[str, Tensor], Tensor]):
        super().__init__()
        self.value = value

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not isinstance(msg["fn"], _Subsample):
            msg["value"] = self.value(msg["name"], msg["value"])


def sample_sites(trace: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The sample sites of a trace, without plates and deterministic sites."""
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or isinstance(node["fn"], _Subsample):
            continue
        if not (node["infer"] or {}).get("_deterministic"):
            yield name, node


def event_dim(node: dict[str, Any]) -> int:
    """How many rightmost dims of a site's value are one event."""
    return len(getattr(node["fn"], "event_shape", ()))


def node_log_prob(node: dict[str, Any]) -> Tensor:
    """log-density of a traced site with its mask and without its scale; -inf outside the support."""
    if "ppvae_log_prob" in node:
        return node["ppvae_log_prob"]
    fn, value = node["fn"], node["value"]
    outside = None
    if (
        isinstance(fn, TorchDistributionMixin)
        and not isinstance(fn, dist.Delta)
        and (not node["is_observed"] or has_dependent_support(fn))
    ):
        outside = _outside(fn, value)
    if outside is None:
        log_prob = fn.log_prob(value, *node["args"], **node["kwargs"])
    else:  # a value the other side drew where this side has no mass is legal: its weight is zero
        validate, fn._validate_args = fn._validate_args, False
        try:
            log_prob = fn.log_prob(value, *node["args"], **node["kwargs"])
        finally:
            fn._validate_args = validate
        log_prob = torch.where(outside, torch.full_like(log_prob, -torch.inf), log_prob)
    return scale_and_mask(log_prob, 1.0, node["mask"])


def has_dependent_support(fn: Any) -> bool:
    """Whether a distribution's support is set by its parameters, as a uniform's is, and so perhaps by a latent."""
    try:
        support = fn.support
    except (NotImplementedError, AttributeError):
        return False
    support = getattr(support, "base_constraint", support)
    if hasattr(support, "cure"):  # set by the context, which is data
        return False
    return any(isinstance(v, Tensor) and v.numel() > 1 for v in getattr(support, "__dict__", {}).values())


def _outside(fn: Any, value: Tensor) -> Tensor | None:
    """Where a value lies outside the support; None where it lies nowhere outside or cannot."""
    support = fn.support
    base = getattr(support, "base_constraint", support)
    if base is torch.distributions.constraints.real or support is torch.distributions.constraints.real_vector:
        return None
    if fn.has_enumerate_support or getattr(base, "is_discrete", False):
        return None
    inside = support.check(value)
    return None if not is_capturing() and bool(inside.all()) else ~inside


@contextmanager
def frozen_params(params: Iterable[Tensor]) -> Iterator[None]:
    """Holds parameters constant meanwhile: gradients pass through values, none reaches a parameter."""
    held = [p for p in params if p.requires_grad]
    for p in held:
        p.requires_grad_(False)
    try:
        with warnings.catch_warnings():  # pyro.module remarks on every parameter that takes no gradient
            warnings.filterwarnings("ignore", message=".*was not registered in the param store.*")
            yield
    finally:
        for p in held:
            p.requires_grad_(True)


def trace_program(
    fn: Program,
    batch: Sequence[Any],
    s: Structure,
    values: Mapping[str, Tensor],
    replayed: Any = None,
    num_particles: int | None = None,
    replaced: Callable[[str, Tensor], Tensor] | None = None,
    noise: ReplayNoise | None = None,
) -> Any:
    """The trace of one run of a model or guide, under a particle plate if `num_particles` says so."""
    with ExitStack() as stack:
        if noise is not None:
            stack.enter_context(noise)
        if replaced is not None:  # outermost: the trace must see the other value
            stack.enter_context(TransformValues(replaced))
        if num_particles is not None:
            stack.enter_context(pyro.plate(PARTICLES, num_particles, dim=-1 - s.plate_nesting))
        tracer = stack.enter_context(poutine.trace())
        if replayed is not None:
            stack.enter_context(poutine.replay(trace=replayed))
        stack.enter_context(Substitute(values))
        if s.enumerated:  # innermost: it must see a site before a value is put there
            # the model's dims follow the guide's, so that a replayed value means the same on both sides
            first = None if replayed is not None else -1 - s.plate_nesting - (num_particles is not None)
            stack.enter_context(poutine.enum(first_available_dim=first))
            stack.enter_context(_Parallel())
        fn(*batch)
        trace = tracer.get_trace()
    return trace


def trace_pair(
    model: Program,
    guide: Program,
    batch: Sequence[Any],
    s: Structure,
    given: Mapping[str, Tensor],
    frozen: Sequence[str] = (),
    num_particles: int | None = None,
    entry: Callable[[str, Tensor], Tensor] | None = None,
) -> tuple[Any, Any]:
    """(model trace, guide trace) of one run of the pair; the model is replayed on the guide's latents.

    `num_particles` is the size of the particle plate, or None for a run without one. With a frozen guide or an `entry`
    the guide runs twice: what it draws first goes through `entry` into the densities, its own included.
    """

    def run(fn: Program, values: Mapping[str, Tensor], held: bool, *how: Any) -> Any:
        # the store's parameters, too: the pair may run in another scope than the one that it was looked at in
        params = [*s.params.values(), *(p for _, p in pyro.get_param_store().named_parameters())] if held else []
        with frozen_params(params):
            trace = trace_program(fn, batch, s, values, *how)
            for _, node in sample_sites(trace) if held else ():  # some distributions ask their network only now
                node["ppvae_log_prob"] = node_log_prob(node)
            return trace

    detached = (lambda _, value: value.detach()) if "latents" in frozen else None
    at, noise = given, None
    if "guide" in frozen or entry is not None:
        noise = ReplayNoise(batch)
        with buffer_copies():
            drawn = trace_program(guide, batch, s, given, None, num_particles, detached, noise)
        paths = {n: node["value"] for n, node in sample_sites(drawn) if s.guide_roles.get(n) != "enumerated"}
        # never the value itself: a flow that knows what it was made from would go back by live parameters
        paths = {n: value.view_as(value) if entry is None else entry(n, value) for n, value in paths.items()}
        at = {**given, **paths, **({s.plate: drawn.nodes[s.plate]["value"]} if s.draws_subsample else {})}
        noise.again()
    guide_trace = run(guide, at, "guide" in frozen, None, num_particles, detached, noise)
    unseen = {name: value for name, value in given.items() if name not in guide_trace}
    model_trace = run(model, unseen, "model" in frozen, guide_trace, num_particles)
    return model_trace, guide_trace


def params_of(trace: Any) -> dict[str, Tensor]:
    """The unconstrained parameter tensors that a trace met, by name."""
    found = {}
    for name, node in trace.nodes.items():
        if node["type"] == "param":
            value = node["value"]
            source = getattr(value, "_pyro_unconstrained_param", None)
            found[name] = source if source is not None else value.unconstrained()
    return found


def as_batch(batch: Tensor | Sequence[Any]) -> tuple[Any, ...]:
    """A batch as the tuple of arguments that the pair is called with."""
    return tuple(batch) if isinstance(batch, list | tuple) else (batch,)


def explain_failure(error: Exception, sizes: str) -> ContractError:
    """The error for a pair that could not run, with what to look at."""
    text = " ".join(str(error).split())[:300]
    if "must be sampled in trace" in text:
        name = text.removeprefix("site ").split(" must")[0]
        return refused(
            name, "a guide that samples latents only", "a site with obs=", "move the observation to the model"
        )
    if "plate" in text and ("hape mismatch" in text or "invalid shape" in text):
        return ContractError(
            f"{text}. Expected one rightmost plate over the batch {sizes}; declare the dims of one event with "
            f".to_event(n), and size the plate by the batch, as in pyro.plate('data', len(x))"
        )
    return ContractError(
        f"the pair could not run on a batch of shape {sizes}: {type(error).__name__}: {text}. "
        f"Check that the networks fit the data and that model(*batch) and guide(*batch) take these arguments"
    )
