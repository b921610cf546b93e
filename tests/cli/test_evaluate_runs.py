"""`ppvae evaluate`: in several processes, in double precision, after an interruption, by need, of changed data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ppvae import load
from ppvae.cli.main import main
from ppvae.errors import CheckpointError
from ppvae.evaluation.importance import sampler

ROOT = Path(__file__).parents[2]
PAIRS = Path(__file__).parents[1] / "programs" / "factory_files"
FEW = ["--num-particles", "120", "--head", "130", "--no-report"]


def fitted(folder, pair="ppvae.models:vae", *options):
    words = ["--epochs", "2", "--name", "run", "--runs", str(folder), "--no-report"]
    assert main(["fit", str(pair), *map(str, options), *words]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fitted(tmp_path_factory.mktemp("runs"), "ppvae.models:vae", "--hidden", 16, "--latent", 3)


def told(run, name="log_marginal"):
    """The JSON of a result without its digests, which change with the seconds that the computation took."""
    content = json.loads((run / "results" / f"{name}.json").read_text())
    return {key: value for key, value in content.items() if key not in ("sha256", "files")}


def in_two(*args):
    env = {k: v for k, v in os.environ.items() if k not in ("PPVAE_TRACEBACK", "RANK", "WORLD_SIZE")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ppvae"]
    return subprocess.run([*started, *map(str, args)], capture_output=True, text=True, env=env)


# Several processes


@pytest.mark.slow
def test_two_processes_write_the_result_of_one(run):
    command = ["evaluate", str(run), *FEW, "--dtype", "float64"]
    assert main(command) == 0
    one = told(run)
    done = in_two(*command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results:") == 1
    two = told(run)
    for name, values in one["per_datum"].items():
        found = np.array([values, two["per_datum"][name]], dtype=float)
        np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-9, err_msg=name)
    assert one["digest"] == two["digest"]
    assert one["notes"] == two["notes"]
    assert one["notes"].endswith("; computed in float64")
    assert not list((run / "results").glob("*_blocks"))


def test_an_error_in_two_processes_is_told_once(run):
    done = in_two("evaluate", run, *FEW, "--device", "nonsense")
    assert done.returncode != 0
    assert done.stderr.count("ppvae: error:") == 1
    assert "nonsense" in done.stderr


@pytest.mark.parametrize("command", ["examine", "generate", "compare"])
def test_other_commands_are_refused_in_several_processes(monkeypatch, capsys, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main([command, "ppvae.models:vae"]) == 2
    assert capsys.readouterr().err == (
        f"ppvae: error: ppvae {command}: expected one process, found 2; only ppvae evaluate and fit share their work\n"
    )
    monkeypatch.setenv("RANK", "1")
    main([command, "ppvae.models:vae"])
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


# Double precision


@pytest.mark.parametrize(
    ("pair", "options"),
    [
        ("two_latents.py", []),
        ("conv_batchnorm.py:conv_batchnorm", ["--no-flat"]),
        ("params_only.py", ["--binarize", "none"]),
        ("pyromodule.py:pyromodule", ["--binarize", "none"]),
        ("labelled.py:labelled", ["--labels"]),
    ],
)
def test_any_run_can_be_evaluated_in_float64(tmp_path, pair, options):
    run = fitted(tmp_path, PAIRS / pair, *options)
    found = {}
    for dtype in ("float32", "float64"):
        assert (
            main(["evaluate", str(run), "--num-particles", "2000", "--head", "20", "--no-report", "--dtype", dtype])
            == 0
        )
        found[dtype] = told(run)["per_datum"]
    assert torch.get_default_dtype() == torch.float32
    a, b = (np.array(found[d]["log_px"]) for d in ("float32", "float64"))
    error = np.hypot(*(np.array(found[d]["std_error"]) for d in ("float32", "float64")))
    assert (a != b).any()  # other draws
    assert (np.abs(a - b) < 8 * error + 0.02).all()


def test_a_run_loaded_in_float64_has_the_parameters_of_the_run(run):
    single, double = load(run), load(run, dtype=torch.float64)
    for a, b in zip(single.model.scope.params.values(), double.model.scope.params.values(), strict=True):
        assert (a.dtype, b.dtype) == (torch.float32, torch.float64)
        assert torch.equal(a.double(), b)
    assert torch.get_default_dtype() == torch.float32


# Interruption


def test_an_interrupted_evaluation_goes_on(run, monkeypatch, capsys):
    real, calls = sampler.ImportanceSampler.__call__, []

    def interrupted(self, block, compiled=None):
        calls.append(block.number)
        if len(calls) == 3:  # the second block of the guide, after the one of the refined proposals
            raise KeyboardInterrupt
        return real(self, block, compiled)

    command = ["evaluate", str(run), *FEW, "--split", "train"]
    assert main(command) == 0
    whole = told(run, "log_marginal_train")
    (run / "results" / "log_marginal_train.json").unlink()
    monkeypatch.setattr(sampler.ImportanceSampler, "__call__", interrupted)
    assert main(command) == 130
    assert "the same command goes on from the finished blocks" in capsys.readouterr().err
    assert not (run / "results" / "log_marginal_train.json").exists()
    other = [*command[:3], "60", *command[4:]]  # other settings have blocks of their own
    assert main(other) == 0
    assert calls == [0, 0, 1, 0, 0, 1, 2]
    assert main(command) == 0
    assert calls[7:] == [1, 2]
    again = told(run, "log_marginal_train")
    assert again | {"seconds": 0} == whole | {"seconds": 0}
    assert again["guide_estimate"] == "log_marginal_train_guide.json"
    assert not list((run / "results").glob("*_blocks"))


# By need


def test_particles_by_need(run, capsys):
    words = ["--num-particles", "auto", "--target-std-error", "0.1", "--max-particles", "800", "--head", "60"]
    assert main(["evaluate", str(run), *words]) == 0
    out = capsys.readouterr().out
    assert "within a standard error of 0.1 nats" in out
    content = told(run)
    assert (content["target_std_error"], content["max_particles"]) == (0.1, 800)
    assert set(content["per_datum"]["num_particles"]) <= {100, 200, 400, 800}
    page = (run / "report.html").read_text()
    k = content["per_datum"]["num_particles"]
    assert (f"K = {min(k)} to {max(k)}" if min(k) < max(k) else f"K = {max(k)}") in page


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--num-particles", "some"], "num-particles"),
        (["--num-particles", "0"], "--num-particles: expected at least 1, found 0"),
        (["--num-particles", "auto", "--target-std-error", "0"], "--target-std-error: expected a positive number"),
        (["--num-particles", "auto", "--max-particles", "99"], "--max-particles: expected at least 100, found 99"),
        (["--max-particles", "5000"], "--max-particles: goes with --num-particles auto"),
        (["--method", "annealed", "--num-particles", "auto"], "--num-particles auto: goes with --method importance"),
        (["--dtype", "float16"], "dtype"),
    ],
)
def test_options_that_cannot_be_used(run, capsys, options, words):
    assert main(["evaluate", str(run), *options, "--no-report"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) <= 3


# What the run was trained on, and how far


def test_data_that_have_changed_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    x = torch.bernoulli(torch.full((300, 12), 0.4)).numpy()
    np.save("mine.npy", x)
    run = fitted(tmp_path, PAIRS / "two_latents.py", "--data", "mine.npy", "--binarize", "none")
    config = json.loads((run / "config.json").read_text())
    command = ["evaluate", str(run), "--num-particles", "100", "--no-report"]
    assert main(command) == 0
    capsys.readouterr()
    for changed in (1 - x, x[:200], np.tile(x, (1, 2))):
        np.save("mine.npy", changed)
        assert main(command) == 1
        error = capsys.readouterr().err
        assert "its train data are not what they were" in error
        assert config["fit"]["digest"] in error
        assert len(error.strip().splitlines()) == 1
        now = error.rsplit(" ", 1)[1].strip()
        assert now != config["fit"]["digest"]
        assert len(now) == 64
    np.save("mine.npy", x)
    assert main(command) == 0
    (run / "config.json").write_text(json.dumps(config | {"test": "0" * 64}))
    capsys.readouterr()
    assert main(command) == 1
    assert "config.json and the checkpoint" in capsys.readouterr().err  # which has the digest, too


def test_test_data_that_have_changed_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    parts = {name: torch.bernoulli(torch.full((60, 12), 0.4)).numpy() for name in ("train", "valid", "test")}
    np.savez("mine.npz", **parts)
    run = fitted(tmp_path, PAIRS / "two_latents.py", "--data", "mine.npz", "--binarize", "none")
    command = ["evaluate", str(run), "--num-particles", "100", "--no-report"]
    np.savez("mine.npz", **parts | {"test": 1 - parts["test"]})
    capsys.readouterr()
    assert main(command) == 1
    digest = json.loads((run / "config.json").read_text())["test"]
    assert f"its test data are not what they were: expected SHA-256 {digest}" in capsys.readouterr().err
    assert main([*command, "--split", "valid"]) == 0  # which are what they were


def test_a_run_that_has_not_finished_says_so(tmp_path, run, monkeypatch, capsys):
    """Interrupted in its third epoch, and evaluated as it stands."""
    from ppvae.training import trainer as room

    assert load(run).stopped == ""
    real = room.Trainer._run_epoch

    def stopped(self):
        if self.epoch == 2:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(room.Trainer, "_run_epoch", stopped)
    monkeypatch.setattr(room.time, "monotonic", iter(range(0, 10**6, 100)).__next__)  # a checkpoint every epoch
    words = ["--epochs", "50", "--name", "half", "--runs", str(tmp_path), "--no-report"]
    assert main(["fit", str(PAIRS / "two_latents.py"), *words]) == 130
    half = tmp_path / "half"
    assert load(half).stopped == "the run stopped at epoch 2 of 50"
    capsys.readouterr()
    assert main(["evaluate", str(half), "--num-particles", "100", "--head", "10", "--no-report"]) == 0
    assert "the run stopped at epoch 2 of 50" in capsys.readouterr().out
    assert told(half)["notes"].endswith("; the run stopped at epoch 2 of 50")


def test_a_run_without_a_checkpoint_is_refused(tmp_path, run):
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    with pytest.raises(CheckpointError):
        load(tmp_path)
