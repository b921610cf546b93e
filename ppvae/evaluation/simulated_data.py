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
from ppvae.inference.sites import Place, find_places, site_values
from ppvae.inference.structure import Role, Structure
from ppvae.inference.tracing import Program

Assemble = Callable[[Mapping[str, Tensor], tuple[Tensor, ...]], Any]


Places = Mapping[str, Sequence[Place]]


def simulate_data(
    model: Program,
    s: Structure,
    block: Block,
    assemble: Assemble | None = None,
    latents: Mapping[str, Tensor] | None = None,
    places: Places | None = None,
) -> tuple[Block, dict[str, Tensor]]:
    """A block whose observed values are drawn from the model, and the latents that they were drawn with.

    Latents are {site of the guide: [*inner, batch, *event]}. The simulated values of an observed site replace the
    numbers of the batch that equal its observed values; `assemble`, a function of (simulated values by site, batch),
    gives the batch of a pair without such numbers. `latents` conditions on values of latents. `places`, as
    `observed_places` finds them, saves two runs of the model, for a pair whose simulated values were checked before.

    Raises:
        ContractError: the batch cannot take the simulated values, or the model has terms that are no density, by the
            site's name.
    """
    check_normalized(s, "simulated data")
    index = {} if block.index is None else {s.plate: block.index}
    with poutine.uncondition():
        simulated = site_values(model, block.batch, {**index, **(latents or {})})
    observed = {name: value for name, value in simulated.items() if s.model_roles.get(name) is Role.OBSERVED}
    out = copy(block)
    found: Places = {}
    if assemble is None:
        found = observed_places(model, s, block) if places is None else places
        out.batch = _replace(block, found, observed, s)
    else:
        out.batch = tuple(assemble(observed, block.batch))
    drawn = {name: value for name, value in simulated.items() if name in s.guide_roles}
    if places is None:
        for name, value in site_values(model, out.batch, {**index, **drawn}).items():
            if name not in observed:
                continue
            if not _equal_where_known(value, observed[name].to(value), out, found.get(name, ()), s, name):
                raise site_error(
                    name, "the simulated values once they are in the batch", "others",
                    "pass assemble=, a function of (simulated values by site, batch) that gives the batch",
                )  # fmt: skip
    return out, drawn


def observed_places(model: Program, s: Structure, block: Block) -> dict[str, list[Place]]:
    """The places in the batch of the values of each observed site.

    Raises:
        ContractError: numbers of a site are nowhere in the batch, by its name.
    """
    found = find_places(model, s, block.batch, block.index)
    for name, (places, value) in found.items():
        if not places:
            raise site_error(
                name, "observed values that are numbers of the batch, to put simulated ones in their place",
                f"a tensor of shape {list(value.shape)}, whose numbers are not in it",
                "pass assemble=, a function of (simulated values by site, batch) that gives the batch",
            )  # fmt: skip
    return {name: places for name, (places, _) in found.items()}


def sites_of_columns(model: Program, s: Structure, block: Block) -> dict[int, str]:
    """{column of the batch: the first observed site whose value it is as a whole}."""
    found: dict[int, str] = {}
    for name, (places, _) in find_places(model, s, block.batch, block.index).items():
        for place in places:
            if place.of_column is None:
                found.setdefault(place.column, name)
    return found


def block_columns(block: Block) -> tuple[Tensor, ...]:
    """The columns of a block's batch, without rows of other blocks and padding."""
    return tuple((t if block.index is None else t[block.index])[: block.size] for t in block.batch)


def _replace(block: Block, places: Places, simulated: Mapping[str, Tensor], s: Structure) -> tuple[Tensor, ...]:
    """The batch with the simulated values of each site at its places; what is missing (NaN) stays so."""
    batch = list(block.batch)
    for name, value in simulated.items():
        for place in places[name]:
            i = place.column
            old = batch[i] if block.index is None else batch[i][block.index]
            new = place.write(value, old, s, name)
            if block.has_missing:
                new = torch.where(old.isnan(), old, new)
            batch[i] = new if block.index is None else batch[i].index_copy(0, block.index, new)
    return tuple(batch)


def _equal_where_known(
    value: Tensor, simulated: Tensor, block: Block, places: Sequence[Place], s: Structure, name: str
) -> bool:
    """Whether values are the simulated ones, up to those that are missing in the batch."""
    if not (block.has_missing and value.is_floating_point()):
        return torch.equal(value, simulated)
    if not places:  # the batch is the user's
        return bool(((value == simulated) | missing_mask(value, block.batch)).all())
    for place in places:
        column = block.batch[place.column] if block.index is None else block.batch[place.column][block.index]
        again, expected = (place.write(v, column, s, name) for v in (value, simulated))
        if not bool(((again == expected) | column.isnan()).all()):
            return False
    return True
