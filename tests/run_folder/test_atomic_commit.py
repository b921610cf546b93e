"""Files that belong together: killed at every file operation, on a full disk, or with an error half way."""

from __future__ import annotations

import builtins
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ppvae.errors import CheckpointError
from ppvae.evaluation import Estimate, load_estimate
from ppvae.run_folder.atomic_commit import complete, written_together
from ppvae.run_folder.identity import read_result, write_result
from ppvae.storage import write_bytes

OPERATIONS = ("open", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "symlink")


class Killed(BaseException):
    """Stands for SIGKILL: from here on no operation of the file system takes place."""


@contextmanager
def interrupted_at(monkeypatch: pytest.MonkeyPatch, number: int, error: Callable[[], BaseException]) -> Iterator[list]:
    """From the operation with this number on every one of them fails; gives the list of those that were called."""
    calls: list[str] = []
    with monkeypatch.context() as patch:
        for name in OPERATIONS:
            owner = os
            real = getattr(owner, name)

            def call(*args, _real=real, _name=name, **kwargs):
                calls.append(_name)
                if len(calls) >= number:
                    raise error()
                return _real(*args, **kwargs)

            patch.setattr(owner, name, call)
        real_open = builtins.open

        def opened(path, mode="r", *args, **kwargs):
            if isinstance(path, str | os.PathLike) and "w" in mode:
                calls.append("open to write")
                if len(calls) >= number:
                    raise error()
            return real_open(path, mode, *args, **kwargs)

        patch.setattr(builtins, "open", opened)
        yield calls


def estimate(value: float) -> Estimate:
    one = torch.ones(30).double()
    values = (value * one, 0.1 * one, 90 * one, 0.2 * one, -2 * one, 0 * one)
    guide = Estimate(*values, 50, 0, 3, "density", digest="a")
    return Estimate(*values, 100, 0, 3, "density", digest="a", bounds={1: value * one}, guide_estimate=guide)


def write_all(folder: Path, value: float) -> None:
    """A result of two files with the report of it, as `ppvae evaluate` writes them."""
    with written_together(folder, "log_marginal", view=("results",), whole=("pictures",)) as staging:
        assert (staging / "results" / "other.json").exists()
        write_bytes(staging / "results" / "log_marginal.nc", str(value).encode())
        path = staging / "results" / "log_marginal.json"
        write_result(path, {"value": value}, [path.with_suffix(".nc")])
        write_bytes(staging / "report.html", str(value).encode())
        (staging / "pictures").mkdir()
        write_bytes(staging / "pictures" / f"of {value}.png", b"png")


def read_all(folder: Path) -> tuple[float, ...]:
    """The value in each of the files; all of them agree, or reading raises."""
    complete(folder)
    path = folder / "results" / "log_marginal.json"
    pictures = [path.name for path in (folder / "pictures").iterdir()]
    texts = (path.with_suffix(".nc").read_text(), (folder / "report.html").read_text())
    values = {read_result(path)["value"], *map(float, texts)}
    assert pictures == [f"of {value}.png" for value in values]
    assert not [p for p in folder.iterdir() if p.name.endswith(".commit")]
    return tuple(values)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "run"
    (folder / "results").mkdir(parents=True)
    (folder / "results" / "other.json").write_text("{}")
    write_all(folder, -1.0)
    return folder


def copied(written: Path, tmp_path: Path, number: int) -> Path:
    return Path(shutil.copytree(written, tmp_path / str(number)))


def kills(monkeypatch: pytest.MonkeyPatch, write: Callable[[], None]) -> Iterator[int]:
    """Calls a function over and over, killed at its first, second, ... file operation, until it is not reached."""
    for number in range(1, 1000):
        with interrupted_at(monkeypatch, number, Killed):
            try:
                write()
            except Killed:
                pass
            else:
                return
        yield number


def test_files_appear_together(written):
    assert read_all(written) == (-1.0,)
    assert {p.name for p in written.iterdir()} == {"results", "report.html", "pictures"}
    assert not [p for p in (written / "results").iterdir() if p.is_symlink()]


def test_killed_at_every_file_operation(written, tmp_path, monkeypatch):
    """The earlier files or the new ones are read, never a mixture; the commit is one operation."""
    folder, found = copied(written, tmp_path, 0), []
    for _ in kills(monkeypatch, lambda: write_all(folder, -2.0)):
        (value,) = read_all(folder)
        found.append(value)
        shutil.rmtree(folder)
        copied(written, tmp_path, 0)
    assert len(found) > 30
    assert found == sorted(found, reverse=True)
    assert set(found) == {-1.0, -2.0}


def test_a_disk_that_is_full_at_every_file_operation(written, tmp_path, monkeypatch):
    """Whatever fails, one sentence says so, and the earlier files are the same; or all are new."""
    for number in range(1, 1000):
        folder = copied(written, tmp_path, number)
        failed = False
        with interrupted_at(monkeypatch, number, lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) as calls:
            try:
                write_all(folder, -2.0)
            except CheckpointError as error:
                failed = True
                assert "No space left on device" in str(error)  # noqa: PT017
                assert str(folder) in str(error)  # noqa: PT017
        assert read_all(folder) in ((-1.0,), (-2.0,))
        shutil.rmtree(folder)
        if len(calls) < number:
            break
    assert number > 30
    assert not failed


def test_an_error_half_way_leaves_the_earlier_files(written, tmp_path):
    folder = copied(written, tmp_path, 1)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    def write() -> None:
        with written_together(folder, "log_marginal", view=("results",)) as staging:
            estimate(-9.0).save(staging / "results")
            raise ValueError("a bad seed")

    with pytest.raises(ValueError, match="seed"):
        write()
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_a_result_of_a_single_save_is_whole(tmp_path, monkeypatch):
    estimate(-1.0).save(tmp_path)
    for _ in kills(monkeypatch, lambda: estimate(-2.0).save(tmp_path)):
        est = load_estimate(tmp_path / "log_marginal.json")
        assert float(est.log_px[0]) == float(est.bounds[1][0]) == float(est.guide_estimate.log_px[0])
        estimate(-1.0).save(tmp_path)
