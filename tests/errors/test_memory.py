"""Out of memory is recognised by the cause of an error, and said as that with what to lower, in every phase."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

from ppvae import evaluation, fit, load, log_marginal
from ppvae.errors.memory import OutOfMemoryError, memory_failure
from ppvae.evaluation import annealed, bdmc, gaps
from ppvae.evaluation.annealing import setup
from ppvae.factories import pairs
from ppvae.generate import samples
from ppvae.models import LinearGaussian
from ppvae.objectives import IWAE

ROOT = Path(__file__).parents[2]
TOO_MUCH = 1 << 50  # numbers: the allocator refuses at once


class Greedy:
    """A linear-Gaussian pair that asks for more memory than there is once its model has run `after` times."""

    def __init__(self, after: float):
        self.left, self.weight = after, torch.nn.Parameter(torch.eye(3, 2))

    def model(self, x):
        weight = pyro.param("weight", self.weight)
        self.left -= 1
        if self.left < 0:
            torch.zeros(TOO_MUCH)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight.T, 1.0).to_event(1), obs=x)

    def guide(self, x):
        loc = pyro.param("guide_weight", torch.zeros(3, 2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ loc, 1.0).to_event(1))


def causes() -> list[BaseException]:
    """Real errors of allocations that failed, and those that they cause."""
    found: list[BaseException] = []
    for allocate in (lambda: torch.zeros(TOO_MUCH), lambda: torch.zeros(1 << 40, 1 << 40), lambda: bytearray(1 << 62)):
        try:
            allocate()
        except Exception as error:
            found.append(error)
    try:
        try:
            torch.zeros(TOO_MUCH)
        except RuntimeError as error:
            raise ValueError("the pair could not run") from error
    except ValueError as error:
        found.append(error)
    return [*found, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")]


def test_the_cause_is_recognised_whatever_the_error():
    assert len(causes()) == 5
    for error in causes():
        assert memory_failure(error) is not None
    assert memory_failure(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def test_the_first_look_of_fit():
    pair = Greedy(0)
    with pytest.raises(OutOfMemoryError, match=r"^the first look at the pair: out of memory, .* GB more .*batch_size"):
        fit(pair.model, pair.guide, torch.zeros(20, 3), epochs=1)


@pytest.mark.parametrize(
    ("objective", "cure"),
    [(Trace_ELBO(), "Lower batch_size or num_particles"), (IWAE(5), r"Lower rows \(now 20000\), batch_size")],
)
def test_a_step_of_fit_leaves_the_checkpoint_before(tmp_path, objective, cure):
    pair, x = Greedy(1e9), torch.randn(20, 3)

    def greedy_from_the_second_epoch(run, metrics):
        pair.left = 0 if metrics["epoch"] == 2 else pair.left

    given = {"batch_size": 10, "directory": tmp_path, "objective": objective, "compile": False}
    with pytest.raises(OutOfMemoryError, match=rf"^step 5 \(epoch 3\): out of memory, .*{cure}.*last good checkpoint"):
        fit(
            pair.model, pair.guide, x, epochs=4, callbacks=[greedy_from_the_second_epoch], checkpoint_seconds=0.0,
            **given,
        )  # fmt: skip
    pair.left = 1e9
    kept = load(tmp_path, pair.model, pair.guide)
    assert kept.metrics["epoch"] == 2
    resumed = fit(pair.model, pair.guide, x, epochs=4, resume=True, **given)
    assert resumed.metrics["epoch"] == 4


EVALUATIONS = {
    "log_marginal": lambda *pair: log_marginal(*pair, num_particles=500, compile=False),
    "refined": lambda *pair: log_marginal(*pair, num_particles=500, proposal="refined"),
    "annealed": lambda *pair: annealed(*pair, num_temperatures=20, compile=False),
    "bdmc": lambda *pair: bdmc(*pair, num_temperatures=20, compile=False),
    "gaps": lambda *pair: gaps(*pair, steps=5),
    "samples": samples,
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluations(name):
    """In the first look, and in whatever comes after it."""
    pair, x = Greedy(1e9), torch.randn(20, 3)
    run = fit(pair.model, pair.guide, x, epochs=1)
    for after in (0, 12) if name != "samples" else (0, 1):
        pair.left = after
        with pytest.raises(OutOfMemoryError, match=r"^the \w+ation: out of memory, .* Lower (rows|count)"):
            EVALUATIONS[name](run.model, run.guide, x)


def test_a_pair_that_is_too_large_names_its_sizes():
    factory = pairs.resolve("ppvae.models:vae")
    with pytest.raises(OutOfMemoryError, match=r"building the pair: out of memory, .*Lower its sizes \(.*hidden = "):
        pairs.build(factory, {"hidden": (1 << 25, 1 << 25)}, torch.zeros(5, 3))


def test_sizes_of_chosen_classes_are_named():
    factory = pairs.resolve("ppvae.models:vae")
    given = {"hidden": (1 << 25, 1 << 25), "missing": False, "prior": {"name": "MixtureOfNormals", "components": 7}}
    with pytest.raises(OutOfMemoryError, match=r"Lower its sizes \(hidden = \(.*\), prior.components = 7\)"):
        pairs.build(factory, given, torch.zeros(5, 3))


def test_a_schedule_of_too_many_temperatures(monkeypatch):
    def fails(*_):
        raise MemoryError

    pair, x = LinearGaussian(3, 2), torch.randn(20, 3)
    monkeypatch.setattr(setup, "named_schedule", fails)
    with pytest.raises(OutOfMemoryError, match=r"the schedule of the annealing: out of memory. Lower num_temperatures"):
        evaluation.annealed(pair.model, pair.mean_field, x)


SCRIPT = """
import resource, sys
import torch
from ppvae import fit, load, log_marginal
from ppvae.errors.memory import OutOfMemoryError
from ppvae.models import LinearGaussian
from ppvae.objectives import IWAE

pair, x = LinearGaussian(50, 2), torch.zeros(400, 50)
given = {"objective": IWAE(2000), "batch_size": 400, "compile": False, "directory": sys.argv[1]}
fit(pair.model, pair.mean_field, x[:10], epochs=1, compile=False)  # libraries take their memory
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (100 << 20), resource.RLIM_INFINITY))
try:
    fit(pair.model, pair.mean_field, x, epochs=1, rows=10**6, **given)  # 160 MB for the means of x alone
except OutOfMemoryError as error:
    print(error)
run = fit(pair.model, pair.mean_field, x, epochs=1, rows=10**4, **{**given, "directory": None})
print(len(log_marginal(run.model, run.guide, x[:50], num_particles=1000, compile=False).log_px), "data")
"""


def test_a_limit_of_the_address_space(tmp_path):
    """`ulimit -v`: a step says what to lower, and the same call with less of it goes through."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc: the size of the process is not known")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("training: out of memory, 0.16 GB more")
    assert "Lower rows (now 1000000), batch_size or num_particles" in lines[0]
    assert lines[-1] == "50 data"
