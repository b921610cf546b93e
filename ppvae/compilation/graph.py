"""Capture of a function of tensors as a graph of tensor operations, with every tensor that it reads as an input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, final

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ppvae.compilation.bernoulli import keep_library
from ppvae.compilation.inductor_passes import compile_with_inductor
from ppvae.compilation.matmul_backend import Choices
from ppvae.compilation.noise import with_fast_draws
from ppvae.compilation.random_ops import with_fixed_noise


def is_capturing() -> bool:
    """Whether a graph is being captured, so that the values of tensors must not be read."""
    return _HiddenValues.depth > 0


class CaptureError(Exception):
    """Why a function cannot be replaced by a graph."""


def one_line_reason(error: Exception) -> str:
    """An error that stopped capture or compilation, as one line for the log."""
    text = str(error) if isinstance(error, CaptureError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:160]


def all_close(a: Tensor, b: Tensor, near: Tensor | float) -> bool:
    """Whether all values differ by at most `near`, with infinities and NaN in the same places."""
    return bool((((a - b).abs() <= near) | (a == b) | (a.isnan() & b.isnan())).all())


def all_double(tensors: Iterable[Tensor]) -> bool:
    """Whether all floating-point tensors are float64."""
    return all(t.dtype == torch.float64 for t in tensors if t.is_floating_point())


@final
class Graph:
    """A captured function, `graph(*args)`; other tensors that it reads are inputs, too, with their current values.

    Attributes:
        tensors: the inputs besides the arguments: parameters, buffers and others, by identity.
        read: tensors whose values were read into Python while the graph was captured, with their versions.
        module: the operations, as a function of (*tensors, *args).
    """

    def __init__(self, module: fx.GraphModule, tensors: Sequence[Tensor], read: list[tuple[Tensor, int]]):
        self.module, self.tensors, self.read = module, list(tensors), read
        self._forward: Callable[..., Any] = module.forward
        self._metadata_at_capture = [_metadata(t) for t in tensors]

    @property
    def fits(self) -> bool:
        """Whether `tensors` still have the shapes, types and devices of the capture."""
        return [_metadata(t) for t in self.tensors] == self._metadata_at_capture

    def __call__(self, *args: Tensor) -> list[Any]:
        with torch.no_grad():
            return list(self._forward(*self.tensors, *args))

    def compile(self, args: Sequence[Tensor], choices: Choices) -> Graph:
        """The same function compiled by inductor, drawing the same noise in the same order.

        `choices` are the libraries of matrix products, as in `choose_matmul_backends`. Raises what inductor raises, for
        example without a C++ compiler, and CaptureError where random numbers depend on values, so that their order
        could not be kept.
        """
        new = Graph(self.module, self.tensors, self.read)
        new._forward = compile_module(self.module, [*self.tensors, *args], choices)
        return new

    @property
    def draws(self) -> bool:
        """Whether it draws random numbers."""
        return any(is_random(node) for node in self.module.graph.nodes)

    def split(self, *varying: int) -> tuple[fx.GraphModule, fx.GraphModule]:
        """(the part that depends neither on random numbers nor on the arguments `varying`, the remaining part).

        The first is a function of (*tensors, *other arguments), the second of (*outputs of the first, *varying
        arguments).
        """
        placeholders = [n for n in self.module.graph.nodes if n.op == "placeholder"]
        varying_nodes = {placeholders[len(self.tensors) + i] for i in varying}
        for node in self.module.graph.nodes:
            if is_random(node) or node.target in _EMPTY or any(n in varying_nodes for n in node.all_input_nodes):
                varying_nodes.add(node)
                schema = getattr(node.target, "_schema", None)
                changed = node.args[0] if schema is not None and schema.is_mutable else node
                if isinstance(changed, fx.Node) and changed not in varying_nodes:
                    raise CaptureError("it changes in place what is the same for all draws")
        once, each = fx.Graph(), fx.Graph()
        places: dict[fx.Node, fx.Node] = {}
        for node in self.module.graph.nodes:
            if node not in varying_nodes and node.op != "output":
                places[node] = once.node_copy(node, places.__getitem__)
        shared = [n for n in places if any(u in varying_nodes or u.op == "output" for u in n.users)]
        once.output(tuple(places[n] for n in shared))
        copies = {n: each.placeholder(n.name) for n in shared}
        for n in shared:
            copies[n].meta = dict(n.meta)
        for node in self.module.graph.nodes:
            if node in varying_nodes or node.op == "output":
                copies[node] = each.node_copy(node, copies.__getitem__)
        return fx.GraphModule({}, once), fx.GraphModule({}, each)


def compile_module(module: fx.GraphModule, inputs: Sequence[Tensor], choices: Choices) -> Callable[..., Any]:
    """A graph compiled by inductor, as a function of its inputs; errors as in `Graph.compile`."""
    noise, rest = _separate_noise(with_fixed_noise(module))
    if all(t.device.type == "cpu" for t in inputs):
        keep_library()
    return compile_with_inductor(with_fast_draws(noise), rest, inputs, choices)


@final
class HoistedGraph:
    """A graph in two parts: what is the same for all calls of a block, computed once, and the compiled remainder."""

    def __init__(self, graph: Graph, args: Sequence[Tensor], varying: tuple[int, ...], choices: Choices):
        once, each = graph.split(*varying)
        self._once, self._tensors, self._varying = once.forward, graph.tensors, varying
        self._block: Any = None
        self._shared: Sequence[Tensor] = ()
        with torch.no_grad():
            self._each = compile_module(each, [*self._constants(args), *(args[i] for i in varying)], choices)

    def _constants(self, args: Sequence[Tensor]) -> Sequence[Tensor]:
        shared: Sequence[Tensor] = self._once(
            *self._tensors, *(t for i, t in enumerate(args) if i not in self._varying)
        )
        return shared

    def __call__(self, block: Any, args: Sequence[Tensor]) -> Sequence[Any]:
        with torch.no_grad():
            if self._block is not block:
                self._block, self._shared = block, self._constants(args)
            outputs: Sequence[Any] = self._each(*self._shared, *[args[i] for i in self._varying])
        return outputs


def _metadata(t: Tensor) -> tuple[Any, ...]:
    return t.shape, t.dtype, t.device, t.requires_grad


def capture(run: Callable[[], Sequence[Tensor | None]], parameters: Sequence[Tensor], args: Sequence[Tensor]) -> Graph:
    """The graph of `run`, which reads the tensors `parameters` and `args` (found by identity) and any others.

    Non-tensor state is specialised at capture: numbers, flags, control flow, shapes. Values of tensors are not, and a
    run that reads them into Python is refused.

    Raises:
        CaptureError: control flow depends on the values of tensors; or whatever the run itself raises.
    """
    from torch.fx.experimental.proxy_tensor import extract_val, make_fx

    inputs = list({id(t): t for t in parameters}.values())
    constants = _ConstantTracker()

    def traced(*_: Tensor) -> tuple[Tensor | None, ...]:
        with constants, _HiddenValues():
            return tuple(run())

    try:
        module = make_fx(traced)(*inputs, *args)
    except (RuntimeError, ValueError) as error:
        text = str(error)
        if "tracing tensor" in text or "data-dependent" in text.lower() or "proxy" in text.lower():
            raise CaptureError("its course depends on the values of tensors") from error
        raise
    graph = module.graph
    graph.set_codegen(fx.graph.CodeGen())
    places = [n for n in graph.nodes if n.op == "placeholder"]
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        value = getattr(module, str(node.target))
        if not isinstance(value, Tensor):
            raise CaptureError(f"it runs {type(value).__name__} that is not a tensor operation")
        known = next((i for i, t in enumerate(inputs) if t is value), None)
        if known is None:
            known = len(inputs)
            inputs.append(value)
            with graph.inserting_before(places[known]) if places[known:] else graph.inserting_after(places[-1]):
                places.insert(known, graph.placeholder(f"held_{len(inputs)}"))
            places[known].meta["val"] = extract_val(value)
        node.replace_all_uses_with(places[known])
        graph.erase_node(node)
    _eliminate_dead_code(graph)
    return Graph(fx.GraphModule({}, graph), inputs, constants.read)


_ALIASES = (torch.ops.aten.alias.default, torch.ops.aten.detach.default)


def _eliminate_dead_code(graph: fx.Graph) -> None:
    """Removes operations without effect; random draws and changes in place stay, for the random state and buffers."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _ALIASES:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code(lambda n: n.is_impure() or is_random(n))
    graph.lint()


def is_random(node: fx.Node) -> bool:
    """Whether an operation draws random numbers."""
    return node.op == "call_function" and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _separate_noise(module: fx.GraphModule) -> tuple[fx.GraphModule, fx.GraphModule]:
    """(the random draws of a graph in order, a function of its inputs; all else, a function of (*draws, *inputs))."""
    drawing: dict[fx.Node, None] = {}
    for node in module.graph.nodes:
        if node.target in _EMPTY or (is_random(node) and all(n in drawing for n in node.all_input_nodes)):
            drawing[node] = None
        elif is_random(node):
            raise CaptureError("noise depends on values")
    noise, rest = fx.Graph(), fx.Graph()
    places: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            places[node] = noise.placeholder(node.name)
        elif node.target is torch.ops.aten.empty_like.default:
            kind = node.meta["val"]  # only the shape, strides and type of its input matter
            size, stride = list(kind.shape), list(kind.stride())
            options = {"dtype": kind.dtype, "device": kind.device}
            places[node] = noise.call_function(torch.ops.aten.empty_strided.default, (size, stride), options)
        elif node in drawing:
            places[node] = noise.node_copy(node, places.__getitem__)
    draws = [n for n in drawing if is_random(n) and any(u not in drawing for u in n.users)]
    noise.output(tuple(places[n] for n in draws))
    copies = {n: rest.placeholder(f"noise_{i}") for i, n in enumerate(draws)}
    for node in module.graph.nodes:
        if node not in copies and not (node in drawing and is_random(node)):
            copies[node] = rest.node_copy(node, copies.__getitem__)
    for node in list(rest.nodes):  # memory that only draws were written to
        if node.target in _EMPTY and not node.users:
            rest.erase_node(node)
    return fx.GraphModule({}, noise), fx.GraphModule({}, rest)


_EMPTY = (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default, torch.ops.aten.empty_strided.default)


_ATEN = torch.ops.aten
_FILLS = {  # of whose input no value matters
    _ATEN.new_ones, _ATEN.new_zeros, _ATEN.new_full, _ATEN.ones_like, _ATEN.zeros_like, _ATEN.full_like,
}  # fmt: skip


class _ConstantTracker(TorchDispatchMode):
    """Refuses operations whose output shape depends on values, except on constants: the same values at every run.

    Constants are computed from numbers alone, or from tensors that exist before the run and are none of its inputs.
    They may be read into Python; `read` then holds those tensors with their versions, so that a change is noticed.

    One fake mode records the shapes of what all operations give: `make_fx` would make one for each operation, which
    takes longer than all else that it does. Only operations see it, the captured run does not.
    """

    def __init__(self) -> None:
        from torch._guards import TracingContext
        from torch._subclasses.fake_tensor import FakeTensorMode

        super().__init__()
        self._shapes = TracingContext(FakeTensorMode(allow_fallback_kernels=True))  # as in make_fx
        self.read: list[tuple[Tensor, int]] = []
        self._constants: dict[int, tuple[Tensor, list[tuple[Tensor, int]]]] = {}  # with the tensors of their origin

    def _origin(self, t: Tensor) -> list[tuple[Tensor, int]] | None:
        """The earlier tensors that a constant is computed from; None for a value that is not constant."""
        if id(t) in self._constants:
            return self._constants[id(t)][1]
        return None if _tracked(t) else [(t, t._version)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        origins = [self._origin(t) for t in inputs if func.overloadpacket not in _FILLS]
        fixed = None not in origins and torch.Tag.nondeterministic_seeded not in func.tags
        came_from = [pair for origin in origins for pair in origin or ()]
        shaped = torch.Tag.dynamic_output_shape in func.tags
        if fixed and (shaped or torch.Tag.data_dependent_output in func.tags):
            self.read += came_from
            with torch._C._DisableTorchDispatch():
                return func(*args, **(kwargs or {}))
        if shaped:
            indices = args[1] if "index" in func.name() and len(args) > 1 else None
            kinds = [t.dtype for t in indices if isinstance(t, Tensor)] if isinstance(indices, list | tuple) else []
            if not kinds or torch.bool in kinds or torch.uint8 in kinds:
                raise CaptureError(f"the shape of what {func.name()} gives depends on values")
        outside = func._schema.is_mutable and any(id(t) not in self._constants for t in inputs)
        with torch._guards.tracing(self._shapes):
            out = func(*args, **(kwargs or {}))
        if fixed and not outside:
            outputs = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
            self._constants.update((id(t), (t, came_from)) for t in outputs)
        elif func._schema.is_mutable:  # what shares memory with a written tensor is no constant any more
            written = {t.untyped_storage()._cdata for t in inputs}
            self._constants = {i: k for i, k in self._constants.items() if k[0].untyped_storage()._cdata not in written}
        return out


def _tracked(t: Tensor) -> bool:
    """Whether a tensor is an input of the captured run, or computed from one."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

    mode = get_proxy_mode()
    return mode is not None and get_proxy_slot(t, mode.tracer, None) is not None


_READING_METHODS = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.data_ptr, Tensor.__dlpack__}


class _HiddenValues(TorchFunctionMode):
    """Refuses to hand the values of a tensor to Python, and tells `is_capturing` that it does."""

    depth = 0

    def __enter__(self) -> _HiddenValues:
        _HiddenValues.depth += 1
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        _HiddenValues.depth -= 1
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READING_METHODS:
            raise CaptureError(f"it reads values into Python ({func.__name__})")
        if func is torch._is_all_true:  # asked by distributions that validate their arguments, which a graph does not
            return True
        if func is torch.nn.functional.one_hot:
            return _one_hot(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    """torch's one_hot without its search for the largest class; a class that is too large is an error, too."""
    if num_classes < 1:
        raise CaptureError("one_hot without num_classes reads values")
    hot = torch.zeros(*tensor.shape, num_classes, dtype=torch.long, device=tensor.device)
    return hot.scatter(-1, tensor.unsqueeze(-1), 1)
