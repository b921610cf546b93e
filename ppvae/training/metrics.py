"""The metrics of an epoch: plain finite numbers, as metrics.jsonl holds them, and the schedules that follow them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from pyro.optim.lr_scheduler import PyroLRScheduler

from ppvae.errors import TrainingError
from ppvae.inference.svi import SVI
from ppvae.training import checkpoint


def check_metrics(metrics: dict[str, Any], checkpoints: Path | None, source: str = "") -> None:
    """Makes numbers of NumPy and torch plain ones, in place; infinity is allowed, as an ELBO that is minus infinity.

    Args:
        checkpoints: the folder of the run's checkpoints, named in the error.
        source: what has set the metrics, in words.

    Raises:
        TrainingError: a metric is NaN or has NaN in it, or is no number, string or list of them; a name is no string.
    """
    for name, value in metrics.items():
        if not isinstance(name, str):
            raise TrainingError(
                f"epoch {metrics.get('epoch')}: name {name!r} of a metric{source}: expected a string, found "
                f"{type(name).__name__}{last_good(checkpoints)}"
            )
        plain = value.tolist() if hasattr(value, "tolist") else value
        if not _is_plain(plain):
            raise TrainingError(
                f"epoch {metrics.get('epoch')}: metric {name!r}{source} is of type {type(value).__name__}: expected a "
                f"number, a string or a list of them{last_good(checkpoints)}"
            )
        if _has_nan(plain):
            what = "has nan in it" if isinstance(plain, list | tuple) else "is nan"
            raise TrainingError(f"epoch {metrics.get('epoch')}: metric {name!r}{source} {what}{last_good(checkpoints)}")
        metrics[name] = plain


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _has_nan(value: Any) -> bool:
    return any(map(_has_nan, value)) if isinstance(value, list | tuple) else value != value


def last_good(checkpoints: Path | None) -> str:
    """The place of the last checkpoint, as the end of a sentence; empty where there is none."""
    if checkpoints is None or not checkpoint.exists(checkpoints):
        return ""
    return f"; last good checkpoint: {checkpoints}"


def step_scheduler(svi: SVI, scheduler: Any, metric: float) -> None:
    """Steps the learning-rate schedule, if any; ReduceLROnPlateau gets the metric.

    Raises:
        TrainingError: the schedule gives a learning rate that is not finite.
    """
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    if isinstance(svi.optim, PyroLRScheduler):
        svi.optim.step(*([metric] if svi.optim.pt_scheduler_constructor is plateau else []))
    elif isinstance(scheduler, plateau):
        scheduler.step(metric)
    elif scheduler is not None:
        scheduler.step()
    for group in svi.optimizer.param_groups if svi.optimizer is not None else ():
        if not math.isfinite(group["lr"]):
            raise TrainingError(f"the learning-rate schedule gives {float(group['lr'])}: expected a finite number")
