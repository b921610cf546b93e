"""The data of an evaluation in blocks of fixed size, and the weights of the draws that belong to each block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyro
import torch
from torch import Tensor

from ppvae import data as datasets
from ppvae.data.loader import read_rows
from ppvae.errors import ContractError
from ppvae.evaluation.importance.compiled_weights import CompiledWeights
from ppvae.inference.contract.missing import missing_mask
from ppvae.inference.contract.support import check_support
from ppvae.inference.inspection import inspect
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
