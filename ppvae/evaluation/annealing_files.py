"""Finished parts of a long evaluation, kept in a folder so that it can go on after an interruption."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppvae.errors import CheckpointError, UsageError


class Finished:
    """Named parts, each a few arrays in a file of its own (`.npz`: numbers only), written whole or not at all.

    `key` says what the parts belong to, as strings and numbers; a folder that was filled under another key is refused.
    Without a folder nothing is kept.

    Raises:
        UsageError: the folder belongs to another evaluation; the message names what differs.
        CheckpointError: a file is damaged, or cannot be written.
    """

    def __init__(self, directory: str | os.PathLike[str] | None, key: Mapping[str, Any]):
        self.folder = None if directory is None else Path(directory)
        if self.folder is None:
            return
        path = self.folder / "annealing.json"
        wanted = json.loads(json.dumps(dict(key)))
        if path.exists():
            try:
                found = json.loads(path.read_text())
            except ValueError as error:
                raise CheckpointError(f"{path}: not JSON ({error}). Remove the folder, or name another one") from error
            differs = [k for k in {*wanted, *found} if wanted.get(k) != found.get(k)]
            if differs:
                name = min(differs, key=lambda k: (isinstance(wanted.get(k), list), k))  # the first that is easily read
                raise UsageError(
                    f"{self.folder}: holds another evaluation: {name} is {found.get(name)!r} there and "
                    f"{wanted.get(name)!r} here. Name another directory, or remove this one"
                )
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(path, lambda file: file.write(json.dumps(wanted, indent=1).encode()))
        except OSError as error:
            raise CheckpointError(f"{self.folder}: could not be written ({error.strerror})") from error

    def part(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> tuple[dict[str, Tensor], bool]:
        """(the part, whether it was there already); it is made and kept where it was not."""
        if self.folder is None:
            return dict(make()), False
        path = self.folder / f"{name}.npz"
        if path.exists():
            try:
                with np.load(path, allow_pickle=False) as arrays:
                    return {k: torch.from_numpy(arrays[k]) for k in arrays.files}, True
            except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
                raise CheckpointError(f"{path}: damaged ({error}). Remove this file: it will be made again") from error
        made = dict(make())
        arrays = {k: v.cpu().numpy() for k, v in made.items()}
        try:
            _write(path, lambda file: np.savez(file, **arrays))
        except OSError as error:
            raise CheckpointError(f"{path}: could not be written ({error.strerror})") from error
        return made, False


def _write(path: Path, write: Callable[[Any], Any]) -> None:
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def digest_of_params(params: Mapping[str, Tensor], modules: Sequence[torch.nn.Module] = ()) -> str:
    """The SHA-256 of parameters, and of all that modules hold: what is frozen, and buffers; with their names.

    Two loadings of a run, in one process or in two, have the same: the number of an object in a name does not count.
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
