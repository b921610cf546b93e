"""Control variates for the score-function estimator."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from ppvae.compilation.side_effects import learning_step, parameters_of
from ppvae.errors import ContractError
from ppvae.objectives.gradients.estimator import Stateful
from ppvae.objectives.protocol import LogWeightBound
from ppvae.objectives.reductions import leave_one_out_sum

_adam = functools.partial(torch.optim.Adam, lr=1e-3)


class Baseline(Stateful, ABC):
    """A control variate b_k, subtracted from the learning signal of draw k; it must not depend on draw k.

    Attributes:
        may_be_captured: whether a captured step may hold it, as nothing is left of a call but changes of buffers and
            steps by `learning_step`.
    """

    may_be_captured = False

    @abstractmethod
    def __call__(self, objective: LogWeightBound, log_weight: Tensor, batch: tuple[Any, ...]) -> Tensor:
        """b_k, [particles, batch] nats: the score of draw k is multiplied by `learning_signal` minus b_k."""


def signal_of_constant(objective: LogWeightBound, log_weight: Tensor, value: Tensor) -> Tensor:
    """The learning signal of draws whose log-weights all equal `value` [] or [batch]: [particles, batch] nats.

    For an importance-weighted bound it is the value, for a mean of K log-weights the value over K.
    """
    return objective.learning_signal(value.to(log_weight).expand_as(log_weight))


@final
class NoBaseline(Baseline):
    """No baseline: the plain score-function estimator."""

    may_be_captured = True

    def __call__(self, objective: LogWeightBound, log_weight: Tensor, batch: tuple[Any, ...]) -> Tensor:
        return torch.zeros_like(log_weight)


@final
class LeaveOneOut(Baseline):
    """The signal minus b_k is the bound minus that with log w_k replaced by the mean of the other log-weights: VIMCO.

    For an ELBO it is the leave-one-out baseline.

    Source: Mnih and Rezende 2016 (arXiv 1602.06725), with the geometric mean; Kool et al. 2019 for the ELBO.
    """

    may_be_captured = True

    def __call__(self, objective: LogWeightBound, log_weight: Tensor, batch: tuple[Any, ...]) -> Tensor:
        mean_of_others = leave_one_out_sum(log_weight) / (len(log_weight) - 1)
        share = objective.reduce(log_weight) - objective.leave_one_out_bound(log_weight, mean_of_others)
        return objective.learning_signal(log_weight) - share


@final
class MovingAverage(Baseline):
    """b is the exponential moving average of the bound over past batches.

    Args:
        decay: the weight of the previous average, in [0, 1).

    Source: Mnih and Gregor 2014 (arXiv 1402.0030).
    """

    may_be_captured = True

    def __init__(self, decay: float = 0.9):
        self.decay = decay
        self._average = ExponentialMovingAverage()

    def __call__(self, objective: LogWeightBound, log_weight: Tensor, batch: tuple[Any, ...]) -> Tensor:
        baseline = self._average(objective.reduce(log_weight).mean(), self.decay)
        return signal_of_constant(objective, log_weight, baseline)

    def state_dict(self) -> dict[str, Any]:
        return {} if bool(self._average.value.isnan()) else {"average": self._average.value.cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._average.value.fill_(state.get("average", torch.nan))

    def __repr__(self) -> str:
        return f"MovingAverage({self.decay})"


class ExponentialMovingAverage(nn.Module):
    """A moving average in a buffer, which a captured step updates in place; NaN before the first update."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.value = nn.Buffer(torch.full(shape, torch.nan, dtype=torch.float64))

    def forward(self, update: Tensor, decay: float) -> Tensor:
        """The average before this update; 0 before the first."""
        if self.value.device != update.device:
            self.to(update.device)
        empty, average = self.value.isnan(), self.value.to(update.dtype)
        self.value.copy_(torch.where(empty, update, average.lerp(update, 1 - decay)))
        return torch.where(empty, 0.0, average)


@final
class Learned(Baseline):
    """b(x) is a network's output, fitted to the bound by least squares during training.

    Args:
        net: called with the batch's first tensor [batch, ...]; its output has one element per datum.
        optimizer: a function of the network's parameters that returns a torch optimizer.

    Raises ContractError for an output of another size.

    Source: Mnih and Gregor 2014 (arXiv 1402.0030).
    """

    may_be_captured = True

    def __init__(self, net: nn.Module, optimizer: Callable[[Any], torch.optim.Optimizer] = _adam):
        self.net = net
        self._optimizer_factory = optimizer
        self._optimizer: torch.optim.Optimizer | None = None

    def __call__(self, objective: LogWeightBound, log_weight: Tensor, batch: tuple[Any, ...]) -> Tensor:
        if self._optimizer is None:
            self._optimizer = self._optimizer_factory(self.net.to(batch[0].device).parameters())
        with torch.enable_grad():
            baseline = self.net(batch[0])
            if baseline.numel() != log_weight.shape[1]:
                raise ContractError(
                    f"a learned baseline: expected one element for each of {log_weight.shape[1]} data, found shape "
                    f"{list(baseline.shape)}"
                )
            baseline = baseline.reshape(-1).to(log_weight)
            error = (objective.reduce(log_weight) - baseline).square().mean()
            gradients = torch.autograd.grad(error, parameters_of(self._optimizer), allow_unused=True)
        learning_step(self._optimizer, gradients)
        return signal_of_constant(objective, log_weight, baseline.detach())

    def state_dict(self) -> dict[str, Any]:
        if self._optimizer is None:
            return {}
        net = {name: t.detach().cpu().clone() for name, t in self.net.state_dict().items()}
        return {"net": net, "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._optimizer = None
        if state:
            self.net.load_state_dict(state["net"])
            self._optimizer = self._optimizer_factory(self.net.parameters())
            self._optimizer.load_state_dict(state["optimizer"])

    def __repr__(self) -> str:
        return f"Learned({type(self.net).__name__})"
