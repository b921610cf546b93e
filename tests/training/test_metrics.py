"""NaN outside of a step, in a monitor, a callback's metric, a schedule: training stops as in a step."""

from __future__ import annotations

import functools
import json
import math

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from ppvae import fit
from ppvae.errors import TrainingError
from ppvae.models import LinearGaussian
from ppvae.objectives import ELBO
from ppvae.training import checkpoint
from ppvae.training.validation import ValidationMetrics


def trained(folder, **options):
    torch.manual_seed(0)
    pair, x = LinearGaussian(3, 2), torch.randn(40, 3)
    options = {"epochs": 4, "batch_size": 20, "checkpoint_seconds": 0, "directory": folder, "valid": x} | options
    return pair, fit(pair.model, pair.mean_field, x, **options)


def setting(value, at: int = 3):
    """A callback that sets a metric."""

    def callback(run, metrics):
        metrics["mine"] = value if metrics["epoch"] == at else 0.5

    return callback


def strict(folder) -> list[dict]:
    def refuse(text):
        raise AssertionError(text)

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


@pytest.mark.parametrize("value", [math.nan, np.float32("nan"), torch.tensor(math.nan)])
def test_a_callbacks_nan_stops_training(tmp_path, value):
    with pytest.raises(TrainingError, match=r"epoch 3: metric 'mine' of a callback is nan; last good checkpoint: .*"):
        trained(tmp_path, callbacks=[setting(value)])
    assert checkpoint.read(tmp_path / "checkpoints")["epoch"] == 2
    assert [m["epoch"] for m in strict(tmp_path)] == [1, 2]


@pytest.mark.parametrize("value", [[1.0, math.nan], (0.0, [math.nan]), np.array([0.0, math.nan])])
def test_nan_in_a_list_stops_training(tmp_path, value):
    with pytest.raises(TrainingError, match=r"epoch 3: metric 'mine' of a callback has nan in it; last good"):
        trained(tmp_path, callbacks=[setting(value)])
    assert [m["epoch"] for m in strict(tmp_path)] == [1, 2]


def test_a_parameter_that_a_callback_makes_nan_is_not_saved(tmp_path):
    def callback(run, metrics):
        if metrics["epoch"] == 3:
            next(iter(run.model.scope.params.values())).data.fill_(math.nan)

    with pytest.raises(TrainingError, match=r"epoch 3: 'state' 'params' .* is NaN, as a callback .*; last good check"):
        trained(tmp_path, callbacks=[callback])
    assert checkpoint.read(tmp_path / "checkpoints")["epoch"] == 2


def test_a_name_of_a_metric_that_json_has_not_is_named(tmp_path):
    with pytest.raises(TrainingError, match=r"name \(1, 2\) of a metric of a callback: expected a string, found tuple"):
        trained(tmp_path, callbacks=[lambda run, metrics: metrics.update({(1, 2): 0.5})])


@pytest.mark.parametrize("value", [object(), {1: 2}, [object()], lambda: 0])
def test_a_metric_that_is_no_number_is_named(tmp_path, value):
    with pytest.raises(TrainingError, match=r"metric 'mine' of a callback is of type \w+: expected a number"):
        trained(tmp_path, callbacks=[setting(value)])
    assert [m["epoch"] for m in strict(tmp_path)] == [1, 2]


def test_metrics_are_plain_and_strict_json(tmp_path):
    values = [np.float32(0.5), torch.tensor([1.0, 2.0]), np.int64(3), "text", -math.inf, None, True]
    callbacks = [lambda run, m: m.update({f"mine {i}": value for i, value in enumerate(values)})]
    _, run = trained(tmp_path, callbacks=callbacks)
    for metrics, line in zip(run.history, strict(tmp_path), strict=True):
        assert [metrics[f"mine {i}"] for i in range(7)] == [0.5, [1.0, 2.0], 3, "text", -math.inf, None, True]
        assert line == {k: "-inf" if v == -math.inf else v for k, v in metrics.items()}
    assert len(trained(tmp_path, epochs=5, resume=True)[1].history) == 5


def test_nan_of_the_monitor_stops_training(tmp_path, monkeypatch):
    real, calls = ValidationMetrics.__call__, []

    def broken(self, *args):
        calls.append(1)
        return real(self, *args) | ({"valid_rate": math.nan} if len(calls) == 3 else {})

    monkeypatch.setattr(ValidationMetrics, "__call__", broken)
    with pytest.raises(TrainingError, match=r"\(epoch 3\): valid_rate is nan; .*last good checkpoint"):
        trained(tmp_path)
    assert checkpoint.read(tmp_path / "checkpoints")["epoch"] == 2


def test_nan_of_a_schedule_stops_training(tmp_path):
    schedule = functools.partial(lr_scheduler.LambdaLR, lr_lambda=lambda epoch: math.nan if epoch == 2 else 1.0)
    with pytest.raises(TrainingError, match="the learning-rate schedule gives nan"):
        trained(tmp_path, scheduler=schedule)
    assert all(m["lr"] == 1e-3 for m in strict(tmp_path))
    with pytest.raises(TrainingError, match="nan"):
        trained(tmp_path / "beta", objective=ELBO(beta=lambda step: math.nan if step >= 4 else 1.0))
    assert checkpoint.read(tmp_path / "beta" / "checkpoints")["epoch"] < 3
