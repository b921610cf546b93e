"""Data simulated from a model, put into the batch that the pair is called with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ppvae.errors import site_error
from ppvae.evaluation.blocks import Block
from ppvae.inference.structure import Role, Structure
from ppvae.inference.tracing import Program, Substitute, sample_sites

Assemble = Callable[[Mapping[str, Tensor], tuple[Tensor, ...]], Any]


def simulate_data(
    model: Program, s: Structure, block: Block, assemble: Assemble | None = None
) -> tuple[Block, dict[str, Tensor]]:
    """A block whose observed values are drawn from the model, and the latents that they were drawn with.

    Latents are {site of the guide: [*inner, batch, *event]}. Each observed value goes where its site found the one
    before: into the column of the batch that equals it; `assemble`, a function of (simulated values by site, batch),
    gives the batch where that does not do.

    Raises:
        ContractError: simulated values cannot be put into the batch, by the site's name.
    """
    given = {} if block.index is None else {s.plate: block.index}
    with poutine.trace() as tracer, poutine.uncondition(), Substitute(given):
        model(*block.batch)
    drawn = {name: node["value"] for name, node in sample_sites(tracer.get_trace())}
    seen = {name: value for name, value in drawn.items() if s.model_roles.get(name) is Role.OBSERVED}
    batch = _placed(model, s, block, seen) if assemble is None else tuple(assemble(seen, block.batch))
    out = replaced(block, batch)
    latents = {name: value for name, value in drawn.items() if name in s.guide_roles}
    with poutine.trace() as tracer, Substitute({**given, **latents}):
        model(*out.batch)
    for name, node in sample_sites(tracer.get_trace()):
        if s.model_roles.get(name) is Role.OBSERVED and not torch.equal(node["value"], seen[name].to(node["value"])):
            raise site_error(
                name, "the simulated values once they are in the batch", "others",
                "pass assemble=, a function of (simulated values by site, batch) that gives the batch",
            )  # fmt: skip
    return out, latents


def replaced(block: Block, batch: tuple[Tensor, ...]) -> Block:
    """A block with another batch."""
    out = Block.__new__(Block)
    vars(out).update(vars(block) | {"batch": batch})
    return out


def _placed(model: Program, s: Structure, block: Block, seen: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The batch with each simulated value in the column that its site observed."""
    given = {} if block.index is None else {s.plate: block.index}
    with poutine.trace() as tracer, Substitute(given):
        model(*block.batch)
    batch = list(block.batch)
    for name, node in sample_sites(tracer.get_trace()):
        if name not in seen:
            continue
        rows = [c if block.index is None else c[block.index] for c in block.batch]
        at = [i for i, c in enumerate(rows) if c.shape == node["value"].shape and torch.equal(c, node["value"])]
        if not at:
            raise site_error(
                name, "observed values that are a column of the batch, to put simulated ones in their place",
                f"a tensor of shape {list(node['value'].shape)} that is none of them",
                "pass assemble=, a function of (simulated values by site, batch) that gives the batch",
            )  # fmt: skip
        for i in at:
            value = seen[name].to(batch[i])
            batch[i] = value if block.index is None else batch[i].index_copy(0, block.index, value)
    return tuple(batch)
