"""Quadrature against closed forms in one to three dims, and what it says of its own error."""

import dataclasses
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from ppvae.errors import UsageError
from ppvae.evaluation import quadrature
from ppvae.models import LinearGaussian


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


def normal_guide(latent, loc, scale):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc * torch.ones(latent), scale).to_event(1))

    return guide


@pytest.mark.parametrize(("latent", "nodes"), [(1, 129), (2, 129), (3, 49)])
@pytest.mark.parametrize("scale", [1.0, 0.05])
def test_the_linear_gaussian_model_in_up_to_three_dims(latent, nodes, scale):
    pair = LinearGaussian(6, latent, scale)
    x = dist.LowRankMultivariateNormal(pair.loc, pair.weight, scale**2 * torch.ones(6)).sample((2,))
    for guide in (normal_guide(latent, 0.0, 1.0), normal_guide(latent, 3.0, 0.2)):
        found = quadrature(pair.model, guide, x, num_nodes=nodes)
        assert (found.log_px - pair.log_px(x)).abs().max() < 1e-6
        assert found.error.max() < 1e-3
        assert found.num_nodes == nodes**latent


def test_a_result_prints_in_words():
    pair, x = LinearGaussian(6, 1), torch.randn(4, 6)
    found = quadrature(pair.model, pair.mean_field, x)
    assert found.nll == pytest.approx(-float(pair.log_px(x).detach().mean()), abs=1e-6)
    assert bool(found.reliable.all())
    assert str(found) == found.summary()
    assert "tensor" not in str(found)
    assert "4 data (quadrature, 257 nodes)" in str(found)
    assert "all 4 data are reliable" in str(found)
    worse = dataclasses.replace(found, error=torch.tensor([0.0, 0.02, math.nan, 0.0]))
    assert worse.reliable.tolist() == [True, False, False, True]
    assert "an error of 0.01 nats or more: 2 of 4 data" in str(worse)


def test_two_modes_and_heavy_tails():
    """x = |z| + noise has two posterior modes; a Cauchy prior, and 30 sds of it, by a fine sum in one dim."""
    x = torch.tensor([0.0, 2.0, 30.0])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Cauchy(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal((z.square() + 0.1).sqrt(), 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.StudentT(1.0, x, 1.0))

    z = torch.linspace(-200, 200, 2_000_001)[:, None]
    sums = torch.distributions.Cauchy(0.0, 1.0).log_prob(z) + torch.distributions.Normal(
        (z.square() + 0.1).sqrt(), 0.5
    ).log_prob(x)
    exact = sums.logsumexp(0) + math.log(400 / 2_000_000)
    found = quadrature(model, guide, x, num_nodes=1025)
    assert (found.log_px - exact).abs().max() < 1e-4
    assert ((found.log_px - exact).abs() <= found.error + 1e-9).all()


def test_too_few_nodes_are_owned_up_to():
    pair = LinearGaussian(6, 2, 0.3)
    x = torch.randn(20, 6)
    few = quadrature(pair.model, normal_guide(2, 0.0, 1.0), x, num_nodes=13)
    off = (few.log_px - pair.log_px(x)).abs()
    assert off.max() > 1e-4
    assert (off <= few.error).double().mean() > 0.8
    assert quadrature(pair.model, normal_guide(2, 0.0, 1.0), x).error.max() < 1e-6


def test_it_does_not_depend_on_how_memory_is_cut():
    pair = LinearGaussian(6, 1, 0.3)
    x = torch.randn(60, 6)
    whole, cut = (quadrature(pair.model, pair.guide, x, num_nodes=33, rows=rows) for rows in (None, 500))
    assert (whole.log_px - cut.log_px).abs().max() < 1e-9


def test_more_than_three_dims_are_refused():
    pair = LinearGaussian(6, 4, 0.3)
    with pytest.raises(UsageError, match=r"at most 3 dims in total, found 4 \('z'\)"):
        quadrature(pair.model, pair.guide, torch.randn(3, 6))
    for nodes in (7, 64):
        with pytest.raises(UsageError, match="num_nodes"):
            quadrature(pair.model, pair.guide, torch.randn(3, 6), num_nodes=nodes)


HALF_LINE = {
    "InverseGamma": lambda one: dist.InverseGamma(3 * one, 2 * one),
    "Gamma": lambda one: dist.Gamma(0.5 * one, one),
    "Weibull": lambda one: dist.Weibull(one, 0.7 * one),
    "HalfCauchy": lambda one: dist.HalfCauchy(one),
    "LogNormal": lambda one: dist.LogNormal(0 * one, 2 * one),
    "Pareto": lambda one: dist.Pareto(0.5 * one, 3 * one),
    "Beta": lambda one: dist.Beta(0.5 * one, 0.5 * one),
}


@pytest.mark.parametrize("name", HALF_LINE)
def test_single_precision_on_half_lines(name):
    """Densities that overflow near an end of their support, against a fine sum over u in float64."""
    prior, x = HALF_LINE[name], torch.tensor([-1.0, 0.3, 2.0], dtype=torch.float32)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior(torch.ones((), dtype=x.dtype)))
            pyro.sample("x", dist.Normal(z, 0.7), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", prior(torch.ones((), dtype=x.dtype)))

    p = prior(torch.ones(()))
    to = torch.distributions.biject_to(p.support)
    u = torch.linspace(-60, 12 if name != "Beta" else 60, 400_001)[:, None]
    z = to(u)
    with pyro.validation_enabled(False):
        log_p = p.log_prob(z) + to.log_abs_det_jacobian(u, z)
    log_p = torch.where(log_p.isfinite(), log_p, -torch.inf) + dist.Normal(z, 0.7).log_prob(x.double())
    exact = log_p.logsumexp(0) + (u[1] - u[0]).log()
    found = quadrature(model, guide, x, rows=60)
    assert (found.log_px - exact).abs().max() < 1e-3
    assert found.error.max() < 0.01
