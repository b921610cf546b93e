"""Training by two processes is training by one: the same steps, the same parameters in both, errors that end all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ppvae.distributed import DistributedContext
from tests.distributed import processes_worker

WORKER = Path(processes_worker.__file__)
CASES = ("plain", "fixed size", "batch norm", "unlike", "failing")


def together(folder: Path, *cases: str, size: int = 2) -> list[dict[str, dict[str, Any]]]:
    """What each of several processes reports of each case in turn."""
    folder.mkdir(exist_ok=True)
    common = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2]), "WORLD_SIZE": str(size)}
    started = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder), *cases], env=common | {"RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(size)
    ]  # fmt: skip
    out = [process.communicate() for process in started]
    assert all(process.returncode == 0 for process in started), out
    return [json.loads(text.splitlines()[-1]) for text, _ in out]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, list[dict[str, dict[str, Any]]]]:
    """The folder of two processes, and what they report of all cases."""
    folder = tmp_path_factory.mktemp("two")
    return folder, together(folder, *CASES)


def alone(case: str, folder: Path) -> dict[str, Any]:
    """What this process, a single one, reports of a case."""
    return processes_worker.report(case, folder)


def distance(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest difference of two reports' parameters."""
    return max(abs(x - y) for x, y in zip(a["params"], b["params"], strict=True))


@pytest.mark.parametrize("case", ["plain", "fixed size"])
def test_two_processes_take_the_steps_of_one(case, two, tmp_path):
    first, second = (found[case] for found in two[1])
    assert first["digest"] == second["digest"]
    assert distance(first, alone(case, tmp_path)) < 1e-9


def test_parameters_start_and_stay_the_same_with_buffers_too(two):
    first, second = (found["batch norm"] for found in two[1])
    assert first["digest"] == second["digest"]
    assert first["elbo"] == second["elbo"]
    assert (two[0] / "run" / "config.json").exists()


@pytest.mark.slow
def test_a_resumed_run_ends_as_if_it_had_not_stopped(tmp_path):
    whole, _ = together(tmp_path / "whole", "whole")
    together(tmp_path / "cut", "cut")
    first, second = together(tmp_path / "cut", "resumed")
    assert first["resumed"]["digest"] == second["resumed"]["digest"] == whole["whole"]["digest"]


@pytest.mark.slow
def test_three_processes_with_parts_of_different_sizes(tmp_path):
    found = [one["plain"] for one in together(tmp_path, "plain", size=3)]
    assert len({one["digest"] for one in found}) == 1
    assert distance(found[0], alone("plain", tmp_path)) < 1e-9


def test_an_error_of_one_process_ends_all(two):
    first, second = (found["failing"] for found in two[1])
    assert "another of the 2 processes failed" in first["error"]
    assert "stumbles" in second["error"]


def test_a_destroyed_group_leaves_no_threads(two):
    assert [found["threads left"] for found in two[1]] == [[], []]


def test_processes_that_were_called_unlike_are_refused(two):
    for found in two[1]:
        assert "process 1 of 2 was called with other data or settings" in found["unlike"]["error"]


def test_a_rank_has_its_rows_of_a_batch_without_gaps():
    context, x = DistributedContext(), torch.arange(14.0).view(7, 2)
    context.size = 2
    for context.rank in (0, 1):
        (rows,) = context.shard_batch((x,))
        assert torch.equal(rows, x[context.rank :: 2])
        assert rows.is_contiguous()


@pytest.mark.parametrize("failed", [False, True])
def test_gradients_of_every_type_and_layout_are_summed(failed, monkeypatch):
    """A second rank without gradients of "unused", which sends 3 for each number of the others."""
    params = {
        "single": torch.zeros(2, 3), "double": torch.zeros(2, dtype=torch.float64),
        "half": torch.zeros(2, dtype=torch.bfloat16), "frozen": torch.zeros(4), "unused": torch.zeros(2),
        "of the other": torch.zeros(2), "columns": torch.zeros(3, 2).t(),
    }  # fmt: skip
    for name, p in params.items():
        p.requires_grad_(name != "frozen")
        if name not in ("frozen", "unused", "of the other"):
            p.grad = torch.arange(p.numel(), dtype=p.dtype).view(p.shape)
    other = {n: None if n in ("frozen", "unused") else torch.full_like(p, 3.0) for n, p in params.items()}
    trained = [n for n in params if n != "frozen"]

    def sum_with_the_other(t):
        names = [n for n in trained if params[n].dtype == t.dtype]
        head = [0.0, 10.0, 20.0, *(float(other[n] is not None) for n in trained)] if t.dtype == torch.float32 else []
        sent = [torch.zeros_like(params[n]) if other[n] is None else other[n] for n in names]
        t += torch.cat([torch.tensor(head), *(g.reshape(-1) for g in sent)])

    monkeypatch.setattr(torch.distributed, "all_reduce", sum_with_the_other)
    context = DistributedContext()
    context.size = 2
    before = {n: p.grad for n, p in params.items()}
    assert context.all_reduce_gradients([1.0, 2.0], list(params.values()), failed=failed) == [11.0, 22.0]
    if failed:
        assert all(p.grad is before[n] for n, p in params.items())
        return
    for name, p in params.items():
        own = torch.zeros_like(p) if before[name] is None else before[name]
        if other[name] is None:
            assert p.grad is None
        else:
            assert torch.equal(p.grad, own + 3)
            assert p.grad.stride() == p.stride()
