"""What one run of a side has to leave for another of the same step: random states, and buffers of networks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn


@final
class ReplayNoise(Messenger):
    """The random states before a run and after each of its sites, for a second run that draws nothing at these.

    What networks draw between sites, as dropout does, is then drawn as it was; where they draw nothing, the second run
    leaves the random state alone.
    """

    def __init__(self, batch: Sequence[Any]):
        super().__init__()
        self._devices = sorted({t.device.index for t in batch if isinstance(t, Tensor) and t.is_cuda})
        self._after: dict[str, list[Tensor]] = {}
        self._repeats = False
        self._before = self._now()

    def again(self) -> ReplayNoise:
        """Goes back to the start, for a second run under this messenger."""
        self._repeats = True
        self._go_to(self._before)
        return self

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["is_observed"]:
            return
        if self._repeats:
            self._go_to(self._after[msg["name"]])
        else:
            self._after[msg["name"]] = self._now()

    def _now(self) -> list[Tensor]:
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._devices)]

    def _go_to(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for state, device in zip(states[1:], self._devices, strict=True):
            torch.cuda.set_rng_state(state, device)


@contextmanager
def buffer_copies() -> Iterator[None]:
    """Runs networks on copies of their buffers: what batch norm and its kin gather meanwhile is forgotten.

    A step runs a side once for its densities, and that run gathers; other runs of the step go on copies.
    """
    own: dict[int, tuple[nn.Module, dict[str, Tensor | None]]] = {}

    def lend(module: nn.Module, _: Any) -> None:
        for part in module.modules() if id(module) not in own else ():
            if id(part) not in own:
                own[id(part)] = part, dict(part._buffers.items())
                for name, buffer in own[id(part)][1].items():
                    if buffer is not None:
                        part._buffers[name] = buffer.detach().clone()

    hook = nn.modules.module.register_module_forward_pre_hook(lend)
    try:
        yield
    finally:
        hook.remove()
        for part, buffers in own.values():
            for name, buffer in buffers.items():
                part._buffers[name] = buffer
