"""Rows have an order: full batches keep it, and a pair that is bound to it is refused mini-batches by name."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from ppvae import data, fit, log_marginal
from ppvae.errors import ContractError

N = 40

pytestmark = pytest.mark.usefixtures("float64")

adam = functools.partial(torch.optim.Adam, lr=0.05)


def model(x, *_):
    """z ~ Normal(0, 1), x ~ Normal(z, 0.5): the posterior is Normal(0.8 x, 0.2)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def guide_at(loc):
    """A guide whose location is a function of its arguments."""

    def guide(*batch):
        scale = pyro.param("scale", torch.tensor(0.4), constraint=dist.constraints.positive)
        with pyro.plate("data", len(batch[0])):
            pyro.sample("z", dist.Normal(loc(*batch), scale))

    return guide


def log_px(x):
    return dist.Normal(0.0, 1.25**0.5).log_prob(x)


def mean_error(run, x):
    """The mean distance of the parameter `loc` from each datum's posterior mean; 0.9 where rows and data part ways."""
    return float((run.guide.scope.params["loc"].detach() - 0.8 * x).abs().mean())


def param_of_the_batch(x):
    return pyro.param("loc", torch.zeros(len(x)))


def param_of_all(x):
    return pyro.param("loc", torch.zeros(N))


def sliced_param(x):
    return pyro.param("loc", torch.zeros(N))[: len(x)]


CLOSURE = torch.randn(N, generator=torch.Generator().manual_seed(0))


def closure(x):
    return CLOSURE[: len(x)].to(x)


class Table(nn.Module):
    """A buffer with one row a datum."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randn(N, generator=torch.Generator().manual_seed(1)))

    def forward(self, x):
        return self.table[: len(x)].to(x)


TABLE = Table()


def buffer(x):
    return TABLE(x)


def place(x):
    return torch.arange(len(x)) / len(x)


BOUND = {
    "parameter of the batch": (param_of_the_batch, r"parameter 'loc' of shape \[\d+\] has one row a datum"),
    "parameter of all data": (param_of_all, r"parameter 'loc' of shape \[40\] has one row a datum"),
    "sliced parameter": (sliced_param, r"parameter 'loc' of shape \[40\] has one row a datum"),
    "place": (place, "'z' depends on the place of its row"),
}


@pytest.mark.parametrize("name", BOUND)
def test_mini_batches_are_refused_to_a_pair_that_is_bound_to_its_rows(name):
    loc, words = BOUND[name]
    for batch_size in (10, 13, 20):
        pyro.clear_param_store()
        with pytest.raises(ContractError, match=words) as caught:
            fit(model, guide_at(loc), torch.randn(N), epochs=1, batch_size=batch_size)
        assert "batch_size=40" in str(caught.value)
        assert "PerDatum" in str(caught.value)
        assert len(str(caught.value)) < 500


def test_tensors_that_a_guide_closes_over():
    def with_closure(x):
        scale = pyro.param("scale", torch.tensor(0.4))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(CLOSURE[: len(x)].to(x), scale))

    def with_buffer(x):
        scale = pyro.param("scale", torch.tensor(0.4))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(TABLE(x), scale))

    with pytest.raises(ContractError, match=r"tensor 'CLOSURE' of shape \[40\]"):
        fit(model, with_closure, torch.randn(N), epochs=1, batch_size=10)
    with pytest.raises(ContractError, match=r"buffer 'table' of Table of shape \[40\]"):
        fit(model, with_buffer, torch.randn(N), epochs=1, batch_size=10)


def test_observations_of_a_closure():
    """Labels beside the data, in the model: the rows of a mini-batch would get other labels."""
    labels = torch.randn(N)

    def with_labels(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)
            pyro.sample("y", dist.Normal(z, 0.5), obs=labels[: len(x)])

    with pytest.raises(ContractError, match=r"tensor 'labels' of shape \[40\]"):
        fit(with_labels, guide_at(lambda x: x), torch.randn(N), epochs=1, batch_size=10)
    assert fit(with_labels, guide_at(lambda x: x), torch.randn(N), epochs=1, batch_size=N).metrics["epoch"] == 1


@pytest.mark.parametrize("loc", [param_of_the_batch, sliced_param])
def test_validation_data_are_refused_to_a_pair_that_is_bound_to_its_rows(loc):
    with pytest.raises(ContractError, match=r"valid: parameter 'loc'.*Leave valid out"):
        fit(model, guide_at(loc), torch.randn(N), valid=torch.randn(N), epochs=1, batch_size=N)


@pytest.mark.parametrize("rows", [N, 1200])
@pytest.mark.parametrize("batch_size", [0, 5])
def test_a_full_batch_keeps_the_order_of_rows(rows, batch_size):
    """A parameter a datum finds its datum's posterior; the ELBO that is reported is of the same rows."""
    x = torch.randn(rows)
    guide = guide_at(lambda x: pyro.param("loc", torch.zeros(rows)))
    run = fit(model, guide, x, epochs=150, batch_size=rows + batch_size, optimizer=adam, compile=False)
    assert mean_error(run, x) < 0.2
    assert run.metrics["train_elbo"] == pytest.approx(float(log_px(x).mean()), abs=0.2)
    est = log_marginal(run.model, run.guide, x, num_particles=1000, proposal="guide")
    assert bool(((est.log_px - log_px(x)).abs() < 6 * est.std_error + 0.01).all())


def test_mini_batches_of_rows_keep_their_random_order():
    seen = []

    def looking(x):
        seen.append(x.detach().clone())
        return pyro.param("slope", torch.tensor(0.1)) * x

    x = torch.arange(float(N))
    fit(model, guide_at(looking), x, epochs=1, batch_size=10, compile=False)
    steps = torch.cat([part for part in seen if len(part) == 10][-4:])
    assert not bool((steps == steps.sort().values).all())
    assert bool((steps.sort().values == x).all())
    seen.clear()
    fit(model, guide_at(looking), x, epochs=1, batch_size=N, compile=False)
    assert bool((seen[-1] == x).all())


def test_the_index_column_of_the_refusal():
    """The cure, followed: mini-batches with an index find the posterior of each datum."""
    x, index = data.indexed(torch.randn(N))
    guide = guide_at(lambda x, index: pyro.param("loc", torch.zeros(N))[index])
    run = fit(model, guide, (x, index), epochs=100, batch_size=10, optimizer=adam)
    assert mean_error(run, x) < 0.2
    est = log_marginal(run.model, run.guide, (x, index), num_particles=1000, proposal="guide")
    assert bool(((est.log_px - log_px(x)).abs() < 6 * est.std_error + 0.01).all())


def test_networks_with_as_many_units_as_rows_are_taken():
    """No false alarm: the weights are [N, N] and [10, N] for batches of ten rows out of N."""
    net = nn.Sequential(nn.Linear(N, N), nn.Tanh(), nn.Linear(N, 10), nn.Linear(10, 1))

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x[:, None].expand(-1, N)).squeeze(-1), 0.5))

    run = fit(model, guide, torch.randn(N), valid=torch.randn(20), epochs=1, batch_size=10)
    assert "valid_elbo" in run.metrics


def test_noise_outside_of_sites_is_no_order_of_rows():
    guide = guide_at(lambda x: pyro.param("slope", torch.tensor(0.1)) * x + 0.1 * torch.randn(len(x)))
    assert fit(model, guide, torch.randn(N), epochs=1, batch_size=10).metrics["epoch"] == 1


@pytest.mark.parametrize("rows", [60, 130])
def test_an_evaluation_keeps_rows_at_their_places(rows):
    """A guide that closes over the exact posterior of all rows: of another block's rows, it would be another's."""
    x = torch.randn(rows)
    posterior = 0.8 * x

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(posterior[: len(x)], 0.2**0.5))

    est = log_marginal(model, guide, x, num_particles=30, proposal="guide")
    torch.testing.assert_close(est.log_px, log_px(x), rtol=0, atol=1e-9)


def test_other_data_than_those_that_the_rows_belong_to_are_refused():
    """Fifty rows fill the first block exactly; of 120 data, the second block would get the first block's rows."""
    posterior = torch.randn(50)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(posterior, 0.2**0.5))

    with pytest.raises(ContractError):
        log_marginal(model, guide, torch.randn(120), num_particles=30, proposal="guide")


@pytest.mark.parametrize("uses", ["alone", "beside the data"])
def test_a_row_for_each_datum_on_another_number_of_data_is_told_as_that(uses):
    x = torch.randn(120, 2, generator=torch.Generator().manual_seed(0))

    def model(x, index=None):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.7).to_event(1), obs=x)

    def guide(x, index=None):
        loc = pyro.param("loc", lambda: torch.zeros(120, 2))
        loc = loc if index is None else loc[index]
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc if uses == "alone" else loc + x, 0.57).to_event(1))

    run = fit(model, guide, x, epochs=1, batch_size=120, progress=False)
    for rows in (50, 7):
        with pytest.raises(ContractError, match=rf"'loc' of shape \[120, 2\] has one row.*found a batch of {rows}\."):
            log_marginal(run.model, run.guide, x[:rows], num_particles=3, progress=False, proposal="guide")
    assert len(log_marginal(run.model, run.guide, x, num_particles=3, progress=False, proposal="guide").log_px) == 120
    _, index = data.indexed(x)
    by_index = log_marginal(
        run.model, run.guide, (x[:50], index[:50]), num_particles=3, progress=False, proposal="guide"
    )
    assert by_index.log_px.isfinite().all()
