"""The guide as the proposal: log-weights of its own draws, compiled where that pays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import final

import pyro
import torch
from torch import Tensor

from ppvae.evaluation.blocks import Block, Evaluation
from ppvae.evaluation.importance.compiled_weights import CompiledWeights
from ppvae.evaluation.proposals.log_weights import LogWeights, select_rows
from ppvae.inference.terms import evaluate_terms, sample_guide
from ppvae.rng import fork_rng


@final
class GuideProposal:
    """The guide as it is."""

    def __init__(self, run: Evaluation, block: Block, rows: int, compiled: CompiledWeights | None = None):
        self.run, self.block, self.rows, self.compiled = run, block, rows, compiled

    def select(self, rows: Tensor) -> tuple[GuideProposal, Tensor]:
        part, positions = select_rows(self.run, self.block, rows)
        return GuideProposal(self.run, part, self.rows, self.compiled), positions

    def log_weights(self, num_particles: int, *, start: int = 0, noise: str = "") -> Iterator[LogWeights]:
        run = self.run
        for log_weight, elbo, t in self.block.weights(
            run.model, run.guide, num_particles, run.seed, self.rows, self.compiled, start=start, noise=noise
        ):
            latents = None if t is None else {name: site.value for name, site in t.guide.items()}
            yield log_weight, elbo, latents

    def log_weights_at(self, latents: Mapping[str, Tensor]) -> Tensor:
        block, (model, guide) = self.block, (self.run.model, self.run.guide)
        with torch.no_grad(), pyro.validation_enabled(False), fork_rng():
            sites = sample_guide(guide, block.batch, 1, structure=block.s, index=block.index)
            values = {name: latents[name].expand(site.value.shape[1:])[None] for name, site in sites.items()}
            t = evaluate_terms(model, guide, block.batch, 1, structure=block.s, index=block.index, values=values)
        return t.log_weight[:, : block.num_weights]
