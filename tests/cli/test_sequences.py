"""Sequences of different lengths, from a file through fit, evaluate and generate."""

from __future__ import annotations

import numpy as np
import pytest

from ppvae.cli.main import main

PAIR = """
import torch
from ppvae import likelihoods, nn, posteriors
from ppvae.models import DeepMarkovModel


def dmm(features: int = 3):
    return DeepMarkovModel(
        2,
        posteriors.DiagonalNormal(nn.mlp(2, 4, hidden=(5,))),
        likelihoods.Bernoulli(nn.mlp(2, features, hidden=(5,))),
        nn.Backward(torch.nn.GRU(features, 6, batch_first=True)),
        posteriors.DiagonalNormal(nn.mlp(8, 4, hidden=(5,))),
    )
"""
FIT = ("fit", "pairs.py:dmm", "--data", "seq.npz", "--context", "lengths", "--binarize", "none")


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.savez("seq.npz", x=rng.integers(0, 2, (40, 5, 3)).astype("float32"), lengths=rng.integers(1, 6, 40))
    (tmp_path / "pairs.py").write_text(PAIR)


@pytest.mark.slow
def test_a_run_of_sequences_is_evaluated_and_generates(capsys):
    place = ("--no-flat", "--epochs", "1", "--name", "run", "--no-report")
    assert main([*FIT, *place]) == 0
    assert main(["evaluate", "runs/run", "--num-particles", "20", "--no-report"]) == 0
    assert main(["evaluate", "runs/run", "--num-particles", "20", "--no-report", "--method", "particle_filter"]) == 0
    assert main(["generate", "runs/run"]) == 0
    assert "error" not in capsys.readouterr().err


def test_sequences_that_were_loaded_flat_are_refused_with_the_cure(capsys):
    assert main([*FIT, "--epochs", "1", "--no-report"]) == 1
    assert "found [" in (err := capsys.readouterr().err)
    assert "--no-flat" in err
    assert "data.load(..., flat=False)" in err
