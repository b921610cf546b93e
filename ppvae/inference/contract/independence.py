"""Independence of the data given their latents: the density of a datum depends on its own row alone.

The model runs on batches in which some rows stay, with their latents, while all others become copies of these: the
densities of rows that stay must stay, too. The guide may look at any row.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ppvae.errors import site_error
from ppvae.inference.contract.rows import (
    close,
    row_log_prob,
    run_at,
    sampled_values,
    take_batch_rows,
    take_value_rows,
)
from ppvae.inference.contract.support import base_distribution
from ppvae.inference.tracing import Nodes, Program

CURE = (
    "no datum has a log p(x) of its own then: let its density read its row alone, as batch norm with "
    "track_running_stats=True does; rows that belong together, as the nodes of a graph, are one datum x[None]"
)


def check_independence(
    model: Program, batch: Sequence[Any], nodes: Nodes, plate: str, index: Tensor | None = None
) -> None:
    """The density of a datum at each site of the model stays where the other rows, with their latents, change.

    Args:
        plate: name of the data plate.
        index: the rows that the plate draws, where the pair is called with the whole data set.
    """
    inside = {n: node for n, node in nodes.items() if any(f.name == plate for f in node["cond_indep_stack"])}
    size = next(f.size for node in inside.values() for f in node["cond_indep_stack"] if f.name == plate)
    values = sampled_values(nodes)
    before = run_at(model, batch, values if index is None else values | {plate: index})
    for rows in replacements(size):
        moved = take_value_rows(values, rows, size, inside)
        if index is not None:
            moved[plate] = index[rows.to(index.device)]
        data = take_batch_rows(batch, rows, size) if index is None else batch
        try:
            after = run_at(model, data, moved)
        except (ValueError, RuntimeError, IndexError, KeyError):  # a model that takes no copies of rows
            continue
        kept = rows == torch.arange(size)
        for name in inside:
            old = row_log_prob(before[name])
            # a longest sequence that is gone takes sites with it, which are masked in all rows that stay
            new = row_log_prob(after[name]) if name in after else torch.zeros_like(old)
            check_density_kept(name, old, new, kept)


def replacements(size: int) -> Iterator[Tensor]:
    """Rows [size] in which a random half stays and the others are copies of these; then the other half stays."""
    if size < 2:
        return
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(size, generator=generator)
    for kept, replaced in ((order[: size // 2], order[size // 2 :]), (order[size // 2 :], order[: size // 2])):
        rows = torch.arange(size)
        rows[replaced] = kept[torch.randint(len(kept), (len(replaced),), generator=generator)]
        yield rows


def check_density_kept(name: str, before: Tensor, after: Tensor, kept: Tensor) -> None:
    kept = kept.to(before.device)
    changed = kept & ~close(before, after)
    if bool(changed.any()):
        row = int(changed.nonzero()[0])
        raise site_error(
            name,
            "a density of each datum that depends on its own row alone, given its latents",
            f"log p of row {row} moving from {before[row]:.4g} to {after[row]:.4g} as other rows change",
            CURE,
        )


def couples_rows(model: Program, batch: Sequence[Any], nodes: Nodes, name: str) -> bool:
    """Whether an observation outside every plate has all rows of the batch in its event, and they are dependent."""
    size, node = len(batch[0]), nodes[name]
    if node["value"].shape[:1] != (size,):
        return False
    values = sampled_values(nodes)
    before = _factors(run_at(model, batch, values)[name])
    if before.shape[:1] != (size,):  # one density for all rows, as of a multivariate normal
        return True
    for rows in replacements(size):
        moved = {n: v.index_select(0, rows) if v.shape[:1] == (size,) else v for n, v in values.items()}
        after = _factors(run_at(model, take_batch_rows(batch, rows, size), moved)[name])
        kept = rows == torch.arange(size)
        if not bool(close(before[kept], after[kept]).all()):
            return True
    return False


def _factors(node: dict[str, Any]) -> Tensor:
    """The log-densities of an observation before the sum over its declared event."""
    return base_distribution(node["fn"]).log_prob(node["value"])


def check_not_coupled(model: Program, batch: Sequence[Any], nodes: Nodes, name: str) -> None:
    """An observation outside every plate that couples the rows is told as what it is: no plate would part them."""
    if couples_rows(model, batch, nodes, name):
        raise site_error(
            name,
            "an observation for each datum, in a plate over independent data",
            f"one that couples all {len(batch[0])} rows of the batch",
            CURE,
        )
