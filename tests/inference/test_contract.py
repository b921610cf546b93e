"""The contract of a pair: every violation raises an error with the site, what was found and a cure, in three lines."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

from ppvae import check, fit, log_marginal
from ppvae.errors import ContractError, DataError, PpvaeError
from ppvae.inference import inspect, terms
from ppvae.models import LinearGaussian
from tests.programs.strangers import PAIRS

N = 5


pytestmark = pytest.mark.usefixtures("float64")


def data(*event):
    return torch.randn(N, *event)


def normal_model(x):
    """z [2] -> x [2], the plainest of models."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def normal_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 1.0).to_event(1))


def scalar_model(x):
    """z -> x, single numbers."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide_of(make, site="z"):
    """A guide with one latent, whose distribution is a function of the data."""

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample(site, make(x))

    return guide


def assert_refused(model, guide, batch, *words, by=(inspect, log_marginal), error=ContractError):
    """Every function that needs weights raises `error` with all the words, in at most three lines."""
    for ask in by:
        with pytest.raises(error) as caught:
            ask(model, guide, batch)
        text = str(caught.value)
        assert len(text.splitlines()) <= 3, text
        assert len(text) <= 500, text
        for word in words:
            assert word in text, text


def test_the_plain_pair_is_taken():
    assert inspect(normal_model, normal_guide, data(2)).layout == "vectorized"


# -- plates and shapes ------------------------------------------------------------------------------------------------


def test_a_guide_that_omits_a_latent():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            extra = pyro.sample("forgotten", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(extra, 1.0), obs=x)

    words = ("'forgotten'", "Normal", "the guide omits", "it samples ['z']", "Sample it in the guide")
    assert_refused(model, guide_of(lambda x: dist.Normal(x, 1.0)), data(), *words)


def test_a_discrete_latent_that_the_guide_omits_may_be_summed_out():
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    assert_refused(model, lambda x: None, data(), "'k'", "Bernoulli", "{'enumerate': 'parallel'}")


def test_no_data_plate():
    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))
        pyro.sample("seen", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    assert_refused(model, guide, data(), "'seen'", "plate", "found plates none", "with pyro.plate('data', len(x)):")


def test_a_data_plate_that_is_a_loop():
    def model(x):
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])

    def guide(x):
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"z{i}", dist.Normal(x[i], 1.0))

    assert_refused(model, guide, data(), "'x0'", "vectorised plate", "with pyro.plate('data', len(x)):")


def test_a_plate_that_is_not_over_the_data():
    def transposed(x):
        with pyro.plate("features", 2, dim=-1), pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("features", 2, dim=-1), pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x, 1.0))

    assert_refused(transposed, guide, data(2), "'features'", "the 5 data of the batch", "found size 2", ".to_event(n)")


def test_a_plate_of_another_size():
    def model(x):
        with pyro.plate("data", 7):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 7):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    assert_refused(model, guide, data(), "data", "7", "5", "len(x)")
    assert_refused(model, guide_of(lambda x: dist.Normal(x, 1.0)), data(), "'z'", "expected scale 1.4", "found scale 1")


def test_two_plates_over_the_data():
    def model(x):
        with pyro.plate("first", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        with pyro.plate("second", len(x)):
            pyro.sample("w", dist.Normal(0.0, 1.0), obs=x)

    def guide(x):
        with pyro.plate("first", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    assert_refused(model, guide, data(), "'w'", "'first'", "'second'", "one plate over the data")


def test_nothing_is_observed():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    assert_refused(model, guide_of(lambda x: dist.Normal(x, 1.0)), data(), "observes nothing", "['z']", "obs=x")


@pytest.mark.parametrize("features", [1, 2, N])
def test_an_observation_without_to_event(features):
    """With as many features as data the shapes fit, and only the missing declaration tells."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(features), 1.0).to_event(1))
            pyro.sample("pixels", dist.Normal(z, 1.0), obs=x)

    assert_refused(model, guide_of(lambda x: dist.Normal(x, 1.0).to_event(1)), data(features), "to_event")
    if features == N:
        assert_refused(
            model, guide_of(lambda x: dist.Normal(x, 1.0).to_event(1)), data(N), "'pixels'", "[5, 5]", "Normal"
        )


@pytest.mark.parametrize("features", [2, N])
def test_a_latent_without_to_event(features):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), features), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    assert_refused(model, guide_of(lambda x: dist.Normal(x, 1.0)), data(features), "to_event")
    if features == N:
        assert_refused(
            model, guide_of(lambda x: dist.Normal(x, 1.0)), data(N), "'z'", "[5, 5]", ".to_event(n) to its Normal"
        )


def test_a_guide_with_another_event_than_its_prior():
    """The model declares the event and the guide does not: [5, 5] log-densities would be broadcast against [5]."""
    assert_refused(normal_model, guide_of(lambda x: dist.Normal(x, 1.0)), data(2), "to_event")

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(N), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    assert_refused(model, guide_of(lambda x: dist.Normal(x, 1.0)), data(N), "'z'", "[5, 5]", "to_event(n)")


def test_networks_that_do_not_fit_the_data():
    encoder = nn.Linear(3, 4)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x)[:, :2], 1.0).to_event(1))

    words = ("[5, 2]", "mat1 and mat2", "5x2", "3x4", "Check that the networks fit the data")
    assert_refused(normal_model, guide, data(2), *words)


def test_images_that_do_not_fit_the_decoder():
    net = nn.Linear(2, 12)

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("image", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :2], 1.0).to_event(1))

    assert_refused(model, guide, data(16), "12", "16", "fit the network")


def test_a_pair_that_takes_other_arguments():
    def model(x, label):
        normal_model(x)

    assert_refused(model, normal_guide, data(2), "TypeError", "label", "model(*batch)")


def test_a_batch_must_hold_data_in_its_first_dim():
    assert_refused(normal_model, normal_guide, torch.tensor(1.0), by=(inspect,), error=PpvaeError)


# -- absolute continuity ----------------------------------------------------------------------------------------------


def delta(x):
    return dist.Delta(x / 2, event_dim=1)


def test_a_point_mass_has_no_weights_and_can_be_trained():
    weight = nn.Parameter(torch.eye(2))

    def model(x):
        pyro.param("weight", weight)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight, 1.0).to_event(1), obs=x)

    assert_refused(model, guide_of(delta), data(2), "'z'", "Delta", "Normal", "MAP", by=(inspect, log_marginal, terms))
    assert inspect(model, guide_of(delta), data(2), weights=False).weights_refusal
    assert "can be trained" in check(model, guide_of(delta), data(2))
    run = fit(model, guide_of(delta), torch.randn(60, 2), epochs=2)
    assert run.history[-1]["loss"] < run.history[0]["loss"] + 1
    with pytest.raises(ContractError, match="Delta"):
        log_marginal(run.model, run.guide, data(2))


def test_an_automatic_point_mass():
    assert_refused(normal_model, AutoDelta(normal_model), data(2), "'z'", "Delta")


def test_an_automatic_guide_over_all_data_at_once():
    """AutoDiagonalNormal has one helper for every datum together: no weight per datum."""
    assert_refused(normal_model, AutoDiagonalNormal(normal_model), data(2), by=(inspect, log_marginal))


def test_a_delta_that_is_masked_or_declared_otherwise_is_still_a_point_mass():
    everywhere = torch.ones(N, dtype=torch.bool)

    def model(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=everywhere[: len(x)]):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    masked = guide_of(lambda x: dist.Delta(x).mask(everywhere[: len(x)]))
    assert_refused(model, masked, data(), "'z'", "Delta")
    assert_refused(normal_model, guide_of(lambda x: dist.Delta(x).to_event(1)), data(2), "'z'", "Delta")


@pytest.mark.parametrize(
    ("prior", "posterior", "words"),
    [
        (lambda: dist.Normal(0.0, 1.0), lambda x: dist.LogNormal(x, 1.0), ("LogNormal", "real")),
        (lambda: dist.Normal(0.0, 1.0), lambda x: dist.Uniform(x - 1, x + 1), ("Uniform",)),
        (lambda: dist.LogNormal(0.0, 1.0), lambda x: dist.Beta(2 + 0 * x, 2.0), ("Beta", "LogNormal")),
        (lambda: dist.Uniform(0.0, 1.0), lambda x: dist.Uniform(0.2 + 0 * x, 0.8), ("Uniform",)),
        (lambda: dist.Laplace(0.0, 1.0), lambda x: dist.HalfNormal(torch.ones_like(x)), ("HalfNormal",)),
    ],
    ids=["lognormal for normal", "uniform for normal", "beta for lognormal", "part of a uniform", "half for laplace"],
)
def test_a_guide_whose_support_is_too_small(prior, posterior, words):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("height", prior())
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    assert_refused(model, guide_of(posterior, "height"), data(), "'height'", "support", *words[:1], "reaches wherever")


def test_a_guide_whose_support_misses_little_of_the_prior():
    """Uniform(-6, 6) has all but 2e-9 of the prior, and nothing of the posterior where x is far away."""
    assert_refused(scalar_model, guide_of(lambda x: dist.Uniform(-6 + 0 * x, 6.0)), 20 + data(), "'z'", "Uniform")


@pytest.mark.parametrize(
    ("prior", "posterior"),
    [
        (lambda: dist.LogNormal(0.0, 1.0), lambda x: dist.Gamma(2 + 0 * x, 2.0)),
        (lambda: dist.Gamma(torch.tensor(2.0), 2.0), lambda x: dist.LogNormal(x, 1.0)),
        (lambda: dist.Uniform(0.0, 1.0), lambda x: dist.Beta(2 + 0 * x, 2.0)),
        (lambda: dist.Uniform(0.0, 1.0), lambda x: dist.Normal(x, 1.0)),
        (lambda: dist.Uniform(0.0, 1.0), lambda x: dist.Uniform(-0.1 + 0 * x, 1.1)),
        (lambda: dist.HalfNormal(1.0), lambda x: dist.Normal(x, 1.0)),
        (lambda: dist.Normal(0.0, 1.0), lambda x: dist.StudentT(3.0, x, 1.0)),
        (lambda: dist.VonMises(0.0, 1.0), lambda x: dist.VonMises(x, 2.0)),
    ],
    ids=["gamma", "lognormal", "beta", "normal for uniform", "wide uniform", "normal for half", "student", "von mises"],
)
def test_a_guide_whose_support_holds_the_prior_is_taken(prior, posterior):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    t = terms(model, guide_of(posterior), data(), 4)
    assert t.log_weight.shape == (4, N)
    assert not t.log_weight.isnan().any()


def test_a_continuous_guide_of_a_discrete_latent():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Poisson(torch.tensor(3.0)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    assert_refused(model, guide_of(lambda x: dist.LogNormal(x, 1.0)), data(), "'z'", "LogNormal", by=(inspect,))


def test_a_discrete_guide_of_a_continuous_latent():
    guide = guide_of(lambda x: dist.Bernoulli(0.5 + 0 * x))
    assert_refused(scalar_model, guide, data(), "'z'", "continuous guide", "Normal", "Bernoulli")


def test_a_point_mass_on_a_discrete_latent_gives_lower_bounds_only():
    """The estimate is log p(x, z) at the point: below log p(x), with perfect weights, and never called reliable."""

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3)))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    guide = guide_of(lambda x: dist.Delta((x > 0).to(x)), "k")
    x = data()
    structure = inspect(model, guide, x)
    assert structure.lower_bound_only
    est = log_marginal(model, guide, x, num_particles=200)
    point = dist.Bernoulli(0.3).log_prob((x > 0).to(x)) + dist.Normal((x > 0).to(x), 1.0).log_prob(x)
    torch.testing.assert_close(est.log_px, point, rtol=0, atol=1e-12)
    assert est.lower_bound_only
    assert not est.reliable.any()
    assert "lower bounds only" in est.summary()
    assert "lower bounds only" in check(model, guide, x)


# -- scales and masks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["model", "guide"])
def test_a_scale_is_not_a_density(side):
    scaled = poutine.scale(normal_model if side == "model" else normal_guide, scale=0.5)
    pair = (scaled, normal_guide) if side == "model" else (normal_model, scaled)
    words = ("expected scale 1", "found scale 0.5", "normalised density", "objective")
    assert_refused(*pair, data(2), "'z'", *words, by=(inspect, log_marginal, terms))
    assert "can be trained" in check(*pair, data(2))


def test_a_beta_inside_the_model():
    def model(x):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=4.0):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    assert_refused(model, normal_guide, data(2), "'z'", "found scale 4", "beta")


def test_a_scale_on_top_of_a_subsampled_plate():
    def model(x):
        with pyro.plate("data", 100, subsample=x), poutine.scale(scale=0.5):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 100, subsample=x):
            pyro.sample("z", dist.Normal(x, 1.0))

    assert_refused(model, guide, data(), "'z'", "expected scale 20", "found scale 10")


def test_an_inner_plate_that_is_subsampled():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("pixels", 6, subsample_size=2, dim=-2) as index:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x.T[index])

    guide = guide_of(lambda x: dist.Normal(x[:, 0], 1.0))
    assert_refused(model, guide, data(6), "'x'", "expected scale 1", "found scale 3", "inner plate")


def test_a_guide_that_leaves_the_data_plate():
    """log q is then one number for all data, which is taken from every datum's log p(x, z)."""

    def guide(x):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5).to_event(2))

    assert_refused(normal_model, guide, data(2), "'z'", "plate")


def test_a_guide_that_opens_another_plate():
    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0).to_event(1))

    assert_refused(normal_model, guide, data(2), "'z'", "['data']", "['rows']", "Open the same plates")


def test_enumeration_by_a_few_draws_is_no_enumeration():
    def model(x):
        with pyro.plate("data", len(x)):
            infer = {"enumerate": "parallel", "num_samples": 4}
            y = pyro.sample("y", dist.Bernoulli(torch.tensor(0.3)), infer=infer)
            pyro.sample("x", dist.Normal(y, 1.0), obs=x)

    assert_refused(model, lambda x: None, data(), "'y'")


def test_a_subsample_that_the_guide_alone_draws_and_its_cure():
    def pair_with(model_size, obs):
        def model(x):
            with pyro.plate("data", len(x), subsample_size=model_size) as rows:
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=obs(x, rows))

        def guide(x):
            with pyro.plate("data", len(x), subsample_size=2) as rows:
                pyro.sample("z", dist.Normal(x[rows] / 2, 0.5**0.5))

        return model, guide

    assert_refused(*pair_with(None, lambda x, rows: x), data(), "'x'", "the 2 rows that plate 'data' draws", "all 5")
    x = data()
    est = log_marginal(*pair_with(2, lambda x, rows: x[rows]), x, num_particles=3)
    torch.testing.assert_close(est.log_px, dist.Normal(0.0, 2**0.5).log_prob(x), rtol=0, atol=1e-6)


def test_guide_and_model_disagree_on_the_size_of_the_data():
    def guide(x):
        with pyro.plate("data", 100, subsample=x):
            pyro.sample("z", dist.Normal(x / 2, 1.0).to_event(1))

    assert_refused(normal_model, guide, data(2), "'z'", "scale")


@pytest.mark.parametrize("side", ["model", "guide"])
@pytest.mark.parametrize("how", ["poutine", "method"])
def test_a_mask_on_one_side_of_a_latent(side, how):
    there = torch.tensor([True, False, True, True, False])

    def latent(name, fn, mask):
        if not mask:
            return pyro.sample(name, fn)
        if how == "method":
            return pyro.sample(name, fn.mask(there[: fn.batch_shape[-1]] if fn.batch_shape else there))
        with poutine.mask(mask=there):
            return pyro.sample(name, fn)

    def model(x):
        with pyro.plate("data", len(x)):
            z = latent("z", dist.Normal(torch.zeros(len(x)), 1.0), side == "model")
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            latent("z", dist.Normal(x, 1.0), side == "guide")

    assert_refused(model, guide, data(), "'z'", "mask", "Mask both sides", by=(inspect, log_marginal, terms))


def test_masks_that_differ():
    there = torch.tensor([True, False, True, True, False])

    def model(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=there):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=~there):
            pyro.sample("z", dist.Normal(x, 1.0))

    assert_refused(model, guide, data(), "'z'", "differs")


# -- sites ------------------------------------------------------------------------------------------------------------


def test_a_guide_site_that_the_model_lacks():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))
            pyro.sample("zz", dist.Normal(x, 1.0).to_event(1))

    assert_refused(normal_model, guide, data(2), "'zz'", "['z']", "is_auxiliary")


def test_a_helper_without_a_delta():
    """q(z) is the integral over the helper, which nobody takes: weights would have a factor too many."""

    def guide(x):
        with pyro.plate("data", len(x)):
            h = pyro.sample("helper", dist.Normal(x, 1.0).to_event(1), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(h, 1.0).to_event(1))

    assert_refused(
        normal_model, guide, data(2), "'helper'", "Delta", "2 dims a datum", by=(inspect, log_marginal, terms)
    )


def test_a_helper_of_fewer_dims_than_its_delta():
    def guide(x):
        with pyro.plate("data", len(x)):
            h = pyro.sample("helper", dist.Normal(x[:, 0], 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(torch.stack([h, h], -1), event_dim=1))

    assert_refused(normal_model, guide, data(2), "'z'", "Delta")


@pytest.mark.parametrize("site", ["other", "z"])
def test_a_guide_that_observes(site):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample(site, dist.Normal(x, 1.0).to_event(1), obs=x)

    assert_refused(normal_model, guide, data(2), f"{site!r}", "obs=", "Move the observation to the model")


def test_a_guide_that_samples_the_data():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(x, 1.0).to_event(1))

    assert_refused(normal_model, guide, data(2), "'x'", "the model observes and the guide samples", "Remove it")


def test_sequential_enumeration_in_the_guide_is_summed_or_refused():
    """Never drawn with its log q left out of the weight."""

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(torch.tensor(0.3)))
            pyro.sample("x", dist.Normal(y, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(torch.sigmoid(x)), infer={"enumerate": "sequential"})

    x = data()
    both = [dist.Bernoulli(0.3).log_prob(torch.tensor(y)) + dist.Normal(y, 1.0).log_prob(x) for y in (0.0, 1.0)]
    try:
        found = terms(model, guide, x, 2).log_weight
    except ContractError as error:
        assert "'y'" in str(error)  # noqa: PT017
    else:
        torch.testing.assert_close(found, torch.logaddexp(*both).expand(2, N))


# -- parameters -------------------------------------------------------------------------------------------------------


def pair_with_unregistered_module():
    decoder = nn.Linear(2, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    return model, normal_guide


def test_a_module_that_is_never_registered():
    model, guide = pair_with_unregistered_module()
    assert_refused(model, guide, data(2), "(decoder.", "never train it", "pyro.module('name', network)")
    with pytest.raises(ContractError, match=r"decoder\.(weight|bias)"):
        fit(model, guide, torch.randn(20, 2), epochs=1)


def test_a_module_that_only_the_guide_uses_and_never_registers():
    encoder = nn.Linear(2, 2)
    assert_refused(normal_model, guide_of(lambda x: dist.Normal(encoder(x), 1.0).to_event(1)), data(2), "pyro.module")


def test_a_module_of_frozen_parameters_needs_no_registration():
    model, guide = pair_with_unregistered_module()
    for p in model.__closure__[0].cell_contents.parameters():
        p.requires_grad_(False)
    inspect(model, guide, data(2))


def pair_with_two_modules_under_one_name():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)

    def model(x):
        pyro.module("net", first)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(first(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("net", second)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(second(x), 1.0).to_event(1))

    return model, guide


def test_two_modules_under_one_name():
    words = ("net$$$weight", "registered already", "a name of its own")
    assert_refused(*pair_with_two_modules_under_one_name(), data(2), *words)
    with pytest.raises(ContractError, match="registered already"):
        fit(*pair_with_two_modules_under_one_name(), torch.randn(20, 2), epochs=1)


def test_a_second_experiment_under_the_same_names():
    """A pair that registers other modules in the surrounding store under used names is refused, not mixed up."""
    model, _, batch = PAIRS["modules"]()
    with poutine.trace(param_only=True):
        model(*batch)
    other, other_guide, batch = PAIRS["modules"]()
    assert_refused(
        other, other_guide, batch, "modules.decoder", "registered already", by=(inspect, log_marginal, check)
    )


def test_evaluation_creates_no_parameter():
    model, guide, batch = PAIRS["params"]()
    with pytest.raises(ContractError) as caught:
        log_marginal(model, guide, batch)
    text = str(caught.value)
    assert "'params.slope'" in text
    assert "run.model and run.guide" in text
    assert len(text.splitlines()) <= 3
    assert not list(pyro.get_param_store().keys())


def test_evaluation_leaves_the_param_store_as_it_was():
    for name in ("modules", "classes"):
        model, guide, batch = PAIRS[name]()
        log_marginal(model, guide, batch, num_particles=30)
        check(model, guide, batch)
        assert not list(pyro.get_param_store().keys())


class Scaled(PyroModule):
    """Half of a pair whose PyroParam has the name that the other half's has."""

    def __init__(self, value):
        super().__init__()
        self.scale = PyroParam(torch.tensor(value), constraint=constraints.positive)


class ScaledModel(Scaled):
    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, self.scale), obs=x)


class ScaledGuide(Scaled):
    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, self.scale))


def test_two_pyro_params_under_one_name():
    """Pyro gives the second module the first one's parameter, and overwrites its own."""
    model, guide = ScaledModel(0.5), ScaledGuide(2.0)
    assert_refused(model, guide, data(), "'scale'", "registered already")


# -- data -------------------------------------------------------------------------------------------------------------


def bernoulli_pair():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("pixels", dist.Bernoulli(logits=z).to_event(1), obs=x)

    return model, guide_of(lambda x: dist.Normal(x, 1.0).to_event(1))


def test_grey_pixels_under_a_bernoulli():
    x = torch.zeros(N, 3)
    x[2, 1] = 0.25
    words = ("'pixels'", "Bernoulli", "{0, 1}", "0.25", "row 2", "[1]", "binarize")
    assert_refused(*bernoulli_pair(), x, *words, error=DataError)
    with pytest.raises(DataError, match="row 2"):
        fit(*bernoulli_pair(), x, epochs=1)


def test_negative_counts_under_a_poisson():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("count", dist.Poisson(z.exp()), obs=x)

    guide = guide_of(lambda x: dist.Normal(0 * x, 1.0))
    words = ("'count'", "Poisson", "-1", "row 1", "Choose a likelihood")
    assert_refused(model, guide, torch.tensor([0.0, -1.0, 2.0, 3.0, 1.0]), *words, error=DataError)


def test_masked_values_may_lie_outside_the_support():
    x = torch.tensor([0.0, 1.0, -9.0, 1.0, 0.0])

    def model(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=x >= 0):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z), obs=x.clamp(min=0))

    def guide(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=x >= 0):
            pyro.sample("z", dist.Normal(0 * x, 1.0))

    assert terms(model, guide, x, 3).log_weight[:, 2].abs().max() == 0


def data_with_bad_row(rows=70, bad=63):
    x = torch.zeros(rows, 3)
    x[bad, 1] = 0.5
    return x


def test_a_bad_value_in_a_later_block_is_found_and_placed():
    with pytest.raises(DataError, match=r"'pixels'.*0\.5 at row 63"):
        log_marginal(*bernoulli_pair(), data_with_bad_row(), num_particles=20)


@pytest.mark.parametrize("layout", ["folded", "one by one"])
def test_a_bad_value_in_a_later_block_is_placed_whatever_the_layout(layout):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            if layout == "one by one" and len(x) not in (20, 50):
                raise RuntimeError("not folded, please")
            pyro.sample("pixels", dist.Bernoulli(logits=z.view(len(x), 3)).to_event(1), obs=x)

    guide = guide_of(lambda x: dist.Normal(x, 1.0).to_event(1))
    with pytest.raises(DataError, match=r"'pixels'.*0\.5 at row 63"):
        log_marginal(model, guide, data_with_bad_row(), num_particles=20, proposal="guide")  # blocks of 50


# -- words ------------------------------------------------------------------------------------------------------------

DESCRIPTIONS = {
    "modules": ("data plate 'data' over the batch, full size 6", "model site 'latent': latent, Normal over event [2]",
                "model site 'obs': observed, Bernoulli over event [8]", "reparameterised", "vectorised under a plate"),
    "hierarchical": ("full size 100, scale 16.6667 (divided out of every weight)", "'z2'", "'z1'"),
    "indexes": ("data plate 'rows' over its own subsample of 4 rows, full size 10",),
    "conv": ("event [1, 4, 4]", "folded into the batch (the networks do not broadcast)"),
    "params": ("4 registered parameters, 4 numbers", "Normal over event []"),
    "shared_latent": ("shared by all data", "weights are joint"),
    "enumerated_model": ("model site 'k': enumerated, Categorical over event [], summed out exactly",),
    "discrete": ("guide site 'z': latent, Bernoulli over event [4], not reparameterised",),
    "inner_plate": ("inner plates ['parts']",),
    "obs_mask": ("model site 'x_unobserved': cancelled", "model site 'x_observed': observed", "masked"),
    "masked": ("guide site 'extra': latent, Normal over event [], reparameterised, masked",),
    "auxiliary": ("guide site 'helper': auxiliary", "guide site 'z': latent, Delta over event [3]"),
    "labelled": ("model site 'x': observed, Bernoulli over event [4]",),
}  # fmt: skip


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_check_says_what_a_pair_is(name):
    text = check(*PAIRS[name]())
    for words in DESCRIPTIONS[name]:
        assert words in text, text
    sites = [line for line in text.splitlines() if line.startswith(("model site", "guide site"))]
    model, guide, batch = PAIRS[name]()
    latents = {k for k, s in terms(model, guide, batch).guide.items() if s.role == "latent"}
    assert all(any(f"'{latent}'" in line for line in sites) for latent in latents)


def test_check_of_the_librarys_own_oracle():
    pair = LinearGaussian(3, 2)
    lines = check(pair.model, pair.guide, data(3)).splitlines()
    assert lines == [
        "data plate 'data' over the batch, full size 5",
        "model site 'z': latent, Normal over event [2]",
        "model site 'x': observed, Normal over event [3]",
        "guide site 'z': latent, MultivariateNormal over event [2], reparameterised",
        "3 registered parameters, 10 numbers",
        "particles are vectorised under a plate",
    ]


def test_a_parameter_outside_its_range_is_cured_as_the_message_says():
    net = nn.Linear(2, 2).requires_grad_(False)

    def model(x, mapped=False):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            scale = net(z).exp() if mapped else -1 - net(z).square()
            pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)

    with pytest.raises(ContractError, match=r"Expected parameter scale.*Map the network's output .*: \.exp\(\)"):
        check(model, normal_guide, data(2))
    check(lambda x: model(x, mapped=True), normal_guide, data(2))


def test_columns_of_one_array_are_named_as_arguments():
    def model(a, b):
        with pyro.plate("data", len(a)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("a", dist.Normal(z, 1.0), obs=a)
            pyro.sample("b", dist.Normal(z, 1.0), obs=b)

    def guide(a, b):
        with pyro.plate("data", len(a)):
            pyro.sample("z", dist.Normal((a + b) / 3, 1.0))

    x = data(2)
    with pytest.raises(ContractError, match=r"missing 1 required positional argument.*pass a tuple .* or a dict"):
        check(model, guide, x)
    check(model, guide, {"a": x[:, 0], "b": x[:, 1]})


def test_the_description_of_torchs_modules_is_plain_text():
    rnn, net = nn.GRU(2, 4, batch_first=True), nn.Linear(4, 4)

    def guide(x):
        pyro.module("rnn", rnn)
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            loc, scale = net(rnn(x[:, None])[1][0]).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    text = str(check(normal_model, guide, data(2)))
    assert "Linear, 20 parameters. Applies an affine linear transformation to the incoming data: y = xA^T + b." in text
    assert "parameters. Apply a multi-layer gated recurrent unit (GRU) RNN" in text


@pytest.mark.parametrize("of_prior", [dist.RelaxedOneHotCategorical, dist.RelaxedOneHotCategoricalStraightThrough])
def test_relaxed_draws_that_are_rounded_have_no_weights(of_prior):
    """The density of Pyro's straight-through relaxations is that of the draw before it is rounded."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", of_prior(torch.tensor(0.5), torch.tensor([0.2, 0.5, 0.3])))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    def guide(x):
        logits = pyro.param("logits", torch.zeros(3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.RelaxedOneHotCategoricalStraightThrough(torch.tensor(0.5), logits=logits))

    with pytest.raises(ContractError, match=r"'z'.*StraightThrough, whose draws are rounded.*'straight_through'"):
        check(model, guide, torch.zeros(5))
