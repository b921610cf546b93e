"""Training steps from captured graphs: made once, checked against the pair, dropped when anything changes."""

from __future__ import annotations

import functools
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import pyro
import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor

from ppvae.compilation.graph import CaptureError, Graph, all_close, capture, one_line_reason
from ppvae.compilation.guards import Guards
from ppvae.compilation.precision import layer_precision
from ppvae.compilation.side_effects import SideEffects, following_steps
from ppvae.inference.param_store import unwrap

if TYPE_CHECKING:
    from ppvae.inference.svi import SVI

log = logging.getLogger("ppvae")
WAIT = 20  # steps before a graph is made of a new kind of batch, or after a change; twice as many after each change
SECONDS_PER_NODE = 0.8  # what a graph's steps must take eagerly before compiling it pays: a node costs about 0.1 s
MOST = 16  # graphs at a time, each for another kind of batch
EVERY = 1024  # steps after which a graph is checked against the pair again; also at steps 1, 2, 4, ...


@contextmanager
def keep_loss_in_tensors(loss: Any) -> Iterator[None]:
    """Lets a loss of Pyro's add up tensors where it reads numbers: in float64, as Python's numbers are."""
    names: dict[str, Callable[[Any], Any]] = {
        "torch_item": lambda x: x.detach().double() if isinstance(x, Tensor) else x,
        "warn_if_nan": lambda value, *_, **__: value,
    }
    rooms = {c.__module__ for c in type(loss).__mro__ if c.__module__.startswith("pyro.infer.")}
    with ExitStack() as stack:
        for room in (sys.modules[name] for name in rooms):
            for name in names.keys() & vars(room).keys():
                stack.callback(setattr, room, name, getattr(room, name))
                setattr(room, name, names[name])
        yield


@dataclass
class _Kept:
    """A graph of loss and gradients for one kind of batch."""

    graph: Graph
    watch: Guards
    params: list[Tensor]  # whose gradients follow the loss
    uses: int = 0
    doubted: bool = False  # whether it gave something else than the pair when they were last compared

    def stale(self) -> str:
        return self.watch.changed() or ("" if self.graph.fits else "the shape, type or place of a parameter or buffer")


@final
class CompiledStep:
    """Loss and gradients of an `SVI` from graphs.

    `kernels` is "graph" for the pair's own operations, which give what an eager run gives to the last bit, or
    "compiled" for what inductor makes of the first graph where that is faster, which gives the same up to rounding.
    """

    def __init__(self, svi: SVI, kernels: str, seconds: float, settled: bool):
        self.svi, self.kernels, self._settled = svi, kernels, settled
        self._largest = math.inf if settled else seconds / SECONDS_PER_NODE  # graph worth compiling
        self.refusal, self._told = "", False
        self._graphs: dict[Any, _Kept] = {}
        self._seen: dict[Any, int] = {}
        self._first, self._again, self._changes = True, True, 0
        if getattr(svi.loss, "has_learned_baseline", False):
            self._refuse("its objective has a baseline that learns")

    def gradients(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | Tensor:
        """Leaves the loss's gradients in `.grad` of the parameters, which have none; the loss, unread from a graph."""
        key = None if self.refusal or kwargs or _PYRO_STACK else _kind(args)
        if key is None:
            if not (self.refusal or self._told):
                self._told = True
                what = "a handler of Pyro's" if _PYRO_STACK else "arguments that are not plain tensors"
                log.warning("ppvae: steps are taken without a captured graph: %s", f"{what} cannot be captured")
            return self.svi.eager_gradients(*args, **kwargs)
        kept = self._graphs.get(key)
        if kept is not None and (what := kept.stale()):
            self._drop(what)
            kept = None
        if kept is None:
            self._seen[key] = self._seen.get(key, 0) + 1
            soon = self._first or self._seen[key] >= WAIT << min(self._changes, 6)
            if not soon or len(self._graphs) >= MOST:
                return self.svi.eager_gradients(*args)
            return self._make(key, args)
        kept.uses += 1
        if kept.doubted or kept.uses & (kept.uses - 1) == 0 or kept.uses % EVERY == 0:
            return self._check(kept, args)
        return self._put(kept, kept.graph(*args))

    def _put(self, kept: _Kept, out: Sequence[Tensor]) -> Tensor:
        _set(kept.params, out[1:])
        if (loss := following_steps(self.svi.loss)) is not None:
            loss.advance()
        return out[0]

    def _drop(self, what: str) -> None:
        """Forgets all graphs; nothing is compiled again, so that a schedule does not compile for ever."""
        log.info("ppvae: captured steps are made anew: %s has changed", what)
        self._graphs.clear()
        self._seen.clear()
        self._changes += 1
        self.kernels = "graph"

    def _refuse(self, why: str) -> None:
        log.warning("ppvae: steps are taken without a captured graph: %s", why)
        self._graphs.clear()
        self.refusal, self.kernels = why, "eager"

    def _make(self, key: Any, args: tuple[Tensor, ...]) -> float | Tensor:
        """One step, eagerly; then the graph of it, which must give the same, and perhaps its compiled form."""
        svi, first = self.svi, self._first
        self._first = False
        before = SideEffects(args[0].device, svi.loss)
        try:
            with before.taken():
                loss = svi.eager_gradients(*args)
        except CaptureError as error:
            self._refuse(str(error))
            return loss
        after, grads = before.now(), [p.grad for p in svi.params]
        try:
            watch = Guards(model=unwrap(svi.model), guide=unwrap(svi.guide), loss=svi.loss)
            ids = {id(p) for p in svi.params}
            names = [n for n, p in pyro.get_param_store()._params.items() if id(p) in ids]
            watch.also("parameter", functools.partial(_stored, names), names + names)
            params: list[Tensor] = []
            before.restore()
            rounded = layer_precision(svi.precision)
            with keep_loss_in_tensors(svi.loss), pyro.validation_enabled(False), torch.enable_grad(), rounded:
                graph = capture(lambda: _loss_and_gradients(svi, args, params), svi.params, args)
            if what := watch.changed():
                raise CaptureError(f"it changes {what} as it runs")
            watch.tensors, watch.read = {id(t) for t in graph.held}, graph.read
            kept = _Kept(graph, watch, params)
            before.restore()
            self._agree(graph(*args), loss, grads, kept, before, after, args)
            if first and self.kernels == "compiled" and len(graph.module.graph.nodes) <= self._largest:
                kept.graph = self._faster(kept, args, before, loss, grads, after)
            elif first:
                self.kernels = "graph"
        except Exception as error:
            if first and self._again:  # what a pair sets up at its first run is in place at the second
                self._first, self._again = True, False
            else:
                self._refuse(one_line_reason(error))
            before.restore(after)
            _set(svi.params, grads)
            return loss
        self._graphs[key] = kept
        before.restore()
        return self._taken(kept, args)

    def _taken(self, kept: _Kept, args: tuple[Tensor, ...]) -> Tensor:
        _set(self.svi.params, [None] * len(self.svi.params))
        return self._put(kept, kept.graph(*args))

    def _check(self, kept: _Kept, args: tuple[Tensor, ...]) -> float | Tensor:
        """One step from the graph, having compared it with the pair's own."""
        before = SideEffects(args[0].device, self.svi.loss)
        try:
            with before.taken():
                loss = self.svi.eager_gradients(*args)
        except CaptureError as error:
            self._refuse(str(error))
            return loss
        after, grads = before.now(), [p.grad for p in self.svi.params]
        if what := kept.watch.changed():  # by this run, or in a way that only a run shows
            self._drop(what)
            return loss
        before.restore()
        out = kept.graph(*args)
        try:
            self._agree(out, loss, grads, kept, before, after, args)
            kept.doubted = False
        except CaptureError as error:
            if kept.doubted or self.kernels != "compiled":
                self._refuse(f"{error}, found at step {kept.uses} of the graph")
            kept.doubted = True  # by rounding alone, a bit that is drawn can fall to the other side: look once more
            before.restore(after)
            _set(self.svi.params, grads)
            return loss
        _set(self.svi.params, [None] * len(self.svi.params))
        return self._put(kept, out)

    def _agree(
        self, out: Sequence[Tensor], loss: float, grads: Sequence[Tensor | None], kept: _Kept, before: SideEffects,
        after: Any, args: tuple[Tensor, ...],
    ) -> None:  # fmt: skip
        """Raises Uncapturable unless a graph gave the loss, gradients, buffers and noise of the pair's own run."""
        now = before.now()
        if any(not torch.equal(a, b) for a, b in zip(now[0], after[0], strict=True)):
            raise CaptureError("its noise is not drawn as in the graph")
        own = {id(p): g for p, g in zip(self.svi.params, grads, strict=True) if g is not None}
        if own.keys() != {id(p) for p in kept.params}:
            raise CaptureError("other parameters get a gradient than in the graph")
        pairs: list[tuple[Tensor | None, Tensor, Tensor]] = [(None, torch.as_tensor(loss), out[0])]
        pairs += [(None, *both) for both in zip(after[1], now[1], strict=True)]
        pairs += [(p, own[id(p)], g) for p, g in zip(kept.params, out[1:], strict=True)]
        largest = max((float(g.abs().max()) for g in own.values() if g.numel()), default=0.0)
        double = all(g.dtype == torch.float64 for g in own.values())
        full: dict[int, Tensor] = {}
        for p, a, b in pairs:
            rounds = self.svi.precision == "bf16" and p is not None  # a gradient, in steps of 2^-8
            exact = 2**-6 if rounds else 1e-7 if double and a.dtype == b.dtype == torch.float64 else 1e-3
            a, b = a.to(b.device).double(), b.double()
            near = exact * (a.abs().max() if a.numel() else 0) + 0.01 * exact * largest
            if p is not None and self.svi.precision != "float32" and not all_close(a, b, near):
                full = full or self._in_float32(before, args)
                near = near + 4 * (a - full[id(p)]).abs().max()  # where sums cancel, the pair itself is off by as much
            if not all_close(a, b, near):
                raise CaptureError("it gives another loss or gradient than the graph of it")

    def _in_float32(self, before: SideEffects, args: tuple[Tensor, ...]) -> dict[int, Tensor]:
        """The gradients of a run of the pair with the same noise whose products are not rounded, by parameter."""
        now, precision = before.now(), self.svi.precision
        before.restore()
        self.svi.precision = "float32"
        try:
            with before.taken():
                self.svi.eager_gradients(*args)
        finally:
            self.svi.precision = precision
            before.restore(now)
        return {id(p): p.grad.double() for p in self.svi.params if p.grad is not None}

    def _faster(
        self, kept: _Kept, args: tuple[Tensor, ...], before: SideEffects, loss: float, grads: Any, after: Any
    ) -> Graph:
        """The compiled form of a graph, if it can be made, agrees, and is faster; or else the graph."""
        graph = kept.graph
        try:
            compiled = graph.compiled(args, self.svi.products)
            before.restore()
            self._agree(compiled(*args), loss, grads, kept, before, after, args)
            if self._settled or _seconds(compiled, args) < 0.95 * _seconds(graph, args):
                return compiled
        except Exception as error:
            log.warning("ppvae: captured steps are not compiled: %s", one_line_reason(error))
        self.kernels = "graph"
        return graph


def _loss_and_gradients(svi: SVI, args: tuple[Tensor, ...], params: list[Tensor]) -> list[Tensor]:
    """[loss, a gradient for each of the parameters that have one], each gradient in memory of its own."""
    if type(svi.loss).loss_and_grads.__module__.startswith("pyro."):  # made to stay in tensors
        _set(svi.params, [None] * len(svi.params))
        loss = svi.loss.loss_and_grads(svi.model, svi.guide, *args)
        grads = [p.grad for p in svi.params]
    elif hasattr(svi.loss, "differentiable_loss"):
        loss = svi.loss.differentiable_loss(svi.model, svi.guide, *args)
        wanted = [p for p in svi.params if p.requires_grad]
        found = dict(zip(map(id, wanted), torch.autograd.grad(loss, wanted, allow_unused=True), strict=True))
        grads = [found.get(id(p)) for p in svi.params]
    else:
        raise CaptureError(f"{type(svi.loss).__name__} has no differentiable_loss")
    if not isinstance(loss, Tensor):
        raise CaptureError(f"{type(svi.loss).__name__} reads its values into Python")
    params[:] = [p for p, g in zip(svi.params, grads, strict=True) if g is not None]
    out, taken = [loss.detach()], {t.untyped_storage()._cdata for t in (*svi.params, *args)}
    for p, g in zip(svi.params, grads, strict=True):
        if g is None:
            continue
        if g.stride() != p.stride() or g.untyped_storage()._cdata in taken:  # as .grad of an eager run
            g = torch.empty_like(p).copy_(g)
        taken.add(g.untyped_storage()._cdata)
        out.append(g)
    return out


def _stored(names: Sequence[str]) -> tuple[Any, ...]:
    store = pyro.get_param_store()
    return (*map(store._params.get, names), *map(store._constraints.get, names))


def _set(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = g


def _kind(args: tuple[Any, ...]) -> Any:
    """What must be the same for a graph to be used again, besides what is watched; None for what is never captured."""
    if not args or not all(isinstance(t, Tensor) and not t.requires_grad for t in args):
        return None
    around = (
        torch.get_default_dtype(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cpu"), torch.get_autocast_dtype("cuda"),
        torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return (*around, *((t.shape, t.stride(), t.dtype, t.device) for t in args))


def _seconds(graph: Graph, args: tuple[Tensor, ...]) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        graph(*args)[0].item()
        times.append(time.perf_counter() - start)
    return min(times)
