"""Locks: one process at a time writes the files of a run, and the lock of a process ends with the process."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ppvae.errors import CheckpointError

try:
    import fcntl
except ImportError:  # a system without POSIX locks
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("ppvae")


@contextlib.contextmanager
def lock_folder(folder: Path, name: str) -> Iterator[None]:
    """Holds the lock `.name.lock` of a folder inside the block; it is removed at the end.

    The system releases the lock (`flock`) of a process that is killed; the next one takes it over, with one line in
    the log. Where the file system has no locks, as NFS without its lock daemon, one line says so, and nothing is
    locked: then two processes must not write into one folder.

    Raises:
        CheckpointError: another process holds the lock, or the folder cannot be written to.
    """
    path = folder / f".{name}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _acquire(path)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written to ({error.strerror})") from error
    with file:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()


def _acquire(path: Path) -> IO[str]:
    while True:
        file = open(path, "a+")  # noqa: SIM115  the caller closes it
        try:
            _lock(path, file)
            same = os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path))
            if not same:  # its holder has removed it in the meantime
                file.close()
                continue
            file.seek(0)
            if before := file.read(200).strip():
                log.warning("ppvae: %s: the lock is taken over from %s, which has ended", path.parent, before)
            file.truncate(0)
            started = time.strftime("%Y-%m-%d %H:%M:%S")
            print(f"process {os.getpid()} on {platform.node()} ({_command()}, since {started})", file=file, flush=True)
            return file
        except BaseException:
            file.close()
            raise


def _lock(path: Path, file: IO[str]) -> None:
    why = "this system has no file locks"
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            raise CheckpointError(
                f"{path.parent}: {holder} writes to it. Wait until that has ended, or choose another folder"
            ) from None
        except OSError as error:  # NFS without a lock daemon, some cluster and FUSE file systems
            why = f"its file system has no locks ({error.strerror}), as NFS without a lock daemon has none"
    log.warning("ppvae: %s is not locked: %s. Make sure that no other process writes to it", path.parent, why)


def _command() -> str:
    return " ".join([Path(sys.argv[0]).stem, *sys.argv[1:2]])[:60] if sys.argv else "python"
