"""Parameters, draws and observed values that a distribution does not take, in whatever row and batch they stand."""

from __future__ import annotations

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from ppvae import distributions, evaluation, fit, log_marginal
from ppvae.errors import ContractError, DataError, TrainingError, UsageError
from ppvae.inference import SVI
from ppvae.inference.compiled_step import WAIT
from ppvae.inference.contract.validity import RecordValidity, check_parameters

N, ROW = 120, 93  # a row of neither the first block nor the first batch
FIT = functools.partial(fit, batch_size=40, progress=False)
Y = (torch.arange(N) % 2).float()  # in the support of every likelihood below
BAD = torch.full((N,), 0.6).index_fill(0, torch.tensor([ROW]), -0.3)
HALF = torch.full((N,), 0.5)

# observed values, parameter by row, likelihood
INVALID = {
    "Poisson": (Y, BAD, dist.Poisson),
    "Gamma": (HALF, BAD, lambda c: dist.Gamma(c, 1.0)),
    "Beta": (HALF, BAD, lambda c: dist.Beta(c, 1.0)),
    "Bernoulli": (Y, BAD + (BAD < 0) * 1.9, lambda c: dist.Bernoulli(probs=c)),
    "Normal": (HALF, BAD, lambda c: dist.Normal(0.0, c)),
    "Independent": (HALF[:, None], BAD[:, None], lambda c: dist.Normal(0.0, c).to_event(1)),
    "mixture": (
        HALF, BAD,
        lambda c: dist.MixtureSameFamily(
            dist.Categorical(torch.ones(2)), dist.Weibull(torch.ones(2), c[..., None].expand(*c.shape, 2))
        ),
    ),
}  # fmt: skip


def pair_of(likelihood, learned=True):
    """A latent that the likelihood does not read, so that log p(x) is the likelihood's alone."""

    def model(y, c):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", likelihood(c), obs=y)

    def guide(y, c):
        loc = pyro.param("loc", torch.tensor(0.1)) if learned else 0.1
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(loc, 1.0))

    return model, guide


@pytest.mark.parametrize("name", INVALID)
def test_a_parameter_that_the_distribution_does_not_take_is_refused_in_any_row(name):
    y, c, likelihood = INVALID[name]
    message = rf"site 'x': expected .* in .*; found .* at row {ROW}\. Bound"
    for evaluate in (log_marginal, evaluation.quadrature, functools.partial(log_marginal, proposal="refined")):
        with pytest.raises(ContractError, match=message):
            evaluate(*pair_of(likelihood, learned=False), (y, c))
    with pytest.raises(TrainingError, match=rf"step [123] \(epoch 1\): the loss is nan.*{message}"):
        FIT(*pair_of(likelihood), (y, c), epochs=1, compile=False)


@pytest.mark.parametrize("name", INVALID)
def test_a_captured_step_has_no_loss_there(name):
    y, c, likelihood = INVALID[name]
    svi = SVI(*pair_of(likelihood), functools.partial(torch.optim.SGD, lr=1e-3), pyro.infer.Trace_ELBO(), compile=True)
    svi.use("graph")
    good = c.clone()
    good[ROW] = good[0]
    losses = [svi.step(y, good) for _ in range(WAIT + 3)]
    assert svi.kernels == "graph"
    assert all(map(math.isfinite, losses))
    assert math.isnan(svi.step(y, c))


@pytest.mark.parametrize("compile", [False, True])
def test_training_stops_where_a_parameter_leaves_its_domain(compile):
    def model(x):
        p = pyro.param("p", torch.tensor(0.9))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Bernoulli(probs=p), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    adam = functools.partial(torch.optim.Adam, lr=0.01)
    with pytest.raises(TrainingError, match=r"'probs' of Bernoulli in \[0, 1\].*found 1\.0.*constraint=constraints"):
        FIT(model, guide, torch.ones(N), epochs=40, optimizer=adam, compile=compile)

    def cured(x):
        p = pyro.param("p", torch.tensor(0.9), constraint=constraints.unit_interval)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Bernoulli(probs=p), obs=x)

    assert FIT(cured, guide, torch.ones(N), epochs=40, optimizer=adam, compile=compile).metrics["loss"] < 0.11


def test_parameters_that_are_rounded_or_missing_are_taken():
    with pyro.validation_enabled(False), RecordValidity() as validity:
        check_parameters("z", dist.Normal(0.0, torch.tensor([1.0, math.nan])))
        check_parameters("z", dist.Categorical(probs=torch.rand(5000)))
        check_parameters("z", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
        pyro.sample("x", dist.Bernoulli(logits=torch.zeros(3)), obs=torch.tensor([0.0, 1.0, math.nan]))
        pyro.sample(
            "y", dist.Bernoulli(0.5).expand([2]).mask(torch.tensor([True, False])), obs=torch.tensor([0.0, 5.0])
        )
    assert validity.nan_unless_valid(2.0) == 2.0


OUTSIDE = {
    "Poisson": (Y, -1.0, lambda c: dist.Poisson(c)),
    "LogNormal": (HALF, 0.0, lambda c: dist.LogNormal(0.0, c)),
    "Bernoulli": (Y, 0.5, lambda c: dist.Bernoulli(probs=c)),
    "Categorical": (Y, 2.0, lambda c: dist.Categorical(logits=c[..., None] * torch.ones(2))),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_observed_value_outside_the_support_is_refused_in_any_row(name):
    y, value, likelihood = OUTSIDE[name]
    data = y.index_fill(0, torch.tensor([ROW]), value), HALF
    for evaluate in (log_marginal, evaluation.quadrature):
        with pytest.raises(DataError, match=rf"site 'x': {name} takes values in .*; found {value:g} at row {ROW}\."):
            evaluate(*pair_of(likelihood, learned=False), data)
    with pytest.raises(TrainingError, match=rf"{name} takes values in .*; found {value:g} at row {ROW}\. Choose|Load"):
        FIT(*pair_of(likelihood), data, epochs=1, compile=False)


@pytest.mark.parametrize("scale", [1e-8, 1e-9])
def test_draws_that_rounding_makes_equal_are_refused_as_a_point_mass(scale):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.7), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.65 * x, scale))

    x = torch.linspace(0.5, 2.0, 30)
    with pytest.raises(ContractError, match=r"site 'z': expected draws of the guide that differ.*float64"):
        log_marginal(model, guide, x, num_particles=100, proposal="guide")
    assert not bool(
        log_marginal(model, guide, x.double(), num_particles=100, proposal="guide").reliable.any()
    )  # the cure, followed

    def partly(x):  # one datum's guide is a point mass, the others' are exact
        exact = (0.49 / 1.49) ** 0.5
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 1.49, torch.where(x < 1.99, exact, scale)))

    est = log_marginal(model, partly, x, num_particles=100, proposal="guide")
    assert est.reliable.tolist() == [True] * 29 + [False]
    assert est.log_px.isfinite().tolist() == [True] * 29 + [False]


def test_pathwise_objectives_refuse_a_discrete_guide():
    logits, means = torch.tensor([0.2, -0.3]), torch.tensor([-1.0, 1.0])

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=logits))
            pyro.sample("x", dist.Normal(means[c], 1.0), obs=x)

    def guide(x):
        w = pyro.param("w", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(logits=w * x[:, None]))

    with pytest.raises(ContractError, match=r"site 'c': expected a reparameterised latent for TraceMeanField_ELBO"):
        FIT(model, guide, torch.randn(50), epochs=1, objective=pyro.infer.TraceMeanField_ELBO())


def test_rows_that_act_through_a_coefficient_of_zero_are_found():
    cov = torch.randn(N)

    def model(x):
        beta = pyro.param("beta", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + beta * cov[: len(x)], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ContractError, match="and a mini-batch brings other rows"):
        FIT(model, guide, 3 * cov, epochs=1)
    adam = functools.partial(torch.optim.Adam, lr=0.05)
    run = fit(model, guide, 3 * cov, epochs=200, batch_size=N, optimizer=adam, progress=False)
    assert abs(float(run.model.scope.params["beta"]) - 3) < 0.2  # the standard error is 0.13 at most


def test_models_that_are_no_densities_are_not_ranked_without_a_word():
    def model(x, constant=0.0):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
            if constant:
                pyro.factor("f", torch.tensor(constant))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    x = torch.randn(20)
    plain, factored = (
        log_marginal(model, guide, x, proposal="guide"),
        log_marginal(functools.partial(model, constant=3.0), guide, x, proposal="guide"),
    )
    found = evaluation.compare({"plain": plain, "factored": factored}).warnings
    assert any(text.startswith("not comparable: factored ") for text in found)
    assert not evaluation.compare({"a": plain, "b": plain}).warnings


def test_a_dict_reaches_model_and_guide_in_one_order():
    def model(a, c):
        with pyro.plate("data", len(a)):
            z = pyro.sample("z", dist.Normal(c, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=a)

    def guide(a, c):
        with pyro.plate("data", len(a)):
            pyro.sample("z", dist.Normal((a + c) / 2, 0.5**0.5))

    data = {"c": torch.randn(20), "a": torch.randn(20)}
    exact = dist.Normal(data["c"], 2**0.5).log_prob(data["a"])
    assert torch.allclose(log_marginal(model, guide, data, proposal="guide").log_px.float(), exact, atol=1e-4)
    with pytest.raises(UsageError, match=r"argument 'c' is number 2 of the model \(a, c\) and number 1 of the guide"):
        log_marginal(model, lambda c, a: guide(a, c), data, proposal="guide")


def _with_zeros(make):
    """A pair whose x [N, 3], a third of it zero, has the distribution that `make(location)` gives."""

    def model(x):
        loc = pyro.param("loc", torch.zeros(3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", make(z[..., None] + loc).to_event(1), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.zeros(3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ slope, 1.0))

    return model, guide


POSITIVE = {
    "Gamma": lambda m: dist.Gamma(m.exp() + 0.5, 1.0),
    "LogNormal": lambda m: dist.LogNormal(m, 1.0),
    "Beta": lambda m: dist.Beta(m.exp(), 1.0),
    "MixtureSameFamily": lambda m: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Gamma(m.exp()[..., None] + torch.tensor([0.5, 2.0]), 1.0)
    ),
}


@pytest.mark.parametrize("name", POSITIVE)
def test_zeros_under_a_density_of_positive_numbers(name):
    """Pyro's zero-inflated distribution is refused, and a density alone; the cure of both trains and evaluates."""
    x = torch.rand(30, 3, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.05
    x[::3] = 0
    cure = rf"ppvae\.distributions\.ZeroInflated\({name}\(\.\.\.\), gate_logits\)"
    inflated = lambda m: dist.ZeroInflatedDistribution(POSITIVE[name](m), gate=torch.tensor(0.3))  # noqa: E731
    with pytest.raises(ContractError, match=rf"site 'x'.*over {name}.*{cure}"):
        fit(*_with_zeros(inflated), x, epochs=1, compile=False)
    if name != "Beta":  # of which zeros may be an end of a scale, too
        pyro.clear_param_store()
        with pytest.raises((DataError, TrainingError), match=cure):
            fit(*_with_zeros(POSITIVE[name]), x, epochs=1, compile=False)
    pyro.clear_param_store()
    cured = lambda m: distributions.ZeroInflated(POSITIVE[name](m), torch.tensor(-1.0))  # noqa: E731
    run = fit(*_with_zeros(cured), x, epochs=1, compile=False)
    est = log_marginal(run.model, run.guide, x, num_particles=30, proposal="guide")
    assert bool(est.log_px.isfinite().all())
    assert est.base_measure == "mixed"
