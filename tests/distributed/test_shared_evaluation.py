"""Evaluations in two processes: the same result as in one, on both of them; an error of one is an error of all."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ppvae.distributed import DistributedContext, distributed_context
from ppvae.errors import PpvaeError
from ppvae.evaluation.annealing import hmc
from tests.distributed.sharding_worker import methods

WORKER = Path(__file__).parent / "sharding_worker.py"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with what two processes found: out.RANK.npz and out.RANK.errors.npz."""
    folder = tmp_path_factory.mktemp("two")
    root = str(WORKER.parents[2])
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(WORKER)]
    started = [
        subprocess.Popen([*command, str(rank), "2", str(folder / "store"), str(folder / "out")], env=env)
        for rank in (0, 1)
    ]
    assert [process.wait() for process in started] == [0, 0]
    return folder


@pytest.fixture(scope="module")
def one():
    """What this process finds."""
    before = torch.get_default_dtype(), hmc.WARM_UP_TRANSITIONS, hmc.MIN_PILOT_TRANSITIONS
    torch.set_default_dtype(torch.float64)
    hmc.WARM_UP_TRANSITIONS, hmc.MIN_PILOT_TRANSITIONS = 8, 1
    yield methods()
    torch.set_default_dtype(before[0])
    hmc.WARM_UP_TRANSITIONS, hmc.MIN_PILOT_TRANSITIONS = before[1:]


METHODS = ("log_marginal", "one block", "auto", "annealed", "smc", "bdmc", "gaps", "calibration")


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_give_the_result_of_one(one, two, name):
    for rank in (0, 1):
        with np.load(two / f"out.{rank}.npz") as file:
            found = {key.partition("/")[2]: file[key] for key in file.files if key.startswith(f"{name}/")}
        assert found.keys() == one[name].keys()
        for key, value in one[name].items():
            assert found[key].dtype == value.numpy().dtype, key
            np.testing.assert_allclose(found[key], value.numpy(), rtol=0, atol=1e-9, err_msg=key)


def test_both_processes_had_a_share(two):
    """Three blocks: the first and the last in one file of one process, the second in the other's."""
    names = {p.name: set(np.load(p).files) for p in (two / "out.blocks").glob("*.npz")}
    assert sorted(names) == ["block-00000.npz", "block-00001.npz"]
    assert {n.partition("/")[0] for n in names["block-00000.npz"]} == {"block-00000", "block-00002"}


def test_an_error_of_one_process_is_an_error_of_all(two):
    first, second = (dict(np.load(two / f"out.{rank}.errors.npz")) for rank in (0, 1))
    assert "row 3, column 2 is nan" in str(second["data"])
    assert str(second["data"]).startswith("DataError")
    assert "process 1 of 2 failed" in str(first["data"])
    assert "row 3, column 2 is nan" in str(first["data"])
    for found in (first, second):
        assert "process 1 of 2 evaluates other parameters, data or settings" in str(found["parameters"])
        assert "the moon is full" in str(found["block"])
        assert str(found["after"]) == "130"  # nothing hangs, and nothing is left over


def test_one_process_has_everything():
    context = DistributedContext()
    assert list(context.block_indices(3)) == [0, 1, 2]
    parts = {n: {"x": torch.tensor([n])} for n in (1, 0)}
    assert [int(p["x"]) for p in context.gather_blocks(parts, {})] == [0, 1]
    with pytest.raises(PpvaeError, match="as it is"), distributed_context():
        raise PpvaeError("as it is")
