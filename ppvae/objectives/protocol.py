"""What a gradient estimator reads of an objective."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ppvae.inference.terms import Terms


class LogWeightBound(Protocol):
    """A bound per datum as a function of its log-weights; `ppvae.objectives.Objective` documents each member."""

    @property
    def draws(self) -> int: ...

    @property
    def stl_unbiased(self) -> bool: ...

    def reduce(self, log_weight: Tensor) -> Tensor: ...

    def log_weights(self, t: Terms) -> Tensor: ...

    def bound(self, t: Terms) -> Tensor: ...

    def total(self, t: Terms) -> Tensor: ...

    def learning_signal(self, log_weight: Tensor) -> Tensor: ...

    def leave_one_out_bound(self, log_weight: Tensor, replacement: Tensor) -> Tensor: ...

    def dreg_weights(self, log_weight: Tensor) -> Tensor: ...
