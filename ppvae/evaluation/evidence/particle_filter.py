"""log p(x) of sequences per datum by particle filters over time, with the guide as the proposal."""

from __future__ import annotations

import os
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
from ppvae.evaluation.importance.resampling import PosteriorReservoir
from ppvae.evaluation.reliability import FILTER_METHOD, NUM_FILTERS
from ppvae.inference.contract.support import base_measure_of, missing_values_note
from ppvae.inference.sequences.particle_filter import FilterResult, particle_filter
from ppvae.inference.sequences.steps import require_sequence
from ppvae.inference.structure import Role
from ppvae.inference.tracing import Program
from ppvae.rng import derive_seed, seed_all

THRESHOLD = 0.5  # of the share of effective particles under which they are resampled


def require_filter_options(num_particles: Any, options: dict[str, tuple[Any, Any]]) -> None:
    """Raises UsageError for an argument that a particle filter does not take: {name: (value, default)}."""
    for name, (value, default) in options.items():
        if value != default:
            raise UsageError(
                f"{name}: expected {default!r} beside method='particle_filter', found {value!r}. Leave it out; or take "
                f"method='importance'"
            )
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
    dims = s.observed_dims - missing / run.num_data
    return Estimate(
        log_px=found["log_px"], std_error=found["std_error"], ess=found["smallest_ess"], k_hat=found["k_hat"],
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
        notes=notes + s.remarks + ((missing_values_note(dims, s),) if missing else ()),
        method=FILTER_METHOD,
        settings={"filters": NUM_FILTERS, "threshold": THRESHOLD},
        diagnostics={name: found[name] for name in ("filter_ess", "resampled")},
        ess_by_step=found["ess_by_step"],
    )  # fmt: skip


@dataclass(frozen=True)
class FilterBlocks:
    """The statistics of a block of data: [N] by name, and the ess of each step, [N, T]."""

    run: Evaluation
    num_particles: int  # of each filter
    posterior_draws: int

    def __call__(self, block: Block) -> dict[str, Tensor]:
        rows = torch.arange(block.size)
        size = block.size if self.run.structure.draws_subsample else DATA_BLOCK * PARTICLE_BLOCK // self.num_particles
        parts = [self._filter(block.select_rows(part)[0], i) for i, part in enumerate(rows.split(max(1, size)))]
        return concatenate(parts)

    def _filter(self, block: Block, number: int) -> dict[str, Tensor]:
        run, s = self.run, self.run.structure
        filters = LogWeightAccumulator(NUM_FILTERS, (), block.eps)
        draws = None
        if self.posterior_draws:
            draws = PosteriorReservoir(
                self.posterior_draws, derive_seed(run.seed, block.number, number, "posterior"), s
            )
        ess: Tensor | float = 0.0
        resampled: Tensor | float = 0.0
        for i in range(NUM_FILTERS):
            seed_all(derive_seed(run.seed, block.number, "filter", number, i))
            f = particle_filter(
                run.model, run.guide, block.batch, self.num_particles, structure=s, threshold=THRESHOLD,
                index=block.index,
            )  # fmt: skip
            if not i:
                block.check_supports(f.first)
            filters.add(f.log_px[None], f.first.elbo.mean(0)[None])
            ess, resampled = ess + f.ess.T, resampled + f.resampled / NUM_FILTERS
            if draws is not None:
                draws.add(*_trajectories(f))
        assert isinstance(ess, Tensor)
        assert isinstance(resampled, Tensor)
        found = filters.result()
        found |= {"filter_ess": found.pop("ess"), "ess_by_step": ess.cpu(), "smallest_ess": ess.amin(1).cpu()}
        held = draws.values if draws is not None else {}
        found |= {"resampled": resampled.cpu(), "missing": torch.tensor(block.num_missing)}
        return found | {f"posterior/{n}": v.transpose(0, 1) for n, v in held.items()}


def _trajectories(f: FilterResult) -> tuple[Tensor, dict[str, Tensor]]:
    """(log-weights [K, N] that sum to the filter's estimate, the latents): draws from the particles at the end."""
    log_weight = f.log_weight.log_softmax(0) + f.log_px
    return log_weight, {n: site.value for n, site in f.last.guide.items() if site.role is Role.LATENT}
