"""Means of gradient estimators against sums over all draws; their variance; their value at the optimum."""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from ppvae import objectives
from ppvae.errors import UsageError
from ppvae.objectives import ELBO, IWAE, MIWAE, PIWAE, TVO, Renyi, ReweightedWakeSleep
from ppvae.objectives.gradients import GRADIENTS, STL, DReG, Pathwise, ScoreFunction
from ppvae.objectives.gradients.control_variates import Learned, LeaveOneOut, MovingAverage, NoBaseline
from tests.laws.gradients import (
    DISCRETE,
    LIMIT,
    REPARAMETERIZED,
    TOYS,
    check_gradient_is_unbiased,
    covariance,
    errors,
    exact,
    exact_of_surrogate,
    folded_samples,
    samples,
    wake,
)
from tests.laws.objectives import (
    COMBINATIONS,
    ESTIMATORS,
    OBJECTIVES,
    EstimatorCase,
    check_leave_one_out_bound,
    log_mean_exp,
    mean,
)
from tests.programs.toys import (
    BITS,
    COARSE,
    DETACHED,
    ENUMERATED,
    MIXED,
    ONE,
    SHARED,
    TWO,
    bernoulli_log_prob,
    gauss_hermite,
)

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore:STL is biased")]

REDUCTIONS = [name for name, case in OBJECTIVES.items() if case.reduce is not None]
UNBIASED = [(n, e) for n, e in COMBINATIONS if n in REDUCTIONS and ESTIMATORS[e].unbiased]


def test_every_named_estimator_is_under_the_laws():
    assert set(GRADIENTS) <= set(ESTIMATORS)


@pytest.mark.parametrize("toy", REPARAMETERIZED)
@pytest.mark.parametrize(("name", "gradient"), UNBIASED)
def test_path_estimators_have_the_gradient_of_the_bound_as_mean(name, gradient, toy):
    check_gradient_is_unbiased(OBJECTIVES[name], ESTIMATORS[gradient], toy)


@pytest.mark.parametrize("toy", ["one", "shared", "two"])
def test_stl_is_unbiased_for_the_elbo_and_biased_for_iwae(toy):
    found = errors(samples(TOYS[toy], ELBO(2, gradient="stl")), exact(toy, 1, mean))
    assert max(found.values()) < LIMIT, found
    found = errors(samples(TOYS[toy], IWAE(2, "stl")), exact(toy, 2, log_mean_exp))
    guides = TOYS[toy].guide_params
    assert max(found[n] for n in guides) > 3 * LIMIT, found
    assert all(found[n] < LIMIT for n in TOYS[toy].model_params if n not in guides), found


def test_stl_warns_once_of_its_bias():
    with warnings.catch_warnings(record=True) as met:
        warnings.simplefilter("always")
        objective = IWAE(3, "stl")
        samples(ONE, objective, 3)
        ELBO(3, gradient="stl")
        IWAE(1, "stl")
        MIWAE(1, 3, "stl")
    assert [str(w.message)[:13] for w in met] == ["STL is biased"]


@pytest.mark.parametrize("toy", ["one", "two"])
@pytest.mark.parametrize("gradient", ["pathwise", "dreg"])
def test_piwae_gives_the_model_iwae_and_the_guide_miwae(gradient, toy):
    targets = {True: exact(toy, 2, log_mean_exp), False: exact(toy, 1, mean)}
    target = {n: targets[n in TOYS[toy].model_params][n] for n in targets[True]}
    found = errors(samples(TOYS[toy], PIWAE(1, 2, gradient)), target)
    assert max(found.values()) < LIMIT, found


@pytest.mark.parametrize("gradient", ["pathwise", "dreg"])
def test_piwae_averages_bounds_of_several_draws(gradient):
    targets = {True: COARSE.gradient(4, log_mean_exp), False: exact("one", 2, log_mean_exp)}
    target = {n: targets[n in ONE.model_params][n] for n in targets[True]}
    found = errors(samples(ONE, PIWAE(2, 2, gradient)), target)
    assert max(found.values()) < LIMIT, found


@pytest.mark.parametrize("gradient", ["pathwise", "dreg"])
def test_piwae_gives_parameters_that_both_share_both_parts(gradient):
    """With K draws in one bound, both parts are IWAE's: a gradient that counted one of them twice would not be."""
    found = errors(samples(SHARED, PIWAE(2, 1, gradient)), exact("shared", 2, log_mean_exp))
    assert max(found.values()) < LIMIT, found


@pytest.mark.parametrize("toy", ["one", "two"])
def test_beta_has_the_gradient_of_the_weighted_bound(toy):
    target = TOYS[toy].gradient(1, mean, lambda p: p.log_lik - 0.3 * (p.log_guide - p.log_prior))
    for gradient in ("pathwise", "stl"):
        found = errors(samples(TOYS[toy], ELBO(2, beta=0.3, gradient=gradient)), target)
        assert max(found.values()) < LIMIT, found


@pytest.mark.parametrize("toy", ["one", "shared", "two"])
def test_a_kl_in_closed_form_has_the_same_gradient(toy):
    """In two layers only the upper one has it: what p(z1 | z2) is given was drawn given z1."""
    found = errors(samples(TOYS[toy], ELBO(2, analytic_kl=True)), exact(toy, 1, mean))
    assert max(found.values()) < LIMIT, found


# -- discrete draws ---------------------------------------------------------------------------------------------------

BASELINES = {
    "none": NoBaseline,
    "average": MovingAverage,
    "others": LeaveOneOut,
    "learned": lambda: Learned(nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 1))),
}


@pytest.mark.parametrize("toy", DISCRETE)
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("name", [name for name in REDUCTIONS if "score" in OBJECTIVES[name].estimators])
def test_the_score_function_has_the_gradient_of_the_bound_as_mean(name, baseline, toy):
    estimator = EstimatorCase(lambda: ScoreFunction(BASELINES[baseline]()))
    check_gradient_is_unbiased(OBJECTIVES[name], estimator, toy)


LEAVE_ONE_OUT = {name: lambda case=OBJECTIVES[name]: case.build(12, "pathwise") for name in REDUCTIONS} | {
    "miwae": lambda: MIWAE(4, 3),
    "renyi 1": lambda: Renyi(1.0, 12),
    "renyi 2": lambda: Renyi(2.0, 12),
    "tvo 1": lambda: TVO(12, 1),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", LEAVE_ONE_OUT)
def test_leave_one_out_bounds_are_bounds_with_one_log_weight_replaced(name, dtype):
    check_leave_one_out_bound(LEAVE_ONE_OUT[name](), dtype)


def test_vimco_tells_the_share_of_a_draw_that_is_nearly_all_and_of_one_that_is_nothing():
    """log w = (a, 0, 0): without the first draw the bound is 0, and without another a + log(1 + e^(-a/2) + e^-a)."""
    bound_of = IWAE(3).learning_signal
    for dtype in (torch.float64, torch.float32):
        a = 100.0
        log_weight = torch.tensor([[a], [0.0], [0.0]], dtype=dtype)
        share = (bound_of(log_weight) - LeaveOneOut()(IWAE(3), log_weight, ()))[:, 0]
        bound = a - math.log(3)
        assert share.tolist() == pytest.approx([bound, 0, 0], abs=1e-4)
        impossible = torch.tensor([[1.0], [2.0], [-torch.inf]])
        assert torch.isfinite(bound_of(impossible) - LeaveOneOut()(IWAE(3), impossible, ())).all()


def test_enumerated_sites_have_the_exact_gradient():
    """The other latent is drawn: the expectation over the enumerated one has no noise of its own."""
    found = samples(ENUMERATED, ELBO(2))
    assert max(errors(found, exact("enum", 1, mean)).values()) < LIMIT
    assert found["u"].std() < 1e-12
    assert found["f"].std() < 0.3 * samples(MIXED, ELBO(2, gradient="vimco"))["f"].std()


def test_wake_sleep_and_tvo_have_the_gradients_that_they_state():
    for toy, listed in ((BITS, BITS), (ONE, DETACHED)):  # draws that have a path are held, too
        found = errors(samples(toy, ReweightedWakeSleep(2)), exact_of_surrogate(listed, 2, wake))
        assert max(found.values()) < LIMIT, found
        for partitions in (1, 3):
            objective = TVO(2, partitions)
            exactly = exact_of_surrogate(listed, 2, functools.partial(covariance, partition=objective.partition()))
            found = errors(samples(toy, objective), exactly)
            assert max(found.values()) < LIMIT, found


def test_what_wake_sleep_and_tvo_state_tends_to_exact_gradients():
    """-d KL(p(z | x) || q(z | x)) and the gradient of the exact left Riemann sum, with an error that falls as 1 / K."""
    params = BITS.leaves()
    points = BITS.points(params)
    joint = points.log_lik + points.log_prior
    posterior = joint.detach().softmax(0)
    kl = dict(
        zip(
            params,
            torch.autograd.grad(-(posterior * points.log_guide).sum(), list(params.values()), allow_unused=True),
            strict=True,
        )
    )
    objective = TVO(3, 3)
    points = BITS.points(params)
    total = 0
    for b, width in objective.partition():
        pi = ((1 - b) * points.log_guide + b * (points.log_lik + points.log_prior)).softmax(0)
        total = total + width * (pi * points.log_weight).sum()
    riemann = dict(zip(params, torch.autograd.grad(total, list(params.values())), strict=True))
    for surrogate, target, sign in (
        (wake, {n: kl[n] for n in BITS.guide_params}, -1),
        (functools.partial(covariance, partition=objective.partition()), riemann, 1),
    ):
        errors_at = []
        for count in (3, 6):
            at = exact_of_surrogate(BITS, count, surrogate)
            errors_at.append(max(abs(at[n] - sign * float(g)) for n, g in target.items()))
        assert errors_at[1] < 0.65 * errors_at[0], errors_at
        assert errors_at[0] < 0.3


def test_sleep_has_the_gradient_of_the_guide_at_the_models_own_data():
    found = samples(BITS, ReweightedWakeSleep(2, wake=0.0, sleep=1.0))
    p = BITS.leaves()
    noise, mass = gauss_hermite(24)
    total = torch.zeros(())
    for a in (0.0, 1.0):
        for b in (0.0, 1.0):
            a_, b_ = torch.tensor(a), torch.tensor(b)
            prior = (bernoulli_log_prob(a_, p["u"]) + bernoulli_log_prob(b_, p["v"] * a_ - 0.2)).detach()
            x = (p["d"] * a - b + p["e"].exp() * noise).detach()
            log_q = bernoulli_log_prob(a_, p["f"] * x) + bernoulli_log_prob(b_, p["g"] + p["h"] * a_)
            total = total + ((mass + prior).exp() * log_q).sum()
    grads = torch.autograd.grad(total, [p[n] for n in BITS.guide_params])
    result = errors(found, {n: float(g) for n, g in zip(BITS.guide_params, grads, strict=True)})
    assert max(result.values()) < LIMIT, result
    assert errors(found, exact("bits", 2, log_mean_exp))["d"] < LIMIT  # the model learns as in the wake


# -- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["folded", "one by one"])
@pytest.mark.parametrize("gradient", ["dreg", "gdreg", "piwae"])
def test_hierarchical_gradients_are_right_in_every_layout(layout, gradient, monkeypatch):
    monkeypatch.setattr("ppvae.inference.inspection.find_particle_placement", lambda *_: layout)
    if layout == "folded":  # a parameter per datum does not fold: the data are not the same in every particle
        found = folded_samples(TWO, PIWAE(1, 2) if gradient == "piwae" else IWAE(2, gradient))
    else:
        found = samples(TWO, PIWAE(1, 2) if gradient == "piwae" else IWAE(2, gradient), shared=False)
    iwae, elbo = exact("two", 2, log_mean_exp), exact("two", 1, mean)
    target = {n: (elbo if gradient == "piwae" and n in TWO.guide_params else iwae)[n] for n in iwae}
    assert max(errors(found, target).values()) < LIMIT


# -- noise ------------------------------------------------------------------------------------------------------------


def noise(toy, objective, names):
    found = samples(toy, objective)
    return np.array([float(found[n].var()) for n in names])


def test_path_estimators_leave_less_noise_than_the_pathwise_one():
    """Measured in the guide's parameters: DReG's variance at K = 16 is 0.002 of the pathwise one, STL's 0.1 to 0.36."""
    for toy, names in ((ONE, ("a", "b", "t")), (TWO, ("a", "t1", "g", "t2"))):
        pathwise = noise(toy, IWAE(16), names)
        assert (noise(toy, IWAE(16, "dreg"), names) < 0.01 * pathwise).all()
        assert (noise(toy, ELBO(1, gradient="stl"), names) < 0.6 * noise(toy, ELBO(1), names)).all()


def test_gdreg_leaves_less_noise_in_the_priors_of_two_layers():
    """Measured at K = 16: variances 0.8, 0.4, 1.1 and 0.6 times DReG's: less for most parameters, not for each."""
    names = ("m", "s2", "c", "s1")
    assert np.log(noise(TWO, IWAE(16, "gdreg"), names) / noise(TWO, IWAE(16, "dreg"), names)).mean() < math.log(0.8)


def test_baselines_take_noise_away():
    """Measured for IWAE at K = 8: a moving average takes variance down by 16 to 22, VIMCO by 12 to 15 more."""
    names = BITS.guide_params
    bare = noise(BITS, IWAE(8, ScoreFunction(NoBaseline())), names)
    average = noise(BITS, IWAE(8, ScoreFunction(MovingAverage())), names)
    assert (average * 5 < bare).all()
    assert (noise(BITS, IWAE(8, "vimco"), names) * 3 < average).all()
    broad = replace(BITS, values={**BITS.values, "e": 1.0})  # whose log-weights are larger than their spread
    bare = noise(broad, ELBO(8, gradient=ScoreFunction(NoBaseline())), names)
    for baseline in (MovingAverage(), LeaveOneOut()):
        assert (noise(broad, ELBO(8, gradient=ScoreFunction(baseline)), names) * 5 < bare).all()


def test_a_learned_baseline_learns_the_bound():
    model, guide, x, _ = BITS.pair(500)
    baseline = Learned(BASELINES["learned"]().net, functools.partial(torch.optim.Adam, lr=0.05))
    objective = ELBO(2, gradient=ScoreFunction(baseline))
    for _ in range(200):
        objective.loss_and_grads(model, guide, x)
    bound = -objective.loss(model, guide, x) / 500
    assert float(baseline.net(x[:1]).detach()) == pytest.approx(bound, abs=0.2)


# -- where the guide is the posterior ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective",
    [ELBO(3, gradient="stl"), ELBO(3, gradient="dreg"), IWAE(3, "dreg"), IWAE(3, "gdreg"), MIWAE(2, 2, "dreg")],
)
def test_the_guides_gradient_is_zero_at_the_exact_posterior(objective):
    """z2 ~ N(0, 1), z1 ~ N(z2, 1), x ~ N(z1, 1); z1 | x ~ N(2x/3, 2/3), z2 | z1 ~ N(z1/2, 1/2): for every draw."""
    own = [nn.Parameter(torch.tensor(v)) for v in (2 / 3, math.sqrt(2 / 3), 0.5, math.sqrt(0.5))]

    def model(x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
            z1 = pyro.sample("z1", dist.Normal(z2, 1.0))
            pyro.sample("x", dist.Normal(z1, 1.0), obs=x)

    def guide(x):
        a, s, c, r = (pyro.param(f"chain.{i}", p) for i, p in enumerate(own))
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(a * x, s))
            pyro.sample("z2", dist.Normal(c * z1, r))

    objective.loss_and_grads(model, guide, torch.randn(4))
    assert all(p.grad.abs() < 1e-12 for p in own)
    for p in own:
        p.grad = None
    ELBO(3).loss_and_grads(model, guide, torch.randn(4))
    assert all(p.grad.abs() > 1e-2 for p in own)


# -- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda: IWAE(1, "vimco"),
        lambda: TVO(5, gradient="dreg"),
        lambda: TVO(1),
        lambda: IWAE(5, "covariance"),
        lambda: PIWAE(2, 2, "stl"),
        lambda: ELBO(gradient="stl", free_bits=0.1),
        lambda: ELBO(gradient="stl", analytic_kl=True),
        lambda: ELBO(gradient="reparam"),
        lambda: ReweightedWakeSleep(1),
        lambda: objectives.MIWAE(2, 0),
    ],
)  # fmt: skip
def test_estimators_that_do_not_fit_an_objective_are_refused(build):
    with pytest.raises(UsageError, match="expected"):
        build()


def test_a_network_with_dropout_draws_the_same_mask_in_a_frozen_guide():
    """The guide runs twice: its density must be the one that the draws come from."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 20), nn.Dropout(0.5), nn.Linear(20, 2))
    top = nn.Sequential(nn.Linear(2, 20), nn.Dropout(0.5), nn.Linear(20, 2))

    def model(x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(z2, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z1.sum(-1, keepdim=True) * torch.ones(3), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("net", net), pyro.module("top", top)
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(net(x), 0.1).to_event(1))
            pyro.sample("z2", dist.Normal(top(z1), 0.1).to_event(1))

    x, values = torch.randn(5, 3), []
    for gradient in (Pathwise(), DReG(), STL(), "gdreg"):
        objective = IWAE(4, gradient)
        objective.loss(model, guide, x)
        torch.manual_seed(1)
        values.append(objective.loss_and_grads(model, guide, x))
    assert values == pytest.approx([values[0]] * 4, abs=1e-9)
