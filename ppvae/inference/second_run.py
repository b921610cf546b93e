"""Further runs: in the same, constant or detached noise, on other rows, with constant buffers, not validated."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import SubsampleMessenger
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ppvae.compilation.bernoulli import bernoulli_log_prob


@final
class RestoreRandomStates(Messenger):
    """Records the random states of a run before it and after each sample site, and restores them in a second run.

    The second run substitutes the values of its sites and so draws nothing there; networks that draw noise between
    sites, as dropout does, draw the same noise again.
    """

    def __init__(self, batch: Sequence[Any]):
        super().__init__()
        self._devices = sorted({t.device.index for t in batch if isinstance(t, Tensor) and t.is_cuda})
        self._site_states: dict[str, list[Tensor]] = {}
        self._replaying = False
        self._initial_states = self._get_states()

    def rewind(self) -> RestoreRandomStates:
        self._replaying = True
        self._set_states(self._initial_states)
        return self

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["is_observed"]:
            return
        if self._replaying:
            self._set_states(self._site_states[msg["name"]])
        else:
            self._site_states[msg["name"]] = self._get_states()

    def _get_states(self) -> list[Tensor]:
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._devices)]

    def _set_states(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for state, device in zip(states[1:], self._devices, strict=True):
            torch.cuda.set_rng_state(state, device)


_DRAWS = {
    *("rand", "rand_like", "uniform_", "randn", "randn_like", "normal", "normal_", "exponential_", "cauchy_"),
    *("log_normal_", "geometric_", "randint", "randint_like", "random_", "randperm", "bernoulli", "bernoulli_"),
    *("multinomial", "poisson"),
}  # functions of torch that draw random numbers


@final
class DetachDraws(Messenger):
    """Draws some sites without a gradient; values that are given keep theirs."""

    def __init__(self, names: Sequence[str]):
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names and not msg["done"] and msg["value"] is None:
            msg["value"], msg["done"] = msg["fn"](*msg["args"], **msg["kwargs"]).detach(), True


class ConstantNoise(TorchFunctionMode):
    """Replaces random numbers by constants, so that densities are functions of the values of sites alone.

    Every draw of real numbers is 1/2, of integers 0; Bernoulli draws are 1.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _DRAWS and isinstance(out, Tensor):
            out.fill_(1 if "bernoulli" in name else 0.5 if out.is_floating_point() else 0)
        return out


class _AnySize(int):
    """A subsample_size that any number of given rows agrees with."""

    def __ne__(self, other: object) -> bool:
        return False

    __eq__, __hash__ = int.__eq__, int.__hash__


@contextmanager
def any_number_of_rows(chosen: Callable[[str], bool]) -> Iterator[None]:
    """Lets plates, chosen by name, take as many rows as they are given, whatever their subsample_size."""
    subsample = SubsampleMessenger._subsample

    def resized(name: str, size: Any = None, subsample_size: Any = None, *args: Any) -> Any:
        if subsample_size is None or not chosen(name):
            return subsample(name, size, subsample_size, *args)
        full_size, _, rows = subsample(name, size, _AnySize(subsample_size), *args)
        return full_size, len(rows), rows

    SubsampleMessenger._subsample = staticmethod(resized)
    try:
        yield
    finally:
        SubsampleMessenger._subsample = staticmethod(subsample)


@contextmanager
def buffer_copies() -> Iterator[None]:
    """Runs modules on copies of their buffers, so that the running statistics of batch norm are not updated.

    Only one run of each module in a step, the one for its densities, updates its buffers.
    """
    originals: dict[int, tuple[nn.Module, dict[str, Tensor | None]]] = {}

    def copy_buffers(module: nn.Module, _: Any) -> None:
        for part in module.modules() if id(module) not in originals else ():
            if id(part) not in originals:
                originals[id(part)] = part, dict(part._buffers.items())
                for name, buffer in originals[id(part)][1].items():
                    if buffer is not None:
                        part._buffers[name] = buffer.detach().clone()

    try:
        with nn.modules.module.register_module_forward_pre_hook(copy_buffers):
            yield
    finally:
        for part, buffers in originals.values():
            for name, buffer in buffers.items():
                part._buffers[name] = buffer


def masked_log_prob(fn: Any, value: Tensor, node: Mapping[str, Any]) -> Tensor:
    """fn.log_prob(value) of a site; a value that a mask leaves out of its density, such as padding, may be any number.

    Torch validates such values too; those that no mask leaves out are for `check_support` to validate.
    """
    if not node["args"] and (of_bits := bernoulli_log_prob(fn, value)) is not None:
        return of_bits
    try:
        return fn.log_prob(value, *node["args"], **node["kwargs"])
    except ValueError as error:
        if not node["is_observed"] or "within the support" not in str(error) or not _is_masked(fn, node["mask"]):
            raise
    with _without_validation(fn):
        return fn.log_prob(value, *node["args"], **node["kwargs"])


def _is_masked(fn: Any, mask: Any) -> bool:
    """Whether a site has a mask, or its distribution one of its own."""
    while fn is not None and mask is None:
        mask, fn = getattr(fn, "_mask", None), getattr(fn, "base_dist", None)
    return mask is not None


@contextmanager
def _without_validation(fn: Any) -> Iterator[None]:
    """Switches off the validation of values by a distribution and those that it is made of."""
    found, pending = [], [fn]
    while pending:
        part = pending.pop()
        if isinstance(part, list | tuple):
            pending += part
        elif isinstance(part, torch.distributions.Distribution):
            found.append((part, part._validate_args))
            pending += vars(part).values()
    try:
        for part, _ in found:
            part._validate_args = False
        yield
    finally:
        for part, validate in found:
            part._validate_args = validate


@contextmanager
def frozen_params(params: Iterable[Tensor]) -> Iterator[None]:
    """Holds parameters constant for the duration: gradients pass through values, and none reaches a parameter."""
    trainable = [p for p in params if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        with warnings.catch_warnings():  # pyro.module warns of every parameter that takes no gradient
            warnings.filterwarnings("ignore", message=".*was not registered in the param store.*")
            yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
