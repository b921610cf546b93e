"""Every experiment runs with --smoke, keeps its cells, and does not compute them twice."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments import cells, gpu, readme
from experiments.bench import SMOKE
from ppvae.training import checkpoint

OTHERS = {
    "__init__",
    "cells",
    "readme",
    "load",
    "soak",
    "published_rows",
    "release",
    "weights",
    "gpu",
    "scaling",
    "streaming",
}  # without cells
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


def test_a_cell_that_needs_an_absent_package_is_skipped_by_name(tmp_path, monkeypatch, capsys):
    from experiments import peers

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    peers.main(["--smoke", "--rows", "table/scikit-learn", "table/statsmodels"])
    said = capsys.readouterr().out
    assert "peers tablestatsmodels-0: skipped, statsmodels is not installed" in said
    assert "| table | scikit-learn | 1 |" in said
    assert [path.name for path in (tmp_path / "runs" / "smoke" / "peers").glob("*.json")] == [
        "tablescikit-learn-0.json"
    ]


class OfScvi(torch.nn.Module):
    """What `peers.pair_of_scvi` reads of the module of scvi-tools, with linear networks."""

    def __init__(self):
        super().__init__()
        self.n_latent, self.shares = 2, torch.nn.Linear(2, 4)
        self.px_r = torch.nn.Parameter(torch.randn(4))
        self.q_z, self.q_library = torch.nn.Linear(4, 2), torch.nn.Linear(4, 1)
        self.register_buffer("library_log_means", torch.tensor([[2.0]]))
        self.register_buffer("library_log_vars", torch.tensor([[0.25]]))

    def decoder(self, dispersion, z, library, batch):
        shares = self.shares(z).softmax(-1)
        return shares, None, library.exp() * shares, None

    def z_encoder(self, x, batch):
        return torch.distributions.Normal(self.q_z(x), 0.5), None

    def l_encoder(self, x, batch):
        return torch.distributions.Normal(self.q_library(x), 0.1), None


def test_log_weights_of_a_module_of_scvi_are_those_of_scipy():
    """log p(z) + log p(log l) + log NB(x; l * shares, exp(px_r)) - log q(z, log l | x), with every constant."""
    from scipy import stats

    from experiments import peers
    from ppvae import terms

    torch.manual_seed(0)
    module, x = OfScvi().double(), torch.randint(0, 6, (5, 4)).double()
    pair, batch = peers.pair_of_scvi(module), peers.with_batch(x)
    with torch.no_grad():
        found = terms(pair.model, pair.guide, batch, 3)
        z, library = (found.guide[name].value for name in ("z", "log_library"))
        assert z.shape == (3, 5, 2)
        concentration, mean = module.px_r.exp(), module.decoder("gene", z, library, None)[2]
        expected = stats.nbinom.logpmf(x, concentration, concentration / (concentration + mean)).sum(-1)
        expected += stats.norm.logpdf(z).sum(-1) + stats.norm.logpdf(library, 2.0, 0.5).sum(-1)
        expected -= stats.norm.logpdf(z, module.q_z(x.log1p()), 0.5).sum(-1)
        expected -= stats.norm.logpdf(library, module.q_library(x.log1p()), 0.1).sum(-1)
    assert found.log_weight.numpy() == pytest.approx(expected, rel=1e-9)


def test_published_rows_are_named_by_only_and_again():
    from experiments.published import rows_of

    assert rows_of(["--only", "frey", "S-VAE", "--seeds", "1"]) == ["--rows", "frey", "S-VAE", "--seeds", "1"]
    assert rows_of(["--again", "frey"]) == ["--again", "--rows", "frey"]
    assert rows_of(["--again", "--seeds", "1"]) == ["--again", "--seeds", "1"]
    assert rows_of(["--again"]) == ["--again"]


def test_estimates_of_the_first_data_carry_over_to_all(tmp_path):
    """The difference estimator against the exact log p(x); by chance off by 5 standard errors: 6e-7, in each of two."""
    from experiments import published
    from ppvae.data.split import Split, SplitInfo
    from ppvae.models import LinearGaussian
    from ppvae.training.run import Run

    torch.manual_seed(0)
    pair = LinearGaussian(6, 4, 0.3)
    with torch.no_grad():
        x = torch.randn(600, 4) @ pair.weight.T + 0.3 * torch.randn(600, 6)
        exact = float(-pair.log_px(x).mean())
    split = Split(x, SplitInfo("simulated/test", (6,), 600, unit=False))
    s = published.Settings(num_refined=200, refined_particles=1000, coarse_particles=1)
    run = Run(pair.model, pair.mean_field, [])
    found = published.evaluate(s, run, split, particles=5000, seed=0, folder=tmp_path)
    coarse = -published.log_marginal(
        pair.model, pair.mean_field, split, num_particles=1, proposal="guide"
    ).log_px.mean()
    assert found["num_particles"] == 5000
    assert found["num_first"] == 200
    for name in ("", "refined_"):
        assert abs(found[f"{name}nll"] - exact) < 5 * found[f"{name}error"] + 0.06  # L_5000 is 0.045 above
        assert abs(float(coarse) - exact) > 5 * found[f"{name}error"] + 0.06  # which L_1 of all does not reach
        assert found[f"{name}error"] < 0.2
    assert sum(found["groups"]) / len(found["groups"]) == pytest.approx(-found["nll"], abs=1e-4)


SMALL = ["--data", "digits", "--epochs", "2", "--hidden", "8", "8", "--num-refined", "20"]
SMALL += ["--refined-particles", "50", "--coarse-particles", "50"]


@pytest.mark.slow
def test_rows_continue_kept_stages_and_again_trains_them(tmp_path, monkeypatch):
    """A clone has the results and no runs: a chain's first stage is its kept one, to the last bit; `--again` reads no
    kept weights, here damaged ones."""
    from experiments import published

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cells, "RESULTS", tmp_path / "results")
    published.main(["--only", "1-VAE-1", *SMALL])
    kept = tmp_path / "results" / "published" / "weights"
    (first,) = kept.iterdir()
    held = checkpoint.read(first / "checkpoints")
    assert held["optimizer"] == {}
    assert held["row"] is None  # no datum
    assert {p.dtype for p in held["state"]["params"].values()} == {torch.float32}
    before = {path.name: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    os.rename("runs", "elsewhere")  # a stage that ran again would have other seconds in its metrics
    published.main(["--only", "1-IWAE-5", *SMALL])
    assert {path.name: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    (second,) = set(kept.iterdir()) - {first}
    of_chain = published.load(tmp_path / "runs" / "experiments" / "published" / "stages" / first.name)
    assert all(
        torch.equal(a, b)
        for a, b in zip(of_chain.model.scope.params.values(), held["state"]["params"].values(), strict=True)
    )
    (cell,) = (tmp_path / "results" / "published").glob("1-IWAE-5*.json")
    stored = json.loads(cell.read_text())["result"]
    assert stored["epochs"] == 4  # of both stages
    assert published.load(second).metrics["valid_elbo"] == stored["valid_elbo"]

    for path in first.glob("checkpoints/*.pt"):
        path.write_bytes(b"damaged")
    published.main(["--again", "1-VAE-1", *SMALL])
    (again,) = (tmp_path / "runs" / "again" / "published" / "stages").iterdir()
    assert checkpoint.read(again / "checkpoints")["optimizer"]  # trained here
    assert first.name == again.name


@pytest.mark.slow
@pytest.mark.parametrize("row", ["frey", "2-VAE-1"])
def test_a_released_run_evaluates_to_the_figures_of_its_row(row, tmp_path, monkeypatch, capsys):
    from experiments import published, release
    from ppvae.cli.main import main
    from ppvae.evaluation import load_estimate

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "trained"))
    published.main(["--smoke", "--rows", row])
    shutil.rmtree("runs/smoke/published/stages")  # as in a clone, and by a user who has trained nothing
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "cloned"))
    release.main(["--smoke", "--to", "release"])
    argv = ["evaluate", f"release/{row}-0", "--head", "20", "--num-particles", "50", "--guide-particles", "50"]
    assert main([*argv, "--bracket", "0", "--no-report"]) == 0
    cell = json.loads(Path(f"release/{row}-0/published.json").read_text())["result"]
    est = load_estimate(f"release/{row}-0/results/log_marginal.json")
    assert est.nll == pytest.approx(cell["refined_first"], abs=1e-6)
    assert est.guide_estimate.nll == pytest.approx(cell["first"], abs=1e-6)
    assert f"{cell['refined_first']:.3f}" in capsys.readouterr().out
    (path,) = Path("runs/smoke/published").glob("*.json")
    other = json.loads(path.read_text())
    other["result"]["valid_elbo"] += 1e-9
    path.write_text(json.dumps(other))
    with pytest.raises(SystemExit, match=f"is not the run of {row}-0"):
        release.main(["--smoke", "--to", "release"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["load", "soak", "scaling", "streaming"])
def test_what_runs_commands_of_its_own(name, tmp_path):
    env = os.environ | {"PYTHONPATH": str(Path(cells.__file__).parents[1]), "XDG_CONFIG_HOME": str(tmp_path)}
    command = [sys.executable, "-m", f"experiments.{name}", "--smoke"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


GPU = {
    "exact log p(x)": gpu.exact, "compiled steps": lambda device: gpu.compiled_steps(device, SMOKE),
    "precisions": lambda device: gpu.precisions(device, SMOKE), "resumed run": gpu.resumed,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", GPU)
def test_the_checks_of_a_gpu_hold_on_the_cpu(name):
    assert GPU[name](torch.device("cpu")).startswith("right")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", GPU)
def test_the_checks_of_a_gpu_hold_on_it(name):
    assert GPU[name](torch.device("cuda")).startswith("right")


def test_without_a_gpu_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        gpu.main([])
    assert end.value.code == 1
    assert "expected a GPU that torch can use, found none" in capsys.readouterr().err


@pytest.mark.slow
def test_the_rows_of_a_gpu_are_made(tmp_path, capsys):
    gpu.main(["--device", "cpu", "--smoke", "--minutes", "0.1", "--output", str(tmp_path / "gpu.json")])
    assert len(json.loads((tmp_path / "gpu.json").read_text())["rows"]) == 15
