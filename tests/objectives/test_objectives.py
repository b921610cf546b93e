"""The laws of `tests.laws.objectives` over all objectives and pairs; pairs and arguments that are refused."""

from __future__ import annotations

import logging
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from ppvae import objectives
from ppvae.errors import ContractError, UsageError
from ppvae.factories.constructor_flags import ClassChoice
from ppvae.inference.param_store import ParamScope
from ppvae.objectives import (
    CIWAE,
    ELBO,
    IWAE,
    MIWAE,
    PIWAE,
    TVO,
    Renyi,
    ReweightedWakeSleep,
)  # fmt: skip
from tests.laws.objectives import (
    COMBINATIONS,
    ESTIMATORS,
    OBJECTIVES,
    check_batch_norm,
    check_pair,
    check_plate_scale,
    check_shift,
    check_value_is_independent_of_gradient,
)
from tests.programs.strangers import PAIRS
from tests.programs.toys import ONE

pytestmark = pytest.mark.filterwarnings("ignore:STL is biased")


def test_a_subsampled_plate_scales_the_loss_outside_the_logarithm() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 1).double()

    def build(size: int | None) -> tuple[object, object]:
        def plate() -> object:
            return pyro.plate("data", size or 8, subsample=torch.arange(8))

        def model(x: Tensor) -> None:
            with plate():
                z = pyro.sample("z", dist.Normal(torch.zeros(1).double(), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        def guide(x: Tensor) -> None:
            with plate():
                pyro.sample("z", dist.Normal(x / 3, 1.0).to_event(1))

        return model, guide

    losses = []
    for size in (None, 80):
        objective = objectives.IWAE(5)
        model, guide = build(size)
        objective.loss(model, guide, x)
        torch.manual_seed(3)
        losses.append(objective.loss(model, guide, x))
    assert losses[1] == pytest.approx(10 * losses[0], rel=1e-12)


def test_a_latent_that_is_not_reparameterised_is_refused_by_name() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        p = pyro.param("p", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Bernoulli(p))

    with ParamScope().entered(), pytest.raises(ContractError, match=r"'k'.*reparameterised"):
        objectives.ELBO().loss(model, guide, torch.zeros(3))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_value_does_not_depend_on_its_gradient(name, float64):
    check_value_is_independent_of_gradient(OBJECTIVES[name])


@pytest.mark.parametrize("name", [name for name, case in OBJECTIVES.items() if case.reduce is not None])
def test_a_constant_in_the_log_weights_is_added_to_the_bound(name, float64):
    check_shift(OBJECTIVES[name].build(3, "pathwise"))


@pytest.mark.parametrize(("name", "gradient"), COMBINATIONS)
def test_the_plates_scale_is_outside_of_the_bound(name, gradient, float64):
    check_plate_scale(OBJECTIVES[name], ESTIMATORS[gradient])


@pytest.mark.parametrize("pair", PAIRS)
def test_every_objective_takes_every_pair_or_says_why_not(pair, float64, caplog):
    caplog.set_level(logging.ERROR, logger="ppvae")
    for name, gradient in COMBINATIONS:
        check_pair(OBJECTIVES[name], ESTIMATORS[gradient], pair)


@pytest.mark.parametrize(("name", "gradient"), COMBINATIONS)
def test_a_step_leaves_batch_norm_as_one_run_of_the_pair_does(name, gradient, float64):
    check_batch_norm(OBJECTIVES[name], ESTIMATORS[gradient])


def test_a_bound_that_sums_a_guides_site_out_says_that_it_teaches_it_nothing(float64, caplog):
    model, guide, batch = PAIRS["semi_supervised"]()
    with caplog.at_level(logging.WARNING, logger="ppvae"):
        IWAE(3).loss(model, guide, *batch)
    assert any("'y'" in m or "y:" in m for m in caplog.messages), caplog.messages


def point_pair():
    loc = nn.Parameter(torch.tensor(0.4))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(pyro.param("loc", loc)))

    return model, guide, torch.tensor([1.0, 2.0]), loc


def test_a_point_mass_trains_by_the_elbo_and_has_no_weights(float64):
    model, guide, x, loc = point_pair()
    ELBO().loss_and_grads(model, guide, x)
    assert float(loc.grad) == pytest.approx(2 * 0.4 - (0.6 + 1.6))  # d/dz of log p(x, z), summed over two data
    for objective in (IWAE(3), Renyi(0.5, 3), CIWAE(0.5, 3), MIWAE(2, 2), PIWAE(2, 2), TVO(3), ReweightedWakeSleep(3)):
        with pytest.raises(ContractError, match=r"'z'.*absolutely continuous"):
            objective.loss(model, guide, x)


def test_other_scales_and_keywords_are_refused(float64):
    model, guide, x, _ = ONE.pair(3)
    for objective in (ELBO(), IWAE(3)):
        with pytest.raises(ContractError, match="scale"):
            objective.loss(poutine.scale(model, 0.5), guide, x)
        with pytest.raises(UsageError, match="no keywords"):
            objective.loss(model, guide, x, annealing=0.5)


def test_a_shared_latent_whose_posterior_depends_on_the_batch_wants_all_data_in_it(float64):
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 50, subsample=x):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x):
        pyro.sample("loc", dist.Normal(pyro.param("q", torch.tensor(0.5)) * x.mean(), 1.0))

    with pytest.raises(ContractError, match=r"shared by all data: expected all 50.*found 3.*rows of the batch"):
        ELBO().loss(model, guide, torch.arange(3.0))

    def cure(x):
        pyro.sample("loc", dist.Normal(pyro.param("q"), 1.0))

    assert math.isfinite(ELBO().loss(model, cure, torch.arange(3.0)))


def test_particles_of_a_plate_that_draws_its_subsample_look_at_the_same_data(float64, monkeypatch):
    monkeypatch.setattr("ppvae.inference.inspection.find_particle_placement", lambda *_: "one by one")
    x = torch.tensor([0.0, 100.0, 200.0, 300.0])

    def model(x):
        with pyro.plate("data", 4, subsample_size=1) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1e-3))
            pyro.sample("x", dist.Normal(z + pyro.param("shift", torch.tensor(0.0)), 1.0), obs=x[index])

    def guide(x):
        with pyro.plate("data", 4, subsample_size=1):
            pyro.sample("z", dist.Normal(0.0, 1e-3))

    objective = ELBO(20)
    objective.loss(model, guide, x)
    exact = sorted(4 * float(0.5 * v**2 + 0.5 * math.log(2 * math.pi)) for v in x)
    for _ in range(10):
        loss = objective.loss(model, guide, x)
        assert min(abs(loss - e) for e in exact) < 10


def test_every_objective_is_under_the_laws():
    built = {type(case.build(2, ESTIMATORS[case.estimators[0]].build())).__name__ for case in OBJECTIVES.values()}
    assert built == {*objectives.__all__} - {"Objective"}


def test_names_for_the_command_line():
    for name in objectives.__all__:
        thing = getattr(objectives, name)
        assert issubclass(thing, objectives.Objective)
        if name != "Objective":
            thing()  # every argument has a default
            assert "Args:" in thing.__doc__
    flags = ClassChoice(("ppvae.objectives",), objectives.Objective).flags
    assert {"num_particles", "gradient"} == flags(IWAE).keys()
    assert {"num_particles", "beta", "free_bits", "analytic_kl", "gradient", "warmup"} == flags(ELBO).keys()
