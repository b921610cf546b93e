"""The two recipes of `ppvae.objectives`, word for word, under the laws of tests/laws."""

from __future__ import annotations

import inspect
import logging
import re

import pytest

from ppvae import objectives
from ppvae.objectives import Objective
from ppvae.objectives.gradients import GradientEstimator
from ppvae.objectives.gradients.estimator import gradient_only
from ppvae.objectives.reductions import log_mean_exp
from ppvae.objectives.requirements import require_sampled_latents
from tests.laws.gradients import DISCRETE, REPARAMETERIZED, check_gradient_is_unbiased
from tests.laws.objectives import (
    ENUMERATED_GUIDE,
    ESTIMATORS,
    GENERAL,
    OBJECTIVES,
    SCORES,
    EstimatorCase,
    ObjectiveCase,
    check_batch_norm,
    check_pair,
    check_plate_scale,
    check_shift,
    check_value_is_independent_of_gradient,
    mean,
)
from tests.programs.strangers import PAIRS

pytestmark = pytest.mark.usefixtures("float64")


class MeanOfHalves(Objective):
    def reduce(self, log_weight):
        first, second = log_weight.chunk(2)
        return (log_mean_exp(first) + log_mean_exp(second)) / 2


class Reinforce(GradientEstimator):
    def check_structure(self, objective, s):
        require_sampled_latents(s, "reinforce")

    def surrogate(self, objective, call):
        t = call.terms(frozen=("latents",))
        signal = objective.learning_signal(objective.log_weights(t).detach())
        return objective.bound(t).sum() + gradient_only((signal * t.log_guide).sum())


OBJECTIVE = ObjectiveCase(MeanOfHalves, SCORES, reduce=mean, sums_out_guide=True)  # of two draws the mean
ESTIMATOR = EstimatorCase(Reinforce, ENUMERATED_GUIDE)
SERVED = {name: case for name, case in OBJECTIVES.items() if {*GENERAL} <= {*case.estimators}}


@pytest.mark.parametrize("recipe", [MeanOfHalves, Reinforce])
def test_recipes_are_those_of_the_docstring(recipe):
    shown = re.sub(r"^    (>>>|\.\.\.) ?", "", f"{objectives.__doc__}", flags=re.MULTILINE)
    assert inspect.getsource(recipe) in shown


def test_the_new_objective_has_a_value_that_does_not_depend_on_its_gradient():
    check_value_is_independent_of_gradient(OBJECTIVE)
    check_shift(MeanOfHalves(6))


@pytest.mark.parametrize("gradient", SCORES)
def test_the_new_objective_obeys_the_laws(gradient, caplog):
    caplog.set_level(logging.ERROR, logger="ppvae")
    estimator = ESTIMATORS[gradient]
    check_plate_scale(OBJECTIVE, estimator)
    check_batch_norm(OBJECTIVE, estimator)
    for toy in (*REPARAMETERIZED, *(DISCRETE if not estimator.needs_paths else ())):
        check_gradient_is_unbiased(OBJECTIVE, estimator, toy)
    for pair in PAIRS:
        check_pair(OBJECTIVE, estimator, pair)


@pytest.mark.parametrize("name", SERVED)
def test_the_new_estimator_obeys_the_laws_with_every_objective(name):
    case = SERVED[name]
    check_plate_scale(case, ESTIMATOR)
    check_batch_norm(case, ESTIMATOR)
    if case.reduce is not None:
        for toy in (*REPARAMETERIZED, *DISCRETE):
            check_gradient_is_unbiased(case, ESTIMATOR, toy)


def test_the_new_estimator_leaves_the_value_of_every_objective():
    for case in SERVED.values():
        both = ObjectiveCase(case.build, ("score", "reinforce"), case.refuses)
        check_value_is_independent_of_gradient(both, {**ESTIMATORS, "reinforce": ESTIMATOR})


@pytest.mark.parametrize("pair", PAIRS)
def test_the_new_estimator_takes_every_pair_or_says_why_not(pair, caplog):
    caplog.set_level(logging.ERROR, logger="ppvae")
    for case in SERVED.values():
        check_pair(case, ESTIMATOR, pair)
