"""A run of a pair as one graph of tensor operations, with every tensor that it reads as an input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, final

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ppvae.compilation.inductor_passes import compile_with_inductor
from ppvae.compilation.matmul_backend import Choices
from ppvae.compilation.random_ops import with_fixed_noise


def is_capturing() -> bool:
    """Whether a graph is being captured, so that the values of tensors must not be read."""
    return _HiddenValues.depth > 0


class CaptureError(Exception):
    """Why a run cannot be a graph."""


def one_line_reason(error: Exception) -> str:
    """Why something is not captured or compiled, for a line in the log."""
    text = str(error) if isinstance(error, CaptureError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:160]


def all_close(a: Tensor, b: Tensor, near: Tensor | float) -> bool:
    """Whether all values are within `near` of each other, infinite or missing ones in the same places."""
    return bool((((a - b).abs() <= near) | (a == b) | (a.isnan() & b.isnan())).all())


def all_double(tensors: Iterable[Tensor]) -> bool:
    """Whether all floating-point tensors are float64."""
    return all(t.dtype == torch.float64 for t in tensors if t.is_floating_point())


@final
class Graph:
    """A function of a batch, `graph(*args)`, over tensors that it holds and reads as they stand.

    Attributes:
        tensors: parameters, buffers and other tensors that it reads, by identity.
        read: tensors whose values were read into Python while the graph was captured, with their versions.
        module: the operations, as a function of (*tensors, *args).
    """

    def __init__(self, module: fx.GraphModule, tensors: Sequence[Tensor], read: list[tuple[Tensor, int]]):
        self.module, self.tensors, self.read = module, list(tensors), read
        self._forward: Callable[..., Any] = module.forward
        self._kinds = [_kind(t) for t in tensors]

    @property
    def fits(self) -> bool:
        """Whether the tensors that are held still have the shapes, types and devices of the capture."""
        return [_kind(t) for t in self.tensors] == self._kinds

    def __call__(self, *args: Tensor) -> list[Any]:
        with torch.no_grad():
            return list(self._forward(*self.tensors, *args))

    def compile(self, args: Sequence[Tensor], choices: Choices) -> Graph:
        """The same function compiled by inductor, drawing the same noise in the same order.

        `choices` says which library is taken for products, as in `products.take_the_faster`. Raises whatever inductor
        raises, for example where there is no C++ compiler, and Uncapturable where noise depends on values, so that its
        order could not be kept.
        """
        new = Graph(self.module, self.tensors, self.read)
        new._forward = compile_module(self.module, [*self.tensors, *args], choices)
        return new

    @property
    def draws(self) -> bool:
        """Whether anything is drawn."""
        return any(_random(node) for node in self.module.graph.nodes)

    def split(self, *varying: int) -> tuple[fx.GraphModule, fx.GraphModule]:
        """(what depends neither on noise nor on the arguments `varying`, of the others; the rest, of what that gives).

        The rest is a function of (*what the first gives, *varying arguments).
        """
        places_of = [n for n in self.module.graph.nodes if n.op == "placeholder"]
        noisy = {places_of[len(self.tensors) + i] for i in varying}
        for node in self.module.graph.nodes:
            if _random(node) or node.target in _EMPTY or any(n in noisy for n in node.all_input_nodes):
                noisy.add(node)
                schema = getattr(node.target, "_schema", None)
                changed = node.args[0] if schema is not None and schema.is_mutable else node
                if isinstance(changed, fx.Node) and changed not in noisy:
                    raise CaptureError("it changes in place what is the same for all draws")
        once, each = fx.Graph(), fx.Graph()
        places: dict[fx.Node, fx.Node] = {}
        for node in self.module.graph.nodes:
            if node not in noisy and node.op != "output":
                places[node] = once.node_copy(node, places.__getitem__)
        shared = [n for n in places if any(u in noisy or u.op == "output" for u in n.users)]
        once.output(tuple(places[n] for n in shared))
        left = {n: each.placeholder(n.name) for n in shared}
        for n in shared:
            left[n].meta = dict(n.meta)
        for node in self.module.graph.nodes:
            if node in noisy or node.op == "output":
                left[node] = each.node_copy(node, left.__getitem__)
        return fx.GraphModule({}, once), fx.GraphModule({}, each)


def compile_module(module: fx.GraphModule, inputs: Sequence[Tensor], choices: Choices) -> Callable[..., Any]:
    """A graph compiled by inductor, as `Graph.compile` says."""
    noise, rest = _without_noise(with_fixed_noise(module))
    return compile_with_inductor(noise, rest, inputs, choices)


def _kind(t: Tensor) -> tuple[Any, ...]:
    return t.shape, t.dtype, t.device, t.requires_grad


def capture(run: Callable[[], Sequence[Tensor | None]], held: Sequence[Tensor], args: Sequence[Tensor]) -> Graph:
    """The graph of `run`, which reads the tensors `held` and `args` (found by identity) and any others.

    What is not a tensor is baked in: numbers, flags, the course of Python code, shapes. Values of tensors are not, and
    a run that looks at them is refused.

    Raises:
        Uncapturable: the run's course depends on the values of tensors; or whatever the run itself raises.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    inputs = list({id(t): t for t in held}.values())
    count = len(inputs)
    static = _Static()

    def traced(*_: Tensor) -> tuple[Tensor | None, ...]:
        with static, _HiddenValues():
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
    first = places[count] if len(places) > count else places[-1].next
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        value = getattr(module, str(node.target))
        if not isinstance(value, Tensor):
            raise CaptureError(f"it runs {type(value).__name__} that is not a tensor operation")
        known = next((i for i, t in enumerate(inputs) if t is value), None)
        if known is None:
            inputs.append(value)
            with graph.inserting_before(first):
                place = graph.placeholder(f"held_{len(inputs)}")
            places.insert(len(inputs) - 1, place)
            known = len(inputs) - 1
        node.replace_all_uses_with(places[known])
        graph.erase_node(node)
    _tidy(graph)
    return Graph(fx.GraphModule({}, graph), inputs, static.read)


_ALIASES = (torch.ops.aten.alias.default, torch.ops.aten.detach.default)


def _tidy(graph: fx.Graph) -> None:
    """Takes out what computes nothing; draws and changes in place stay, so that noise and buffers are as they were."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _ALIASES:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code(lambda n: n.is_impure() or _random(n))
    graph.lint()


def _random(node: fx.Node) -> bool:
    return node.op == "call_function" and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _without_noise(module: fx.GraphModule) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The draws of a graph, in order, as a function of its inputs, and the rest of it as one of draws and inputs."""
    early: dict[fx.Node, None] = {}
    for node in module.graph.nodes:
        if node.target in _EMPTY or (_random(node) and all(n in early for n in node.all_input_nodes)):
            early[node] = None
        elif _random(node):
            raise CaptureError("noise depends on values")
    noise, rest = fx.Graph(), fx.Graph()
    places: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            places[node] = noise.placeholder(node.name)
        elif node.target is torch.ops.aten.empty_like.default:
            kind = node.meta["val"]  # all that it takes from its input
            size, stride = list(kind.shape), list(kind.stride())
            options = {"dtype": kind.dtype, "device": kind.device}
            places[node] = noise.call_function(torch.ops.aten.empty_strided.default, (size, stride), options)
        elif node in early:
            places[node] = noise.node_copy(node, places.__getitem__)
    drawn = [n for n in early if _random(n) and any(u not in early for u in n.users)]
    noise.output(tuple(places[n] for n in drawn))
    left = {n: rest.placeholder(f"noise_{i}") for i, n in enumerate(drawn)}
    for node in module.graph.nodes:
        if node not in left and not (node in early and _random(node)):
            left[node] = rest.node_copy(node, left.__getitem__)
    for node in list(rest.nodes):  # a draw is put where nothing was yet
        if node.target in _EMPTY and not node.users:
            rest.erase_node(node)
    return fx.GraphModule({}, noise), fx.GraphModule({}, rest)


_EMPTY = (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default, torch.ops.aten.empty_strided.default)


class _Static(TorchDispatchMode):
    """Refuses operations whose output's shape depends on values, and knows which values are the same at every run.

    Those are made of numbers alone, or of tensors that stood outside before the run and are none of its inputs. They
    may be read into Python; the tensors outside are noted then, so that a change is noticed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read: list[tuple[Tensor, int]] = []
        self._known: dict[int, tuple[Tensor, list[tuple[Tensor, int]]]] = {}  # with the tensors outside they came from

    def _origin(self, t: Tensor) -> list[tuple[Tensor, int]] | None:
        """The tensors outside that a value is made of; None where it may be another at the next run."""
        if id(t) in self._known:
            return self._known[id(t)][1]
        return None if _tracked(t) else [(t, t._version)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        origins = [self._origin(t) for t in inputs]
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
        outside = func._schema.is_mutable and any(id(t) not in self._known for t in inputs)
        out = func(*args, **(kwargs or {}))
        if fixed and not outside:
            made = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
            self._known.update((id(t), (t, came_from)) for t in made)
        elif func._schema.is_mutable:  # whatever shares memory with what was written is known no more
            written = {t.untyped_storage()._cdata for t in inputs}
            self._known = {i: k for i, k in self._known.items() if k[0].untyped_storage()._cdata not in written}
        return out


def _tracked(t: Tensor) -> bool:
    """Whether a tensor is an input of the run that is captured, or made from one."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

    mode = get_proxy_mode()
    return mode is not None and get_proxy_slot(t, mode.tracer, None) is not None


_READS = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.data_ptr, Tensor.__dlpack__}


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
        if func in _READS:
            raise CaptureError(f"it reads values into Python ({func.__name__})")
        if func is torch.nn.functional.one_hot:
            return _one_hot(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    """torch's own, which looks for the largest class first; a class that is too large is an error here as there."""
    if num_classes < 1:
        raise CaptureError("one_hot without num_classes reads values")
    hot = torch.zeros(*tensor.shape, num_classes, dtype=torch.long, device=tensor.device)
    return hot.scatter(-1, tensor.unsqueeze(-1), 1)
