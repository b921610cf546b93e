"""The cache of finished blocks, from which an interrupted evaluation resumes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ppvae.errors import CheckpointError, UsageError
from ppvae.storage import write_bytes, write_stream

SECONDS = 5.0  # between two files, where parts take less time than that


class BlockCache:
    """Named parts of an evaluation, each a few arrays, in `.npz` files that are written atomically.

    `key` identifies the evaluation by strings and numbers; a folder with another key is refused. Parts are buffered
    until `seconds` have passed since the last file, and then share one; `__exit__` writes those that are left, after
    an exception too. Without a folder nothing is cached. Processes may share a folder.

    Raises:
        UsageError: the folder belongs to another evaluation; the message names what differs.
        CheckpointError: a file is damaged, or cannot be written.
    """

    def __init__(self, directory: str | os.PathLike[str] | None, key: Mapping[str, Any], seconds: float = 0.0):
        self.folder = None if directory is None else Path(directory)
        self._seconds, self._last = seconds, time.monotonic()
        self._buffer: dict[str, dict[str, Tensor]] = {}
        self._files: dict[str, Path] = {}  # of each part
        self._key = json.loads(json.dumps(dict(key)))
        if self.folder is not None and self.folder.exists():
            self._check_key(self.folder / "evaluation.json")
            for path in sorted(self.folder.glob("*.npz")):
                self._files |= dict.fromkeys((name.partition("/")[0] for name in _read(path)), path)

    def _check_key(self, path: Path) -> None:
        if not path.exists():
            if any(path.parent.glob("*.npz")):
                raise CheckpointError(f"{path}: missing, so that the parts in this folder belong to nothing. Remove it")
            return
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise CheckpointError(f"{path}: not JSON ({error}). Remove the folder, or name another one") from error
        differs = [k for k in {*self._key, *found} if self._key.get(k) != found.get(k)]
        if differs:
            name = min(differs, key=lambda k: (isinstance(self._key.get(k), list), k))  # the first that is easily read
            raise UsageError(
                f"{path.parent}: holds another evaluation: {name} is {found.get(name)!r} there and "
                f"{self._key.get(name)!r} here. Name another directory, or remove this one"
            )

    def part(self, name: str, compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """A part from the cache; computed and cached where it is missing."""
        if self.folder is None:
            return dict(compute())
        if name in self._files:
            return {k: torch.from_numpy(v) for k, v in _read(self._files[name], name).items()}
        part = self._buffer[name] = dict(compute())
        if time.monotonic() - self._last >= self._seconds:
            self._write()
        return part

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._write()

    def _write(self) -> None:
        if self.folder is None or not self._buffer:
            return
        path = self.folder / f"{next(iter(self._buffer))}.npz"
        arrays = {f"{n}/{k}": v.cpu().numpy() for n, part in self._buffer.items() for k, v in part.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "evaluation.json").exists():
                content = json.dumps(self._key, indent=1).encode()
                write_bytes(self.folder / "evaluation.json", content)
            write_stream(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
        except OSError as error:
            raise CheckpointError(f"{path}: could not be written ({error.strerror})") from error
        self._files |= dict.fromkeys(self._buffer, path)
        self._buffer, self._last = {}, time.monotonic()


def _read(path: Path, part: str | None = None) -> dict[str, np.ndarray]:
    """The arrays of a part in a file; without a part, the names of all arrays, with no values."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if part is None:
                if not all("/" in name for name in file.files):
                    raise ValueError("it holds no named parts")
                return dict.fromkeys(file.files, np.empty(0))
            return {k.partition("/")[2]: file[k] for k in file.files if k.startswith(f"{part}/")}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: damaged ({error}). Remove this file: it will be made again") from error


def digest_of_params(params: Mapping[str, Tensor], modules: Sequence[torch.nn.Module] = ()) -> str:
    """The SHA-256 of parameters, and of the frozen parameters and buffers of modules, with their names.

    The counter of an object in a name is left out, so that two loads of a run have the same digest.
    """
    total = hashlib.sha256()
    found = list(params.items())
    for i, module in enumerate(modules):
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        found += [(f"{i}.{name}", value) for name, value in own]
    for name, value in found:
        total.update(f"{re.sub(r'#[0-9]+', '#', name)} {list(value.shape)} {value.dtype}".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@dataclass(frozen=True)
class BlockContext:
    """The cache of a block's parts, and the progress bar."""

    cache: BlockCache
    bar: Any

    def part(self, name: str, compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """A part from the cache, or computed and cached."""
        return self.cache.part(name, compute)

    def advance(self, steps: int = 1) -> None:
        """Moves the bar by some steps."""
        self.bar.update(steps)


def concatenate(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Named tensors [N, ...] of several parts of the data, joined by the names that all have; scalars are stacked.

    Tensors [N, T] of different T are padded with NaN, as of sequences whose longest differ.
    """
    names = [name for name in parts[0] if all(name in part for part in parts)]
    return {name: _join([torch.atleast_1d(part[name]) for part in parts]) for name in names}


def _join(tensors: Sequence[Tensor]) -> Tensor:
    if len({t.shape[1:] for t in tensors}) > 1:
        longest = max(t.shape[1] for t in tensors)
        tensors = [torch.nn.functional.pad(t, (0, longest - t.shape[1]), value=torch.nan) for t in tensors]
    return torch.cat(list(tensors))
