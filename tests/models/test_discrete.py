"""A discrete VAE that is small enough for sums: what VIMCO and reweighted wake-sleep reach, beside the exact ELBO."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from pyro.infer import config_enumerate

from ppvae import VAE, fit, likelihoods, log_marginal, nn, posteriors, priors
from ppvae.inference import terms
from ppvae.objectives import ELBO, IWAE, ReweightedWakeSleep

BITS, SIZE = 6, 300
ALLOWANCE = 0.1  # nats below what the exact ELBO reaches


def images() -> torch.Tensor:
    """Three strokes of a 4 x 4 image, each there or not, and one pixel in twenty turned over."""
    torch.manual_seed(1)
    strokes = (torch.rand(3, 16) < 0.4).float()
    there = (torch.rand(SIZE, 3) < 0.5).float()
    clean = (there @ strokes).clamp(max=1)
    return (clean - (torch.rand(SIZE, 16) < 0.05).float()).abs()


def vae() -> VAE:
    torch.manual_seed(0)
    return VAE(
        priors.Bernoulli(BITS, learned=True),
        likelihoods.Bernoulli(nn.mlp(BITS, 16, hidden=())),
        posteriors.Bernoulli(nn.mlp(16, BITS, hidden=(16,))),
    )


@functools.cache
def reached(name: str) -> tuple[VAE, float, float]:
    """(the pair, its exact log p(x), its exact ELBO) after equal training, in nats per datum."""
    own, x = vae(), images()
    summed = config_enumerate(own.guide)
    objective, guide = {
        "enumerated": (ELBO(), summed),
        "vimco": (IWAE(10, "vimco"), own.guide),
        "wake": (ReweightedWakeSleep(10), own.guide),
        "wake and sleep": (ReweightedWakeSleep(10, 0.5, 0.5), own.guide),
    }[name]
    adam = functools.partial(torch.optim.Adam, lr=0.03)
    fit(own.model, guide, x, objective=objective, optimizer=adam, epochs=40, batch_size=100, compile=False)
    exact = log_marginal(own.model, summed, x, num_particles=1, proposal="guide")
    return own, -exact.nll, float(exact.elbo.mean())


def test_sums_learn():
    start = log_marginal(vae().model, config_enumerate(vae().guide), images(), num_particles=1, proposal="guide")
    assert reached("enumerated")[1] > -start.nll + 3


@pytest.mark.parametrize("name", ["vimco", "wake", "wake and sleep"])
def test_draws_reach_what_sums_reach(name):
    """Measured: log p(x) is -6.13 by VIMCO, -6.12 in the wake, where the exact ELBO, a looser bound, reaches -6.24."""
    _, log_px, elbo = reached(name)
    assert log_px > reached("enumerated")[1] - ALLOWANCE
    assert elbo <= log_px


@pytest.mark.parametrize("name", ["enumerated", "vimco", "wake"])
def test_importance_sampling_agrees_with_sums(name):
    """E[estimate of p(x)] = p(x), with the variance of the weights over all codes: 6 standard errors over the data."""
    own, x, count = reached(name)[0], images(), 2000
    codes = torch.tensor([*itertools.product((0.0, 1.0), repeat=BITS)])
    with torch.no_grad():
        t = terms(own.model, own.guide, x, len(codes), values={"z": codes[:, None].expand(-1, SIZE, -1)})
    exact = (t.log_weight + t.log_guide).logsumexp(0)
    summed = log_marginal(own.model, config_enumerate(own.guide), x, num_particles=1, proposal="guide")
    torch.testing.assert_close(summed.log_px, exact, rtol=0, atol=1e-4)
    torch.testing.assert_close(summed.elbo, (t.log_guide.exp() * t.log_weight).sum(0), rtol=0, atol=1e-4)
    variance = ((t.log_guide + 2 * (t.log_weight - exact)).logsumexp(0).exp() - 1).clamp(min=0) / count
    est = log_marginal(own.model, own.guide, x, num_particles=count, seed=0, proposal="guide")
    off = (est.log_px - exact).exp() - 1
    assert float(off.sum().abs()) < 6 * float(variance.sum().sqrt()) + 1e-4 * SIZE
