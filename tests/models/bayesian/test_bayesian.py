"""Models with global latents: log p(x_n | theta) in closed form, and log p of all data summed over assignments.

Monte-Carlo numbers lie within five standard errors: false by chance with probability below 1e-4 in all.
"""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch

from experiments.bayesian import build, by_sums, load, mixture_evidence, topics_evidence
from ppvae import fit, likelihoods, log_marginal, nn, objectives, posteriors, priors, terms
from ppvae.evaluation import loo
from ppvae.inference import inspect
from ppvae.models import VAE, BayesianFactorAnalysis, BayesianGaussianMixture, BayesianTopicModel, LastLayerVAE


@pytest.fixture(autouse=True)
def _empty_store():
    pyro.clear_param_store()
    torch.manual_seed(0)


def at_draws(pair, x, count=20, local_particles=1):
    """(log p(x_n | theta) [draws, N], theta by site)."""
    est = log_marginal(
        pair.model, pair.guide, x, num_particles=count, local_particles=local_particles, conditional=True,
        posterior_draws=count,
    )  # fmt: skip
    return est.log_likelihood, est.posterior


def test_a_mixture_given_its_parameters():
    x = torch.randn(12, 2).double()
    pair = BayesianGaussianMixture.from_data(x, 3)
    found, theta = at_draws(pair, x)
    component = dist.Normal(theta["loc"], theta["precision"].rsqrt()).to_event(1)
    exact = component.log_prob(x[:, None, None]).permute(1, 0, 2) + theta["weights"].log()[:, None]
    torch.testing.assert_close(found, exact.logsumexp(-1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("isotropic", [False, True])
def test_factor_analysis_given_its_parameters_is_normal_by_one_particle(isotropic):
    """The guide of z is the exact posterior, so that log-weights do not vary."""
    x = torch.randn(9, 3).double()
    pair = BayesianFactorAnalysis(9, 3, 2, isotropic).double()
    found, theta = at_draws(pair, x)
    variance = theta["precision"].reciprocal().expand(20, 3)
    exact = dist.LowRankMultivariateNormal(theta["loc"][:, None], theta["weight"][:, None], variance[:, None])
    torch.testing.assert_close(found, exact.log_prob(x), rtol=0, atol=1e-9)


def test_topics_given_the_topics():
    """Against a grid over the proportions of two topics."""
    x = load("topics")
    pair = BayesianTopicModel(4, 4, priors.Dirichlet(2), posteriors.Dirichlet(nn.mlp(4, 2), floor=0.5)).double()
    found, theta = at_draws(pair, x, count=5, local_particles=4000)
    share = (torch.arange(4000).double() + 0.5) / 4000
    words = torch.stack([share, 1 - share], -1) @ theta["topics"][:, None].squeeze(1)
    exact = (x.sum(1) + 1).lgamma() - (x + 1).lgamma().sum(1)
    exact = exact + (words.log() @ x.T).logsumexp(1) - torch.tensor(4000.0).log()
    torch.testing.assert_close(found, exact, rtol=0, atol=0.1)


def test_a_last_layer_given_its_weights_is_a_vae():
    x = torch.randn(6, 4).gt(0).double()
    features, posterior = nn.mlp(2, 5), posteriors.DiagonalNormal(nn.mlp(4, 4))
    prior, likelihood = priors.StandardNormal(2), likelihoods.Bernoulli(torch.nn.Identity())
    pair = LastLayerVAE(6, prior, features, likelihood, posterior, hidden=5, outputs=4).double()
    t = terms(pair.model, pair.guide, x, 3, global_draws=1)
    weight = t.guide["weight"].value.reshape(3, 6, 4)[0]
    layer = torch.nn.Linear(5, 4).double()
    layer.weight.data, layer.bias.data = weight[:-1].T.contiguous(), weight[-1].clone()
    vae = VAE(prior, likelihoods.Bernoulli(torch.nn.Sequential(features, layer)), posterior)
    s = inspect(vae.model, vae.guide, x)
    plain = terms(vae.model, vae.guide, x, 3, structure=s, values={"z": t.guide["z"].value})
    torch.testing.assert_close(t.local.log_weight, plain.log_weight, rtol=0, atol=1e-10)


@pytest.mark.parametrize("model", ["topics", pytest.param("mixture", marks=pytest.mark.slow)])
def test_log_p_of_all_data_and_leave_one_out_are_sums_over_assignments(model):
    x, evidence = load(model), {"topics": topics_evidence, "mixture": mixture_evidence}[model]
    pair = build(model, x)
    objective, optimizer = objectives.ELBO(4), partial(torch.optim.Adam, lr=0.05)
    fit(pair.model, pair.guide, x, objective=objective, epochs=150, batch_size=2, optimizer=optimizer, compile=False)
    log_px, exact = by_sums(evidence, x, pair)
    options = {"num_particles": 2000, "local_particles": 10}
    est = log_marginal(pair.model, pair.guide, x, **options)
    low = log_px - (0.0 if model == "topics" else 0.75)  # the components' other order is a mode of its own
    assert low - 5 * est.std_error.item() < est.log_px.item() < log_px + 5 * est.std_error.item()
    assert est.std_error.item() < 0.15
    result = loo(pair.model, pair.guide, x, **options)
    assert float(((result.elpd - exact).abs() / result.std_error).max()) < 5
    assert abs(result.total - exact.sum().item()) < 0.5


def test_held_out_data_may_be_more_than_the_training_data():
    x = torch.randn(8, 2).double()
    pair = BayesianGaussianMixture.from_data(x, 2)
    fit(pair.model, pair.guide, x, epochs=1, batch_size=3, objective=objectives.ELBO(), compile=False)
    new = torch.randn(70, 2).double()
    est = log_marginal(pair.model, pair.guide, new, num_particles=5, conditional=True)
    assert bool(est.log_px.isfinite().all())
    assert est.log_px.shape == (70,)


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="components: expected at least 1, found 0"):
        BayesianGaussianMixture(5, 2, 0)
    with pytest.raises(ValueError, match="size: expected the number of training data, at least 1, found 0"):
        BayesianFactorAnalysis(0, 2, 1).model(torch.zeros(3, 2))
