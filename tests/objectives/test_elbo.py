"""ELBO and Capacity: against Pyro's ELBOs on the same noise, and the rate against closed forms."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO

from ppvae import objectives
from ppvae.inference.param_store import ParamScope
from ppvae.models import LinearGaussian
from ppvae.objectives import (
    ELBO,
    Capacity,
)  # fmt: skip
from tests.laws.objectives import (
    value,
)
from tests.objectives.pairs import dims_pair, pair
from tests.programs.strangers import PAIRS
from tests.programs.toys import ONE

pytestmark = pytest.mark.filterwarnings("ignore:STL is biased")


def same_as_pyro(ours, pyros, model, guide, batch) -> None:
    """Loss and gradients, on the same noise."""
    results = []
    for objective in (ours, pyros):
        objective.loss(model, guide, *batch)
        params = dict(pyro.get_param_store().named_parameters())
        for p in params.values():
            p.grad = None
        torch.manual_seed(2)
        loss = objective.loss_and_grads(model, guide, *batch)
        results.append((loss, {n: p.grad for n, p in params.items()}))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-9)
    for name, gradient in results[0][1].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-9, atol=1e-9, msg=name)


def test_elbo_is_pyros_on_the_same_noise() -> None:
    p, x = pair()
    ours, pyros = objectives.ELBO(num_particles=3), Trace_ELBO(num_particles=3, vectorize_particles=True)
    with ParamScope().entered():
        losses, gradients = [], []
        for objective in (ours, pyros):
            objective.loss(p.model, p.mean_field, x)  # whatever is done once
            torch.manual_seed(1)
            p.zero_grad()
            losses.append(objective.loss_and_grads(p.model, p.mean_field, x))
            gradients.append([q.grad.clone() for q in p.parameters()])
    assert losses[0] == pytest.approx(losses[1], abs=1e-10)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["modules", "hierarchical", "params", "masked", "inner_plate", "flow", "classes"])
def test_elbo_is_pyros(name, float64):
    model, guide, batch = PAIRS[name]()
    plate_nesting = 2 if name == "inner_plate" else 1
    pyros = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=plate_nesting)
    same_as_pyro(ELBO(3), pyros, model, guide, batch)


@pytest.mark.parametrize("name", ["modules", "params", "labelled", "classes"])
def test_elbo_with_closed_kl_is_pyros(name, float64):
    model, guide, batch = PAIRS[name]()
    pyros = TraceMeanField_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    same_as_pyro(ELBO(3, analytic_kl=True), pyros, model, guide, batch)


@pytest.mark.parametrize("name", ["enumerated_model", "enumerated_vector", "markov", "semi_supervised"])
def test_elbo_of_enumerated_sites_is_pyros(name, float64):
    model, guide, batch = PAIRS[name]()
    plate_nesting = 2 if name == "enumerated_vector" else 1
    pyros = TraceEnum_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=plate_nesting)
    same_as_pyro(ELBO(3), pyros, model, guide, batch)


def test_beta_weighs_the_rate_alone() -> None:
    p, x = pair()
    values = []
    for beta in (0.0, 1.0, 3.0):
        torch.manual_seed(1)
        objective = objectives.ELBO(beta=beta)
        objective.loss(p.model, p.mean_field, x)
        torch.manual_seed(2)
        values.append(objective.loss(p.model, p.mean_field, x))
    rate = values[1] - values[0]
    assert rate != 0
    assert values[2] == pytest.approx(values[0] + 3 * rate, abs=1e-9)


def test_a_beta_that_is_set_later_is_the_one_that_counts() -> None:
    pair, x = LinearGaussian(3, 2), torch.randn(5, 3)
    objective = ELBO(num_particles=4)
    objective.beta = 0.25
    torch.manual_seed(0)
    later = objective.loss(pair.model, pair.mean_field, x)
    torch.manual_seed(0)
    assert later == ELBO(num_particles=4, beta=0.25).loss(pair.model, pair.mean_field, x)


def exact_kl(toy_values) -> float:
    loc, s, m, t = toy_values["a"] * 0.8 + toy_values["b"], toy_values["t"], toy_values["m"], toy_values["s"]
    return t - s + (math.exp(2 * s) + (loc - m) ** 2) / (2 * math.exp(2 * t)) - 0.5


def test_a_rate_in_closed_form_is_the_kl(float64):
    model, guide, x, _ = ONE.pair(7)
    difference = value(ELBO(beta=2.0, analytic_kl=True), model, guide, x) - value(
        ELBO(beta=1.0, analytic_kl=True), model, guide, x
    )
    assert difference == pytest.approx(7 * exact_kl(ONE.values), abs=1e-10)


def test_capacity_charges_the_distance_from_the_rate(float64):
    model, guide, x, _ = ONE.pair(7)
    kl = exact_kl(ONE.values)
    distortion = value(ELBO(beta=0.0, analytic_kl=True), model, guide, x)
    for capacity in (kl - 0.3, kl + 0.2):
        found = value(Capacity(capacity, 10.0, analytic_kl=True), model, guide, x)
        assert found - distortion == pytest.approx(7 * 10 * abs(kl - capacity), abs=1e-9)


@pytest.mark.parametrize("layout", ["vectorized", "folded", "one by one"])
def test_free_bits_are_granted_to_each_dim(layout, float64, monkeypatch):
    """KL is 0.02 in one dim and 0.5 in the other: at 0.1 the first is charged 0.1 and has no gradient from its rate."""
    monkeypatch.setattr("ppvae.inference.inspection.find_particle_placement", lambda *_: layout)
    model, guide, x, loc = dims_pair()
    options = {"num_particles": 3, "analytic_kl": True}
    plain = value(ELBO(**options), model, guide, x)
    free = ELBO(free_bits=0.1, **options)
    assert value(free, model, guide, x) - plain == pytest.approx(4 * (0.1 - 0.02), abs=1e-10)
    assert value(ELBO(free_bits=0.9, **options), model, guide, x) - plain == pytest.approx(4 * (1.8 - 0.52), abs=1e-10)
    torch.manual_seed(1)
    free.loss_and_grads(model, guide, x)
    granted = loc.grad.clone()
    loc.grad = None
    torch.manual_seed(1)
    ELBO(**options).loss_and_grads(model, guide, x)  # looks at the pair first, but keeps the noise as it is
    assert float((loc.grad - granted)[0]) == pytest.approx(4 * 0.2, abs=1e-10)
    assert float((loc.grad - granted)[1]) == pytest.approx(0, abs=1e-10)
    drawn = ELBO(3, free_bits=0.9)  # draws in the place of the closed form: the same law in the mean
    assert math.isfinite(value(drawn, model, guide, x))
