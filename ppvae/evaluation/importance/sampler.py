"""Importance sampling of one block of data: log-weights, reduced to the statistics that are reported per datum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ppvae.compilation.precision import check_precision, faster_precision, layer_precision
from ppvae.errors import count_of
from ppvae.evaluation.blocks import DATA_BLOCK, PARTICLE_BLOCK, Block, Evaluation, concatenate
from ppvae.evaluation.importance.accumulators import LogWeightAccumulator, recorded_bounds
from ppvae.evaluation.importance.allocation import Allocation, FixedAllocation
from ppvae.evaluation.importance.compiled_weights import CompiledWeights
from ppvae.evaluation.importance.guide_proposal import GuideProposal
from ppvae.evaluation.importance.resampling import PosteriorReservoir
from ppvae.evaluation.proposals.log_weights import Proposal, RefinedProposal
from ppvae.evaluation.unconstrained.compiled_potential import CompiledProposalTarget
from ppvae.inference.terms import evaluate_terms
from ppvae.rng import derive_seed


def choose_precision(run: Evaluation, precision: str) -> str:
    """The precision of layers: as given, or for "auto" the faster of float32 and bf16 for the layers of the pair.

    Raises:
        UsageError: a precision that is unknown, or that the device does not have.
    """
    check_precision(precision, run.device)
    if precision != "auto":
        return precision
    block = run.block(0)
    return faster_precision(
        lambda: evaluate_terms(run.model, run.guide, block.batch, 1, structure=block.s, index=block.index), False,
        run.context.any_rank,
    )  # fmt: skip


@dataclass(frozen=True)
class ImportanceSampler:
    """The function of one block behind `log_marginal`.

    Attributes:
        allocation: of particles to data.
        bounds: further k at which L_k is recorded.
        posterior_draws: of each latent per datum, resampled by weight.
        rows: the largest number of (datum, particle) rows that go through the pair at once.
        precision: of the products in layers.
        refined: draw from a proposal that is fitted to each datum, instead of the guide.
        densities: those that refined proposals are fitted to, where they are compiled.
    """

    run: Evaluation
    allocation: Allocation
    bounds: Sequence[int]
    posterior_draws: int
    rows: int
    precision: str = "float32"
    refined: bool = False
    densities: CompiledProposalTarget | None = field(default=None, repr=False)

    def cache_key(self) -> dict[str, Any]:
        """The settings that a block's result is a function of."""
        num_particles = "auto" if self.allocation.adaptive else self.allocation.max_particles
        return {
            "what": "log_marginal", "num_particles": num_particles, "posterior_draws": self.posterior_draws,
            "bounds": sorted(self.bounds), **self.settings(),
        }  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """The settings that differ from the defaults, besides the number of particles."""
        precision = {} if self.precision == "float32" else {"precision": self.precision}
        return self.allocation.settings() | precision | ({"proposal": "refined"} if self.refined else {})

    def compile_weights(self) -> CompiledWeights | None:
        """The compiled log-weights of this rank's blocks; None where they cannot be used."""
        run = self.run
        if self.refined or self.allocation.adaptive or self.posterior_draws or self.rows < PARTICLE_BLOCK * DATA_BLOCK:
            return None
        blocks = min(len(run.context.block_indices(run.num_blocks)), run.num_data // DATA_BLOCK)
        total = blocks * (self.allocation.max_particles // PARTICLE_BLOCK)
        return CompiledWeights(run.model, run.guide, run.structure, PARTICLE_BLOCK, total, self.precision)

    def precision_note(self) -> tuple[str, ...]:
        """The difference in log p(x) of the first data from float32, with the same noise; empty for float32."""
        if self.precision == "float32":
            return ()
        few = replace(self, allocation=FixedAllocation(PARTICLE_BLOCK), bounds=(), posterior_draws=0)
        block = self.run.block(0)
        difference = few(block)["log_px"] - replace(few, precision="float32")(block)["log_px"]
        if not difference.any():
            return (f"products in {self.precision} change nothing here: there is no layer in float32",)
        mean, largest = float(difference.mean()), float(difference.abs().max())
        who = "all data" if self.run.structure.has_global_latents else f"the first {count_of(len(difference))}"
        return (
            f"products in {self.precision}: with {PARTICLE_BLOCK} particles log p(x) of {who} is "
            f"{mean:+.4f} nats from float32 on average, {largest:.4f} at most",
        )

    def __call__(self, block: Block, compiled: CompiledWeights | None = None) -> dict[str, Tensor]:
        """All statistics of a block's data, [N] by name; latents [N, draws, ...] as "posterior/name"."""
        with layer_precision(self.precision):
            return self.sample(self.proposal(block, compiled))

    def proposal(self, block: Block, compiled: CompiledWeights | None = None) -> Proposal:
        """Where the particles of a block come from."""
        if self.refined:
            return RefinedProposal(self.run, block, self.rows, compiled=self.densities)
        return GuideProposal(self.run, block, self.rows, compiled)

    def sample(self, proposal: Proposal) -> dict[str, Tensor]:
        """All statistics of draws from a proposal."""
        block = proposal.block
        diagnostics = {"family": proposal.fitted.family.cpu()} if isinstance(proposal, RefinedProposal) else {}
        allocated = self.allocation.allocate(proposal)
        counts = allocated["num_particles"]
        levels = sorted(set(counts.tolist()))
        ks = sorted(k for k in {*recorded_bounds(levels[0]), *self.bounds} if 1 <= k <= levels[0])
        groups = {count: _Group(self, block, count, (counts == count).nonzero()[:, 0], ks) for count in levels}
        start = missing = 0
        for level in levels:  # data leave once they have all their particles
            rows = (counts >= level).nonzero()[:, 0]
            part, positions = proposal.select(rows)
            for log_weight, elbo, latents in part.log_weights(level, start=start):
                for count in levels[levels.index(level) :]:
                    groups[count].add(log_weight, elbo, latents, positions[counts[rows] == count])
            missing = missing if start else part.block.num_missing  # the first particles are drawn for all rows
            start = level
        order = torch.cat([group.rows for group in groups.values()]).argsort()
        joined = concatenate([group.result() for group in groups.values()])
        found = {name: value.index_select(0, order) for name, value in joined.items()}
        return found | allocated | diagnostics | {"missing": torch.tensor(missing)}


class _Group:
    """The accumulated log-weights of those data of a block that have the same number of particles."""

    def __init__(self, sampler: ImportanceSampler, block: Block, count: int, rows: Tensor, bounds: Sequence[int]):
        self.rows = rows
        self.weights = LogWeightAccumulator(count, bounds, block.eps)
        key = (count,) if sampler.allocation.adaptive else ()
        seed = derive_seed(sampler.run.seed, block.number, "posterior", *key)
        draws = sampler.posterior_draws
        self.reservoir = PosteriorReservoir(draws, seed, sampler.run.structure) if draws else None

    def add(self, log_weight: Tensor, elbo: Tensor, latents: Mapping[str, Tensor] | None, positions: Tensor) -> None:
        """Adds the columns `positions` of log-weights and ELBO [particles, N], and of the latents behind them."""
        if len(positions) < log_weight.shape[1]:
            index = positions.to(log_weight.device)
            log_weight, elbo = log_weight[:, index], elbo[:, index]
        self.weights.add(log_weight, elbo)
        if self.reservoir and latents is not None:
            self.reservoir.add(log_weight, latents, positions.cpu())

    def result(self) -> dict[str, Tensor]:
        draws = self.reservoir.values if self.reservoir else {}
        return self.weights.result() | {f"posterior/{name}": value.transpose(0, 1) for name, value in draws.items()}
