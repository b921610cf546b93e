"""Supports, masks, sizes and base measures of distributions, and the check that observed values lie in a support."""

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor
from torch.distributions import constraints

from ppvae.errors import DataError, site_error, support_name
from ppvae.inference.structure import Structure
from ppvae.inference.tracing import event_dim, has_dependent_support, node_log_prob, support_of


def check_support(name: str, node: dict[str, Any], rows: Tensor | None = None) -> None:
    """Raises DataError where an observed value lies outside its distribution's support, naming value and place.

    `rows` are those of the data that the batch holds; by default 0, 1, ...
    """
    inside = support_mask(node)
    if inside is None or bool(inside.all()):
        return
    fn, value = node["fn"], node["value"]
    at = (~inside).nonzero()[0].tolist()
    axis = value.dim() - 1 - event_dim(node)
    where = row_in_words(at[axis], rows) if axis >= 0 else f"position {at}"
    where += f", position {at[axis + 1 :]}" if axis >= 0 and len(at) > axis + 1 else ""
    raise DataError(
        f"site {name!r}: {type(base_distribution(fn)).__name__} takes values in "
        f"{support_name(base_support(support_of(fn)))}; found {value[tuple(at)].flatten()[0].item():g} at {where}. "
        f"{_cure(fn, zero=not bool(value[tuple(at)].flatten()[0]))}"
    )


def support_mask(node: dict[str, Any]) -> Tensor | None:
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
    if mask is False:
        return None
    if isinstance(mask, Tensor):
        for _ in range(min(value.dim() - inside.dim(), mask.dim())):  # a support of vectors is checked once a vector
            mask = mask.any(-1)
        inside = inside | ~mask
    return inside


def row_in_words(row: int, rows: Tensor | None) -> str:
    """The row of the data at a place of the batch, which holds `rows`."""
    return f"row {row if rows is None else int(rows[row % len(rows)])}"  # particles may be folded into the batch


def check_type_of_values(name: str, node: dict[str, Any]) -> None:
    """Observed bools and integers have the density of the same numbers in floating point.

    Some distributions compute with the type that they are given: a difference of bools raises, one of uint8 wraps.
    A zero-inflated density is refused as one that adds numbers of two kinds.
    """
    check_zero_inflation(name, node["fn"])
    value = node["value"]
    if not node["is_observed"] or not isinstance(value, Tensor) or value.is_floating_point():
        return
    try:
        expected = node_log_prob({**node, "value": value.to(torch.get_default_dtype())})
    except (ValueError, RuntimeError, IndexError):
        return
    with suppress(NotImplementedError, ValueError, RuntimeError):
        found = node_log_prob(node)
        if torch.allclose(found, expected.to(found), rtol=1e-4, equal_nan=True):
            return
    raise site_error(
        name,
        f"values of a type that {type(base_distribution(node['fn'])).__name__} computes with",
        str(value.dtype).removeprefix("torch."),
        "observe them as floating-point numbers: obs=value.float() in the model, or x.float() as data",
    )


def base_support(support: Any) -> Any:
    """The support of one element of an event: a constraint without declared events."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _cure(fn: Any, zero: bool) -> str:
    """The cure for values, `zero` or others, outside the support of an observed site's distribution."""
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
    if getattr(support, "lower_bound", None) == 0:
        if zero:
            return f"Choose a likelihood whose support holds the data. {_zeros(fn)}"
        return f"{choose}Normal, Laplace and StudentT take any real number"
    return "Choose a likelihood whose support holds the data"


def _zeros(fn: Any) -> str:
    """The cure for zeros under a density of positive numbers."""
    inner = base_distribution(fn)
    inner = getattr(inner, "base_dist", inner) if isinstance(inner, dist.ZeroInflatedDistribution) else inner
    return (
        "Zeros beside positive numbers have a mass of their own: "
        f"ppvae.distributions.ZeroInflated({type(inner).__name__}(...), gate_logits)"
    )


def check_zero_inflation(name: str, fn: Any) -> None:
    """Raises ContractError for Pyro's zero-inflated distribution over a density, which it adds to the mass at zero.

    What it gives at zero is no mass and no density: it is infinite where the density is, and moves with the units.
    """
    fn = base_distribution(fn)
    if isinstance(fn, dist.ZeroInflatedDistribution) and not is_discrete(fn.base_dist):
        inner = type(base_distribution(fn.base_dist)).__name__
        raise site_error(
            name,
            "a zero-inflated distribution over counts",
            f"{type(fn).__name__} over {inner}, whose density at zero it adds to the mass of the gate",
            f"use ppvae.distributions.ZeroInflated({inner}(...), gate_logits), a mass at zero beside the density",
        )


def boundary_note(name: str, node: dict[str, Any]) -> str:
    """The cure for observed numbers at the end of their support, where the density is zero or infinite; else ""."""
    support, value = base_support(support_of(node["fn"])), node["value"]
    support = getattr(support, "base_constraint", support)  # of a mixture
    ends = [
        end
        for end in (getattr(support, k, None) for k in ("lower_bound", "upper_bound"))
        if isinstance(end, int | float)
    ]
    bad = ~torch.isfinite(node_log_prob(node))
    shape = (*bad.shape, *(1,) * event_dim(node))
    for end in ends if value.is_floating_point() and not support.is_discrete else ():
        if bool(((value == end) & bad.reshape(shape)).any()):
            family = type(base_distribution(node["fn"])).__name__
            cure = (
                _zeros(node["fn"])
                if len(ends) == 1 and end == 0
                else "Move the data off the ends, as by dequantisation"
            )
            return (
                f"the density of {family} at site {name!r} is zero or infinite at {end:g}, which the data hold. {cure}"
            )
    return ""


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
    """The mask of a traced site, its distribution's own included, broadcastable to its value; None for none, or True.

    A mask over whole events has dims of size one for them, so that it equals the same mask inside of the event.
    """
    fn = node["fn"]
    mask = _with_event_dims(node["mask"], fn)
    while isinstance(fn, torch.distributions.Independent | dist.MaskedDistribution):
        if isinstance(fn, dist.MaskedDistribution):
            own = _with_event_dims(fn._mask, fn)
            mask = own if mask is None else mask & own
        fn = fn.base_dist
    return None if mask is True else mask


def same_mask(a: Any, b: Any) -> bool:
    """Whether two masks, as `mask_of` gives them, are the same; none is one of ones."""
    a, b = (torch.as_tensor(True if mask is None else mask) for mask in (a, b))
    return bool((a == b).all())


def _with_event_dims(mask: Any, fn: Any) -> Any:
    if not isinstance(mask, Tensor):
        return mask
    return mask.bool().reshape(mask.shape + (1,) * len(getattr(fn, "event_shape", ())))


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


def is_reparameterized(fn: Any) -> bool:
    """Whether a draw is a function of parameters and noise with a gradient; `is_straight_through` only looks so."""
    return bool(getattr(fn, "has_rsample", False)) and not is_discrete(fn)


def is_straight_through(fn: Any) -> bool:
    """Whether draws of a discrete distribution have the gradient of its probabilities, which is biased."""
    return bool(getattr(fn, "has_rsample", False)) and is_discrete(fn)


def base_measure(nodes: Iterable[dict[str, Any]]) -> str:
    """The base measure of the observed sites' log-densities: "binary", "256 levels" (or another number), "discrete" for
    other masses, "density on [0, 1]", "density", "mixed" where some are masses and some are densities, or "none"."""
    measures = {measure for node in nodes for measure in _measures_of(support_of(base_distribution(node["fn"])))}
    if not measures:
        return "none"
    if len(measures) == 1:
        return measures.pop()
    densities = {measure for measure in measures if measure.startswith("density")}
    return "mixed" if densities and measures - densities else "density" if densities else "discrete"


def _measures_of(support: Any) -> set[str]:
    if support is None:
        return {"density"}
    support = base_support(support)
    if getattr(support, "has_point_mass", False):
        return {"discrete", "density"}
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
    return getattr(node["fn"], "event_shape", torch.Size()).numel() * math.prod(plates.values())


MIXED_MEASURE_NOTE = (
    "some numbers have a density and some a mass: log p(x), and bits per dim, move with the units of the real ones; "
    "compare on the same columns in the same units only"
)


def base_measure_of(column: Any, s: Structure) -> tuple[str, int | None, tuple[str, ...]]:
    """(base measure of log p(x), levels if the data are dequantised, notes), given the first column of the data."""
    if s.base_measure == "mixed":
        return "mixed", None, (MIXED_MEASURE_NOTE,)
    if not s.base_measure.startswith("density"):
        return s.base_measure, None, ()
    levels = getattr(column, "levels", None)
    if getattr(column, "dequantize", False) and levels:
        note = f"a lower bound on the log-mass of {levels} levels: the data are uniformly dequantised"
        return f"{levels} levels", levels, (note,)
    if levels:
        note = f"a density evaluated on {levels} discrete levels has no ceiling: load with dequantize=True to compare"
        return "density on [0, 1]", None, (note,)
    known = getattr(column, "base_measure", "")
    return (known if known == "density on [0, 1]" else s.base_measure), None, ()


def count_observed(missing: int, columns: Sequence[Any], s: Structure) -> tuple[float, tuple[str, ...]]:
    """(numbers observed per datum, a note on the others), given how many are missing or masked in all data."""
    if not missing:
        return s.observed_dims, ()
    dims = s.observed_dims - missing / len(columns[0])
    share = 100 * (1 - dims / s.observed_dims)
    kind = "missing" if any(getattr(column, "missing", False) for column in columns) else "masked"
    return dims, (f"{share:.1f} % of the values are {kind}: log p(x) is that of the {dims:.2f} per datum observed",)
