"""`evaluate` and `examine` killed at each of their file operations: the earlier results stand, or the new ones do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ppvae import load
from ppvae.cli.main import main
from ppvae.run_folder.atomic_commit import complete
from ppvae.run_folder.identity import check_results, read_result
from tests.attack.kill_at_operation import count_operations

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "evaluate": ["--num-particles", "30", "--head", "40", "--bracket", "0", "--proposal", "guide"],
    "examine": ["--gaps", "0", "--latents", "30", "--replications", "20", "--checks", "0"],
}
RESULTS = {"evaluate": ("log_marginal",), "examine": ("representation", "calibration")}


class Killed(BaseException):
    """Stands for SIGKILL: from here on no operation of the file system takes place."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run with the results of both commands at seed 0."""
    runs = tmp_path_factory.mktemp("runs")
    fit = ["fit", "ppvae.models:vae", "--hidden", "4", "--latent", "2", "--no-report", "--name", "run"]
    assert main([*fit, "--epochs", "1", "--compile", "no", "--runs", str(runs)]) == 0
    for command, options in COMMANDS.items():
        assert main([command, str(runs / "run"), *options, "--no-report"]) == 0
    return runs / "run"


@pytest.fixture(scope="module")
def renewed(finished, tmp_path_factory) -> dict[str, Any]:
    """{name: the result at seed 1} of commands that nothing interrupts."""
    folder = Path(shutil.copytree(finished, tmp_path_factory.mktemp("renewed") / "run"))
    for command, options in COMMANDS.items():
        assert main([command, str(folder), *options, "--no-report", "--seed", "1"]) == 0
    return contents(folder)


def contents(folder: Path) -> dict[str, Any]:
    """{name: what the file of a result says}, all of them whole and of this run; times are left out."""
    complete(folder)
    check_results(folder, load(folder).origin)
    names = [name for names in RESULTS.values() for name in names]
    return {n: without_times(read_result(folder / "results" / f"{n}.json")) for n in names}


def without_times(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key not in ("seconds", "created", "files", "digests")}


def check_after(folder: Path, command: str, before: dict[str, Any], after: dict[str, Any]) -> int:
    """How many results of the command are the new ones; each is the earlier or the new one, in order."""
    found, new = contents(folder), []
    for name, result in found.items():
        assert result in (before[name], after[name]), name
        if name in RESULTS[command]:
            new.append(result == after[name])
        else:
            assert result == before[name], name
    assert new == sorted(new, reverse=True)
    return sum(new)


def in_process(number: int, args: list[str], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a command ended before the file operation with this number, from which on none takes place."""

    def reached(count: int) -> None:
        if count >= number:
            raise Killed

    with monkeypatch.context() as patch:
        count_operations(reached, patch.setattr)
        try:
            assert main(args) == 0
        except Killed:
            return False
    return True


def killed(number: int, args: list[str], monkeypatch: pytest.MonkeyPatch) -> bool:
    """The same of a process of its own, which SIGKILL ends."""
    if not hasattr(os, "fork"):
        pytest.skip("no SIGKILL: a process cannot be killed at a file operation")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.attack.kill_at_operation", str(number), *args]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode in (0, -9), ended.stderr
    return ended.returncode == 0


WAYS = [
    pytest.param(in_process, 16, id="in-process"),
    pytest.param(in_process, 1, id="in-process-all", marks=pytest.mark.slow),
    pytest.param(killed, 12, id="SIGKILL", marks=pytest.mark.slow),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("way", "step"), WAYS)
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_a_file_operation(
    command, way: Callable[..., bool], step, finished, renewed, tmp_path, monkeypatch, record_property
):
    before, new, number = contents(finished), [], step
    while True:
        folder = Path(shutil.copytree(finished, tmp_path / "run"))
        args = [command, str(folder), *COMMANDS[command], "--no-report", "--seed", "1"]
        ended = way(number, args, monkeypatch)
        new.append(check_after(folder, command, before, renewed))
        if new[-1] != new[max(0, len(new) - 2)] or ended:  # the same command goes on from each of the stages
            assert main(args) == 0
            assert check_after(folder, command, before, renewed) == len(RESULTS[command])
            assert not [p.name for p in folder.rglob(".*") if p.suffix in (".tmp", ".commit", ".lock")]
            assert not list((folder / "results").glob("*_blocks"))
        shutil.rmtree(folder)
        if ended:
            break
        number += step
    assert new == sorted(new)
    assert (new[0], new[-1]) == (0, len(RESULTS[command]))
    record_property("attacks", [f"kills of {command}: {len(new) - 1} at file operations, {way.__name__}"])
