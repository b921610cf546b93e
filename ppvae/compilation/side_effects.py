"""What a run of a pair changes besides what it returns, kept and put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from ppvae.compilation.graph import CaptureError


def following_steps(loss: Any) -> Any:
    """The loss, if it is an objective with schedules, which know the steps taken; Pyro's own have none."""
    return loss if all(hasattr(loss, name) for name in ("steps_taken", "set_step", "advance")) else None


@final
class SideEffects:
    """What a run of a pair changes besides what it returns: random states, buffers of modules, steps of schedules."""

    def __init__(self, device: torch.device, loss: Any = None):
        self._device, self._loss = device, following_steps(loss)
        self._step = self._taken()
        self._before: list[tuple[Tensor, Tensor]] = []
        self._met: set[int] = set()
        self._noise = self._random()

    def _random(self) -> list[Tensor]:
        cuda = [torch.cuda.get_rng_state(self._device)] if self._device.type == "cuda" else []
        return [torch.get_rng_state(), *cuda]

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Keeps the buffers of each module that is called meanwhile, as they are before the call."""
        hook = nn.modules.module.register_module_forward_pre_hook(self._keep)
        python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
        try:
            yield
        finally:
            hook.remove()
        same = all(np.array_equal(a, b) for a, b in zip(numpy, np.random.get_state(), strict=True))  # noqa: NPY002
        if random.getstate() != python or not same:
            raise CaptureError("it draws from Python's or numpy's random numbers")

    def _keep(self, module: nn.Module, _: Any) -> None:
        for part in module.modules() if id(module) not in self._met else ():
            if id(part) not in self._met:  # met before: what stands there now may be a copy for a run besides
                self._met.add(id(part))
                new = [b for b in part.buffers(recurse=False) if all(b is not kept for kept, _ in self._before)]
                self._before += [(b, b.detach().clone()) for b in new]

    def _taken(self) -> int | None:
        return None if self._loss is None else self._loss.steps_taken

    def now(self) -> tuple[list[Tensor], list[Tensor], int | None]:
        """(random states, buffers, steps taken) as they are."""
        return self._random(), [b.detach().clone() for b, _ in self._before], self._taken()

    def restore(self, to: tuple[list[Tensor], list[Tensor], int | None] | None = None) -> None:
        """Puts back what was there before, or what `now` gave."""
        noise, buffers, step = to if to is not None else (self._noise, [b for _, b in self._before], self._step)
        if self._loss is not None:
            self._loss.set_step(step)
        torch.set_rng_state(noise[0])
        if len(noise) > 1:
            torch.cuda.set_rng_state(noise[1], self._device)
        with torch.no_grad():
            for (buffer, _), kept in zip(self._before, buffers, strict=True):
                buffer.copy_(kept)
