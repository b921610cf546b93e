"""Discrete draws of a graph as deterministic functions of noise without parameters, so that inductor compiles them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def with_fixed_noise(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph with Bernoulli and single categorical draws on the CPU rewritten, with the same values to the bit.

    bernoulli(p) is u < p for uniform u; one draw of multinomial(p) is argmax(p / e) for exponential e. This is how
    torch computes them, from the same random numbers; a GPU draws others. Multinomial draws of many classes at once
    stay.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in list(graph.nodes):
        if node.target not in _REWRITES or node.kwargs or not _is_cpu_float(node.args[0].meta.get("val")):
            continue
        with graph.inserting_before(node):
            new = _REWRITES[node.target](graph, *node.args)
        if new is not None:
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
    return fx.GraphModule({}, graph)


def _is_cpu_float(p: Tensor | None) -> bool:
    return p is not None and p.device.type == "cpu" and p.dtype in (torch.float32, torch.float64)


def _bernoulli(graph: fx.Graph, p: fx.Node) -> fx.Node:
    value = p.meta["val"]
    uniform = graph.call_function(aten.rand.default, (list(value.shape),), {"dtype": value.dtype, "device": "cpu"})
    under = graph.call_function(aten.lt.Tensor, (uniform, p))
    bits = graph.call_function(aten._to_copy.default, (under,), {"dtype": value.dtype})
    return graph.call_function(aten.clone.default, (bits,), {"memory_format": torch.contiguous_format})


def _multinomial(graph: fx.Graph, p: fx.Node, count: int, replacement: bool = False) -> fx.Node | None:
    if count != 1:
        return None
    value = p.meta["val"]
    like = torch.empty_like(torch.empty_strided(value.shape, value.stride(), device="meta"))
    place = (list(like.shape), list(like.stride()))
    empty = graph.call_function(aten.empty_strided.default, place, {"dtype": value.dtype, "device": "cpu"})
    race = graph.call_function(aten.div.Tensor, (p, graph.call_function(aten.exponential_.default, (empty,))))
    return graph.call_function(aten.argmax.default, (race, -1, True))


_REWRITES: dict[Any, Callable[..., fx.Node | None]] = {
    aten.bernoulli.default: _bernoulli,
    aten.multinomial.default: _multinomial,
}
