"""Statistics of data that a model replicates: from its prior, and from posteriors of given data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ppvae.errors import ContractError, UsageError, site_error
from ppvae.evaluation.blocks import DATA_BLOCK, PARTICLE_BLOCK, Block, Evaluation
from ppvae.evaluation.importance.resampling import PosteriorReservoir
from ppvae.evaluation.simulated_data import Assemble, Places, block_columns, observed_places, simulate_data
from ppvae.inference.contract.row_order import find_row_order
from ppvae.inference.structure import Role, Structure
from ppvae.inference.terms import evaluate_terms
from ppvae.rng import derive_seed, fork_rng, seed_all

Statistic = Callable[..., Tensor]
ROWS = 2000  # of replicated data in one run of the model


def default_statistics(columns: Sequence[Any], names: Sequence[str] = ()) -> dict[str, Statistic]:
    """Statistics of any data: mean and spread of a datum's numbers, and the mean step between neighbours.

    The spread is a standard deviation. Missing values (NaN) are left out. A datum of one number is a statistic by
    itself, 0 where it is missing; of columns with names and one number each, every column is.
    """
    single = [i for i, c in enumerate(columns) if c.dim() == 1 or c[0].numel() == 1]
    if names and 0 in single:
        return {names[i]: functools.partial(_value, i) for i in single}
    if 0 in single:
        return {"value": functools.partial(_value, 0)}
    return {"mean": _mean, "spread": _deviation, "step between neighbours": _step}


def _value(column: int, *columns: Tensor) -> Tensor:
    return columns[column].reshape(len(columns[column])).float().nan_to_num()


def _mean(x: Tensor, *_: Any) -> Tensor:
    return x.float().flatten(1).nanmean(1).nan_to_num()


def _deviation(x: Tensor, *_: Any) -> Tensor:
    flat = x.float().flatten(1)
    return (flat - flat.nanmean(1, keepdim=True)).square().nanmean(1).sqrt().nan_to_num()


def _step(x: Tensor, *_: Any) -> Tensor:
    x = x.float() if x.shape[-1] > 1 else x.float().flatten(1)
    return x.diff(dim=-1).abs().flatten(1).nanmean(1).nan_to_num()


@dataclass
class Replicator:
    """Replicates data of a model block by block, and computes statistics of them.

    Attributes:
        statistics: functions of a batch, called as the model is, that give one number per datum.
        num_draws, num_particles: posterior draws of each datum, resampled from so many particles of the guide.
    """

    run: Evaluation
    statistics: Mapping[str, Statistic]
    num_draws: int
    num_particles: int
    assemble: Assemble | None
    _places: dict[int, Places] = field(default_factory=dict)
    _dims: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        s = self.run.structure
        if s.has_global_latents:
            raise ContractError("a latent is shared by all data: expected latents per datum, to replicate data with")
        summed = [n for n in s.enumerated if n not in s.guide_roles]
        if summed:
            raise site_error(
                summed[0], "latents that the guide samples, to replicate data with", "one that the model sums out",
                "sample it in the guide",
            )  # fmt: skip
        # sites that would be summed out are sampled
        latent = {n: Role.LATENT for n, role in s.guide_roles.items() if role is Role.ENUMERATED}
        s = replace(
            s, enumerated=(), guide_roles={**s.guide_roles, **latent},
            model_roles={n: latent.get(n, role) for n, role in s.model_roles.items()},
        )  # fmt: skip
        self.run = replace(self.run, structure=s)

    @functools.cached_property
    def _takes_any_rows(self) -> bool:
        """Whether the pair takes batches of other rows than the data's own."""
        s, run = self.run.structure, self.run
        if s.draws_subsample or s.has_subsample_size or run.block_size > DATA_BLOCK:
            return False
        first = run.block(0)
        return not find_row_order(run.model, run.guide, first.batch, s, run.num_data)

    def observed(self, block: Block) -> dict[str, Tensor]:
        """The statistics of a block's own data, [N] each."""
        return self._compute(block)

    def from_prior(self, block: Block, count: int) -> dict[str, Tensor]:
        """Statistics of `count` replicates of a block, z ~ p(z), x ~ p(x | z), [count, N] each."""
        return _stack([self._compute(simulated) for simulated in self.simulated(block, count, "prior")], block.size)

    def simulated(self, block: Block, count: int, noise: str) -> Iterator[Block]:
        """Blocks of data simulated from the model, several copies of the block's rows in each."""
        for number, copies in enumerate(self._portions(block, count)):
            wide = repeat_rows(block, copies)
            seed_all(derive_seed(self.run.seed, block.number, noise, number))
            yield self._simulate(wide, None)

    def posterior(self, block: Block, noise: str) -> tuple[Tensor, dict[str, Tensor]]:
        """(log-weights [particles, N], draws of each latent [draws, N, ...] in proportion to weight)."""
        reservoir = PosteriorReservoir(
            self.num_draws, derive_seed(self.run.seed, block.number, noise, "posterior"), block.s
        )
        weights, rows = [], DATA_BLOCK * PARTICLE_BLOCK
        for log_weight, _, t in block.weights(
            self.run.model, self.run.guide, self.num_particles, self.run.seed, rows, noise=noise
        ):
            assert t is not None
            weights.append(log_weight.cpu())
            reservoir.add(log_weight, {name: site.value for name, site in t.guide.items()})
        return torch.cat(weights), reservoir.values

    def from_posterior(self, block: Block, draws: Mapping[str, Tensor], noise: str) -> dict[str, Tensor]:
        """Statistics of a replicate of a block at each posterior draw, [draws, N] each."""
        return _stack([self._compute(b) for b in self.replicated(block, draws, noise)], block.size)

    def replicated(self, block: Block, draws: Mapping[str, Tensor], noise: str) -> Iterator[Block]:
        """Blocks of data replicated at posterior draws [draws, N, ...] of the latents, several draws in each."""
        first = 0
        for number, copies in enumerate(self._portions(block, self.num_draws)):
            latents = {n: v[first : first + copies].flatten(0, 1) for n, v in draws.items()}
            first += copies
            seed_all(derive_seed(self.run.seed, block.number, noise, "replicated", number))
            yield self._simulate(repeat_rows(block, copies), latents)

    def log_joint(self, block: Block, draws: Mapping[str, Tensor]) -> Tensor:
        """log p(x, z) of a block at posterior draws [draws, N, ...], [draws, N]."""
        values = {n: _data_to_its_place(v, 1, block.s, n) for n, v in self._padded(block, draws).items()}
        model, guide = self.run.model, self.run.guide
        seed_all(derive_seed(self.run.seed, block.number, "log joint"))
        t = evaluate_terms(
            model, guide, block.batch, self.num_draws, values=values, structure=block.s, index=block.index
        )
        return (t.log_lik + t.log_prior)[:, : block.size].cpu()

    def _simulate(self, block: Block, latents: Mapping[str, Tensor] | None) -> Block:
        """The block with simulated data; latents [N, ...] if given. Simulated values are checked once a width."""
        width = len(block.batch[0])
        places = self._places.get(width)
        if latents is not None:
            shapes = self._value_dims(block)
            padded = {n: v[0] for n, v in self._padded(block, {n: v[None] for n, v in latents.items()}).items()}
            latents = {n: _without_lead(_data_to_its_place(v, 0, block.s, n), shapes[n]) for n, v in padded.items()}
        made, _ = simulate_data(self.run.model, block.s, block, self.assemble, latents, places)
        if places is None and self.assemble is None:
            self._places[width] = observed_places(self.run.model, block.s, block)
        return made

    def _value_dims(self, block: Block) -> dict[str, int]:
        """The number of dims of each latent in a run of the model."""
        if not self._dims:
            with fork_rng():
                _, latents = simulate_data(self.run.model, block.s, block, self.assemble)
            self._dims.update({n: v.dim() for n, v in latents.items()})
        return self._dims

    def _padded(self, block: Block, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Draws [draws, N, ...] on the block's device, as many rows as its plate has where it draws them."""
        width = block.size if block.index is None else len(block.index)
        short = width - block.size
        device = block.batch[0].device
        return {
            n: torch.cat([v, v[:, :1].expand(-1, short, *v.shape[2:])], 1).to(device) if short else v.to(device)
            for n, v in draws.items()
        }

    def _portions(self, block: Block, count: int) -> list[int]:
        """How many copies of a block's rows go through the pair at once."""
        most = max(1, ROWS // block.size) if self._takes_any_rows else 1
        return [min(most, count - first) for first in range(0, count, most)]

    def _compute(self, block: Block) -> dict[str, Tensor]:
        """Each statistic of a block's data, [N]."""
        columns = block_columns(block)
        found = {}
        for name, statistic in self.statistics.items():
            value = statistic(*columns)
            if isinstance(value, tuple):
                raise UsageError(
                    f"statistics[{name!r}]: expected one number per datum, shape [{block.size}], found a "
                    f"{type(value).__name__}, as x.max(1) gives; return its .values, or take x.amax(1)"
                )
            value = torch.as_tensor(value)
            if value.shape != (block.size,):
                raise UsageError(
                    f"statistics[{name!r}]: expected one number per datum, shape [{block.size}], found "
                    f"{list(value.shape)}. Reduce over the event dims alone, as x.flatten(1).mean(1)"
                )
            value = value.detach().double().cpu()
            if not bool(value.isfinite().all()):
                raise UsageError(
                    f"statistics[{name!r}]: expected finite numbers, found {value[~value.isfinite()][0]:g}; where "
                    "values are missing, torch.nanmean leaves them out"
                )
            found[name] = value
        return found


def repeat_rows(block: Block, copies: int) -> Block:
    """A block that holds the rows of another several times, one copy after the other."""
    if copies == 1:
        return block
    out = copy(block)
    out.batch = tuple(t.repeat(copies, *(1,) * (t.dim() - 1)) for t in block.batch)
    out.size = block.size * copies
    return out


def _stack(parts: Sequence[Mapping[str, Tensor]], size: int) -> dict[str, Tensor]:
    """[copies * N] of several runs -> [copies, N] of all."""
    return {name: torch.cat([part[name].reshape(-1, size) for part in parts]) for name in parts[0]}


def _data_to_its_place(value: Tensor, at: int, s: Structure, name: str) -> Tensor:
    """[..., N, *inner, *event] -> [..., *inner, N, *event], the data being at dim `at`."""
    return value.movedim(at, value.dim() - s.event_dims[name] - 1)


def _without_lead(value: Tensor, dims: int) -> Tensor:
    """A value without leading dims of size one that a run under plates of particles has added."""
    while value.dim() > dims and value.shape[0] == 1:
        value = value[0]
    return value
