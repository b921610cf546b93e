"""The commands on pairs with global latents: check, fit on mini-batches, evaluate, compare, report."""

import json
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import pytest
import torch

from ppvae import load
from ppvae.cli.main import main

PAIR = f"{Path(__file__).parents[1] / 'programs' / 'factory_files' / 'shared_mean.py'}:pair"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    x = np.random.default_rng(0).normal(1.0, 1.0, (120, 2)).astype(np.float32)
    np.savez(folder / "x.npz", train=x[:80], valid=x[80:100], test=x[100:])
    options = ["--data", str(folder / "x.npz"), "--binarize", "none", "--epochs", "15", "--batch-size", "25"]
    options += ["--optimizer.lr", "0.1", "--runs", str(folder), "--compile", "no"]
    for name, scale in {"right": "1.0", "narrow": "0.5"}.items():
        assert main(["fit", PAIR, *options, "--scale", scale, "--name", name, "--no-report"]) == 0
    return folder


def test_check_says_which_latent_is_global(folder, capsys):
    assert main(["check", PAIR, "--data", str(folder / "x.npz"), "--binarize", "none"]) == 0
    out = capsys.readouterr().out
    assert "model site 'mean': latent, Normal over event [2], shared by all data" in out
    assert "log_marginal(..., conditional=True) and loo give numbers per datum" in out


def test_predictive_densities_are_evaluated_and_compared(folder, capsys):
    capsys.readouterr()
    assert main(["evaluate", str(folder / "right")]) == 1
    assert "--conditional" in capsys.readouterr().err  # the cure, followed next
    for name, report in {"right": [], "narrow": ["--no-report"]}.items():
        assert main(["evaluate", str(folder / name), "--conditional", "--num-particles", "2000", *report]) == 0
    assert "predictive density of each datum" in capsys.readouterr().out
    assert "predictive density" in (folder / "right" / "report.html").read_text()
    result = json.loads((folder / "right" / "results" / "log_marginal.json").read_text())
    found, error = (torch.tensor(result["per_datum"][key]) for key in ("log_px", "std_error"))
    run = load(folder / "right")
    x = torch.tensor(np.load(folder / "x.npz")["test"])
    loc, log_scale = (run.model.scope.params[n].detach() for n in sorted(run.model.scope.params))
    exact = dist.Normal(loc, (1 + (2 * log_scale).exp()).sqrt()).log_prob(x).sum(1)
    assert float(((found - exact).abs() / error).max()) < 5  # of 20 data: by chance below 1e-4
    assert main(["compare", str(folder / "right"), str(folder / "narrow")]) == 0
    out = capsys.readouterr().out
    assert "narrow" in out
    assert "from right: worse in these runs" in out


def test_options_that_do_not_go_together_are_told(folder, capsys):
    for words, message in (
        (["--bracket", "3"], "--bracket: does not go with --conditional"),
        (["--proposal", "guide"], "--proposal: does not go with --conditional"),
        (["--num-particles", "auto"], "--num-particles auto: does not go with --conditional"),
        (["--method", "annealed"], "--conditional: goes with --method importance"),
    ):
        capsys.readouterr()
        assert main(["evaluate", str(folder / "right"), "--conditional", *words]) == 2
        assert message in capsys.readouterr().err
