"""A decoder with two random weights: log p of all data and leave-one-out, by quadrature and by NUTS."""

import math

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoMultivariateNormal

from ppvae import fit, log_marginal, objectives
from ppvae.evaluation import loo
from tests.programs.toys import gauss_hermite

COUNT, NOISE = 15, 0.3


def data():
    z, e = torch.randn(2, COUNT, generator=torch.Generator().manual_seed(4)).double()
    return 1.5 * z.tanh() + 0.4 + NOISE * e


def model(x):
    w = pyro.sample("w", dist.LogNormal(torch.zeros(()).double(), 0.7))
    b = pyro.sample("b", dist.Normal(torch.zeros(()).double(), 1.0))
    with pyro.plate("data", COUNT, subsample=x):
        z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
        pyro.sample("x", dist.Normal(w * z.tanh() + b, NOISE), obs=x)


class Pair:
    """AutoMultivariateNormal of the weights beside an amortised guide of z, given them."""

    def __init__(self):
        self.auto = AutoMultivariateNormal(poutine.block(model, hide=["z", "x"]), init_scale=0.2)
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2)).double()

    def guide(self, x):
        pyro.module("net", self.net)
        drawn = self.auto(x)
        w, b = drawn["w"], drawn["b"]
        inputs = torch.stack([t.expand(torch.broadcast_shapes(t.shape, x.shape)) for t in (x - b, w.log(), b)], -1)
        loc, log_scale = self.net(inputs).unbind(-1)
        with pyro.plate("data", COUNT, subsample=x):
            pyro.sample("z", dist.Normal(loc, log_scale.exp() + 0.05))


def log_likelihood(x, w, b):
    """log p(x_n | w, b) by Gauss-Hermite quadrature over z, [..., N]."""
    z, log_mass = gauss_hermite(120)
    mean = w[..., None] * z.tanh() + b[..., None]
    return (dist.Normal(mean[..., None, :], NOISE).log_prob(x[:, None]) + log_mass).logsumexp(-1)


def by_quadrature(x):
    """(log p(all x), leave-one-out densities [N]) on a grid of log w and b."""
    u, b = torch.meshgrid(torch.linspace(-2, 2, 241).double(), torch.linspace(-2, 2, 241).double(), indexing="ij")
    log_lik = log_likelihood(x, u.exp().reshape(-1), b.reshape(-1))
    log_prior = dist.Normal(0.0, 0.7).log_prob(u) + dist.Normal(0.0, 1.0).log_prob(b) + 2 * math.log(4 / 240)
    joint = log_lik.sum(-1) + log_prior.reshape(-1)
    rest = joint[:, None] - log_lik
    return joint.logsumexp(0).item(), joint.logsumexp(0) - rest.logsumexp(0)


@pytest.mark.slow
def test_a_bayesian_decoder_against_quadrature_and_nuts():
    """Monte-Carlo numbers within five standard errors; NUTS within 0.3 nats of the sum."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    x, pair = data(), Pair()
    log_px, exact = by_quadrature(x)
    pair.guide(x)
    run = fit(
        model, pair.guide, x, objective=objectives.IWAE(8, "dreg"), epochs=500, batch_size=5, compile=False,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.01),
    )  # fmt: skip
    est = log_marginal(run.model, run.guide, x, num_particles=2000, local_particles=50)
    assert abs(est.log_px.item() - log_px) < 5 * est.std_error.item() < 0.5
    result = loo(run.model, run.guide, x, num_particles=2000, local_particles=50)
    assert float(((result.elpd - exact).abs() / result.std_error).max()) < 5
    assert float(result.std_error.max()) < 0.1

    mcmc = MCMC(NUTS(model), num_samples=600, warmup_steps=300, disable_progbar=True)
    mcmc.run(x)
    draws = mcmc.get_samples()
    log_lik = log_likelihood(x, draws["w"], draws["b"]).numpy()[None]
    tree = az.from_dict(posterior={"w": draws["w"].numpy()[None]}, log_likelihood={"x": log_lik})
    theirs = az.loo(tree, pointwise=True, reff=0.5)
    assert abs(theirs.elpd_loo - result.total) < 0.3
    assert float(np.abs(theirs.loo_i.values - result.elpd.numpy()).max()) < 0.15
