"""A function of tensors from a graph that is captured, compiled, compared with the function, and dropped when stale."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from ppvae.compilation.graph import CaptureError, Graph, HoistedGraph, capture, one_line_reason
from ppvae.compilation.guards import Guards
from ppvae.compilation.matmul_backend import Choices
from ppvae.compilation.side_effects import RunState

log = logging.getLogger("ppvae")
SECONDS_PER_NODE = 0.8  # of eager calls that pay for compiling one node of a graph, which takes about 0.1 s
OFTEN, MAX_DOUBLINGS = 4, 6  # changes that are worth a warning; those that double `Policy.wait`

Outputs: TypeAlias = Sequence[Any]  # tensors, and None or a number where the function itself gives one


@dataclass(frozen=True)
class Comparison:
    """Outputs of a function and of its graph, from the same arguments, random state, buffers and schedule step.

    Attributes:
        buffers: pairs (after the function, after the graph) of the modules' buffers.
        rerun: calls another function of the arguments from that state, and then restores the state after the graph.
    """

    expected: Outputs
    found: Outputs
    buffers: list[tuple[Tensor, Tensor]]
    rerun: Callable[[Callable[..., Outputs]], Outputs]


@dataclass(frozen=True)
class Target:
    """A function of tensors and what its graph depends on.

    Args:
        function: gives the outputs of an eager run.
        agree: raises CaptureError unless the outputs of a graph are those of the function.
        parameters: the tensors that are inputs of the graph besides the arguments; others are found by the capture.
        traced: the form of the function that is captured, by default the function itself.
        guards: of the Python state that the function reads; without them it is taken to be constant.
        schedule: the objective whose schedule advances by one step with each call.
        finish: does what the function does besides, given the outputs of a graph.
        varying: places of the arguments that differ between calls of one `CompiledFunction.block`. What depends neither
            on them nor on noise is then computed once for each block. None: everything is computed in each call.
        deterministic: refuses a function that draws random numbers.
        choices: the libraries of the graph's matrix products, as `choose_matmul_backends` has them.
    """

    function: Callable[..., Outputs]
    agree: Callable[[Comparison], None]
    parameters: Callable[[], Iterable[Tensor]]
    traced: Callable[..., Outputs] | None = None
    guards: Callable[[], Guards] | None = None
    schedule: Callable[[], Any] = lambda: None
    finish: Callable[[Outputs], None] = lambda outputs: None
    varying: tuple[int, ...] | None = None
    deterministic: bool = False
    choices: Callable[[], Choices] = dict


@dataclass(frozen=True)
class Policy:
    """When a graph is captured, compiled, compared again, and dropped.

    Args:
        is_worth_compiling: of (graph, whether it is the first one).
        is_faster: of (compiled graph, graph, arguments); only the faster one is kept.
        is_check_due: of the number of calls of a graph; the function then runs again and is compared.
        keeps_uncompiled: whether a graph that is not compiled is used as it stands; otherwise the function is.
        recompiles: whether a graph is compiled again after the Python state has changed.
        checks_guards: whether every call asks the guards; otherwise only the capture does.
        wait: calls with one kind of arguments before its graph is captured, from the second kind on; twice as many
            after each change of state.
        retries: captures that may fail, as state that a first run sets up is in place at the next.
        most: graphs at a time, each for another kind of arguments.
    """

    is_worth_compiling: Callable[[Graph, bool], bool] = lambda graph, first: True
    is_faster: Callable[[Graph, Graph, Sequence[Tensor]], bool] = lambda compiled, graph, args: True
    is_check_due: Callable[[int], bool] = lambda calls: False
    keeps_uncompiled: bool = False
    recompiles: bool = True
    checks_guards: bool = False
    wait: int = 0
    retries: int = 0
    most: int = 16


@final
class EagerResult:
    """A call of the function itself: its outputs, and the state before and after it."""

    def __init__(self, target: Target, args: Sequence[Tensor]):
        self._target, self._args = target, args
        device = next(t.device for t in (*args, *target.parameters()))
        self._effects = RunState(device, target.schedule())
        self.refusal = ""
        try:
            with self._effects.observe():
                self.outputs = target.function(*args)
        except CaptureError as error:
            self.refusal = str(error)
        self._after = self._effects.state()

    def restore_before(self) -> None:
        """Puts back the random state, buffers and schedule step from before the call."""
        self._effects.restore()

    def restore_after(self) -> None:
        self._effects.restore(self._after)

    def compare(self, outputs: Outputs) -> None:
        """Raises CaptureError unless a graph has drawn the same noise and given the same outputs and buffers."""
        now = self._effects.state()
        if any(not torch.equal(a, b) for a, b in zip(now[0], self._after[0], strict=True)):
            raise CaptureError("its noise is not drawn as in the graph")

        def rerun(function: Callable[..., Outputs]) -> Outputs:
            self._effects.restore()
            try:
                with self._effects.observe():
                    return function(*self._args)
            finally:
                self._effects.restore(now)

        buffers = list(zip(self._after[1], now[1], strict=True))
        self._target.agree(Comparison(self.outputs, outputs, buffers, rerun))


@dataclass
class CapturedGraph:
    """A graph for one kind of arguments: as captured, and as it is called, compiled perhaps.

    Attributes:
        doubted: whether its outputs differed when they were last compared.
    """

    graph: Graph
    run: Graph | HoistedGraph
    guards: Guards | None
    calls: int = 0
    unguarded: int = 0  # calls since the guards were asked
    doubted: bool = False

    def changed(self, whole: bool) -> str:
        """What has changed since the capture, or nothing; unless `whole`, of tensors read into Python alone."""
        if self.guards is not None and (what := self.guards.changed() if whole else self.guards.read_changed()):
            return what
        return "the shape, type or place of a parameter or buffer" if whole and not self.graph.fits else ""


@final
class CompiledFunction:
    """Calls of a `Target` by graphs that are captured from it, one for each kind of arguments.

    The first call of a kind runs the function and captures a graph, which must draw the same random numbers and give
    the same outputs and buffers; its compiled form must, too. Where a graph cannot be captured, or gives something
    else, all calls are left to the function, and one line in the log says why.

    Args:
        name: what the function computes, in the plural, for the log.
        fallback: a sentence on how it is computed without a graph, for the log.

    Attributes:
        kernels: "compiled"; "graph", whose operations are those of the function; or "eager", without any graph.
        refusal: why there is no graph, or nothing.
        block: an object that stands for all arguments but `Target.varying`.
        last: the graph of the last call, if there was one before it.
        looked: whether that call asked the graph's guards, or compared it with the function.
    """

    def __init__(self, target: Target, policy: Policy, name: str, fallback: str, kernels: str = "compiled"):
        self.target, self.policy, self.kernels = target, policy, kernels
        self.refusal = ""
        self.block: Any = None
        self.last: CapturedGraph | None = None
        self.looked = True
        self.graphs: dict[Any, CapturedGraph] = {}
        self.ask_guards(every=1)
        self._name, self._fallback = name, fallback
        self._calls: dict[Any, int] = {}
        self._first, self._changes, self._retries = True, 0, policy.retries

    def __call__(self, kind: Any, args: Sequence[Tensor]) -> Outputs | None:
        """The outputs for arguments of a kind, a hashable; None where the caller is to run the function."""
        if self.refusal:
            return None
        captured = self.graphs.get(kind)
        looks = captured is None or captured.unguarded % self._every == 0
        if captured and self.policy.checks_guards and (what := captured.changed(whole=looks)):
            self._drop(what)
            captured = None
        self.last, self.looked = captured, looks
        if captured is None:
            return self._capture(kind, args) if self._is_ready(kind) else None
        captured.calls += 1
        captured.unguarded += 1
        if captured.doubted or self.policy.is_check_due(captured.calls):
            self.looked = True
            return self._check(captured, args)
        return self._finish(self._run(captured.run, args))

    def ask_guards(self, every: int) -> None:
        """Makes the next call of each graph ask its guards, and then one of so many."""
        self._every = every
        for captured in self.graphs.values():
            captured.unguarded = 0

    def refuse(self, why: str) -> None:
        """Leaves all further calls to the function."""
        log.warning("ppvae: %s: %s", self._fallback, why)
        self._give_up(why)

    def _give_up(self, why: str) -> None:
        self.graphs.clear()
        self.refusal, self.kernels = why, "eager"

    def _drop(self, what: str) -> None:
        self._changes += 1
        say = log.warning if self._changes == OFTEN else log.info
        say("ppvae: captured %s are made anew, later after each change (%d): %s", self._name, self._changes, what)
        self.graphs.clear()
        self._calls.clear()
        self.kernels = self.kernels if self.policy.recompiles else "graph"

    def _is_ready(self, kind: Any) -> bool:
        self._calls[kind] = self._calls.get(kind, 0) + 1
        waited = self._calls[kind] >= self.policy.wait << min(self._changes, MAX_DOUBLINGS)
        return (self._first or waited) and len(self.graphs) < self.policy.most

    def _run(self, graph: Graph | HoistedGraph, args: Sequence[Tensor]) -> Outputs:
        return graph(*args) if isinstance(graph, Graph) else graph(self.block, args)

    def _finish(self, outputs: Outputs) -> Outputs:
        self.target.finish(outputs)
        return outputs

    def _capture(self, kind: Any, args: Sequence[Tensor]) -> Outputs:
        """One call of the function, and its graph, whose outputs are returned where they are the same."""
        first, self._first = self._first, False
        eager = EagerResult(self.target, args)
        if eager.refusal:
            self.refuse(eager.refusal)
            return eager.outputs
        try:
            captured = self._captured(args, eager, first)
        except Exception as error:
            captured = None
            if first and self._retries:
                self._first, self._retries = True, self._retries - 1
            else:
                self.refuse(one_line_reason(error))
        if captured is None:
            eager.restore_after()
            return eager.outputs
        self.graphs[kind] = captured
        eager.restore_before()
        return self._finish(self._run(captured.run, args))

    def _captured(self, args: Sequence[Tensor], eager: EagerResult, first: bool) -> CapturedGraph | None:
        """The graph of a call; None where it is only of use compiled, and not worth that."""
        target, policy = self.target, self.policy
        guards = target.guards() if target.guards is not None else None
        eager.restore_before()
        function = target.traced or target.function
        graph = capture(lambda: function(*args), list(target.parameters()), args)
        if guards is not None:
            if what := guards.changed():
                raise CaptureError(f"it changes {what} as it runs")
            guards.tensors, guards.read = {id(t) for t in graph.tensors}, graph.read
        if target.deterministic and graph.draws:
            raise CaptureError(f"the {self._name} draw random numbers")
        if policy.keeps_uncompiled:
            eager.restore_before()
            eager.compare(graph(*args))
        run: Graph | HoistedGraph = graph
        if self.kernels == "compiled" and policy.is_worth_compiling(graph, first):
            run = self._compiled(graph, args, eager)
        elif not policy.keeps_uncompiled:
            self._give_up("compiling does not pay")
            return None
        elif first:
            self.kernels = "graph"
        return CapturedGraph(graph, run, guards)

    def _compiled(self, graph: Graph, args: Sequence[Tensor], eager: EagerResult) -> Graph | HoistedGraph:
        """The compiled form of a graph if it agrees and is faster; otherwise the graph, or the error."""
        varying, choices = self.target.varying, self.target.choices()
        try:
            hoisted = None if varying is None else HoistedGraph(graph, args, varying, choices)
            run = hoisted or graph.compile(args, choices)
            eager.restore_before()
            eager.compare(self._run(run, args))
            if isinstance(run, HoistedGraph) or self.policy.is_faster(run, graph, args):
                return run
        except Exception as error:
            if not self.policy.keeps_uncompiled:
                raise
            log.warning("ppvae: captured %s are not compiled: %s", self._name, one_line_reason(error))
        self.kernels = "graph"
        return graph

    def _check(self, captured: CapturedGraph, args: Sequence[Tensor]) -> Outputs:
        """One call of the graph, compared with the function; of the function where they differ."""
        eager = EagerResult(self.target, args)
        if eager.refusal:
            self.refuse(eager.refusal)
            return eager.outputs
        if captured.guards is not None and (what := captured.guards.changed()):  # by this call, or seen only in a call
            self._drop(what)
            return eager.outputs
        eager.restore_before()
        outputs = self._run(captured.run, args)
        try:
            eager.compare(outputs)
        except CaptureError as error:
            if captured.doubted or self.kernels != "compiled":
                self.refuse(f"{error}, found at step {captured.calls} of the graph")
            captured.doubted = True  # rounding alone can turn a drawn bit: the next call is compared, too
            eager.restore_after()
            return eager.outputs
        captured.doubted = False
        return self._finish(outputs)
