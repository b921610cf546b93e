"""Guards: what makes a captured graph stale is reported by its name, whatever holds it, and nothing else is."""

import types
from collections import deque

import pytest
import torch

from ppvae.compilation.guards import Guards


def held(**attributes):
    thing = types.SimpleNamespace(**attributes)
    return thing, Guards(model=thing)


CHANGES = {
    "an empty list": (lambda: {"a": []}, lambda t: t.a.append(1), "model.a"),
    "an empty set": (lambda: {"a": set()}, lambda t: t.a.add(1), "model.a"),
    "an empty deque": (lambda: {"a": deque()}, lambda t: t.a.append(1), "model.a"),
    "an empty dict": (lambda: {"a": {}}, lambda t: t.a.update(b=1), "model.a"),
    "a list in a tuple": (lambda: {"a": (1, [2])}, lambda t: t.a[1].append(3), "model.a"),
    "an empty list in a tuple": (lambda: {"a": (1, [])}, lambda t: t.a[1].append(3), "model.a"),
    "another tuple": (lambda: {"a": (1, 2)}, lambda t: setattr(t, "a", (1, 3)), "model.a"),
    "a number": (lambda: {"a": 1}, lambda t: setattr(t, "a", 2), "model.a"),
    "a new attribute": (lambda: {"a": 1}, lambda t: setattr(t, "b", 2), "model"),
    "a hook": (
        lambda: {"net": torch.nn.Linear(2, 2)},
        lambda t: t.net.register_forward_hook(lambda *_: None),
        "model.net._forward_hooks",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_named(change):
    make, apply, name = CHANGES[change]
    thing, guards = held(**make())
    assert guards.changed() == ""
    apply(thing)
    assert guards.changed() == name


def test_an_equal_tuple_is_no_change():
    thing, guards = held(a=(1, (2, "x")), b=[])
    thing.a = (1, (2, "".join(["x"])))
    assert guards.changed() == ""
