"""SIGTERM, as a scheduler sends it, and a worker of a group that is killed: one line, the last checkpoint is kept."""

from __future__ import annotations

import importlib.abc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ppvae import load
from ppvae.cli.main import Terminated, main
from ppvae.evaluation.importance import sampler
from ppvae.training import trainer

ROOT = Path(__file__).parents[2]
FIT = ["fit", "ppvae.models:vae", "--hidden", "4", "--latent", "2", "--no-report", "--name", "run"]


def send_sigterm_at(monkeypatch, owner, name: str, number: int) -> None:
    """SIGTERM to this process at the n-th call of a method."""
    real, calls = getattr(owner, name), []

    def method(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, method)


def test_sigterm_ends_fit_as_ctrl_c_does(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        send_sigterm_at(patch, trainer.Trainer, "_run_epoch", 3)
        patch.setattr(trainer.time, "monotonic", iter(range(0, 10**6, 100)).__next__)  # a checkpoint every epoch
        assert main([*FIT, "--runs", str(tmp_path), "--epochs", "5"]) == 143
    error = capsys.readouterr().err.strip()
    assert error == (
        "ppvae: error: terminated; the same command with --name NAME --resume goes on from the last checkpoint"
    )
    assert load(tmp_path / "run").stopped == "the run stopped at epoch 2 of 5"
    assert not list((tmp_path / "run").glob(".*"))  # neither a lock nor temporaries
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert main([*FIT, "--runs", str(tmp_path), "--epochs", "5", "--resume"]) == 0
    assert main([*FIT[:-1], "whole", "--runs", str(tmp_path), "--epochs", "5"]) == 0
    resumed, whole = (load(tmp_path / name) for name in ("run", "whole"))
    for p, q in zip(resumed.model.scope.params.values(), whole.model.scope.params.values(), strict=True):
        assert bool((p == q).all())


def test_sigterm_ends_evaluate_and_leaves_the_earlier_result(tmp_path, monkeypatch, capsys):
    assert main([*FIT, "--runs", str(tmp_path), "--epochs", "1"]) == 0
    command = [
        "evaluate",
        str(tmp_path / "run"),
        "--num-particles",
        "30",
        "--head",
        "120",
        "--bracket",
        "0",
        "--no-report",
    ]
    assert main(command) == 0
    results = tmp_path / "run" / "results"
    before = {path.name: path.read_bytes() for path in results.iterdir()}
    with monkeypatch.context() as patch:
        send_sigterm_at(patch, sampler.ImportanceSampler, "__call__", 2)
        assert main([*command, "--seed", "1"]) == 143
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        "ppvae: error: terminated; the same command goes on from the finished blocks"
    )
    assert {path.name: path.read_bytes() for path in results.iterdir() if path.is_file()} == before
    assert main([*command, "--seed", "1"]) == 0


def test_a_handler_of_the_caller_is_left_alone(monkeypatch):
    def mine(*_):
        raise AssertionError

    before = signal.signal(signal.SIGTERM, mine)
    try:
        assert main(["--version"]) == 0
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("error", "status", "words"), [
    (Terminated, 143, "terminated; "), (KeyboardInterrupt, 130, "interrupted; "),
    (ImportError("libtorch_cpu.so: failed to map segment"), 1, "a library cannot be loaded (libtorch"),
])  # fmt: skip
@pytest.mark.parametrize("module", ["ppvae.errors.memory", "ppvae.cli.fit", "ppvae.cli.flags"])
def test_a_signal_while_modules_are_loaded(module, error, status, words, monkeypatch, capsys):
    """The seconds that torch takes to load are those in which Ctrl-C comes: one line, and no traceback."""

    class Loading(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name == module:
                raise error
            return None

    before = sys.modules.pop(module, None)
    monkeypatch.setattr(sys, "meta_path", [Loading(), *sys.meta_path])
    try:
        assert main(["fit", "ppvae.models:vae"]) == status
    finally:
        if before is not None:
            sys.modules[module] = before
    error_line = capsys.readouterr().err
    assert error_line.startswith(f"ppvae: error: {words}")
    assert len(error_line.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_of_a_group_gives_one_line(tmp_path, rank):
    env = {k: v for k, v in os.environ.items() if k not in ("PPVAE_TRACEBACK", "RANK", "WORLD_SIZE")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ppvae"]
    process = subprocess.Popen(
        [*started, *FIT, "--runs", str(tmp_path), "--epochs", "100000"], env=env, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() or not metrics.read_text():
        assert process.poll() is None
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("no /proc: the workers of the group cannot be found")
    workers = [p for p in children.read_text().split() if f"RANK={rank}\0" in Path(f"/proc/{p}/environ").read_text()]
    os.kill(int(workers[0]), signal.SIGKILL)
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0
    ours = [line for line in error.splitlines() if line.startswith("ppvae: error:")]
    assert len(ours) == 1, error
    assert "another process of the group" in ours[0]
    assert "checkpoint" in ours[0]
