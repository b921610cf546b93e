"""Matrix products by the faster library, torch's default BLAS or oneDNN, measured for each shape."""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

MIN_MULTIPLICATIONS = 2**20  # of a product that is timed
TIMING_ROUNDS = 5
CONTIGUOUS: dict[str, Any] = {"memory_format": torch.contiguous_format}
MARGIN = 0.95  # of the default library's time, below which oneDNN is used

Choices = dict[str, bool]  # by kind of product, whether oneDNN computes it


def choose_matmul_backends(module: fx.GraphModule, choices: Choices) -> None:
    """Replaces those float32 products of a graph on the CPU that oneDNN computes faster.

    Kinds of products that are not in `choices` are timed at the current number of threads and added. A run saves its
    choices, so that it resumes with the same graph to the last bit.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return
    aten = torch.ops.aten
    for node in list(module.graph.nodes):
        if node.target is aten.addmm.default and not node.kwargs and len(_value(node.args[0]).shape) == 1:
            bias, a, b = node.args
        elif node.target is aten.mm.default:
            bias, (a, b) = None, node.args
        else:
            continue
        kind = _product_kind(_value(a), _value(b), bias is not None)
        if kind is None:
            continue
        if kind not in choices:
            choices[kind] = _onednn_is_faster(_value(a), _value(b))
        if choices[kind]:
            with module.graph.inserting_before(node):
                transposed = module.graph.call_function(aten.t.default, (b,))
                transposed.meta["val"] = _value(b).t()
                if _value(a).stride(-1) != 1:  # oneDNN would copy it; here the kernel that computes it may write it so
                    strided, a = a, module.graph.call_function(aten.clone.default, (a,), CONTIGUOUS)
                    a.meta["val"] = _value(strided).contiguous()
                product = module.graph.call_function(onednn_linear(), (a, transposed, bias))
            product.meta = dict(node.meta)
            node.replace_all_uses_with(product)
            module.graph.erase_node(node)
    module.recompile()


def _value(node: Any) -> Tensor:
    value: Tensor = node.meta["val"]
    return value


def _product_kind(a: Tensor, b: Tensor, bias: bool) -> str | None:
    """Shapes, layouts, bias and threads of a product, in words; None for one that is not replaced."""
    if a.device.type != "cpu" or a.dtype != torch.float32 or b.dtype != torch.float32:
        return None
    (m, k), n = a.shape, b.shape[1]
    if m * k * n < MIN_MULTIPLICATIONS:
        return None
    sides = "".join("n" if t.stride(-1) == 1 else "t" for t in (a, b))
    return f"{m}x{k}x{n} {sides}{' + bias' if bias else ''}, {torch.get_num_threads()} threads"


def _onednn_is_faster(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN is faster for a product of this kind, by medians over interleaved rounds."""
    one, other = (torch.randn(t.shape).as_strided(t.shape, _strides(t)) for t in (a, b))
    transposed, product = other.t(), onednn_linear()
    runs: list[Callable[[], Tensor]] = [lambda: torch.mm(one, other), lambda: product(one, transposed, None)]
    times: list[list[float]] = [[], []]
    with torch.no_grad():
        for _ in range(TIMING_ROUNDS + 1):
            for run, seconds in zip(runs, times, strict=True):
                start = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - start)
    default, onednn = (statistics.median(seconds[1:]) for seconds in times)  # the first round creates kernels
    return onednn < MARGIN * default


def _strides(t: Tensor) -> tuple[int, int]:
    rows, columns = t.shape
    return (columns, 1) if t.stride(-1) == 1 else (1, rows)


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return product


_library: torch.library.Library | None = None


def onednn_linear() -> Any:
    """x @ weight.T + bias by oneDNN, as an operation of graphs."""
    global _library
    if _library is None:
        _library = torch.library.Library("ppvae", "FRAGMENT")
        _library.define("onednn_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
        _library.impl("onednn_linear", _by_onednn, "CPU")
        _library.impl("onednn_linear", lambda x, weight, bias: x.new_empty(len(x), len(weight)), "Meta")
    return torch.ops.ppvae.onednn_linear.default


@functools.cache
def lower_onednn_linear() -> None:
    """Makes inductor write calls of oneDNN itself for `onednn_linear`, which take half as long to dispatch."""
    from torch._inductor import lowering

    product, by_onednn = onednn_linear(), lowering.fallback_handler(torch.ops.mkldnn._linear_pointwise.default, False)
    lowering.add_layout_constraint(product, lowering.constrain_to_fx_strides)
    lowering.register_lowering(product, type_promotion_kind=None)(
        lambda x, weight, bias: by_onednn(x, weight, bias, "none", [], "")
    )


@contextlib.contextmanager
def faster_linear_layers() -> Iterator[None]:
    """Computes large float32 linear layers of eager runs by oneDNN, where MKL is slower for certain.

    Gradients are those of the layer's input; layers whose parameters need one are left alone. A layer counts as large
    from `MIN_MULTIPLICATIONS`. Results are equal up to rounding. Layers of reduced precision (`layer_precision`), and
    runs that are captured or mapped by `torch.func`, are left as they are. The function that `torch.nn.Linear` calls is
    replaced meanwhile: a mode of torch's would take a third of the time of small runs.
    """
    if not mkl_is_slow():
        yield
        return
    before = torch.nn.functional.linear

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not _is_replaceable(input, weight, bias):
            return before(input, weight, bias)
        if torch.is_grad_enabled() and input.requires_grad:
            out: Tensor = _LinearOfInput.apply(input, weight, bias)
            return out
        return _by_onednn(input, weight, bias)

    torch.nn.functional.linear = linear
    try:
        yield
    finally:
        torch.nn.functional.linear = before


class _LinearOfInput(torch.autograd.Function):
    """A linear layer that is differentiable, any number of times, with respect to its input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return _by_onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _LinearOfInput.apply(gradient, ctx.weight.t(), None), None, None


def _is_replaceable(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    if weight.dim() != 2 or x.numel() * len(weight) < MIN_MULTIPLICATIONS:
        return False
    parameters = [t for t in (weight, bias) if t is not None]
    return not need_gradients(parameters) and are_plain([x, *parameters])


def need_gradients(tensors: Sequence[Tensor]) -> bool:
    """Whether gradients of any of the tensors are asked for."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors are float32 on the CPU, and operations on them are no more than computed.

    Not so where they are compiled, recorded by a mode, mapped or differentiated by `torch.func`, or dual numbers.
    """
    return (
        not torch.compiler.is_compiling()
        and torch.autograd.forward_ad._current_level < 0
        and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
        and all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
        and not torch._C._len_torch_function_stack()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


@functools.cache
def mkl_is_slow() -> bool:
    """Whether torch multiplies by MKL on a processor of AMD, on which MKL takes up to twice as long as oneDNN.

    This is not timed, so that results of one machine are equal to the last bit.
    """
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        processor = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "AuthenticAMD" in processor and hasattr(torch.ops.mkldnn, "_linear_pointwise")
