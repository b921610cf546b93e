"""A real full disk, a small tmpfs: one sentence, and what was there before stands."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ppvae import fit, load, log_marginal
from ppvae.errors import CheckpointError
from ppvae.evaluation import load_estimate
from ppvae.models import LinearGaussian


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.name != "posix" or os.geteuid() or shutil.which("mount") is None:
        pytest.skip("no root: a small file system cannot be mounted")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mount is not permitted: a small file system cannot be made")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """A file that takes all space that is left."""
    path = folder / "filling"
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue
    return path


def test_a_full_disk_in_training_and_in_evaluation(small_disk):
    pair, x = LinearGaussian(3, 2), torch.randn(100, 3)
    folder, given = small_disk / "run", {"batch_size": 50, "seed": 0, "compile": False}

    def full_from_the_second_epoch(run, metrics):
        if metrics["epoch"] == 2:
            fill(small_disk)

    with pytest.raises(CheckpointError, match="No space left on device"):
        fit(
            pair.model, pair.mean_field, x, epochs=4, directory=folder, checkpoint_seconds=0.0,
            callbacks=[full_from_the_second_epoch], **given,
        )  # fmt: skip
    assert load(folder, pair.model, pair.mean_field).metrics["epoch"] == 1
    (small_disk / "filling").unlink()
    run = fit(pair.model, pair.mean_field, x, epochs=4, directory=folder, resume=True, **given)
    assert run.metrics["epoch"] == 4

    est = log_marginal(run.model, run.guide, x, num_particles=50, proposal="guide")
    est.save(folder / "results")
    filling = fill(small_disk)
    with pytest.raises(CheckpointError, match="No space left on device"):
        log_marginal(run.model, run.guide, x, num_particles=50, seed=1, proposal="guide").save(folder / "results")
    filling.unlink()
    assert torch.equal(load_estimate(folder).log_px, est.log_px)
