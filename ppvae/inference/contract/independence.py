"""Independence of the data given their latents: the density of a datum depends on its own row alone.

The model runs on batches in which some rows stay, with their latents, while all others become copies of these: the
densities of rows that stay must stay, too. The guide may look at any row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro.distributions import Delta
from torch import Tensor

from ppvae.errors import ContractError, site_error
from ppvae.inference.contract.support import base_distribution
from ppvae.inference.structure import Role, Structure
from ppvae.inference.tracing import Nodes, Program, event_dim, node_log_prob, sample_sites, trace_program
from ppvae.rng import fork_all_rngs, seed_all

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
    given = values if index is None else values | {plate: index}
    before = run_at(model, batch, given)
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
            try:
                check_density_kept(name, old, new, kept)
            except ContractError:
                check_same_noise(name, old, row_log_prob(run_at(model, batch, given)[name]))
                raise


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
    """The densities [rows] of the rows that were kept are those of before."""
    changed = kept.to(before.device) & ~close(before, after)
    if bool(changed.any()):
        row = int(changed.nonzero()[0])
        raise site_error(
            name,
            "a density of each datum that depends on its own row alone, given its latents",
            f"log p of row {row} moving from {before[row]:.4g} to {after[row]:.4g} as other rows change",
            CURE,
        )


def check_same_noise(name: str, first: Tensor, second: Tensor) -> None:
    """Two runs of the same rows at one seed have the same densities."""
    changed = ~close(first, second)
    if bool(changed.any()):
        row = int(changed.nonzero()[0])
        raise site_error(
            name,
            "random numbers that the seed of torch, NumPy or Python's random gives",
            f"log p of row {row} of {first[row]:.4g} and of {second[row]:.4g} in two runs of the same rows at one seed",
            "draw them without a generator of their own (torch.Generator, numpy.random.default_rng), as by "
            "torch.randn, or make them a latent",
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


# -- given the global latents ------------------------------------------------------------------------------------------


def check_globals_sampled(nodes: Nodes, s: Structure) -> None:
    """No global latent is summed out: the data are independent given one of its values, not given their sum."""
    for name in s.enumerated:
        if name in s.global_sites and name in nodes:
            raise site_error(
                name, "global latents that the guide samples, for a weight of each datum given them",
                "one that is summed out, with all data together", "sample it in the guide, without enumerating it",
            )  # fmt: skip


def check_images_of_globals(
    model: Nodes, guide: Program, batch: Sequence[Any], s: Structure, index: Tensor | None = None
) -> None:
    """No local latent is the image of an auxiliary site of all data, as under one AutoMultivariateNormal for both."""
    helpers = [n for n, role in s.guide_roles.items() if role is Role.AUXILIARY and n in s.global_sites]
    if not helpers:
        return
    first, second = _with_other_local_noise(guide, batch, s, index)
    for name, node in first.items():
        image = name in model and isinstance(base_distribution(node["fn"]), Delta) and name not in s.global_sites
        if not image or isinstance(base_distribution(model[name]["fn"]), Delta):
            continue
        if bool(close(node["value"], second[name]["value"]).all()):
            raise site_error(
                name, "a local latent with a density of its own in the guide, given the global latents",
                f"an image of {helpers[0]!r}, which all data share, so that weights are joint",
                "guide local latents by an amortised density or AutoNormal, and the global ones by a part of "
                "AutoGuideList",
            )  # fmt: skip


def check_globals_first(
    model: Program, guide: Program, batch: Sequence[Any], s: Structure, index: Tensor | None = None
) -> None:
    """The densities of global sites, in model and guide, depend on no local latent."""
    first, second = runs = _with_other_local_noise(guide, batch, s, index)
    shared = {n: first[n]["value"] for n in first if n in s.global_sites} | ({} if index is None else {s.plate: index})
    values = [sampled_values(nodes) | shared for nodes in runs]
    pairs = [(first, second), tuple(run_at(model, batch, at) for at in values)]
    for one, two in pairs:
        for name in (n for n in one if n in s.global_sites and n in two):
            if not bool(close(node_log_prob(one[name]), node_log_prob(two[name])).all()):
                raise site_error(
                    name, "a global site whose density depends on no local latent, for a weight of each datum given it",
                    "one that depends on a local latent, so that weights are joint",
                    "sample global latents before the local ones, in model and guide",
                )  # fmt: skip


def _with_other_local_noise(
    guide: Program, batch: Sequence[Any], s: Structure, index: Tensor | None
) -> tuple[dict[str, dict[str, Any]], ...]:
    """The guide's sites of two runs that differ in the noise of the local latents."""
    drawn = {} if index is None else {s.plate: index}
    first = run_at(guide, batch, drawn)
    return first, run_at(guide, batch, {n: first[n]["value"] for n in first if n in s.global_sites} | drawn, seed=1)


def globals_read_rows(
    model: Program, guide: Program, batch: Sequence[Any], s: Structure, index: Tensor | None = None
) -> bool:
    """Whether a density of a global latent, in model or guide, depends on the rows of a batch, or on their number."""
    drawn = {} if index is None else {s.plate: index}
    shared = sampled_values(run_at(guide, batch, drawn))
    values = {n: v for n, v in shared.items() if n in s.global_sites}
    return any(_reads_rows(program, batch, s, values, index) for program in (guide, model))


def _reads_rows(
    program: Program, batch: Sequence[Any], s: Structure, values: Mapping[str, Tensor], index: Tensor | None
) -> bool:
    size = len(batch[0]) if index is None else len(index)

    def densities(rows: Tensor) -> list[Tensor]:
        taken = take_batch_rows(batch, rows, size) if index is None else batch
        at = values if index is None else {**values, s.plate: index[rows.to(index.device)]}
        return [node_log_prob(node) for name, node in run_at(program, taken, at).items() if name in values]

    before = densities(torch.arange(size))
    fewer = [torch.arange(size - 1)] if size > 1 and index is None else []
    for rows in (*replacements(size), *fewer):
        try:
            after = densities(rows)
        except (ValueError, RuntimeError, IndexError, KeyError):
            continue
        if not all(bool(close(a, b).all()) for a, b in zip(before, after, strict=True)):
            return True
    return False


def has_full_size_of_its_own(program: Program, batch: Sequence[Any], plate: str) -> bool:
    """Whether the data plate of a batch of all data keeps its full size over fewer rows, as of `subsample=x`."""
    size = len(batch[0])
    try:
        nodes = run_at(program, take_batch_rows(batch, torch.arange(size - 1), size), {}) if size > 1 else {}
    except (ValueError, RuntimeError, IndexError, KeyError):
        return False
    sizes = {(f.size, f.full_size) for node in nodes.values() for f in node["cond_indep_stack"] if f.name == plate}
    return (size - 1, size) in sizes


# -- runs on other rows: a batch and its latents with rows taken anew --------------------------------------------------


def sampled_values(nodes: Nodes) -> dict[str, Tensor]:
    """The values of the sites that are not observed."""
    return {name: node["value"] for name, node in nodes.items() if not node["is_observed"]}


def take_batch_rows(batch: Sequence[Any], rows: Tensor, size: int) -> tuple[Any, ...]:
    """The rows of every argument of the pair that goes over the batch."""
    return tuple(_take(column, rows, size, 0) for column in batch)


def take_value_rows(values: Mapping[str, Tensor], rows: Tensor, size: int, nodes: Nodes) -> dict[str, Tensor]:
    """The rows of the values of sites `nodes`, those in the data plate; other values as they are."""
    return {n: _take(v, rows, size, -1 - event_dim(nodes[n])) if n in nodes else v for n, v in values.items()}


def _take(value: Any, rows: Tensor, size: int, dim: int) -> Any:
    if not isinstance(value, Tensor) or not -value.dim() <= dim < value.dim() or value.shape[dim] != size:
        return value
    if size > 1 and value.stride(dim) == 0:  # one row stands for all, and goes on doing so
        return value.narrow(dim, 0, 1).expand(
            *(len(rows) if i == dim % value.dim() else -1 for i in range(value.dim()))
        )
    return value.index_select(dim, rows.to(value.device))


def run_at(
    program: Program, batch: Sequence[Any], values: Mapping[str, Tensor], s: Structure | None = None, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """The sample sites of a run at given latents, always in the same noise, without gradient and validation."""
    with fork_all_rngs(), torch.no_grad(), pyro.validation_enabled(False):
        seed_all(seed)
        return dict(sample_sites(trace_program(program, batch, s or Structure(), values)))


def row_log_prob(node: dict[str, Any]) -> Tensor:
    """The log-density of each row of a site in the data plate, [rows]."""
    log_prob = node_log_prob(node)
    return log_prob.reshape(-1, log_prob.shape[-1]).sum(0)


def close(a: Tensor, b: Tensor) -> Tensor:
    """Which log-densities are equal up to the rounding of a run on other rows."""
    near = (a - b).abs() <= (1e-8 if a.dtype is torch.float64 else 1e-4) * (1 + a.abs())
    return near | (a == b) | (a.isnan() & b.isnan())
