"""Evaluation mode of a pair: modules in eval mode, a forked param store, no gradient; and the modules of a pair."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import nn

from ppvae.compilation.matmul_backend import faster_linear_layers
from ppvae.compilation.process_setup import prepare_process, warn_of_busy_cores
from ppvae.inference.contract.registration import CheckRegistration
from ppvae.inference.param_store import BoundProgram, ParamScope, unwrap


@contextmanager
def fork_param_store(*functions: Callable[..., Any]) -> Iterator[None]:
    """Activates a copy of the current param store, so that parameters which the functions register are gone afterwards.

    Raises ContractError if the parameters of a bound function changed after its run.
    """
    for function in functions:
        if isinstance(function, BoundProgram):
            function.scope.check_unchanged()
    try:
        with ParamScope.of_current_store().entered():
            yield
    finally:
        for function in functions:
            if isinstance(function, BoundProgram):
                function.scope.forget_weak_references()


def reachable_objects(function: Callable[..., Any]) -> dict[str, Any]:
    """What a function closes over or names as a global, by name; the object that it is a method of, as "self"."""
    fn = unwrap(function)
    objects = {"self": getattr(fn, "__self__", fn)}
    plain = getattr(fn, "__func__", fn)
    code = getattr(plain, "__code__", None)
    if code is not None:
        for name, cell in zip(code.co_freevars, plain.__closure__ or (), strict=False):
            with suppress(ValueError):  # a cell may still be empty
                objects[name] = cell.cell_contents
        objects |= {n: plain.__globals__[n] for n in code.co_names if n in plain.__globals__}
    return objects


def reachable_modules(*functions: Callable[..., Any]) -> list[nn.Module]:
    """The modules that functions are methods of, close over or name as globals, with their submodules, each once."""
    modules: dict[int, nn.Module] = {}
    for function in functions:
        for reached in reachable_objects(function).values():
            owner = getattr(reached, "__self__", reached)
            if isinstance(owner, nn.Module):
                modules |= {id(m): m for m in owner.modules()}
    return list(modules.values())


@contextmanager
def eval_mode(*functions: Callable[..., Any]) -> Iterator[None]:
    """Puts the modules of functions, and every module called meanwhile, into eval mode; restores each afterwards.

    The hook on calls finds the modules that a plain function reaches in other ways.
    """
    changed: dict[int, nn.Module] = {}

    def to_eval(module: nn.Module) -> None:
        if module.training:
            changed[id(module)] = module
            module.training = False

    for module in reachable_modules(*functions):
        to_eval(module)
    # the compiler of networks under `torch.compile` would follow the hooks on calls into their bookkeeping
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    try:
        with nn.modules.module.register_module_forward_pre_hook(lambda module, _: to_eval(module)), eager:
            yield
    finally:
        for module in changed.values():
            module.training = True


@contextmanager
def record_modules(*functions: Callable[..., Any]) -> Iterator[list[nn.Module]]:
    """Yields a list of the functions' modules; modules called meanwhile are appended, each once and in order."""
    modules = reachable_modules(*functions)
    known = {id(m) for m in modules}

    def record(module: nn.Module, _: Any) -> None:
        if id(module) not in known:
            known.add(id(module))
            modules.append(module)

    with nn.modules.module.register_module_forward_pre_hook(record):
        yield modules


@contextmanager
def evaluation_mode(model: Callable[..., Any], guide: Callable[..., Any]) -> Iterator[None]:
    """Evaluates a pair: modules in eval mode, no gradient, a forked param store in which no parameter is created."""
    prepare_process()
    warn_of_busy_cores()
    with (
        fork_param_store(model, guide), eval_mode(model, guide), CheckRegistration(create=False), torch.no_grad(),
        faster_linear_layers(),
    ):  # fmt: skip
        yield
