"""Matrix products by whichever library is faster here, torch's usual one or oneDNN: measured for each kind."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

LEAST = 2**20  # multiplications of a product that is worth a look
ROUNDS = 5
MARGIN = 0.95  # of the usual library's time, under which oneDNN is taken

Choices = dict[str, bool]  # by kind of product, whether oneDNN is taken


def choose_matmul_backends(module: fx.GraphModule, choices: Choices) -> None:
    """Gives oneDNN those float32 products of a graph on the CPU that it does faster.

    Kinds of products that are not in `choices` are timed now, at the current number of threads, and put there: kept
    with a run, they give the same graph, to the last bit, when it goes on.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return
    aten = torch.ops.aten
    for node in list(module.graph.nodes):
        if node.target is aten.addmm.default and not node.kwargs and len(_meta(node.args[0]).shape) == 1:
            bias, a, b = node.args
        elif node.target is aten.mm.default:
            bias, (a, b) = None, node.args
        else:
            continue
        kind = _kind(_meta(a), _meta(b), bias is not None)
        if kind is None:
            continue
        if kind not in choices:
            choices[kind] = _onednn_is_faster(_meta(a), _meta(b))
        if choices[kind]:
            with module.graph.inserting_before(node):
                turned = module.graph.call_function(aten.t.default, (b,))
                turned.meta["val"] = _meta(b).t()
                product = module.graph.call_function(_product(), (a, turned, bias))
            product.meta = dict(node.meta)
            node.replace_all_uses_with(product)
            module.graph.erase_node(node)
    module.recompile()


def _meta(node: Any) -> Tensor:
    value: Tensor = node.meta["val"]
    return value


def _kind(a: Tensor, b: Tensor, bias: bool) -> str | None:
    """What a product is, in words; None for one that is not to be looked at."""
    if a.device.type != "cpu" or a.dtype != torch.float32 or b.dtype != torch.float32:
        return None
    (m, k), n = a.shape, b.shape[1]
    if m * k * n < LEAST:
        return None
    sides = "".join("n" if t.stride(-1) == 1 else "t" for t in (a, b))
    return f"{m}x{k}x{n} {sides}{' + bias' if bias else ''}, {torch.get_num_threads()} threads"


def _onednn_is_faster(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN takes less time for a product of this kind, by medians over interleaved rounds."""
    one, other = (torch.randn(t.shape).as_strided(t.shape, _strides(t)) for t in (a, b))
    turned, product = other.t(), _product()
    runs: list[Callable[[], Tensor]] = [lambda: torch.mm(one, other), lambda: product(one, turned, None)]
    times: list[list[float]] = [[], []]
    with torch.no_grad():
        for _ in range(ROUNDS + 1):
            for run, seconds in zip(runs, times, strict=True):
                start = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - start)
    usual, onednn = (statistics.median(seconds[1:]) for seconds in times)  # the first round sets kernels up
    return onednn < MARGIN * usual


def _strides(t: Tensor) -> tuple[int, int]:
    rows, columns = t.shape
    return (columns, 1) if t.stride(-1) == 1 else (1, rows)


_library: torch.library.Library | None = None


def _product() -> Any:
    """x @ weight.T + bias by oneDNN, as an operation that graphs may hold."""
    global _library
    if _library is None:
        _library = torch.library.Library("ppvae", "FRAGMENT")
        _library.define("product(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
        run = torch.ops.mkldnn._linear_pointwise.default
        _library.impl("product", lambda x, weight, bias: run(x, weight, bias, "none", [], ""), "CPU")
        _library.impl("product", lambda x, weight, bias: x.new_empty(len(x), len(weight)), "Meta")
    return torch.ops.ppvae.product.default
