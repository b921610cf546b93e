"""Supports, masks, sizes and base measures of distributions, and the check that observed values lie in a support."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints

from ppvae.errors import DataError, site_error
from ppvae.inference.tracing import event_dim, has_dependent_support, support_of

UNBOUNDED = (constraints.real, constraints.real_vector, constraints.dependent)  # what NaN alone violates
# what torch factorises when it makes the distribution, which raises an exception
UNCHECKED = (type(constraints.positive_definite), type(constraints.dependent), constraints.dependent_property)
FEWEST_DRAWS, LARGEST_EQUAL_SHARE = 20, 0.2  # of draws in a row, for draws that coincide
PARAMETER_CURE = (
    "bound what a network gives, as by softplus or sigmoid, or pass logits; give a pyro.param a constraint, as in "
    "pyro.param('p', p, constraint=constraints.unit_interval)"
)


def check_run(terms: Any, rows: Tensor | None = None) -> None:
    """Checks parameters, the guide's draws and observed values of `Terms`, whose batch holds `rows` of the data.

    Raises:
        DataError, ContractError: one that its distribution does not take, by site and row.
    """
    for name, site in (*terms.guide.items(), *terms.model.items()):
        check_parameters(name, site.distribution, rows)
    for name, site in terms.guide.items() if not terms.structure.enumerated else ():
        check_draws_differ(name, site.distribution, site.value, rows)
    for name, site in ((n, terms.model[n]) for n in terms.structure.unmasked if n in terms.model):
        check_support(name, {"fn": site.distribution, "value": site.value, "mask": None}, rows)


def check_support(name: str, node: dict[str, Any], rows: Tensor | None = None) -> None:
    """Raises DataError where an observed value lies outside its distribution's support, naming value and place.

    `rows` are those of the data that the batch holds; by default 0, 1, ...
    """
    inside = _inside(node)
    if inside is None or bool(inside.all()):
        return
    fn, value = node["fn"], node["value"]
    at = (~inside).nonzero()[0].tolist()
    axis = value.dim() - 1 - event_dim(node)
    where = _row_in_words(at[axis], rows) if axis >= 0 else f"position {at}"
    where += f", position {at[axis + 1 :]}" if axis >= 0 and len(at) > axis + 1 else ""
    raise DataError(
        f"site {name!r}: {type(base_distribution(fn)).__name__} takes values in "
        f"{support_name(base_support(support_of(fn)))}; found {value[tuple(at)].flatten()[0].item():g} at {where}. "
        f"{_cure(fn)}"
    )


def _inside(node: dict[str, Any]) -> Tensor | None:
    """Whether each observed element lies in its support or is masked; None where every value does."""
    fn, value = node["fn"], node["value"]
    support = base_support(support_of(fn))
    if support in (None, constraints.real, constraints.real_vector) or value is None or has_dependent_support(fn):
        return None
    try:
        inside: Tensor = support.check(value)
    except (NotImplementedError, RuntimeError, ValueError):
        return None
    mask = mask_of(node)
    if isinstance(mask, Tensor):
        for _ in range(min(value.dim() - inside.dim(), mask.dim())):  # a support of vectors is checked once a vector
            mask = mask.any(-1)
        inside = inside | ~mask
    return inside


def _row_in_words(row: int, rows: Tensor | None) -> str:
    return f"row {row if rows is None else int(rows[row % len(rows)])}"  # particles may be folded into the batch


def check_parameters(name: str, fn: Any, rows: Tensor | None = None) -> None:
    """Raises ContractError where a distribution's parameter violates its constraint, as Pyro's validation does.

    NaN passes: it makes the density NaN, which results flag.
    """
    for owner, parameter, constraint, value, invalid in _constrained_parameters(fn):
        if not bool(invalid.any()):
            continue
        at = tuple(invalid.nonzero()[0].tolist())
        axis = len(getattr(fn, "batch_shape", ())) - 1
        on_rows = 0 <= axis < invalid.dim() and invalid.shape[axis] > 1
        where = f" at {_row_in_words(at[axis], rows)}" if on_rows else ""
        wanted = support_name(base_support(constraint))
        raise site_error(
            name, f"{parameter!r} of {type(owner).__name__} in {wanted}",
            f"{value[at].flatten()[0].item():g}{where}", PARAMETER_CURE,
        )  # fmt: skip


def check_draws_differ(name: str, fn: Any, draws: Tensor, rows: Tensor | None = None) -> None:
    """Raises ContractError where draws [particles, batch, ...] of a continuous latent coincide, as under a point mass.

    A scale below the rounding of the location gives such draws, whose densities belong to other values. Of a density
    that float32 resolves, two draws in a row are equal with a probability under 1e-5.
    """
    if len(draws) < FEWEST_DRAWS or base_support(support_of(fn)) not in UNBOUNDED:
        return
    if isinstance(base_distribution(fn), dist.Delta):
        return
    equal = (draws[1:] == draws[:-1]).double().mean(0) > LARGEST_EQUAL_SHARE
    if bool(equal.any()):
        at = equal.nonzero()[0].tolist()
        raise site_error(
            name, "draws of the guide that differ, as under a density",
            f"equal ones at {_row_in_words(at[0], rows)}, of the value {draws[(0, *at)].item():.6g}: the scale of "
            f"{type(base_distribution(fn)).__name__} is below the rounding of {str(draws.dtype)[6:]}",
            "bound the scale from below, as by softplus(s) + 1e-3, or evaluate the pair and the data in float64",
        )  # fmt: skip


def _constrained_parameters(fn: Any) -> Iterator[tuple[Any, str, Any, Tensor, Tensor]]:
    """(distribution, parameter, constraint, value, which elements violate it) of a distribution and its components."""
    pending = [fn]
    while pending:
        owner = pending.pop()
        held = vars(owner) if hasattr(owner, "__dict__") else {}
        pending += [d for d in held.values() if isinstance(d, torch.distributions.Distribution)]
        for parameter, constraint, check in _checks(type(owner)):  # type: ignore[arg-type]
            value = held.get(parameter)  # one that is computed when it is asked for is not held
            if not isinstance(value, Tensor):
                continue
            value = value.detach()
            if 0 in value.stride():  # equal elements are checked once
                value = value[tuple(slice(0, 1 if step == 0 else None) for step in value.stride())]
            try:
                inside = check(value)
            except (NotImplementedError, RuntimeError, ValueError):
                continue
            yield owner, parameter, constraint, value, ~(inside | _is_nan(value, inside))


@functools.cache
def _checks(cls: type) -> tuple[tuple[str, Any, Callable[[Tensor], Tensor]], ...]:
    """(parameter, constraint, its check) of a class of distributions, where a number can violate it."""
    constraints_of = getattr(cls, "arg_constraints", None)
    found = []
    for name, constraint in constraints_of.items() if isinstance(constraints_of, dict) else ():
        base = base_support(constraint)
        if not isinstance(base, UNCHECKED) and base not in UNBOUNDED:
            found.append((name, constraint, _on_simplex if base is constraints.simplex else constraint.check))
    return tuple(found)


def _is_nan(value: Tensor, inside: Tensor) -> Tensor:
    """Which elements, or vectors where each is checked as a whole, have a NaN."""
    nan = value.isnan()
    return nan.flatten(inside.dim()).any(-1) if nan.dim() > inside.dim() else nan


def _on_simplex(value: Tensor) -> Tensor:
    """Which vectors are proportions; sums of many float32 numbers are allowed their rounding."""
    return (value >= 0).all(-1) & ((value.sum(-1) - 1).abs() < 1e-3)


class RecordValidity(Messenger):
    """Records whether parameters and observed values are what the distributions of a run take.

    Pyro's validation raises an exception at each site; a captured graph can only compute a number.
    """

    def __init__(self) -> None:
        super().__init__()
        self._flags: list[Tensor] = []

    def _pyro_post_sample(self, msg: Any) -> None:
        self._flags += [~invalid.any() for *_, invalid in _constrained_parameters(msg["fn"])]
        inside = _inside(dict(msg)) if msg["is_observed"] else None
        if inside is not None:
            self._flags.append((inside | _is_nan(msg["value"].detach(), inside)).all())

    def nan_unless_valid(self, loss: Any) -> Any:
        """The loss, or NaN where a parameter or value was not valid."""
        if not self._flags:
            return loss
        valid = torch.stack([flag.to(self._flags[0].device) for flag in self._flags]).all()
        if isinstance(loss, Tensor):
            return torch.where(valid.to(loss.device), loss, math.nan)
        return loss if bool(valid) else math.nan


def base_support(support: Any) -> Any:
    """The support of one element of an event: a constraint without declared events."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def support_name(support: Any) -> str:
    """The name of a support in error messages."""
    if support is constraints.boolean:
        return "{0, 1}"
    return str(support).removeprefix("<").removesuffix(">").lower()


def _cure(fn: Any) -> str:
    """The cure for values outside the support of an observed site's distribution."""
    support = base_support(support_of(fn))
    cure = getattr(support, "cure", None)  # a support of this library carries its cure
    if isinstance(cure, str):
        return cure
    if support is constraints.boolean:
        return (
            "Load with binarize='fixed' or 'dynamic', or use a likelihood for grey values: of ppvae.likelihoods, "
            "ContinuousBernoulli, Beta, DiscretizedLogistic, Categorical or Normal"
        )
    choose = "Choose a likelihood whose support holds the data: of ppvae.likelihoods, "
    if support is constraints.nonnegative_integer:
        return f"{choose}Normal, Laplace and StudentT take negative and fractional numbers"
    if isinstance(support, constraints.interval):
        return f"{choose}Normal, Laplace and StudentT take any real number; or scale the data into it"
    return "Choose a likelihood whose support holds the data"


def base_distribution(fn: Any) -> Any:
    """The distribution without masks (`.mask`), declared events (`.to_event`) and expansion by Pyro's default."""
    while isinstance(fn, torch.distributions.Independent | dist.MaskedDistribution | ExpandedDistribution):
        fn = fn.base_dist
    return fn


def is_relaxed(fn: Any) -> bool:
    """Whether a distribution is a continuous relaxation of a discrete one: Pyro's, or one that has `relaxes`."""
    fn = base_distribution(fn)
    kinds = (torch.distributions.RelaxedBernoulli, torch.distributions.RelaxedOneHotCategorical)
    return isinstance(fn, kinds) or bool(getattr(fn, "relaxes", False))


def mask_of(node: dict[str, Any]) -> Any:
    """The mask of a traced site, its distribution's own included, broadcastable to its value; None where there is none.

    A mask over whole events has dims of size one for them, so that it equals the same mask inside of the event.
    """
    fn = node["fn"]
    mask = _with_event_dims(node["mask"], fn)
    while isinstance(fn, torch.distributions.Independent | dist.MaskedDistribution):
        if isinstance(fn, dist.MaskedDistribution):
            own = _with_event_dims(fn._mask, fn)
            mask = own if mask is None else mask & own
        fn = fn.base_dist
    return mask


def same_mask(a: Any, b: Any) -> bool:
    """Whether two masks, as `mask_of` gives them, are the same."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        a, b = torch.broadcast_tensors(a, b)
        return bool((a == b).all())
    return (a is None or a is True) == (b is None or b is True) and isinstance(a, Tensor) == isinstance(b, Tensor)


def _with_event_dims(mask: Any, fn: Any) -> Any:
    if not isinstance(mask, Tensor):
        return mask
    return mask.bool().reshape(*mask.shape, *(1,) * len(getattr(fn, "event_shape", ())))


def without_masks(fn: Any) -> Any:
    """The distribution without its own masks (`.mask`), its declared events kept."""
    if isinstance(fn, dist.MaskedDistribution):
        return without_masks(fn.base_dist)
    if isinstance(fn, torch.distributions.Independent):
        return without_masks(fn.base_dist).to_event(fn.reinterpreted_batch_ndims)
    return fn


def is_factor(node: dict[str, Any]) -> bool:
    """Whether an observed site is a factor and no density: `pyro.factor`, or a Delta with a log-density of its own."""
    fn = base_distribution(node["fn"])
    if isinstance(fn, dist.Delta):
        return bool(node["is_observed"] and (torch.as_tensor(fn.log_density) != 0).any())
    return isinstance(fn, dist.Unit)


def is_improper(node: dict[str, Any]) -> bool:
    """Whether a site's density integrates to infinity."""
    return isinstance(base_distribution(node["fn"]), dist.ImproperUniform)


def is_discrete(fn: Any) -> bool:
    """Whether a distribution has a discrete support; False where it declares no support."""
    return bool(getattr(support_of(fn), "is_discrete", False))


def base_measure(nodes: Iterable[dict[str, Any]]) -> str:
    """The base measure of the observed sites' log-densities: "binary", "256 levels" (or another number), "discrete" for
    other masses, "density on [0, 1]", "density", "mixed" where some are masses and some are densities, or "none"."""
    measures = {measure for node in nodes for measure in _measures(base_distribution(node["fn"]))}
    if not measures:
        return "none"
    if len(measures) == 1:
        return measures.pop()
    densities = {measure for measure in measures if measure.startswith("density")}
    return "mixed" if densities and measures - densities else "density" if densities else "discrete"


def _measures(fn: Any) -> set[str]:
    """The base measures of a distribution's elements."""
    support = support_of(fn)
    return {"density"} if support is None else _measures_of(support)


def _measures_of(support: Any) -> set[str]:
    support = base_support(support)
    if isinstance(parts := getattr(support, "cseq", None), Sequence):  # one support per column
        return {measure for part in parts for measure in _measures_of(part)}
    low, high = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    if not support.is_discrete:
        unit = isinstance(low, int | float) and isinstance(high, int | float) and (low, high) == (0, 1)
        return {"density on [0, 1]" if unit else "density"}
    levels = 2 if support is constraints.boolean else getattr(support, "levels", None)
    if isinstance(low, int) and isinstance(high, int):
        levels = high - low + 1
    return {"binary" if levels == 2 else f"{levels} levels" if levels else "discrete"}


def event_size(node: dict[str, Any]) -> int:
    """The number of elements of a site per datum, over its event and inner plates."""
    shape = getattr(node["fn"], "batch_shape", torch.Size())
    plates = {
        f.dim: f.size if f.size > 0 else shape[f.dim]  # a plate may have no size of its own
        for f in node["cond_indep_stack"]
        if f.dim is not None and f.dim != -1
    }
    inner = 1
    for size in plates.values():
        inner *= size
    return getattr(node["fn"], "event_shape", torch.Size()).numel() * inner
