"""Blocks of data shared by the processes of a torch.distributed group: which are mine, and everyone's for everyone."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch import distributed as group

from ppvae.errors import PpvaeError


@final
class DistributedContext:
    """The share of this process in an evaluation by blocks; all of it where there is no process group.

    A block has noise of its own, so that it does not matter which process computes it.
    """

    def __init__(self) -> None:
        together = group.is_available() and group.is_initialized()
        self.rank, self.size = (group.get_rank(), group.get_world_size()) if together else (0, 1)
        self.exchanged = False

    def mine(self, count: int) -> range:
        """The numbers of the blocks, of so many, that are this process's."""
        return range(self.rank, count, self.size)

    def gathered(self, parts: Mapping[int, Mapping[str, Tensor]], key: Mapping[str, Any]) -> list[dict[str, Tensor]]:
        """The parts of all blocks in order, on every process, given {number: part} of its own.

        `key` says what the parts are a function of, and must be the same everywhere.

        Raises:
            PpvaeError: another process failed, computes something else, or does not answer.
        """
        if self.size == 1:
            return [dict(parts[number]) for number in sorted(parts)]
        arrays = {f"{n}/{name}": value.cpu().numpy() for n, part in parts.items() for name, value in part.items()}
        content = json.dumps(dict(key), sort_keys=True, default=str).encode()
        everyone = self.exchange(arrays | {"key": _characters(hashlib.sha256(content).hexdigest())})
        for rank, found in enumerate(everyone):
            if "error" in found:
                raise PpvaeError(f"process {rank} of {self.size} failed: {_text(found['error'])}")
        keys = [_text(found.pop("key")) for found in everyone]
        if other := [rank for rank, found in enumerate(keys) if found != keys[0]]:
            raise PpvaeError(
                f"process {other[0]} of {self.size} evaluates other parameters, data or settings than process 0: "
                f"expected the same call on each, on the same run"
            )
        out: dict[int, dict[str, Tensor]] = {}
        for found in everyone:
            for place, array in found.items():
                number, _, name = place.partition("/")
                out.setdefault(int(number), {})[name] = torch.from_numpy(array)
        return [out[number] for number in sorted(out)]

    def exchange(self, arrays: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        """Named arrays of every process, on every process; as tensors of bytes, and never pickled."""
        self.exchanged = True
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        place = _place()
        own = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8).to(place)
        try:
            length = torch.tensor([len(own)], device=place)
            lengths = [torch.zeros_like(length) for _ in range(self.size)]
            group.all_gather(lengths, length)
            longest = int(max(lengths))
            padded = torch.zeros(longest, dtype=torch.uint8, device=place)
            padded[: len(own)] = own
            found = [torch.zeros_like(padded) for _ in range(self.size)]
            group.all_gather(found, padded)
        except RuntimeError as error:
            raise PpvaeError(
                f"a process of the group does not answer ({' '.join(str(error).split())[:120]}): "
                f"expected the same call on all {self.size} of them"
            ) from error
        return [_arrays(t[: int(n)]) for t, n in zip(found, lengths, strict=True)]


@contextmanager
def distributed_context() -> Iterator[DistributedContext]:
    """This process's share of what follows, which ends in one `gathered`; an error of one is an error of all."""
    shares = DistributedContext()
    try:
        yield shares
    except Exception as error:
        if shares.size > 1 and not shares.exchanged:
            text = str(error) if isinstance(error, PpvaeError) else f"{type(error).__name__}: {error}"
            with suppress(PpvaeError):
                shares.exchange({"error": _characters(" ".join(text.split())[:500])})
        raise


def leave_process_group() -> bool:
    """Leaves the process group, where there is one; True for the first process, which alone goes on to write."""
    rank = DistributedContext().rank
    if group.is_available() and group.is_initialized():
        group.destroy_process_group()
    return rank == 0


def progress_disabled(progress: bool | None) -> bool | None:
    """tqdm's `disable`: None leaves the bar out where the output is not a terminal; only the first process has one."""
    if DistributedContext().rank > 0:
        return True
    return None if progress is None else not progress


def _place() -> torch.device:
    """Where tensors lie that the group can send."""
    by_host = "cpu:" in group.get_backend_config()
    return torch.device("cpu") if by_host else torch.device("cuda", torch.cuda.current_device())


def _arrays(content: Tensor) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(content.cpu().numpy().tobytes()), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _characters(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8)


def _text(characters: np.ndarray) -> str:
    return characters.tobytes().decode()
