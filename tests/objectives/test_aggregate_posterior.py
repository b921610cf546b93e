"""TCVAE and InfoVAE: their terms against densities written out here."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from ppvae.errors import ContractError
from ppvae.inference import terms
from ppvae.objectives import (
    ELBO,
    TCVAE,
    InfoVAE,
)  # fmt: skip
from ppvae.objectives.aggregate_posterior import mmd
from tests.laws.objectives import (
    value,
)
from tests.objectives.pairs import dims_pair

pytestmark = pytest.mark.filterwarnings("ignore:STL is biased")


def test_tcvae_with_weights_of_one_is_the_elbo_and_its_parts_are_what_they_are(float64):
    model, guide, x, loc = dims_pair()
    for particles in (1, 3):
        same = TCVAE(1.0, 1.0, 1.0, num_data=50, num_particles=particles)
        assert value(same, model, guide, x) == pytest.approx(value(ELBO(particles), model, guide, x), abs=1e-10)

    torch.manual_seed(3)
    x, net = torch.randn(5, 2), nn.Linear(2, 4)

    def amortised(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            loc, log_scale = net(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    value(ELBO(), model, amortised, x)
    torch.manual_seed(1)
    t = terms(model, amortised, x)
    loc, log_scale = net(x).chunk(2, -1)
    z = t.guide["z"].value[0]
    pairs = dist.Normal(loc, log_scale.exp()).log_prob(z[:, None])  # [draw, datum, dim]
    log_qz = pairs.sum(-1).logsumexp(1) - math.log(5 * 200)
    log_dims = (pairs.logsumexp(1) - math.log(5 * 200)).sum(-1)
    parts = [t.log_guide[0] - log_qz, log_qz - log_dims, log_dims - t.log_prior[0]]
    elbo = value(ELBO(), model, amortised, x)
    for place, weights in enumerate(((1.0, 3.0, 1.0), (3.0, 1.0, 1.0), (1.0, 1.0, 3.0))):
        beta, alpha, gamma = weights[1], weights[0], weights[2]
        found = value(TCVAE(beta, alpha, gamma, num_data=200), model, amortised, x)
        part = parts[weights.index(3.0)]
        assert found - elbo == pytest.approx(2 * float(part.sum().detach()), abs=1e-9), place


def test_tcvae_takes_the_size_of_the_data_from_the_plate_or_asks_for_it(float64):
    model, guide, x, _ = dims_pair()
    with pytest.raises(ContractError, match="num_data"):
        TCVAE().loss(model, guide, x)


def test_mmd_is_unbiased_and_tells_distributions_apart(float64):
    """In one dim the kernel's mean is known: E exp(-(x - y)^2 / 2), x - y ~ N(m, 2), is exp(-m^2 / 6) / sqrt(3)."""
    torch.manual_seed(0)
    found = torch.stack([mmd(torch.randn(20, 1), 1.5 + torch.randn(20, 1), 1.0) for _ in range(1000)])
    exact = 2 * (1 - math.exp(-(1.5**2) / 6)) / math.sqrt(3)
    assert abs(float(found.mean()) - exact) < 5 * float(found.std()) / 1000**0.5  # wrong with probability 6e-7
    none = torch.stack([mmd(torch.randn(20, 1), torch.randn(20, 1), 1.0) for _ in range(1000)])
    assert abs(float(none.mean())) < 5 * float(none.std()) / 1000**0.5


def test_infovae_draws_latents_of_the_guide_to_the_prior(float64):
    model, guide, x, loc = dims_pair()
    x = torch.zeros(40, 2)
    objective = InfoVAE(alpha=1.0, weight=1000.0, num_particles=2)
    objective.loss_and_grads(model, guide, x)
    assert loc.grad[1] > 0  # a step down takes the location to zero
