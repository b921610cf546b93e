"""A drop-in for `pyro.infer.SVI` that takes any torch optimizer and compiles its steps."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import pyro
import torch
from pyro.distributions import is_validation_enabled
from pyro.infer import ELBO
from pyro.infer.svi import SVI as PyroSVI
from pyro.infer.util import torch_item
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ppvae.compilation.precision import layer_precision
from ppvae.compilation.process_setup import prepare_process
from ppvae.errors import UsageError
from ppvae.inference.compiled_step import CompiledStep
from ppvae.inference.contract.validity import RecordValidity
from ppvae.inference.optimizers.fused import FusedAdam
from ppvae.inference.optimizers.joint import JointOptim
from ppvae.inference.optimizers.multi_tensor import MultiTensorSteps
from ppvae.inference.param_store import unconstrained
from ppvae.inference.tracing import Program

log = logging.getLogger("ppvae")
CHECKS_EVERY = 32  # steps between which no code of the user's runs

Optimizer: TypeAlias = Any  # a PyroOptim, or a function of parameters that gives a torch.optim.Optimizer


class _ParamRecorder(Messenger):
    """Records the unconstrained tensors of the param sites that are met, each once."""

    def __init__(self) -> None:
        super().__init__()
        self.params: dict[int, Tensor] = {}

    def _pyro_post_param(self, msg: Any) -> None:
        p = unconstrained(msg["value"])
        self.params[id(p)] = p

    def nan_unless_valid(self, loss: Any) -> Any:
        """The loss: Pyro's validation has raised an exception where a parameter or value was not valid."""
        return loss


class _ParamAndValidityRecorder(RecordValidity, _ParamRecorder):
    """Both records: `fit`, which turns Pyro's validation off, stops at a loss that is not finite."""


class SVI(PyroSVI):
    """Stochastic variational inference: steps down the gradient of a loss of a model/guide pair.

    A `pyro.infer.SVI` (Wingate and Weber 2013, arXiv 1301.1299), with its constructor, methods and updates: a step
    updates the parameters that it meets, then sets their gradients to zero, so that an optimizer with momentum also
    moves a parameter that the loss no longer depends on. Besides a PyroOptim, `optim` may be a function of parameters
    that gives a torch optimizer, which then updates all of them at once. See docs/svi.md.

    With `compile=True` loss and gradients come from a graph of tensor operations that is captured from one run of the
    pair, compared with it, and compiled by inductor where that is faster. Random numbers are drawn as in an eager run.
    Non-tensor state is specialised at capture: shapes, Python numbers and flags, control flow. Each step checks it for
    changes, as far as it is reachable from model, guide and loss (attributes, closures, lists, dicts, globals that
    their code names), and captures anew; parameters, buffers and other tensors are inputs of the graph. Attributes
    that a run assigns are not assigned, arguments are not validated, and the state of iterators, files or clocks is
    not checked: at steps 1, 2, 4, ... and every 1024 the graph is compared with a run of the pair. Steps are eager,
    with one line in the log "ppvae" that says why, for a pair that reads the values of tensors into Python, draws from
    other random numbers than torch's, or changes its own attributes, and for a loss that reads its values.

    Args:
        loss: an ELBO, or a function of (model, guide, *args) that gives a differentiable loss, or numbers where
            `loss_and_grads` is passed, too.
        loss_and_grads: a function of (model, guide, *args) that gives the loss and leaves its gradients in `.grad`.
        num_samples, num_steps: of `run`, as in Pyro, where they are deprecated.

    >>> import functools
    >>> import pyro, torch
    >>> from ppvae.models import LinearGaussian
    >>> pair = LinearGaussian(3, 2)
    >>> adam = functools.partial(torch.optim.Adam, lr=1e-3)
    >>> svi = SVI(pair.model, pair.mean_field, adam, pyro.infer.Trace_ELBO())
    >>> isinstance(svi.step(torch.zeros(4, 3)), float)
    True
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        optim: Optimizer,
        loss: Any,
        loss_and_grads: Callable[..., Any] | None = None,
        num_samples: int = 0,
        num_steps: int = 0,
        compile: bool = False,
        **kwargs: Any,
    ):
        super().__init__(model, guide, _as_pyro_optim(optim), loss, loss_and_grads, num_samples, num_steps, **kwargs)
        self.objective = loss
        self.has_own_gradients = loss_and_grads is not None and not isinstance(loss, ELBO)
        self.params: list[Tensor] = []  # all that were met so far
        self.precision = "float32"  # of the products in layers, as in `layer_precision`; set before a step
        self.products: dict[str, bool] = {}  # choices of `choose_matmul_backends` in compiled steps
        self._known: set[int] = set()
        self._unused_state: set[str] = set()  # names in a PyroOptim's state that were warned of
        self._zeros: dict[int, Tensor] = {}  # gradients that `step` has left
        self._compiled_step: CompiledStep | None = None
        self._adam: FusedAdam | None = None  # of the last step of the graph `_adam_of`, kept from one look to the next
        self._adam_of: Any = None
        self._is_closed = False  # whether none of the user's code runs between steps
        plain = type(self.optim).__call__ in (PyroOptim.__call__, PyroLRScheduler.__call__)
        self._grouped_steps = MultiTensorSteps(self.optim) if plain else None
        prepare_process()
        if compile:
            self.use("compiled")

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The torch optimizer of all parameters; None with a PyroOptim, and before the first parameter."""
        return self.optim.optimizer if isinstance(self.optim, JointOptim) else None

    @property
    def kernels(self) -> str:
        """How gradients are computed now: "eager"; "graph", the same to the last bit; "compiled", up to rounding."""
        return self._compiled_step.kernels if self._compiled_step else "eager"

    def use(self, kernels: str, seconds: float = math.inf, settled: bool = False) -> None:
        """Sets how gradients are computed from now on: "eager", "graph" or "compiled".

        `seconds` is what the remaining steps would take eagerly: a graph that this does not pay for is not compiled.
        The compiled graph is used where it is faster, or in any case if that is `settled` already.
        """
        if kernels not in ("eager", "graph", "compiled"):
            raise ValueError(f"kernels: expected 'eager', 'graph' or 'compiled', found {kernels!r}")
        self._compiled_step = None
        if kernels != "eager":
            self._compiled_step = CompiledStep(self, kernels, seconds, settled)

    def computation(self) -> dict[str, Any]:
        """What was chosen by speed: kernels, libraries of products, precision. A resumed run takes the same."""
        return {"kernels": self.kernels, "products": self.products, "precision": self.precision}

    def restore_computation(self, saved: dict[str, Any]) -> None:
        """Sets products and precision from a `computation`, or what there is of it."""
        self.products = saved.get("products", {})
        self.precision = saved.get("precision", self.precision)

    def gradients(self, *args: Any, **kwargs: Any) -> float:
        """Leaves the loss's gradient in `.grad` of every parameter, and returns the loss."""
        return float(self.unread_gradients(*args, **kwargs))

    def unread_gradients(self, *args: Any, **kwargs: Any) -> float | Tensor:
        """The same; a loss that a graph has computed stays a tensor, so that nothing waits for a GPU."""
        return self._gradients(args, kwargs)[0]

    def eager_gradients(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Tensor]]:
        """(loss, parameters met) of a run of the pair itself, which leaves the gradient in `.grad`."""
        for p in self.params:
            p.grad = None
        recorder = _ParamRecorder() if is_validation_enabled() else _ParamAndValidityRecorder()
        with recorder, layer_precision(self.precision):
            loss = self.loss_and_grads(self.model, self.guide, *args, **kwargs)
        if not isinstance(loss, tuple):
            loss = recorder.nan_unless_valid(loss)
        met = list(recorder.params.values())
        self.add_params(met)
        return loss, met

    def _gradients(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
        """(loss, parameters met), from a graph where there is one."""
        if self._compiled_step is None:
            return self.eager_gradients(*args, **kwargs)
        for p in self.params:
            p.grad = None
        return self._compiled_step.gradients(args, kwargs)

    def add_params(self, params: Iterable[Tensor]) -> None:
        """Adds new parameters to the optimizer."""
        new = list({id(p): p for p in params if id(p) not in self._known}.values())
        if new:
            self._known |= {id(p) for p in new}
            self.params += new
            if isinstance(self.optim, JointOptim):
                self.optim.add(new)

    def update(self) -> None:
        """Takes one optimizer step from the gradients as they stand."""
        if isinstance(self.optim, JointOptim):
            self.optim.step()
        else:
            self._step_optimizer([p for p in self.params if p.grad is not None])

    @contextmanager
    def uninterrupted(self, closed: bool = True) -> Iterator[None]:
        """Of the steps meanwhile, the first and then one of `CHECKS_EVERY` look for changes of all but tensors' values.

        For a loop that runs no code of the user's between its steps: at small sizes, looking takes a tenth of a step.
        Unless the loop is `closed`, some of it may run that changes the optimizer, which is then looked at each time.
        """
        function = self._compiled_step.function if self._compiled_step is not None else None
        if function is None or _has_own_schedule(self.objective):
            yield
            return
        function.ask_guards(CHECKS_EVERY)
        self._is_closed = closed
        try:
            yield
        finally:
            function.ask_guards(1)
            self._is_closed = False

    def steps(self, batches: Iterable[Sequence[Tensor]]) -> list[Any]:
        """A `step` on each of the batches, tuples of arguments: the same steps to the last bit; returns their losses.

        No code of the user's but that of `batches` may run in between: compiled steps are `uninterrupted`. Those of a
        list or tuple of batches look at the optimizer as seldom as at the pair.
        """
        losses = []
        met: list[Tensor] = []
        spent: dict[int, Tensor] = {}  # parameters whose gradient has been used; `step` sets it to zero
        try:
            with self.uninterrupted(closed=isinstance(batches, list | tuple)):
                for batch in batches:
                    loss, now = self._step(batch, {}, spent)
                    if now is not met:
                        met, spent = now, spent | {id(p): p for p in now}
                    losses.append(loss)
        finally:
            self._set_gradients_to_zero(spent.values())
        return [_as_numbers(loss) for loss in losses]

    def native_adam(self, params: list[Tensor]) -> FusedAdam | None:
        """The kernel that updates these parameters by scaled gradients: of Adam on the CPU, in compiled steps."""
        step = self._compiled_step
        if step is None or step.kernels != "compiled":
            return None
        if step.looked or step.function.last is not self._adam_of:
            owner = self.optim if isinstance(self.optim, JointOptim) else self._grouped_steps
            self._adam = owner.native(params) if owner is not None else None
            self._adam_of = step.function.last if self._is_closed else None
        return self._adam

    def _step_optimizer(self, params: list[Tensor]) -> None:
        if (native := self.native_adam(params)) is not None:
            native.scaled_step(1.0)
        elif self._grouped_steps is None:
            self.optim(params)
        else:
            self._grouped_steps(params, fused=self.kernels == "compiled")
        self._warn_of_unused_state()

    def _warn_of_unused_state(self) -> None:
        """One line where a PyroOptim was given state that no parameter takes, which Pyro drops without a word."""
        if isinstance(self.optim, JointOptim) or not self.optim._state_waiting_to_be_consumed:
            return
        params = dict(pyro.get_param_store().named_parameters())
        waiting = self.optim._state_waiting_to_be_consumed
        unused = [n for n in waiting if n not in params or params[n] in self.optim.optim_objs]
        if not unused or self._unused_state >= {*unused}:
            return
        self._unused_state |= {*unused}
        log.warning(
            "ppvae: optim: no parameter takes the state of %d, as of %r: %s", len(unused), unused[0],
            "it was set after the first step; call set_state before it" if unused[0] in params
            else f"the pair's are named as {min(params, default='')!r}; build it as it was, in a new process",
        )  # fmt: skip

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """One gradient step on the loss; returns the loss, a number or a tuple of them, as Pyro's `step` does.

        A gradient that the caller has left in `.grad` is added to the loss's, as in a backward pass of torch.
        """
        loss, met = self._step(args, kwargs, {})
        self._set_gradients_to_zero(met)
        return _as_numbers(loss)

    def _step(self, args: Sequence[Any], kwargs: dict[str, Any], spent: dict[int, Tensor]) -> tuple[Any, list[Tensor]]:
        """(loss, parameters met) of a step that leaves its gradients; those of parameters in `spent` count as zero."""
        before = [(p, p.grad) for p in self.params if p.grad is not None]
        for p, _ in before:
            p.grad = None
        try:
            loss, met = self._gradients(tuple(args), kwargs)
        finally:
            for p, grad in before:
                if p.grad is None:
                    p.grad = self._zeros_like(p, grad) if id(p) in spent else grad
                elif id(p) not in spent and not self._is_own_zero(p, grad):
                    p.grad += grad
        self._step_optimizer(met)
        return loss, met

    def _set_gradients_to_zero(self, params: Iterable[Tensor]) -> None:
        for p in params:
            if p.grad is not None and not self._is_own_zero(p, p.grad):
                p.grad = self._zeros_like(p, p.grad)

    def _is_own_zero(self, p: Tensor, grad: Tensor) -> bool:
        """Whether a gradient is the zero that the last step has left, and unchanged since."""
        return grad is self._zeros.get(id(p)) and grad._version == 0

    def _zeros_like(self, p: Tensor, grad: Tensor) -> Tensor:
        zeros = self._zeros.get(id(p))
        if zeros is None or zeros._version or not _is_alike(zeros, grad):
            zeros = self._zeros[id(p)] = torch.zeros_like(grad)
        return zeros


def _as_numbers(loss: Any) -> Any:
    return type(loss)(map(torch_item, loss)) if isinstance(loss, tuple) else torch_item(loss)


def _has_own_schedule(objective: Any) -> bool:
    """Whether a subclass of the user's moves an objective to its next step, by code that runs between steps."""
    hooks = (getattr(type(objective), name, None) for name in ("advance", "set_step"))
    own = any(hook is not None and not hook.__module__.startswith("ppvae.") for hook in hooks)
    inner = getattr(objective, "objective", None)  # of an auxiliary loss beside it
    return own or (inner is not None and _has_own_schedule(inner))


def _is_alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype is b.dtype and a.layout is b.layout and a.device == b.device


def _as_pyro_optim(optim: Optimizer) -> PyroOptim:
    if isinstance(optim, PyroOptim):
        return optim
    if not callable(optim):
        raise UsageError(
            f"optim: expected a PyroOptim, or a function of parameters that gives a torch optimizer such as "
            f"functools.partial(torch.optim.Adam, lr=1e-3), found {type(optim).__name__}"
        )
    return JointOptim(optim)
