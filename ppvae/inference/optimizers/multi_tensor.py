"""Steps of a `PyroOptim`, many parameters at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor

from ppvae.inference.optimizers.fused import FusedAdam, has_hooks


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
        groups: dict[Any, list[tuple[Tensor, torch.optim.Optimizer]]] = {}
        for p in params:
            if p not in optim.optim_objs:  # the first step makes the optimizer
                optim([p])
                continue
            if (clip := optim.grad_clip[p]) is not None:
                clip(p)
            own = optim.optim_objs[p]
            own = getattr(own, "optimizer", own)  # of a learning-rate schedule
            settings = _settings(own)
            if p.device.type == "cpu" and p.is_floating_point() and settings is not None:
                groups.setdefault((type(own), p.dtype, settings), []).append((p, own))
            else:
                own.step()
        for (kind, *_), members in groups.items():
            ids = tuple(id(p) for p, _ in members)
            if ids not in self._joint:
                self._joint[ids] = FusedAdam(kind([p for p, _ in members]))
            kernel, joint = self._joint[ids], self._joint[ids].optimizer
            joint.param_groups[0] |= {k: v for k, v in members[0][1].param_groups[0].items() if k != "params"}
            joint.param_groups[0]["fused"] = fused or None
            for p, own in members:
                joint.state[p] = own.state[p]
                own._opt_called = True  # type: ignore[attr-defined] # which a schedule looks at
            kernel.step()


def _settings(optimizer: torch.optim.Optimizer) -> tuple[Any, ...] | None:
    """The settings of an Adam of one group whose step is torch's; None for another optimizer."""
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW) or len(optimizer.param_groups) != 1:
        return None
    group = optimizer.param_groups[0]
    given = group["foreach"] is not None or group["fused"] is not None or group["differentiable"]
    if given or has_hooks(optimizer) or isinstance(group["lr"], Tensor):
        return None
    return tuple(v for k, v in group.items() if k != "params")
