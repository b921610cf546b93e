"""Runs of a pair on other rows: a batch and its latents with rows taken anew, and the log-densities there."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor

from ppvae.inference.structure import Structure
from ppvae.inference.tracing import Nodes, Program, event_dim, node_log_prob, sample_sites, trace_program
from ppvae.rng import fork_rng


def sampled_values(nodes: Nodes) -> dict[str, Tensor]:
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
    with fork_rng(), torch.no_grad(), pyro.validation_enabled(False):
        torch.manual_seed(seed)
        return dict(sample_sites(trace_program(program, batch, s or Structure(), values)))


def row_log_prob(node: dict[str, Any]) -> Tensor:
    """The log-density of each row of a site in the data plate, [rows]."""
    log_prob = node_log_prob(node)
    return log_prob.reshape(-1, log_prob.shape[-1]).sum(0)


def close(a: Tensor, b: Tensor) -> Tensor:
    """Which log-densities are equal up to the rounding of a run on other rows."""
    near = (a - b).abs() <= (1e-8 if a.dtype is torch.float64 else 1e-4) * (1 + a.abs())
    return near | (a == b) | (a.isnan() & b.isnan())
