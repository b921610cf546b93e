"""Data simulated from a model, as a block of an evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Place:
    """Where numbers of an observed site are in the batch: in a column of the site's shape, or numbers of a column.

    Attributes:
        column: the number of the column.
        of_column, of_site: positions [n] in a row of the column, and in a datum [*inner, *event] of the site, that hold
            the same numbers; None where the column is the site's value as a whole.
    """

    column: int
    of_column: Tensor | None = None
    of_site: Tensor | None = None

    def write(self, value: Tensor, column: Tensor, s: Structure, name: str) -> Tensor:
        """A copy of the column [N, ...] with the site's value at its place."""
        if self.of_column is None or self.of_site is None:
            return value.to(column)
        out = column.flatten(1) if column.dim() > 1 else column[:, None]
        out = out.index_copy(1, self.of_column, _rows_first(value, s, name)[:, self.of_site].to(out))
        return out.reshape(column.shape)


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
        simulated = _site_values(model, block, {**index, **(latents or {})})
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
        for name, value in _site_values(model, out, {**index, **drawn}).items():
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
    found = find_places(model, s, block)
    for name, (places, value) in found.items():
        if not places:
            raise site_error(
                name, "observed values that are numbers of the batch, to put simulated ones in their place",
                f"a tensor of shape {list(value.shape)}, whose numbers are not in it",
                "pass assemble=, a function of (simulated values by site, batch) that gives the batch",
            )  # fmt: skip
    return {name: places for name, (places, _) in found.items()}


def find_places(model: Program, s: Structure, block: Block) -> dict[str, tuple[list[Place], Tensor]]:
    """{observed site: (places in the batch, value)}; no places where its numbers are not those of the batch.

    A site's value is every column that equals it, or consists of numbers of columns: of those that the model stacks
    or joins, or of a part of one. Where the batch is NaN, it equals any number.
    """
    index = {} if block.index is None else {s.plate: block.index}
    rows = [c if block.index is None else c[block.index] for c in block.batch]
    flat = [c.reshape(len(c), -1) for c in rows]
    found, taken = {}, set[tuple[int, int]]()
    for name, value in _site_values(model, block, index).items():
        if s.model_roles.get(name) is not Role.OBSERVED:
            continue
        alike = [i for i, c in enumerate(rows) if c.shape == value.shape]
        places = [Place(i) for i in alike if bool(((rows[i].to(value) == value) | rows[i].isnan()).all())]
        found[name] = places or _numbers_of_columns(_rows_first(value, s, name), flat, taken), value
    return found


def sites_of_columns(model: Program, s: Structure, block: Block) -> dict[int, str]:
    """{column of the batch: the first observed site whose value it is as a whole}."""
    found: dict[int, str] = {}
    for name, (places, _) in find_places(model, s, block).items():
        for place in places:
            if place.of_column is None:
                found.setdefault(place.column, name)
    return found


def _numbers_of_columns(value: Tensor, columns: Sequence[Tensor], taken: set[tuple[int, int]]) -> list[Place]:
    """The places of a site's numbers [N, D] in columns [N, d]; an empty list where one has none.

    Of several equal numbers of the batch, the one after the last found is taken, or the first that no site has yet.
    """
    order = [(i, k) for i, c in enumerate(columns) for k in range(c.shape[1])]
    after = dict(itertools.pairwise(order))
    found: list[tuple[int, int]] = []
    for j in range(value.shape[1]):
        options = _equal_numbers(value[:, j : j + 1], columns)
        following = after.get(found[-1]) if found else None
        if following in options:
            found.append(following)
            continue
        free = [place for place in options if place not in taken and place not in found] or options
        if not free:
            return []
        found.append(free[0])
    taken |= set(found)
    return [
        Place(
            i,
            torch.tensor([k for c, k in found if c == i], device=value.device),
            torch.tensor([j for j, (c, _) in enumerate(found) if c == i], device=value.device),
        )
        for i in sorted({c for c, _ in found})
    ]


def _equal_numbers(value: Tensor, columns: Sequence[Tensor]) -> list[tuple[int, int]]:
    """(column, position) of the numbers that equal a value [N, 1] where they are known, fully missing ones last."""
    known: list[tuple[int, int]] = []
    missing: list[tuple[int, int]] = []
    for i, column in enumerate(columns):
        if len(column) != len(value):
            continue
        gaps = column.isnan()
        for k in ((column.to(value) == value) | gaps).all(0).nonzero().flatten().tolist():
            (missing if bool(gaps[:, k].all()) else known).append((i, k))
    return known + missing


def _rows_first(value: Tensor, s: Structure, name: str) -> Tensor:
    """A site's value [*inner, N, *event] as numbers of each datum, [N, D]."""
    return value.movedim(value.dim() - s.event_dims[name] - 1, 0).reshape(value.shape[-1 - s.event_dims[name]], -1)


def block_columns(block: Block) -> tuple[Tensor, ...]:
    """The columns of a block's batch, without rows of other blocks and padding."""
    return tuple((t if block.index is None else t[block.index])[: block.size] for t in block.batch)


def _site_values(model: Program, block: Block, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of the model's sample sites in one run on a block."""
    with poutine.trace() as tracer, SubstituteValues(given):
        model(*block.batch)
    return {name: node["value"] for name, node in sample_sites(tracer.get_trace())}


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
