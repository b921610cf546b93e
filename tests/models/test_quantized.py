"""Quantised latents against sums over all codes, and against the nearest code that they come to."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pyro.infer import config_enumerate
from torch import Tensor

from ppvae import check, fit, likelihoods, log_marginal, nn, objectives, posteriors, priors, terms
from ppvae.errors import ContractError
from ppvae.models import QuantizedVAE

pytestmark = pytest.mark.usefixtures("float64")
CODES, VARIABLES, SIZE, FEATURES = 3, 2, 4, 5
PRIORS: dict[str, Callable[[], Any]] = {
    "independent": lambda: priors.OneHot(CODES, VARIABLES, learned=True),
    "autoregressive": lambda: priors.AutoregressiveOneHot(CODES, VARIABLES, hidden=(6,)),
}


def made(prior: str = "autoregressive", **options: Any) -> QuantizedVAE:
    """A small VAE with noise on all of its parameters: no prior is uniform."""
    torch.manual_seed(0)
    vae = QuantizedVAE(
        PRIORS[prior](),
        likelihoods.Bernoulli(nn.mlp(VARIABLES * SIZE, FEATURES, hidden=(6,))),
        nn.mlp(FEATURES, VARIABLES * SIZE, hidden=(6,)),
        nn.Codebook(CODES, SIZE),
        **options,
    )
    with torch.no_grad():
        for p in vae.parameters():
            p.add_(0.5 * torch.randn(p.shape))
    return vae


def bits(rows: int = 6) -> Tensor:
    return torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(1)).gt(0).double()


def by_hand(vae: QuantizedVAE, x: Tensor) -> Tensor:
    """log p(x) by a sum over all codes, each factor on its own."""
    book, total = vae.posterior.net[1].codebook.table, []
    for codes in itertools.product(range(CODES), repeat=VARIABLES):
        z = torch.nn.functional.one_hot(torch.tensor(codes), CODES).double().flatten()
        if isinstance(vae.prior, priors.OneHot):
            log_prior = sum(vae.prior.logits.log_softmax(-1)[v, k] for v, k in enumerate(codes))
        else:
            log_prior = sum(vae.prior.index.net(z).log_softmax(-1)[v, k] for v, k in enumerate(codes))
        logits = vae.likelihood[1].net(book[list(codes)].flatten())
        pixels = torch.nn.functional.binary_cross_entropy_with_logits(logits.expand_as(x), x, reduction="none")
        total.append(log_prior - pixels.sum(-1))
    return torch.stack(total).logsumexp(0)


@pytest.mark.parametrize("prior", PRIORS)
def test_log_px_is_the_sum_over_all_codes(prior):
    vae, x = made(prior, scale=3.0), bits()  # a guide with mass on every code
    with torch.no_grad():
        exact = by_hand(vae, x)
        summed = log_marginal(
            vae.model, config_enumerate(vae.guide), x, num_particles=1, progress=False, proposal="guide"
        )
        drawn = log_marginal(vae.model, vae.guide, x, num_particles=2000, progress=False, proposal="guide")
    torch.testing.assert_close(summed.log_px, exact)
    assert bool(drawn.reliable.all())  # 5 standard errors of 6 data: once in 300,000 draws
    assert float(((drawn.log_px - exact) / drawn.std_error).abs().max()) < 5


@pytest.mark.parametrize("prior", PRIORS)
def test_the_prior_and_the_model_sum_to_one(prior):
    vae = made(prior)
    every = vae.prior().enumerate_support()
    assert len(every) == CODES**VARIABLES
    torch.testing.assert_close(vae.prior().log_prob(every).logsumexp(0), torch.tensor(0.0))
    x = torch.tensor([*itertools.product((0.0, 1.0), repeat=FEATURES)])
    torch.testing.assert_close(by_hand(vae, x).logsumexp(0), torch.tensor(0.0))


def distances(vae: QuantizedVAE, x: Tensor) -> Tensor:
    """|e_m(x) - c_k|^2, [batch, M, V]."""
    e = vae.posterior.net[0](x).unflatten(-1, (VARIABLES, SIZE))
    return (e.unsqueeze(-2) - vae.posterior.net[1].codebook.table).square().sum(-1)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_the_posterior_is_a_softmax_of_distances(scale):
    vae, x = made(), bits()
    with torch.no_grad():
        vae.posterior.net[1].log_scale.fill_(scale).log_()
    q = vae.posterior(x)
    every = q.enumerate_support(expand=False)
    found = q.log_prob(every).exp()
    torch.testing.assert_close(found.sum(0), torch.ones(len(x)))
    first, second = (-distances(vae, x) / (2 * scale**2)).softmax(-1).unbind(1)
    torch.testing.assert_close(found.T, (first.unsqueeze(2) * second.unsqueeze(1)).flatten(1))


def test_a_small_scale_gives_the_nearest_code_and_a_large_one_any():
    vae, x = made(), bits()
    nearest = torch.nn.functional.one_hot(distances(vae, x).argmin(-1), CODES).double().flatten(1)
    with torch.no_grad():
        vae.posterior.net[1].log_scale.fill_(-7)
        assert bool((vae.posterior(x).sample((20,)) == nearest).all())
        torch.testing.assert_close(vae.posterior(x).log_prob(nearest), torch.zeros(len(x)))
        vae.posterior.net[1].log_scale.fill_(7)
        torch.testing.assert_close(vae.posterior(x).log_prob(nearest).exp(), torch.full((6,), 1 / 9), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["table", "log_scale"])
def test_the_book_is_trained_from_both_sides(name):
    """Its gradient by sums over all codes is a difference quotient of the exact ELBO."""
    vae, x = made(), bits()
    summed = config_enumerate(vae.guide)
    p = vae.posterior.net[1].codebook.table if name == "table" else vae.posterior.net[1].log_scale
    way = torch.randn_like(p)

    def elbo() -> Tensor:
        return terms(vae.model, summed, x, 1).elbo.sum()

    (slope,) = torch.autograd.grad(elbo(), p)
    with torch.no_grad():
        p.add_(1e-5 * way)
        above = elbo()
        p.sub_(2e-5 * way)
        quotient = (above - elbo()) / 2e-5
    torch.testing.assert_close((slope * way).sum(), quotient, rtol=1e-5, atol=1e-6)


def test_the_relaxed_pair_shares_everything_with_the_discrete_one():
    vae, x = made("independent", posterior=posteriors.RelaxedOneHot), bits()
    assert "relaxed discrete latent" in str(check(vae.model, vae.guide, x))
    torch.testing.assert_close(
        log_marginal(
            vae.discrete.model, config_enumerate(vae.discrete.guide), x, num_particles=1, proposal="guide"
        ).log_px,
        by_hand(made("independent"), x),
    )


@pytest.mark.parametrize("objective", [
    pytest.param(lambda: objectives.IWAE(10, gradient="vimco"), id="vimco"),
    pytest.param(lambda: objectives.ELBO(), id="enumerated"),
])  # fmt: skip
def test_training_finds_codes_that_a_learned_prior_ties(objective):
    """Two clusters told by both halves of x alike: log p(x) nears minus their entropy, log 2 and the noise's."""
    torch.manual_seed(0)
    halves = torch.rand(400, 1).lt(0.5).double()
    x = (halves.expand(-1, FEATURES) - torch.rand(400, FEATURES).lt(0.02).double()).abs()
    vae = QuantizedVAE(
        priors.AutoregressiveOneHot(CODES, VARIABLES, hidden=(6,)),
        likelihoods.Bernoulli(nn.mlp(VARIABLES * SIZE, FEATURES, hidden=())),
        nn.mlp(FEATURES, VARIABLES * SIZE, hidden=()),
        nn.Codebook(CODES, SIZE),
    )
    chosen = objective()
    guide = config_enumerate(vae.guide) if isinstance(chosen, objectives.ELBO) else vae.guide
    adam = functools.partial(torch.optim.Adam, lr=0.02)
    fit(vae.model, guide, x, objective=chosen, optimizer=adam, epochs=30, batch_size=100, progress=False)
    found = log_marginal(vae.model, config_enumerate(vae.guide), x, num_particles=1, progress=False, proposal="guide")
    noise = torch.distributions.Bernoulli(torch.tensor(0.02)).entropy() * FEATURES
    assert float(found.nll) < float(torch.tensor(2.0).log() + noise) + 0.1


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="codes: expected at least 2, found 1"):
        nn.Codebook(1, 4)
    with pytest.raises(ValueError, match=r"scale: expected a finite positive number, found 0"):
        made(scale=0.0)
    vae = made()
    vae.prior = priors.AutoregressiveOneHot(CODES, VARIABLES + 1)
    with pytest.raises(ContractError, match=r"expected z of one shape, found \[9\] and \[6\]"):
        check(vae.model, vae.guide, bits())
