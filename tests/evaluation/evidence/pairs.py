"""Pairs in one to three dims whose log p(x) is known or integrated by quadrature."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch


def funnel(x):
    """b ~ N(0, exp(a)), x ~ N(b, 0.3): no elliptical density fits the posterior."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(0.0, 2.5))
        b = pyro.sample("b", dist.Normal(0.0, a.exp()))
        pyro.sample("x", dist.Normal(b, 0.3), obs=x)


def funnel_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(x, 0.5))


def coin(x):
    """A discrete latent that is sampled: no proposal can be refined."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def coin_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(0.5))


def two_modes(x):
    """|z| is seen: posterior modes near x and -x, of equal mass; log p(x) = log of two normal integrals."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 3.0))
        pyro.sample("x", dist.Normal(z.abs(), 0.3), obs=x)


def one_mode_guide(x):
    """Knows the mode near x alone."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, 0.3))


def both_modes_guide(x):
    with pyro.plate("data", len(x)):
        logits, locs = torch.zeros(len(x), 2), torch.stack([x, -x], -1)
        pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(logits=logits), dist.Normal(locs, 0.4)))


def two_modes_log_px(x):
    """Each half of the prior gives N(x; 0, 9.09) times the posterior mass on its side."""
    variance = 9.0 + 0.09
    loc, scale = x * 9.0 / variance, math.sqrt(9.0 * 0.09 / variance)
    inside = torch.special.log_ndtr(loc / scale)
    return math.log(2) + dist.Normal(0.0, math.sqrt(variance)).log_prob(x) + inside
