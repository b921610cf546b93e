"""Two writers of one folder: the second is refused, and the lock of a process that is killed is taken over."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from ppvae import fit, load
from ppvae.cli.main import main
from ppvae.errors import CheckpointError
from ppvae.models import LinearGaussian
from ppvae.run_folder import lock
from ppvae.run_folder.lock import lock_folder

HOLDER = """
import sys, time
from pathlib import Path
from ppvae.run_folder.lock import lock_folder
with lock_folder(Path(sys.argv[1]), "fit"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock "fit" of a folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def trained(folder: Path | None, epochs: int = 2, **options):
    torch.manual_seed(0)
    pair, x = LinearGaussian(3, 2), torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    run = fit(
        pair.model, pair.mean_field, x, epochs=epochs, batch_size=20, directory=folder, checkpoint_seconds=0, **options
    )
    return pair, run


def test_the_second_of_two_processes_is_refused(holder, tmp_path):
    with pytest.raises(CheckpointError, match=f"process {holder.pid} on .* writes to it. Wait until that has ended"):
        trained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".fit.lock"]
    with lock_folder(tmp_path, "another"):  # a lock of another name
        pass


def test_the_lock_of_a_killed_process_is_taken_over_with_one_line(holder, tmp_path, caplog):
    holder.kill()
    holder.wait()
    assert (tmp_path / ".fit.lock").exists()
    trained(tmp_path)
    lines = [record.message for record in caplog.records if "taken over" in record.message]
    assert len(lines) == 1
    assert f"process {holder.pid} on" in lines[0]
    assert not (tmp_path / ".fit.lock").exists()
    caplog.clear()
    trained(tmp_path, 3, resume=True)
    assert not [r for r in caplog.records if "lock" in r.message]


def test_of_many_that_race_one_holds_the_lock_at_a_time(tmp_path):
    inside, worst, refused, done = [], [], [], []

    def compete():
        for _ in range(60):
            try:
                with lock_folder(tmp_path, "fit"):
                    inside.append(1)
                    worst.append(len(inside))
                    time.sleep(0.0003)
                    inside.pop()
                    done.append(1)
            except CheckpointError:
                refused.append(1)

    threads = [threading.Thread(target=compete) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(worst) == 1
    assert len(done) + len(refused) == 240
    assert not list(tmp_path.iterdir())


def test_two_fits_of_the_command_line(holder, tmp_path, capsys):
    words = ["fit", "ppvae.models:vae", "--epochs", "1", "--runs", str(tmp_path.parent), "--name", tmp_path.name]
    assert main([*words, "--no-report", "--hidden", "4"]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"ppvae: error: {tmp_path}: process {holder.pid} on ")
    assert len(error.splitlines()) == 1


def test_a_checkpoint_saved_since_it_was_read_is_not_overwritten(tmp_path, monkeypatch):
    """The other one has ended by the time that the lock is taken."""
    trained(tmp_path)
    real = lock._acquire

    def late(path):
        monkeypatch.setattr(lock, "_acquire", real)
        trained(tmp_path, 4, resume=True)
        return real(path)

    monkeypatch.setattr(lock, "_acquire", late)
    with pytest.raises(CheckpointError, match="another process has saved a checkpoint in the meantime"):
        trained(tmp_path, 3, resume=True)
    pair, _ = trained(None, 4)
    again = LinearGaussian(3, 2)
    assert len(load(tmp_path, again.model, again.mean_field).history) == 4
    assert all(torch.equal(a, b) for a, b in zip(pair.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("how", ["no locks", "no fcntl"])
def test_where_there_are_no_locks_one_line_says_so(tmp_path, monkeypatch, caplog, how):
    if how == "no fcntl":
        monkeypatch.setattr(lock, "fcntl", None)
    else:
        pytest.importorskip("fcntl")

        def unsupported(*_):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with caplog.at_level(logging.WARNING):
        trained(tmp_path)
    lines = [r.message for r in caplog.records if "is not locked" in r.message]
    assert len(lines) == 1
    assert ("NFS" in lines[0]) == (how == "no locks")


def test_temporaries_that_a_kill_left_are_removed(tmp_path):
    trained(tmp_path)
    for place in (tmp_path / ".config.json.ab.tmp", tmp_path / "checkpoints" / ".last.cd.tmp"):
        place.write_bytes(b"half")
    trained(tmp_path, 3, resume=True)
    assert not list(tmp_path.rglob("*.tmp"))


def test_evaluations_of_one_name_exclude_each_other(tmp_path, capsys):
    words = ["--runs", str(tmp_path), "--name", "run", "--no-report", "--hidden", "4", "--epochs", "1"]
    assert main(["fit", "ppvae.models:vae", *words]) == 0
    command = [
        "evaluate",
        str(tmp_path / "run"),
        "--num-particles",
        "30",
        "--head",
        "5",
        "--bracket",
        "0",
        "--no-report",
    ]
    with lock_folder(tmp_path / "run" / "results", "log_marginal"):
        assert main(command) == 1
        assert f"process {os.getpid()} on " in capsys.readouterr().err
        assert main([*command, "--split", "valid"]) == 0
    assert main(command) == 0
    files = {path.name for path in (tmp_path / "run" / "results").iterdir()}
    assert files == {
        f"log_marginal{part}.{kind}" for part in ("", "_guide", "_valid", "_valid_guide") for kind in ("json", "nc")
    }
    assert json.loads((tmp_path / "run" / "results" / "log_marginal.json").read_text())["run_id"]


def test_an_exception_inside_the_block_releases_the_lock(tmp_path):
    with pytest.raises(KeyboardInterrupt), lock_folder(tmp_path, "fit"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
