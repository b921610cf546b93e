"""The base class of models composed of parts."""

from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae.errors import ContractError
from ppvae.errors.memory import memory_failure
from ppvae.nn.context import call_with_context, takes_context
from ppvae.parameter_names import unique_name


class ComposedModel(nn.Module):
    """A model/guide pair composed of parts; `call_part` registers parameters under a name unique to the object."""

    def __init__(self, name: str):
        super().__init__()
        self._name = unique_name(name)

    def call_part(self, part: str, *args: Tensor, context: Tensor | None = None) -> Any:
        """Calls a part by the name of its attribute, with the context if it declares one."""
        return self.register_part(part)(*args, context=context)

    def register_part(self, part: str) -> Callable[..., Any]:
        """Registers a part and returns its call, for distributions that call it after the run of the pair."""
        conditional = attrgetter(part)(self)
        require_module(part, conditional)
        pyro.module(f"{self._name}.{part}", conditional)
        return partial(call_conditional, conditional, "", name=f"{part}: ")


def require_module(role: str, part: Any) -> None:
    """Raises ContractError, by its role, for a part that is no module: a class, a function or a distribution."""
    if isinstance(part, nn.Module):
        return
    expected = f"{role}: expected a torch.nn.Module whose forward returns a distribution, found "
    if isinstance(part, type):
        raise ContractError(f"{expected}the class {part.__name__}; pass an object of it, as {part.__name__}()")
    kind = "the distribution " if isinstance(part, torch.distributions.Distribution) else "an object of "
    raise ContractError(f"{expected}{kind}{type(part).__name__}; return the distribution from the forward of a module")


class LearnedTensor(nn.Module):
    """A part that returns a trained tensor."""

    def __init__(self, value: Tensor):
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self) -> Tensor:
        return self.value


def call_conditional(
    part: nn.Module, what: str = "", *args: Tensor, context: Tensor | None = None, name: str = ""
) -> Any:
    """Calls a conditional. Raises ContractError, by its class and by `what` it was given, where the call fails."""
    try:
        return call_with_context(part, *args, context=context)
    except (RuntimeError, IndexError, TypeError) as error:
        if memory_failure(error):
            raise
        inputs = [f"{what} of {describe_tensor(t)}" if what else describe_tensor(t) for t in args]
        if context is not None and takes_context(part):
            inputs.append(f"a context of {describe_tensor(context)}")
        text = " ".join(str(error).split())[:200]
        part_name = f"{name}{type(part).__name__}"
        if not inputs:
            raise ContractError(f"{part_name}: expected a forward without arguments, found: {text}") from error
        raise ContractError(
            f"{part_name} does not take {' and '.join(inputs)}: {text}{_cast(part, args, text)}"
        ) from error


def _cast(part: nn.Module, inputs: Sequence[Tensor], text: str) -> str:
    """What to pass where inputs are numbers of another type than the part's parameters, by the error's text."""
    types = {p.dtype for p in part.parameters() if p.is_floating_point()}
    other = {t.dtype for t in inputs if t.is_floating_point() or "same dtype" in text} - types
    if len(types) != 1 or not other:
        return ""
    name = str(types.pop()).removeprefix("torch.")
    return f". The parameters are {name}: pass x.to(torch.{name}) (of an array or frame, .astype('{name}'))"


def as_diagonal_normal(fn: Any, part: str) -> Any:
    """The base normal of a distribution with independent normal dims. ContractError, by the part, for another."""
    base = getattr(fn, "base_dist", fn)
    if not isinstance(base, dist.Normal):
        raise ContractError(f"{part}: expected a normal with independent dims, found {type(base).__name__}")
    return base


def describe_tensor(t: Tensor) -> str:
    """The dtype and shape of a tensor, for messages."""
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"
