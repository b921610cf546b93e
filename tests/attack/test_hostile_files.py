"""Data that are damaged, hostile or unlucky: read as what they are, or refused in one sentence; no more happens."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
from pathlib import Path

import pytest

from ppvae import data
from ppvae.cli.main import main
from ppvae.errors import PpvaeError
from ppvae.storage import read_json
from tests.attack.hostile_files import KINDS, WRITTEN

TRIES = [50, pytest.param(500, marks=pytest.mark.slow)]
SECONDS = 20  # without an answer, an input hangs
GIGABYTES = 1.0  # that one input may take


def outcome(path: Path) -> str:
    """ "read" or "refused" for a file, else what went wrong."""

    def hangs(*_: object) -> None:
        raise TimeoutError(f"no answer after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    try:
        splits = data.load(path)
        return "read" if all(bool(split.isfinite().all()) for split in splits) else "not finite"
    except PpvaeError as error:
        text = str(error)
        named = path.name in text
        return "refused" if named and len(text) < 700 and len(text.splitlines()) <= 3 else f"words: {text[:200]}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", TRIES)
@pytest.mark.parametrize("kind", KINDS)
def test_files(kind, count, tmp_path, record_property):
    rng, wrong, counts = random.Random(f"{kind} 0"), [], {"read": 0, "refused": 0}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = KINDS[kind](folder, rng)
        found = outcome(path)
        if found in counts:
            counts[found] += 1
        else:
            wrong.append(f"{kind} {number} {path.name}: {found}")
        assert not (folder / WRITTEN).exists(), f"{kind} {number} {path.name}: code of the file has run"
        shutil.rmtree(folder)
    assert not wrong, "\n".join(wrong)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < GIGABYTES * 2**20
    record_property("attacks", [f"{kind}: {count} tried, {counts['refused']} refused, {counts['read']} read"])


def test_a_limit_that_is_raised_as_the_error_says(tmp_path, monkeypatch):
    """An archive over the limit is refused; with the limit that the error gives it is read."""
    import numpy as np

    path = tmp_path / "large.npz"
    np.savez_compressed(path, x=np.zeros((200_000, 10), dtype=np.uint8))
    with pytest.raises(PpvaeError, match=r"unpacks to at most 0.001 GB, found one of 0.002 GB.*max_gigabytes=1\)"):
        data.load(path, max_gigabytes=0.001)
    assert len(data.load(path, max_gigabytes=1)[0]) == 140_000


def test_files_of_options(tmp_path, capsys):
    """`--config` with a pipe, a device, a folder, text, or TOML that is nested too deeply: one sentence."""
    contents = {
        "deep": "a = " + "[" * 20_000,
        "dotted": ".".join("a" * 3000) + " = 1",
        "text": "no options",
        "nul": "\0",
    }
    paths = [tmp_path / name for name in contents]
    for path in paths:
        path.write_text(contents[path.name])
    os.mkfifo(tmp_path / "pipe")
    for path in (*paths, tmp_path / "pipe", tmp_path, Path("/dev/zero"), tmp_path / "none"):
        assert main(["fit", "ppvae.models:vae", "--config", str(path)]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith(f"ppvae: error: --config {path}: ")
        assert len(error.splitlines()) == 1


def test_json_that_is_nested_too_deeply(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(path)
