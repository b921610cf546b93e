"""Gradients through discrete draws against enumeration: means, stated bias, variances, refusals, state."""

from __future__ import annotations

import functools

import pytest

from ppvae.objectives import ELBO, IWAE
from ppvae.objectives.gradients import ARMS, REBAR, DoubleCV, UnorderedSet, VarGrad, disarm, relax
from tests.laws.gradients import LIMIT, errors, samples
from tests.laws.objectives import log_mean_exp, mean
from tests.programs.discrete_toys import TOYS

pytestmark = pytest.mark.usefixtures("float64")

ESTIMATORS = {
    "vargrad": VarGrad,
    "disarm": disarm,
    "arms": ARMS,
    "double_cv": DoubleCV,
    "rebar": REBAR,
    "relax": relax,
    "unordered_set": lambda: UnorderedSet(3),
}
CATEGORICAL = ("category", "layers")  # whose values are integers
REFUSES = {"double_cv": CATEGORICAL, **dict.fromkeys(("rebar", "relax"), (*CATEGORICAL, "one hot"))}
BOUNDS = {"elbo": (lambda g: ELBO(2, gradient=g), 1, mean), "iwae": (lambda g: IWAE(2, g), 2, log_mean_exp)}
CASES = [
    (name, toy, bound)
    for name in ESTIMATORS
    for toy in TOYS
    for bound in BOUNDS
    if toy not in REFUSES.get(name, ()) and (name, bound) != ("vargrad", "iwae")
]


@functools.cache
def exact(toy: str, bound: str) -> dict[str, float]:
    return TOYS[toy].gradient(*BOUNDS[bound][1:])


@pytest.mark.parametrize(("name", "toy", "bound"), CASES)
def test_the_mean_is_the_enumerated_gradient(name, toy, bound):
    """Fails by chance with probability 1e-6 for each of 2000 coordinates, of which there are fewer."""
    found = errors(samples(TOYS[toy], BOUNDS[bound][0](ESTIMATORS[name]())), exact(toy, bound))
    assert max(found.values()) < LIMIT, found
