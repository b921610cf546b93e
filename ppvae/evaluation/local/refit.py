"""The local guides that a pair allows, fitted to a block of data, and the ELBO of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ppvae.errors import ContractError, PpvaeError, site_error
from ppvae.evaluation.blocks import Block
from ppvae.evaluation.importance.accumulators import LogWeightAccumulator
from ppvae.evaluation.local.full_rank import FullRankGuide, JointNormalFamily
from ppvae.evaluation.local.guides import AmortizedGuide, NetworkCopyGuide, PerDatumGuide
from ppvae.evaluation.local.optimization import OptimizableGuide, optimize_local_elbo
from ppvae.evaluation.local.parameters import UnsupportedDistribution
from ppvae.inference.inspection import inspect
from ppvae.inference.structure import Structure
from ppvae.inference.tracing import Program
from ppvae.rng import derive_seed

ESTIMATE_FIELDS = ("log_px", "std_error", "ess", "k_hat", "nonfinite")  # of the last guide that is fitted


@dataclass(frozen=True)
class LocalRefitter:
    """The guides that are fitted to each datum, and the settings of the fit.

    Attributes:
        size: data in a block.
        why_network: the reason why a copy of the guide's network is refit; empty where its distributions are.
        richer: makes the richer family from locations and scales; None for no richer family.
        why_no_richer: the reason why the richer family cannot be fitted, or empty.
        rows: the largest number of (datum, particle) rows in one run of the model.
    """

    model: Program
    guide: Program
    s: Structure
    size: int
    richer: Callable[[Tensor, Tensor], JointNormalFamily] | None
    num_particles: int
    steps: int
    rounds: int
    seed: int
    rows: int
    why_network: str = ""
    why_no_richer: str = ""

    @property
    def description(self) -> str:
        """What is refit, in words."""
        if not self.why_network:
            return "each datum has distributions of its own"
        return f"each datum has a copy of the guide's network of its own, since {self.why_network}"

    @property
    def richer_name(self) -> str:
        """The name of the richer family; empty without one."""
        return getattr(self.richer, "name", type(self.richer).__name__) if self.richer else ""

    def choose_guides(self, columns: tuple[Any, ...], device: torch.device) -> LocalRefitter:
        """The refit with the local guides that the pair allows, tried on the first block of data."""
        refit, block = self, Block(columns, 0, min(self.size, len(columns[0])), 0, self.s, device)
        try:
            PerDatumGuide(self.model, self.guide, block)
        except UnsupportedDistribution as error:
            s = _structure_of_one(self.model, self.guide, self.s, columns, device)
            refit = replace(self, size=1, s=s, why_network=str(error))
            block = Block(columns, 0, 1, 0, s, device)
        if self.richer is not None:
            try:
                FullRankGuide(AmortizedGuide(self.model, self.guide, block), self.richer, self.seed, self.rows)
            except PpvaeError as error:
                refit = replace(refit, richer=None, why_no_richer=str(error))
        return refit

    def fit_block(self, block: Block, on_step: Callable[[], Any]) -> dict[str, Tensor]:
        """The ELBOs of the data of a block under each guide, and the estimate of log p(x) from the last guide."""
        seed = derive_seed(self.seed, block.number)
        fit: dict[str, Any] = {"steps": self.steps, "rounds": self.rounds, "seed": seed, "on_step": on_step}
        local_guide = NetworkCopyGuide if self.why_network else PerDatumGuide
        best = local_guide(self.model, self.guide, block)
        gained, rounds = optimize_local_elbo(best, **fit)
        guides: dict[str, OptimizableGuide] = {
            "elbo": AmortizedGuide(self.model, self.guide, block),
            "best_elbo": best,
        }
        if self.richer is not None:
            richer = guides["richer_elbo"] = FullRankGuide(best, self.richer, seed, self.rows)
            optimize_local_elbo(richer, **fit)
        out = {"gained": gained.double(), "rounds": torch.tensor(rounds)}
        for name, guide in guides.items():
            weights = LogWeightAccumulator(self.num_particles, (), block.eps)
            for log_weight, elbo in guide.log_weights(self.num_particles, self.seed, self.rows):
                weights.add(log_weight, elbo)
            result = weights.result()
            out[name] = result["elbo"]
        return {n: v.cpu() for n, v in (out | {n: result[n] for n in ESTIMATE_FIELDS}).items()}


def _structure_of_one(
    model: Program, guide: Program, s: Structure, columns: tuple[Any, ...], device: torch.device
) -> Structure:
    """The structure of the pair on a single datum."""
    if s.draws_subsample:
        return s
    try:
        return inspect(model, guide, Block(columns, 0, 1, 0, s, device).batch)
    except ContractError as error:
        raise ContractError(
            f"a refit of the guide's network takes one datum at a time, which the pair refuses: {error}"
        ) from error


def check_refit(s: Structure) -> None:
    """Refuses a pair whose guide cannot be refit datum by datum.

    Raises:
        ContractError: a latent is shared by all data, or has no pathwise gradient.
    """
    if s.has_global_latents:
        raise ContractError(
            "a latent is shared by all data: expected latents per datum, for a gap per datum; found joint weights. "
            "log_marginal compares the joint log p(x) with the ELBO"
        )
    if s.non_reparameterized:
        raise site_error(
            s.non_reparameterized[0], "a reparameterised latent, to refit the guide by gradients", "one without",
            "enumerate it in the guide (infer={'enumerate': 'parallel'}), or in the model alone",
        )  # fmt: skip
