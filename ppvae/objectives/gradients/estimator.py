"""The interface of gradient estimators.

A bound per datum R(log w_1, ..., log w_K) has the pathwise gradient sum_k r_k d log w_k, r_k = dR / d log w_k. Other
estimators replace what reaches the guide's parameters by a term of the same expectation, unless they state a bias.
"""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from ppvae.inference.structure import Structure
from ppvae.objectives.protocol import LogWeightBound, PairCall


class Stateful:
    """A part of an objective that a checkpoint may hold state of; most have none."""

    def state_dict(self) -> dict[str, Any]:
        """The state that a checkpoint stores."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state of a checkpoint; an empty dict restores the initial state."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class GradientEstimator(Stateful, ABC):
    """An estimator of the gradient of an objective; the objective's value does not depend on it.

    A subclass defines `surrogate` and `check_structure`; `check_objective` where it needs a hook of the objective.
    """

    holds_latents = True  # draws may be held constant, so that particles share a draw of the global latents

    @property
    def has_learned_baseline(self) -> bool:
        """Whether it trains something of its own otherwise than by `learning_step`; its steps are not captured."""
        return False

    @abstractmethod
    def surrogate(self, objective: LogWeightBound, call: PairCall) -> Tensor:
        """A scalar: its value is the bound summed over the batch, its gradient the estimate."""

    @abstractmethod
    def check_structure(self, objective: LogWeightBound, s: Structure) -> None:
        """Raises ContractError, naming the site, where the estimator is not defined for a pair."""

    def check_objective(self, objective: LogWeightBound) -> None:
        """Raises UsageError where the estimator is not defined for an objective; warns where it is biased."""


def gradient_only(surrogate: Tensor) -> Tensor:
    """A tensor of zeros that has the surrogate's gradient."""
    return surrogate - surrogate.detach()
