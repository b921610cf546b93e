"""Latents that all data share beside a plate that draws a subsample: every datum counts, however many are drawn."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample

from ppvae import log_marginal
from ppvae.errors import ContractError
from ppvae.evaluation import annealed, bdmc, quadrature
from ppvae.inference import inspect

SIZES = [(7, 3), (20, 20), (50, 10), (50, 50), (60, 50), (123, 20)]  # (data, rows of a subsample)


def data(count):
    return 1.1 * torch.randn(count, generator=torch.Generator().manual_seed(count)) + 3.0


def exact(x):
    cov = 1.25 * torch.eye(len(x), dtype=torch.float64) + 4
    return dist.MultivariateNormal(torch.zeros(len(x)).double(), cov).log_prob(x.double()).item()


def shared_pair(size):
    """x_i ~ N(mu, 5/4), mu ~ N(0, 4), with a guide a little wider than the posterior."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x), subsample_size=size) as i:
            pyro.sample("x", dist.Normal(mu, 1.25**0.5), obs=x[i])

    def guide(x):
        precision = 1 / 4 + len(x) / 1.25
        pyro.sample("mu", dist.Normal(x.sum() / 1.25 / precision, 1.3 * precision**-0.5))

    return model, guide


def local_pair(size):
    """The same x, with a latent of each datum between."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x), subsample_size=size) as i:
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[i])

    def guide(x):
        precision = 1 / 4 + len(x) / 1.25
        mu = pyro.sample("mu", dist.Normal(x.sum() / 1.25 / precision, 1.3 * precision**-0.5))
        with pyro.plate("data", len(x), subsample_size=size) as i:
            pyro.sample("z", dist.Normal(0.2 * mu + 0.8 * x[i], 0.2**0.5))

    return model, guide


@pytest.mark.parametrize(("count", "size"), SIZES)
@pytest.mark.parametrize("pair", [shared_pair, local_pair])
def test_every_datum_counts_in_importance_sampling(pair, count, size):
    x = data(count)
    est = log_marginal(*pair(size), x, num_particles=1000, proposal="guide")
    assert abs(est.log_px.item() - exact(x)) < 5 * est.std_error.item()
    assert est.joint
    assert est.dims == count
    assert len(est.log_px) == 1


@pytest.mark.parametrize(("count", "size"), SIZES)
def test_every_datum_counts_in_quadrature_and_annealing(count, size):
    x = data(count)
    assert quadrature(*shared_pair(size), x).log_px.item() == pytest.approx(exact(x), abs=1e-4)
    assert annealed(*shared_pair(size), x, num_temperatures=10).log_px.item() == pytest.approx(exact(x), abs=0.3)


def test_every_datum_counts_in_bdmc():
    bracket = bdmc(*shared_pair(10), data(60), num_temperatures=50)
    (simulated,) = bracket.data
    assert len(simulated) == 60
    assert len(simulated.unique()) == 60
    assert bracket.lower.item() == pytest.approx(exact(simulated), abs=0.3)
    assert bracket.upper.item() == pytest.approx(exact(simulated), abs=0.3)


@pytest.mark.parametrize(("count", "size"), SIZES)
def test_every_datum_counts_where_the_shared_latent_is_summed_out(count, size):
    locs, x = torch.tensor([2.7, 3.1]), data(count)

    def model(x):
        k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
        with pyro.plate("data", len(x), subsample_size=size) as i:
            pyro.sample("x", dist.Normal(locs[k], 1.0), obs=x[i])

    want = dist.Normal(locs[:, None], 1.0).log_prob(x).double().sum(1).logsumexp(0) - torch.tensor(2.0).log()
    est = log_marginal(model, lambda x: None, x, num_particles=1, proposal="guide")
    assert est.log_px.item() == pytest.approx(want.item(), abs=1e-3)


# -- random weights of a network ---------------------------------------------------------------------------------------


class RandomWeight(PyroModule):
    """x ~ N(w z, 1/4), z ~ N(0, 1) for each datum, w ~ N(0, 1) for all."""

    def __init__(self, before_plate):
        super().__init__()
        self.before_plate, self.dec = before_plate, PyroModule[torch.nn.Linear](1, 1, bias=False)
        self.dec.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 1]).to_event(2))

    def forward(self, x):
        if self.before_plate:
            _ = self.dec.weight
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.dec(z), 0.5).to_event(1), obs=x)


def weight_guide(x):
    halves = dist.Normal(torch.tensor([-1.2, 1.2]), 0.45)
    two = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), halves)
    w = pyro.sample("dec.weight", two.expand([1, 1]).to_event(2))
    v = 1 / (1 + 4 * w**2)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(4 * v * w * x, v**0.5).to_event(1))


def test_a_random_weight_is_shared_where_it_is_read_before_the_plate():
    x = 1.3 * torch.randn(6, 1, generator=torch.Generator().manual_seed(0))
    w = torch.linspace(-12, 12, 20001).double()
    log_p = dist.Normal(0.0, 1.0).log_prob(w) + dist.Normal(0.0, (w**2 + 0.25).sqrt()).log_prob(x.double()).sum(0)
    want = (log_p.logsumexp(0) + (w[1] - w[0]).log()).item()
    est = log_marginal(RandomWeight(True), weight_guide, x, num_particles=1000, proposal="guide")
    assert abs(est.log_px.item() - want) < 5 * est.std_error.item()


@pytest.mark.parametrize("guide", [weight_guide, None], ids=["hand-written guide", "AutoNormal"])
def test_a_random_weight_that_is_read_inside_the_plate_is_named(guide):
    model = RandomWeight(False)
    message = "'dec.weight'.*is sampled for each datum.*ead it before the plate"
    with pytest.raises(ContractError, match=message):
        inspect(model, guide or AutoNormal(model), torch.randn(6, 1))
    model.before_plate = True  # the cure
    assert inspect(model, guide or AutoNormal(model), torch.randn(6, 1)).has_global_latents


def test_a_plate_of_the_same_name_that_a_handler_hides_keeps_its_own_rows():
    model, guide = shared_pair(10)
    x = data(60)

    def hiding(x):
        with poutine.block(), pyro.plate("data", len(x), subsample_size=7) as i:
            assert len(i) == len(pyro.sample("noise", dist.Normal(0.0, 1.0))) == 7
        guide(x)

    plain, hidden = (log_marginal(model, g, x, num_particles=1000, proposal="guide") for g in (guide, hiding))
    assert abs(plain.log_px - hidden.log_px).item() < 5 * (plain.std_error + hidden.std_error).item()
    assert abs(hidden.log_px.item() - exact(x)) < 5 * hidden.std_error.item()
