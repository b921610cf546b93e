"""Annealing against closed forms, quadrature and its own laws; BDMC's two bounds around the exact value."""

import json
import math
from typing import ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from ppvae import log_marginal
from ppvae.errors import CheckpointError, ContractError, UsageError
from ppvae.evaluation import Bracket, annealed, bdmc, quadrature
from ppvae.evaluation.annealing import ais, hmc
from ppvae.evaluation.annealing import bdmc as bidirectional
from ppvae.evaluation.annealing.schedules import equal_ess, named_schedule
from ppvae.evaluation.unconstrained import compiled_potential, potential
from ppvae.models import LinearGaussian
from tests.programs.strangers import PAIRS


@pytest.fixture(autouse=True)
def clean():
    """float64 and an empty param store, and both as they were afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    torch.manual_seed(0)
    yield
    pyro.clear_param_store()
    torch.set_default_dtype(before)


def oracle(features, latent, scale, count):
    """A linear-Gaussian pair and data of its own."""
    torch.manual_seed(1)
    pair = LinearGaussian(features, latent, scale)
    for p in pair.parameters():
        p.requires_grad_(False)
    pair.loc.normal_()
    x = dist.LowRankMultivariateNormal(pair.loc, pair.weight, scale**2 * torch.ones(features)).sample((count,))
    return pair, x


def registered(name):
    """A pair of `strangers` whose parameters are in the store, as after training."""
    model, guide, batch = PAIRS[name]()
    for fn in (guide, model):
        poutine.trace(fn).get_trace(*batch)
    return model, guide, batch


SHORT = {"num_temperatures": 5, "num_leapfrog": 2, "num_chains": 4}


# -- the linear-Gaussian oracle ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "draws", "temperatures"), [(0.7, 64, 250), pytest.param(0.5, 5000, 1000, marks=pytest.mark.slow)]
)
def test_chains_from_the_prior_are_near_where_importance_sampling_from_it_is_far_off(scale, draws, temperatures):
    """The mean of 40 errors, with a standard error of 0.014: beyond 0.05 with p < 1e-3; the seed is fixed."""
    pair, x = oracle(64, 8, scale, 40)
    exact = pair.log_px(x)
    prior = annealed(pair.model, pair.guide, x, start="prior", num_chains=draws, num_temperatures=1)
    assert (prior.log_px - exact).mean() < -5
    settings = {"schedule": "equal_ess", "num_chains": 64, "num_temperatures": temperatures, "num_leapfrog": 5}
    est = annealed(pair.model, pair.guide, x, start="prior", **settings)
    assert (est.log_px - exact).mean().abs() < 0.05
    assert est.method == "annealed importance sampling"
    z = (est.log_px - exact) / est.std_error
    assert 0.4 < z.square().mean() < 2.0  # the errors are as large as std_error says


def test_chains_from_the_guide_are_within_a_twentieth_of_a_nat():
    """Root mean square of 20 errors, whose standard errors are 0.03: p < 1e-4; measured 0.03."""
    pair, x = oracle(64, 8, 0.5, 20)
    est = annealed(pair.model, pair.mean_field, x, num_chains=64, num_temperatures=100, num_leapfrog=5)
    assert (est.log_px - pair.log_px(x)).square().mean().sqrt() < 0.05
    assert est.reliable.all()
    assert (est.diagnostics["acceptance"] - 0.8).abs().max() < 0.1


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(("schedule", "resample"), [("sigmoid", 0.0), ("equal_ess", 0.9)])
def test_exp_of_the_estimate_is_unbiased(schedule, resample):
    """mean exp(estimate - exact) over 400 independent copies of a datum: beyond 4 standard errors with p < 1e-4."""
    pair, x = oracle(8, 2, 0.7, 1)
    settings = {"num_chains": 8, "num_temperatures": 12, "num_leapfrog": 3, "start": "prior", "schedule": schedule}
    est = annealed(pair.model, pair.guide, x.expand(400, -1), resample=resample, **settings)
    ratio = (est.log_px - pair.log_px(x)).exp()
    assert (ratio.mean() - 1).abs() < 4 * ratio.std() / 20
    assert ratio.std() > 0.05  # the law is not empty
    assert ratio.std() / 20 < 0.05
    if resample:
        assert est.diagnostics["resampled"].mean() > 1
        assert est.method == "sequential Monte Carlo"
    error = (ratio.std() / est.std_error.exp().log().square().mean().sqrt()).item()
    assert 0.5 < error < 2  # what std_error says of the spread, descendants of one draw counted as one


@pytest.mark.usefixtures("hasty")
def test_an_exact_guide_has_no_spread():
    pair, x = oracle(6, 3, 0.5, 20)
    est = annealed(pair.model, pair.guide, x, **SHORT)
    assert (est.log_px - pair.log_px(x)).abs().max() < 1e-9
    assert est.reliable.all()


# -- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    "name", ["modules", "hierarchical", "supports", "enumerated_model", "semi_supervised", "masked"]
)
def test_one_temperature_is_log_marginal(name):
    model, guide, batch = registered(name)
    one = annealed(model, guide, batch, num_chains=130, num_temperatures=1, seed=4)
    other = log_marginal(model, guide, batch, num_particles=130, seed=4, proposal="guide")
    for value in ("log_px", "std_error", "ess", "elbo", "k_hat"):
        assert (getattr(one, value) - getattr(other, value)).abs().max() < 1e-9
    assert one.bounds.keys() == other.bounds.keys()
    assert (one.reliable == other.reliable).all()


@pytest.mark.usefixtures("hasty")
def test_one_temperature_from_the_prior_is_importance_sampling_from_it():
    pair, x = oracle(6, 2, 0.7, 20)

    def prior(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    one = annealed(pair.model, pair.guide, x, num_chains=50, num_temperatures=1, start="prior")
    assert (
        one.log_px - log_marginal(pair.model, prior, x, num_particles=50, proposal="guide").log_px
    ).abs().max() < 1e-9


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("name", ["hierarchical", "indexes", "conv", "inner_plate", "enumerated_model"])
def test_a_result_does_not_depend_on_how_memory_is_cut(name):
    model, guide, batch = registered(name)
    whole = annealed(model, guide, batch, **SHORT)
    cut = annealed(model, guide, batch, rows=8, **SHORT)
    assert (whole.log_px - cut.log_px).abs().max() < 1e-9
    assert (whole.diagnostics["acceptance"] - cut.diagnostics["acceptance"]).abs().max() < 1e-9


@pytest.mark.usefixtures("hasty")
def test_a_block_of_data_has_its_own_noise():
    pair, x = oracle(6, 2, 0.7, 60)
    whole, part = (annealed(pair.model, pair.mean_field, rows, **SHORT) for rows in (x, x[:50]))
    assert torch.equal(whole.log_px[:50], part.log_px)
    assert not torch.equal(part.log_px, annealed(pair.model, pair.mean_field, x[:50], seed=1, **SHORT).log_px)


@pytest.mark.usefixtures("hasty")
def test_the_random_state_and_the_parameters_stay_as_they_were():
    pair, x = oracle(6, 2, 0.7, 10)
    pair.weight.requires_grad_(True)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    annealed(pair.model, pair.mean_field, x, **SHORT)
    assert torch.equal(torch.rand(1), expected)
    assert pair.weight.grad is None
    assert pair.weight.requires_grad
    assert len(pyro.get_param_store()) == 0


# -- strangers' pairs -------------------------------------------------------------------------------------------------

REACHED = {  # dims -> by quadrature where they are few, else by importance sampling with a guide that is good enough
    "modules": "quadrature", "indexes": "quadrature", "local_params": "quadrature", "params": "quadrature",
    "classes": "quadrature", "enumerated_model": "quadrature", "markov": "quadrature", "labelled": "quadrature",
    "obs_mask": "quadrature", "sequential_plate": "quadrature", "auxiliary": "quadrature", "auto_normal": "quadrature",
    "inner_plate": "closed form", "enumerated_both": "sampling", "supports": "sampling", "masked": "sampling",
    "shared_latent": "sampling",
}  # fmt: skip


QUICK = ("modules", "indexes", "enumerated_model", "masked", "shared_latent", "auxiliary")
STRANGERS = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in REACHED]


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("name", STRANGERS)
def test_strangers_pairs_are_annealed_rightly(name):
    """Each of at most 10 data within 5 standard errors and 0.1 nats more: p < 1e-5 a pair."""
    model, guide, batch = registered(name)
    temperatures = {"inner_plate": 120, "shared_latent": 60}.get(name, 25)  # more dims
    est = annealed(model, guide, batch, num_chains=32, num_temperatures=temperatures, num_leapfrog=3)
    if REACHED[name] == "quadrature":
        exact = quadrature(model, guide, batch, num_nodes=65)
        assert exact.error.max() < 0.02
        reference, error = exact.log_px, est.std_error
    elif REACHED[name] == "closed form":  # x = z W + noise, z = u + e: a normal over the parts and their features
        weight = dict(zip(model.__code__.co_freevars, (c.cell_contents for c in model.__closure__), strict=True))[
            "weight"
        ]
        same = weight.T @ torch.ones(2, 2) @ weight
        own = weight.T @ weight + 0.49 * torch.eye(4)
        covariance = torch.kron(torch.ones(3, 3), same) + torch.kron(torch.eye(3), own)
        reference = dist.MultivariateNormal(torch.zeros(12), covariance).log_prob(batch[0].flatten(1))
        error = est.std_error
    else:
        other = log_marginal(
            model, guide, batch, num_particles=80_000 if name == "supports" else 20_000, proposal="guide"
        )
        assert other.ess.min() > 50
        reference, error = other.log_px, (est.std_error**2 + other.std_error**2).sqrt()
    assert ((est.log_px - reference).abs() < 5 * error + 0.02).all()
    assert est.ess.median() > 8  # of 32: the chains do move from the guide to the posterior
    assert est.diagnostics["acceptance"].min() > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hierarchical", "conv", "rnn", "flow", "semi_supervised"])
def test_more_strangers_pairs_are_annealed_rightly(name):
    model, guide, batch = registered(name)
    est = annealed(model, guide, batch, num_chains=64, num_temperatures=100)
    other = log_marginal(model, guide, batch, num_particles=50_000, proposal="guide")
    error = (est.std_error**2 + other.std_error**2).sqrt()
    assert ((est.log_px - other.log_px).abs() < 5 * error + 0.02)[other.ess > 50].all()
    assert est.ess.median() > 30


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    "name",
    ["modules", *(pytest.param(n, marks=pytest.mark.slow) for n in ("supports", "inner_plate", "shared_latent"))],
)
def test_chains_from_prior_and_guide_agree(name):
    model, guide, batch = registered(name)
    settings = {"num_chains": 32, "num_temperatures": 60, "num_leapfrog": 4}
    one, two = (annealed(model, guide, batch, start=start, **settings) for start in ("guide", "prior"))
    assert ((one.log_px - two.log_px).abs() < 5 * (one.std_error**2 + two.std_error**2).sqrt() + 0.02).all()


def test_a_masked_latent_stays_where_the_guide_drew_it():
    """It has no density, so that w is averaged over the guide's draws alone: log N(w; 0.3, 1.25). p < 1e-5."""
    there = torch.arange(6) % 2 == 0

    def model(w, there):
        with pyro.plate("data", len(w)):
            z = pyro.sample("z", dist.LogNormal(torch.zeros(()), 1.0).mask(there))
            pyro.sample("w", dist.Normal(z.log(), 0.5), obs=w)

    def guide(w, there):
        with pyro.plate("data", len(w)):
            pyro.sample("z", dist.LogNormal(torch.tensor(0.3), 1.0).mask(there))

    w = torch.randn(6)
    est = annealed(model, guide, (w, there), num_chains=200, num_temperatures=30, num_leapfrog=4)
    loc = torch.where(there, 0.0, 0.3)
    exact = torch.distributions.Normal(loc, math.sqrt(1.25)).log_prob(w)
    assert ((est.log_px - exact).abs() < 5 * est.std_error + 1e-3).all()


# -- constrained latents, with closed forms ---------------------------------------------------------------------------


def conjugate(name):
    """(model, guide, data, log p(x) as a function) whose guide is not the posterior."""
    if name == "beta":
        x = torch.tensor([0.0, 3.0, 9.0, 10.0])
        prior, guide = dist.Beta(torch.tensor(2.0), torch.tensor(3.0)), dist.Beta(torch.tensor(1.5), torch.tensor(1.5))
        exact = dist.BetaBinomial(torch.tensor(2.0), torch.tensor(3.0), 10).log_prob
        return *_pair(prior, guide, lambda z: dist.Binomial(10, z)), x, exact
    if name == "gamma":
        x = torch.tensor([0.0, 1.0, 5.0, 12.0])
        prior, guide = dist.Gamma(torch.tensor(2.0), torch.tensor(0.5)), dist.LogNormal(torch.tensor(1.0), 1.0)
        exact = dist.GammaPoisson(torch.tensor(2.0), torch.tensor(0.5)).log_prob
        return *_pair(prior, guide, dist.Poisson), x, exact
    if name == "log_normal":  # x | z ~ LogNormal(log z, 1/2): a normal in logs
        x = torch.tensor([0.1, 1.0, 4.0])
        prior, guide = dist.LogNormal(torch.tensor(0.3), 1.0), dist.Gamma(torch.tensor(2.0), torch.tensor(2.0))
        exact = dist.LogNormal(torch.tensor(0.3), math.sqrt(1.25)).log_prob
        return *_pair(prior, guide, lambda z: dist.LogNormal(z.log(), 0.5)), x, exact
    if name == "uniform":  # on [-1, 3], observed at the edge of it: the posterior is a normal cut at 3
        x = torch.tensor([0.0, 3.2])
        prior, guide = dist.Uniform(torch.tensor(-1.0), 3.0), dist.Uniform(torch.tensor(-1.0), 3.0)

        def exact(x):
            normal = torch.distributions.Normal(x, 0.5)
            return (normal.cdf(torch.tensor(3.0)) - normal.cdf(torch.tensor(-1.0))).log() - math.log(4)

        return *_pair(prior, guide, lambda z: dist.Normal(z, 0.5)), x, exact
    x = torch.tensor([[5.0, 0.0, 1.0, 2.0], [0.0, 0.0, 8.0, 0.0]])
    alpha = torch.tensor([1.0, 2.0, 0.7, 3.0])
    prior, guide = dist.Dirichlet(alpha), dist.Dirichlet(torch.ones(4) * 1.5)
    exact = dist.DirichletMultinomial(alpha, 8).log_prob
    return *_pair(prior, guide, lambda z: dist.Multinomial(8, z)), x, exact


def _pair(prior, posterior, likelihood):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", likelihood(z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior)

    return model, guide


CONJUGATE = ["beta", "gamma", "log_normal", "uniform", "dirichlet"]


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("name", CONJUGATE)
def test_constrained_latents_are_right(name):
    """Each datum within 5 standard errors, or 0.02 nats: p < 1e-5."""
    model, guide, x, log_px = conjugate(name)
    exact = log_px(x)
    est = annealed(model, guide, x, num_chains=100, num_temperatures=40, num_leapfrog=3)
    assert ((est.log_px - exact).abs() < 5 * est.std_error).all()
    assert est.std_error.max() < 0.1
    assert (quadrature(model, guide, x).log_px - exact).abs().max() < 1e-5


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("name", ["gamma", "dirichlet"])
def test_simulated_constrained_data_are_bracketed(name):
    """Mean gap under 0.1, and neither bound beyond the other by 4 standard errors (p < 1e-4 each)."""
    model, guide, x, log_px = conjugate(name)
    bracket = bdmc(model, guide, x[:1].expand(100, *x.shape[1:]), num_chains=8, num_temperatures=50, num_leapfrog=3)
    exact = log_px(bracket.data[0])
    for slack in (exact - bracket.lower, bracket.upper - exact):
        assert slack.mean() > -4 * slack.std() / 10
    assert bracket.gap.mean() < 0.1


# -- bidirectional Monte Carlo ----------------------------------------------------------------------------------------


def bracket_faults(bracket, exact):
    """What is wrong with a bracket of 400 data around the exact values."""
    faults = []
    for name, slack in (("lower", exact - bracket.lower), ("upper", bracket.upper - exact)):
        if slack.mean() < -4 * slack.std() / math.sqrt(len(slack)):
            faults.append(name)
    if bracket.gap.mean() > 0.1:
        faults.append("gap")
    low, high = bracket.lower - 3 * bracket.lower_std_error, bracket.upper + 3 * bracket.upper_std_error
    if ((low <= exact) & (exact <= high)).double().mean() < 0.95:
        faults.append("interval")
    return faults


@pytest.mark.usefixtures("hasty")
def test_simulated_data_are_bracketed():
    """400 data: either bound on the wrong side by 4 standard errors has p < 4e-5."""
    pair, x = oracle(20, 4, 0.7, 400)
    bracket = bdmc(pair.model, pair.mean_field, x, num_chains=16, num_temperatures=25, num_leapfrog=3)
    exact = pair.log_px(bracket.data[0])
    assert not torch.equal(bracket.data[0], x)
    assert bracket_faults(bracket, exact) == []
    assert "simulated" in bracket.summary()
    for planted in ({"lower": bracket.lower + 0.3}, {"upper": bracket.upper - 0.3}):
        changed = Bracket(**{**vars(bracket), **planted})
        assert bracket_faults(changed, exact)


def test_reverse_chains_start_from_the_simulated_latents():
    """From anywhere else they bound nothing: with one temperature, 1 / w at a draw of the guide is far too small."""
    pair, x = oracle(20, 4, 0.7, 200)
    settings = {"num_chains": 1, "num_temperatures": 1, "start": "prior"}
    bracket = bdmc(pair.model, pair.guide, x, **settings)
    exact = pair.log_px(bracket.data[0])
    slack = bracket.upper - exact
    # E_{p(z|x)} log p(x | z) = log p(x) + KL(posterior, prior), known here
    posterior = pair.posterior(bracket.data[0])
    kl = torch.distributions.kl_divergence(
        posterior, dist.MultivariateNormal(torch.zeros(4), torch.eye(4)).expand([200])
    )
    assert ((slack - kl).mean() / (slack - kl).std() * math.sqrt(200)).abs() < 4


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("name", ["indexes", "enumerated_model", "labelled", "shared_latent"])
def test_strangers_simulated_data_are_bracketed(name):
    """Their few data within 5 standard errors of the other side."""
    model, guide, batch = registered(name)
    bracket = bdmc(model, guide, batch, num_chains=32, num_temperatures=30, num_leapfrog=3)
    error = (bracket.lower_std_error**2 + bracket.upper_std_error**2).sqrt()
    assert (bracket.gap > -5 * error).all()
    assert bracket.gap.mean() < 0.2 + 3 * error.mean()
    assert all(new.shape == old.shape for new, old in zip(bracket.data, batch, strict=True))
    if name == "labelled":
        assert torch.equal(bracket.data[1], batch[1])  # what the model is conditioned on stays


@pytest.mark.usefixtures("hasty")
def test_simulated_values_that_are_no_column_are_put_in_place():
    """Numbers of a column by themselves or by the user, with the same result; those of no column are refused."""
    model, guide, batch = registered("inner_plate")
    found = bdmc(model, guide, batch, **SHORT)
    bracket = bdmc(model, guide, batch, assemble=lambda seen, batch: (seen["x"].transpose(0, 1),), **SHORT)
    assert bracket.data[0].shape == batch[0].shape
    assert torch.equal(found.data[0], bracket.data[0])
    with pytest.raises(ContractError, match=r"site .*assemble="):
        bdmc(*registered("obs_mask"), **SHORT)
    with pytest.raises(ContractError, match=r"site 'x'"):  # put in the wrong place
        bdmc(model, guide, batch, assemble=lambda seen, batch: batch, **SHORT)
    for name in ("auxiliary", "semi_supervised"):
        with pytest.raises(ContractError, match=r"helper|Enumerate it in the model"):
            bdmc(*registered(name), **SHORT)


@pytest.mark.usefixtures("hasty")
def test_a_bracket_is_saved(tmp_path):
    pair, x = oracle(6, 2, 0.7, 10)
    bracket = bdmc(pair.model, pair.mean_field, x, **SHORT)
    again = Bracket.load(bracket.save(tmp_path))
    assert torch.equal(again.gap, bracket.gap)
    assert again.settings == bracket.settings
    assert again.table() == bracket.table()
    assert again.summary() == bracket.summary()
    assert bracket.table()["num_temperatures"] == "5"
    assert "simulated from the model" in bracket.table()["data"]
    assert "says nothing of other data" in bracket.table()["holds for"]


@pytest.mark.usefixtures("hasty")
def test_an_interrupted_bracket_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    pair, x = oracle(6, 2, 0.7, 120)
    whole = bdmc(pair.model, pair.mean_field, x, **SHORT)
    real, calls = bidirectional._bracket_block, []

    def stopped(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(bidirectional, "_bracket_block", stopped)
    with pytest.raises(KeyboardInterrupt):
        bdmc(pair.model, pair.mean_field, x, directory=tmp_path, **SHORT)
    again = bdmc(pair.model, pair.mean_field, x, directory=tmp_path, **SHORT)
    assert len(calls) == 4  # two blocks, the one that was stopped, and it again
    for name in ("lower", "upper", "acceptance"):
        assert torch.equal(getattr(again, name), getattr(whole, name)), name
    with pytest.raises(UsageError, match="what is 'bdmc' there and 'annealed' here"):
        annealed(pair.model, pair.mean_field, x, directory=tmp_path, **SHORT)


# -- schedules --------------------------------------------------------------------------------------------------------


def test_a_schedule_of_equal_ess_has_steps_of_equal_length():
    """sd(log w) = 1 / (0.01 + beta): the steps lie evenly in log(0.01 + beta), where nothing is spread evenly."""
    betas = named_schedule("sigmoid", 400)
    spread = (1 / (0.01 + betas[:-1])).expand(2, -1).T
    found = equal_ess(betas, spread)
    assert found.shape == (401, 2)
    assert (found.diff(dim=0) > 0).all()
    steps = (0.01 + found[:, 0]).log().diff()[20:-20]
    assert steps.std() / steps.mean() < 0.25
    even = named_schedule("linear", 400).add(0.01).log().diff()[20:-20]
    assert even.std() / even.mean() > 0.8  # so that the law is not empty
    flat = equal_ess(betas, torch.zeros(400, 1))
    assert (flat.diff(dim=0) > 0).all()


@pytest.mark.usefixtures("hasty")
def test_given_temperatures_are_taken_as_they_are():
    pair, x = oracle(6, 2, 0.7, 10)
    by_name = annealed(pair.model, pair.mean_field, x, schedule="sigmoid", **SHORT)
    given = annealed(pair.model, pair.mean_field, x, schedule=named_schedule("sigmoid", 5).tolist(), **SHORT)
    assert torch.equal(by_name.log_px, given.log_px)


# -- long runs --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("resample", [0.0, 0.8])
def test_an_interrupted_run_goes_on_to_the_same_numbers(tmp_path, monkeypatch, resample):
    pair, x = oracle(6, 2, 0.7, 120)
    settings = {**SHORT, "num_chains": 110, "resample": resample}
    whole = annealed(pair.model, pair.mean_field, x, **settings)
    real, calls = ais.run_forward_chains, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(ais, "run_forward_chains", interrupted)
    with pytest.raises(KeyboardInterrupt):
        annealed(pair.model, pair.mean_field, x, directory=tmp_path, **settings)
    assert len(list(tmp_path.glob("chains-*.npz"))) == 2
    resumed = annealed(pair.model, pair.mean_field, x, directory=tmp_path, **settings)
    done = len(calls)
    again = annealed(pair.model, pair.mean_field, x, directory=tmp_path, **settings)  # nothing is left to do
    assert len(calls) == done
    for other in (resumed, again):
        for name, value in whole.per_datum().items():
            assert torch.equal(value.nan_to_num(), other.per_datum()[name].nan_to_num()), name


@pytest.mark.usefixtures("hasty")
def test_a_folder_of_another_evaluation_is_refused(tmp_path):
    pair, x = oracle(6, 2, 0.7, 10)
    annealed(pair.model, pair.mean_field, x, directory=tmp_path, **SHORT)
    with pytest.raises(UsageError, match="num_chains is 4 there and 7 here"):
        annealed(pair.model, pair.mean_field, x, directory=tmp_path, **{**SHORT, "num_chains": 7})
    with pytest.raises(UsageError, match="data is"):
        annealed(pair.model, pair.mean_field, x + 1, directory=tmp_path, **SHORT)
    with torch.no_grad():
        pair.weight.add_(1e-3)
    with pytest.raises(UsageError, match="parameters is"):
        annealed(pair.model, pair.mean_field, x, directory=tmp_path, **SHORT)


@pytest.mark.usefixtures("hasty")
def test_a_damaged_part_is_named(tmp_path):
    pair, x = oracle(6, 2, 0.7, 10)
    whole = annealed(pair.model, pair.mean_field, x, directory=tmp_path, **SHORT)
    path = next(tmp_path.glob("chains-*.npz"))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=path.name):
        annealed(pair.model, pair.mean_field, x, directory=tmp_path, **SHORT)
    path.unlink()
    assert torch.equal(annealed(pair.model, pair.mean_field, x, directory=tmp_path, **SHORT).log_px, whole.log_px)
    np.savez(path, log_weight=np.array([{"code": 1}], dtype=object))
    with pytest.raises(CheckpointError, match=path.name):
        annealed(pair.model, pair.mean_field, x, directory=tmp_path, **SHORT)


# -- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hasty")
def test_an_annealed_estimate_says_how_it_was_made(tmp_path):
    pair, x = oracle(6, 2, 0.7, 10)
    est = annealed(pair.model, pair.mean_field, x, **SHORT)
    assert "annealed importance sampling, 4 chains" in est.summary()
    assert est.table()["num_temperatures"] == "5"
    content = json.loads(est.save(tmp_path, "annealed").read_text())
    assert content["method"] == "annealed importance sampling"
    assert content["schedule"] == "sigmoid"
    assert content["per_datum"]["acceptance"] == est.diagnostics["acceptance"].tolist()
    assert (tmp_path / "annealed.nc").exists()


def test_float32_data_stay_float32():
    torch.set_default_dtype(torch.float32)
    pair, x = oracle(20, 4, 0.7, 20)
    est = annealed(pair.model, pair.mean_field, x, num_chains=64, num_temperatures=40, num_leapfrog=4)
    assert ((est.log_px - pair.log_px(x)).abs() < 5 * est.std_error + 1e-3).all()
    assert est.log_px.dtype == torch.float64


def test_chains_that_do_not_move_are_not_trusted(monkeypatch):
    pair, x = oracle(20, 4, 0.7, 10)
    real = hmc.adapt_step_sizes

    def useless(*args):
        steps, spread = real(*args)
        return torch.full_like(steps, 50.0), spread

    monkeypatch.setattr("ppvae.evaluation.annealing.setup.adapt_step_sizes", useless)
    assert not annealed(pair.model, pair.mean_field, x, **SHORT).reliable.any()


@pytest.mark.usefixtures("hasty")
def test_a_datum_that_is_not_finite_is_flagged_and_leaves_the_others_alone():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            scale = torch.where(x[:, :1] > 100, torch.nan, torch.ones(len(x), 1))
            pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0).to_event(1))

    x = torch.randn(6, 2)
    clean = annealed(model, guide, x, **SHORT)
    x[3] = 200.0
    est = annealed(model, guide, x, **SHORT)
    assert est.nonfinite[3] > 0
    assert not est.reliable[3]
    others = torch.arange(6) != 3
    assert (est.log_px - clean.log_px)[others].abs().max() < 1e-9


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_discrete_latent_is_refused():
    with pytest.raises(ContractError, match=r"site 'z'.*discrete.*enumerate"):
        annealed(*registered("discrete"), **SHORT)
    with pytest.raises(UsageError, match="exact already"):
        annealed(*registered("enumerated_vector"), **SHORT)


class Curve(dist.constraints.Constraint):
    """A curve in the plane."""

    event_dim = 1

    def check(self, value):
        return torch.ones(value.shape[:-1], dtype=torch.bool)


def test_a_support_without_a_transform_is_refused():
    class Circle(dist.TorchDistribution):
        """Points of a circle."""

        arg_constraints: ClassVar[dict] = {}
        support = Curve()
        has_rsample = True

        def __init__(self, shape=()):
            super().__init__(torch.Size(shape), torch.Size((2,)), validate_args=False)

        def expand(self, shape, _instance=None):
            return Circle(shape)

        def rsample(self, sample_shape=()):
            z = torch.randn(*sample_shape, *self.batch_shape, 2)
            return z / z.norm(dim=-1, keepdim=True)

        def log_prob(self, value):
            return torch.full(value.shape[:-1], -math.log(2 * math.pi))

    model, guide = _pair(Circle(), Circle(), lambda z: dist.Normal(z, 1.0).to_event(1))
    with pytest.raises(ContractError, match=r"site 'z'.*transform to real numbers.*Circle"):
        annealed(model, guide, torch.randn(4, 2), **SHORT)


def test_a_support_that_moves_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Gamma(torch.tensor(2.0), 1.0))
            z = pyro.sample("z", dist.Uniform(torch.zeros(()), top))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Gamma(torch.tensor(2.0), 1.0))
            pyro.sample("z", dist.Uniform(torch.zeros(()), top))

    with pytest.raises(ContractError, match=r"site 'z'.*moves with another latent"):
        annealed(model, guide, torch.randn(4), **SHORT)


def test_a_density_that_is_drawn_anew_is_refused():
    def model(x, seen):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            y = pyro.sample("y", dist.Normal(z, 0.5), obs=x, obs_mask=seen)
            pyro.sample("w", dist.Normal(y, 0.8), obs=2 * x)

    def guide(x, seen):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x, 0.8))

    with pytest.raises(ContractError, match=r"y_unobserved.*draws anew"):
        annealed(model, guide, (torch.randn(6), torch.arange(6) % 2 == 0), **SHORT)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_chains": 0}, "num_chains: expected at least 1, found 0"),
        ({"num_temperatures": 0}, "num_temperatures"),
        ({"num_leapfrog": 0}, "num_leapfrog"),
        ({"rows": 0}, "rows"),
        ({"start": "mode"}, "start: expected 'guide' or 'prior'"),
        ({"schedule": "cubic"}, "schedule: expected one of"),
        ({"schedule": [0.0, 0.6, 0.5, 1.0], "num_temperatures": 3}, "rise from 0 to 1"),
        ({"schedule": [0.0, 0.5, 1.0], "num_temperatures": 3}, "4 numbers, found 3"),
        ({"resample": 1.5}, "resample"),
        ({"target_acceptance": 1.0}, "target_acceptance"),
    ],
)
def test_settings_that_cannot_be_used_are_named(settings, words):
    pair, x = oracle(6, 2, 0.7, 4)
    with pytest.raises(UsageError, match=words):
        annealed(pair.model, pair.guide, x, **settings)


def test_the_prior_of_enumerated_sites_is_refused():
    with pytest.raises(UsageError, match="start='prior'"):
        annealed(*registered("enumerated_model"), start="prior", **SHORT)


@pytest.mark.slow
def test_chains_on_a_compiled_graph_are_those_of_the_pair(monkeypatch, caplog):
    pair, x = LinearGaussian(3, 2).double(), torch.randn(110, 3, dtype=torch.float64)  # blocks of 50, 50 and 10
    plain = annealed(pair.model, pair.mean_field, x, num_temperatures=6, num_chains=3, num_leapfrog=2)
    monkeypatch.setattr(compiled_potential, "MIN_GRADIENTS", 1)
    runs: list[int] = []
    real = potential.Potential.evaluate
    monkeypatch.setattr(potential.Potential, "evaluate", lambda self, u: runs.append(1) or real(self, u))
    fast = annealed(pair.model, pair.mean_field, x, num_temperatures=6, num_chains=3, num_leapfrog=2)
    assert torch.allclose(fast.log_px, plain.log_px, atol=1e-9)
    assert torch.allclose(fast.diagnostics["acceptance"], plain.diagnostics["acceptance"], atol=1e-9)
    assert len(runs) == 8  # to capture and to check, for pilot and chains, of blocks of two sizes
    assert not [r for r in caplog.records if r.name == "ppvae"]
    slow = annealed(pair.model, pair.mean_field, x, num_temperatures=6, num_chains=3, num_leapfrog=2, compile=False)
    assert torch.equal(slow.log_px, plain.log_px)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PAIRS))
def test_strangers_anneal_on_a_graph_or_say_why(name, monkeypatch, caplog):
    model, guide, batch = PAIRS[name]()
    settings = {"num_temperatures": 5, "num_chains": 2, "num_leapfrog": 2, "progress": False}
    data = batch if len(batch) > 1 else batch[0]
    try:
        plain = annealed(model, guide, data, **settings)
    except (ContractError, UsageError):
        pytest.skip("cannot be annealed")
    monkeypatch.setattr(compiled_potential, "MIN_GRADIENTS", 1)
    fast = annealed(model, guide, data, **settings)
    assert (fast.log_px - plain.log_px).abs().median() < 1e-3 * (1 + plain.log_px.abs().median())
    assert len([r for r in caplog.records if "compiled graph" in r.message]) <= 1
