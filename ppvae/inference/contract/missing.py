"""Missing values, NaN in a batch: what a pair makes of them, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from ppvae.errors import ContractError, refused
from ppvae.inference.contract.support import base_distribution, mask_of
from ppvae.inference.structure import Structure
from ppvae.inference.tracing import Program, node_log_prob, sample_sites, trace_pair

LEAVE_OUT = (
    "use ppvae.likelihoods.Mixed, which leaves out what is NaN; or observe torch.nan_to_num(x) under "
    "fn.mask(~x.isnan()).to_event(1), which takes the filled values out of the density and of its gradient"
)
TAKE_IN = (
    "wrap the guide's network in ppvae.nn.Missing, which puts 0 into gaps and adds what is known, or fill them by "
    "torch.nan_to_num(x)"
)


def tensors_with_missing(batch: Sequence[Any]) -> list[Tensor]:
    """The tensors of a batch that have missing values."""
    return [t for t in batch if isinstance(t, Tensor) and t.is_floating_point() and bool(t.isnan().any())]


def missing_mask(value: Tensor, batch: Sequence[Any]) -> Tensor:
    """Where an observed value is missing: NaN, or equal to the data but for what fills their gaps.

    Labels, a vector beside the data, are not looked for: so few numbers may be equal by chance.
    """
    gaps = _isnan(value)
    for t in tensors_with_missing(batch):
        for like in align_missing(value, t) if t is batch[0] or t.dim() > 1 else ():
            known = ~like.isnan()
            if bool(known.any()) and bool((value == like)[known].all()):
                gaps = gaps | ~known
    return gaps


def align_missing(value: Tensor, t: Tensor) -> Iterator[Tensor]:
    """A tensor in the shape of a value: reshaped, and with the data last, as inner plates have them."""
    if t.numel() == value.numel():
        yield t.reshape(value.shape)
        yield t.movedim(0, -1).reshape(value.shape)


def check_missing(model: Mapping[str, Any], guide: Mapping[str, Any], batch: Sequence[Any]) -> None:
    """Raises ContractError where a pair cannot take the missing values of a batch, or takes them for data.

    A guide must give draws and densities that are numbers. An observed site must leave missing values out: by its
    distribution, or by a mask. A gap that is filled without a mask would count as data.
    """
    if not tensors_with_missing(batch):
        return
    for name, node in guide.items():
        if bool(_isnan(node["value"]).any()) or _fails(node):
            raise refused(name, "a guide that takes missing values (NaN)", f"{_fn(node)} that is NaN", TAKE_IN)
    for name, node in model.items():
        value = node["value"]
        uncovered = missing_mask(value, batch) & _kept(node) if node["is_observed"] else _isnan(value)
        count, filled = int(uncovered.sum()), int((uncovered & ~_isnan(value)).sum())
        if filled:
            found = f"{filled} of them observed as the numbers that fill them"
            raise refused(name, "missing values to be left out of the density", found, LEAVE_OUT)
        if _fails(node) or (count and _admits(node) is False):
            found = f"{_fn(node)}, which does not take NaN"
            raise refused(name, "a density that leaves missing values (NaN) out", found, LEAVE_OUT)


def explain_missing_failure(model: Program, guide: Program, batch: Sequence[Any]) -> ContractError | None:
    """The error for a pair that runs where gaps are filled with 0, and not as they are; None for any other failure."""
    if not tensors_with_missing(batch):
        return None
    filled = [t.nan_to_num() if isinstance(t, Tensor) else t for t in batch]
    try:
        sites = [name for name, _ in sample_sites(trace_pair(model, guide, filled, Structure(), {})[1])]
    except Exception:
        return None
    with poutine.trace() as tracer, suppress(Exception):
        guide(*batch)
    stuck = [name for name in sites if name not in tracer.trace]
    if stuck:
        return refused(stuck[0], "a guide that takes missing values (NaN)", "one that fails on them", TAKE_IN)
    return ContractError(f"the model fails on missing values (NaN), and runs where they are filled: {LEAVE_OUT}.")


def _fails(node: Mapping[str, Any]) -> bool:
    """Whether a site's density is NaN, or fails on NaN, as an index does."""
    try:
        return bool(node_log_prob(dict(node)).isnan().any())
    except (ValueError, RuntimeError, IndexError):
        return bool(_isnan(node["value"]).any()) and not _admits(node)


def _admits(node: Mapping[str, Any]) -> bool | None:
    """Whether NaN is in the support; None where that is all numbers, or unknown.

    A density that is a number is no answer: an index or a comparison makes numbers of NaN.
    """
    support, value = getattr(node["fn"], "support", None), node["value"]
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support in (None, constraints.real, constraints.real_vector):
        return None
    try:
        inside = support.check(value)  # of numbers, or of vectors
        return bool(inside[value.isnan().reshape(*inside.shape, -1).any(-1)].all())
    except (NotImplementedError, RuntimeError, ValueError, IndexError):
        return None


def _kept(node: Mapping[str, Any]) -> Tensor:
    """What of a site's value its mask leaves in the density."""
    mask, value = mask_of(dict(node)), node["value"]
    if mask is None or isinstance(mask, bool):
        return torch.full_like(value, mask is not False, dtype=torch.bool)
    return mask.bool().reshape(*mask.shape, *(1,) * max(value.dim() - mask.dim(), 0)).expand(value.shape)


def _isnan(value: Tensor) -> Tensor:
    return value.isnan() if value.is_floating_point() else torch.zeros_like(value, dtype=torch.bool)


def _fn(node: Mapping[str, Any]) -> str:
    return type(base_distribution(node["fn"])).__name__
