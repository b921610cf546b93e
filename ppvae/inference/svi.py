"""A drop-in for `pyro.infer.SVI` that takes any torch optimizer and one update for all parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from torch import Tensor

from ppvae.compilation.precision import layer_precision
from ppvae.compilation.runtime import prepare_process
from ppvae.inference.tracing import Program

if TYPE_CHECKING:
    from ppvae.inference.compiled_step import CompiledStep

Optimizer: TypeAlias = Any  # a PyroOptim, or a function of parameters that gives a torch.optim.Optimizer


class SVI:
    """Stochastic variational inference: steps down the gradient of a loss of a model/guide pair.

    The same constructor and `step` as `pyro.infer.SVI` (Wingate and Weber 2013, arXiv 1301.1299), but `optim` may also
    be a function of parameters that gives a torch optimizer, which then updates all of them at once.

    With `compile=True` loss and gradients come from a graph of tensor operations that is captured from one run of the
    pair, checked against it, and compiled by inductor where that is faster. The noise is drawn as by an eager run.
    Baked in is what is no tensor: shapes, numbers and flags of Python, the course of its code. Each step looks whether
    anything of that has changed, as far as it can be reached from model, guide and loss (attributes, closures, lists,
    dicts, globals that their code names), and captures anew; parameters, buffers and other tensors are read as they
    stand. What a run writes into attributes is not written, arguments are not validated, and what hides in iterators,
    files or clocks is not seen: at steps 1, 2, 4, ... and every 1024 the graph is compared with a run of the pair. A
    pair that looks at the values of tensors, draws from other random numbers than torch's, or changes its own
    attributes, or a loss that reads its values, steps eagerly; one line in the log "ppvae" says why.

    >>> import functools
    >>> from ppvae.models import LinearGaussian
    >>> pair = LinearGaussian(3, 2)
    >>> adam = functools.partial(torch.optim.Adam, lr=1e-3)
    >>> svi = SVI(pair.model, pair.mean_field, adam, pyro.infer.Trace_ELBO())
    >>> isinstance(svi.step(torch.zeros(4, 3)), float)
    True
    """

    def __init__(self, model: Program, guide: Program, optim: Optimizer, loss: ELBO, compile: bool = False):
        self.model, self.guide, self.optim, self.loss = model, guide, optim, loss
        self.optimizer: torch.optim.Optimizer | None = None
        self.params: list[Tensor] = []
        self.precision = (
            "float32"  # of products inside networks, as `precision.layer_precision` has it; set before a step
        )
        self.products: dict[str, bool] = {}  # which kinds of matrix products oneDNN does in compiled steps
        self._known = -1
        self._captured: CompiledStep | None = None
        prepare_process()
        if compile:
            self.use("compiled")

    @property
    def kernels(self) -> str:
        """How gradients are computed now: "eager"; "graph", the same to the last bit; "compiled", up to rounding."""
        return self._captured.kernels if self._captured else "eager"

    def use(self, kernels: str, seconds: float = math.inf, settled: bool = False) -> None:
        """Says how gradients are to be computed from now on, "eager", "graph" or "compiled".

        `seconds` is what the steps to come would take eagerly: where that is little, nothing is compiled for them.
        What is compiled is used where it is faster, or if that is `settled` already.
        """
        if kernels not in ("eager", "graph", "compiled"):
            raise ValueError(f"kernels: expected 'eager', 'graph' or 'compiled', found {kernels!r}")
        self._captured = None
        if kernels != "eager":
            from ppvae.inference.compiled_step import CompiledStep

            self._captured = CompiledStep(self, kernels, seconds, settled)

    def gradients(self, *args: Any, **kwargs: Any) -> float:
        """Leaves the loss's gradient in `.grad` of every parameter, and returns the loss."""
        return float(self.unread_gradients(*args, **kwargs))

    def unread_gradients(self, *args: Any, **kwargs: Any) -> float | Tensor:
        """The same; a loss that a graph has computed stays a tensor, so that nothing waits for a GPU."""
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
            with layer_precision(self.precision):
                return self.loss.loss_and_grads(self.model, self.guide, *args, **kwargs)
        with poutine.trace(param_only=True) as tracer, layer_precision(self.precision):
            loss = self.loss.loss_and_grads(self.model, self.guide, *args, **kwargs)
        sites = tracer.get_trace().nodes.values()
        self.add_params(node["value"].unconstrained() for node in sites if node["type"] == "param")
        self._known = len(pyro.get_param_store())
        return loss

    def add_params(self, params: Iterable[Tensor]) -> None:
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
