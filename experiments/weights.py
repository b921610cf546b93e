"""Kept weights: stages of `published` as run folders in the repository, whose checkpoints hold parameters alone.

A kept stage is loaded and evaluated as any run; `take` puts it where `fit` resumes, which returns it as trained. It has
no state of the optimizer, and no datum: zeros stand for the first row of the data."""

import shutil
from pathlib import Path

from ppvae.training import checkpoint


def keep(stage: Path, weights: Path) -> Path:
    """Keeps a finished run folder in the folder `weights`, under its name; returns the folder that was written.

    Raises CheckpointError for an unfinished run.
    """
    kept = weights / stage.name
    alone = checkpoint.parameters_alone(checkpoint.read(stage / "checkpoints"))
    checkpoint.save(kept / "checkpoints", alone | {"row": None})
    for name in ("config.json", "metrics.jsonl"):
        shutil.copyfile(stage / name, kept / name)
    return kept


def take(stage: Path, weights: Path) -> None:
    """Copies a kept stage to its run folder, where there is no run yet."""
    if (weights / stage.name).exists() and not checkpoint.exists(stage / "checkpoints"):
        shutil.copytree(weights / stage.name, stage, dirs_exist_ok=True)
