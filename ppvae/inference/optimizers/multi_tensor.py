"""Steps of a `PyroOptim`, many parameters at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import eq, is_
from typing import Any, NamedTuple, TypeAlias

import torch
from pyro.optim import PyroOptim
from torch import Tensor

from ppvae.inference.optimizers.fused import FusedAdam, has_hooks

_Member: TypeAlias = tuple[Tensor, torch.optim.Optimizer]


class _LastStep(NamedTuple):
    """What a step of many parameters by one kernel depends on, as it was: one entry for each parameter."""

    params: list[Tensor]
    objects: list[Any]  # of a `PyroOptim`: optimizers, or schedules of them
    optimizers: list[torch.optim.Optimizer]
    states: list[dict[str, Any]]
    groups: list[list[dict[str, Any]]]

    def are_of(self, params: Sequence[Tensor], optim: PyroOptim) -> bool:
        """Whether a step of these parameters depends on the same."""
        return (
            len(params) == len(self.params)
            and all(map(is_, params, self.params))
            and all(map(is_, map(optim.optim_objs.get, params), self.objects))
            and not any(optim.grad_clip.values())
            and all(map(eq, [o.param_groups for o in self.optimizers], self.groups))
            and all(o.state.get(p) is s for o, p, s in zip(self.optimizers, self.params, self.states, strict=True))
            and not any(map(has_hooks, self.optimizers))
        )


class MultiTensorSteps:
    """Steps of a `PyroOptim`, which has one torch optimizer for each parameter, by one kernel for many of them.

    Parameters whose Adam has the same settings are updated together. Optimizers, settings and state stay those of the
    `PyroOptim`, with its clipping and schedules; other optimizers, and those with hooks, take their own steps.
    """

    def __init__(self, optim: PyroOptim):
        self.optim = optim
        self._joint: dict[tuple[int, ...], FusedAdam] = {}
        self._last: tuple[_LastStep, FusedAdam] | None = None  # of the last step by `native`

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
        if self._last is not None and self._last[0].are_of(params, optim):  # asking each for its group takes longer
            last, kernel = self._last
            for own in last.optimizers:
                own._opt_called = True  # type: ignore[attr-defined]
            return kernel if kernel.is_native else None
        self._last = None
        if not params or any(p not in optim.optim_objs or optim.grad_clip[p] is not None for p in params):
            return None
        members = [(p, self._own(p)) for p in params]
        keys = {_group_of(*member) for member in members}
        if len(keys) != 1 or None in keys:
            return None
        kernel = self._joined(members, fused=True)
        if not kernel.is_native:
            return None
        optimizers = [own for _, own in members]
        states = [own.state[p] for p, own in members]
        groups = [[{**own.param_groups[0], "params": [p]}] for p, own in members]
        objects = [optim.optim_objs[p] for p in params]
        self._last = _LastStep(list(params), objects, optimizers, states, groups), kernel
        return kernel

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
