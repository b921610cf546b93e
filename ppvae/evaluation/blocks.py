"""Evaluation by blocks of data: the scaffold (`start_evaluation`, `run_blocks`), and the log-weights of a block."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from ppvae import data as datasets
from ppvae.data.admission import check_argument_order
from ppvae.data.loader import data_columns, data_digest, read_rows
from ppvae.distributed import DistributedContext, distributed_context, progress_disabled
from ppvae.errors import ContractError
from ppvae.errors.memory import explain_out_of_memory
from ppvae.evaluation.block_cache import SECONDS, BlockCache, BlockContext, concatenate, digest_of_params
from ppvae.evaluation.global_latents.blocks import joint_block, local_blocks
from ppvae.evaluation.importance.compiled_weights import CompiledWeights
from ppvae.inference.contract.missing import count_missing
from ppvae.inference.contract.row_order import find_unequal_rows
from ppvae.inference.contract.run_failure import explain_failures
from ppvae.inference.contract.validity import check_run
from ppvae.inference.device import choose_device, default_device
from ppvae.inference.evaluation_mode import evaluation_mode, record_modules
from ppvae.inference.inspection import inspect
from ppvae.inference.param_store import bind_pair
from ppvae.inference.particle_layout import slice_particles, with_sampled_sites
from ppvae.inference.structure import ParticlePlacement, Role, Structure
from ppvae.inference.terms import Terms, cache_encoder, evaluate_terms, sample_guide
from ppvae.inference.tracing import Program
from ppvae.rng import derive_seed, fork_all_rngs, seed_all

# Noise is a function of (seed, data block, particle block), so that a result depends neither on `rows` nor on the
# number of processes. Other block sizes change every estimate, within its standard error.
DATA_BLOCK = 50
PARTICLE_BLOCK = 100
MEMORY_CURE = (
    "Lower rows (of data and particles in one run of the pair), or the number of draws; finished blocks are kept"
)


class Block:
    """Some rows of the data: a batch for the pair, and the log-weights of its particles."""

    def __init__(
        self, columns: tuple[Any, ...], start: int, stop: int, number: int, structure: Structure, device: torch.device
    ):
        self.start, self.size, self.number, self.s = start, stop - start, number, structure
        self.index: Tensor | None = None
        rows: Tensor | None = torch.arange(start, stop)
        if structure.draws_subsample:  # the pair gets all data, its plate the rows: a short last block is padded
            rows = None
            self.index = (torch.arange(structure.subsample_size) + start).to(device) % structure.full_size
        self.batch = tuple(read_rows(column, rows, device) for column in columns)
        self.has_missing = any(getattr(column, "missing", False) for column in columns)
        self.num_missing = 0  # of the observed numbers; counted by `check_supports`
        self._point_mass: Tensor | None = None  # the data whose guide is a point mass

    @property
    def rows(self) -> Tensor | None:
        """The rows of the data that its batch holds; None where the plate draws them."""
        return None if self.s.draws_subsample else torch.arange(self.start, self.start + self.size, device="cpu")

    @property
    def where(self) -> str:
        """Which rows of the data the block holds, in words."""
        return f"rows {self.start} to {self.start + self.size - 1} of the data, a batch"

    @property
    def num_weights(self) -> int:
        """The number of log-weights per particle: one per datum, or a single one where latents are global."""
        return 1 if self.s.has_global_latents else self.size

    def select_rows(self, rows: Tensor) -> tuple[Block, Tensor]:
        """(a block of these rows, their positions in it); the block itself where the pair takes no fewer rows."""
        every = torch.arange(self.size, device=rows.device)
        if self.s.has_global_latents or self.s.draws_subsample or torch.equal(rows, every):
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
        compiled: CompiledWeights | None = None,
        *,
        start: int = 0,
        noise: str = "",
        globals_of: Callable[[int, int], Mapping[str, Tensor]] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor, Terms | None]]:
        """(log-weights, elbo, terms) of a few particles at a time, log-weights and elbo [particles, N].

        Args:
            num_particles: the end of the range of particles; `start` is its beginning, a multiple of 100.
            rows: the largest number of (datum, particle) rows that go through the pair at once.
            compiled: may give whole blocks of particles after the first, without terms.
            noise: the name of the stream of noise.
            globals_of: values of the global latents of (first particle, number), given which weights are per datum.
        """
        s, batch, index = self.s, self.batch, self.index
        if num_particles > PARTICLE_BLOCK:
            guide = cache_encoder(guide, batch, s, index)
        width = self.num_weights if globals_of is None else self.size
        step = max(1, rows // self.size)
        if Role.CANCELLED in s.model_roles.values():  # the model's own draws are shared by a block of particles
            step = PARTICLE_BLOCK
        if compiled is not None:
            compiled.start(batch)
        with pyro.validation_enabled(False):  # the contract was checked once, and supports are checked once a block
            for first in range(start, num_particles, PARTICLE_BLOCK):
                number, count = first // PARTICLE_BLOCK, min(PARTICLE_BLOCK, num_particles - first)
                shared = {} if globals_of is None else globals_of(first, count)
                seed_all(derive_seed(seed, self.number, *([noise] if noise else []), number))
                whole = compiled is not None and number and count == PARTICLE_BLOCK
                if whole and compiled is not None and (pair := compiled()) is not None:
                    yield self._weigh(pair[0]), self._weigh(pair[1]), None
                    continue
                # the guide's noise must depend neither on the model's own draws nor on `rows`
                one_by_one = s.layout is ParticlePlacement.ONE_BY_ONE
                split = (count > step or one_by_one) and not (s.enumerated and s.draws_noise)
                latents = sample_guide(guide, batch, count, structure=s, index=index, values=shared) if split else {}
                for low in range(0, count, step if split else count):
                    size = min(step, count - low) if split else count
                    given: dict[str, Any] = {"values": shared}
                    if split:
                        sites = slice_particles(latents, s, low, size)
                        values = {n: v.value for n, v in sites.items()}
                        given = {"values": values} if s.enumerated else {"guide_sites": sites}
                        given["structure"] = with_sampled_sites(s, latents)
                    t = evaluate_terms(model, guide, batch, size, index=index, **{"structure": s, **given})
                    reduced = t if globals_of is None else t.local
                    if first == low == 0:
                        if self.has_missing and bool(reduced.log_weight.isnan().any()):
                            inspect(model, guide, batch)  # raises the error that names missing values as the cause
                        self.check_supports(reduced)
                    yield self._weigh(reduced.log_weight[:, :width]), self._weigh(reduced.elbo[:, :width]), t

    def _weigh(self, log_weight: Tensor) -> Tensor:
        """NaN where the guide is a point mass, which has no weights."""
        none = self._point_mass
        return log_weight if none is None else log_weight.masked_fill(none[: log_weight.shape[-1]], torch.nan)

    @property
    def eps(self) -> float:
        """Machine epsilon of the dtype of the data, in which densities are taken to be computed."""
        dtypes = [t.dtype for t in self.batch if t.is_floating_point()]
        return torch.finfo(dtypes[0] if dtypes else torch.float32).eps

    def check_supports(self, t: Terms) -> None:
        """Checks observed values against supports, and distributions' parameters; counts missing and masked values.

        Raises:
            DataError, ContractError: a value or parameter that its distribution does not take, by site and row.
        """
        self._point_mass = check_run(t, self.rows)
        self.num_missing = 0
        for name, site in t.model.items():
            if site.role is not Role.OBSERVED or name in t.structure.labels:
                continue
            # the axis of the data is longer where particles are folded in
            axis = site.value.dim() - t.structure.event_dims[name] - 1
            self.num_missing += count_missing(site, axis, self.size, self.batch)


def inspect_columns(
    model: Program, guide: Program, columns: tuple[Any, ...], device: torch.device, given_globals: bool = False
) -> tuple[Structure, int]:
    """(structure of the pair, number of data in a block); `given_globals` as in `start_evaluation`."""
    total = len(columns[0])
    rows = datasets.first_rows(columns, DATA_BLOCK)
    first = tuple(read_rows(c, rows, device) for c in columns)
    lazy = any(isinstance(c, datasets.LazySplit) for c in columns)
    whole = first if lazy else tuple(read_rows(c, None, device) for c in columns)
    try:
        structure = inspect(model, guide, first, weights=not given_globals)
    except ContractError as error:
        if lazy or total <= DATA_BLOCK:
            raise
        try:  # a plate of fixed size, or one that draws its own subsample, wants all data at once
            structure = inspect(model, guide, whole, weights=not given_globals)
        except ContractError:
            raise error from error.__cause__
        if not structure.draws_subsample:
            return (local_blocks(structure, total)[0] if given_globals else structure), total
    if not lazy and (structure.draws_subsample or (structure.has_subsample_size and total > len(first[0]))):
        structure = inspect(model, guide, whole, weights=not given_globals)
    if given_globals:
        return local_blocks(structure, total)
    per_datum = not (lazy or structure.has_global_latents) and total > len(first[0])
    if per_datum and find_unequal_rows(model, guide, first, structure, total):
        return inspect(model, guide, whole), total  # all rows, each at its place
    if structure.has_global_latents:
        return joint_block(structure, total, len(first[0]))
    return structure, structure.subsample_size if structure.draws_subsample else DATA_BLOCK


@dataclass(frozen=True)
class Evaluation:
    """A pair in evaluation mode on checked data, which `run_blocks` visits block by block.

    Attributes:
        structure: the pair was inspected once; everything below takes the structure from here.
        columns: of the data, of equal length.
        block_size: data in a block.
        modules: those that the pair calls; their frozen parameters and buffers are part of the cache key.
    """

    model: Program
    guide: Program
    structure: Structure
    columns: tuple[Any, ...]
    block_size: int
    device: torch.device
    seed: int
    modules: Sequence[torch.nn.Module]
    context: DistributedContext

    @property
    def num_data(self) -> int:
        """The number of rows of the data."""
        return len(self.columns[0])

    @property
    def num_blocks(self) -> int:
        """The number of blocks that cover the data."""
        return -(-self.num_data // self.block_size)

    def block(self, number: int) -> Block:
        """The block with this number; numbers past the end start over."""
        start = number * self.block_size % self.num_data
        stop = min(start + self.block_size, self.num_data)
        return Block(self.columns, start, stop, number, self.structure, self.device)

    def blocks(self, desc: str, progress: bool | None = None) -> Iterator[Block]:
        """All blocks on every rank, under a progress bar."""
        for number in tqdm(range(self.num_blocks), desc=desc, unit="block", disable=progress_disabled(progress)):
            yield self.block(number)

    def with_pair(self, model: Program, guide: Program) -> Evaluation:
        """The same data with another pair, inspected."""
        structure, size = inspect_columns(model, guide, self.columns, self.device)
        return replace(self, model=model, guide=guide, structure=structure, block_size=size)

    def cache_key(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What the result of a block is a function of: settings, data, parameters and sites, as strings and numbers."""
        s, common = self.structure, {"seed": self.seed, "device": self.device.type, "format": 2}
        return dict(settings) | common | {
            "data": data_digest(self.columns), "parameters": digest_of_params(s.params, self.modules),
            "layout": s.layout, "sites": sorted({**s.model_roles, **s.guide_roles}),
            "dtype": str(torch.get_default_dtype()),
        }  # fmt: skip


@contextmanager
def start_evaluation(
    model: Program,
    guide: Program,
    data: Any,
    *,
    seed: int,
    device: torch.device | str | None = None,
    given_globals: bool = False,
) -> Iterator[Evaluation]:
    """Checks data, inspects the pair, and puts it into evaluation mode; the caller's random state is restored.

    `given_globals`: blocks are for weights of each datum given the global latents, in place of joint ones.
    Inside a process group an exception on one rank is raised on all ranks.

    Raises:
        ContractError: the pair breaks the contract, by the site's name; OutOfMemoryError; UsageError, DataError.
    """
    model, guide = bind_pair(model, guide)
    with explain_out_of_memory("the evaluation", MEMORY_CURE), distributed_context() as context:
        check_argument_order(data, model, guide)
        columns = data_columns(data, seed, program=model)
        place = choose_device(device, model, guide, columns)
        with fork_all_rngs(), evaluation_mode(model, guide), default_device(place):
            with record_modules(model, guide) as modules:
                structure, size = inspect_columns(model, guide, columns, place, given_globals)
            yield Evaluation(model, guide, structure, columns, size, place, seed, modules, context)


def run_blocks(
    run: Evaluation,
    compute: Callable[..., Mapping[str, Tensor]],
    settings: Mapping[str, Any],
    *,
    desc: str,
    directory: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    parts: bool = False,
    steps: int | Sequence[int] | None = 1,
    unit: str = "block",
    figures: Mapping[str, Callable[[Mapping[str, Tensor]], Tensor]] | None = None,
    num_blocks: int | None = None,
) -> dict[str, Tensor]:
    """The results of a function of one block over all data: computed, cached, gathered over ranks, and concatenated.

    Args:
        compute: a function of a `Block` that gives named tensors with the data first, [N, ...], or scalars. Its noise
            must be a function of the seed and `block.number`.
        settings: what a result is a function of, besides pair, data and seed.
        desc: the label of the progress bar.
        directory: the folder of finished blocks, from which an interrupted evaluation resumes; None for no cache.
        progress: show a progress bar; by default where the output is a terminal.
        parts: `compute` takes a `BlockContext` too, caches parts of a block by itself and advances the bar.
        steps, unit: of the progress bar, for each block; None where they are not known.
        figures: shown in the bar: {name: function of a block's result, whose mean over the finished data is shown}.
        num_blocks: another number of blocks than cover the data once.

    Returns:
        Tensors in the order of the data, by the names that all blocks have; scalars are stacked, [blocks].
    """
    key = run.cache_key(settings) if directory is not None or run.context.size > 1 else {}
    total = run.num_blocks if num_blocks is None else num_blocks
    numbers = run.context.block_indices(total)
    lengths = [steps] * total if isinstance(steps, int) else steps
    results: dict[int, Mapping[str, Tensor]] = {}
    bar = tqdm(
        total=None if lengths is None else sum(lengths[n] for n in numbers), desc=desc, unit=unit,
        disable=progress_disabled(progress),
    )  # fmt: skip
    finished = 0
    with bar, BlockCache(directory, key, 0.0 if parts else SECONDS) as cache, pyro.validation_enabled(False):
        for number in numbers:
            block, tracker = run.block(number), BlockContext(cache, bar)
            with explain_failures(run.model, run.guide, block.batch, block.where, block.rows):
                if parts:
                    results[number] = compute(block, tracker)
                else:
                    results[number] = tracker.part(f"block-{number:05d}", functools.partial(compute, block))
            if lengths is not None:
                finished += lengths[number]
                bar.update(finished - bar.n)
            if figures and not bar.disable:
                means = {name: torch.cat([f(r) for r in results.values()]).mean() for name, f in figures.items()}
                bar.set_postfix({name: f"{mean:.3f}" for name, mean in means.items()})
    return concatenate(run.context.gather_blocks(results, key))
