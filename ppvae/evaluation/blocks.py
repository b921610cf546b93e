"""The data of an evaluation in blocks of fixed size, and the weights of the draws that belong to each block."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pyro
import torch
from torch import Tensor

from ppvae import data as datasets
from ppvae.errors import ContractError, DataError, UsageError
from ppvae.evaluation.importance.compiled_weights import CompiledWeights
from ppvae.inference.contract.missing import missing_mask
from ppvae.inference.contract.support import check_support
from ppvae.inference.inspection import inspect
from ppvae.inference.param_store import unwrap
from ppvae.inference.structure import Layout, Role, Structure
from ppvae.inference.terms import Terms, cache_encoder, evaluate_terms, sample_guide, slice_particles
from ppvae.inference.tracing import Program
from ppvae.rng import derive_seed

# Noise is a function of (seed, data block, particle block), so that a result depends neither on how memory is cut nor
# on how many processes share the work. Changing these numbers changes every estimate within its standard error.
DATA_BLOCK = 50
PARTICLE_BLOCK = 100


class Block:
    """Some rows of the data, and the weights of the draws that belong to them."""

    def __init__(
        self, columns: tuple[Any, ...], start: int, stop: int, number: int, structure: Structure, device: torch.device
    ):
        self.start, self.size, self.number, self.s = start, stop - start, number, structure
        self.index: Tensor | None = None
        rows: Tensor | None = torch.arange(start, stop)
        if (
            structure.draws_subsample
        ):  # the pair gets all data and its plate the rows; a ragged end is padded, then cut off
            rows = None
            self.index = (torch.arange(structure.subsample_size) + start).to(device) % structure.full_size
        self.batch = tuple(read_rows(column, rows, device) for column in columns)
        self.gaps = any(getattr(column, "missing", False) for column in columns)
        self.missing = 0  # how many of the numbers observed are missing, once weights were taken

    def select_rows(self, rows: Tensor) -> tuple[Block, Tensor]:
        """(a block of these rows alone, where they are in it); the whole block where the pair takes no less."""
        if len(rows) == self.size or self.s.has_global_latents or self.s.draws_subsample:
            return self, rows
        out = Block.__new__(Block)
        vars(out).update(vars(self) | {"batch": tuple(t[rows.to(t.device)] for t in self.batch), "size": len(rows)})
        return out, torch.arange(len(rows))

    def weights(
        self,
        model: Program,
        guide: Program,
        num_particles: int,
        seed: int,
        rows: int,
        cells: CompiledWeights | None = None,
        *,
        start: int = 0,
        noise: str = "",
    ) -> Iterator[tuple[Tensor, Tensor, Terms | None]]:
        """(log-weights, elbo, terms) of a few particles at a time, log-weights and elbo [particles, batch].

        Particles from `start` on, a multiple of 100, up to `num_particles`, of the stream called `noise`. Whole blocks
        of them after the first may come from compiled `cells`, without terms.
        """
        s, batch, index = self.s, self.batch, self.index
        if num_particles > PARTICLE_BLOCK:
            guide = cache_encoder(guide, batch, s, index)
        width = 1 if s.has_global_latents else self.size
        step = max(1, rows // self.size)
        if Role.CANCELLED in s.model_roles.values():  # the model draws for itself, once for all particles of a block
            step = PARTICLE_BLOCK
        if cells is not None:
            cells.start(batch)
        with pyro.validation_enabled(False):  # the contract was checked once, and supports are checked once a block
            for first in range(start, num_particles, PARTICLE_BLOCK):
                number, count = first // PARTICLE_BLOCK, min(PARTICLE_BLOCK, num_particles - first)
                torch.manual_seed(derive_seed(seed, self.number, *([noise] if noise else []), number))
                if cells is not None and number and count == PARTICLE_BLOCK and (cell := cells()) is not None:
                    yield *cell, None
                    continue
                # the guide's noise must not depend on what the model draws for itself, nor on how memory is cut
                cut = count > step or s.layout is Layout.ONE_BY_ONE
                drawn = sample_guide(guide, batch, count, structure=s, index=index) if cut else {}
                for low in range(0, count, step):
                    size = min(step, count - low)
                    part: dict[str, Any] = {}
                    if cut:
                        sites = slice_particles(drawn, s, low, size)
                        part = (
                            {"values": {n: v.value for n, v in sites.items()}}
                            if s.enumerated
                            else {"guide_sites": sites}
                        )
                    t = evaluate_terms(model, guide, batch, size, structure=s, index=index, **part)
                    if first == low == 0:
                        if self.gaps and bool(t.log_weight.isnan().any()):
                            inspect(model, guide, batch)  # which says so if missing values are why
                        self._check(t)
                    yield t.log_weight[:, :width], t.elbo[:, :width], t

    @property
    def eps(self) -> float:
        """The rounding unit of the data's type, in which densities are taken to be computed."""
        kinds = [t.dtype for t in self.batch if t.is_floating_point()]
        return torch.finfo(kinds[0]).eps if kinds else torch.finfo(torch.float32).eps

    def _check(self, t: Terms) -> None:
        for name in self.s.unmasked:
            site = t.model[name]
            node = {"fn": site.distribution, "value": site.value, "mask": None}
            check_support(name, node, self.start if site.value.shape[:1] == (self.size,) else 0)
        self.missing = 0
        for name, site in t.model.items() if self.gaps else ():
            if site.role is not Role.OBSERVED:
                continue
            axis = site.value.dim() - self.s.event_dims[name] - 1  # of the data, of which folding makes more
            self.missing += int(missing_mask(site.value.narrow(axis, 0, self.size), self.batch).sum())


def as_columns(data: Any, seed: int) -> tuple[Any, ...]:
    """The columns of an evaluation's data, checked and of equal length; noise that is redrawn is fixed by the seed.

    Raises:
        UsageError: something that is no tensor or split; DataError: other numbers of rows, or values not allowed.
    """
    columns = tuple(data) if isinstance(data, list | tuple) else (data,)
    if not columns:
        raise UsageError("data: expected a tensor, a split, or a tuple of them; found an empty tuple")
    out = []
    for i, column in enumerate(columns):
        if getattr(column, "noise", None):
            column = column.fixed(seed)
        if not isinstance(column, datasets.LazySplit):
            if not isinstance(column, Tensor):
                raise UsageError(f"data[{i}]: expected a tensor or a split, found {type(column).__name__}")
            column = datasets.validated(column, f"data[{i}]")
        if len(column) != len(columns[0]):
            raise DataError(f"data[{i}]: expected {len(columns[0])} rows as in data[0], found {len(column)}")
        out.append(column)
    return tuple(out)


def as_single_batch(model: Program, guide: Program, data: Any, seed: int) -> tuple[Tensor, ...]:
    """Checked data as one batch, on the device of the pair's parameters."""
    columns = as_columns(data, seed)
    device = program_device(model, guide, columns)
    return tuple(read_rows(column, None, device) for column in columns)


def read_rows(column: Any, rows: Tensor | None, device: torch.device) -> Tensor:
    """Some rows of a column, or all of them, as a plain tensor on a device."""
    if isinstance(column, datasets.LazySplit):
        value = column.read(rows).to(torch.get_default_dtype())  # pictures have no floating type of their own
    else:
        value = column.as_subclass(Tensor) if rows is None else column.as_subclass(Tensor)[rows.to(column.device)]
    return value.to(device)


def program_device(model: Program, guide: Program, columns: tuple[Any, ...]) -> torch.device:
    """Where the pair's parameters lie, or else the data."""
    for function in (model, guide):
        scope = getattr(function, "scope", None)
        for p in scope.params.values() if scope else ():
            return p.device
        owner = getattr(unwrap(function), "__self__", unwrap(function))
        if isinstance(owner, torch.nn.Module):
            for p in owner.parameters():
                return p.device
    return getattr(columns[0], "device", torch.device("cpu"))


def inspect_columns(
    model: Program, guide: Program, columns: tuple[Any, ...], device: torch.device
) -> tuple[Structure, int]:
    """What the pair is, and how many data go into a block."""
    total = len(columns[0])
    rows = datasets.first_rows(columns, DATA_BLOCK)
    first = tuple(read_rows(c, rows, device) for c in columns)
    lazy = any(isinstance(c, datasets.LazySplit) for c in columns)
    whole = first if lazy else tuple(read_rows(c, None, device) for c in columns)
    try:
        structure = inspect(model, guide, first)
    except ContractError as error:
        if lazy or total <= DATA_BLOCK:
            raise
        try:  # a plate of fixed size, or one that draws its own subsample, wants all data at once
            structure = inspect(model, guide, whole)
        except ContractError:
            raise error from None
        return structure, structure.subsample_size if structure.draws_subsample else total
    if not lazy and (structure.draws_subsample or (structure.has_subsample_size and total > len(first[0]))):
        structure = inspect(model, guide, whole)
    if structure.has_global_latents:
        if structure.full_size not in (total, len(first[0])):
            raise ContractError(
                f"a latent is shared by all data, so that weights are joint: expected all {structure.full_size} data "
                f"of the plate {structure.plate!r}, found {total}. Pass the whole data set"
            )
        return structure, total
    return structure, structure.subsample_size if structure.draws_subsample else DATA_BLOCK


def data_digest(columns: tuple[Any, ...]) -> str:
    """The SHA-256 of the data of a result."""
    own = [c.digest if hasattr(c, "digest") else datasets.digest(c) for c in columns]
    return own[0] if len(own) == 1 else hashlib.sha256("".join(own).encode()).hexdigest()
