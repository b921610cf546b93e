"""`ppvae new`: from nothing to a trained pair with a report, by the commands that it prints."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ppvae.cli.main import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_writes_a_pair_and_a_test_and_replaces_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", "my_pair"]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^  (\w+)", printed, re.M) == ["python", "ppvae", "ppvae"]
    before = (folder / "my_pair.py").read_text()
    compile(before, "my_pair.py", "exec")
    assert main(["new", "my_pair"]) == 2
    assert "expected no file my_pair.py, found one" in capsys.readouterr().err
    assert (folder / "my_pair.py").read_text() == before


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "expected a name"),
        (["my-pair"], "found 'my-pair'"),
        (["class"], "found 'class'"),
        (["a/b"], "found 'a/b'"),
        (["a", "b"], "found a b"),
        (["numpy"], "expected a name that no module has, found 'numpy'"),
        (["__init__"], "expected a name that no module has"),
        (["x" * 300], "expected a name of at most 200 bytes, found one of 300"),
    ],
)
def test_a_bad_name_is_refused(args: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", *args]) == 2
    assert said in capsys.readouterr().err
    assert list(folder.iterdir()) == []


def test_help_names_both_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", "--help"]) == 0
    assert "test_NAME.py" in capsys.readouterr().out


@pytest.mark.slow
def test_the_three_commands_lead_to_a_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", "my_pair"]) == 0
    commands = re.findall(r"^  (.*)$", capsys.readouterr().out, re.M)
    for command in commands:
        program, *args = command.split()
        words = [sys.executable, *(["-m", "ppvae"] if program == "ppvae" else []), *args]
        done = subprocess.run(words, capture_output=True, text=True, cwd=folder, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (folder / "runs" / "my_pair" / "report.html").stat().st_size > 10_000
    assert "all 360 data are reliable" in done.stdout or "unreliable" in done.stdout
