"""Checkpoints that survive a kill: a file named by its SHA-256, and a pointer to it that is renamed last."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch

from ppvae.errors import CheckpointError

POINTER = "last"


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, and makes it last through a power cut."""
    partial = path.with_name(path.name + ".tmp")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        text = f"{path}: could not be written ({error.strerror}); what was there before is kept"
        raise CheckpointError(text) from error


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
    write_atomically(path, content)
    write_atomically(folder / POINTER, name.encode())
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
