"""Loss and gradients of a model/guide pair from a compiled graph."""

import functools
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from typing import Any, Protocol, final

import pyro
import torch
from pyro.infer import ELBO
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor

from ppvae.compilation.function import SECONDS_PER_NODE, Comparison, CompiledFunction, Outputs, Policy, Target
from ppvae.compilation.graph import CaptureError, Graph, all_close
from ppvae.compilation.guards import Guards
from ppvae.compilation.precision import layer_precision
from ppvae.compilation.side_effects import recorded_steps, schedule_of, take_step
from ppvae.inference.contract.validity import RecordValidity
from ppvae.inference.param_store import unwrap
from ppvae.inference.tracing import Program

log = logging.getLogger("ppvae")
WAIT = 20  # steps before a graph is captured for a new kind of batch, or after a change of state
CHECK_EVERY = 1024  # steps after which a graph is compared with the pair again; also at steps 1, 2, 4, ...
FALLBACK = "steps are taken without a captured graph"


class GradientFunction(Protocol):
    """Loss and gradients of a model/guide pair by eager runs, as `ppvae.inference.SVI` computes them."""

    model: Program
    guide: Program
    objective: Any
    has_own_gradients: bool
    params: list[Tensor]
    precision: str
    products: dict[str, bool]

    def eager_gradients(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Tensor]]:
        """Leaves gradients in `.grad` of the parameters; the loss, and the parameters that it met."""


@contextmanager
def keep_losses_in_tensors() -> Iterator[None]:
    """Makes losses of Pyro's sum tensors where they read numbers, in float64 as Python's numbers are."""
    replacements: dict[str, Callable[[Any], Any]] = {
        "torch_item": lambda x: x.detach().double() if isinstance(x, Tensor) else x,
        "warn_if_nan": lambda value, *_, **__: value,
    }
    with ExitStack() as stack:
        for module in [m for name, m in sys.modules.items() if name.startswith("pyro.infer.")]:
            for name in replacements.keys() & vars(module).keys():
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, replacements[name])
        yield


@final
class CompiledStep:
    """Loss and gradients of a `GradientFunction` from graphs.

    `kernels` is "graph" for the pair's own operations, which give what an eager run gives to the last bit, or
    "compiled" for the first graph as inductor compiles it where that is faster, with the same values up to rounding.

    Args:
        seconds: what the steps to come would take eagerly; a graph too large for that is not compiled.
        settled: compiles in any case, and uses what is compiled without measuring it.

    Attributes:
        looked: whether the last step ran the pair or looked at its Python state; else the last graph gave it.
    """

    def __init__(self, source: GradientFunction, kernels: str, seconds: float, settled: bool):
        self.source = source
        self.looked = True
        self._warned = False
        self._met: dict[Any, list[Tensor]] = {}  # the parameters that a kind of batch meets
        self._learned: dict[Any, list[tuple[torch.optim.Optimizer, int]]] = {}  # (what learns beside them, parameters)
        self._current: Any = None  # the kind of this step
        largest = math.inf if settled else seconds / SECONDS_PER_NODE
        target = Target(
            function=self._eager,
            agree=self._agree,
            parameters=lambda: source.params,
            traced=self._traced,
            guards=self._guards,
            schedule=lambda: source.objective,
            finish=self._finish,
            choices=lambda: source.products,
        )
        policy = Policy(
            is_worth_compiling=lambda graph, first: first and len(graph.module.graph.nodes) <= largest,
            is_faster=lambda compiled, graph, args: settled or _seconds(compiled, args) < 0.95 * _seconds(graph, args),
            is_check_due=lambda calls: calls & (calls - 1) == 0 or calls % CHECK_EVERY == 0,
            keeps_uncompiled=True,
            recompiles=False,  # a value that changes at every step would compile for ever
            checks_guards=True,
            wait=WAIT,
            retries=1,
        )
        self.function = CompiledFunction(target, policy, "steps", FALLBACK, kernels)
        if refusal := getattr(source.objective, "capture_refusal", ""):
            self.function.refuse(refusal)
        if source.has_own_gradients:
            self.function.refuse("its gradients come from a function of the caller's")

    @property
    def kernels(self) -> str:
        """How gradients are computed now: "eager", "graph" or "compiled"."""
        return self.function.kernels

    def gradients(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
        """Leaves the loss's gradients in `.grad` of the parameters, which have none.

        Returns the loss, an unread tensor if a graph gave it, and the parameters that the pair meets.
        """
        self.looked = True
        kind = None if self.function.refusal or kwargs or _PYRO_STACK else self._kind(args)
        if kind is None or not (args or self.source.params):  # nothing yet that tells the device
            if kind is None and not (self.function.refusal or self._warned):
                self._warned = True
                what = "a handler of Pyro's" if _PYRO_STACK else "arguments that are not plain tensors"
                log.warning("ppvae: %s: %s cannot be captured", FALLBACK, what)
            return self.source.eager_gradients(*args, **kwargs)
        self._current = kind
        try:
            out = self.function(kind, args)
        except (RuntimeError, IndexError):  # of a kernel, by data that it cannot take: a run of the pair names them
            out = None
        if out is None:
            return self.source.eager_gradients(*args)
        self.looked = self.function.looked
        for p, gradient in zip_longest(self.source.params, out[1 + sum(n for _, n in self._learned[kind]) :]):
            p.grad = gradient
        return out[0], self._met[kind]

    def _finish(self, outputs: Outputs) -> None:
        """Takes the schedule's step, and those of what learns beside the pair, whose gradients follow the loss."""
        if (schedule := schedule_of(self.source.objective)) is not None:
            schedule.advance()
        place = 1
        for optimizer, count in self._learned[self._current]:
            take_step(optimizer, outputs[place : place + count])
            place += count

    def _kind(self, args: tuple[Any, ...]) -> Any:
        """The program, and the kind of its arguments; None for arguments that are not captured."""
        kind = _kind(args)
        return kind and (id(self.source.model), id(self.source.guide), id(self.source.objective), *kind)

    def _eager(self, *args: Tensor) -> Outputs:
        with recorded_steps() as steps:
            loss, self._met[self._current] = self.source.eager_gradients(*args)
        self._learned[self._current] = [(optimizer, len(found)) for optimizer, found in steps]
        return [loss, *(g for _, found in steps for g in found), *(p.grad for p in self.source.params)]

    def _traced(self, *args: Tensor) -> Outputs:
        source = self.source
        with (
            keep_losses_in_tensors(), pyro.validation_enabled(False), torch.enable_grad(),
            layer_precision(source.precision), RecordValidity() as validity, recorded_steps() as steps,
        ):  # fmt: skip
            loss, *gradients = _loss_and_gradients(source, args)
            return [validity.nan_unless_valid(loss), *(g for _, found in steps for g in found), *gradients]

    def _guards(self) -> Guards:
        source = self.source
        guards = Guards(model=unwrap(source.model), guide=unwrap(source.guide), loss=source.objective)
        ids = {id(p) for p in source.params}
        names = [n for n, p in pyro.get_param_store()._params.items() if id(p) in ids]
        guards.add("parameter", functools.partial(_stored, names), names + names)
        return guards

    def _agree(self, c: Comparison) -> None:
        """Raises CaptureError unless a graph gave the loss, gradients and buffers of the pair's own run."""
        _, *gradients = c.expected
        found = [*c.found[1:], *[None] * (len(c.expected) - len(c.found))]
        if any((a is None) != (b is None) for a, b in zip(gradients, found, strict=True)):
            raise CaptureError("other parameters get a gradient than in the graph")
        present = {i: (a, b) for i, (a, b) in enumerate(zip(gradients, found, strict=True)) if a is not None}
        pairs: list[tuple[int | None, Tensor, Tensor]] = [(None, torch.as_tensor(c.expected[0]), c.found[0])]
        pairs += [(None, *both) for both in c.buffers]
        pairs += [(i, *both) for i, both in present.items()]
        largest = max((float(a.abs().max()) for a, _ in present.values() if a.numel()), default=0.0)
        double = all(a.dtype == torch.float64 for a, _ in present.values())
        precision = self.source.precision
        exact: Outputs = ()
        for i, a, b in pairs:
            rounds = precision == "bf16" and i is not None  # a gradient, in steps of 2^-8
            digits = 2**-6 if rounds else 1e-7 if double and a.dtype == b.dtype == torch.float64 else 1e-3
            a, b = a.to(b.device).double(), b.double()
            near = digits * (a.abs().max() if a.numel() else 0) + 0.01 * digits * largest
            if i is not None and precision != "float32" and not all_close(a, b, near):
                exact = exact or c.rerun(self._float32_gradients)
                near = near + 4 * (a - exact[i]).abs().max()  # the pair's own rounding error, where sums cancel
            if not all_close(a, b, near):
                raise CaptureError("it gives another loss or gradient than the graph of it")

    def _float32_gradients(self, *args: Tensor) -> Outputs:
        """Gradients of an eager run whose products are not rounded, in float64."""
        source, precision = self.source, self.source.precision
        source.precision = "float32"
        try:
            _, *gradients = self._eager(*args)
        finally:
            source.precision = precision
        return [None if g is None else g.double() for g in gradients]


def _loss_and_gradients(source: GradientFunction, args: Sequence[Tensor]) -> list[Tensor | None]:
    """[loss, a gradient or None for each parameter], each gradient in memory of its own."""
    params = source.params
    objective = source.objective
    computes_gradients = getattr(type(objective), "loss_and_grads", None)
    if computes_gradients is not None and computes_gradients.__module__.startswith("pyro."):
        for p in params:
            p.grad = None
        loss = objective.loss_and_grads(source.model, source.guide, *args)  # `keep_losses_in_tensors` holds
        grads = [p.grad for p in params]
    else:
        loss = _differentiable_loss(objective)(source.model, source.guide, *args)
        _check_in_tensors(objective, loss)
        trainable = [p for p in params if p.requires_grad]
        gradients = dict(zip(map(id, trainable), torch.autograd.grad(loss, trainable, allow_unused=True), strict=True))
        grads = [gradients.get(id(p)) for p in params]
    _check_in_tensors(objective, loss)
    out: list[Tensor | None] = [loss.detach()]
    storages = {t.untyped_storage()._cdata for t in (*params, *args)}
    for p, g in zip(params, grads, strict=True):
        if g is not None:
            if g.stride() != p.stride() or g.untyped_storage()._cdata in storages:  # as .grad of an eager run
                g = torch.empty_like(p).copy_(g)
            storages.add(g.untyped_storage()._cdata)
        out.append(g)
    return out


def _differentiable_loss(objective: Any) -> Callable[..., Any]:
    """The function that gives an objective's loss as a tensor: a method, or the objective itself."""
    if hasattr(objective, "differentiable_loss"):
        return objective.differentiable_loss
    if callable(objective) and not isinstance(objective, ELBO):
        return objective
    raise CaptureError(f"{type(objective).__name__} has no differentiable_loss")


def _check_in_tensors(objective: Any, loss: Any) -> None:
    if not isinstance(loss, Tensor):
        raise CaptureError(f"{type(objective).__name__} reads its values into Python")


def _stored(names: Sequence[str]) -> tuple[Any, ...]:
    store = pyro.get_param_store()
    return (*map(store._params.get, names), *map(store._constraints.get, names))


def _kind(args: tuple[Any, ...]) -> Any:
    """Shapes, types and settings of torch that a graph is captured for; None for arguments that are not captured."""
    if not all(isinstance(t, Tensor) and not t.requires_grad for t in args):
        return None
    around = (
        torch.get_default_dtype(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cpu"), torch.get_autocast_dtype("cuda"),
        torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return (*around, *((t.shape, t.stride(), t.dtype, t.device) for t in args))


def _seconds(graph: Graph, args: Sequence[Tensor]) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        graph(*args)[0].item()
        times.append(time.perf_counter() - start)
    return min(times)
