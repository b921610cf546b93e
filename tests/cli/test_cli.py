"""The command line: strangers' pairs go all the way through; whatever is wrong gives one short error that names it."""

import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch

from ppvae import load
from ppvae.cli.main import COMMANDS, main
from ppvae.cli.option_checks import check_evaluate
from ppvae.cli.options import Evaluate
from ppvae.errors import UsageError
from ppvae.evaluation import load_estimate

PAIRS = Path(__file__).parents[1] / "programs" / "factory_files"
REPORT = importlib.util.find_spec("ppvae.report") is not None
needs_report = pytest.mark.skipif(not REPORT, reason="ppvae.report is not written yet")
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b12\nsize 9\n"
HTML = b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>"


@dataclasses.dataclass
class Result:
    status: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch, tmp_path, capsys):
    """Runs a command in this process and in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("PPVAE_TRACEBACK", "PPVAE_DATA"):
        monkeypatch.delenv(name, raising=False)

    def run(*args) -> Result:
        capsys.readouterr()
        status = main([str(a) for a in args])
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return run


@pytest.fixture
def fails(cli):
    """Runs a command that must end in one short error, and gives the error."""

    def run(*args, names=(), status=None) -> str:
        result = cli(*args)
        check_error(result, names, status)
        return result.err

    return run


def check_error(result: Result, names=(), status=None) -> None:
    assert result.status != 0
    if status is not None:
        assert result.status == status, result.err
    assert result.err.startswith("ppvae: error: ")
    assert 1 <= len(result.err.strip().splitlines()) <= 3, result.err
    assert "Traceback" not in result.err + result.out
    for name in names:
        assert str(name) in result.err, result.err


def shell(*args, **kwargs) -> Result:
    """The same by a process of its own."""
    env = {k: v for k, v in os.environ.items() if k not in ("PPVAE_TRACEBACK", "PPVAE_DATA")}
    done = subprocess.run(
        [sys.executable, "-m", "ppvae", *map(str, args)], capture_output=True, text=True, env=env, **kwargs
    )
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A finished run of two epochs, not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    place = ["--runs", str(folder), "--name", "run", "--no-report"]
    assert main(["fit", "ppvae.models:vae", "--epochs", "2", "--hidden", "16", "--latent", "3", *place]) == 0
    return folder / "run"


@pytest.fixture
def run_copy(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def checkpoint_of(run: Path) -> Path:
    return run / "checkpoints" / (run / "checkpoints" / "last").read_text()


# Strangers' pairs


STRANGERS = {
    "two_latents": ("two_latents.py", []),
    "conv_batchnorm": ("conv_batchnorm.py:conv_batchnorm", ["--no-flat"]),
    "params_only": ("params_only.py", ["--binarize", "none"]),
    "pyromodule": ("pyromodule.py:pyromodule", ["--binarize", "none"]),
    "labelled": ("labelled.py:labelled", ["--labels"]),
}


MODULES = {  # what `check` says of the modules that a pair registers, where they are not two plain networks
    "two_latents": [("up", "Gaussian"), ("top", "Gaussian"), ("down", "Gaussian"), ("out", "Sequential")],
    "conv_batchnorm": [("encoder", "Encoder"), ("decoder", "Decoder")],
    "params_only": [],
    "pyromodule": [("decoder", "PyroSequential"), ("encoder", "PyroLinear")],
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_strangers_pair_goes_all_the_way(cli, tmp_path, name):
    pair, options = STRANGERS[name]
    pair = PAIRS / pair
    checked = cli("check", pair, *options)
    assert checked.status == 0, checked.err
    assert "data plate 'data'" in checked.out
    assert "model site 'x': observed" in checked.out
    modules = re.findall(r"^(\w+): (\w+), .*\b\d+ parameters", checked.out, re.M)
    assert modules == MODULES.get(name, [("encoder", "Sequential"), ("decoder", "Sequential")])

    fitted = cli("fit", pair, *options, "--epochs", 2, "--name", "run", "--no-report")
    assert fitted.status == 0, fitted.err
    run = tmp_path / "runs" / "run"
    epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["epoch"] for m in epochs] == [1, 2]
    assert epochs[1]["valid_elbo"] > epochs[0]["valid_elbo"]

    for given in ("run", Path("runs") / "run"):  # by name, and by folder
        evaluated = cli("evaluate", given, "--num-particles", 100, "--no-report")
        assert evaluated.status == 0, evaluated.err
        assert "NLL" in evaluated.out
    result = json.loads((run / "results" / "log_marginal.json").read_text())
    assert result["num_particles"] == 100
    assert result["num_data"] == 360
    assert len(result["per_datum"]["log_px"]) == 360
    assert -result["nll"] >= result["elbo"]  # the bound of 100 particles is above that of one, on average
    assert len(pyro.get_param_store()) == 0  # nothing leaks out of a command
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


@needs_report
@pytest.mark.parametrize("name", STRANGERS)
def test_a_strangers_pair_generates(cli, tmp_path, name):
    pair, options = STRANGERS[name]
    assert cli("fit", PAIRS / pair, *options, "--epochs", 1, "--name", "run", "--no-report").status == 0
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    generated = cli("generate", "run", "--count", 5)
    assert generated.status == 0, generated.err
    written = [Path(line) for line in generated.out.splitlines()]
    assert written
    for path in written:
        assert path.is_file()
        assert path.stat().st_size > 0
    assert {p for p in tmp_path.rglob("*") if p.is_file()} > before


@needs_report
def test_a_report_is_written(cli, tmp_path):
    result = cli("fit", "ppvae.models:vae", "--epochs", 1, "--hidden", 8, "--name", "run")
    assert result.status == 0, result.err
    page = (tmp_path / "runs" / "run" / "report.html").read_text()
    assert "<html" in page
    assert str(tmp_path) not in page
    assert cli("evaluate", "run", "--num-particles", 50).status == 0
    assert (tmp_path / "runs" / "run" / "report.html").read_text() != page


def test_evaluate_and_generate_take_a_head_a_split_and_the_best(cli, trained):
    result = cli("evaluate", trained, "--split", "valid", "--head", 20, "--num-particles", 30, "--no-report")
    assert result.status == 0, result.err
    content = json.loads((trained / "results" / "log_marginal_valid.json").read_text())
    assert (content["num_data"], content["num_particles"]) == (20, 30)
    again = cli("evaluate", trained, "--head", 7, "--num-particles", 30, "--best", "--no-report")
    assert again.status == 0, again.err


def test_best_is_a_plain_flag(cli, trained, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "ppvae.cli.common.load", lambda folder, best, **options: asked.append(best) or load(folder, best=best)
    )
    for options in ([], ["--best"]):
        result = cli("evaluate", trained, "--head", 3, "--num-particles", 100, "--no-report", *options)
        assert result.status == 0, result.err
    assert asked == [None, True]  # without it, what the run ended with


def test_the_same_command_twice_gives_the_same_weights(cli, tmp_path):
    states = []
    for name in ("a", "b"):
        torch.manual_seed(random.getrandbits(30))  # what came before does not count
        assert cli("fit", PAIRS / "labelled.py", "--labels", "--epochs", 1, "--name", name, "--no-report").status == 0
        saved = torch.load(checkpoint_of(tmp_path / "runs" / name), weights_only=True)
        states.append(saved["state"]["params"])
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_runs_get_names_of_their_own(cli, tmp_path):
    for _ in range(2):
        result = cli("fit", PAIRS / "params_only.py", "--binarize", "none", "--epochs", 1, "--no-report")
        assert result.status == 0, result.err
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["params_only-digits", "params_only-digits-2"]


def test_the_pair_is_found_from_another_folder(cli, tmp_path, monkeypatch):
    shutil.copy(PAIRS / "two_latents.py", tmp_path / "mine.py")
    assert cli("fit", "mine.py", "--epochs", 1, "--name", "run", "--no-report").status == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = cli("evaluate", tmp_path / "runs" / "run", "--num-particles", 100, "--head", 3, "--no-report")
    assert result.status == 0, result.err


def test_a_factorys_flags_come_from_its_signature(cli, tmp_path):
    result = cli("fit", PAIRS / "two_latents.py", "--help")
    assert result.status == 0
    for text in ("--z1", "the size of the lower latent", "--epochs", "--optimizer.lr"):
        assert text in result.out
    assert "--train" not in result.out
    options = ["--z1", 5, "--hidden", 9, "--epochs", 1, "--name", "run", "--no-report"]
    assert cli("fit", PAIRS / "two_latents.py", *options).status == 0
    config = json.loads((tmp_path / "runs" / "run" / "config.json").read_text())
    assert config["pair"]["arguments"] == {"z1": 5, "z2": 3, "hidden": 9}


def test_a_tuple_of_widths_survives_the_config(cli, tmp_path):
    options = ["--hidden", 12, 9, "--epochs", 1, "--name", "run", "--no-report"]
    assert cli("fit", "ppvae.models:vae", *options).status == 0
    assert json.loads((tmp_path / "runs/run/config.json").read_text())["pair"]["arguments"]["hidden"] == [12, 9]
    assert cli("evaluate", "run", "--num-particles", 100, "--head", 3, "--no-report").status == 0


def test_the_librarys_own_factories(cli):
    for pair, options in (
        ("ppvae.models:conv_vae", ["--no-flat", "--channels", 4, 8, "--hidden", 16]),
        ("ppvae.models:linear_gaussian", ["--binarize", "none", "--scale", 0.3]),
        ("ppvae.models:factor_analysis", ["--binarize", "none", "--latent", 3]),
        ("ppvae.models:gaussian_mixture", ["--binarize", "none", "--rank", 2, "--objective", "ELBO"]),
    ):
        result = cli("fit", pair, *options, "--epochs", 1, "--name", pair.split(":")[1], "--no-report")
        assert result.status == 0, result.err
        result = cli("evaluate", pair.split(":")[1], "--num-particles", 100, "--head", 9, "--no-report")
        assert result.status == 0, result.err


# Parts and objectives by name


DISCRETE = ["--prior", "Categorical", "--prior.classes", 3, "--prior.variables", 2]
DISCRETE += ["--posterior", "Categorical", "--posterior.classes", 3, "--enumerate", "--objective", "TraceEnum_ELBO"]
CHOSEN = {  # options, and what the configuration then says of the parts
    "VampPrior": (["--prior", "VampPrior", "--prior.components", 9], {"prior": {"components": 9, "noise": 0.01}}),
    "mixture": (["--prior", "MixtureOfNormals", "--prior.components", 4], {"prior": {"components": 4}}),
    "MAF": (["--prior", "MAF", "--prior.hidden", 8, 9], {"prior": {"transforms": 3, "hidden": [8, 9]}}),
    "spline": (["--prior=NeuralSpline", "--prior.bins=4", "--prior.hidden=8"], {"prior": {"bins": 4}}),
    "IAF": (["--posterior", "IAF", "--posterior.flows", 1], {"posterior": {"flows": 1, "features": 16}}),
    "full rank": (["--posterior", "FullRank"], {"posterior": {}}),
    "enumerated": (DISCRETE, {"prior": {"classes": 3}, "posterior": {"classes": 3}}),
    "sphere": (["--prior", "UniformOnSphere", "--posterior", "PowerSpherical"], {"prior": {}}),
    "of labels": (["--prior", "ConditionalNormal", "--labels"], {"prior": {}}),
    "levels": (
        ["--binarize", "none", "--likelihood", "DiscretizedLogistic", "--likelihood.levels", 17],
        {"likelihood": {"levels": 17}},
    ),
    "scale": (["--likelihood", "Normal", "--likelihood.scale", "learned"], {"likelihood": {"scale": "learned"}}),
    "images": (
        ["--no-flat", "--channels", 2, 4, "--prior", "RealNVP", "--likelihood", "Laplace", "--likelihood.floor", 0.1],
        {"likelihood": {"floor": 0.1}},
    ),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_parts_by_name_go_all_the_way(cli, tmp_path, name):
    options, expected = CHOSEN[name]
    factory = "conv_vae" if name == "images" else "vae"
    small = ["--latent", 3, "--hidden", 8, "--epochs", 1, "--batch-size", 300, "--name", "run", "--no-report"]
    fitted = cli("fit", f"ppvae.models:{factory}", *options, *small)
    assert fitted.status == 0, fitted.err
    config = json.loads((tmp_path / "runs" / "run" / "config.json").read_text())["pair"]["arguments"]
    for role, own in expected.items():
        assert config[role]["name"] in options or f"--{role}={config[role]['name']}" in options
        assert own.items() <= config[role].items()
    evaluated = cli("evaluate", "run", "--num-particles", 100, "--head", 20, "--no-report")
    assert evaluated.status == 0, evaluated.err
    run = load("runs/run")
    saved = torch.load(checkpoint_of(tmp_path / "runs" / "run"), weights_only=True)["state"]["params"]
    assert {k.rsplit("$$$")[-1] for k in saved} == {k.rsplit("$$$")[-1] for k in run.model.scope.params}
    assert sum(p.numel() for p in run.model.scope.params.values()) == sum(p.numel() for p in saved.values())


def test_a_point_is_fitted_and_not_evaluated(cli, fails):
    place = ["--hidden", 8, "--epochs", 1, "--name", "run", "--no-report"]
    assert cli("fit", "ppvae.models:vae", "--posterior", "Delta", *place).status == 0
    fails("evaluate", "run", "--num-particles", 3, "--no-report", names=("'z'", "Delta", "continuous"), status=1)


def test_parts_from_a_config_file(cli, tmp_path):
    (tmp_path / "parts.toml").write_text(
        'latent = 3\n\n[prior]\nname = "MixtureOfNormals"\ncomponents = 4\n\n'
        '[objective]\nname = "IWAE"\nnum_particles = 2\n'
    )
    options = ["--hidden", 8, "--epochs", 1, "--name", "run", "--no-report", "--prior.components", 6]
    result = cli("fit", "ppvae.models:vae", "--config", "parts.toml", *options)
    assert result.status == 0, result.err
    config = json.loads((tmp_path / "runs" / "run" / "config.json").read_text())
    assert config["pair"]["arguments"]["prior"] == {"name": "MixtureOfNormals", "components": 6}
    assert re.match(r"IWAE\(.*num_particles=2\b", config["fit"]["objective"])


def test_help_lists_parts_and_the_chosen_ones_options(cli):
    shown = cli("fit", "ppvae.models:vae", "--prior", "VampPrior", "--help").out
    words = " ".join(shown.split())
    for text in ("MixtureOfNormals", "DiscretizedLogistic", "FullRank", "the number of pseudo-inputs.", "IWAE"):
        assert text in words
    for flag in ("--prior.components", "--prior.noise", "--objective.num-particles"):
        assert flag in shown
    for flag in ("--prior.latent", "--prior.posterior", "--prior.data", "--posterior.net", "--num-labels", "--train"):
        assert flag not in shown


def test_parts_that_cannot_be(fails):
    pair = "ppvae.models:vae"

    def wrong(*options, names, status=2):
        for command in ("check", "fit"):
            error = fails(command, pair, *options, names=names, status=status)
            assert len(error.strip().splitlines()) == 1

    wrong("--prior", "Mixture", names=("--prior", "'Mixture'", "did you mean 'MixtureOfNormals'"))
    wrong("--posterior", "VampPrior", names=("--posterior", "'VampPrior'", "ppvae.posteriors"))
    wrong("--prior", "MAF", "--prior.components", 3, names=("--prior.components", "MAF takes", "--prior.transforms"))
    wrong("--prior.latent", 3, names=("--prior.latent", "StandardNormal takes none"))
    wrong("--prior", "MAF", "--prior.transforms", "many", names=("--prior.transforms", "many"))
    wrong("--prior", "MixtureOfNormals", "--prior.components", 0, names=("MixtureOfNormals", "components", "0"))
    wrong("--posterior", "LowRank", names=("--posterior.rank", "number of columns of W"))
    wrong("--likelihood", "Normal", "--likelihood.scale", "wide", names=("--likelihood.scale", "learned", "'wide'"))
    wrong("--likelihood", "Mixed", names=("Mixed", "'columns'", "Python"))
    wrong("--posterior", "PerDatum", names=("PerDatum", "index"))
    wrong("--prior", "ConditionalNormal", names=("ConditionalNormal", "--labels"))
    wrong("--prior", "GaussianProcess", "--labels", names=("GaussianProcess", "second tensor"))
    wrong("--likelihood", "Poisson", "--likelihood.library", names=("Poisson", "second tensor"))
    sphere = ("UniformOnSphere", "DiagonalNormal", "sphere", "real")
    wrong("--prior", "UniformOnSphere", names=sphere, status=1)
    discrete = ["--prior", "Categorical", "--prior.classes", 3]
    wrong(*discrete, "--posterior", "IAF", names=("Categorical", "IAF", "real"), status=1)
    relaxed = ["--prior", "RelaxedOneHot", "--prior.classes", 4, "--posterior", "RelaxedOneHot", "--posterior.classes"]
    wrong(*relaxed, 3, names=("RelaxedOneHot", "classes", "4", "3"))
    fails("fit", pair, *DISCRETE[:-2], names=("'z'", "enumerated", "TraceEnum_ELBO"), status=1)


def test_objectives_by_name(cli, fails, tmp_path):
    place = ["--hidden", 8, "--epochs", 1, "--batch-size", 300, "--no-report"]
    for name, options, described in (
        ("IWAE", ["--objective.num_particles", 3], r"IWAE\(.*num_particles=3\b"),
        ("ELBO", ["--objective.beta", 0.5], r"ELBO\(beta=0.5\)"),  # the library's own, not Pyro's base class
        ("TraceMeanField_ELBO", ["--objective.num-particles", 2], r"TraceMeanField_ELBO\(num_particles=2\)"),
        ("RenyiELBO", ["--objective.alpha", 0.5], r"RenyiELBO\(alpha=0.5\)"),
    ):
        result = cli("fit", "ppvae.models:vae", "--objective", name, *options, *place, "--name", name)
        assert result.status == 0, result.err
        config = json.loads((tmp_path / "runs" / name / "config.json").read_text())
        assert re.match(described, config["fit"]["objective"])
    pair = "ppvae.models:vae"
    fails("fit", pair, "--objective", "IWEA", names=("'IWEA'", "did you mean 'IWAE'"), status=2)
    fails("fit", pair, "--objective", "Objective", names=("'Objective'",), status=2)
    fails("fit", pair, "--objective.beta", 2, names=("--objective.beta", "Trace_ELBO takes"), status=2)
    many = ["--objective", "IWAE", "--objective.num-particles", 0]
    fails("fit", pair, *many, names=("--objective IWAE", "--objective.num-particles", "0"), status=2)


def test_a_pair_whose_argument_is_an_option(fails, tmp_path):
    (tmp_path / "mine.py").write_text("def mine(objective: int = 1):\n    pass\n")
    fails("fit", "mine.py", names=("mine.py", "'objective'"), status=2)


def test_data_says_what_the_data_are(cli):
    result = cli("data")
    assert result.status == 0
    assert [line.split(":")[0].split(",")[0] for line in result.out.splitlines()] == [
        "digits/train", "digits/valid", "digits/test"
    ]  # fmt: skip
    assert "[1257, 64]" in result.out
    assert "sha256" in result.out
    assert "log p(x) of 17 levels: take a likelihood of levels" in result.err
    binary = cli("data", "digits", "--binarize", "fixed", "--data-seed", 3)
    assert "binarized fixed at seed 3" in binary.out
    assert "levels" not in binary.err


def test_a_strangers_own_file_of_data(cli, tmp_path):
    np.save(tmp_path / "mine.npy", np.random.default_rng(0).normal(size=(60, 5)).astype("float32"))
    options = ["--data", "mine.npy", "--binarize", "none", "--epochs", 1, "--no-report"]
    result = cli("fit", PAIRS / "params_only.py", *options)
    assert result.status == 0, result.err
    result = cli("evaluate", "params_only-mine", "--num-particles", 30, "--no-report")
    assert result.status == 0, result.err


# Help, commands, options


def test_help_does_not_wait_for_torch():
    program = (
        "import sys; from ppvae.cli.main import main; status = main(['--help']); "
        "print(status, sorted({'torch', 'pyro', 'numpy', 'tyro'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    for command in COMMANDS:
        assert f"ppvae {command}" in done.stdout
    assert shell("--version").out.startswith("ppvae ")


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "data"])
def test_every_command_has_help(cli, command):
    result = cli(command, "--help")
    assert result.status == 0
    assert "usage" in result.out.lower()


def test_a_reader_that_goes_away_is_no_error():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "ppvae", "--help"], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 141)


def test_unknown_commands(fails):
    fails("fti", names=("'fti'", "did you mean 'fit'"), status=2)
    fails("destroy", names=("'destroy'",), status=2)
    check_error(shell("evalute", "run"), ("'evalute'", "did you mean 'evaluate'"), 2)


def test_no_command_shows_the_usage(cli):
    result = cli()
    assert result.status == 2
    assert "usage: ppvae" in result.out


@pytest.mark.parametrize("command", ["fit", "check", "evaluate", "generate"])
def test_a_command_without_its_object(fails, command):
    if command == "generate" and not REPORT:
        pytest.skip("ppvae.report is not written yet")
    fails(command, names=(f"ppvae {command}", "nothing"), status=2)
    fails(command, "--seed", 1, names=("--seed",), status=2)


def test_misspelt_options(fails):
    fails("fit", "ppvae.models:vae", "--latnt", 8, names=("--latnt", "did you mean --latent"), status=2)
    fails("fit", "ppvae.models:vae", "--latnt=8", names=("--latnt", "--latent"), status=2)
    fails("fit", "ppvae.models:vae", "--optimizer.lrr", 1, names=("--optimizer.lrr", "--optimizer.lr"), status=2)
    fails("fit", "ppvae.models:vae", "--zzzz", names=("--zzzz",), status=2)
    fails("check", "ppvae.models:vae", "--epochs", 3, names=("--epochs",), status=2)
    fails("evaluate", "run", "--num_particle", 3, names=("--num-particle", "--num-particles"), status=2)
    fails("data", "digits", "--binarise", "fixed", names=("--binarise", "--binarize"), status=2)


def test_values_of_the_wrong_kind(fails):
    fails("fit", "ppvae.models:vae", "--epochs", "x", names=("epochs", "'x'"), status=2)
    fails("fit", "ppvae.models:vae", "--epochs", names=("epochs",), status=2)
    fails("fit", "ppvae.models:vae", "--epochs", 0, names=("epochs", "0"), status=2)
    fails("fit", "ppvae.models:vae", "--batch-size", 0, names=("--batch-size", "0"), status=2)
    fails("fit", "ppvae.models:vae", "--optimizer.lr", "fast", names=("lr", "fast"), status=2)
    fails("fit", "ppvae.models:vae", "--binarize", "maybe", names=("binarize", "maybe"), status=2)
    fails("fit", "ppvae.models:vae", "--hidden", "wide", names=("hidden", "wide"), status=2)


def test_names_that_no_file_system_has(fails, trained, tmp_path):
    long = "x" * 300
    error = fails("fit", "ppvae.models:vae", "--runs", str(tmp_path / long), "--epochs", "1", "--no-report")
    assert "cannot be written to (File name too long)" in error
    assert "no such estimate" in fails("compare", str(trained), f"b={trained}", "--result", long)
    assert "File name too long" in fails("fit", f"{long}.py")


def test_a_value_is_refused_without_a_title(fails):
    assert fails("data", "digits", "3").startswith("ppvae: error: Unrecognized options: 3 (`ppvae data digits --help`")
    assert fails("data", "digits", "--binarize", "x").startswith(
        "ppvae: error: --binarize: expected one of none, fixed, dynamic, found 'x'"
    )


def test_names_of_classes(fails):
    fails("fit", "ppvae.models:vae", "--optimizer.name", "Adm", names=("Adm", "did you mean 'Adam'"), status=2)
    fails("fit", "ppvae.models:vae", "--optimizer.name", "SGD", "--optimizer.eps", 1, names=("eps", "SGD"), status=2)
    for name, why in (("LBFGS", "closure"), ("SparseAdam", "dense gradients"), ("Muon", "2D")):
        fails("fit", "ppvae.models:vae", "--optimizer.name", name, names=(name, "cannot train a pair", why), status=2)
    fails("fit", "ppvae.models:vae", "--optimizer.lr", -1, names=("Adam", "learning rate", "-1"), status=2)
    fails("fit", "ppvae.models:vae", "--objective", "TraceELBO", names=("TraceELBO", "Trace_ELBO"), status=2)


def test_bad_values_of_evaluate(fails, trained):
    fails("evaluate", trained, "--num-particles", 0, "--no-report", names=("--num-particles", "0"), status=2)
    fails("evaluate", trained, "--head", 0, "--no-report", names=("head", "0"), status=2)
    fails("evaluate", trained, "--split", "tset", names=("split", "tset"), status=2)


def test_a_traceback_is_there_for_who_asks(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("PPVAE_TRACEBACK", "1")
    (tmp_path / "odd.py").write_text("def odd(latent: 'Nonsense' = 1):\n    return None\n")
    with pytest.raises(NameError):
        cli("check", "odd.py")


BROKEN = """
import pyro, pyro.distributions as dist, torch

def factory():
    return torch.zeros(2) + "text of the factory"

def model():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            x.text_of_the_model()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    return model, guide
"""


@pytest.mark.parametrize(
    ("args", "where"),
    [
        (("evaluate", "nothing"), ", in read_config"),
        (("check", "broken.py:factory"), 'return torch.zeros(2) + "text of the factory"'),
        (("check", "broken.py:model"), "x.text_of_the_model()"),
        (("fit", "broken.py:model", "--epochs", "1"), "x.text_of_the_model()"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_errors_are_shown_with_a_traceback_to_who_asks(fails, args, where, tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    fails(*args)  # without one
    env = {**os.environ, "PPVAE_TRACEBACK": "1"}
    command = [sys.executable, "-m", "ppvae", *args]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    assert result.returncode
    assert "Traceback (most recent call last)" in result.stderr
    assert where in result.stderr


def test_an_interrupt_says_how_to_go_on(fails, tmp_path):
    (tmp_path / "slow.py").write_text("def slow():\n    raise KeyboardInterrupt\n")
    fails("check", "slow.py", names=("interrupted",), status=130)
    fails("fit", "slow.py", names=("interrupted", "--resume"), status=130)


# Config files


def test_a_config_file_lies_below_the_flags(cli, tmp_path):
    (tmp_path / "settings.toml").write_text(
        'epochs = 1\nbatch_size = 64\nreport = false\nz1 = 4\nname = "run"\n\n[optimizer]\nname = "SGD"\nlr = 0.02\n'
    )
    result = cli("fit", PAIRS / "two_latents.py", "--config", "settings.toml", "--optimizer.lr", 0.01, "--z2", 2)
    assert result.status == 0, result.err
    config = json.loads((tmp_path / "runs" / "run" / "config.json").read_text())
    assert config["fit"]["optimizer"] == "SGD(lr=0.01)"
    assert config["fit"]["batch_size"] == 64
    assert config["epochs"] == 1
    assert config["pair"]["arguments"] == {"z1": 4, "z2": 2, "hidden": 32}
    metrics = json.loads((tmp_path / "runs" / "run" / "metrics.jsonl").read_text())
    assert metrics["lr"] == 0.01


def test_dotted_overrides_end_up_in_the_config(cli, tmp_path):
    options = ["--optimizer.lr", "3e-3", "--optimizer.weight-decay", 0.1, "--optimizer.name=AdamW"]
    options += ["--optimizer.schedule", "cosine", "--seed", 4, "--clip", 2]
    options += ["--epochs", 1, "--name", "run", "--no-report"]
    assert cli("fit", "ppvae.models:vae", "--hidden", 8, *options).status == 0
    config = json.loads((tmp_path / "runs" / "run" / "config.json").read_text())
    assert config["fit"]["optimizer"] == "AdamW(lr=0.003, weight_decay=0.1)"
    assert config["fit"]["scheduler"] == "CosineAnnealingLR(T_max=1)"
    assert (config["fit"]["seed"], config["fit"]["clip"]) == (4, 2.0)
    assert config["data"]["data"] == "digits"
    assert set(config["versions"]) >= {"ppvae", "torch", "pyro", "python"}


def test_bad_config_files(fails, tmp_path):
    pair = "ppvae.models:vae"
    (tmp_path / "typo.toml").write_text("[optimizer]\nlrr = 0.1\n")
    fails("fit", pair, "--config", "typo.toml", names=("typo.toml", "optimizer.lrr", "'optimizer.lr'"), status=2)
    (tmp_path / "key.toml").write_text("epoch = 1\n")
    fails("fit", pair, "--config", "key.toml", names=("key.toml", "'epoch'", "'epochs'"), status=2)
    (tmp_path / "kind.toml").write_text('epochs = "many"\n')
    fails("fit", pair, "--config", "kind.toml", names=("epochs", "many"), status=2)
    (tmp_path / "broken.toml").write_text("epochs = = 1\n")
    fails("fit", pair, "--config", "broken.toml", names=("broken.toml", "TOML"), status=2)
    fails("fit", pair, "--config", "nowhere.toml", names=("nowhere.toml",), status=2)
    fails("fit", pair, "--config", names=("--config",), status=2)


def test_a_config_file_with_an_equals_sign(cli, tmp_path):
    (tmp_path / "settings.toml").write_text("epochs = 1\nreport = false\n")
    result = cli("fit", PAIRS / "labelled.py", "--labels", "--config=settings.toml")
    assert result.status == 0, result.err


def test_a_config_file_that_is_no_text(fails, tmp_path):
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    fails("fit", "ppvae.models:vae", "--config", "binary.toml", names=("binary.toml",))


# Pairs that are wrong


def test_broken_pairs(fails):
    for command in ("check", "fit"):
        error = fails(command, PAIRS / "misses_latent.py", names=("'content'", "guide"), status=1)
        assert "'style'" in error
        fails(command, PAIRS / "no_plate.py", names=("'x'", "plate"), status=1)
        fails(command, PAIRS / "wrong_size.py", names=("64", "784"), status=1)


def test_a_network_for_other_images(fails):
    fails("fit", "ppvae.models:vae", "--no-flat", names=("flat",), status=2)
    fails("fit", "ppvae.models:conv_vae", names=("conv_vae", "[1257, 64]"), status=2)


def test_grey_pixels_under_a_bernoulli(fails):
    fails("fit", "ppvae.models:vae", "--binarize", "none", names=("'x'", "Bernoulli", "{0, 1}", "binarize"), status=1)


def test_pairs_that_cannot_be_found(fails, tmp_path):
    fails("fit", "ppvae.models:vea", names=("'vea'", "did you mean 'vae'"), status=2)
    fails("fit", "ppvae.model:vae", names=("ppvae.model",), status=2)
    fails("fit", "nowhere.py", names=("nowhere.py",), status=2)
    fails("fit", "nowhere.py:pair", names=("nowhere.py",), status=2)
    fails("fit", tmp_path, names=(tmp_path,), status=2)
    fails("fit", "ppvae.models", names=("ppvae.models", "factory"), status=2)
    fails("fit", "", status=2)


BAD_FILES = {
    "syntax": ("def pair(:\n", ("SyntaxError",)),
    "import": ("import no_such_module\n", ("no_such_module",)),
    "raises": ("def raises():\n    raise RuntimeError('the moon is full')\n", ("raises", "the moon is full")),
    "returns": ("def returns():\n    return 3\n", ("returns", "int")),
    "nothing": ("x = 1\n", ("nothing.py", "model and guide")),
    "two": ("def one():\n    pass\n\ndef two():\n    pass\n", ("'one'", "'two'")),
    "untyped": ("def untyped(latent):\n    pass\n", ("untyped", "'latent'")),
    "exec": ("raise ValueError('at import')\n", ("exec.py", "at import")),
    "needs": ("def needs(latent: int):\n    pass\n", ("latent",)),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_pair_files_that_are_wrong(fails, tmp_path, name):
    text, names = BAD_FILES[name]
    (tmp_path / f"{name}.py").write_text(text)
    for command in ("check", "fit"):
        fails(command, f"{name}.py", names=names, status=2)
    assert not (tmp_path / "runs").exists()


def test_half_a_pair(fails, tmp_path):
    (tmp_path / "half.py").write_text(
        "class Half:\n    def model(self, x):\n        pass\n\ndef half():\n    return Half()\n"
    )
    fails("check", "half.py", names=("half", ".guide", "Half"), status=2)


@pytest.mark.parametrize("text", ["import sys\nsys.exit()\n", "import sys\ndef leaves():\n    sys.exit()\n"])
def test_a_pair_file_that_exits(fails, tmp_path, text):
    (tmp_path / "leaves.py").write_text(text)
    try:
        fails("check", "leaves.py", names=("leaves",))
    except SystemExit as done:
        raise AssertionError(f"exit status {done.code or 0}") from done


def test_a_syntax_error_in_a_process_of_its_own(tmp_path):
    (tmp_path / "pair.py").write_text("def pair(:\n")
    check_error(shell("fit", "pair.py", cwd=tmp_path), ("pair.py", "SyntaxError"), 2)


def test_a_pair_that_explodes(fails, tmp_path):
    error = fails(
        "fit", PAIRS / "params_only.py", "--binarize", "none", "--optimizer.name", "SGD", "--optimizer.lr", "1e8",
        "--epochs", 3, "--no-report", names=("step", "parameters are as they were"), status=1,
    )  # fmt: skip
    assert "'x'" in error or "'z'" in error or "parameter" in error


@pytest.mark.filterwarnings("always")
def test_nothing_but_the_error_is_said_of_an_explosion(cli, recwarn):
    options = ["--binarize", "none", "--optimizer.name", "SGD", "--optimizer.lr", "1e8", "--epochs", 3, "--no-report"]
    assert cli("fit", PAIRS / "params_only.py", *options).status == 1
    assert [str(w.message) for w in recwarn] == []


# Data that are wrong


def test_unknown_data(fails):
    fails("fit", "ppvae.models:vae", "--data", "digitz", names=("'digitz'", "'digits'"), status=2)
    fails("data", "qqqq", names=("'qqqq'", "mnist"), status=2)
    fails("fit", "ppvae.models:vae", "--data", "nowhere.npy", names=("nowhere.npy",), status=1)
    fails("fit", "ppvae.models:vae", "--data", "mnist", "--root", "empty", names=("mnist", "empty"), status=1)


def test_a_truncated_idx_file(fails, tmp_path):
    raw = tmp_path / "root" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 60_000), ("t10k", 10_000)):
        header = bytes([0, 0, 8, 3]) + struct.pack(">3I", n, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + bytes(1000))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + struct.pack(">I", n) + bytes(n))
    error = fails("fit", "ppvae.models:vae", "--data", "mnist", "--root", tmp_path / "root", status=1)
    assert "train-images-idx3-ubyte" in error
    assert "47040000" in error
    assert "1000" in error


def test_one_nan_pixel(fails, tmp_path):
    x = np.random.default_rng(0).random((50, 8)).astype("float32")
    for bad, word in ((np.nan, "nan"), (np.inf, "inf")):
        x[17, 3] = bad
        np.save(tmp_path / "x.npy", x)
        pair = PAIRS / "params_only.py"
        fails(
            "fit", pair, "--data", "x.npy", "--binarize", "none",
            names=("x.npy", "row 17", "column 3", word), status=1,
        )  # fmt: skip


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.pt"])
def test_files_that_are_no_data(fails, tmp_path, name):
    for content, word in ((b"", "empty"), (HTML, "HTML"), (LFS, "git-lfs"), (b"\x00" * 100, name)):
        (tmp_path / name).write_bytes(content)
        fails("data", name, names=(name, word), status=1)


def test_labels_that_are_not_there(fails, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((50, 8), "float32"))
    fails("fit", PAIRS / "labelled.py", "--data", "x.npy", "--labels", names=("--labels", "x.npy"), status=2)


# Hostile files


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def mark(tmp_path):
    """A path that a live payload makes, as is tried first."""
    path = tmp_path / "pwned"
    pickle.loads(pickle.dumps(Evil(path))).close()
    assert path.exists()
    path.unlink()
    yield path
    assert not path.exists()


def torch_bytes(thing) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def test_a_pickle_as_data_has_no_effect(fails, tmp_path, mark):
    x = torch.zeros(50, 8)
    payloads = {
        "a.pt": pickle.dumps(Evil(mark)),
        "b.pt": torch_bytes(Evil(mark)),
        "c.pt": torch_bytes({"images": x, "labels": Evil(mark)}),
        "d.npy": pickle.dumps(Evil(mark)),
    }
    for name, content in payloads.items():
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "e.npy", np.array([Evil(mark)], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "f.npz", images=np.array([Evil(mark)] * 3, dtype=object))
    for name in (*payloads, "e.npy", "f.npz"):
        fails("data", name, names=(name,), status=1)
        fails("fit", "ppvae.models:vae", "--data", name, names=(name,), status=1)
    assert not mark.exists()


def replace_checkpoint(run: Path, content: bytes) -> Path:
    """A checkpoint that is named by its own digest, and pointed to: what an attacker would leave."""
    name = hashlib.sha256(content).hexdigest() + ".pt"
    (run / "checkpoints" / name).write_bytes(content)
    (run / "checkpoints" / "last").write_text(name)
    return run / "checkpoints" / name


def test_a_pickle_as_checkpoint_has_no_effect(fails, run_copy, mark):
    state = torch.load(checkpoint_of(run_copy), weights_only=True)
    for content in (
        pickle.dumps(Evil(mark)),
        torch_bytes(Evil(mark)),
        torch_bytes({**state, "history": Evil(mark)}),
        torch_bytes({**state, "settings": {"seed": Evil(mark)}}),
    ):
        path = replace_checkpoint(run_copy, content)
        fails("evaluate", run_copy, "--no-report", names=(path.name, "not a checkpoint"), status=1)
        fails(
            "fit", "ppvae.models:vae", "--hidden", 16, "--latent", 3, "--runs", run_copy.parent, "--name",
            run_copy.name, "--resume", "--epochs", 3, "--no-report", names=(path.name,), status=1,
        )  # fmt: skip
    assert not mark.exists()


def test_a_pickle_beside_the_run_has_no_effect(cli, run_copy, mark):
    (run_copy / "checkpoints" / "state.pt").write_bytes(pickle.dumps(Evil(mark)))
    (run_copy / "config.pkl").write_bytes(pickle.dumps(Evil(mark)))
    assert cli("evaluate", run_copy, "--num-particles", 100, "--head", 2, "--no-report").status == 0


# Damaged runs


def test_every_flipped_bit_of_a_checkpoint_is_refused(fails, run_copy):
    path = checkpoint_of(run_copy)
    good = path.read_bytes()
    places = random.Random(0)
    positions = [0, 1, 30, len(good) - 1, len(good) - 22, *(places.randrange(len(good)) for _ in range(25))]
    for position in positions:
        bad = bytearray(good)
        bad[position] ^= 1 << places.randrange(8)
        path.write_bytes(bytes(bad))
        fails("evaluate", run_copy, "--no-report", names=(path.name, "damaged"), status=1)


def test_cut_empty_and_foreign_checkpoints_are_refused(fails, run_copy):
    path = checkpoint_of(run_copy)
    good = path.read_bytes()
    for content in (b"", good[:1], good[: len(good) // 2], good[:-1], good + b"\0", HTML, LFS):
        path.write_bytes(content)
        fails("evaluate", run_copy, "--no-report", names=(path.name, "damaged"), status=1)
    path.unlink()
    fails("evaluate", run_copy, "--no-report", names=(path.name,), status=1)


def test_every_flipped_bit_of_the_pointer_is_refused(fails, run_copy):
    pointer = run_copy / "checkpoints" / "last"
    good = pointer.read_bytes()
    places = random.Random(0)
    for position in (0, len(good) - 1, *(places.randrange(len(good)) for _ in range(10))):
        bad = bytearray(good)
        bad[position] ^= 1 << places.randrange(8)
        pointer.write_bytes(bytes(bad))
        fails("evaluate", run_copy, "--no-report", names=(run_copy.name,), status=1)
    for content in (b"", b"\xff\xfe", b"../../etc/passwd", b"/etc/passwd", HTML):
        pointer.write_bytes(content)
        fails("evaluate", run_copy, "--no-report", names=("last",), status=1)


def test_damaged_configs_are_refused(fails, run_copy):
    path = run_copy / "config.json"
    good = path.read_text()
    for content in ("", "{", "[]", "{}", "\x00", good[: len(good) // 2]):
        path.write_text(content)
        fails("evaluate", run_copy, "--no-report", names=("config.json",), status=1)
    path.write_bytes(b"\xff\xfe\x80")
    fails("evaluate", run_copy, "--no-report", names=("config.json",), status=1)


def test_a_folder_that_is_no_run(fails, tmp_path):
    for command in ("evaluate", "generate"):
        if command == "generate" and not REPORT:
            continue
        (tmp_path / "empty").mkdir(exist_ok=True)
        fails(command, "empty", names=("empty", "not a run"), status=1)
        fails(command, "nowhere", names=("nowhere",), status=1)
        (tmp_path / "file").write_text("x")
        fails(command, "file", names=("file",), status=1)


def test_a_pair_that_has_changed_since(fails, tmp_path, cli):
    text = (PAIRS / "two_latents.py").read_text()
    (tmp_path / "mine.py").write_text(text)
    assert cli("fit", "mine.py", "--epochs", 1, "--name", "run", "--no-report").status == 0
    (tmp_path / "mine.py").write_text(text.replace('pyro.module("down"', 'pyro.module("below"'))
    fails("evaluate", "run", "--no-report", names=("mine.py", "is not a file that", "--trust"), status=1)
    fails("evaluate", "run", "--no-report", "--trust", names=("down$$$",), status=1)
    (tmp_path / "mine.py").write_text(text.replace("nn.Linear(z1, hidden), nn.Tanh()", "nn.Linear(z1, 7), nn.Tanh()"))
    fails("evaluate", "run", "--no-report", status=1)
    fails("evaluate", "run", "--no-report", "--trust", names=("shape",), status=1)
    (tmp_path / "mine.py").unlink()
    fails("evaluate", "run", "--no-report", names=("mine.py",), status=2)


# Run folders


@pytest.mark.parametrize("name", ["../x", "a/b", "/tmp/x", "..", ".", "", "a/..", "x/"])
def test_a_run_name_cannot_leave_the_run_folder(fails, tmp_path, name):
    fails("fit", "ppvae.models:vae", "--epochs", 1, f"--name={name}", "--no-report", names=("--name",), status=2)
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_not_overwritten(fails, cli, run_copy):
    options = ["--hidden", 16, "--latent", 3, "--runs", run_copy.parent, "--name", run_copy.name, "--no-report"]
    before = {p: p.read_bytes() for p in run_copy.rglob("*") if p.is_file()}
    fails("fit", "ppvae.models:vae", "--epochs", 3, *options, names=(run_copy.name, "--resume"), status=1)
    assert {p: p.read_bytes() for p in run_copy.rglob("*") if p.is_file()} == before
    result = cli("fit", "ppvae.models:vae", "--epochs", 3, *options, "--resume")
    assert result.status == 0, result.err
    assert len((run_copy / "metrics.jsonl").read_text().splitlines()) == 3


def test_resume_with_other_settings(fails, run_copy):
    options = ["--hidden", 16, "--latent", 3, "--runs", run_copy.parent, "--name", run_copy.name, "--no-report"]
    options += ["--resume", "--epochs", 3]
    pair = "ppvae.models:vae"
    before = {p: p.read_bytes() for p in run_copy.rglob("*") if p.is_file()}
    fails("fit", pair, *options, "--seed", 5, names=("seed", "5", "0"), status=1)
    fails("fit", pair, *options, "--batch-size", 50, names=("batch_size", "50", "100"), status=1)
    fails("fit", pair, *options, "--optimizer.lr", 0.1, names=("optimizer", "0.1", "0.001"), status=1)
    fails("fit", pair, *options, "--binarize", "dynamic", names=("data", "fixed"), status=1)
    fails("fit", pair, *options, "--data-seed", 1, names=("data",), status=1)
    fails("fit", pair, *options, "--hidden", 17, names=("shape",), status=1)
    assert {p: p.read_bytes() for p in run_copy.rglob("*") if p.is_file()} == before


def test_a_run_folder_that_cannot_be_made(fails, tmp_path):
    (tmp_path / "file").write_text("x")
    place = ["--runs", "file", "--name", "a", "--no-report"]
    fails("fit", "ppvae.models:vae", "--epochs", 1, *place, names=("file",), status=1)
    assert (tmp_path / "file").read_text() == "x"


def test_a_read_only_run_folder(fails, tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    runs.chmod(0o500)
    try:
        if os.access(runs, os.W_OK):
            pytest.skip("this user may write anywhere")
        fails("fit", "ppvae.models:vae", "--epochs", 1, "--name", "a", "--no-report", names=("runs/a",), status=1)
    finally:
        runs.chmod(0o700)


def test_a_read_only_run(fails, run_copy):
    before = {p: p.read_bytes() for p in run_copy.rglob("*") if p.is_file()}
    folders = [run_copy, *(p for p in run_copy.rglob("*") if p.is_dir())]
    for folder in folders:
        folder.chmod(0o500)
    try:
        if os.access(run_copy, os.W_OK):
            pytest.skip("this user may write anywhere")
        options = ["--hidden", 16, "--latent", 3, "--runs", run_copy.parent, "--name", run_copy.name, "--no-report"]
        fails("fit", "ppvae.models:vae", "--epochs", 3, *options, "--resume", names=(run_copy.name,), status=1)
        fails(
            "evaluate", run_copy, "--num-particles", 100, "--head", 2, "--no-report", names=(run_copy.name,), status=1
        )
    finally:
        for folder in folders:
            folder.chmod(0o700)
    assert {p: p.read_bytes() for p in run_copy.rglob("*") if p.is_file()} == before


# Arrays of a file beside the data

SEQUENCES = """
import pyro, torch, pyro.distributions as dist

def pair():
    shift = torch.nn.Parameter(torch.zeros(()))

    def keep(x, lengths):
        return (torch.arange(x.shape[1]) < lengths[:, None])[..., None]

    def model(x, lengths):
        assert x.shape[1:] == (12, 3) and lengths.shape == (len(x),)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("shift", shift), 1.0))
            loc = z[..., None, None].expand(*z.shape, 12, 3)
            pyro.sample("x", dist.Normal(loc, 1.0).mask(keep(x, lengths)).to_event(2), obs=x)

    def guide(x, lengths):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean((1, 2)), 1.0))

    return model, guide
"""


def test_sequences_and_their_lengths_from_one_file(cli, fails, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "pair.py").write_text(SEQUENCES)
    x = rng.standard_normal((40, 12, 3)).astype(np.float32)
    np.savez(tmp_path / "a.npz", x=x, lengths=rng.integers(1, 13, 40))
    options = ("--data", "a.npz", "--no-flat", "--binarize", "none", "--context", "lengths")
    assert "event [12, 3], lengths [28]" in cli("data", "a.npz").out
    assert cli("check", "pair.py:pair", *options).status == 0
    assert cli("fit", "pair.py:pair", *options, "--epochs", 1, "--no-report", "--name", "run").status == 0
    assert cli("evaluate", "run", "--num-particles", 100, "--no-report").status == 0
    done = cli("evaluate", "run", "--method", "particle_filter", "--num-particles", 40, "--no-report")
    assert done.status == 0
    assert "particle filter" in done.out
    est = load_estimate(Path("runs/run/results/log_marginal.json"))
    assert (est.method, est.num_particles, est.settings["filters"]) == ("particle filter", 40, 10)
    for option in ({"max_particles": 50}, {"num_chains": 3}, {"num_particles": "auto"}, {"bracket": 5}):
        with pytest.raises(UsageError, match=f"--{next(iter(option)).replace('_', '-')}.*: goes with"):
            check_evaluate(Evaluate(method="particle_filter", **option))
    few = ("--method", "particle_filter", "--num-particles", 5)
    fails("evaluate", "run", *few, names=("at least 20",), status=2)
    wrong = (*options[:-1], "length")
    fails("fit", "pair.py:pair", *wrong, names=("--context", "'length'", "lengths"), status=2)
