"""Baselines of the score function: what is taken off a bound, so that its score has less noise and the same mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, final

import pyro
import torch
from torch import Tensor, nn

from ppvae.errors import ContractError

if TYPE_CHECKING:
    from ppvae.objectives.base import Objective


class Baseline(ABC):
    """What is subtracted; it may not depend on the draw whose score it goes with."""

    @abstractmethod
    def __call__(self, objective: Objective, log_weight: Tensor, batch: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """(what the score of each draw is multiplied by [particles, batch], a loss that fits the baseline)."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027  most have no state
        """Goes on from a checkpoint."""


@final
class Nothing(Baseline):
    """No baseline: the bare score function."""

    def __call__(self, objective: Objective, log_weight: Tensor, batch: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        return objective.credit(log_weight), log_weight.new_zeros(())


@final
class LeaveOneOut(Baseline):
    """The bound with a draw's log-weight replaced by the mean of the others': VIMCO, leave-one-out for an ELBO.

    Source: Mnih and Rezende 2016 (arXiv 1602.06725), with the geometric mean; Kool et al. 2019 for the ELBO.
    """

    def __call__(self, objective: Objective, log_weight: Tensor, batch: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        count = len(log_weight)
        others = (log_weight.sum(0) - log_weight) / (count - 1)
        same = torch.eye(count, dtype=torch.bool, device=log_weight.device)[..., None]
        without = objective.reduce(torch.where(same, others, log_weight[:, None]))  # [which is replaced, batch]
        return objective.reduce(log_weight) - without, log_weight.new_zeros(())


@final
class MovingAverage(Baseline):
    """The bound's average over past batches, with exponentially falling weights.

    Args:
        decay: the weight of the past, in [0, 1).

    Source: Mnih and Gregor 2014 (arXiv 1402.0030).
    """

    def __init__(self, decay: float = 0.9):
        self.decay = decay
        self.average: Tensor | None = None

    def __call__(self, objective: Objective, log_weight: Tensor, batch: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        level = log_weight.new_zeros(()) if self.average is None else self.average.to(log_weight)
        now = objective.reduce(log_weight).mean()
        self.average = now if self.average is None else self.average.to(now).lerp(now, 1 - self.decay)
        return objective.credit(log_weight - level), log_weight.new_zeros(())

    def state_dict(self) -> dict[str, Any]:
        return {} if self.average is None else {"average": self.average.detach().cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average = state.get("average")


@final
class Learned(Baseline):
    """A network of the datum, fitted to the bound by least squares along with the pair (it is registered with Pyro).

    Args:
        net: called with the batch's first tensor; its output has one number for each datum.

    Source: Mnih and Gregor 2014 (arXiv 1402.0030).
    """

    NAME = "ppvae_baseline"

    def __init__(self, net: nn.Module):
        self.net = net

    def __call__(self, objective: Objective, log_weight: Tensor, batch: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            net = pyro.module(self.NAME, self.net)
            level = net(batch[0]).to(log_weight)
        if level.numel() != log_weight.shape[1]:
            raise ContractError(
                f"a learned baseline: expected one number for each of {log_weight.shape[1]} data, found shape "
                f"{list(level.shape)}"
            )
        level = level.reshape(-1)
        fitted = (objective.reduce(log_weight) - level).square().sum()
        return objective.credit(log_weight - level.detach()), fitted
