"""Files that belong together appear together: a folder of new files is committed by one rename."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from ppvae.errors import CheckpointError
from ppvae.storage import flush, write_bytes

MARK = ".whole"  # the names of the new files, in a folder whose other files go


@contextlib.contextmanager
def written_together(folder: Path, name: str, view: Sequence[str] = (), whole: Sequence[str] = ()) -> Iterator[Path]:
    """A staging folder, whose files replace those of `folder` at the end of the block: all of them, or none.

    Files are written and flushed to disk in `.name.<id>.tmp`, which the rename to `.name.<id>.commit` commits; then
    each is moved to its place, the .json files last. A process killed before the rename, or an exception, leaves the
    earlier files as they were; after it, `complete` moves the rest, before anything is read.

    Args:
        view: subfolders whose present files are to be seen in the staging folder, as links.
        whole: subfolders that hold nothing but what is written here: their other files are removed.

    Raises:
        CheckpointError: a file could not be written; the files that were there before are kept.
    """
    staging = folder / f".{name}.{uuid.uuid4().hex}.tmp"
    commit = staging.with_suffix(".commit")
    try:
        staging.mkdir(parents=True)
        for sub in view:
            (staging / sub).mkdir()
            for path in sorted((folder / sub).glob("[!.]*")):
                if path.is_file():
                    _link(path, staging / sub / path.name)
        yield staging
        for sub in whole:
            if (staging / sub).is_dir():
                write_bytes(staging / sub / MARK, "\n".join(p.name for p in (staging / sub).iterdir()).encode())
        for path in (*_files(staging), *(p for p in staging.rglob("*") if p.is_dir()), staging):
            flush(path)
        os.rename(staging, commit)
        flush(folder)
        _move(commit)
    except OSError as error:
        text = f"{folder}: {name} could not be written ({error.strerror}); what was there before is kept"
        raise CheckpointError(text) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def complete(folder: Path) -> None:
    """Moves the files of a commit that a killed process did not finish.

    Raises:
        CheckpointError: they cannot be moved.
    """
    for commit in sorted(folder.glob(".*.commit"), key=lambda path: path.stat().st_mtime_ns):
        try:
            _move(commit)
        except OSError as error:
            raise CheckpointError(
                f"{folder}: an interrupted write cannot be completed ({error.strerror}): make the folder writable"
            ) from error


def remove_stagings(folder: Path, name: str) -> None:
    """Removes what killed processes left of files that were not committed; the caller holds their lock."""
    for path in folder.glob(f".{name}.*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    """The new files, those of JSON last; links are the view of the present ones."""
    files = [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()]
    return sorted(files, key=lambda path: (path.suffix == ".json", path))


def _move(commit: Path) -> None:
    files = _files(commit)
    for mark in (path for path in files if path.name == MARK):
        target, names = commit.parent / mark.parent.relative_to(commit), mark.read_text().split("\n")
        for old in target.glob("*") if target.is_dir() else ():
            if old.is_file() and old.name not in names:
                old.unlink(missing_ok=True)
    for path in files:
        if path.name == MARK:
            continue
        target = commit.parent / path.relative_to(commit)
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another process completes it, too
            os.replace(path, target)
        flush(target.parent)
    shutil.rmtree(commit, ignore_errors=True)


def _link(path: Path, link: Path) -> None:
    try:
        link.symlink_to(path.resolve())
    except OSError:  # a file system without links
        shutil.copy2(path, link)
