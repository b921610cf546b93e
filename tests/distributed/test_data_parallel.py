"""Training by two processes is training by one: the same steps, the same parameters in both, errors that end all."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).parent / "processes_worker.py"


def together(case: str, folder: Path, size: int = 2) -> list[dict[str, str]]:
    """What each of several processes prints, by the words before the colon."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = str(WORKER.parents[2])
    common = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    if size > 1:
        common |= {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, str(WORKER), case, str(folder)], env=common | {"RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(size)
    ]  # fmt: skip
    out = [process.communicate() for process in started]
    assert all(process.returncode == 0 for process in started), out
    return [dict(line.split(": ", 1) for line in text.splitlines() if ": " in line) for text, _ in out]


def params(found: dict[str, str]) -> torch.Tensor:
    return torch.tensor([float(v) for v in found["params"].split()], dtype=torch.float64)


@pytest.mark.parametrize("case", ["plain", "fixed size"])
def test_two_processes_take_the_steps_of_one(case, tmp_path):
    (alone,) = together(case, tmp_path, size=1)
    first, second = together(case, tmp_path)
    assert first["digest"] == second["digest"]
    assert float((params(first) - params(alone)).abs().max()) < 1e-9


def test_parameters_start_and_stay_the_same_with_buffers_too(tmp_path):
    first, second = together("batch norm", tmp_path / "run")
    assert first["digest"] == second["digest"]
    assert first["elbo"] == second["elbo"]
    assert (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_a_resumed_run_ends_as_if_it_had_not_stopped(tmp_path):
    whole, _ = together("whole", tmp_path / "whole")
    together("cut", tmp_path / "cut")
    first, second = together("resumed", tmp_path / "cut")
    assert first["digest"] == second["digest"] == whole["digest"]


@pytest.mark.slow
def test_three_processes_with_parts_of_different_sizes(tmp_path):
    (alone,) = together("plain", tmp_path, size=1)
    found = together("plain", tmp_path, size=3)
    assert len({one["digest"] for one in found}) == 1
    assert float((params(found[0]) - params(alone)).abs().max()) < 1e-9


def test_an_error_of_one_process_ends_all(tmp_path):
    first, second = together("failing", tmp_path)
    assert "another of the 2 processes failed" in first["error"]
    assert "stumbles" in second["error"]


def test_processes_that_were_called_unlike_are_refused(tmp_path):
    first, second = together("unlike", tmp_path)
    for found in (first, second):
        assert "process 1 of 2 was called with other data or settings" in found["error"]
