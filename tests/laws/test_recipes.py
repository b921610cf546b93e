"""The recipes in the docstrings of the rooms, executed: what they define obeys the laws of the library's own parts."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pyro
import pytest

from ppvae import likelihoods, models, nn, posteriors, priors
from ppvae.likelihoods.network_outputs import NetworkLikelihood, event_dim
from ppvae.models.composed_model import ComposedModel
from ppvae.posteriors.amortized import Amortized
from tests.laws import parts, test_model_laws
from tests.laws.law import Laws
from tests.likelihoods import test_likelihoods
from tests.nn import test_nn
from tests.posteriors import test_posteriors
from tests.priors import test_priors

IMPORTS = "import pyro, torch\nimport pyro.distributions as dist\n"
BASES = {c.__name__: c for c in (NetworkLikelihood, ComposedModel, Amortized)} | {"event_dim": event_dim}
ROOMS: dict[str, tuple[ModuleType, ModuleType, Laws, int]] = {  # room, names of its dict, laws, how many are asked
    "prior": (priors, parts, test_priors.law, 11),
    "likelihood": (likelihoods, parts, test_likelihoods.law, 11),
    "posterior": (posteriors, parts, test_posteriors.law, 12),
    "model": (models, test_model_laws, test_model_laws.law, 5),
    "network": (nn, test_nn, test_nn.law, 2),
}


def recipe(room: ModuleType) -> str:
    """The indented lines of a room's docstring."""
    lines = (room.__doc__ or "").splitlines()
    return textwrap.dedent("\n".join(line for line in lines if line.startswith("    ") or not line))


@contextmanager
def joined(kind: str, source: str) -> Iterator[tuple[str, Laws]]:
    """The name under which a recipe's part has joined its dict, for a while, and the laws of the dict."""
    _, names, law, _ = ROOMS[kind]
    cases: Any = law.cases
    before = dict(cases)
    try:
        exec(IMPORTS + source, {**vars(names), **BASES})
        (name,) = set(cases) - set(before)
        yield name, law
    finally:
        cases.clear()
        cases.update(before)
        pyro.clear_param_store()


@pytest.mark.parametrize("kind", ROOMS)
def test_a_part_written_by_the_recipe_obeys_the_laws(
    kind: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with joined(kind, recipe(ROOMS[kind][0])) as (name, law):
        asked = law.hold(name, caplog=caplog, tmp_path=tmp_path)
    assert len(asked) == len(set(asked)) >= ROOMS[kind][-1]


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        ("prior", "torch.zeros_like(self.log_scale)", "torch.rand(1)"),  # another density at each call
        ("prior", "self.log_scale.exp()", "self.log_scale.detach().exp()"),  # a parameter without a gradient
        ("likelihood", ".to_event(event_dim(loc, z))", ""),  # elements in the batch shape
        ("posterior", "log_scale.exp()", "log_scale.sigmoid().mean(0)"),  # data that depend on one another
    ],
)
def test_a_part_that_breaks_a_law_is_found(kind: str, right: str, wrong: str) -> None:
    source = recipe(ROOMS[kind][0])
    assert right in source
    refused = pytest.raises((AssertionError, RuntimeError, ValueError))
    with joined(kind, source.replace(right, wrong)) as (name, law), refused:
        law.hold(name)
