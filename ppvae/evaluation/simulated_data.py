"""Data simulated from a model, as a block of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ppvae.errors import site_error
from ppvae.evaluation.blocks import Block
from ppvae.inference.contract.scales_and_factors import check_normalized
from ppvae.inference.structure import Role, Structure
from ppvae.inference.tracing import Program, SubstituteValues, sample_sites

Assemble = Callable[[Mapping[str, Tensor], tuple[Tensor, ...]], Any]


def simulate_data(
    model: Program, s: Structure, block: Block, assemble: Assemble | None = None
) -> tuple[Block, dict[str, Tensor]]:
    """A block whose observed values are drawn from the model, and the latents that they were drawn with.

    Latents are {site of the guide: [*inner, batch, *event]}. The simulated values of an observed site replace the
    column of the batch that equals its observed values; `assemble`, a function of (simulated values by site, batch),
    gives the batch of a pair without such a column.

    Raises:
        ContractError: the batch cannot take the simulated values, or the model has terms that are no density, by the
            site's name.
    """
    check_normalized(s, "simulated data")
    index = {} if block.index is None else {s.plate: block.index}
    with poutine.uncondition():
        simulated = _site_values(model, block, index)
    observed = {name: value for name, value in simulated.items() if s.model_roles.get(name) is Role.OBSERVED}
    out = copy(block)
    if assemble is None:
        out.batch = _replace_columns(block, _site_values(model, block, index), observed)
    else:
        out.batch = tuple(assemble(observed, block.batch))
    latents = {name: value for name, value in simulated.items() if name in s.guide_roles}
    for name, value in _site_values(model, out, {**index, **latents}).items():
        if name in observed and not torch.equal(value, observed[name].to(value)):
            raise site_error(
                name, "the simulated values once they are in the batch", "others",
                "pass assemble=, a function of (simulated values by site, batch) that gives the batch",
            )  # fmt: skip
    return out, latents


def block_columns(block: Block) -> tuple[Tensor, ...]:
    """The columns of a block's batch, without rows of other blocks and padding."""
    return tuple((t if block.index is None else t[block.index])[: block.size] for t in block.batch)


def _site_values(model: Program, block: Block, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of the model's sample sites in one run on a block."""
    with poutine.trace() as tracer, SubstituteValues(given):
        model(*block.batch)
    return {name: node["value"] for name, node in sample_sites(tracer.get_trace())}


def _replace_columns(block: Block, before: Mapping[str, Tensor], simulated: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The batch with the simulated values of each site in the columns that equal the site's values `before`."""
    batch = list(block.batch)
    rows = [c if block.index is None else c[block.index] for c in block.batch]
    for name, value in before.items():
        if name not in simulated:
            continue
        columns = [i for i, c in enumerate(rows) if c.shape == value.shape and torch.equal(c.to(value), value)]
        if not columns:
            raise site_error(
                name, "observed values that are a column of the batch, to put simulated ones in their place",
                f"a tensor of shape {list(value.shape)} that is none of them",
                "pass assemble=, a function of (simulated values by site, batch) that gives the batch",
            )  # fmt: skip
        for i in columns:
            new = simulated[name].to(batch[i])
            batch[i] = new if block.index is None else batch[i].index_copy(0, block.index, new)
    return tuple(batch)
