"""A bound plus an auxiliary loss of the batch, such as the classification loss of a semi-supervised VAE."""

from collections.abc import Callable
from typing import Any, Self, final

from torch import Tensor

from ppvae.data.admission import argument_counts
from ppvae.errors import UsageError
from ppvae.errors.ranges import check_numbers
from ppvae.inference.structure import Structure
from ppvae.inference.terms import Terms
from ppvae.objectives.gradients import Gradient
from ppvae.objectives.objective import Objective
from ppvae.objectives.protocol import PairCall


@final
class AuxiliaryLoss(Objective):
    """bound + weight * term(*batch), with a term of the batch alone in nats per datum; not a bound on log p(x).

    In semi-supervised VAEs the term is log q(label | x) of the labelled data, which trains the classifier on labels:
    `AuxiliaryLoss(ELBO(), vae.log_label, weight=...)`; the paper's weight is alpha = 0.1 times the number of data.

    Args:
        bound: the objective that the term is added to; its particles and gradient estimator are used.
        term: a function of the batch, term(*batch) -> [batch], whose parameters belong to the pair.
        weight: the factor of the term.

    Raises:
        UsageError: a bound that is not an objective of ppvae, or a term of another shape.

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
        check_numbers(weight=weight)
        if not isinstance(bound, Objective):
            raise UsageError(f"bound: expected an objective of ppvae, found {type(bound).__name__}")
        self.objective, self.term, self.weight = bound, term, weight
        self.factorizes_over_data = bound.factorizes_over_data
        super().__init__(bound.num_particles)
        self.gradient = bound.gradient

    def _auxiliary_term(self, call: PairCall) -> Tensor:
        required, most = argument_counts(self.term)
        if not required <= len(call.batch) <= most:
            name = getattr(self.term, "__name__", type(self.term).__name__)
            raise UsageError(
                f"term: {name} takes {required} tensors, and the batch has {len(call.batch)}: pass as data what "
                "it takes, as (x, labels), or --labels on the command line; without labels train on the bound alone"
            )
        values = self.term(*call.batch)
        if values.shape != (len(call.batch[0]),):
            raise UsageError(f"term: expected one number per datum [{len(call.batch[0])}], found {list(values.shape)}")
        return self.weight * values.sum()

    def value(self, call: PairCall) -> Tensor:
        return self.objective.value(call) + self._auxiliary_term(call)

    def surrogate(self, call: PairCall) -> Tensor:
        return self.objective.surrogate(call) + self._auxiliary_term(call)

    def reduce(self, log_weight: Tensor) -> Tensor:
        return self.objective.reduce(log_weight)

    def global_bound(self, t: Terms) -> Tensor:
        return self.objective.global_bound(t)

    def with_gradient(self, gradient: Gradient) -> Self:
        new = super().with_gradient(gradient)
        new.objective = self.objective.with_gradient(new.gradient)
        return new

    def check_estimator(self) -> None:
        """The bound's own constructor has checked it."""

    def check_structure(self, s: Structure) -> None:
        self.objective.check_structure(s)

    def check_gradient(self, s: Structure) -> None:
        self.objective.check_gradient(s)

    @property
    def draws(self) -> int:
        return self.objective.draws

    @property
    def shares_globals(self) -> bool:
        return self.objective.shares_globals

    @property
    def terms_options(self) -> dict[str, Any]:
        return self.objective.terms_options

    def scheduled_values(self) -> dict[str, float]:
        return self.objective.scheduled_values()

    def state_dict(self) -> dict[str, Any]:
        return self.objective.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.objective.load_state_dict(state)

    def set_step(self, step: int) -> None:
        super().set_step(step)
        self.objective.set_step(step)
