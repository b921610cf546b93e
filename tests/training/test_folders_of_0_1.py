"""A run folder that version 0.1 wrote is loaded, evaluated and resumed."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch

import ppvae
from ppvae.cli.main import main
from ppvae.errors import CheckpointError
from ppvae.evaluation import load_estimate
from ppvae.models import LinearGaussian
from ppvae.objectives import ELBO
from ppvae.objectives.auxiliary import AuxiliaryLoss
from ppvae.training import checkpoint
from ppvae.training.setting_text import setting_text

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
    est = ppvae.log_marginal(
        run.model, run.guide, data, num_particles=saved.num_particles, seed=saved.seed, proposal="guide"
    )
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


def test_a_run_with_an_auxiliary_loss_resumes_under_its_new_name(tmp_path, monkeypatch):
    pair, x = LinearGaussian(3, 2), torch.randn(40, 3)
    objective = AuxiliaryLoss(ELBO(2), _first_column, weight=3.0)
    text = (  # as 0.1 wrote it
        "Plus(gradient=Pathwise(), ignore_jit_warnings=False, jit_options=None, num_particles=2, "
        "of=ELBO(num_particles=2), retain_graph=None, separate=True, strict_enumeration_warning=True, "
        "tail_adaptive_beta=-1.0, term=_first_column, vectorize_particles=True, weight=3.0)"
    )
    options = {"directory": tmp_path / "run", "objective": objective, "batch_size": 20, "progress": False}
    with monkeypatch.context() as m:
        m.setattr(
            importlib.import_module("ppvae.training.fit"),
            "setting_text",
            lambda s: text if s is objective else setting_text(s),
        )
        ppvae.fit(pair.model, pair.guide, x, epochs=1, **options)
    assert ppvae.fit(pair.model, pair.guide, x, epochs=2, resume=True, **options).history[-1]["epoch"] == 2
    options["objective"] = AuxiliaryLoss(ELBO(2), _first_column, weight=2.0)
    with pytest.raises(CheckpointError, match=r"objective"):
        ppvae.fit(pair.model, pair.guide, x, epochs=3, resume=True, **options)


def _first_column(x: torch.Tensor) -> torch.Tensor:
    return x[:, 0]
