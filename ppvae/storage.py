"""Atomic writes of files, and SHA-256 digests."""

import hashlib
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from ppvae.errors import CheckpointError


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a temporary file beside `path` by `write`, flushes it to disk, and renames it to `path`.

    The temporary name is unique to the call, and the file is removed after an exception. A previous file at `path` is
    replaced only after the new one is on disk.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        write(partial)
        _flush(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def write_stream(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """`replace_file` for a function that writes to an open binary file.

    Raises:
        CheckpointError: the file could not be written.
    """

    def fill(partial: Path) -> None:
        with open(partial, "wb") as file:
            write(file)

    try:
        replace_file(path, fill)
    except OSError as error:
        text = f"{path}: could not be written ({error.strerror}); the file that was there before is kept"
        raise CheckpointError(text) from error


def write_bytes(path: Path, content: bytes) -> None:
    """Writes bytes to a file atomically, and flushes it to disk.

    Raises:
        CheckpointError: the file could not be written.
    """
    write_stream(path, lambda file: file.write(content))


def write_json(path: Path, content: Any) -> None:
    """Writes JSON to a file atomically; raises CheckpointError as `write_bytes`."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def sha256(content: bytes) -> str:
    """The SHA-256 of bytes, in hexadecimal.

    >>> sha256(b"")[:8]
    'e3b0c442'
    """
    return hashlib.sha256(content).hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
