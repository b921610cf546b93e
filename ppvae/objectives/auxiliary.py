"""A bound and something of the batch besides, as what labels say of a classifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from torch import Tensor

from ppvae.errors import UsageError
from ppvae.inference.structure import Structure
from ppvae.objectives.base import Call, Objective


@final
class AuxiliaryLoss(Objective):
    """bound + weight term(*batch), where the term is of the batch alone, in nats per datum: no bound on log p(x).

    For semi-supervised VAEs it is log q(label | x) on labelled data, by which the classifier learns from labels, too:
    `AuxiliaryLoss(ELBO(), vae.log_label, weight=...)`, alpha = 0.1 times the number of data in the paper.

    Args:
        bound: the objective that is added to; its particles and gradient are this one's.
        term: a function of the batch, term(*batch) [batch], whose parameters are the pair's own.
        weight: what the term counts for.

    Raises UsageError for a bound that is no objective of ppvae, or a term of another shape.
    Source: Kingma et al. 2014 (arXiv 1406.5298), equation 9.

    >>> import torch
    >>> from ppvae.models import LinearGaussian
    >>> from ppvae.objectives import ELBO
    >>> pair, x = LinearGaussian(3, 2), torch.ones(4, 3)
    >>> objective = AuxiliaryLoss(ELBO(), lambda x: x.sum(-1), weight=2.0)
    >>> round(ELBO().loss(pair.model, pair.guide, x) - objective.loss(pair.model, pair.guide, x), 3)
    24.0
    """

    def __init__(self, bound: Objective, term: Callable[..., Tensor], weight: float = 1.0):
        if not isinstance(bound, Objective):
            raise UsageError(f"bound: expected an objective of ppvae, found {type(bound).__name__}")
        self.of, self.term, self.weight, self.separate = bound, term, weight, bound.separate
        super().__init__(bound.num_particles)
        self.gradient = bound.gradient

    def _term(self, call: Call) -> Tensor:
        values = self.term(*call.batch)
        if values.shape != (len(call.batch[0]),):
            raise UsageError(f"term: expected a number a datum [{len(call.batch[0])}], found {list(values.shape)}")
        return self.weight * values.sum()

    def value(self, call: Call) -> Tensor:
        return self.of.value(call) + self._term(call)

    def surrogate(self, call: Call) -> Tensor:
        return self.of.surrogate(call) + self._term(call)

    def reduce(self, log_weight: Tensor) -> Tensor:
        return self.of.reduce(log_weight)

    def refuse(self, s: Structure) -> None:
        self.of.refuse(s)

    def refuse_gradient(self, s: Structure) -> None:
        self.of.refuse_gradient(s)

    @property
    def draws(self) -> int:
        return self.of.draws

    @property
    def options(self) -> dict[str, Any]:
        return self.of.options

    def scheduled(self) -> dict[str, float]:
        return self.of.scheduled()

    def state_dict(self) -> dict[str, Any]:
        return self.of.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.of.load_state_dict(state)

    def go_to(self, step: int) -> None:
        super().go_to(step)
        self.of.go_to(step)
