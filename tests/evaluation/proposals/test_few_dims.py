"""Proposals fitted to angles and to skewed posteriors in few dims: against sums over a grid and closed forms."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from ppvae.errors import ContractError
from tests.evaluation.proposals.test_families import agrees, draws

pytestmark = pytest.mark.usefixtures("float64")


ANGLE_PRIORS = {
    "von Mises": lambda: dist.VonMises(0.0, 1.0),
    "mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.3, 0.7])), dist.VonMises(torch.tensor([-2.0, 1.0]), torch.tensor([4.0, 2.0]))
    ),
}
ANGLE_GUIDES = {
    "von Mises": lambda x: dist.VonMises(0.0 * x[:, 0], 0.1),
    "uniform": lambda x: dist.Uniform(torch.full((len(x),), -math.pi), math.pi),
    "normal": lambda x: dist.Normal(0.0 * x[:, 0], 3.0),
}


@pytest.mark.parametrize("posterior", ANGLE_GUIDES)
@pytest.mark.parametrize("prior", ANGLE_PRIORS)
def test_angles_have_one_period(prior, posterior):
    """Pyro's von Mises declares the whole line, on which its density repeats: log p(x) by the trapezoid rule."""

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", ANGLE_PRIORS[prior]())
            pyro.sample("x", dist.Normal(torch.stack([a.cos(), a.sin()], -1), 2.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", ANGLE_GUIDES[posterior](x))

    x = torch.tensor([[1.0, 0.0], [-1.0, 0.2], [0.0, -1.0], [-0.9, -0.1]])
    angle = -math.pi + torch.arange(2000) * (2 * math.pi / 2000)
    seen = dist.Normal(torch.stack([angle.cos(), angle.sin()], -1), 2.0).to_event(1).log_prob(x[:, None])
    exact = (ANGLE_PRIORS[prior]().log_prob(angle) + seen).logsumexp(1) + math.log(2 * math.pi / 2000)
    agrees(draws(model, guide, x), exact, 0.3)
    agrees(draws(model, guide, x, proposal="guide"), exact, 0.3)
    agrees(draws(model, guide, x, method="auto"), exact, 0.3)


def test_a_guide_on_the_circle_does_not_cover_the_line():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 5.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.VonMises(0.0 * x, 1.0))

    with pytest.raises(ContractError, match=r"'z'.*support.*VonMises"):
        draws(model, guide, torch.zeros(3))


def test_a_torus_of_two_angles_that_depend_on_each_other():
    def prior():
        one = torch.ones(())
        return dist.SineBivariateVonMises(0 * one, 0.5 * one, one, 2 * one, 0.6 * one)

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", prior().expand([len(x)]))
            pyro.sample("x", dist.Normal(a.cos(), 0.6).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.VonMises(0 * x, 0.3).to_event(1))

    x = torch.tensor([[0.5, -1.0], [1.2, 0.3], [-0.4, 0.9]])
    line = -math.pi + torch.arange(300) * (2 * math.pi / 300)
    angles = torch.cartesian_prod(line, line)
    seen = dist.Normal(angles.cos(), 0.6).to_event(1).log_prob(x[:, None])
    exact = (prior().log_prob(angles) + seen).logsumexp(1) + 2 * math.log(2 * math.pi / 300)
    agrees(draws(model, guide, x, proposal="guide"), exact, 0.4)


COUNTS = torch.tensor([0.0, 1.0, 2.0, 3.0, 5.0, 8.0, 13.0, 20.0, 40.0, 1.0])
REALS = torch.linspace(-4.0, 5.0, 10)
SKEWED = {  # prior, likelihood, guide, data, log p(x) in closed form
    "gamma and Poisson": (
        lambda: dist.Gamma(2.0, 0.5),
        dist.Poisson,
        lambda x: dist.LogNormal((x + 1).log(), 0.5),
        COUNTS,
        lambda x: dist.NegativeBinomial(2.0, torch.tensor(2.0 / 3)).log_prob(x),
    ),
    "inverse gamma and normal": (
        lambda: dist.InverseGamma(1.5, 1.5),
        lambda z: dist.Normal(1.0, z.sqrt()),
        lambda x: dist.LogNormal(0.0 * x, 0.5),
        REALS,
        lambda x: dist.StudentT(3.0, 1.0, 1.0).log_prob(x),
    ),
    "beta and binomial": (
        lambda: dist.Beta(0.5, 0.5),
        lambda z: dist.Binomial(10, z),
        lambda x: dist.Uniform(0.0 * x, 1.0),
        torch.arange(11.0),
        lambda x: dist.BetaBinomial(torch.tensor(0.5), torch.tensor(0.5), 10).log_prob(x),
    ),
    "exponential": (
        lambda: dist.Exponential(1.0),
        dist.Exponential,
        lambda x: dist.Exponential(1.0 + x),
        torch.tensor([0.01, 0.1, 0.3, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0]),
        lambda x: -2 * torch.log1p(x),
    ),
}


@pytest.mark.parametrize("name", SKEWED)
def test_skewed_posteriors_of_one_dim_are_reliable_and_right(name):
    """Nine in ten data; of a proposal that fits the bulk alone half or fewer, by the weights of the longer tail."""
    prior, likelihood, posterior, x, log_px = SKEWED[name]
    x = x.double()

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", likelihood(pyro.sample("z", prior())), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(x))

    est = draws(model, guide, x, num_particles=1000)
    agrees(est, log_px(x), 0.1)
    assert float(est.reliable.double().mean()) >= 0.9
    assert float(est.ess.min()) > 500


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("width", [1e-3, 0.02])
def test_a_guide_far_narrower_than_the_posterior_is_found_out(width, scale):
    """Linear-Gaussian in closed form, by a guide that is also 0 where the posterior is far away in units of its own."""
    x = scale * torch.tensor([[1.0, -2.0], [0.3, 0.5], [-3.0, 1.0], [0.0, 4.0]])
    loading = torch.tensor([[1.0, 0.5, -0.3], [0.2, -1.0, 0.8]])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), scale).to_event(1))
            pyro.sample("x", dist.Normal(z @ loading.T, 0.5 * scale).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 3), width * scale).to_event(1))

    covariance = scale**2 * (loading @ loading.T + 0.25 * torch.eye(2))
    exact = dist.MultivariateNormal(torch.zeros(2), covariance).log_prob(x)
    est = draws(model, guide, x, num_particles=1000)
    agrees(est, exact)
    assert bool(est.reliable.all())


def test_a_guide_that_knows_one_of_many_directions_well_and_the_others_not_at_all():
    """Three numbers of thirty dims: the conditional scales of the guide are a tenth of most of the marginal ones."""
    generator = torch.Generator().manual_seed(2)
    loading = torch.randn(3, 30, generator=generator, dtype=torch.float64)
    x = (torch.randn(6, 30, generator=generator, dtype=torch.float64) @ loading.T).double()
    precision = torch.eye(30) + loading.T @ loading / 0.01

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(30), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ loading.T, 0.1).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            loc = x @ (torch.linalg.solve(precision, loading.T) / 0.01).T
            pyro.sample("z", dist.Normal(loc, precision.diagonal().rsqrt()).to_event(1))

    exact = dist.MultivariateNormal(torch.zeros(3), loading @ loading.T + 0.01 * torch.eye(3)).log_prob(x)
    est = draws(model, guide, x, num_particles=1000)
    agrees(est, exact, 0.1)
    assert bool(est.reliable.all())
