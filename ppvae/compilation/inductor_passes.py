"""Graph passes and decompositions before inductor: faster code on the CPU, and roundings that it keeps."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ppvae.compilation.direct_call import call_without_wrappers
from ppvae.compilation.matmul_backend import Choices, choose_matmul_backends, lower_onednn_linear, onednn_linear
from ppvae.compilation.subnormals import without_subnormals

MIN_NUMBERS = 2**18  # in a sum over rows that is computed in blocks
ROWS_PER_BLOCK = 100
LANES = 16  # sums or products in one vector
MAX_FACTORS = 64  # of one product: each is at most 2, and 2^64 is a float32


def compile_with_inductor(
    noise: fx.GraphModule, rest: fx.GraphModule, inputs: Sequence[Tensor], choices: Choices
) -> Any:
    """A graph `rest` of (*draws, *inputs) compiled by inductor, as a function of the inputs; `noise` draws eagerly."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    draw: Callable[..., Any] = getattr(noise, "forward")  # noqa: B009
    choose_matmul_backends(rest, choices)
    if any(node.target is onednn_linear() for node in rest.graph.nodes):
        lower_onednn_linear()
    keep_bfloat16_roundings(rest)
    _add_biases_after_products(rest)
    _sum_rows_in_blocks(rest)
    _fuse_logarithms(rest)
    name = "use_decompose_tanh"  # by exp: several times faster than inductor's vectorised tanh
    options: dict[str, Any] = {f"cpp.{name}": True} if hasattr(config.cpp, name) else {}
    options |= {"size_asserts": False, "alignment_asserts": False}  # at every call, of what does not change
    inputs = [t.detach() for t in inputs]
    on_gpu = any(t.device.type == "cuda" for t in inputs)
    if on_gpu:
        options["triton.cudagraphs"] = True  # one launch for all kernels
    inner: list[Any] = []  # graphs as inductor compiles them

    def compile_inner(graph: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        inner.append(compile_fx_inner(graph, *args, **kwargs))
        return inner[-1]

    with _without_cuda_warning(), torch.no_grad(), config.patch(options):
        drawn = list(draw(*inputs))
        call: Any = compile_fx(rest, [*drawn, *inputs], inner_compile=compile_inner, decompositions=_decompositions())
        outputs = call(*drawn, *inputs)  # compiles now
        kernels = None if on_gpu else call_without_wrappers(rest, inner, [*drawn, *inputs], outputs)
    if on_gpu:

        def run(*tensors: Tensor) -> Any:
            torch.compiler.cudagraph_mark_step_begin()  # the outputs of the last call may be overwritten
            return call(*draw(*tensors), *tensors)

        return run
    kernels = kernels or (lambda tensors: call(*tensors))
    return lambda *tensors: without_subnormals(kernels, [*draw(*tensors), *tensors])


_library = torch.library.Library("ppvae", "FRAGMENT")
_library.define("round_to_bfloat16(Tensor x) -> Tensor")
_library.impl("round_to_bfloat16", lambda x: x.bfloat16().float(), "CompositeExplicitAutograd")
_library.impl("round_to_bfloat16", torch.empty_like, "Meta")


def keep_bfloat16_roundings(module: fx.GraphModule) -> None:
    """Fuses each cast from float32 to bfloat16 and back into one operation; inductor would drop the pair of casts."""
    for node in list(module.graph.nodes):
        if not _is_cast(node, torch.float32) or not _is_cast(narrow := node.args[0], torch.bfloat16):
            continue
        if narrow.args[0].meta["val"].dtype == torch.float32:
            with module.graph.inserting_before(node):
                rounding = module.graph.call_function(torch.ops.ppvae.round_to_bfloat16.default, (narrow.args[0],))
            rounding.meta = dict(node.meta)
            node.replace_all_uses_with(rounding)
            module.graph.erase_node(node)
            if not narrow.users:
                module.graph.erase_node(narrow)
    module.recompile()


def _is_cast(node: fx.Node, dtype: torch.dtype) -> bool:
    is_copy = node.target is torch.ops.aten._to_copy.default and node.kwargs.get("dtype") is dtype
    return is_copy and node.kwargs.keys() <= {"dtype", "layout", "device"}


def _add_biases_after_products(module: fx.GraphModule) -> None:
    """Adds the biases of linear layers where their outputs are used; torch would copy each to the output's memory."""
    aten = torch.ops.aten
    for node in list(module.graph.nodes):
        if node.target is not aten.addmm.default or node.kwargs or node.meta["val"].device.type != "cpu":
            continue
        bias, a, b = node.args
        with module.graph.inserting_before(node):
            product = module.graph.call_function(aten.mm.default, (a, b))
            negative = module.graph.call_function(aten.neg.default, (bias,))  # inductor makes an addmm of a sum
            out = module.graph.call_function(aten.sub.Tensor, (product, negative))
        out.meta = dict(node.meta)
        node.replace_all_uses_with(out)
        module.graph.erase_node(node)
    module.recompile()


def _sum_rows_in_blocks(module: fx.GraphModule) -> None:
    """Computes large sums over all dims but the last in blocks of rows; inductor would read memory column by column.

    Where the summed tensor is cast to bfloat16 for matrix products alone, as the gradient of a layer in bf16, the cast
    may be summed in its place, in float32, so that the tensor is not written to memory twice.
    """
    aten = torch.ops.aten
    for node in list(module.graph.nodes):
        if node.target is not aten.sum.dim_IntList or node.kwargs or node.args[1] is None:
            continue
        x, dims = node.args[0].meta["val"], node.args[1]
        kept = node.meta["val"]
        leading = sorted(d % x.dim() for d in dims) == list(range(x.dim() - 1)) and x.is_contiguous()
        if not (leading and x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() >= MIN_NUMBERS):
            continue
        source = next((u for u in node.args[0].users if _feeds_bfloat16_products(u)), node.args[0])
        if source is not node.args[0]:
            node.args[0].append(source)  # its own place may come after this sum
        with module.graph.inserting_before(node):
            shaped = module.graph.call_function(_column_sums, (source, list(kept.shape)))
        node.replace_all_uses_with(shaped)
        module.graph.erase_node(node)
    module.recompile()


def _column_sums(x: Tensor, shape: list[int]) -> Tensor:
    """The sum over all dims but the last, in float32, first within blocks of rows that fit the cache."""
    rows = x.reshape(-1, x.shape[-1])
    whole = len(rows) // ROWS_PER_BLOCK * ROWS_PER_BLOCK
    blocks = rows[:whole].reshape(-1, ROWS_PER_BLOCK, rows.shape[1])
    return (blocks.sum(1, dtype=torch.float32).sum(0) + rows[whole:].sum(0, dtype=torch.float32)).reshape(shape)


def _feeds_bfloat16_products(node: fx.Node) -> bool:
    """Whether a node is a cast to bfloat16 used by matrix products alone, with no change in place before it."""
    aten = torch.ops.aten
    if node.target is not aten._to_copy.default or node.kwargs.get("dtype") is not torch.bfloat16:
        return False
    before = node.prev
    while before is not node.args[0]:
        schema = getattr(before.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            return False
        before = before.prev
    uses = list(node.users)
    while uses:
        use = uses.pop()
        if use.target in (aten.view.default, aten.t.default):
            uses += use.users
        elif use.target is not aten.mm.default:
            return False
    return True


def _fuse_logarithms(module: fx.GraphModule) -> None:
    """Replaces sums of softplus or of binary cross-entropy, log-likelihoods of bits, by `sum_of_softplus`."""
    aten = torch.ops.aten
    for node in list(module.graph.nodes):
        if node.target is not aten.sum.dim_IntList or len(node.args) != 2 or node.kwargs or node.args[1] is None:
            continue
        kept, (term, dims), sign, chain = node.meta["val"].shape, node.args, 1, [node]
        shapes = [term.meta["val"].shape]
        while term.target in (aten.neg.default, aten.neg_.default, aten.view.default) and len(term.users) == 1:
            chain.append(term)
            sign = sign if term.target is aten.view.default else -sign
            term = term.args[0]
        chain.append(term)
        found = _softplus_of(term)
        if found is None or len(term.users) != 1:
            continue
        (x, target), value = found, term.meta["val"]
        shapes.append(value.shape)
        trailing = [d % len(shapes[0]) for d in dims] == list(range(len(kept), len(shapes[0])))
        if not trailing or any(shape[: len(kept)] != kept for shape in shapes):
            continue
        if value.device.type != "cpu" or _factors_per_product(value.shape[len(kept) :].numel()) < 4:
            continue
        kinds = [(t.meta["val"].shape, t.meta["val"].dtype) for t in (term, x, target or x)]
        if any(kind != (value.shape, torch.float32) for kind in kinds):
            continue
        with module.graph.inserting_before(term):  # its inputs may be changed in place between term and sum
            total = module.graph.call_function(sum_of_softplus, (x, target, len(kept), sign))
        total.meta = dict(node.meta)
        node.replace_all_uses_with(total)
        for replaced in chain:
            module.graph.erase_node(replaced)
    module.recompile()


_SOFTPLUS = (torch.ops.aten.softplus.default, torch.ops.aten.softplus.out)


def _softplus_of(node: fx.Node) -> tuple[fx.Node, fx.Node | None] | None:
    """(x, target) of a node that is softplus(x) - target x; None for another."""
    cross_entropy = torch.ops.aten.binary_cross_entropy_with_logits.default
    args: list[Any] = list(node.args)
    if node.target is cross_entropy and args[2:] == [None, None, 0]:
        return args[0], args[1]
    if node.target not in _SOFTPLUS:
        return None
    x: Any = args[0]
    beta, threshold = args[1:] + [1, 20][len(args) - 1 :]
    if beta != 1 or threshold < 15:  # a line from there on
        return None
    if node.target is torch.ops.aten.softplus.out:  # its output must have no other use and be no view
        is_temporary = x.target is torch.ops.aten.mul.Tensor and len(x.users) == 1 and node.kwargs["out"] is x
        return (x, None) if is_temporary else None
    return x, None


def _factors_per_product(count: int) -> int:
    """The factors of each product when `count` numbers are multiplied in `LANES` lanes; 0 where they do not divide."""
    rows, left = divmod(count, LANES)
    return 0 if left or not rows else max(f for f in range(1, MAX_FACTORS + 1) if rows % f == 0)


def sum_of_softplus(x: Tensor, target: Tensor | None, first: int, sign: float = 1) -> Tensor:
    """The sum over dims from `first` on of softplus(x) - target x, times `sign`: x [*kept, *summed] gives [*kept].

    softplus(x) = max(x, 0) + log(1 + exp(-|x|)), and a sum of logarithms is that of a product, one logarithm for up to
    `MAX_FACTORS` numbers. Exact to a few units in the last place of 1 for each number.

    >>> sum_of_softplus(torch.zeros(2, 64), None, 1)
    tensor([44.3614, 44.3614])
    """
    kept, count = x.shape[:first], x.shape[first:].numel()
    shape = (*kept, -1, _factors_per_product(count), LANES)
    linear = x.clamp(min=0) if target is None else (1 - target) * x - x.clamp(max=0)
    product = (1 + _exp(-x.abs())).reshape(shape).prod(-2)
    return sign * (linear.reshape(shape).sum(-2) + product.log()).sum((-2, -1))


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's decompositions, with our own for NaN and for the operations of log(1 + exp(x))."""
    from torch._inductor.decomposition import select_decomp_table

    aten = torch.ops.aten
    ours: dict[Any, Callable[..., Any]] = {
        aten.log1p.default: log1p_by_log,
        aten.softplus.default: softplus,
        aten.softplus_backward.default: softplus_backward,
        aten.log_sigmoid_forward.default: log_sigmoid,
        aten.isnan.default: isnan,
    }
    theirs = select_decomp_table()
    return {**theirs, **{op: _on_cpu(fast, theirs.get(op)) for op, fast in ours.items()}}


def _on_cpu(fast: Callable[..., Any], usual: Callable[..., Any] | None) -> Callable[..., Any]:
    """A decomposition on the CPU, elsewhere inductor's own: inductor fails on what it had left undecomposed itself."""

    def decomposed(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.device.type == "cpu" and x.is_floating_point():
            return fast(x, *args, **kwargs)
        return NotImplemented if usual is None else usual(x, *args, **kwargs)

    return decomposed


def log1p_by_log(x: Tensor) -> Tensor:
    """log(1 + x) to a few units in the last place, from the logarithm, whose vectorised form is seven times faster.

    With u = 1 + x as rounded, log(u) x / (u - 1) (Hewlett-Packard's HP-15C handbook, 1982; Goldberg 1991, theorem 4).

    >>> log1p_by_log(torch.tensor([-1.0, 0.0, 1e-12, 1.0, torch.inf])).tolist()
    [-inf, 0.0, 9.999999960041972e-13, 0.6931471824645996, inf]
    """
    rounded = 1 + x
    off = rounded - 1
    return torch.where(off == 0, x, rounded.log() * torch.where(off == torch.inf, 1.0, x / off))


def softplus(x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """log(1 + exp(beta x)) / beta, x itself where beta x is above the threshold; in one pass over memory."""
    scaled = x * beta
    return torch.where(scaled > threshold, x, log1p_by_log(_exp(scaled.clamp(max=threshold))) / beta)


def softplus_backward(gradient: Tensor, x: Tensor, beta: float, threshold: float) -> Tensor:
    """The gradient of `softplus`."""
    scaled = x * beta
    return torch.where(scaled > threshold, gradient, gradient * scaled.sigmoid())


def log_sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    """(log sigmoid(x), exp(-|x|) for the gradient)."""
    return x.clamp(max=0) - log1p_by_log(_exp(-x.abs())), (-x.abs()).exp()


def isnan(x: Tensor) -> Tensor:
    """Whether numbers are NaN, by a vectorised comparison; inductor would ask of one number after the other."""
    return x != x


def _exp(x: Tensor) -> Tensor:
    """exp(x) as a power of two; inductor would write a value with exp or log that is used twice to memory."""
    return torch.exp2(x * 1.4426950408889634)


@contextlib.contextmanager
def _without_cuda_warning() -> Iterator[None]:
    """Silences the warning about a missing CUDA runtime while code for the CPU is compiled."""
    log = logging.getLogger("torch.utils.cpp_extension")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
