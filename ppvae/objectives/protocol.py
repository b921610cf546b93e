"""What a gradient estimator reads: an objective as a bound, and a model/guide pair on one batch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ppvae.inference.structure import Structure
from ppvae.inference.terms import Terms, evaluate_terms
from ppvae.inference.tracing import Program


class LogWeightBound(Protocol):
    """A bound per datum as a function of its log-weights; `ppvae.objectives.Objective` documents each member."""

    @property
    def draws(self) -> int: ...

    @property
    def homogeneity(self) -> float | None: ...

    @property
    def stl_unbiased(self) -> bool: ...

    def reduce(self, log_weight: Tensor) -> Tensor: ...

    def log_weights(self, t: Terms) -> Tensor: ...

    def bound(self, t: Terms) -> Tensor: ...

    def total(self, t: Terms) -> Tensor: ...

    def learning_signal(self, log_weight: Tensor) -> Tensor: ...

    def leave_one_out_bound(self, log_weight: Tensor, replacement: Tensor) -> Tensor: ...

    def dreg_weights(self, log_weight: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class PairCall:
    """One evaluation of an objective: the pair, its batch, its structure and the draws per datum."""

    model: Program
    guide: Program
    batch: tuple[Any, ...]
    structure: Structure
    num_particles: int
    terms_options: dict[str, Any] = field(default_factory=dict)
    shares_globals: bool = False  # all particles share one draw of the global latents
    _drawn: list[Terms] = field(default_factory=list, repr=False)
    _index: list[Tensor] = field(default_factory=list, repr=False)

    def terms(self, **options: Any) -> Terms:
        """The pair's `Terms` on fresh draws; options as `ppvae.inference.terms` takes them.

        Of a pair with global latents they are the local terms given a draw of these, which act as parameters; `globals`
        then has the others. Where no datum has a weight of its own, all terms: weights are joint, [particles, 1].
        """
        s, index = self.structure, None
        if s.draws_subsample:  # one subsample for all particles
            index = torch.randperm(s.full_size, device=self.batch[0].device)[: s.subsample_size]
            self._index[:] = [index]
        draws = 1 if self.shares_globals and not s.local_refusal else None
        t = evaluate_terms(
            self.model, self.guide, self.batch, self.num_particles, structure=s, index=index, global_draws=draws,
            **{**self.terms_options, **options},
        )  # fmt: skip
        self._drawn[:] = [t]
        return t if s.local_refusal else t.local

    def again(self, num_particles: int, values: Mapping[str, Tensor], **options: Any) -> Terms:
        """The terms of further particles at given values of some sites, of the data of the last `terms`."""
        return evaluate_terms(
            self.model, self.guide, self.batch, num_particles, structure=self.structure, values=values,
            index=self._index[0] if self._index else None, **{**self.terms_options, **options},
        )  # fmt: skip

    @property
    def globals(self) -> Terms | None:
        """The terms of the global latents at the last draws, [particles, 1]; None where there are none apart."""
        drawn = self._drawn if self.structure.has_global_latents and not self.structure.local_refusal else ()
        return drawn[0].globals if drawn else None
