"""A pair in evaluation mode with one batch: its latents by the guide, and its data by the model."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from ppvae.data.loader import as_single_batch, data_columns
from ppvae.errors import UsageError
from ppvae.errors.memory import explain_out_of_memory
from ppvae.errors.ranges import check_numbers
from ppvae.inference.device import choose_device, default_device
from ppvae.inference.evaluation_mode import evaluation_mode
from ppvae.inference.inspection import inspect
from ppvae.inference.param_store import bind_pair
from ppvae.inference.sites import find_places
from ppvae.inference.structure import Role, Structure
from ppvae.inference.tracing import Program, SubstituteValues, sample_sites, trace_program
from ppvae.rng import fork_all_rngs, fork_rng, seed_all

CHUNK_SIZE = 500  # rows in one run of the pair
MAX_VALUES = 100  # of a discrete latent that a traversal goes through


def are_table_columns(columns: Sequence[Any]) -> bool:
    """Whether data are the columns of one table, which the pair gets one by one."""
    return len(columns) > 1 and all(len(getattr(c, "columns", ())) == 1 for c in columns)


@contextmanager
def open_pair(model: Program, guide: Program, x: Any, seed: int) -> Iterator[GenerativePair]:
    """The pair on data, in evaluation mode and under its own random state."""
    model, guide = bind_pair(model, guide)
    columns = data_columns(x, seed, program=model)
    place = choose_device(None, model, guide, columns)
    memory = explain_out_of_memory("the generation", "Lower count, or pass fewer data")
    with memory, fork_all_rngs(), evaluation_mode(model, guide), default_device(place):
        batch = as_single_batch(columns, seed, place)
        structure = inspect(model, guide, batch, weights=False, particles=False)
        seed_all(seed)
        yield GenerativePair(model, guide, batch, structure, are_table_columns(columns))


class GenerativePair:
    """A pair with a batch: `encode` gives latents, `decode` gives data.

    With `table`, data are all tensors of the batch as one table [rows, columns]; otherwise they are its first tensor.
    """

    def __init__(
        self, model: Program, guide: Program, batch: tuple[Tensor, ...], structure: Structure, table: bool = False
    ):
        self.model, self.guide, self.batch, self.s, self.table = model, guide, batch, structure, table

    def repeat_rows(self, count: int, first: bool = False) -> tuple[Tensor, ...]:
        """A batch of `count` rows: the rows of the batch cyclically, or its first row."""
        check_numbers(count=count)
        rows = torch.zeros(count, dtype=torch.long) if first else torch.arange(count) % len(self.batch[0])
        return tuple(t[rows.to(t.device)] for t in self.batch)

    def vector_site(self, means: Mapping[str, Tensor], site: str | None) -> str:
        """The name of a latent, which must be a vector of real numbers; by default the first that is continuous."""
        site = self.latent_name(means, site)
        if self.s.event_dims[site] != 1 or not means[site].is_floating_point():
            shape = list(means[site].shape)
            raise UsageError(f"site: expected a continuous vector to walk in, found {site!r} of shape {shape}")
        return site

    def latent_name(self, means: Mapping[str, Tensor], site: str | None) -> str:
        """The name of a latent; by default the first that is continuous, or the first where none is."""
        site = site or next(iter([*(n for n in means if not self.s.is_discrete(n)), *means]), None)
        if site is None or site not in means:
            raise UsageError(f"site: expected one of the guide's latents {sorted(means)}, found {site!r}")
        return site

    def discrete_values(self, site: str) -> tuple[Tensor, bool]:
        """(values of a discrete latent [n, *event], False), or (values of each of its dims [n], True)."""
        _, batch, index = next(self._chunks(self.batch))
        fn = trace_program(self.guide, batch, Structure(), index).nodes[site]["fn"]
        base = fn
        while isinstance(base, dist.Independent):
            base = base.base_dist
        by_dim = not base.event_shape and len(fn.event_shape) == 1
        try:
            values = (base if by_dim else fn).enumerate_support(expand=False)
        except NotImplementedError:
            values = None
        if values is None or len(values) > MAX_VALUES:
            raise UsageError(f"site: {site!r} is discrete and has no list of at most {MAX_VALUES} values to go through")
        return values.reshape(len(values), *(() if by_dim else fn.event_shape)), by_dim

    def first_datum(self, name: str, value: Tensor, count: int = 1) -> Tensor:
        """The first datum's value of a latent, repeated `count` times; a latent shared by all data unchanged."""
        axis = self._data_dim(name, value)
        return value if axis < 0 else value.narrow(axis, 0, 1).repeat_interleave(count, axis)

    def rows_of(self, name: str, value: Tensor, rows: Tensor) -> Tensor:
        """A latent's values at rows of the batch; a latent shared by all data unchanged."""
        axis = self._data_dim(name, value)
        return value if axis < 0 else value.index_select(axis, rows.to(value.device))

    def encode(self, mean: bool) -> dict[str, Tensor]:
        chunks: list[dict[str, tuple[int, Tensor]]] = []
        for rows, batch, index in self._chunks(self.batch):
            with SubstituteMeans() if mean else nullcontext():
                trace = trace_program(self.guide, batch, Structure(), index)
            latents = {}
            for name, node in sample_sites(trace):
                if self.s.guide_roles.get(name) in (Role.LATENT, Role.ENUMERATED):
                    axis, value = self._data_dim(name, node["value"]), node["value"]
                    shared = self.s.plate not in {f.name for f in node["cond_indep_stack"]}
                    latents[name] = (-1, value) if shared else (axis, value.narrow(axis, 0, rows.stop - rows.start))
            chunks.append(latents)
        return {
            n: value if axis < 0 else torch.cat([c[n][1] for c in chunks], axis)  # a shared latent has one value
            for n, (axis, value) in chunks[0].items()
        }

    def decode(self, latents: Mapping[str, Tensor], batch: tuple[Tensor, ...], mean: bool) -> Tensor:
        """Means or draws of the data, given latents: [rows, *event].

        Those of the site that observes the batch's first tensor; where several sites observe parts of the data, they
        are put together in their shape.
        """
        found, first = self._decode(latents, batch, mean, every=bool(self._parts))
        if not self._parts:
            return found[first]
        shape = torch.Size([len(self.batch)]) if self.table else self.batch[0].shape[1:]
        out = self.batch[0].new_zeros(len(found[first]), shape.numel())
        for name, (of_data, of_site) in self._parts.items():
            out[:, of_data] = found[name].reshape(len(out), -1)[:, of_site].to(out)
        return out.reshape(len(out), *shape)

    @functools.cached_property
    def _parts(self) -> dict[str, tuple[Tensor, Tensor]]:
        """{site: positions in a datum, positions in the site} where sites observe parts that make up the data."""
        observed = [name for name, role in self.s.model_roles.items() if role is Role.OBSERVED]
        if self.s.draws_subsample or len(observed) < 2:
            return {}
        _, batch, _ = next(self._chunks(self.batch))
        with fork_rng():
            places = find_places(self.model, self.s, batch)
        parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
        start = 0
        for i, column in enumerate(batch if self.table else batch[:1]):
            size = column.shape[1:].numel()
            every = torch.arange(size, device=column.device)
            for name, (own, _) in places.items():
                for place in (p for p in own if p.column == i):
                    if place.of_column is None or place.of_site is None:
                        if not self.table:
                            return {}
                        parts.setdefault(name, []).append((start + every, every))
                    else:
                        parts.setdefault(name, []).append((start + place.of_column, place.of_site))
            start += size
        held = {n: (torch.cat([d for d, _ in own]), torch.cat([s for _, s in own])) for n, own in parts.items()}
        covered = {k for of_data, _ in held.values() for k in of_data.tolist()}
        return held if covered == set(range(start)) else {}

    def decode_sites(self, latents: Mapping[str, Tensor], batch: tuple[Tensor, ...], mean: bool) -> dict[str, Tensor]:
        """Means or draws of every observed site, given latents: [rows, *inner, *event] each."""
        return self._decode(latents, batch, mean, every=True)[0]

    def _decode(
        self, latents: Mapping[str, Tensor], batch: tuple[Tensor, ...], mean: bool, every: bool
    ) -> tuple[dict[str, Tensor], str]:
        """(values of observed sites by name, the site of the batch's first tensor)."""
        out: dict[str, list[Tensor]] = {}
        first = ""
        for rows, chunk, index in self._chunks(batch):
            width = rows.stop - rows.start
            given: dict[str, Tensor] = dict(index)
            for name, v in latents.items():
                axis = self._data_dim(name, v)
                if axis < 0 or v.shape[axis] != len(batch[0]):  # shared by all data
                    given[name] = v
                    continue
                part = v.narrow(axis, rows.start, width)
                if self.s.draws_subsample and width < self.s.subsample_size:  # the last chunk is padded
                    padding = part.narrow(axis, 0, 1).repeat_interleave(self.s.subsample_size - width, axis)
                    part = torch.cat([part, padding], axis)
                given[name] = part
            with poutine.trace() as tracer, poutine.uncondition(), SubstituteValues(given):
                self.model(*chunk)
            sites = sample_sites(tracer.get_trace())
            nodes = {name: node for name, node in sites if node["infer"].get("was_observed")}
            first = next((name for name, n in nodes.items() if n["infer"].get("obs") is chunk[0]), next(iter(nodes)))
            for name, node in nodes.items() if every else [(first, nodes[first])]:
                value = distribution_mean(node["fn"], node["value"]) if mean else node["value"]
                axis = value.dim() - len(node["fn"].event_shape) - 1  # inner plates are to the left of the data plate
                out.setdefault(name, []).append(value.narrow(axis, 0, width).movedim(axis, 0))
        return {name: torch.cat(values) for name, values in out.items()}, first

    def _data_dim(self, name: str, value: Tensor) -> int:
        return value.dim() - self.s.event_dims[name] - 1

    def _chunks(self, batch: tuple[Tensor, ...]) -> Iterator[tuple[slice, tuple[Tensor, ...], dict[str, Tensor]]]:
        """Chunks of the batch's rows: (rows, arguments of the pair, indices of its plate by name)."""
        count = len(batch[0])
        if self.s.draws_subsample:
            size = self.s.subsample_size
            for start in range(0, count, size):
                index = torch.arange(start, start + size) % self.s.full_size
                yield slice(start, min(start + size, count)), self.batch, {self.s.plate: index}
        else:
            for start in range(0, count, CHUNK_SIZE):
                rows = slice(start, min(start + CHUNK_SIZE, count))
                yield rows, tuple(t[rows] for t in batch), {}


class SubstituteMeans(poutine.messenger.Messenger):
    """Replaces the value of every latent site by its distribution's mean, where it has one."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and msg["cond_indep_stack"]:
            msg["value"] = distribution_mean(msg["fn"], msg["value"])


def distribution_mean(fn: Any, value: Tensor) -> Tensor:
    """The mean; a draw `value` where it is undefined, not finite, of another shape, or off a continuous support.

    Means of discrete distributions are off their support, as the probabilities of a Bernoulli variable are.
    """
    if not value.is_floating_point():
        return value
    try:
        mean = fn.mean
    except (NotImplementedError, AttributeError):
        return value
    if mean.shape == value.shape and bool(mean.isnan().any()):  # codes of categories have none, and a mode
        try:
            mean = torch.where(mean.isnan(), fn.mode, mean)
        except NotImplementedError:
            return value
    if mean.shape != value.shape or not bool(torch.isfinite(mean).all()):
        return value
    try:
        inside = fn.support.is_discrete or bool(fn.support.check(mean).all())
    except (NotImplementedError, AttributeError):  # a distribution without a support
        inside = True
    return mean if inside else value
