"""The base class of models composed of parts."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
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
        conditional = self.get_submodule(part)
        pyro.module(f"{self._name}.{part}", conditional)
        return partial(call_conditional, conditional, "", name=f"{part}: ")


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
        what = " and ".join(inputs) or "nothing"
        text = " ".join(str(error).split())[:200]
        raise ContractError(f"{name}{type(part).__name__} does not take {what}: {text}") from error


def as_diagonal_normal(fn: Any, part: str) -> Any:
    """The base normal of a distribution with independent normal dims. ContractError, by the part, for another."""
    base = getattr(fn, "base_dist", fn)
    if not isinstance(base, dist.Normal):
        raise ContractError(f"{part}: expected a normal with independent dims, found {type(base).__name__}")
    return base


def describe_tensor(t: Tensor) -> str:
    """The dtype and shape of a tensor, for messages."""
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"
