"""Every number of every public function and constructor: refused in one sentence before any work, or meaningful."""

from __future__ import annotations

import math
import random
import signal
from types import NoneType
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch

from ppvae.errors import PpvaeError
from tests.attack.numeric_arguments import Worked, calls, kinds, public

SECONDS = 20  # without an answer, a call hangs
NAN, INFINITY = float("nan"), float("inf")
BAD: tuple[Any, ...] = (
    0, -1, NAN, INFINITY, -INFINITY, 10**20, 2.5, True, "", "½", None, [], (), complex(1, 1), object(),
    torch.tensor(NAN), torch.ones(2),
)  # fmt: skip
ZERO = {  # names whose 0 has a meaning
    "seed", "start", "end", "schedule", "step", "steps of Linear", "checkpoint_seconds", "posterior_draws", "resample",
    "tolerance", "warmup", "replications of predictive_check", "calibrations", "guide_particles", "bracket_data",
    "surgery_draws", "floor", "rank of GaussianMixture", "rank of from_data", "rank of gaussian_mixture", "blocks",
    "label_weight", "first of rows_of", "beta", "free_bits", "alpha", "gamma", "capacity", "weight", "width of InfoVAE",
    "sleep", "decay", "ramp", "rate of SemiAmortized", "steps of SemiAmortized", "noise", "threshold",
}  # fmt: skip
WITHOUT = {"floor of Dirichlet", "alpha of calibration", "alpha of predictive_check"}  # of those, where it has none
LABELS = {"conditional_vae", "semi_supervised_vae"}  # which need the number of labels, that only data may leave out
SEQUENCES = {"values", "amounts", "limits", "schedule of annealed", "schedule of bdmc", "blocks of very_deep_vae"}
MINUS_ONE = {
    "seed",
    "first of rows_of",
    "start",
    "end",
    "schedule of ScheduledScalar",
    "alpha",
    "weight",
    "width of InfoVAE",
    "capacity",
}
AT_MOST_ONE = {"alpha of calibration", "alpha of predictive_check", "beta of CIWAE", "first of TVO", "decay", "ramp",
               "resample", "target_acceptance"}  # fmt: skip
EMPTY = {"hidden", "bounds", "values", "amounts", "dims", "scale", "df", "concentration"}
NOT_EMPTY = {"hidden of IAF", "scale of LinearGaussian"}
TENSORS = {"values", "amounts", "limits"}


def named(names: set[str], name: str, label: str) -> bool:
    return name in names or f"{name} of {label.rpartition('.')[2]}" in names


def has_a_meaning(function: Any, label: str, name: str, value: Any) -> bool:
    """Whether a value means something for an argument, by what it is, and not by the table of ranges."""
    found = kinds(function, name)
    if value is None:
        return NoneType in found and label.rpartition(".")[2] not in LABELS
    if isinstance(value, list | tuple):
        sequence = named(EMPTY, name, label) and not named(NOT_EMPTY, name, label) and len(found) > 1
        return sequence and (isinstance(value, tuple) or name not in ("scale", "df", "concentration"))
    if isinstance(value, torch.Tensor):
        return value.dim() == 1 and name in TENSORS
    if named(SEQUENCES, name, label) or isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if not math.isfinite(value):
        return False
    if value == 0:
        return named(ZERO, name, label) and not named(WITHOUT, name, label)
    if value == -1:
        return named(MINUS_ONE, name, label) and not named(WITHOUT, name, label)
    return float in found and not named(AT_MOST_ONE, name, label)


def outcome(call: Any, name: str, value: Any) -> str:
    """ "taken", "refused" in one sentence that names the argument, or what went wrong."""

    def hangs(*_: object) -> None:
        raise TimeoutError(f"no answer after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    try:
        call(**{name: value})
        return "taken"
    except Worked:
        return "taken"
    except PpvaeError as error:
        text = str(error)
        sentence = "expected" in text and ("found" in text or "pass" in text) and len(text.splitlines()) == 1
        return "refused" if sentence and name in text else f"words: {text[:200]}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        plt.close("all")


def test_every_number_is_tried():
    """A public function or constructor that takes a number is in the table of calls."""
    assert set(public()) == set(calls())
    assert sum(len(names) for _, names in public().values()) > 300


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [1500, pytest.param(10**6, marks=pytest.mark.slow)])
def test_numbers(count, tmp_path, monkeypatch, record_property):
    monkeypatch.chdir(tmp_path)
    made = calls()
    every = [
        (label, function, name, value)
        for label, (function, names) in sorted(public().items())
        for name in names
        for value in BAD
    ]
    cases = random.Random(0).sample(every, min(count, len(every)))
    wrong, counts = [], {"taken": 0, "refused": 0}
    for label, function, name, value in cases:
        expected = "taken" if has_a_meaning(function, label, name, value) else "refused"
        found = outcome(made[label], name, value)
        if found == expected:
            counts[found] += 1
        else:
            wrong.append(f"{label}({name}={value!r}): {found}, and not {expected}")
    assert not wrong, "\n".join(wrong)
    assert not list(tmp_path.iterdir())
    record_property("attacks", [f"numbers: {len(cases)} tried, {counts['refused']} refused, {counts['taken']} taken"])
