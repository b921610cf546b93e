"""Simulation-based calibration: whether a guide's draws are distributed as the latents that made the data."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ppvae.data.loader import data_digest, read_rows
from ppvae.errors import ContractError, UsageError, count_of
from ppvae.errors.calls import explain_call
from ppvae.errors.ranges import PROBABILITY, check_numbers
from ppvae.evaluation.blocks import Block, Evaluation, run_blocks, start_evaluation
from ppvae.evaluation.results import SaveableResult
from ppvae.evaluation.simulated_data import Assemble, simulate_data
from ppvae.inference.contract.support import mask_of, same_mask
from ppvae.inference.particle_layout import particle_dim
from ppvae.inference.structure import Role, Structure
from ppvae.inference.terms import sample_guide
from ppvae.inference.tracing import Program, sample_sites, trace_program
from ppvae.rng import derive_seed, seed_all

MIN_REPLICATIONS = 20


@dataclass(frozen=True)
class Calibration(SaveableResult):
    """Ranks of simulated latents among the guide's draws, and whether they are uniform.

    Attributes:
        ranks: {site: [replications, dims]}, how many of `num_draws` draws lie below the simulated value, ties broken at
            random: uniform on 0 .. num_draws if the guide is exact.
        p_values: {site: [dims]}, of the uniformity of the ranks of each dim.
        alpha: the largest probability that an exact guide fails, over all dims together.
    """

    ranks: dict[str, Tensor]
    p_values: dict[str, Tensor]
    num_draws: int
    alpha: float
    seed: int
    data: str = ""
    digest: str = ""
    notes: tuple[str, ...] = ()

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the ranked latents."""
        return tuple(self.ranks)

    @property
    def num_dims(self) -> int:
        """The number of tested dims, over all latents."""
        return sum(len(p) for p in self.p_values.values())

    @property
    def level(self) -> float:
        """The p-value below which a dim fails: alpha over the number of dims (Bonferroni)."""
        return self.alpha / max(1, self.num_dims)

    @property
    def passed(self) -> bool:
        """Whether no dim departs from uniformity."""
        return all(bool((p >= self.level).all()) for p in self.p_values.values())

    def verdict(self, site: str, dim: int) -> str:
        """The diagnosis of a dim: "uniform", or how the guide's draws differ from the latents."""
        if self.p_values[site][dim] >= self.level:
            return "uniform"
        share = (self.ranks[site][:, dim].double() + 0.5) / (self.num_draws + 1)
        errors = math.sqrt(1 / 12 / len(share)), math.sqrt(1 / 180 / len(share))
        shift, spread = float(share.mean() - 0.5) / errors[0], float(((share - 0.5) ** 2).mean() - 1 / 12) / errors[1]
        if abs(shift) > abs(spread):
            return "too low" if shift > 0 else "too high"
        return "too narrow" if spread > 0 else "too wide"

    def table(self) -> dict[str, str]:
        """The diagnosis of every latent as strings, for printing."""
        count = len(next(iter(self.ranks.values()), ()))
        rows = {
            "data": f"{count_of(count)} simulated from the model, like {self.data or 'a tensor'}",
            "verdict": ("no departure found" if self.passed else "the guide is not calibrated")
            + f" (an exact guide fails with probability {self.alpha:g} at most)",
        }
        for site, p in self.p_values.items():
            failed, worst = int((p < self.level).sum()), int(p.argmin())
            rows[site] = (
                f"{failed} of {count_of(len(p), 'dim')} depart{'s' * (failed == 1)}; smallest p-value "
                f"{_p_words(float(p[worst]))}, dim {worst}"
            )
            if failed:
                rows[site] += f": the guide's draws are {self.verdict(site, worst)}"
        return rows | {f"note {i}": note for i, note in enumerate(self.notes, 1)}


def _p_words(p: float) -> str:
    return f"{p:.2g}" if p > 1e-10 else "below 1e-10"


@explain_call
def calibration(
    model: Program,
    guide: Program,
    data: Any,
    *,
    replications: int = 2000,
    num_draws: int = 99,
    alpha: float = 0.01,
    seed: int = 0,
    assemble: Assemble | None = None,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> Calibration:
    """Simulation-based calibration of a guide: latents and data from the model, ranks among draws of q(z | x).

    If q(z | x) is the posterior, the simulated latent and the guide's draws are exchangeable and its rank is uniform.
    The converse fails: a guide that ignores x and returns the prior passes. The test applies to data of the model
    only. Each dim is tested by its whole empirical distribution with an exact probability (Säilynoja et al.
    2022, arXiv 2103.10522).

    Args:
        model, guide: a Pyro pair whose guide is a function of the data, or run.model, run.guide.
        data: gives the shapes and the covariates of the model, row after row; its observed values are replaced. Fewer
            than fifty rows are slow, since no more are simulated at once.
        replications: the number of simulated latents and data.
        num_draws: L, draws of the guide for each.
        alpha: the probability that an exact guide fails, at most.
        seed: of the simulated data and the draws.
        assemble: (simulated values by site, batch) -> batch, where observed sites are not columns of the batch.

    Raises:
        ContractError: the pair breaks the contract, has a latent shared by all data or none that the guide samples, or
            simulated values cannot be put into the batch; UsageError, DataError: bad arguments or data.

    Source: Talts et al. 2018, Validating Bayesian inference algorithms (arXiv 1804.06788).

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2).double(), torch.zeros(50, 3).double()
    >>> calibration(pair.model, pair.guide, x, replications=200).passed
    True
    """
    check_numbers(replications=replications, num_draws=num_draws, seed=seed)
    if replications < MIN_REPLICATIONS:
        raise UsageError(f"replications: expected at least {MIN_REPLICATIONS}, found {replications}")
    PROBABILITY.check_number("alpha", alpha)
    with start_evaluation(model, guide, data, seed=seed, device=device) as run:
        s, total = run.structure, run.num_data
        if s.has_global_latents:
            raise ContractError("a latent is shared by all data: expected latents per datum, which have ranks")
        size = min(run.block_size, total)
        columns = run.columns
        if not s.draws_subsample:  # the rows are repeated until there are enough
            rows = torch.arange(-(-replications // size) * size) % total
            columns = tuple(read_rows(column, rows, run.device) for column in columns)
        counts = _counts(replications, size, len(columns[0]))
        s = replace(s, enumerated=())  # sites that would be summed out are sampled
        found = run_blocks(
            replace(run, columns=columns, block_size=size, structure=s),
            lambda block: _block_ranks(run, block, counts[block.number], num_draws, assemble),
            {"what": "calibration", "replications": replications, "num_draws": num_draws},
            desc="calibration", progress=progress, num_blocks=len(counts), steps=counts, unit="datum",
        )  # fmt: skip
    is_masked = {n.removeprefix("masked "): bool(found.pop(n).any()) for n in list(found) if n.startswith("masked ")}
    masked = sorted(name for name, hidden in is_masked.items() if hidden)
    ranks = {name: value for name, value in found.items() if name not in masked}
    if not ranks:
        raise ContractError("the guide samples no latent without a mask: expected one at least, to rank")
    table = pointwise_p_values(replications, num_draws + 1)
    return Calibration(
        ranks=ranks,
        p_values={n: torch.tensor([p_value(c, num_draws + 1, table) for c in r.T]).double() for n, r in ranks.items()},
        num_draws=num_draws,
        alpha=alpha,
        seed=seed,
        data=getattr(run.columns[0], "description", ""),
        digest=data_digest(run.columns),
        notes=(f"left out, since a mask hides some of them: {', '.join(masked)}",) if masked else (),
    )


def _counts(replications: int, size: int, rows: int) -> list[int]:
    """The number of simulated data of each block; the rows are repeated, in blocks of one size and a shorter last one.

    >>> _counts(7, 2, 5)
    [2, 2, 1, 2]
    """
    counts: list[int] = []
    while replications > sum(counts):
        start = len(counts) * size % rows
        counts.append(min(replications - sum(counts), size, rows - start))
    return counts


def _block_ranks(
    run: Evaluation, block: Block, count: int, num_draws: int, assemble: Assemble | None
) -> dict[str, Tensor]:
    """{site: ranks [count, dims], "masked site": whether some are masked} of a block's rows, with simulated data."""
    s = block.s
    seed_all(derive_seed(run.seed, block.number, "simulated"))
    block, latents = simulate_data(run.model, s, block, assemble)
    seed_all(derive_seed(run.seed, block.number, "draws"))
    sites = sample_guide(run.guide, block.batch, num_draws, structure=s, index=block.index)
    given = {} if block.index is None else {s.plate: block.index}
    nodes = dict(sample_sites(trace_program(run.guide, block.batch, s, given)))
    found: dict[str, Tensor] = {}
    for name in sites:
        if s.guide_roles[name] is Role.AUXILIARY:
            continue
        found[f"masked {name}"] = torch.tensor(not same_mask(mask_of(nodes[name]), None))
        draws = _flat(sites[name].value, s, name, particle_dim(sites[name].value, s, name))
        truth = _flat(latents[name].unsqueeze(0), s, name, 0)
        below, ties = (draws < truth).sum(0), (draws == truth).sum(0)
        ranks = below + (torch.rand(below.shape, device=below.device) * (ties + 1)).long()
        found[name] = ranks[:count].cpu()
    return found


def _flat(value: Tensor, s: Structure, name: str, particles: int) -> Tensor:
    """[particles, *inner, batch, *event] -> [particles, N, dims]."""
    data = value.dim() - s.event_dims[name] - 1
    value = value.movedim((particles, data), (0, 1))
    return value.reshape(*value.shape[:2], -1)


MIN_LEVEL = 1e-12  # of a single edge; the band is wide below it, and slow


def pointwise_p_values(count: int, bins: int) -> Tensor:
    """Two-sided p-values of every count at every edge, [bins - 1, count + 1].

    At edge i the number of `count` uniform ranks in the first i of `bins` bins is binomial(count, i / bins), and
    p = min(1, 2 min(P(C <= c), P(C >= c))).
    """
    c = torch.arange(count + 1, dtype=torch.float64)
    share = (torch.arange(1, bins, dtype=torch.float64) / bins).unsqueeze(-1)
    log_choose = math.lgamma(count + 1) - torch.lgamma(c + 1) - torch.lgamma(count - c + 1)
    mass = (log_choose + c * share.log() + (count - c) * torch.log1p(-share)).exp()
    below, above = mass.cumsum(1), mass.flip(1).cumsum(1).flip(1)
    log_p = (2 * torch.minimum(below, above)).clamp(max=1.0).log()
    return ((log_p * 1e9).round() / 1e9).exp()  # values that are equal by symmetry must not differ by rounding


def escape_probability(level: float, count: int, bins: int, table: Tensor) -> float:
    """P(some edge's p-value is `level` or less) for `count` uniform ranks; `table` is what `pointwise_p_values` gives.

    Exact: counts at successive edges are a Markov chain, C_(i+1) - C_i given C_i being binomial with count - C_i trials
    and probability 1 / (bins - i).
    Source: Säilynoja, Bürkner and Vehtari 2022, Graphical test for discrete uniformity (arXiv 2103.10522).

    >>> table = pointwise_p_values(50, 2)  # one edge: the band's error is the level itself, up to what is discrete
    >>> 0.02 < escape_probability(0.05, 50, 2, table) <= 0.05
    True
    """
    if bool((table <= level).all(1).any()):  # an edge with no count above the level
        return 1.0
    low, high = bounds(level, table)
    log_factorial = torch.lgamma(torch.arange(count + 2, dtype=torch.float64) + 1)
    at, weight = torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.float64)
    for i in range(bins - 1):
        to = torch.arange(int(low[i]), int(high[i]) + 1)
        left, new = (count - at)[:, None], to[None] - at[:, None]
        legal = (new >= 0) & (new <= left)
        step = new.clamp(min=0).minimum(left)
        share = 1 / (bins - i)
        log_mass = log_factorial[left] - log_factorial[step] - log_factorial[left - step]
        log_mass = log_mass + step.double() * math.log(share) + (left - step).double() * math.log1p(-share)
        weight = weight @ torch.where(legal, log_mass.exp(), torch.zeros_like(log_mass))
        at = to
    return max(0.0, 1.0 - float(weight.sum()))


def bounds(level: float, table: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and largest count at every edge whose p-value is above a level, each [bins - 1]."""
    inside = (table > level).to(torch.int64)
    return inside.argmax(1), table.shape[1] - 1 - inside.flip(1).argmax(1)


def p_value(ranks: Tensor, bins: int, table: Tensor) -> float:
    """The p-value of the uniformity of ranks [R] in 0 .. bins - 1; values below 1e-10 are dominated by rounding."""
    counts = torch.bincount(ranks.long(), minlength=bins).cumsum(0)[:-1]
    smallest = float(table[torch.arange(bins - 1), counts].min())
    return escape_probability(max(smallest, MIN_LEVEL), len(ranks), bins, table)


def band(alpha: float, count: int, bins: int, table: Tensor) -> tuple[Tensor, Tensor]:
    """A simultaneous band of the counts at every edge, with coverage of at least 1 - alpha for uniform ranks."""
    # the band changes at these levels only; by the union bound alpha / bins has the coverage
    levels = table[(table >= alpha / bins) & (table <= alpha)].unique()
    low, high = 0, len(levels)
    while low < high:  # the first level whose band has too little coverage
        middle = (low + high) // 2
        low, high = (
            (low, middle)
            if escape_probability(float(levels[middle]), count, bins, table) > alpha
            else (middle + 1, high)
        )
    return bounds(float(levels[low - 1]) if low else alpha / bins, table)
