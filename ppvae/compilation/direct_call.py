"""The function that inductor generates from a graph, called without the wrappers around it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx


def call_without_wrappers(
    rest: fx.GraphModule, inner: Sequence[Any], inputs: Sequence[Tensor], outputs: Sequence[Any]
) -> Callable[[list[Tensor]], Any] | None:
    """The function that inductor has generated, without the wrappers of AOTAutograd; None where they do something.

    They take as long as a twentieth of a small step. They write to inputs what a graph changes in place, and make
    outputs of views of inputs anew: graphs that do neither give the same outputs without them.
    """
    function: Callable[[list[Tensor]], Any] | None = getattr(inner[0], "current_callable", None) if inner else None
    if len(inner) != 1 or function is None or any(_changes_input(node) for node in rest.graph.nodes):
        return None
    memory = set(map(_memory, inputs))
    try:
        found = function(list(inputs))
    except ValueError:  # an input that is given twice is passed on once
        return None
    if len(found) != len(outputs):
        return None
    for a, b in zip(found, outputs, strict=True):
        if a is None and b is None:
            continue
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or memory & {_memory(a), _memory(b)}:
            return None
        if (a.shape, a.stride(), a.dtype) != (b.shape, b.stride(), b.dtype):
            return None
        if not torch.equal(a.nan_to_num(), b.nan_to_num()):
            return None
    return function


def _memory(t: Tensor) -> int:
    place: int = t.untyped_storage()._cdata
    return place


def _changes_input(node: fx.Node) -> bool:
    """Whether an operation changes an input of its graph in place, or a view of one."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return False
    written = [
        node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        for i, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    pending, visited = [t for t in written if isinstance(t, fx.Node)], set()
    while pending:
        t = pending.pop()
        if t.op == "placeholder":
            return True
        schema = getattr(t.target, "_schema", None)
        if t not in visited and (schema is None or any(a.alias_info is not None for a in schema.arguments)):
            pending += t.all_input_nodes  # whose memory it may share
        visited.add(t)
    return False
