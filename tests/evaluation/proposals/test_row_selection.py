"""Pairs that take all their data at once, where only some data need further draws."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from ppvae import log_marginal
from ppvae.inference.contract.row_order import find_bound_rows
from ppvae.inference.inspection import inspect

SCALE = 0.3


def exact(x):
    return dist.Normal(0.0, (1 + SCALE**2) ** 0.5).log_prob(x)


def model_of(size):
    def model(x):
        with pyro.plate("data", size or len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, SCALE), obs=x)

    return model


def auto_normal(size):
    pyro.clear_param_store()
    model = model_of(size)
    guide = AutoNormal(model)
    guide(torch.zeros(size))
    return model, guide


def rows_of_parameters(size):
    """A parameter a datum, the last of which is far off, so that its datum alone needs more."""

    def guide(x):
        loc = pyro.param("loc", torch.cat([torch.zeros(size - 1), torch.tensor([3.0])]))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0))

    pyro.clear_param_store()
    guide(torch.zeros(size))
    return model_of(None), guide


PAIRS = {
    "AutoNormal, 8 data": (auto_normal, 8),
    "AutoNormal, 2 data": (auto_normal, 2),
    "a parameter a datum, 6 data": (rows_of_parameters, 6),
    "a parameter a datum, 2 data": (rows_of_parameters, 2),
}
CALLS = {
    "adaptive": {"num_particles": "auto"},
    "adaptive, the guide": {"num_particles": "auto", "proposal": "guide", "max_particles": 3200},
    "auto": {"method": "auto", "num_particles": 30},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", PAIRS)
def test_pairs_that_take_all_rows_are_right_or_flagged(name, call):
    make, size = PAIRS[name]
    x = torch.linspace(-0.5, 1.0, size)
    model, guide = make(size)
    for seed in range(2):
        est = log_marginal(model, guide, x, seed=seed, progress=False, **CALLS[call])
        off = (est.log_px - exact(x)).abs() > 6 * est.std_error + 1e-3  # 1e-8 of normal errors
        assert not bool((off & est.reliable).any())
        assert bool(est.reliable.any()) or "guide" in call


@pytest.mark.parametrize("name", PAIRS)
def test_their_rows_are_bound(name):
    make, size = PAIRS[name]
    model, guide = make(size)
    x = torch.linspace(-0.5, 1.0, size)
    assert "one row a datum" in find_bound_rows(model, guide, (x,), inspect(model, guide, (x,)))


def test_other_pairs_take_any_rows():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.9 * x, 0.3))

    model, x = model_of(None), torch.linspace(-0.5, 1.0, 5)
    assert find_bound_rows(model, guide, (x,), inspect(model, guide, (x,))) == ""
