"""Training by several processes, each on its part of every batch: gradients are added up, parameters stay the same."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor
from torch import distributed as group

from ppvae.errors import TrainingError, UsageError


@contextmanager
def _answering() -> Iterator[None]:
    """An exchange between processes, of which one may have ended."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())[:120]
        raise TrainingError(f"another process does not answer ({text}); the last checkpoint is kept") from error


@final
class DataParallel:
    """The processes of a `torch.distributed` group that train together (by `torchrun`, say); one where there is none.

    Each takes every `size`-th row of a batch, so that the order of the data is that of one process, and draws noise of
    its own. Loss and gradients are added up over the processes before the step (Li et al. 2020, arXiv 2006.15704), and
    the sums are the same everywhere, to the last bit.
    """

    def __init__(self) -> None:
        together = group.is_available() and group.is_initialized()
        self.rank, self.size = (group.get_rank(), group.get_world_size()) if together else (0, 1)

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    @property
    def key(self) -> tuple[int, ...]:
        """What sets this process's noise apart; nothing for the first, whose noise is that of one process."""
        return (self.rank,) if self.rank else ()

    def part(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """This process's rows of a batch; none, where the batch has fewer rows than there are processes."""
        return batch if self.size == 1 else tuple(t[self.rank :: self.size] for t in batch)

    def start_from_the_first(self, tensors: Sequence[Tensor]) -> None:
        """Gives every process the first one's values, in place."""
        if self.size > 1:
            with torch.no_grad(), _answering():
                for t in tensors:
                    held = t.detach().contiguous()
                    group.broadcast(held, 0)
                    t.copy_(held)

    def of_the_first(self, state: dict[str, Any]) -> dict[str, Any]:
        """The first process's dict of tensors and plain values, everywhere."""
        if self.size == 1:
            return state
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
        length = torch.tensor([len(content)])
        with _answering():
            group.broadcast(length, 0)
            content = content if self.first else torch.zeros(int(length), dtype=torch.uint8)
            group.broadcast(content, 0)
        found: dict[str, Any] = torch.load(io.BytesIO(content.numpy().tobytes()), weights_only=True)
        return found

    def added(self, numbers: Sequence[float], params: Sequence[Tensor], failed: bool) -> list[float]:
        """Sums over the processes of some numbers and, in place, of the gradients of parameters.

        A parameter that has a gradient in one process gets one in all.

        Raises:
            TrainingError: another process failed; this one, too, then leaves its parameters as they are.
        """
        if self.size == 1:
            return list(numbers)
        place = params[0].device if params else torch.device("cpu")
        has = [float(p.grad is not None) for p in params]
        told = torch.tensor([float(failed), *numbers, *has], dtype=torch.float64, device=place)
        with _answering():
            group.all_reduce(told)
        failures, *sums = told.tolist()
        if failures and not failed:
            raise TrainingError(f"another of the {self.size} processes failed: its message says why")
        if failures:
            return sums[: len(numbers)]
        shared = [p for p, count in zip(params, sums[len(numbers) :], strict=True) if count]
        for p in shared:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        for dtype in dict.fromkeys(p.dtype for p in shared):
            grads = [p.grad for p in shared if p.dtype == dtype and p.grad is not None]
            flat = torch.cat([g.reshape(-1) for g in grads])  # one message for all of them
            with _answering():
                group.all_reduce(flat)
            for g, total in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                g.copy_(total.view_as(g))
        return sums[: len(numbers)]

    def check_same(self, tensors: Sequence[Tensor]) -> None:
        """Makes sure that all processes have the same values, to the last bit.

        Raises:
            TrainingError: they do not.
        """
        if self.size == 1:
            return
        digest = hashlib.sha256()
        for t in tensors:
            digest.update(t.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        place = tensors[0].device if tensors else torch.device("cpu")
        own = torch.tensor(list(digest.digest()), dtype=torch.uint8, device=place)
        if other := self._unlike(own):
            raise TrainingError(
                f"process {other[0]} of {self.size} has other parameters than process 0: expected the same pair, data "
                f"and settings on every one"
            )

    def check_called_alike(self, words: str, place: torch.device) -> None:
        """Makes sure that all processes were given the same data and settings, by what these are in words.

        Raises:
            UsageError: they were not.
        """
        if self.size == 1:
            return
        own = torch.tensor(list(hashlib.sha256(words.encode()).digest()), dtype=torch.uint8, device=place)
        if other := self._unlike(own):
            raise UsageError(
                f"process {other[0]} of {self.size} was called with other data or settings than process 0: expected "
                f"the same call on every one"
            )

    def _unlike(self, own: Tensor) -> list[int]:
        """The processes whose tensor is not the first one's."""
        found = [torch.zeros_like(own) for _ in range(self.size)]
        with _answering():
            group.all_gather(found, own)
        return [rank for rank, one in enumerate(found) if not torch.equal(one, found[0])]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            with _answering():
                group.barrier()
