"""A run folder that version 0.1 wrote is loaded, evaluated and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import ppvae
from ppvae.cli.main import main
from ppvae.evaluation import load_estimate
from ppvae.training import checkpoint

FOLDER = Path(__file__).parents[1] / "data_of_0_1" / "run_0_1"
CONFIG = json.loads((FOLDER / "config.json").read_text())


@pytest.fixture
def copy(tmp_path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "run_0_1"))


def test_the_run_is_loaded():
    run = ppvae.load(FOLDER)
    saved = checkpoint.read(FOLDER / "checkpoints")
    assert run.metrics == json.loads((FOLDER / "metrics.jsonl").read_text().splitlines()[-1])
    assert run.config == CONFIG
    assert not run.stopped
    params = [p.detach() for p in run.model.scope.params.values()]
    assert all(torch.equal(p, q) for p, q in zip(params, saved["state"]["params"].values(), strict=True))


def test_the_saved_estimate_is_reproduced():
    saved = load_estimate(FOLDER / "results" / "log_marginal.json")
    run = ppvae.load(FOLDER)
    _, _, test = ppvae.data.load("digits", binarize=CONFIG["data"]["binarize"])
    data = test.head(len(saved.log_px))
    est = ppvae.log_marginal(run.model, run.guide, data, num_particles=saved.num_particles, seed=saved.seed)
    assert est.digest == saved.digest
    assert est.data == saved.data
    assert torch.allclose(est.log_px, saved.log_px, atol=1e-4, rtol=0)
    assert torch.allclose(est.elbo, saved.elbo, atol=1e-4, rtol=0)
    assert torch.equal(est.reliable, saved.reliable)


def test_the_command_line_evaluates_it(copy, capsys):
    before = load_estimate(copy / "results" / "log_marginal.json")
    assert main(["evaluate", str(copy), "--num-particles", "37", "--head", "20", "--no-report"]) == 0
    est = load_estimate(copy / "results" / "log_marginal.json")
    assert f"results: {copy / 'results' / 'log_marginal.json'}" in capsys.readouterr().out
    assert est.num_particles == 37 != before.num_particles
    assert len(est.log_px) == 20
    assert bool(torch.isfinite(est.log_px).all())
    assert float((est.log_px - before.log_px[:20]).abs().mean()) < 2.0


def test_the_command_line_resumes_it(copy, capsys):
    options = ["--latent", "2", "--hidden", "4", "--epochs", "3", "--runs", str(copy.parent), "--name", copy.name]
    assert main(["fit", "ppvae.models:vae", *options, "--resume", "--no-report"]) == 0, capsys.readouterr().err
    first = json.loads((FOLDER / "metrics.jsonl").read_text().splitlines()[0])
    metrics = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    assert [m["epoch"] for m in metrics] == [1, 2, 3]
    assert metrics[0] == first
    assert metrics[2]["valid_elbo"] > metrics[1]["valid_elbo"]
    assert ppvae.load(copy).metrics["epoch"] == 3


def test_resuming_it_is_training_without_a_pause(copy, tmp_path):
    """The third epoch from 0.1's checkpoint is that of three epochs in one go."""
    options = ["--latent", "2", "--hidden", "4", "--epochs", "3", "--runs", str(tmp_path), "--no-report"]
    for name, more in ((copy.name, ["--resume"]), ("whole", [])):
        assert main(["fit", "ppvae.models:vae", *options, "--name", name, *more]) == 0
    resumed, whole = (ppvae.load(tmp_path / name) for name in (copy.name, "whole"))
    for p, q in zip(resumed.model.scope.params.values(), whole.model.scope.params.values(), strict=True):
        assert torch.allclose(p, q, atol=1e-5)
