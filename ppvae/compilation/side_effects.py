"""Side effects of a run: random states, buffers, schedule steps and what learns beside the pair, saved and restored."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias, final

import numpy as np
import torch
from torch import Tensor, nn

from ppvae.compilation.graph import CaptureError, is_capturing

_Learned: TypeAlias = tuple[list[Tensor], dict[str, Any]]  # parameters, and the state of their optimizer
_State: TypeAlias = tuple[list[Tensor], list[Tensor], int | None, list[_Learned]]  # as of `RunState.state`

_records: list[list[tuple[torch.optim.Optimizer, Sequence[Tensor | None]]]] = []
_watchers: list[Callable[[torch.optim.Optimizer], None]] = []


def learning_step(optimizer: torch.optim.Optimizer, gradients: Sequence[Tensor | None]) -> None:
    """One step of what learns beside the pair, such as a baseline's network, by the gradients of its parameters.

    In a captured step the gradients are outputs of the graph, after which the step is taken.

    Args:
        optimizer: of those parameters alone, and of no other part that learns in the same step.
        gradients: of each of its parameters that require one, in its order.

    >>> weight = nn.Parameter(torch.ones(()))
    >>> learning_step(torch.optim.SGD([weight], lr=0.5), [torch.tensor(1.0)])
    >>> weight.item()
    0.5
    """
    for record in _records:
        record.append((optimizer, gradients))
    if not is_capturing():
        take_step(optimizer, gradients)


def take_step(optimizer: torch.optim.Optimizer, gradients: Sequence[Tensor | None]) -> None:
    """One step of an optimizer by these gradients of its parameters."""
    for watch in _watchers:
        watch(optimizer)
    for p, gradient in zip(parameters_of(optimizer), gradients, strict=True):
        p.grad = gradient
    optimizer.step()


@contextmanager
def recorded_steps() -> Iterator[list[tuple[torch.optim.Optimizer, Sequence[Tensor | None]]]]:
    """Lists the learning steps of a run: (optimizer, gradients)."""
    record: list[tuple[torch.optim.Optimizer, Sequence[Tensor | None]]] = []
    _records.append(record)
    try:
        yield record
    finally:
        _records.pop()


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters that get gradients."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def schedule_of(loss: Any) -> Any:
    """The loss, if it is an objective with schedules; None for others, as Pyro's."""
    return loss if all(hasattr(loss, name) for name in ("steps_taken", "set_step", "advance")) else None


@final
class RunState:
    """The random states, module buffers, schedule step, and learners by their optimizers, that a run changes."""

    def __init__(self, device: torch.device, loss: Any = None):
        self._device, self._loss = device, schedule_of(loss)
        self._step = self._step_count()
        self._before: list[tuple[Tensor, Tensor]] = []
        self._visited: set[int] = set()
        self._learners: list[tuple[torch.optim.Optimizer, _Learned]] = []
        self._noise = self._random()

    def _random(self) -> list[Tensor]:
        cuda = [torch.cuda.get_rng_state(self._device)] if self._device.type == "cuda" else []
        return [torch.get_rng_state(), *cuda]

    @contextmanager
    def observe(self) -> Iterator[None]:
        """Saves the buffers of each module before it is first called meanwhile, and each learner before its step.

        Raises CaptureError at the end for a run that draws from other random numbers than torch's, or in which
        something learns twice, from what it has learned.
        """
        python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
        stepped: list[torch.optim.Optimizer] = []

        def watch(optimizer: torch.optim.Optimizer) -> None:
            stepped.append(optimizer)
            if all(optimizer is not other for other, _ in self._learners):
                self._learners.append((optimizer, _state_of(optimizer)))

        _watchers.append(watch)
        try:
            with nn.modules.module.register_module_forward_pre_hook(self._save_buffers):
                yield
        finally:
            _watchers.remove(watch)
        if len({*map(id, stepped)}) < len(stepped):
            raise CaptureError("a part of its objective learns twice in a step")
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

    def state(self) -> _State:
        """The current (random states, buffers, schedule step, learners)."""
        learned = [_state_of(optimizer) for optimizer, _ in self._learners]
        return self._random(), [b.detach().clone() for b, _ in self._before], self._step_count(), learned

    def restore(self, to: _State | None = None) -> None:
        """Restores the state at construction, or one that `state` gave."""
        first = self._noise, [b for _, b in self._before], self._step, [state for _, state in self._learners]
        noise, buffers, step, learned = to if to is not None else first
        if self._loss is not None:
            self._loss.set_step(step)
        torch.set_rng_state(noise[0])
        if len(noise) > 1:
            torch.cuda.set_rng_state(noise[1], self._device)
        with torch.no_grad():
            for (buffer, _), value in zip(self._before, buffers, strict=True):
                if not torch.equal(buffer, value):  # else its version would tell the guards that it has changed
                    buffer.copy_(value)
            for (optimizer, _), (values, state) in zip(self._learners, learned, strict=True):
                for p, value in zip(parameters_of(optimizer), values, strict=True):
                    p.copy_(value)
                optimizer.load_state_dict(state)


def _state_of(optimizer: torch.optim.Optimizer) -> _Learned:
    return [p.detach().clone() for p in parameters_of(optimizer)], copy.deepcopy(optimizer.state_dict())
