"""One torch optimizer for all parameters, in the place of a `PyroOptim`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor

from ppvae.errors import UsageError
from ppvae.inference.optimizers.fused import FusedAdam


class JointOptim(PyroOptim):
    """One torch optimizer for all parameters, as a `PyroOptim`, which has one for each.

    Parameters that are not in a call, and those without a gradient, are left as they are, with their state.

    Attributes:
        optimizer: the torch optimizer; None before the first parameter.
    """

    def __init__(self, factory: Callable[[list[Tensor]], torch.optim.Optimizer]):
        super().__init__(factory, {})
        self.optimizer: torch.optim.Optimizer | None = None
        self._kernel: FusedAdam | None = None
        self._known: dict[int, Tensor] = {}

    def add(self, params: Iterable[Tensor]) -> None:
        """Adds those that are new."""
        new = list({id(p): p for p in params if id(p) not in self._known}.values())
        self._known |= {id(p): p for p in new}
        if self.optimizer is not None and new:
            self.optimizer.add_param_group({"params": new})
        elif new:
            self.optimizer = self._made(new)
            if type(self.optimizer) in (torch.optim.Adam, torch.optim.AdamW):
                for group in self.optimizer.param_groups:  # one kernel for all parameters, unless set otherwise
                    if group["fused"] is None and group["foreach"] is None and not group["differentiable"]:
                        group["fused"] = all(p.is_floating_point() for p in group["params"]) or None
            self._kernel = FusedAdam(self.optimizer)
            if self._state_waiting_to_be_consumed:
                self.optimizer.load_state_dict(self._state_waiting_to_be_consumed)

    def _made(self, params: list[Tensor]) -> torch.optim.Optimizer:
        try:
            made: Any = self.pt_optim_constructor(params)
        except (ValueError, TypeError) as error:
            raise UsageError(f"optimizer: it cannot be made ({error})") from error
        if not isinstance(made, torch.optim.Optimizer):
            raise UsageError(
                f"optimizer: expected a function of parameters that gives a torch optimizer, found one that gives an "
                f"object of {type(made).__name__}"
            )
        return made

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """One step of the given parameters, each given once."""
        params = list(params)
        self.add(params)
        if self.optimizer is None:
            return
        absent: list[tuple[Tensor, Tensor]] = []
        if len(params) < len(self._known):
            given = {id(p) for p in params}
            absent = [(p, p.grad) for i, p in self._known.items() if p.grad is not None and i not in given]
        for p, _ in absent:
            p.grad = None
        self.step(*args, **kwargs)
        for p, grad in absent:
            p.grad = grad

    def step(self, *args: Any, **kwargs: Any) -> None:
        """One step of the optimizer, of which there has to be one, for all parameters with a gradient."""
        if self._kernel is not None and not (args or kwargs):
            self._kernel.step()
        elif self.optimizer is not None:
            self.optimizer.step(*args, **kwargs)

    def native(self, params: Sequence[Tensor]) -> FusedAdam | None:
        """The kernel for a step of the given parameters with scaled gradients, if they are all and it has one."""
        self.add(params)
        kernel = self._kernel if len(params) == len(self._known) else None
        return kernel if kernel is not None and kernel.is_native else None

    def get_state(self) -> dict[str, Any]:
        """The torch optimizer's state."""
        return self.optimizer.state_dict() if self.optimizer is not None else {}

    def set_state(self, state_dict: dict[str, Any]) -> None:
        """Restores a state from `get_state`."""
        self._state_waiting_to_be_consumed = state_dict
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state_dict)
