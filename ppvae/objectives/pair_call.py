"""A model/guide pair on one batch, as an objective evaluates it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ppvae.inference.structure import Structure
from ppvae.inference.terms import Terms, evaluate_terms
from ppvae.inference.tracing import Program


@dataclass(frozen=True)
class PairCall:
    """One evaluation of an objective: the pair, its batch, its structure and the draws per datum."""

    model: Program
    guide: Program
    batch: tuple[Any, ...]
    structure: Structure
    num_particles: int
    terms_options: dict[str, Any] = field(default_factory=dict)

    def terms(self, **options: Any) -> Terms:
        """The pair's `Terms` on fresh draws; options as `ppvae.inference.terms` takes them."""
        s, index = self.structure, None
        if s.draws_subsample:  # one subsample for all particles
            index = torch.randperm(s.full_size, device=self.batch[0].device)[: s.subsample_size]
        return evaluate_terms(
            self.model, self.guide, self.batch, self.num_particles, structure=s, index=index,
            **{**self.terms_options, **options},
        )  # fmt: skip
