"""Training of pairs with global latents: what is reported of held-out data, and mini-batches."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch

from ppvae import fit, objectives

X = torch.randn(30, generator=torch.Generator().manual_seed(0)).double() + 1.0
VALID = torch.randn(17, generator=torch.Generator().manual_seed(1)).double() + 1.0
HELD = functools.partial(torch.optim.SGD, lr=0.0)  # parameters stay where they are


@pytest.fixture(autouse=True)
def _empty_store():
    pyro.clear_param_store()
    torch.manual_seed(0)


def model(x):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 2.0))
    with pyro.plate("data", 30, subsample=x):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def guide(x, point=True):
    """A point, or a density as narrow as one, of mu; the exact conditional of z."""
    loc = pyro.param("loc", torch.tensor(0.7).double())
    mu = pyro.sample("mu", dist.Delta(loc) if point else dist.Normal(loc, 1e-6))
    with pyro.plate("data", 30, subsample=x):
        pyro.sample("z", dist.Normal(0.2 * mu + 0.8 * x, 0.2**0.5))


@pytest.mark.parametrize("point", [True, False])
@pytest.mark.parametrize("batch_size", [30, 8])
def test_the_elbo_of_held_out_data_is_given_the_global_latents(point, batch_size):
    """Neither the global latents' KL nor the number of training data is in it."""
    run = fit(
        model, functools.partial(guide, point=point), X, valid=VALID, epochs=1, batch_size=batch_size,
        objective=objectives.IWAE(2), optimizer=HELD, compile=False,
    )  # fmt: skip
    exact = dist.Normal(0.7, 1.25**0.5).log_prob(VALID).mean().item()
    assert run.metrics["valid_elbo"] == pytest.approx(exact, abs=1e-5)
    z = dist.Normal(0.2 * 0.7 + 0.8 * VALID, 0.2**0.5)
    rate = torch.distributions.kl_divergence(z, dist.Normal(torch.tensor(0.7).double(), 1.0)).mean().item()
    assert run.metrics["valid_rate"] == pytest.approx(rate, abs=1.0)  # one draw a datum
    total = run.metrics["valid_rate"] + run.metrics["valid_distortion"]
    assert total == pytest.approx(-run.metrics["valid_elbo"], abs=1e-9)


def test_training_stops_early_by_held_out_data():
    run = fit(
        model, functools.partial(guide, point=False), X, valid=VALID, epochs=50, batch_size=10, patience=2,
        optimizer=HELD, compile=False,
    )  # fmt: skip
    assert run.metrics["epoch"] < 10


def test_without_held_out_data_no_elbo_per_datum_is_reported():
    run = fit(model, guide, X, epochs=1, batch_size=10, optimizer=HELD, compile=False)
    assert not [name for name in run.metrics if name.endswith("elbo")]
