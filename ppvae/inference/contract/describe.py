"""The modules of a pair in words: what each is, where the distribution that it returns lives, how much it learns."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ppvae.inference.contract.support import support_name
from ppvae.inference.evaluation_mode import eval_mode
from ppvae.inference.param_store import unwrap
from ppvae.inference.structure import Structure
from ppvae.inference.tracing import Program, trace_pair
from ppvae.rng import fork_rng


def describe_modules(
    model: Program, guide: Program, batch: tuple[Any, ...], params: Mapping[str, Tensor]
) -> Iterator[str]:
    """A line for each module that the pair calls and that is in no other: a `VAE`'s parts, a plain pair's networks."""
    parts = _parts(model, guide)
    met = _called(model, guide, batch)
    inner = {id(m) for module, _ in met for m in module.modules() if m is not module} - {id(m) for m in parts}
    order = {id(m): i for i, m in enumerate(parts)}
    for module, result in sorted(met, key=lambda found: order.get(id(found[0]), len(order))):
        if id(module) in inner:
            continue
        facts = [f"{sum(p.numel() for p in module.parameters())} parameters"]
        if isinstance(result, torch.distributions.Distribution):
            facts.insert(0, f"a distribution over event {list(result.event_shape)}{_where(result)}")
        cls = type(module)
        yield f"{parts.get(module) or _registered(module, params)}: {cls.__name__}, {', '.join(facts)}{_sentence(cls)}"


def _called(model: Program, guide: Program, batch: tuple[Any, ...]) -> list[tuple[nn.Module, Any]]:
    found: dict[int, tuple[nn.Module, Any]] = {}
    inside: list[nn.Module] = []

    def before(module: nn.Module, _: Any) -> None:
        inside.append(module)

    def after(module: nn.Module, _: Any, result: Any) -> None:
        inside.pop()
        if not inside:
            found.setdefault(id(module), (module, result))

    hooks = [
        nn.modules.module.register_module_forward_pre_hook(before),
        nn.modules.module.register_module_forward_hook(after),
    ]
    try:
        with fork_rng(), torch.no_grad(), eval_mode(model, guide), pyro.validation_enabled(False):
            trace_pair(model, guide, batch, Structure(), {})
    finally:
        for hook in hooks:
            hook.remove()
    return list(found.values())


def _where(fn: Any) -> str:
    try:
        support = fn.support
    except (NotImplementedError, AttributeError):
        return ""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return f" in {support_name(support).removesuffix('()')}"


def _parts(model: Program, guide: Program) -> dict[nn.Module, str]:
    """The modules that the modules whose methods the pair is are made of, and their names."""
    owners = [getattr(unwrap(function), "__self__", None) for function in (model, guide)]
    return {m: name for owner in owners if isinstance(owner, nn.Module) for name, m in owner.named_children()}


def _registered(module: nn.Module, params: Mapping[str, Tensor]) -> str:
    """The name under which a module, or one that it is a part of, is registered; "module" where none of it is."""
    own = {id(p): name for name, p in module.named_parameters()}
    for full, p in params.items():
        if id(p) in own and "$$$" in full:
            name = full.removesuffix(own[id(p)]).replace("$$$", ".").strip(".")
            return re.sub(r"#[0-9]+", "", name)
    return "module"


def _sentence(cls: type) -> str:
    """The first sentence of the class's own docstring."""
    text = " ".join((cls.__dict__.get("__doc__") or "").split())
    return f". {re.split(r'(?<=[^. ][.]) ', text)[0]}" if text else ""
