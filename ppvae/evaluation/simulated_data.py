"""Data simulated from a model, as a block of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ppvae.errors import site_error
from ppvae.evaluation.blocks import Block
from ppvae.inference.contract.missing import missing_mask
from ppvae.inference.contract.scales_and_factors import check_normalized
from ppvae.inference.structure import Role, Structure
from ppvae.inference.tracing import Program, SubstituteValues, sample_sites

Assemble = Callable[[Mapping[str, Tensor], tuple[Tensor, ...]], Any]


def simulate_data(
    model: Program,
    s: Structure,
    block: Block,
    assemble: Assemble | None = None,
    latents: Mapping[str, Tensor] | None = None,
    columns: Mapping[str, Sequence[int]] | None = None,
) -> tuple[Block, dict[str, Tensor]]:
    """A block whose observed values are drawn from the model, and the latents that they were drawn with.

    Latents are {site of the guide: [*inner, batch, *event]}. The simulated values of an observed site replace the
    column of the batch that equals its observed values; `assemble`, a function of (simulated values by site, batch),
    gives the batch of a pair without such a column. `latents` conditions on values of latents. `columns`, as
    `observed_columns` finds them, saves two runs of the model, for a pair whose simulated values were checked before.

    Raises:
        ContractError: the batch cannot take the simulated values, or the model has terms that are no density, by the
            site's name.
    """
    check_normalized(s, "simulated data")
    index = {} if block.index is None else {s.plate: block.index}
    with poutine.uncondition():
        simulated = _site_values(model, block, {**index, **(latents or {})})
    observed = {name: value for name, value in simulated.items() if s.model_roles.get(name) is Role.OBSERVED}
    out = copy(block)
    if assemble is None:
        found = observed_columns(model, s, block) if columns is None else columns
        out.batch = _replace_columns(block, found, observed)
    else:
        out.batch = tuple(assemble(observed, block.batch))
    drawn = {name: value for name, value in simulated.items() if name in s.guide_roles}
    if columns is None:
        for name, value in _site_values(model, out, {**index, **drawn}).items():
            if name in observed and not _equal_where_known(value, observed[name].to(value), out):
                raise site_error(
                    name, "the simulated values once they are in the batch", "others",
                    "pass assemble=, a function of (simulated values by site, batch) that gives the batch",
                )  # fmt: skip
    return out, drawn


def observed_columns(model: Program, s: Structure, block: Block) -> dict[str, list[int]]:
    """The columns of the batch that equal the values of each observed site; where it is NaN, a column equals all.

    Raises:
        ContractError: a site observes no column, by its name.
    """
    index = {} if block.index is None else {s.plate: block.index}
    rows = [c if block.index is None else c[block.index] for c in block.batch]
    found = {}
    for name, value in _site_values(model, block, index).items():
        if s.model_roles.get(name) is not Role.OBSERVED:
            continue
        alike = [i for i, c in enumerate(rows) if c.shape == value.shape]
        found[name] = [i for i in alike if bool(((rows[i].to(value) == value) | rows[i].isnan()).all())]
        if not found[name]:
            raise site_error(
                name, "observed values that are a column of the batch, to put simulated ones in their place",
                f"a tensor of shape {list(value.shape)} that is none of them",
                "pass assemble=, a function of (simulated values by site, batch) that gives the batch",
            )  # fmt: skip
    return found


def block_columns(block: Block) -> tuple[Tensor, ...]:
    """The columns of a block's batch, without rows of other blocks and padding."""
    return tuple((t if block.index is None else t[block.index])[: block.size] for t in block.batch)


def _site_values(model: Program, block: Block, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of the model's sample sites in one run on a block."""
    with poutine.trace() as tracer, SubstituteValues(given):
        model(*block.batch)
    return {name: node["value"] for name, node in sample_sites(tracer.get_trace())}


def _replace_columns(
    block: Block, columns: Mapping[str, Sequence[int]], simulated: Mapping[str, Tensor]
) -> tuple[Tensor, ...]:
    """The batch with the simulated values of each site in its columns; what is missing (NaN) stays so."""
    batch = list(block.batch)
    for name, value in simulated.items():
        for i in columns[name]:
            old = batch[i] if block.index is None else batch[i][block.index]
            new = value.to(old)
            if block.has_missing:
                new = torch.where(old.isnan(), old, new)
            batch[i] = new if block.index is None else batch[i].index_copy(0, block.index, new)
    return tuple(batch)


def _equal_where_known(value: Tensor, simulated: Tensor, block: Block) -> bool:
    """Whether values are the simulated ones, up to those that are missing in the batch."""
    if block.has_missing and value.is_floating_point():
        return bool(((value == simulated) | missing_mask(value, block.batch)).all())
    return torch.equal(value, simulated)
