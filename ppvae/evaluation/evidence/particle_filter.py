"""log p(x) of sequences per datum by particle filters over time, with the guide as the proposal."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppvae.data.loader import data_digest
from ppvae.errors import UsageError
from ppvae.errors.ranges import check_ranges
from ppvae.evaluation.block_cache import concatenate
from ppvae.evaluation.blocks import DATA_BLOCK, PARTICLE_BLOCK, Block, Evaluation, run_blocks, start_evaluation
from ppvae.evaluation.estimate import Estimate
from ppvae.evaluation.importance.accumulators import LogWeightAccumulator
from ppvae.evaluation.proposals.log_weights import keeps_rows
from ppvae.evaluation.reliability import FILTER_METHOD, NUM_FILTERS
from ppvae.inference.contract.support import base_measure_of, count_observed
from ppvae.inference.sequences.backward import sample_backward
from ppvae.inference.sequences.particle_filter import LONGEST_WINDOW, FilterResult, particle_filter
from ppvae.inference.sequences.steps import beyond_end, require_sequence, steps_of
from ppvae.inference.sequences.windows import find_dependence
from ppvae.inference.structure import Role
from ppvae.inference.terms import Terms, evaluate_terms
from ppvae.inference.tracing import Program
from ppvae.rng import derive_seed, seed_all

STEPS_HELD = 256  # of as many particles as other evaluations have at a time
THRESHOLD = 0.5  # of the share of effective particles under which they are resampled


def require_filter_options(num_particles: Any, options: dict[str, tuple[Any, Any]]) -> None:
    """Raises UsageError for an argument that a particle filter does not take: {name: (value, default)}."""
    for name, (value, default) in options.items():
        if value != default:
            raise UsageError(
                f"{name}: expected {default!r} beside method='particle_filter', found {value!r}. Leave it out; or take "
                f"method='importance'"
            )
    if num_particles != "auto":
        check_ranges(num_particles=num_particles)
    if num_particles == "auto" or num_particles < 2 * NUM_FILTERS:
        raise UsageError(
            f"num_particles: expected at least {2 * NUM_FILTERS}, two for each of {NUM_FILTERS} particle filters, "
            f"found {num_particles!r}"
        )


def log_marginal_by_filter(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_particles: int,
    seed: int,
    posterior_draws: int,
    directory: str | os.PathLike[str] | None,
    device: str | torch.device | None,
    progress: bool | None,
) -> Estimate:
    """`log_marginal` with method="particle_filter"; arguments as there."""
    check_ranges(posterior_draws=posterior_draws, seed=seed)
    with start_evaluation(model, guide, data, seed=seed, device=device) as run:
        require_sequence(run.structure, "a particle filter")
        key = {"what": "particle_filter", "num_particles": num_particles, "posterior_draws": posterior_draws}
        found = run_blocks(
            run, FilterBlocks(run, num_particles // NUM_FILTERS, posterior_draws), key,
            desc="log p(x)", directory=directory, progress=progress,
            figures={"nll": lambda statistics: -statistics["log_px"]},
        )  # fmt: skip
    s, missing = run.structure, int(found.pop("missing").sum())
    posterior = {n.partition("/")[2]: found.pop(n).transpose(0, 1) for n in list(found) if n.startswith("posterior/")}
    base, levels, notes = base_measure_of(run.columns[0], s)
    dims, missing_note = count_observed(missing, run.columns, s)
    return Estimate(
        log_px=found["log_px"], std_error=found["std_error"], ess=found["ess"], k_hat=found["k_hat"],
        elbo=found["elbo"], nonfinite=found["nonfinite"],
        num_particles=num_particles // NUM_FILTERS * NUM_FILTERS,
        seed=seed,
        dims=dims,
        base_measure=base,
        levels=levels,
        lower_bound_only=s.lower_bound_only,
        data=getattr(run.columns[0], "description", ""),
        digest=data_digest(run.columns),
        posterior=posterior or None,
        notes=notes + s.remarks + missing_note,
        method=FILTER_METHOD,
        settings={"filters": NUM_FILTERS, "threshold": THRESHOLD},
        diagnostics={name: found[name] for name in ("filter_ess", "resampled")},
        ess_by_step=found["ess_by_step"],
    )  # fmt: skip


@dataclass(frozen=True)
class FilterBlocks:
    """The statistics of a block of data: [N] by name, and the ess of each step, [N, T].

    Smoothing draws need the latents of all steps. From T = 256 on, runs of the pair then have fewer rows, and hold at
    most 5000 x 256 steps of a particle, or the K T of one datum if these are more: K T (4 D + 8) bytes for latents of D
    numbers a step in float32 and their ancestors, and what one run of the pair on them takes.
    """

    run: Evaluation
    num_particles: int  # of each filter
    posterior_draws: int

    def __call__(self, block: Block) -> dict[str, Tensor]:
        rows = torch.arange(block.size, device="cpu").repeat(NUM_FILTERS)
        whole = keeps_rows(self.run, block)
        runs = rows.split(block.size if whole else self._num_rows(block))
        width = len(runs[0])
        parts = concatenate([self._statistics(block, part, i, i * width) for i, part in enumerate(runs)])
        by_filter = {n: value.unflatten(0, (NUM_FILTERS, block.size)) for n, value in parts.items()}
        filters = LogWeightAccumulator(NUM_FILTERS, (), block.eps)
        filters.add(by_filter["log_px"], by_filter["elbo"])
        found = filters.result()
        error = _jackknife(by_filter["log_px"])
        found["std_error"] = torch.where(error.isfinite(), error, found["std_error"])
        ess, ended = by_filter["ess_by_step"].sum(0), by_filter["ended"][0]
        found |= {"filter_ess": found.pop("ess"), "ess": ess.nan_to_num(torch.inf).amin(1)}
        found["ess_by_step"] = torch.where(ended, torch.nan, ess)
        if self.posterior_draws:
            found |= self._smoothing_draws(block, runs, by_filter["log_px"], whole)
        return found | {"resampled": by_filter["resampled"].mean(0), "missing": torch.tensor(block.num_missing)}

    def _num_rows(self, block: Block) -> int:
        """The number of rows in one run of a pair that takes any."""
        steps = STEPS_HELD
        if self.posterior_draws:
            part, _ = block.select_rows(torch.zeros(1, dtype=torch.long, device="cpu"))
            pair = self.run.model, self.run.guide, part.batch, 1
            steps = max(steps, steps_of(evaluate_terms(*pair, structure=self.run.structure, index=part.index)).count)
        return max(1, DATA_BLOCK * PARTICLE_BLOCK * STEPS_HELD // (self.num_particles * steps))

    def _filter(self, block: Block, rows: Tensor, number: int, keep_history: bool = False) -> FilterResult:
        """One particle filter for each of these rows of a block."""
        run = self.run
        part, _ = block.select_rows(rows)
        pair: Any = {"model": run.model, "guide": run.guide, "batch": part.batch}
        pair |= {"structure": run.structure, "index": part.index}
        dependence = None  # smoothing draws need the particles of all steps; both runs of a filter have the same noise
        if not self.posterior_draws:
            each, _ = block.select_rows(rows.unique())  # all filters have the same data
            dependence = find_dependence(**pair | {"batch": each.batch, "index": each.index})
        seed_all(derive_seed(run.seed, block.number, "filter", number))
        return particle_filter(
            **pair, num_particles=self.num_particles, threshold=THRESHOLD, keep_history=keep_history,
            dependence=dependence,
        )  # fmt: skip

    def _elbo(self, block: Block, rows: Tensor, number: int, first: int, steps: int) -> tuple[Tensor, Tensor]:
        """(the ELBO of each of these rows, by a filter's number of draws, some at a time; their steps `beyond_end`)."""
        run = self.run
        part, _ = block.select_rows(rows)
        seed_all(derive_seed(run.seed, block.number, "elbo", number))
        total: Any = 0.0
        together = max(1, self.num_particles * LONGEST_WINDOW // max(steps, LONGEST_WINDOW))
        for start in range(0, self.num_particles, together):
            size = min(together, self.num_particles - start)
            t = evaluate_terms(run.model, run.guide, part.batch, size, structure=run.structure, index=part.index)
            if start == 0:
                self._check_supports(block, rows, first, t)
                ended = beyond_end(t, steps_of(t))
            total = total + t.elbo.sum(0)
        return total / self.num_particles, ended

    def _check_supports(self, block: Block, rows: Tensor, first: int, t: Terms) -> None:
        """Checks the data that no run before this one had; `first` rows, of all filters in turn, were before it."""
        if first >= block.size:
            return
        part, _ = block.select_rows(rows[: block.size - first])
        if part is not block:
            part.start = block.start + first
        part.check_supports(t)
        if part is not block:
            block.num_missing += part.num_missing

    def _statistics(self, block: Block, rows: Tensor, number: int, first: int) -> dict[str, Tensor]:
        f = self._filter(block, rows, number)
        elbo, ended = self._elbo(block, rows, number, first, len(f.ess))
        found = {
            "log_px": f.log_px, "elbo": elbo, "ess_by_step": f.ess.T, "ended": ended.T,
            "resampled": f.resampled.double(),
        }  # fmt: skip
        return {name: value[: len(rows)].cpu() for name, value in found.items()}

    def _smoothing_draws(self, block: Block, runs: Sequence[Tensor], log_px: Tensor, whole: bool) -> dict[str, Tensor]:
        """Sequences by backward sampling, each from a filter chosen in proportion to its estimate of p(x).

        {"posterior/site": [N, draws, (inner plates,) *event]}. The filters are run again with the same noise; `whole`
        says that a run has all rows of the block, each once.
        """
        run = self.run
        seed_all(derive_seed(run.seed, block.number, "posterior"))
        share = log_px.nan_to_num(-torch.inf).softmax(0).nan_to_num(1.0)
        chosen = share.T.multinomial(self.posterior_draws, replacement=True)
        filters = chosen * block.size + torch.arange(block.size, device="cpu")[:, None]  # rows of all runs, [N, draws]
        out: dict[str, Tensor] = {}
        for number, rows in enumerate(runs):
            first = sum(len(earlier) for earlier in runs[:number])
            mine = (filters >= first) & (filters < first + len(rows))
            if not bool(mine.any()):
                continue
            history = self._filter(block, rows, number, keep_history=True).history
            assert history is not None
            seed_all(derive_seed(run.seed, block.number, "smoothing", number))
            pairs = mine.nonzero()  # (datum, draw)
            groups = [pairs[pairs[:, 1] == i] for i in pairs[:, 1].unique()] if whole else pairs.split(len(rows))
            for data, draw in (group.T for group in groups):
                part, at, held = block, data, history
                if not whole:
                    part, at = block.select_rows(data)
                    held = history.select_rows((filters[data, draw] - first).to(part.batch[0].device), run.structure)
                values = sample_backward(
                    run.model, run.guide, part.batch, held, structure=run.structure, index=part.index
                )
                for name, value in values.items():
                    if held.sites[name].role is not Role.LATENT:
                        continue
                    dim = value.dim() - len(held.sites[name].distribution.event_shape) - 1
                    found = value.movedim(dim, 0)[at.to(value.device), 0].cpu()
                    if f"posterior/{name}" not in out:
                        out[f"posterior/{name}"] = found.new_empty(*chosen.shape, *found.shape[1:])
                    out[f"posterior/{name}"][data, draw] = found
        return out


def _jackknife(log_px: Tensor) -> Tensor:
    """The standard error of the log of the mean of a few estimates, [filters, N] -> [N] nats, by the jackknife.

    se^2 = (n - 1) / n sum_i (l_i - mean l)^2, l_i the log-mean without estimate i. That of the delta method is too
    small by a third where ten estimates differ by factors. NaN where all but one are zero.

    Source: Efron and Stein 1981.
    """
    count = len(log_px)
    others = ~torch.eye(count, dtype=torch.bool, device=log_px.device)[..., None]
    without = torch.where(others, log_px, -torch.inf).logsumexp(1)
    return ((count - 1) * (without - without.mean(0)).square().mean(0)).sqrt()
