"""Side effects of a run: random states, buffers and schedule steps, saved and restored."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from ppvae.compilation.graph import CaptureError


def schedule_of(loss: Any) -> Any:
    """The loss, if it is an objective with schedules; None for others, as Pyro's."""
    return loss if all(hasattr(loss, name) for name in ("steps_taken", "set_step", "advance")) else None


@final
class RunState:
    """The random states, module buffers and schedule step that a run changes."""

    def __init__(self, device: torch.device, loss: Any = None):
        self._device, self._loss = device, schedule_of(loss)
        self._step = self._step_count()
        self._before: list[tuple[Tensor, Tensor]] = []
        self._visited: set[int] = set()
        self._noise = self._random()

    def _random(self) -> list[Tensor]:
        cuda = [torch.cuda.get_rng_state(self._device)] if self._device.type == "cuda" else []
        return [torch.get_rng_state(), *cuda]

    @contextmanager
    def observe(self) -> Iterator[None]:
        """Saves the buffers of each module before it is first called meanwhile.

        Raises CaptureError at the end for a run that draws from other random numbers than torch's.
        """
        python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
        with nn.modules.module.register_module_forward_pre_hook(self._save_buffers):
            yield
        same = all(np.array_equal(a, b) for a, b in zip(numpy, np.random.get_state(), strict=True))  # noqa: NPY002
        if random.getstate() != python or not same:
            raise CaptureError("it draws from Python's or numpy's random numbers")

    def _save_buffers(self, module: nn.Module, _: Any) -> None:
        for part in module.modules() if id(module) not in self._visited else ():
            if id(part) not in self._visited:  # later, its buffers may be the copies of `buffer_copies`
                self._visited.add(id(part))
                new = [b for b in part.buffers(recurse=False) if all(b is not other for other, _ in self._before)]
                self._before += [(b, b.detach().clone()) for b in new]

    def _step_count(self) -> int | None:
        return None if self._loss is None else self._loss.steps_taken

    def state(self) -> tuple[list[Tensor], list[Tensor], int | None]:
        """The current (random states, buffers, schedule step)."""
        return self._random(), [b.detach().clone() for b, _ in self._before], self._step_count()

    def restore(self, to: tuple[list[Tensor], list[Tensor], int | None] | None = None) -> None:
        """Restores the state at construction, or one that `state` gave."""
        noise, buffers, step = to if to is not None else (self._noise, [b for _, b in self._before], self._step)
        if self._loss is not None:
            self._loss.set_step(step)
        torch.set_rng_state(noise[0])
        if len(noise) > 1:
            torch.cuda.set_rng_state(noise[1], self._device)
        with torch.no_grad():
            for (buffer, _), value in zip(self._before, buffers, strict=True):
                if not torch.equal(buffer, value):  # else its version would tell the guards that it has changed
                    buffer.copy_(value)
