"""What tests share, and what they say at the end: how many parts and combinations they covered."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pyro
import pytest
import torch

from ppvae.compilation.bernoulli import keep_library

if not torch.cuda.is_available():  # where it does nothing but keep the stack of its caller, for a device to come
    torch.cuda.manual_seed_all = lambda seed: None


@pytest.fixture(scope="session", autouse=True)
def user_configuration(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A configuration of the user's own for the tests: what they trust is not left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("configuration")))
        yield


@pytest.fixture(scope="session", autouse=True)
def kept_functions() -> None:
    """Functions in C++ that a process takes if an earlier one has kept them: here all processes of the tests do."""
    keep_library()


@pytest.fixture
def float64() -> Iterator[None]:
    """float64, a seed and an empty param store; type and store as they were, afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    torch.manual_seed(0)
    yield
    pyro.clear_param_store()
    torch.set_default_dtype(before)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """One thread of torch, and two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short pilot run of annealing: what it finds moves the spread of an estimate, never its mean."""
    monkeypatch.setattr("ppvae.evaluation.annealing.hmc.WARM_UP_TRANSITIONS", 8)
    monkeypatch.setattr("ppvae.evaluation.annealing.hmc.MIN_PILOT_TRANSITIONS", 1)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Puts together what tests that passed have recorded, in whichever process they ran."""
    covered: dict[str, set[str]] = {}
    totals: dict[str, int] = {}
    for report in terminalreporter.stats.get("passed", []):
        for name, value in getattr(report, "user_properties", []):
            if isinstance(value, list):
                covered.setdefault(name, set()).update(value)
            elif isinstance(value, int):
                totals[name] = value
    for line in sorted(covered.get("attacks", ())):
        terminalreporter.write_line(f"attack: {line}")
    rooms = [f"{len(covered[r])} {r}" for r in ("priors", "likelihoods", "posteriors", "networks") if r in covered]
    if rooms:
        terminalreporter.write_line(f"parts: {', '.join(rooms)}")
    if "fitting" in covered:
        terminalreporter.write_line(
            f"combinations: {len(covered['fitting'])} of {totals['all fitting']} fitting, trained and evaluated; "
            f"{len(covered['refused'])} of {totals['all refused']} misfits, refused"
        )


def pytest_collection_finish() -> None:
    """Exempts what was imported and collected from garbage collection, which else visits it again and again."""
    gc.collect()
    gc.freeze()
