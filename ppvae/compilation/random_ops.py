"""Discrete draws of a graph as fixed noise and a function of it, so that they can be compiled with the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def with_fixed_noise(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph, its draws from bits and classes on the CPU rewritten, to the last bit and in the same noise.

    bernoulli(p) is u < p for uniform u; one class of probabilities p is argmax(p / e) for exponential e, a race. This
    is what torch itself does, from the same stream of random numbers; a GPU's streams are others. Draws of many
    classes at once stay as they are.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in list(graph.nodes):
        if node.target not in _REWRITTEN or node.kwargs or not _plain(node.args[0].meta.get("val")):
            continue
        with graph.inserting_before(node):
            new = _REWRITTEN[node.target](graph, *node.args)
        if new is not None:
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
    return fx.GraphModule({}, graph)


def _plain(p: Tensor | None) -> bool:
    return p is not None and p.device.type == "cpu" and p.dtype in (torch.float32, torch.float64)


def _bits(graph: fx.Graph, p: fx.Node) -> fx.Node:
    value = p.meta["val"]
    uniform = graph.call_function(aten.rand.default, (list(value.shape),), {"dtype": value.dtype, "device": "cpu"})
    under = graph.call_function(aten.lt.Tensor, (uniform, p))
    bits = graph.call_function(aten._to_copy.default, (under,), {"dtype": value.dtype})
    return graph.call_function(aten.clone.default, (bits,), {"memory_format": torch.contiguous_format})


def _class(graph: fx.Graph, p: fx.Node, count: int, replacement: bool = False) -> fx.Node | None:
    if count != 1:
        return None
    value = p.meta["val"]
    like = torch.empty_like(torch.empty_strided(value.shape, value.stride(), device="meta"))
    place = (list(like.shape), list(like.stride()))
    empty = graph.call_function(aten.empty_strided.default, place, {"dtype": value.dtype, "device": "cpu"})
    race = graph.call_function(aten.div.Tensor, (p, graph.call_function(aten.exponential_.default, (empty,))))
    return graph.call_function(aten.argmax.default, (race, -1, True))


_REWRITTEN: dict[Any, Callable[..., fx.Node | None]] = {aten.bernoulli.default: _bits, aten.multinomial.default: _class}
