"""Pyro's Gaussian mixture tutorial and its LDA: check, fit on mini-batches, log p of each datum, loo, az.compare."""

import arviz as az
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import (
    AutoDelta,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch import nn
from torch.distributions import constraints

from ppvae import check, fit, log_marginal, objectives
from ppvae.evaluation import loo
from tests.programs.pyro_examples import examples

pytestmark = pytest.mark.filterwarnings("ignore")
FIRST = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])  # the tutorial's data
DATA = torch.cat([FIRST, 1.0 + torch.linspace(-1.5, 1.5, 7), 11.0 + torch.linspace(-1.0, 1.0, 8)])


@pytest.fixture(autouse=True)
def _empty_store():
    pyro.clear_param_store()
    torch.manual_seed(0)


def mixture(num_components, size=None, scale_prior=(0.0, 2.0)):
    """The tutorial's program; `size`: its data plate takes mini-batches of so many data."""

    @config_enumerate
    def model(data):
        weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(num_components)))
        scale = pyro.sample("scale", dist.LogNormal(*scale_prior))
        with pyro.plate("components", num_components):
            locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
        plate = pyro.plate("data", len(data)) if size is None else pyro.plate("data", size, subsample=data)
        with plate:
            assignment = pyro.sample("assignment", dist.Categorical(weights))
            pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=data)

    return model


def start(site):
    """The tutorial's start of a component, at data points."""
    if site["name"] == "weights":
        return torch.ones(site["fn"].event_shape[0]) / site["fn"].event_shape[0]
    if site["name"] == "scale":
        return torch.tensor(1.0)
    return torch.linspace(1.0, 11.0, site["fn"].batch_shape[0])


def auto(kind, model, **options):
    hidden = poutine.block(model, expose=["weights", "locs", "scale"])
    return kind(hidden, init_loc_fn=start, **options)


def log_mixture(weights, locs, scale):
    """log p(x_n | theta), [draws, N]."""
    by_component = dist.Normal(locs[..., None, :], scale[..., None, None]).log_prob(DATA[:, None])
    return (by_component + weights.log()[..., None, :]).logsumexp(-1)


@pytest.mark.parametrize("batch_size", [len(DATA), 5])
def test_the_mixture_of_the_tutorial_by_map(batch_size):
    model = mixture(2, None if batch_size == len(DATA) else len(DATA))
    guide = auto(AutoDelta, model)
    guide(DATA)
    text = check(model, guide, DATA)
    assert "'weights'" in text
    assert "given the global latents each datum has a log-weight of its own" in text
    run = fit(
        model,
        guide,
        DATA,
        objective=TraceEnum_ELBO(max_plate_nesting=1),
        epochs=10,
        batch_size=batch_size,
        compile=False,
    )
    est = log_marginal(run.model, run.guide, DATA, num_particles=2, conditional=True, posterior_draws=1)
    point = [est.posterior[name][:1] for name in ("weights", "locs", "scale")]
    torch.testing.assert_close(est.log_px, log_mixture(*point)[0].double(), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_mixtures_of_the_tutorial_are_fitted_on_mini_batches_and_compared():
    results, draws = {}, 300
    for name, scale_prior in {"tutorial": (0.0, 2.0), "too wide": (1.6, 0.05)}.items():
        pyro.clear_param_store()
        model = mixture(2, len(DATA), scale_prior)
        guide = auto(AutoNormal, model, init_scale=0.05)
        guide(DATA)
        run = fit(
            model, guide, DATA, objective=objectives.IWAE(2), epochs=150, batch_size=10, compile=False,
            optimizer=lambda p: torch.optim.Adam(p, lr=0.03),
        )  # fmt: skip
        est = log_marginal(run.model, run.guide, DATA, num_particles=draws, conditional=True, posterior_draws=draws)
        by_hand = log_mixture(*(est.posterior[name] for name in ("weights", "locs", "scale")))
        torch.testing.assert_close(est.log_likelihood, by_hand.double(), rtol=0, atol=1e-3)
        results[name] = loo(run.model, run.guide, DATA, num_particles=draws)
    table = az.compare({name: result.to_arviz() for name, result in results.items()})
    assert list(table.index) == ["tutorial", "too wide"]
    assert table["elpd_diff"].iloc[1] > 5


@pytest.mark.parametrize("kind", [AutoMultivariateNormal, AutoLowRankMultivariateNormal, AutoIAFNormal])
def test_structured_guides_of_global_latents_have_weights_of_each_datum(kind):
    model = mixture(2, len(DATA))
    hidden = poutine.block(model, expose=["weights", "locs", "scale"])
    guide = kind(hidden) if kind is AutoIAFNormal else auto(kind, model, init_scale=0.05)
    guide(DATA)
    for gradient in ("pathwise", "dreg"):
        assert abs(objectives.IWAE(2, gradient).loss_and_grads(model, guide, DATA[:6])) < 1e6
    est = log_marginal(model, guide, DATA, num_particles=20, conditional=True, posterior_draws=20)
    by_hand = log_mixture(*(est.posterior[name] for name in ("weights", "locs", "scale")))
    torch.testing.assert_close(est.log_likelihood, by_hand.double(), rtol=1e-4, atol=1e-3)


# -- LDA ---------------------------------------------------------------------------------------------------------------

TOPICS, WORDS, LENGTH, DOCS = 2, 6, 8, 30


def documents():
    """Documents of two topics, of the first and of the last three words: [30, 8]."""
    generator = torch.Generator().manual_seed(0)
    low = torch.randint(3, (DOCS, LENGTH), generator=generator)
    return low + 3 * (torch.arange(DOCS) % 2)[:, None]


def lda(num_topics):
    """Pyro's lda.py, whose guide of the documents' topics is a Dirichlet in place of a point."""
    net = nn.Sequential(nn.Linear(WORDS, num_topics), nn.Softplus())

    def model(docs):
        with pyro.plate("topics", num_topics):
            topic_words = pyro.sample("topic_words", dist.Dirichlet(torch.ones(WORDS)))
        with pyro.plate("documents", DOCS, subsample=docs):
            doc_topics = pyro.sample("doc_topics", dist.Dirichlet(torch.ones(num_topics) / num_topics))
            with pyro.plate("words", LENGTH):
                topic = pyro.sample("word_topics", dist.Categorical(doc_topics), infer={"enumerate": "parallel"})
                pyro.sample("doc_words", dist.Categorical(topic_words[topic]), obs=docs.T)

    def guide(docs):
        pyro.module("predictor", net)
        words = pyro.param(
            "topic_counts", lambda: 5 * torch.rand(num_topics, WORDS, generator=torch.Generator().manual_seed(1)) + 0.5,
            constraint=constraints.greater_than(0.3),
        )  # fmt: skip
        with pyro.plate("topics", num_topics):
            pyro.sample("topic_words", dist.Dirichlet(words))
        with pyro.plate("documents", DOCS, subsample=docs):
            counts = nn.functional.one_hot(docs, WORDS).sum(1).float()
            pyro.sample("doc_topics", dist.Dirichlet(0.3 + net(counts)))

    return model, guide


def log_likelihood_of_words(topic_words, count=20_000):
    """log p(document | topic words) by draws of its topics from their prior, [N]."""
    theta = dist.Dirichlet(torch.ones(TOPICS) / TOPICS).sample((count,))
    words = (theta @ topic_words).log()
    return torch.stack([words[:, doc].sum(-1).logsumexp(0) for doc in documents()]) - torch.tensor(float(count)).log()


def test_an_lda_with_topics_as_global_latents():
    model, guide = lda(TOPICS)
    docs = documents()
    text = check(model, guide, docs)
    assert "'topic_words'" in text
    run = fit(model, guide, docs, objective=objectives.ELBO(), epochs=3, batch_size=10, compile=False)
    est = log_marginal(
        run.model, run.guide, docs, num_particles=2, local_particles=400, conditional=True, posterior_draws=2
    )
    for draw, values in enumerate(est.log_likelihood):
        exact = log_likelihood_of_words(est.posterior["topic_words"][draw])
        assert float((values - exact).abs().median()) < 0.3
    result = loo(run.model, run.guide, docs, num_particles=30, local_particles=2)
    assert result.elpd.shape == (DOCS,)
    assert bool(result.elpd.isfinite().all())


def test_pyros_lda_has_a_point_on_each_document_and_no_weight_of_it():
    e = examples()["lda, documents first"]
    e.guide(*e.data)
    assert "given the global latents no datum has a log-weight of its own" in check(e.model, e.guide, e.data)
    with pytest.raises(Exception, match=r"'doc_topics'.*Delta"):
        log_marginal(e.model, e.guide, e.data, num_particles=5, conditional=True)
