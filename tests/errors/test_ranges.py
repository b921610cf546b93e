"""Ranges of numbers: every flag of every command, before anything is loaded; and Python calls."""

from __future__ import annotations

import dataclasses
import inspect
import random
import typing
from typing import Any

import pyro.infer
import pytest
import torch

from ppvae import data, evaluation, fit, generate, load, log_marginal, objectives, posteriors, priors, terms
from ppvae.cli import common, options
from ppvae.cli import compare as compare_command
from ppvae.cli.fit import OBJECTIVES
from ppvae.cli.flags import check_flags_of, read_settings
from ppvae.cli.main import COMMANDS, main
from ppvae.errors import CheckpointError, UsageError
from ppvae.errors.ranges import RANGES, check_ranges
from ppvae.factories import pairs
from ppvae.factories.constructor_flags import class_choice, constructor_arguments
from ppvae.models import LinearGaussian

BAD = ("nan", "inf", "-inf", "1e309", "", "٣x", "½", "x" * 300, "a\nb", str(10**20), "-1", "0")
ZERO_IS_A_NUMBER = {  # flags whose 0 has a meaning: nothing of it, or a seed
    "seed", "data_seed", "labelled", "patience", "guide_particles", "bracket", "gaps", "latents", "replications",
    "lr", "eps", "weight_decay", "warmup", "beta", "alpha", "gamma", "free_bits", "capacity", "wake", "sleep", "weight",
    "width", "resample", "rank", "tail_adaptive_beta", "floor", "jitter", "noise", "start", "event_dim", "label_weight",
    "rate", "checks", "gradients",
}  # fmt: skip
MINUS_ONE_IS_A_NUMBER = {"seed", "data_seed", "alpha", "weight", "capacity", "width", "start", "tail_adaptive_beta"}
NOT_OURS = {"max_plate_nesting"}  # of Pyro: infinity by default, and what Pyro makes of a number
ANY_FINITE = {"lr", "eps", "weight_decay", "clip", "beta", "alpha", "gamma", "free_bits", "capacity", "wake", "sleep",
              "weight", "width", "target_std_error", "max_gigabytes", "scale", "floor", "jitter", "noise",
              "temperature", "lengthscale", "concentration", "df", "rate", "label_weight", "start",
              "tail_adaptive_beta"}  # fmt: skip
COMMAND_OPTIONS = {
    "fit": options.Fit, "check": options.Data, "evaluate": options.Evaluate, "examine": options.Examine,
    "compare": options.Compare, "generate": options.Generate, "data": options.DataSet,
}  # fmt: skip


class Loaded(BaseException):
    """Something is loaded: the flags were taken."""


def is_number(kind: Any) -> bool:
    members = typing.get_args(kind) or (kind,)
    return int in members or float in members


def number_flags(cls: type) -> dict[str, str]:
    """{flag: name} of those options of a command that take a number."""
    hints, out = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            out |= {f"{field.name}.{flag}": name for flag, name in number_flags(kind).items()}
        elif is_number(kind):
            out[field.name.replace("_", "-")] = field.name
    return out


def flags_of(function: Any) -> dict[str, str]:
    return {n.replace("_", "-"): n for n, (kind, _, _) in constructor_arguments(function).items() if is_number(kind)}


def all_flags() -> list[tuple[tuple[str, ...], str, str]]:
    """(command, flag, name of the argument) of every flag that takes a number, as the commands themselves list them."""
    found = []
    for command, cls in COMMAND_OPTIONS.items():
        start = {"fit": ("fit", "ppvae.models:vae"), "check": ("check", "ppvae.models:vae"), "data": ("data", "digits"),
                 "compare": ("compare", "a", "b")}.get(command, (command, "run"))  # fmt: skip
        found += [(start, flag, name) for flag, name in number_flags(cls).items()]
    factory = pairs.resolve("ppvae.models:vae")
    fit_vae = ("fit", "ppvae.models:vae")
    found += [(fit_vae, flag, name) for flag, name in flags_of(factory).items() if name in ("latent", "hidden")]
    choices = {n: c for n, (kind, _, _) in pairs.parameters(factory).items() if (c := class_choice(kind))}
    for role, choice in ({"objective": OBJECTIVES} | choices).items():
        for class_name in choice.classes:
            try:
                flags = choice.flags(choice.constructor(class_name, role))
            except UsageError:  # it cannot be made on the command line
                continue
            for name, (kind, _, _) in flags.items():
                if is_number(kind) and name not in NOT_OURS:
                    needed = [n for n, (_, given, _) in flags.items() if given is inspect.Parameter.empty]
                    required = [f"--{role}.{n}=3" for n in needed]
                    start = (*fit_vae, f"--{role}", class_name, *(r for r in required if name not in r))
                    found.append((start, f"{role}.{name.replace('_', '-')}", name))
    return found


FLAGS = all_flags()


def cases(count: int, seed: int) -> list[tuple[tuple[str, ...], str, str, str]]:
    every = [(*flag, value) for flag in FLAGS for value in BAD]
    return random.Random(seed).sample(every, min(count, len(every)))


def expected_to_pass(name: str, value: str) -> bool:
    """Whether a number has a meaning for an argument, by what the argument is, and not by the table of ranges."""
    return (
        (value == "0" and name in ZERO_IS_A_NUMBER)
        or (value == "-1" and name in MINUS_ONE_IS_A_NUMBER)
        or (value == str(10**20) and name in ANY_FINITE)
    )


def tried(case: tuple[tuple[str, ...], str, str, str], capsys: Any) -> str:
    """ "taken", or what went wrong in words; an empty string for one sentence that names the flag."""
    start, flag, name, value = case
    try:
        status = main([*start, f"--{flag}={value}"])
    except Loaded:
        return "" if expected_to_pass(name, value) else f"{case} was taken"
    error = capsys.readouterr().err.strip()
    if expected_to_pass(name, value) and "expected at least" not in error:
        return ""
    sentence = status == 2 and error.startswith(f"ppvae: error: --{flag}: expected ") and len(error.splitlines()) == 1
    return "" if sentence and not expected_to_pass(name, value) else f"{case}: {status} {error[:200]}"


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def load(*_: Any, **__: Any) -> Any:
        raise Loaded

    from ppvae.cli import check, data, evaluate, examine, fit, generate

    for module in (common, check, data, evaluate, examine, fit, generate):
        for name in ("load_splits", "load_trained"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, load)
    monkeypatch.setattr(compare_command, "_result_file", load)


def test_every_command_is_tried():
    assert set(COMMAND_OPTIONS) == set(COMMANDS) - {"new"}
    assert len(FLAGS) > 100


@pytest.mark.parametrize("step", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_every_flag_is_named_as_it_is_given(step, nothing_is_loaded, capsys):
    """`--data-seed`, not `data_seed`: of every flag of every command, for no number and for one out of its range."""
    wrong = [
        (flag, error)
        for start, flag, _ in FLAGS[::step]
        for value in ("nan", "-inf")
        if main([*start, f"--{flag}={value}"]) != 2
        or not (error := capsys.readouterr().err).startswith(f"ppvae: error: --{flag}: expected ")
        or ", found " not in error
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (["--epochs", "1.5"], "--epochs: expected a whole number, found '1.5'"),
        (["--epochs"], "--epochs: expected a value, found nothing"),
        (["--labelled", "x"], "--labelled: expected a whole number or None, found 'x'"),
        (["--max-gigabytes", "x"], "--max-gigabytes: expected a number, found 'x'"),
        (["--hidden", "a", "2"], "--hidden: expected numbers, found 'a', '2'"),
        (["--binarize", "x"], "--binarize: expected one of none, fixed, dynamic, found 'x'"),
        (["--optimizer.eps", "-1"], "--optimizer.eps: expected a finite number of at least 0, found -1"),
        (["--seed", "x" * 300], f"--seed: expected a whole number, found '{'x' * 10}"),
    ],
)  # fmt: skip
def test_the_words_for_a_flag(value, words, nothing_is_loaded, capsys):
    assert main(["fit", "ppvae.models:vae", *value]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"ppvae: error: {words}")
    assert len(error) < 200


def test_a_file_names_its_keys():
    """An option in config.json is called by its key there, which is the name of the argument."""
    with pytest.raises(CheckpointError, match=r"config.json, data: data_seed: expected at most \d+, found"):
        read_settings(options.Data, {"data_seed": 10**30}, "config.json, data")


@pytest.mark.parametrize("count", [50, pytest.param(500, marks=pytest.mark.slow)])
def test_flags_of_every_command(count, nothing_is_loaded, capsys):
    wrong = [found for case in cases(count, seed=0) if (found := tried(case, capsys))]
    assert not wrong, "\n".join(wrong)


def test_strings_of_every_command(nothing_is_loaded, capsys, tmp_path, monkeypatch):
    """Devices, and names of 300 characters or with a newline."""
    monkeypatch.chdir(tmp_path)
    fit_vae = ["fit", "ppvae.models:vae"]
    for device in ("", "cuda:99999999999", "gpu", "meta", "x" * 300, "cp\nu", "\u0663"):
        for start in (fit_vae, ["evaluate", "run"], ["examine", "run"]):
            assert main([*start, f"--device={device}"]) == 2
            error = capsys.readouterr().err
            assert error.startswith("ppvae: error: --device: expected one of this machine (cpu")
            assert len(error) < 250
    for name in ("x" * 300, "a\nb", "..", "a/b", "", "\u00e9" * 150):
        assert main([*fit_vae, f"--name={name}"]) == 2
        assert capsys.readouterr().err.startswith("ppvae: error: --name: expected a plain name for a folder")


def test_a_pair_of_the_users_own_takes_what_it_takes():
    """The table holds for ppvae's functions, Pyro's and torch's; a user's `scale` may be negative."""

    def mine(scale: float):
        return scale

    check_flags_of(mine, {"scale": -1.0})
    with pytest.raises(UsageError, match="scale: expected a finite positive number, found -1"):
        check_flags_of(priors.Laplace, {"scale": -1.0})
    with pytest.raises(UsageError, match=r"^--prior\.scale: "):
        check_flags_of(priors.Laplace, {"scale": -1.0}, "prior.")


PAIR = LinearGaussian(3, 2)
X = torch.zeros(20, 3)
CALLS = {
    "fit": lambda **k: fit(PAIR.model, PAIR.mean_field, X, **{"epochs": 1, **k}),
    "log_marginal": lambda **k: log_marginal(PAIR.model, PAIR.guide, X, **{"proposal": "guide", **k}),
    "annealed": lambda **k: evaluation.annealed(PAIR.model, PAIR.guide, X, **k),
    "bdmc": lambda **k: evaluation.bdmc(PAIR.model, PAIR.guide, X, **k),
    "bracket": lambda **k: evaluation.bracket(PAIR.model, PAIR.guide, X, **k),
    "interval": lambda **k: evaluation.interval(PAIR.model, PAIR.guide, X, **k),
    "gaps": lambda **k: evaluation.gaps(PAIR.model, PAIR.guide, X, **k),
    "calibration": lambda **k: evaluation.calibration(PAIR.model, PAIR.guide, X, **k),
    "representation": lambda **k: evaluation.representation(PAIR.model, PAIR.guide, X, **k),
    "samples": lambda **k: generate.samples(PAIR.model, PAIR.guide, X, **k),
    "load": lambda **k: data.load("digits", **k),
    "IWAE": objectives.IWAE, "ELBO": objectives.ELBO, "MIWAE": objectives.MIWAE, "TVO": objectives.TVO,
    "StandardNormal": priors.StandardNormal, "MixtureOfNormals": lambda **k: priors.MixtureOfNormals(2, **k),
    "RelaxedBernoulli": lambda **k: posteriors.RelaxedBernoulli(torch.nn.Linear(3, 2), **k),
}  # fmt: skip
ARGUMENTS = {
    "fit": ("epochs", "batch_size", "rows", "clip", "seed", "patience", "checkpoint_seconds"),
    "log_marginal": ("num_particles", "rows", "seed", "posterior_draws", "local_particles"),
    "annealed": ("num_chains", "num_temperatures", "num_leapfrog", "target_acceptance", "resample", "rows", "seed"),
    "bdmc": ("num_chains", "num_temperatures", "num_leapfrog", "target_acceptance", "rows", "seed"),
    "bracket": ("num_data", "num_particles", "tolerance", "rows", "seed"),
    "interval": ("num_particles", "rows", "seed"),
    "gaps": ("num_particles", "steps", "rounds", "rows", "seed"),
    "calibration": ("replications", "num_draws", "seed"), "representation": ("num_particles", "surgery_draws"),
    "samples": ("count", "seed"), "load": ("max_gigabytes",),
    "IWAE": ("num_particles",), "ELBO": ("num_particles", "beta", "free_bits", "warmup"),
    "MIWAE": ("num_particles", "num_bounds"), "TVO": ("num_particles", "num_partitions", "first"),
    "StandardNormal": ("latent",), "MixtureOfNormals": ("components",), "RelaxedBernoulli": ("temperature",),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_python_calls(name):
    for argument in ARGUMENTS[name]:
        for value in (float("nan"), float("inf"), -float("inf"), -(10**20), "3", True):
            with pytest.raises(UsageError, match=rf"{argument}: expected .*, found ") as error:
                CALLS[name](**{argument: value})
            assert "\n" not in str(error.value)


def test_one_number_is_no_sequence_and_no_default():
    for argument in ("epochs", "batch_size", "seed"):
        for value in (None, [], (1, 2), torch.tensor([1, 2]), torch.tensor(1.5)):
            with pytest.raises(UsageError, match=rf"{argument}: expected a whole number of .*, found "):
                CALLS["fit"](**{argument: value})
    for value in (0, None, [], float("nan"), 1.5, 10**20, torch.ones(2)):
        if value is not None:
            with pytest.raises(UsageError, match=r"num_particles: expected .*, found "):
                terms(PAIR.model, PAIR.mean_field, X, value)
    with pytest.raises(UsageError, match=r"rows: expected .*, found "):
        CALLS["log_marginal"](rows=[])
    check_ranges(hidden=(), beside=[], scale=torch.ones(3), latent=(2, 3))


def test_a_chain_that_would_never_end_is_refused():
    for argument in ("num_temperatures", "num_leapfrog"):
        with pytest.raises(UsageError, match=f"{argument}: expected at most 1000000000, found 9223372036854775807"):
            CALLS["annealed"](**{argument: 2**63 - 1})


@pytest.mark.parametrize("dtype", [torch.int64, "float64", 0, 2.5])
def test_a_type_that_is_not_floating(dtype, tmp_path):
    with pytest.raises(UsageError, match=r"dtype: expected a floating type such as torch.float64, found "):
        load(tmp_path, dtype=dtype)


@pytest.mark.parametrize("cls", [pyro.infer.Trace_ELBO, pyro.infer.TraceGraph_ELBO, pyro.infer.TraceEnum_ELBO])
@pytest.mark.parametrize("count", [0, -1, 2.5])
def test_objectives_of_pyro(cls, count):
    with pytest.raises(UsageError, match=f"num_particles: expected .*at least 1, found {count}"):
        fit(PAIR.model, PAIR.mean_field, X, epochs=1, objective=cls(num_particles=count))


def test_a_tensor_without_dims_is_its_number():
    check_ranges(scale=torch.tensor(0.5), latent=torch.tensor(3))
    with pytest.raises(UsageError, match="scale: expected a finite positive number, found"):
        check_ranges(scale=torch.tensor(-0.5))
    with pytest.raises(UsageError, match="latent: expected a whole number of at least 1, found"):
        check_ranges(latent=torch.tensor(1.5))


def test_sizes_beyond_the_memory_are_named():
    with pytest.raises(UsageError, match=r"latent: expected at most \d+, as many numbers as fit into .* GB of memory"):
        priors.StandardNormal(10**13)
    check_ranges(latent=10**6)


def test_the_table_has_words_for_each_range():
    for name, known in RANGES.items():
        with pytest.raises(UsageError, match=f"^{name}: expected .* found None|^{name}: expected .*, found "):
            known.check(name, complex(1, 1))
