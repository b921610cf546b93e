"""Hyperparameters as functions of the training step: warm-up and cyclical annealing."""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from ppvae.errors import UsageError
from ppvae.errors.ranges import COUNT_OR_NONE, FINITE, LARGEST, check_numbers

Schedule: TypeAlias = Callable[[int], float]  # of the number of gradient steps taken before


@final
@dataclass(frozen=True)
class Linear:
    """Linear from `start` to `end` over `steps` steps, constant afterwards.

    Source: Bowman et al. 2016 (arXiv 1511.06349); Sonderby et al. 2016 (arXiv 1602.02282).

    >>> [Linear(4)(step) for step in (0, 1, 4, 9)]
    [0.0, 0.25, 1.0, 1.0]
    """

    steps: int
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        COUNT_OR_NONE.check_number("steps", self.steps)
        FINITE.check_number("start", self.start)
        FINITE.check_number("end", self.end)

    def __call__(self, step: int) -> float:
        fraction = min(1.0, step / self.steps) if self.steps > 0 else 1.0
        return self.start + (self.end - self.start) * fraction


@final
@dataclass(frozen=True)
class Cyclical:
    """Linear from `start` to `end` over the first fraction `ramp` of every period, constant for the remainder.

    Source: Fu et al. 2019 (arXiv 1903.10145).

    >>> [Cyclical(4)(step) for step in (0, 1, 2, 3, 4)]
    [0.0, 0.5, 1.0, 1.0, 0.0]
    """

    period: int
    ramp: float = 0.5
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(period=self.period, ramp=self.ramp)
        FINITE.check_number("start", self.start)
        FINITE.check_number("end", self.end)

    def __call__(self, step: int) -> float:
        return Linear(max(1, round(self.ramp * self.period)), self.start, self.end)(step % self.period)


@final
class ScheduledScalar:
    """A scheduled hyperparameter whose current value is one tensor, updated in place: a captured graph reads it.

    Args:
        schedule: a constant, or a function of the step.
        warmup: steps over which the value is multiplied by a factor that rises linearly from 0 to 1.
    """

    def __init__(self, schedule: float | Schedule, warmup: int = 0):
        check_numbers(warmup=warmup)
        if not callable(schedule):
            FINITE.check_number("schedule", schedule)
        self.schedule, self.warmup = schedule, warmup
        self.current: Tensor = torch.zeros((), dtype=torch.float64)
        self._is_constant = False  # before its value is set
        self.set_step(0)
        self._is_constant = not callable(schedule) and not warmup

    def _at(self, step: int) -> Any:
        """The value of the schedule, which is one number, finite or not."""
        value: Any = self.schedule(step)  # type: ignore[operator]
        number = value.dim() == 0 and not value.is_complex() if isinstance(value, Tensor) else isinstance(value, Real)
        if not number or (isinstance(value, int) and abs(value) > LARGEST):
            raise UsageError(f"schedule: expected a number at step {step}, found {value!r}"[:300])
        return value

    def set_step(self, step: int) -> None:
        """Sets the current value to that of a step, counted from 0."""
        check_numbers(step=step)
        if self._is_constant:
            return
        value = self._at(step) if callable(self.schedule) else self.schedule
        self.current.fill_(value * Linear(self.warmup)(step))
