"""What is released: the wheel and the sdist build, and the demo runs from the wheel where no checkout is."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import ppvae

ROOT = Path(__file__).parents[1]


def test_one_version_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "ppvae.__version__"}
    assert f"version: {ppvae.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(
        rf"^## {re.escape(ppvae.__version__)} - \d{{4}}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("build") is None, reason="the package `build` is not installed")
def test_wheel_and_sdist_build_and_the_demo_runs_from_the_wheel(tmp_path: Path) -> None:
    source, empty, venv = tmp_path / "source", tmp_path / "empty", tmp_path / "venv"
    for folder in (source, empty):
        folder.mkdir()
    tracked = run("git", "ls-files", cwd=ROOT).splitlines()
    for name in tracked:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", source, cwd=empty)
    (wheel,), (sdist,) = (tmp_path / "dist").glob("*.whl"), (tmp_path / "dist").glob("*.tar.gz")
    modules = {n for n in tracked if n.startswith("ppvae/")}
    assert modules == {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("ppvae/")}
    with tarfile.open(sdist) as archive:
        held = {n.partition("/")[2] for n in archive.getnames()}
    assert modules <= held
    assert not [n for n in held if n.startswith("experiments/")]  # trained weights, results

    # dependencies of this environment, and the package of the wheel alone: editable installs are no part of PYTHONPATH
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=empty)
    target = venv / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        target,
        wheel,
        cwd=empty,
    )
    python, path = venv / "bin" / "python", {"PYTHONPATH": sysconfig.get_paths()["purelib"], "OMP_NUM_THREADS": "1"}
    assert str(target) in run(python, "-c", "import ppvae; print(ppvae.__file__)", cwd=empty, **path)
    settings = ("--name", "demo", "--binarize", "dynamic", "--epochs", "2", "--optimizer.schedule", "cosine")
    run(python, "-m", "ppvae", "fit", "ppvae.models:vae", *settings, cwd=empty, **path)
    assert "nats per datum" in run(
        python, "-m", "ppvae", "evaluate", "runs/demo", "--num-particles", "100", cwd=empty, **path
    )
    assert (empty / "runs" / "demo" / "report.html").exists()
