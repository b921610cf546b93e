"""A drop-in for `pyro.infer.SVI` that takes any torch optimizer and one update for all parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from torch import Tensor

from ppvae.inference.tracing import Pair

if TYPE_CHECKING:
    from ppvae.inference.capture import Captured

Optimizer: TypeAlias = Any  # a PyroOptim, or a function of parameters that gives a torch.optim.Optimizer


class SVI:
    """Stochastic variational inference: steps down the gradient of a loss of a model/guide pair.

    The same constructor and `step` as `pyro.infer.SVI` (Wingate and Weber 2013, arXiv 1301.1299), but `optim` may also
    be a function of parameters that gives a torch optimizer, which then updates all of them at once.

    >>> import functools
    >>> from ppvae.models import LinearGaussian
    >>> pair = LinearGaussian(3, 2)
    >>> adam = functools.partial(torch.optim.Adam, lr=1e-3)
    >>> svi = SVI(pair.model, pair.mean_field, adam, pyro.infer.Trace_ELBO())
    >>> isinstance(svi.step(torch.zeros(4, 3)), float)
    True
    """

    def __init__(self, model: Pair, guide: Pair, optim: Optimizer, loss: ELBO, compile: bool = False):
        self.model, self.guide, self.optim, self.loss = model, guide, optim, loss
        self.optimizer: torch.optim.Optimizer | None = None
        self.params: list[Tensor] = []
        self._known = -1
        self._captured: Captured | None = None
        if compile:
            self.kernels = "compiled"

    @property
    def kernels(self) -> str:
        """How gradients are computed: "eager"; "graph", the same to the last bit; "compiled", up to rounding."""
        return self._captured.kernels if self._captured else "eager"

    @kernels.setter
    def kernels(self, kernels: str) -> None:
        if kernels not in ("eager", "graph", "compiled"):
            raise ValueError(f"kernels: expected 'eager', 'graph' or 'compiled', found {kernels!r}")
        if kernels == "eager":
            self._captured = None
            return
        from ppvae.inference.capture import Captured

        self._captured = Captured(self, kernels)

    def gradients(self, *args: Any, **kwargs: Any) -> float:
        """Leaves the loss's gradient in `.grad` of every parameter, and returns the loss."""
        if self._captured is not None:
            for p in self.params:
                p.grad = None
            return self._captured.gradients(args, kwargs)
        return self.eager_gradients(*args, **kwargs)

    def eager_gradients(self, *args: Any, **kwargs: Any) -> float:
        """The same from a run of the pair itself."""
        for p in self.params:
            p.grad = None
        if self._known == len(pyro.get_param_store()):
            return self.loss.loss_and_grads(self.model, self.guide, *args, **kwargs)
        with poutine.trace(param_only=True) as tracer:
            loss = self.loss.loss_and_grads(self.model, self.guide, *args, **kwargs)
        sites = tracer.get_trace().nodes.values()
        self.take_up(node["value"].unconstrained() for node in sites if node["type"] == "param")
        self._known = len(pyro.get_param_store())
        return loss

    def take_up(self, params: Iterable[Tensor]) -> None:
        """Adds parameters that the optimizer does not have yet."""
        have = {id(p) for p in self.params}
        new = list({id(p): p for p in params if id(p) not in have}.values())
        self.params += new
        if isinstance(self.optim, PyroOptim) or not new:
            return
        if self.optimizer is None:
            self.optimizer = self.optim(new)
            if type(self.optimizer) in (torch.optim.Adam, torch.optim.AdamW):
                for group in self.optimizer.param_groups:  # one kernel for all parameters, where nothing else was asked
                    if group["fused"] is None and group["foreach"] is None and not group["differentiable"]:
                        group["fused"] = all(p.is_floating_point() for p in group["params"]) or None
        else:
            self.optimizer.add_param_group({"params": new})

    def update(self) -> None:
        """Takes one optimizer step from the gradients as they stand."""
        if isinstance(self.optim, PyroOptim):
            self.optim([p for p in self.params if p.grad is not None])
        elif self.optimizer is not None:
            self.optimizer.step()

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One gradient step on the loss; returns the loss as Pyro's `step` does."""
        loss = self.gradients(*args, **kwargs)
        self.update()
        return loss

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The loss without a step."""
        with torch.no_grad():
            return self.loss.loss(self.model, self.guide, *args, **kwargs)
