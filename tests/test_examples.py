"""Every file of examples/ runs with small settings, stays short, and says how it is called."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import pyro
import pytest
import torch

FOLDER = Path(__file__).parents[1] / "examples"
SMALL = {  # arguments of main
    "pyro_vae": {"epochs": 1, "particles": 50},
    "semi_supervised": {"epochs": 2, "hidden": 16},
    "deep_markov": {"epochs": 1, "count": 50, "hidden": 8},
    "topic_model": {"epochs": 3, "documents": 100},
    "gaussian_mixture": {"epochs": 5, "particles": 50},
    "flow_prior": {"epochs": 1, "hidden": 16, "seeds": 1, "num_test": 20},
    "table_with_gaps": {"epochs": 2, "hidden": 16},
    "cell_counts": {"epochs": 2, "count": 300},
    "training_loop": {"steps": 400, "num_test": 20},
    "custom_objective": {"epochs": 1, "num_test": 20},
    "wrapped_torch": {"epochs": 1, "num_test": 20, "particles": 50},
}
SLOW = ("pyro_vae", "deep_markov", "training_loop")


def test_every_example_has_small_settings() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_an_example_is_short_and_says_how_to_run_it(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text()
    assert len(text.splitlines()) < 60
    assert f"python examples/{name}.py" in text


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in SMALL])
def test_an_example_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    pyro.clear_param_store()
    torch.manual_seed(0)
    found = runpy.run_path(str(FOLDER / f"{name}.py"))["main"](**SMALL[name])
    numbers = list(found.values()) if isinstance(found, dict) else [found]
    assert all(map(math.isfinite, numbers))
    assert capsys.readouterr().out
