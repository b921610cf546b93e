"""log p(x) by importance sampling, per datum, for any pair."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from ppvae import data as datasets
from ppvae.errors import ContractError, DataError, UsageError
from ppvae.evaluation.accumulate import Weights, recorded_bounds
from ppvae.evaluation.compiled import Cells
from ppvae.evaluation.estimate import Estimate
from ppvae.evaluation.verdict import remedy
from ppvae.inference.contract import inspect
from ppvae.inference.evaluating import evaluating
from ppvae.inference.missing import gaps_in
from ppvae.inference.scope import bound, unbound
from ppvae.inference.structure import Structure, undisturbed
from ppvae.inference.support import check_support
from ppvae.inference.tracing import Pair
from ppvae.inference.weights import Terms, amortised, draw, narrowed, terms

# Noise is a function of (seed, data block, particle block), so that a result depends neither on how memory is cut nor
# on how many processes share the work. Changing these numbers changes every estimate within its standard error.
DATA_BLOCK = 50
PARTICLE_BLOCK = 100

MIXED = (
    "some numbers have a density and some a mass: log p(x), and bits per dim, move with the units of the real ones; "
    "compare on the same columns in the same units only"
)


def log_marginal(
    model: Pair,
    guide: Pair,
    data: Any,
    *,
    num_particles: int = 1000,
    seed: int = 0,
    bounds: Sequence[int] = (),
    posterior_draws: int = 0,
    rows: int | None = None,
    compile: bool = False,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> Estimate:
    """Importance-weighted log p(x) per datum for any model/guide pair, with a diagnosis of its trustworthiness.

    log p(x) is estimated by log (1/K) sum_k p(x, z_k) / q(z_k | x), z_k ~ q(z | x): a lower bound on average
    (Burda et al. 2016, arXiv 1509.00519; Mattei and Frellsen 2019, arXiv 1812.02633, where values are missing). Modules
    are in evaluation mode meanwhile; no parameter is created.

    Args:
        model, guide: a Pyro pair that keeps the contract (see `ppvae.check`), or run.model, run.guide.
        data: a tensor [N, *event], a split, or a tuple of them: the pair is called as model(*batch). In data marked by
            `data.with_missing`, NaN is a missing value, and log p(x) that of the values observed.
        num_particles: K.
        seed: of the guide's draws. The same seed gives the same result however memory is cut.
        bounds: further k at which to record L_k.
        posterior_draws: how many draws of each latent to keep per datum, resampled by weight.
        rows: the most (datum, particle) rows that go through the model at once, 5000 by default; memory grows with it.
        compile: compile the run of the pair where there is enough to compute; the same up to rounding.
        device: where to compute; the parameters' device by default.
        progress: show a progress bar; by default where the output is a terminal.

    Raises:
        ContractError: the pair breaks the contract, by the site's name; UsageError, DataError: bad arguments or data.

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2).double(), torch.zeros(4, 3).double()
    >>> est = log_marginal(pair.model, pair.guide, x, num_particles=100)
    >>> bool((est.log_px - pair.log_px(x)).abs().max() < 1e-9), bool(est.reliable.all())
    (True, True)
    """
    if num_particles < 1:
        raise UsageError(f"num_particles: expected at least 1, found {num_particles}")
    rows = DATA_BLOCK * PARTICLE_BLOCK if rows is None else rows
    if rows < 1:
        raise UsageError(f"rows: expected at least 1, found {rows}")
    columns = _columns(data, seed)
    model, guide = bound(model), bound(guide)
    with undisturbed(), evaluating(model, guide):
        place = torch.device(device) if device is not None else _device(model, guide, columns)
        structure, size = _inspected(model, guide, columns, place)
        ks = sorted({*recorded_bounds(num_particles), *(k for k in bounds if 1 <= k <= num_particles)})
        results: list[dict[str, Tensor]] = []
        draws: list[dict[str, Tensor]] = []
        starts = range(0, len(columns[0]), size)
        cells = None
        if compile and not posterior_draws and rows >= PARTICLE_BLOCK * DATA_BLOCK:
            total = len(columns[0]) // DATA_BLOCK * (num_particles // PARTICLE_BLOCK)
            cells = Cells(model, guide, structure, PARTICLE_BLOCK, total)
        with tqdm(total=len(starts), desc="log p(x)", unit="block", disable=_quiet(progress)) as bar:
            missing = 0
            for number, start in enumerate(starts):
                block = Block(columns, start, min(start + size, len(columns[0])), number, structure, place)
                weights = Weights(num_particles, ks, block.eps)
                kept = Kept(posterior_draws, stream(seed, number, "posterior"), structure) if posterior_draws else None
                for log_weight, elbo, t in block.weights(model, guide, num_particles, seed, rows, cells):
                    weights.add(log_weight, elbo)
                    if kept and t is not None:
                        kept.add(log_weight, t)
                missing += block.missing
                results.append({name: value.cpu() for name, value in weights.result().items()})
                if kept:
                    draws.append(kept.values)
                bar.update()
                if not bar.disable:
                    bar.set_postfix(nll=f"{-torch.cat([r['log_px'] for r in results]).mean():.3f}")
    joined = {name: torch.cat([r[name] for r in results]) for name in results[0]}
    posterior = {name: torch.cat([d[name] for d in draws], dim=1) for name in draws[0]} if draws else None
    base, levels, notes = _measure(columns[0], structure)
    notes += structure.remarks
    dims: float = structure.observed_dims
    if missing:
        dims -= missing / len(columns[0])
        notes += (_gaps_note(dims, structure),)
    if posterior_draws and not posterior:
        notes += ("no posterior draws: latents shared by all data, or beside enumerated sites, are not kept",)
    per_datum: dict[str, Any] = {k: v for k, v in joined.items() if not k.startswith("bound_")}
    return Estimate(
        **per_datum,
        num_particles=num_particles,
        seed=seed,
        dims=dims * (len(columns[0]) if structure.joint else 1),
        base_measure=base,
        levels=levels,
        lower_bound_only=structure.lower_bound_only,
        joint=structure.joint,
        data=getattr(columns[0], "description", ""),
        digest=digest_of(columns),
        bounds={int(k.removeprefix("bound_")): v for k, v in joined.items() if k.startswith("bound_")},
        posterior=posterior,
        notes=notes,
        remedy=remedy(structure),
    )


def stream(*key: Any) -> int:
    """A seed for the noise that belongs to a key, independent of every other key's."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


class Block:
    """Some rows of the data, and the weights of the draws that belong to them."""

    def __init__(
        self, columns: tuple[Any, ...], start: int, stop: int, number: int, structure: Structure, device: torch.device
    ):
        self.start, self.size, self.number, self.s = start, stop - start, number, structure
        self.index: Tensor | None = None
        rows: Tensor | None = torch.arange(start, stop)
        if structure.indexes:  # the pair gets all data and its plate the rows; a ragged end is padded, then cut off
            rows = None
            self.index = (torch.arange(structure.subsample_size) + start).to(device) % structure.full_size
        self.batch = tuple(_read(column, rows, device) for column in columns)
        self.gaps = any(getattr(column, "missing", False) for column in columns)
        self.missing = 0  # how many of the numbers observed are missing, once weights were taken

    def weights(
        self, model: Pair, guide: Pair, num_particles: int, seed: int, rows: int, cells: Cells | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Terms | None]]:
        """(log-weights, elbo, terms) of a few particles at a time, log-weights and elbo [particles, batch].

        Whole blocks of particles after the first may come from compiled `cells`, without terms.
        """
        s, batch, index = self.s, self.batch, self.index
        if num_particles > PARTICLE_BLOCK:
            guide = amortised(guide, batch, s, index)
        width = 1 if s.joint else self.size
        step = max(1, rows // self.size)
        if "cancelled" in s.model_roles.values():  # the model draws for itself, once for all particles of a block
            step = PARTICLE_BLOCK
        if cells is not None:
            cells.start(batch)
        with pyro.validation_enabled(False):  # the contract was checked once, and supports are checked once a block
            for number, first in enumerate(range(0, num_particles, PARTICLE_BLOCK)):
                count = min(PARTICLE_BLOCK, num_particles - first)
                torch.manual_seed(stream(seed, self.number, number))
                if cells is not None and number and count == PARTICLE_BLOCK and (cell := cells()) is not None:
                    yield *cell, None
                    continue
                # the guide's noise must not depend on what the model draws for itself, nor on how memory is cut
                cut = count > step or s.layout == "one by one"
                drawn = draw(guide, batch, count, structure=s, index=index) if cut else {}
                for low in range(0, count, step):
                    size = min(step, count - low)
                    part: dict[str, Any] = {}
                    if cut:
                        sites = narrowed(drawn, s, low, size)
                        part = {"values": {n: v.value for n, v in sites.items()}} if s.enumerated else {"drawn": sites}
                    t = terms(model, guide, batch, size, structure=s, index=index, **part)
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
        for name, site in t.model.items() if self.gaps else ():
            if site.role != "observed":
                continue
            axis = site.value.dim() - self.s.event_dims[name] - 1  # of the data, of which folding makes more
            self.missing += int(gaps_in(site.value.narrow(axis, 0, self.size), self.batch).sum())


class Kept:
    """Posterior draws by resampling: each slot holds a particle with probability in proportion to its weight so far.

    Particles are taken in a whole block at a time, so that the draws do not depend on how memory is cut.
    """

    def __init__(self, num_draws: int, seed: int, s: Structure):
        self.num_draws, self.s = num_draws, s
        self.names = [n for n, role in s.guide_roles.items() if role == "latent" and not s.enumerated and not s.joint]
        self._generator = torch.Generator().manual_seed(seed)
        self._log_total: Tensor | None = None
        self._waiting: list[tuple[Tensor, dict[str, Tensor]]] = []
        self._values: dict[str, Tensor] = {}

    def add(self, log_weight: Tensor, t: Terms) -> None:
        """Takes in log-weights [particles, N] and the latents they belong to."""
        values = {}
        for name in self.names:
            value = t.guide[name].value.cpu()
            values[name] = value.movedim(value.dim() - self.s.event_dims[name] - 1, 1)  # [particles, N, ...]
        self._waiting.append((log_weight.cpu(), values))
        if sum(len(w) for w, _ in self._waiting) >= PARTICLE_BLOCK:
            self._resample()

    def _resample(self) -> None:
        if not self._waiting:
            return
        log_weight = torch.cat([w for w, _ in self._waiting])
        latents = {n: torch.cat([v[n] for _, v in self._waiting]) for n in self.names}
        self._waiting = []
        count = log_weight.shape[1]
        log_new = log_weight.logsumexp(0)
        safe = torch.where(log_new.isfinite(), log_weight, torch.zeros_like(log_weight))
        chosen = torch.multinomial(safe.softmax(0).T, self.num_draws, replacement=True, generator=self._generator).T
        uniform = torch.rand(self.num_draws, count, generator=self._generator, dtype=torch.float64)
        self._log_total = log_new if self._log_total is None else torch.logaddexp(self._log_total, log_new)
        replaced = uniform < (log_new - self._log_total).exp()
        for name, value in latents.items():
            new = value[chosen, torch.arange(count)]
            old = self._values.get(name, new)
            self._values[name] = torch.where(replaced.reshape(*replaced.shape, *(1,) * (new.dim() - 2)), new, old)

    @property
    def values(self) -> dict[str, Tensor]:
        """Draws of each latent, [draws, N, (inner plates,) *event]."""
        self._resample()
        return self._values


def _columns(data: Any, seed: int) -> tuple[Any, ...]:
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


def prepared(model: Pair, guide: Pair, data: Any, seed: int) -> tuple[Tensor, ...]:
    """Checked data as one batch, on the device of the pair's parameters."""
    columns = _columns(data, seed)
    device = _device(model, guide, columns)
    return tuple(_read(column, None, device) for column in columns)


def _read(column: Any, rows: Tensor | None, device: torch.device) -> Tensor:
    if isinstance(column, datasets.LazySplit):
        value = column.read(rows)
    else:
        value = column.as_subclass(Tensor) if rows is None else column.as_subclass(Tensor)[rows.to(column.device)]
    return value.to(device)


def _device(model: Pair, guide: Pair, columns: tuple[Any, ...]) -> torch.device:
    for function in (model, guide):
        scope = getattr(function, "scope", None)
        for p in scope.params.values() if scope else ():
            return p.device
        owner = getattr(unbound(function), "__self__", unbound(function))
        if isinstance(owner, torch.nn.Module):
            for p in owner.parameters():
                return p.device
    return getattr(columns[0], "device", torch.device("cpu"))


def _inspected(model: Pair, guide: Pair, columns: tuple[Any, ...], device: torch.device) -> tuple[Structure, int]:
    """What the pair is, and how many data go into a block."""
    total = len(columns[0])
    rows = datasets.first_rows(columns, DATA_BLOCK)
    first = tuple(_read(c, rows, device) for c in columns)
    lazy = any(isinstance(c, datasets.LazySplit) for c in columns)
    whole = first if lazy else tuple(_read(c, None, device) for c in columns)
    try:
        structure = inspect(model, guide, first)
    except ContractError as error:
        if lazy or total <= DATA_BLOCK:
            raise
        try:  # a plate of fixed size, or one that draws its own subsample, wants all data at once
            structure = inspect(model, guide, whole)
        except ContractError:
            raise error from None
        return structure, structure.subsample_size if structure.indexes else total
    if not lazy and (structure.indexes or (structure.sized and total > len(first[0]))):
        structure = inspect(model, guide, whole)
    if structure.joint:
        if structure.full_size not in (total, len(first[0])):
            raise ContractError(
                f"a latent is shared by all data, so that weights are joint: expected all {structure.full_size} data "
                f"of the plate {structure.plate!r}, found {total}. Pass the whole data set"
            )
        return structure, total
    return structure, structure.subsample_size if structure.indexes else DATA_BLOCK


def _measure(column: Any, s: Structure) -> tuple[str, int | None, tuple[str, ...]]:
    """(base measure, levels if the density is of dequantised data, remarks)."""
    if s.base_measure == "mixed":
        return "mixed", None, (MIXED,)
    if not s.base_measure.startswith("density"):
        return s.base_measure, None, ()
    levels = getattr(column, "levels", None)
    if getattr(column, "dequantize", False) and levels:
        remark = f"a lower bound on the log-mass of {levels} levels: the data are uniformly dequantised"
        return f"{levels} levels", levels, (remark,)
    if levels:
        remark = f"a density evaluated on {levels} discrete levels has no ceiling: load with dequantize=True to compare"
        return "density on [0, 1]", None, (remark,)
    known = getattr(column, "base_measure", "")
    return (known if known == "density on [0, 1]" else s.base_measure), None, ()


def _gaps_note(dims: float, s: Structure) -> str:
    share = 100 * (1 - dims / s.observed_dims)
    return f"{share:.1f} % of the values are missing: log p(x) is that of the {dims:.2f} per datum observed"


def digest_of(columns: tuple[Any, ...]) -> str:
    """The SHA-256 of the data of a result."""
    own = [c.digest if hasattr(c, "digest") else datasets.digest(c) for c in columns]
    return own[0] if len(own) == 1 else hashlib.sha256("".join(own).encode()).hexdigest()


def _quiet(progress: bool | None) -> bool | None:
    """tqdm's `disable`: None leaves the bar out where the output is not a terminal."""
    return None if progress is None else not progress
