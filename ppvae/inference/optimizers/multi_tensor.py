"""Steps of a `PyroOptim`, many parameters at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from pyro.optim import PyroOptim
from torch import Tensor

from ppvae.inference.optimizers.fused import FusedAdam, has_hooks

_Member: TypeAlias = tuple[Tensor, torch.optim.Optimizer]


class MultiTensorSteps:
    """Steps of a `PyroOptim`, which has one torch optimizer for each parameter, by one kernel for many of them.

    Parameters whose Adam has the same settings are updated together. Optimizers, settings and state stay those of the
    `PyroOptim`, with its clipping and schedules; other optimizers, and those with hooks, take their own steps.
    """

    def __init__(self, optim: PyroOptim):
        self.optim = optim
        self._joint: dict[tuple[int, ...], FusedAdam] = {}

    def __call__(self, params: Iterable[Tensor], fused: bool) -> None:
        """One step of the given parameters, each given once; by torch's fused kernels up to rounding, if asked."""
        optim = self.optim
        groups: dict[Any, list[_Member]] = {}
        for p in params:
            if p not in optim.optim_objs:  # the first step makes the optimizer
                optim([p])
                continue
            if (clip := optim.grad_clip[p]) is not None:
                clip(p)
            own = self._own(p)
            key = _group_of(p, own)
            if key is None:
                own.step()
            else:
                groups.setdefault(key, []).append((p, own))
        for members in groups.values():
            self._joined(members, fused).step()

    def native(self, params: Sequence[Tensor]) -> FusedAdam | None:
        """The kernel for a step of the given parameters with scaled gradients; None where none takes them all."""
        optim = self.optim
        if not params or any(p not in optim.optim_objs or optim.grad_clip[p] is not None for p in params):
            return None
        members = [(p, self._own(p)) for p in params]
        keys = {_group_of(*member) for member in members}
        if len(keys) != 1 or None in keys:
            return None
        kernel = self._joined(members, fused=True)
        return kernel if kernel.is_native else None

    def _own(self, p: Tensor) -> torch.optim.Optimizer:
        own: Any = self.optim.optim_objs[p]
        optimizer: torch.optim.Optimizer = getattr(own, "optimizer", own)  # of a learning-rate schedule
        return optimizer

    def _joined(self, members: list[_Member], fused: bool) -> FusedAdam:
        """One optimizer of several parameters, with the state and settings of their own."""
        ids = tuple(id(p) for p, _ in members)
        first = members[0][1]
        kind: Any = type(first)
        if ids not in self._joint:
            self._joint[ids] = FusedAdam(kind([p for p, _ in members]))
        joint = self._joint[ids].optimizer
        joint.param_groups[0] |= {k: v for k, v in first.param_groups[0].items() if k != "params"}
        joint.param_groups[0]["fused"] = first.param_groups[0]["fused"] or fused or None
        for p, own in members:
            joint.state[p] = own.state[p]
            own._opt_called = True  # type: ignore[attr-defined] # which a schedule looks at
        return self._joint[ids]


def _group_of(p: Tensor, optimizer: torch.optim.Optimizer) -> Any:
    """What parameters that one kernel updates have in common; None for one that its own optimizer updates."""
    settings = _settings(optimizer)
    if p.device.type != "cpu" or not p.is_floating_point() or settings is None:
        return None
    return type(optimizer), p.dtype, settings


def _settings(optimizer: torch.optim.Optimizer) -> tuple[Any, ...] | None:
    """The settings of an Adam of one group whose step is torch's; None for another optimizer."""
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW) or len(optimizer.param_groups) != 1:
        return None
    group = optimizer.param_groups[0]
    own = group["foreach"] is not None or group["fused"] is False or group["differentiable"]
    if own or has_hooks(optimizer) or isinstance(group["lr"], Tensor):
        return None
    return tuple(v for k, v in group.items() if k != "params")
