"""Checkpoints that survive a kill: a file named by its SHA-256, and a pointer to it that is renamed last."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppvae.errors import CheckpointError
from ppvae.inference.param_store import ParamScope
from ppvae.parameter_names import canonical_names
from ppvae.storage import write_bytes

POINTER = "last"


KEYS = {"state", "epoch", "step", "history", "best", "finished", "stopped", "optimizer", "scheduler", "settings"}


def save(folder: Path, state: dict[str, Any]) -> Path:
    """Saves tensors and plain Python values; the checkpoint before it is removed only once this one is in place."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    name = hashlib.sha256(content).hexdigest() + ".pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: could not be made ({error.strerror})") from error
    path = folder / name
    write_bytes(path, content)
    write_bytes(folder / POINTER, name.encode())
    for old in (*folder.glob("*.pt"), *folder.glob("*.tmp")):
        if old.name != name:
            old.unlink(missing_ok=True)
    return path


def check(state: dict[str, Any]) -> None:
    """Raises CheckpointError for a state that could not be read back without running code from the file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    _unpacked(buffer.getvalue(), Path("state"))


def exists(folder: Path) -> bool:
    """Whether a checkpoint was ever completed here."""
    return (folder / POINTER).exists()


def read(folder: Path) -> dict[str, Any]:
    """Reads the last checkpoint, having checked every byte of it; never runs code from the file.

    Raises:
        CheckpointError: there is none, it is damaged, or it holds more than tensors and plain values.
    """
    try:
        name = (folder / POINTER).read_text(errors="replace").strip()
    except OSError as error:
        raise CheckpointError(f"{folder}: holds no checkpoint ({error.strerror})") from error
    digest = name.removesuffix(".pt")
    if len(digest) != 64 or not all(c in "0123456789abcdef" for c in digest):
        raise CheckpointError(f"{folder / POINTER}: expected a checkpoint's name, found {name[:40]!r}")
    path = folder / name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: the checkpoint cannot be read ({error.strerror})") from error
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        raise CheckpointError(
            f"{path}: the checkpoint is damaged: expected SHA-256 {digest[:12]}..., found {found[:12]}... "
            f"({len(content)} bytes). Restore the file from a copy, or train again"
        )
    state = _unpacked(content, path)
    missing = sorted(KEYS - state.keys()) if isinstance(state, dict) else sorted(KEYS)
    if missing:
        raise CheckpointError(f"{path}: not the checkpoint of a run: it has no {missing[0]!r}")
    return state


def _unpacked(content: bytes, path: Path) -> Any:
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        text = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path}: not a checkpoint of tensors and plain values ({text})") from error


class PairState:
    """Parameters (unconstrained) and buffers of a pair: read out, put back, compared by name and shape."""

    def __init__(self, scope: ParamScope, modules: list[nn.Module]):
        self.scope, self.modules = scope, modules

    def params(self) -> dict[str, Tensor]:
        """Unconstrained parameters by canonical name, in order of first use."""
        names = canonical_names(self.scope.params)
        return {names[name]: p for name, p in self.scope.params.items()}

    def renamed(self, state: Mapping[str, Any], back: bool = False) -> dict[str, Any]:
        """An optimizer's state by parameter, with canonical names; `back` gives this process's names."""
        names = canonical_names(self.scope.params)
        if back:
            names = {new: old for old, new in names.items()}
        return {names.get(name, name): value for name, value in state.items()}

    def buffers(self) -> dict[str, Tensor]:
        """Persistent buffers (batch norm's running statistics, ...), named by the order in which modules are called."""
        return {
            f"{i}.{type(module).__name__}.{name}": buffer
            for i, module in enumerate(self.modules)
            for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
        }

    def copy(self) -> dict[str, dict[str, Tensor]]:
        """A copy of everything, on the CPU."""
        return {
            "params": {k: v.detach().cpu().clone() for k, v in self.params().items()},
            "buffers": {k: v.detach().cpu().clone() for k, v in self.buffers().items()},
        }

    def put(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Puts saved values back in place.

        Raises:
            CheckpointError: names or shapes differ; the message names the first that does.
        """
        for kind, current in (("params", self.params()), ("buffers", self.buffers())):
            _check(kind.removesuffix("s"), current, saved[kind])
            with torch.no_grad():
                for name, tensor in current.items():
                    tensor.copy_(saved[kind][name])


def _check(kind: str, current: Mapping[str, Tensor], saved: Mapping[str, Any]) -> None:
    missing, extra = sorted(current.keys() - saved.keys()), sorted(saved.keys() - current.keys())
    if missing or extra:
        raise CheckpointError(
            f"the pair does not fit the checkpoint: expected {kind} {(extra or missing)[0]!r} "
            f"{'from the pair' if extra else 'in the checkpoint'}, found none "
            f"({len(missing)} missing, {len(extra)} unknown). Build the pair as the run did"
        )
    for name, tensor in current.items():
        if tuple(saved[name].shape) != tuple(tensor.shape):
            raise CheckpointError(
                f"the pair does not fit the checkpoint: {kind} {name!r} is expected to have shape "
                f"{list(saved[name].shape)}, found {list(tensor.shape)}. Build the pair as the run did"
            )
