"""Numbers that follow the steps of training: warm-up and cycles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor

Schedule: TypeAlias = Callable[[int], float]  # of the number of gradient steps taken before


@final
@dataclass(frozen=True)
class Linear:
    """Rises or falls from `start` to `end` over so many steps, and stays there.

    Source: Bowman et al. 2016 (arXiv 1511.06349); Sonderby et al. 2016 (arXiv 1602.02282).

    >>> [Linear(4)(step) for step in (0, 1, 4, 9)]
    [0.0, 0.25, 1.0, 1.0]
    """

    steps: int
    start: float = 0.0
    end: float = 1.0

    def __call__(self, step: int) -> float:
        part = min(1.0, step / self.steps) if self.steps > 0 else 1.0
        return self.start + (self.end - self.start) * part


@final
@dataclass(frozen=True)
class Cyclical:
    """Rises from `start` to `end` over the first `ramp` of every period, stays for the rest, and begins again.

    Source: Fu et al. 2019 (arXiv 1903.10145).

    >>> [Cyclical(4)(step) for step in (0, 1, 2, 3, 4)]
    [0.0, 0.5, 1.0, 1.0, 0.0]
    """

    period: int
    ramp: float = 0.5
    start: float = 0.0
    end: float = 1.0

    def __call__(self, step: int) -> float:
        return Linear(max(1, round(self.ramp * self.period)), self.start, self.end)(step % self.period)


@final
class Scheduled:
    """A number now: one tensor for good, so that a captured graph reads what it is set to.

    `warmup` steps take it up from zero, whatever it is.
    """

    def __init__(self, value: float | Schedule, warmup: int = 0):
        self.value, self.warmup = value, warmup
        self.now: Tensor = torch.zeros((), dtype=torch.float64)
        self.go_to(0)

    def go_to(self, step: int) -> None:
        """Sets the number to what it is after so many steps."""
        value = self.value(step) if callable(self.value) else self.value
        self.now.fill_(value * Linear(self.warmup)(step))
