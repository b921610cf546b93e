"""Missing values (NaN in a batch): an observed site must leave them out of its density, a guide must take them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from ppvae.errors import ContractError, site_error
from ppvae.inference.contract.support import base_distribution, base_support, mask_of
from ppvae.inference.structure import Structure
from ppvae.inference.tracing import Program, node_log_prob, sample_sites, support_of, trace_pair

LEAVE_OUT = (
    "use ppvae.likelihoods.Mixed, which leaves out what is NaN; or observe torch.nan_to_num(x) under "
    "fn.mask(~x.isnan()).to_event(1), which takes the filled values out of the density and of its gradient"
)
MANY = 10  # whole numbers that agree by chance with a probability under 0.001, if there are two of them
TAKE_IN = (
    "wrap the guide's network in ppvae.nn.Missing, which puts 0 into gaps and adds what is known, or fill them by "
    "torch.nan_to_num(x)"
)


def tensors_with_missing(batch: Sequence[Any]) -> list[Tensor]:
    """The tensors of a batch that contain missing values."""
    return [t for t in batch if isinstance(t, Tensor) and t.is_floating_point() and bool(t.isnan().any())]


def missing_mask(value: Tensor, batch: Sequence[Any]) -> Tensor:
    """A mask of the missing elements of an observed value: NaN, or filled where the value else equals the data.

    A vector after the first column, such as labels, counts where the value is no other column, and where its numbers
    do not agree by chance, as few labels may.
    """
    gaps, vectors, explained = _isnan(value), list[Tensor](), False
    for t in tensors_with_missing(batch):
        for like in align_missing(value, t):
            known = ~like.isnan()
            if not (bool(known.any()) and bool((value == like)[known].all())):
                continue
            if t is batch[0] or t.dim() > 1:
                gaps, explained = gaps | ~known, True
            elif int(known.sum()) >= MANY or bool((like != like.round())[known].any()):
                vectors.append(~known)
    if not vectors or explained or any(_equals(value, t) for t in batch):
        return gaps
    return gaps | min(vectors, key=lambda missing: int(missing.sum()))


def _equals(value: Tensor, column: Any) -> bool:
    """Whether a value is a column of the batch, as it is."""
    if not isinstance(column, Tensor):
        return False
    return any(bool((value == like).all()) for like in align_missing(value, column))


def count_missing(site: Any, axis: int, size: int, batch: Sequence[Any]) -> int:
    """The missing elements of the first `size` data of an observed site: NaN, filled, or left out by a mask.

    `site` has a value, its value and its mask in the shape of the run, and the data along `axis` of both values.
    """
    value, mask, traced = site.value.narrow(axis, 0, size), site.mask, site.traced_value
    if mask is None:
        return int(missing_mask(value, batch).sum()) if tensors_with_missing(batch) else 0
    if not isinstance(mask, Tensor):
        return 0 if mask else value.numel()
    mask = mask[(0,) * max(0, mask.dim() - traced.dim())]  # of the first particle
    return int((missing_mask(value, batch) | ~mask.expand(traced.shape).narrow(axis, 0, size)).sum())


def align_missing(value: Tensor, t: Tensor) -> Iterator[Tensor]:
    """A column of the batch in the shape of a value: reshaped, and with the data last, as under inner plates."""
    if t.numel() == value.numel():
        yield t.reshape(value.shape)
        yield t.movedim(0, -1).reshape(value.shape)


def check_missing(model: Mapping[str, Any], guide: Mapping[str, Any], batch: Sequence[Any]) -> None:
    """Raises ContractError where a pair fails on the missing values of a batch, or takes them for data.

    Draws and densities of the guide must not be NaN. An observed site must leave missing values out, by its
    distribution or by a mask. A missing value that is filled without a mask would count as data.
    """
    if not tensors_with_missing(batch):
        return
    for name, node in guide.items():
        check_guide_takes_missing(name, node)
    for name, node in model.items():
        value = node["value"]
        uncovered = missing_mask(value, batch) & _in_density(node) if node["is_observed"] else _isnan(value)
        check_not_filled(name, int((uncovered & ~_isnan(value)).sum()))
        check_left_out(name, node, bool(uncovered.any()))


def check_guide_takes_missing(name: str, node: Mapping[str, Any]) -> None:
    """The guide's draws and densities are finite where values are missing."""
    if bool(_isnan(node["value"]).any()) or _density_fails(node):
        raise site_error(name, "a guide that takes missing values (NaN)", f"{_family(node)} that is NaN", TAKE_IN)


def check_not_filled(name: str, filled: int) -> None:
    """No missing value is observed as the number that fills it."""
    if filled:
        found = f"{filled} of them observed as the numbers that fill them"
        raise site_error(name, "missing values to be left out of the density", found, LEAVE_OUT)


def check_left_out(name: str, node: Mapping[str, Any], has_missing: bool) -> None:
    """A site's density is a number where its value is missing."""
    if _density_fails(node) or (has_missing and _support_admits_nan(node) is False):
        found = f"{_family(node)}, which does not take NaN"
        raise site_error(name, "a density that leaves missing values (NaN) out", found, LEAVE_OUT)


def explain_missing_failure(model: Program, guide: Program, batch: Sequence[Any]) -> ContractError | None:
    """The error for a pair that fails on missing values and runs where they are filled; None for other failures."""
    if not tensors_with_missing(batch):
        return None
    filled = [t.nan_to_num() if isinstance(t, Tensor) else t for t in batch]
    with poutine.trace() as of_filled, suppress(Exception):
        guide(*filled)
    sites = [name for name, _ in sample_sites(of_filled.trace)]
    with poutine.trace() as tracer, suppress(Exception):
        guide(*batch)
    unreached = [name for name in sites if name not in tracer.trace]
    if unreached:
        return site_error(unreached[0], "a guide that takes missing values (NaN)", "one that fails on them", TAKE_IN)
    try:
        trace_pair(model, guide, filled, Structure(), {})
    except Exception:
        return None
    return ContractError(f"the model fails on missing values (NaN), and runs where they are filled: {LEAVE_OUT}.")


def _density_fails(node: Mapping[str, Any]) -> bool:
    """Whether a site's density is NaN, or fails on NaN, as an index does."""
    try:
        return bool(node_log_prob(dict(node)).isnan().any())
    except (ValueError, RuntimeError, IndexError):
        return bool(_isnan(node["value"]).any()) and not _support_admits_nan(node)


def _support_admits_nan(node: Mapping[str, Any]) -> bool | None:
    """Whether NaN is in the support; None where the support is all real numbers, or unknown.

    A finite density does not decide it: an index or a comparison turns NaN into a number.
    """
    support, value = base_support(support_of(node["fn"])), node["value"]
    if support in (None, constraints.real, constraints.real_vector):
        return None
    try:
        inside = support.check(value)  # per number, or per vector
        return bool(inside[value.isnan().reshape(*inside.shape, -1).any(-1)].all())
    except (NotImplementedError, RuntimeError, ValueError, IndexError):
        return None


def _in_density(node: Mapping[str, Any]) -> Tensor:
    """A mask of the elements of a site's value that count in its density."""
    mask, value = mask_of(dict(node)), node["value"]
    if mask is None or isinstance(mask, bool):
        return torch.full_like(value, mask is not False, dtype=torch.bool)
    return mask.expand(value.shape)


def _isnan(value: Tensor) -> Tensor:
    return value.isnan() if value.is_floating_point() else torch.zeros_like(value, dtype=torch.bool)


def _family(node: Mapping[str, Any]) -> str:
    return type(base_distribution(node["fn"])).__name__
