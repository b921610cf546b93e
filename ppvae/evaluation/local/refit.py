"""What is refit for each datum of a pair, and the ELBO that each fitted guide reaches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ppvae.errors import ContractError, PpvaeError, site_error
from ppvae.evaluation.blocks import Block
from ppvae.evaluation.importance.accumulators import LogWeightAccumulator
from ppvae.evaluation.local.guides import (
    Distributions,
    FullRankFamily,
    FullRankGuide,
    Guided,
    Local,
    Network,
    optimize_local_elbo,
)
from ppvae.evaluation.local.parameters import NotParameterized
from ppvae.inference.inspection import inspect
from ppvae.inference.structure import Structure
from ppvae.inference.tracing import Program
from ppvae.rng import derive_seed

# what is kept of the importance weights under the last guide that was fitted
WEIGHED = ("log_px", "std_error", "ess", "k_hat", "nonfinite")


@dataclass(frozen=True)
class Plan:
    """What is fitted to a block of data, and how."""

    model: Program
    guide: Program
    s: Structure
    size: int
    why_network: str
    richer: Callable[[Tensor, Tensor], FullRankFamily] | None
    why_no_richer: str
    num_particles: int
    steps: int
    rounds: int
    seed: int
    rows: int

    @property
    def refit(self) -> str:
        """What is refit, in words."""
        if not self.why_network:
            return "each datum has distributions of its own"
        return f"each datum has a copy of the guide's network of its own, since {self.why_network}"

    @property
    def richer_words(self) -> str:
        """What the richer family is."""
        return getattr(self.richer, "name", type(self.richer).__name__) if self.richer else ""

    def settled(self, columns: tuple[Any, ...], place: torch.device) -> Plan:
        """The plan as the first block of data allows it."""
        plan, block = self, Block(columns, 0, min(self.size, len(columns[0])), 0, self.s, place)
        try:
            Distributions(self.model, self.guide, block)
        except NotParameterized as error:
            plan = replace(
                self, size=1, s=_of_one(self.model, self.guide, self.s, columns, place), why_network=str(error)
            )
            block = Block(columns, 0, 1, 0, plan.s, place)
        if self.richer is not None:
            try:
                FullRankGuide(Guided(self.model, self.guide, block), self.richer, self.seed, self.rows)
            except PpvaeError as error:
                plan = replace(plan, richer=None, why_no_richer=str(error))
        return plan

    def of_block(self, block: Block, tick: Callable[[], Any]) -> dict[str, Tensor]:
        """Every ELBO of a block's data, and the importance-sampling estimate of the last fitted."""
        seed = derive_seed(self.seed, block.number)
        climbing = functools.partial(optimize_local_elbo, steps=self.steps, rounds=self.rounds, seed=seed, tick=tick)
        kind = Network if self.why_network else Distributions
        best = kind(self.model, self.guide, block)
        gained, rounds = climbing(best)
        local: dict[str, Local] = {"elbo": Guided(self.model, self.guide, block), "best_elbo": best}
        if self.richer is not None:
            richer = local["richer_elbo"] = FullRankGuide(best, self.richer, seed, self.rows)
            climbing(richer)
        out = {"gained": gained.double(), "rounds": torch.tensor(rounds)}
        for name, one in local.items():
            weights = LogWeightAccumulator(self.num_particles, (), block.eps)
            for log_weight, elbo in one.weights(self.num_particles, self.seed, self.rows):
                weights.add(log_weight, elbo)
            result = weights.result()
            out[name] = result["elbo"]
        return {n: v.cpu() for n, v in (out | {n: result[n] for n in WEIGHED}).items()}


def _of_one(model: Program, guide: Program, s: Structure, columns: tuple[Any, ...], place: torch.device) -> Structure:
    """What the pair is when it is called with a single datum."""
    if s.draws_subsample:
        return s
    try:
        return inspect(model, guide, Block(columns, 0, 1, 0, s, place).batch)
    except ContractError as error:
        raise ContractError(
            f"a refit of the guide's network takes one datum at a time, which the pair refuses: {error}"
        ) from error


def check_refit(s: Structure) -> None:
    """Refuses a pair whose guide cannot be refit datum by datum."""
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
