"""torch's fused kernel of Adam, without the bookkeeping of `torch.optim.Adam.step`."""

from __future__ import annotations

import math
from operator import is_
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from ppvae.inference.optimizers.native_adam import AdamKernel


class _Lists(NamedTuple):
    """The tensors of a group of parameters; `steps` are views of `counts`."""

    params: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    counts: Tensor

    def are_of(self, group: dict[str, Any], state: dict[Tensor, dict[str, Any]]) -> bool:
        """Whether these are the tensors that a group and its state have now."""
        if len(self.params) != len(group["params"]) or not all(map(is_, self.params, group["params"])):
            return False
        for p, a, b, t in zip(self.params, self.exp_avgs, self.exp_avg_sqs, self.steps, strict=True):
            s = state[p]
            if s.get("exp_avg") is not a or s.get("exp_avg_sq") is not b or s.get("step") is not t:
                return False
        return True

    @property
    def are_native(self) -> bool:
        """Whether `AdamKernel` takes them, which have one count of steps."""
        moments = (*self.params, *self.exp_avgs, *self.exp_avg_sqs)
        same = not self.max_exp_avg_sqs and bool((self.counts == self.counts[0]).all())
        return same and AdamKernel.takes(moments)


@final
class FusedAdam:
    """Steps of a torch optimizer, which call the fused kernel directly where the optimizer would call nothing else.

    Gathering lists of parameters and state anew at each step takes a tenth of the time of a small model's step. The
    kernel, its arguments and so the updates are those of the optimizer, whose state stays where it is. Steps are its
    own where it is no Adam with `fused=True`, has hooks, or a parameter has no gradient.
    """

    def __init__(self, optimizer: Optimizer):
        self.optimizer = optimizer
        self._lists: list[_Lists] = []
        self._kernels: list[AdamKernel] | None = None  # of the groups in `_lists`; empty where there are none

    def step(self) -> None:
        """One step of the optimizer."""
        o = self.optimizer
        gradients = self._gradients()
        if any(g is None for of_group in gradients for g in of_group) or not self._is_gathered():
            o.step()
            self._kernels = None  # parameters without a gradient have taken fewer steps
            return
        o._opt_called = True  # type: ignore[attr-defined] # which a schedule looks at
        with torch.no_grad():
            for group, lists, of_group in zip(o.param_groups, self._lists, gradients, strict=True):
                kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
                beta1, beta2 = group["betas"]
                lists.counts.add_(1)
                kernel(
                    lists.params, of_group, lists.exp_avgs, lists.exp_avg_sqs, lists.max_exp_avg_sqs, lists.steps,
                    lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"],
                    amsgrad=group["amsgrad"], maximize=group["maximize"],
                )  # fmt: skip

    @property
    def is_native(self) -> bool:
        """Whether `scaled_step` can take the next step, from the gradients as they stand."""
        gradients = self._gradients()
        if any(g is None for of_group in gradients for g in of_group) or not self._is_gathered():
            return False
        if self._kernels is None or not self._fit(gradients):
            native = all(lists.are_native for lists in self._lists)
            self._kernels = [AdamKernel(*lists[:3]) for lists in self._lists] if native else []
        return bool(self._kernels) and self._fit(gradients)

    def _fit(self, gradients: list[list[Any]]) -> bool:
        return all(kernel.fits(of_group) for kernel, of_group in zip(self._kernels or (), gradients, strict=False))

    def norm(self) -> float:
        """The Euclidean norm of all gradients, where the step `is_native`."""
        return math.sqrt(sum(k.sum_of_squares(g) for k, g in zip(self._kernels or (), self._gradients(), strict=True)))

    def scaled_step(self, scale: float) -> None:
        """The optimizer's step by gradients times `scale`, up to rounding, where it `is_native`."""
        o = self.optimizer
        o._opt_called = True  # type: ignore[attr-defined]
        for kernel, group, lists, of_group in zip(
            self._kernels or (), o.param_groups, self._lists, self._gradients(), strict=True
        ):
            lists.counts.add_(1)
            kernel.step(of_group, group, int(lists.counts[0]), scale)

    def _gradients(self) -> list[list[Any]]:
        return [[p.grad for p in group["params"]] for group in self.optimizer.param_groups]

    def _is_gathered(self) -> bool:
        """Whether a kernel takes the optimizer's step, whose tensors are then in `_lists`."""
        o = self.optimizer
        if not self._is_plain():
            return False
        known = zip(self._lists, o.param_groups, strict=False)
        if len(self._lists) != len(o.param_groups) or not all(lists.are_of(group, o.state) for lists, group in known):
            if not self._can_be_gathered():
                return False
            self._lists, self._kernels = [self._gather(group) for group in o.param_groups], None
        return True

    def _is_plain(self) -> bool:
        o = self.optimizer
        return (
            type(o) in (torch.optim.Adam, torch.optim.AdamW)
            and not has_hooks(o)
            and all(group["fused"] and isinstance(group["lr"], float | int) for group in o.param_groups)
            and getattr(o, "grad_scale", None) is None
            and getattr(o, "found_inf", None) is None
        )

    def _can_be_gathered(self) -> bool:
        """Whether the first step has made the state of all parameters, which are of one type and on one device."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        return all(map(self.optimizer.state.get, params)) and len({(p.device, p.dtype) for p in params}) == 1

    def _gather(self, group: dict[str, Any]) -> _Lists:
        params, state = group["params"], self.optimizer.state
        count = torch.stack([state[p]["step"] for p in params])
        for p, step in zip(params, count.unbind(), strict=True):
            state[p]["step"] = step  # one addition for all
        return _Lists(
            list(params),
            [state[p]["exp_avg"] for p in params],
            [state[p]["exp_avg_sq"] for p in params],
            [state[p]["max_exp_avg_sq"] for p in params] if group["amsgrad"] else [],
            [state[p]["step"] for p in params],
            count,
        )


def has_hooks(optimizer: Optimizer) -> bool:
    """Whether something else than torch's own code runs at a step of an optimizer."""
    step = vars(optimizer).get("step")
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
        or (step is not None and not getattr(step, "_wrapped_by_lr_sched", False))
    )
