"""Baselines of the score function: what is taken off a bound, so that its score has less noise and the same mean."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from ppvae.errors import ContractError
from ppvae.objectives.reductions import sum_of_others

if TYPE_CHECKING:
    from ppvae.objectives.base import Objective


_adam = functools.partial(torch.optim.Adam, lr=1e-3)


class Baseline(ABC):
    """What is taken off; it may not depend on the draw whose score it goes with."""

    @abstractmethod
    def __call__(self, objective: Objective, log_weight: Tensor, batch: tuple[Any, ...]) -> Tensor:
        """What the score of each draw is multiplied by, [particles, batch]."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027  most have no state
        """Goes on from a checkpoint; an empty one starts anew."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


@final
class NoBaseline(Baseline):
    """No baseline: the bare score function."""

    def __call__(self, objective: Objective, log_weight: Tensor, batch: tuple[Any, ...]) -> Tensor:
        return objective.learning_signal(log_weight)


@final
class LeaveOneOut(Baseline):
    """The bound with a draw's log-weight replaced by the mean of the others': VIMCO, leave-one-out for an ELBO.

    Source: Mnih and Rezende 2016 (arXiv 1602.06725), with the geometric mean; Kool et al. 2019 for the ELBO.
    """

    def __call__(self, objective: Objective, log_weight: Tensor, batch: tuple[Any, ...]) -> Tensor:
        others = sum_of_others(log_weight) / (len(log_weight) - 1)
        return objective.reduce(log_weight) - objective.without(log_weight, others)


@final
class MovingAverage(Baseline):
    """The bound's average over past batches, with exponentially falling weights.

    Args:
        decay: the weight of the past, in [0, 1).

    Source: Mnih and Gregor 2014 (arXiv 1402.0030).
    """

    def __init__(self, decay: float = 0.9):
        self.decay = decay
        self._past = _Past()

    def __call__(self, objective: Objective, log_weight: Tensor, batch: tuple[Any, ...]) -> Tensor:
        level = self._past(objective.reduce(log_weight).mean(), self.decay)
        return objective.learning_signal(log_weight - level)

    def state_dict(self) -> dict[str, Any]:
        return {} if bool(self._past.average.isnan()) else {"average": self._past.average.cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._past.average.fill_(state.get("average", torch.nan))

    def __repr__(self) -> str:
        return f"MovingAverage({self.decay})"


class _Past(nn.Module):
    """An average in a buffer, NaN before the first number: a captured step reads it and moves it on."""

    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.full((), torch.nan, dtype=torch.float64))

    def forward(self, now: Tensor, decay: float) -> Tensor:
        """The average before this number, 0 if there is none."""
        if self.average.device != now.device:
            self.to(now.device)
        none, past = self.average.isnan(), self.average.to(now.dtype)
        self.average.copy_(torch.where(none, now, past.lerp(now, 1 - decay)))
        return torch.where(none, 0.0, past)


@final
class Learned(Baseline):
    """A network of the datum, fitted to the bound by least squares along with the pair.

    Args:
        net: called with the batch's first tensor; its output has one number for each datum.
        optimizer: a function of parameters that gives a torch optimizer, the network's own.

    Source: Mnih and Gregor 2014 (arXiv 1402.0030).
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[Any], torch.optim.Optimizer] = _adam,
    ):
        self.net = net
        self._make = optimizer
        self._optimizer: torch.optim.Optimizer | None = None

    def __call__(self, objective: Objective, log_weight: Tensor, batch: tuple[Any, ...]) -> Tensor:
        if self._optimizer is None:
            self._optimizer = self._make(self.net.to(batch[0].device).parameters())
        with torch.enable_grad():
            level = self.net(batch[0])
            if level.numel() != log_weight.shape[1]:
                raise ContractError(
                    f"a learned baseline: expected one number for each of {log_weight.shape[1]} data, found shape "
                    f"{list(level.shape)}"
                )
            level = level.reshape(-1).to(log_weight)
            self._optimizer.zero_grad()
            (objective.reduce(log_weight) - level).square().mean().backward()
        self._optimizer.step()
        return objective.learning_signal(log_weight - level.detach())

    def state_dict(self) -> dict[str, Any]:
        if self._optimizer is None:
            return {}
        net = {name: t.detach().cpu().clone() for name, t in self.net.state_dict().items()}
        return {"net": net, "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._optimizer = None
        if state:
            self.net.load_state_dict(state["net"])
            self._optimizer = self._make(self.net.parameters())
            self._optimizer.load_state_dict(state["optimizer"])

    def __repr__(self) -> str:
        return f"Learned({type(self.net).__name__})"
