"""Everything that holds while a pair is evaluated: its modules' mode, its parameters, no gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn

from ppvae.compilation.runtime import prepare_process
from ppvae.inference.contract.registration import Registration
from ppvae.inference.param_store import BoundProgram, ParamScope, unwrap


@contextmanager
def fork_param_store(*functions: Callable[..., Any]) -> Iterator[None]:
    """A copy of the surrounding param store, so that what the bare functions register in it is gone afterwards."""
    for function in functions:
        if isinstance(function, BoundProgram):
            function.scope.check_seal()
    with ParamScope.current().entered():
        yield


def reachable_modules(*functions: Callable[..., Any]) -> list[nn.Module]:
    """The modules that functions own, close over or name globally, with those inside them, each once."""
    found: dict[int, nn.Module] = {}
    for function in functions:
        fn = unwrap(function)
        things = [fn, getattr(fn, "__self__", None)]
        code = getattr(getattr(fn, "__func__", fn), "__code__", None)
        if code is not None:
            plain = getattr(fn, "__func__", fn)
            for cell in plain.__closure__ or ():
                with suppress(ValueError):  # a cell may still be empty
                    things.append(cell.cell_contents)
            things += [plain.__globals__[n] for n in code.co_names if n in plain.__globals__]
        for thing in things:
            owner = getattr(thing, "__self__", thing)
            if isinstance(owner, nn.Module):
                found |= {id(m): m for m in owner.modules()}
    return list(found.values())


@contextmanager
def eval_mode(*functions: Callable[..., Any]) -> Iterator[None]:
    """Puts every module that is called meanwhile into evaluation mode, and restores each afterwards.

    A pair of plain functions does not say which modules it uses, so each is met when it is called.
    """
    changed: dict[int, nn.Module] = {}

    def quiet(module: nn.Module) -> None:
        if module.training:
            changed[id(module)] = module
            module.training = False

    for module in reachable_modules(*functions):
        quiet(module)
    hook = nn.modules.module.register_module_forward_pre_hook(lambda module, _: quiet(module))
    try:
        yield
    finally:
        hook.remove()
        for module in changed.values():
            module.training = True


@contextmanager
def record_modules(*functions: Callable[..., Any]) -> Iterator[list[nn.Module]]:
    """Collects the modules that are called meanwhile, after those that own the functions, each once and in order."""
    modules = reachable_modules(*functions)
    found = {id(m): m for m in modules}

    def note(module: nn.Module, _: Any) -> None:
        if id(module) not in found:
            found[id(module)] = module
            modules.append(module)

    hook = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield modules
    finally:
        hook.remove()


@contextmanager
def evaluation_mode(model: Callable[..., Any], guide: Callable[..., Any]) -> Iterator[None]:
    """Everything that holds while a pair is evaluated: modules in evaluation mode, no gradient, no new parameter."""
    prepare_process()
    with ExitStack() as stack:
        stack.enter_context(fork_param_store(model, guide))
        stack.enter_context(eval_mode(model, guide))
        stack.enter_context(Registration(create=False))
        stack.enter_context(torch.no_grad())
        yield
