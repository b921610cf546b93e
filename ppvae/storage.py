"""Atomic writes of files, reads of regular files alone, strict JSON, and SHA-256 digests."""

import hashlib
import json
import math
import os
import stat
import uuid
from collections.abc import Callable, Mapping
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
        flush(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def remove_temporaries(folder: Path, name: str = "") -> None:
    """Removes what a killed process left in a folder: temporary files, of files whose names start with `name`.

    The caller holds the lock of these files (`ppvae.run_folder.lock`).
    """
    for path in folder.glob(f".{name}*.tmp"):
        if not path.is_dir():
            path.unlink(missing_ok=True)


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
    """Writes strict JSON to a file atomically; raises CheckpointError as `write_bytes`."""
    write_bytes(path, (json_text(content, indent=2) + "\n").encode())


def json_text(content: Any, indent: int | None = None, sort_keys: bool = False) -> str:
    """Strict JSON (RFC 8259), which has no NaN and no infinity: they become the strings "nan", "inf", "-inf".

    >>> json_text({"b": [1.5, float("-inf")], "a": None})
    '{"b": [1.5, "-inf"], "a": null}'
    """
    try:
        return json.dumps(content, indent=indent, sort_keys=sort_keys, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(content), indent=indent, sort_keys=sort_keys, allow_nan=False)


def json_digest(content: Mapping[str, Any]) -> str:
    """The SHA-256 of JSON content, whatever the order of its keys and the white space of its file."""
    return sha256(json_text(content, sort_keys=True).encode())


def _finite(content: Any) -> Any:
    if isinstance(content, float) and not math.isfinite(content):
        return str(float(content))
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, list | tuple) else content


def read_bytes(path: Path) -> bytes:
    """The content of a regular file; a pipe or a device, which may never end, is not read.

    Raises:
        OSError: there is no such file, or it is none.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(None, "not a regular file")
        return file.read()


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        OSError: as `read_bytes`; ValueError: it is not JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(read_bytes(path).decode())
    except RecursionError:
        raise ValueError("nested too deeply") from None


def sha256(content: bytes) -> str:
    """The SHA-256 of bytes, in hexadecimal.

    >>> sha256(b"")[:8]
    'e3b0c442'
    """
    return hashlib.sha256(content).hexdigest()


def flush(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
