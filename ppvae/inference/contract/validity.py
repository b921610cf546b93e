"""Validity of a run: parameters, draws and observed values that the distributions take."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints

from ppvae.errors import site_error, support_name
from ppvae.inference.contract.support import (
    base_distribution,
    base_support,
    check_support,
    row_in_words,
    support_mask,
)
from ppvae.inference.tracing import support_of

UNBOUNDED = (constraints.real, constraints.real_vector, constraints.dependent)  # what NaN alone violates
# what torch factorises when it makes the distribution, which raises an exception
UNCHECKED = (type(constraints.positive_definite), type(constraints.dependent), constraints.dependent_property)
FEWEST_DRAWS, LARGEST_EQUAL_SHARE = 20, 0.2  # of draws in a row, for draws that coincide
PARAMETER_CURE = (
    "bound what a network gives, as by softplus or sigmoid, or pass logits; give a pyro.param a constraint, as in "
    "pyro.param('p', p, constraint=constraints.unit_interval)"
)


def check_run(terms: Any, rows: Tensor | None = None) -> Tensor | None:
    """Checks parameters, the guide's draws and observed values of `Terms`, whose batch holds `rows` of the data.

    Returns the data [batch] whose guide is a point mass, and which have no weights; None for none.

    Raises:
        DataError, ContractError: one that its distribution does not take, by site and row.
    """
    for name, site in (*terms.guide.items(), *terms.model.items()):
        check_parameters(name, site.distribution, rows)
    for name, site in ((n, terms.model[n]) for n in terms.structure.unmasked if n in terms.model):
        check_support(name, {"fn": site.distribution, "value": site.value, "mask": None}, rows)
    sites = terms.guide.items() if not terms.structure.enumerated else ()
    found = [find_equal_draws(name, site.distribution, site.value) for name, site in sites]
    masks = [equal for equal in found if equal is not None and len(equal) == terms.log_weight.shape[-1]]
    return torch.stack(masks).any(0) if masks else None


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
        where = f" at {row_in_words(at[axis], rows)}" if on_rows else ""
        wanted = support_name(base_support(constraint))
        raise site_error(
            name, f"{parameter!r} of {type(owner).__name__} in {wanted}",
            f"{value[at].flatten()[0].item():g}{where}", PARAMETER_CURE,
        )  # fmt: skip


def find_equal_draws(name: str, fn: Any, draws: Tensor) -> Tensor | None:
    """The data [batch] whose draws [particles, *inner, batch, *event] of a continuous latent coincide; None for none.

    A scale below the rounding of the location gives such draws, whose densities belong to other values. Of a density
    that float32 resolves, two draws in a row are equal with a probability under 1e-5; a zero stands where a latent has
    no value, as after the end of a sequence.

    Raises:
        ContractError: those of most data do, as under a point mass.
    """
    if len(draws) < FEWEST_DRAWS or base_support(support_of(fn)) not in UNBOUNDED:
        return None
    if isinstance(base_distribution(fn), dist.Delta):
        return None
    equal = ((draws[1:] == draws[:-1]) & (draws[1:] != 0)).double().mean(0) > LARGEST_EQUAL_SHARE
    equal = equal.flatten(equal.dim() - len(fn.event_shape)).any(-1) if fn.event_shape else equal
    equal = equal.reshape(-1, equal.shape[-1]).any(0) if equal.dim() else equal[None]
    if float(equal.double().mean()) > 0.5:
        raise site_error(
            name, "draws of the guide that differ, as under a density",
            f"equal ones, such as {draws.flatten()[0].item():.6g}: the scale of {type(base_distribution(fn)).__name__} "
            f"is below the rounding of {str(draws.dtype)[6:]}",
            "bound the scale from below, as by softplus(s) + 1e-3, or evaluate the pair and the data in float64",
        )  # fmt: skip
    return equal if bool(equal.any()) else None


def _constrained_parameters(fn: Any) -> Iterator[tuple[Any, str, Any, Tensor, Tensor]]:
    """(distribution, parameter, constraint, value, which elements violate it) of a distribution and its components."""
    pending = [fn]
    while pending:
        owner = pending.pop()
        held = getattr(owner, "__dict__", {})
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
        inside = support_mask(dict(msg)) if msg["is_observed"] else None
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
