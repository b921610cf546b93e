"""Every experiment runs with --smoke, keeps its cells, and does not compute them twice."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import cells, readme

OTHERS = {"__init__", "cells", "readme", "load", "soak", "published_rows", "release"}  # without cells
NAMES = sorted({p.stem for p in Path(cells.__file__).parent.glob("*.py")} - OTHERS)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_runs_with_smoke(name, tmp_path, monkeypatch, capsys):
    pytest.importorskip(f"experiments.{name}")
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"experiments.{name}")
    module.main(["--smoke"])
    files = list((tmp_path / "runs" / "smoke" / name).glob("*.json"))
    assert files
    for file in files:
        cell = json.loads(file.read_text())
        assert {"command", "settings", "commit", "machine", "threads", "duration"} <= set(cell)
        numbers = [v for v in cell["result"].values() if isinstance(v, float)]
        assert numbers
        assert all(map(math.isfinite, numbers))
        assert len(cell["result"]["digest"]) == 64
    assert "|" in capsys.readouterr().out


def test_a_cell_is_computed_once_and_again_from_its_command(tmp_path, monkeypatch, capsys):
    from experiments import parts

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cells, "RESULTS", tmp_path / "results")
    small = ["--data", "digits", "--latent", "2", "--hidden", "8", "--epochs", "1", "--num-test", "20"]
    args = [*small, "--particles", "25", "--priors", "StandardNormal", "--posteriors", "DiagonalNormal"]
    parts.main(args)
    (path,) = (tmp_path / "results" / "parts").glob("*.json")
    first = path.read_text()
    parts.main(args)
    assert path.read_text() == first
    command = json.loads(first)["command"].split()
    assert command[:3] == ["python", "-m", "experiments.parts"]
    parts.main([*command[3:], "--again"])  # in folders of its own: nothing comes from the run before
    assert "0.00 standard errors apart" in capsys.readouterr().out
    assert path.read_text() == first
    (other,) = (tmp_path / "runs" / "again" / "parts").glob("*.json")
    again, before = json.loads(other.read_text())["result"], json.loads(first)["result"]
    assert again["nll"] == before["nll"]
    assert again["digest"] == before["digest"]


def row(nlls, groups, digest="same"):
    """Cells of one row, one a seed."""
    return [
        {"cell": {"row": "r", "seed": i}, "result": {"nll": n, "nll_std_error": 1.0, "groups": g, "digest": digest}}
        for i, (n, g) in enumerate(zip(nlls, groups, strict=True))
    ]


def test_a_difference_is_paired_over_data_and_has_the_variance_over_seeds():
    a = row([1.0, 2.0, 3.0], [[-1.0, -1.0], [-2.0, -2.0], [-3.0, -3.0]])
    b = row([5.0, 5.0, 5.0], [[-4.0, -6.0]] * 3)
    delta, error = cells.difference(a, b)
    assert delta == pytest.approx(3.0)
    assert error == pytest.approx(math.sqrt(1 / 3 + 2 / 2))  # variance over seeds 1 of 3; over groups 2 of 2
    assert cells.compare_rows(a, b).endswith("(better)")
    assert cells.compare_rows(b, a).endswith("(worse)")
    assert cells.compare_rows(a[:2], b).endswith("(undecided: 2 seeds)")
    assert cells.compare_rows(a, row([2.1] * 3, [[-2.1, -2.1]] * 3)).endswith("(not resolved)")
    with pytest.raises(ValueError, match="different data"):
        cells.difference(a, row([1.0], [[-1.0, -1.0]], "other"))


def test_the_readme_is_that_of_its_results():
    if not any(cells.RESULTS.glob("*/*.json")):
        pytest.skip("no results are there")
    assert (Path(readme.__file__).parent / "README.md").read_text() == readme.text()


def test_shards_fill_one_table(tmp_path, monkeypatch, capsys):
    from experiments import parts

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cells, "RESULTS", tmp_path / "results")
    small = ["--data", "digits", "--latent", "2", "--hidden", "8", "--epochs", "1", "--num-test", "20"]
    args = [*small, "--particles", "25", "--priors", "StandardNormal", "--posteriors", "DiagonalNormal"]
    for shard, there in (("2/2", 1), ("1/2", 3), ("2/2", 3)):
        parts.main([*args, "--seeds", "0", "1", "2", "--shard", shard])
        assert len(list((tmp_path / "results" / "parts").glob("*.json"))) == there
    said = capsys.readouterr().out
    assert said.count("parts StandardNormal") == 3  # each cell was computed once
    with pytest.raises(SystemExit, match=r"--shard: expected I/N with I from 1 to N, found '3/2'"):
        parts.main(["--shard", "3/2"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["load", "soak"])
def test_what_runs_commands_of_its_own(name, tmp_path):
    env = os.environ | {"PYTHONPATH": str(Path(cells.__file__).parents[1]), "XDG_CONFIG_HOME": str(tmp_path)}
    command = [sys.executable, "-m", f"experiments.{name}", "--smoke"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
