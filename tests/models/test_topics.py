"""Topic models against closed forms and exact sums, perplexity and coherence against counting by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ppvae import check, fit, likelihoods, log_marginal, nn, posteriors, priors, terms
from ppvae.errors import DataError, UsageError
from ppvae.evaluation import coherence, perplexity, quadrature
from ppvae.models import TopicModel

pytestmark = pytest.mark.usefixtures("float64")
WORDS = 5
POSTERIORS = {
    "LogisticNormal": lambda k: posteriors.LogisticNormal(nn.mlp(WORDS, 2 * k, hidden=(5,))),
    "Dirichlet": lambda k: posteriors.Dirichlet(nn.mlp(WORDS, k, hidden=(5,)), floor=0.5),
}
PRIORS = {"LogisticNormal": priors.LogisticNormal, "Dirichlet": lambda k: priors.Dirichlet(k, 0.8)}
each = pytest.mark.parametrize("name", PRIORS)


def pair(name: str = "Dirichlet", topics: int = 2) -> TopicModel:
    return TopicModel(PRIORS[name](topics), nn.Topics(topics, WORDS), POSTERIORS[name](topics))


def documents(rows: int = 4) -> Tensor:
    x = torch.poisson(torch.full((rows, WORDS), 1.5))
    x[:, 0] += 1
    return x


# -- the density ------------------------------------------------------------------------------------------------------


@each
def test_one_topic_is_a_multinomial(name):
    model, x = pair(name, 1), documents()
    beta = model.likelihood.net.logits.detach().softmax(-1)[0]
    exact = [torch.distributions.Multinomial(int(row.sum()), beta).log_prob(row) for row in x]
    est = log_marginal(model.model, model.guide, x, num_particles=30, progress=False, proposal="guide")
    torch.testing.assert_close(est.log_px, torch.stack(exact))


def of_two_topics(beta: Tensor, a: float, row: Tensor) -> float:
    """p(x | N) = E[prod_w (theta beta_1w + (1 - theta) beta_2w)^x_w] N! / prod x_w!, a polynomial in theta ~ Beta(a, a)
    whose moments are ratios of Beta functions."""
    powers = [1.0]  # the coefficient of theta^i (1 - theta)^(n - i)
    for w, count in enumerate(row.long().tolist()):
        for _ in range(count):
            one, two = float(beta[0, w]), float(beta[1, w])
            powers = [
                (powers[i - 1] * one if i else 0.0) + (powers[i] * two if i < len(powers) else 0.0)
                for i in range(len(powers) + 1)
            ]
    n = len(powers) - 1

    def log_beta(p: float, q: float) -> float:
        return math.lgamma(p) + math.lgamma(q) - math.lgamma(p + q)

    mean = sum(c * math.exp(log_beta(a + i, a + n - i) - log_beta(a, a)) for i, c in enumerate(powers))
    return math.log(mean) + math.lgamma(n + 1) - sum(math.lgamma(v + 1) for v in row.tolist())


def test_log_px_of_two_topics_is_the_exact_sum():
    model, x = pair(), documents()
    with torch.no_grad():  # a guide whose tails are those of the prior or heavier, 0.7: the weights are bounded
        model.posterior.net[-1].weight.zero_()
        model.posterior.net[-1].bias.fill_(math.log(math.expm1(0.2)))
    exact = torch.tensor([of_two_topics(model.words, 0.8, row) for row in x])
    est = log_marginal(model.model, model.guide, x, num_particles=6000, seed=1, progress=False, proposal="guide")
    assert bool(est.reliable.all())
    assert bool(((est.log_px - exact).abs() < 4 * est.std_error + 1e-9).all())  # fails once in 4000
    assert bool((est.std_error < 0.02).all())


@each
def test_log_px_of_two_topics_is_the_quadrature(name):
    model, x = pair(name), documents()
    if name == "LogisticNormal":  # theta = sigmoid(t), t normal: an integral over the line, by the trapezoid rule
        t = torch.linspace(-12, 12, 4001)[:, None]
        theta = torch.cat([t.sigmoid(), (-t).sigmoid()], -1)
        theta = theta[:, None].expand(-1, len(x), -1)
        log_lik = model.likelihood(theta, context=x.sum(-1)).log_prob(x)
        log_prior = torch.distributions.Normal(0.0, math.sqrt(2)).log_prob(t)
        exact = (log_lik + log_prior).logsumexp(0) + math.log(24 / 4000)
    else:
        exact = torch.tensor([of_two_topics(model.words, 0.8, row) for row in x])
    found = quadrature(model.model, model.guide, x)
    torch.testing.assert_close(found.log_px, exact.detach(), atol=1e-6, rtol=0)


def test_the_words_of_a_document_are_a_mixture_in_log_space():
    net = nn.Topics(3, WORDS)
    theta = torch.distributions.Dirichlet(torch.ones(3)).sample((7,))
    torch.testing.assert_close(net(theta), (theta @ net.logits.softmax(-1)).log())
    with torch.no_grad():
        net.logits[:, 0] = -2000.0  # a mass that exp cannot hold
    out = net(theta)
    assert bool(out.isfinite().all())
    (grad,) = torch.autograd.grad(out[:, 0].sum(), net.logits)
    assert bool(grad.isfinite().all())
    torch.testing.assert_close(out[:, 0], (theta.log() + net.logits.log_softmax(-1)[:, 0]).logsumexp(-1))


def test_topics_start_at_the_clusters_of_documents():
    of_topics = torch.tensor([[0.5, 0.5, 0.0, 0.0, 0.0], [0.0, 0.0, 0.2, 0.4, 0.4]])  # documents have one topic each
    which = torch.tensor([0, 1, 1, 0, 1, 1])
    lengths = torch.tensor([10.0, 20.0, 40.0, 30.0, 10.0, 50.0])
    net = nn.Topics.from_data(lengths[:, None] * of_topics[which], 2, seed=3)
    found = net.logits.softmax(-1)
    expected = 0.9 * of_topics + 0.1 * of_topics[which].mean(0)  # documents count alike, whatever their lengths
    torch.testing.assert_close(found[found[:, 0].argsort(descending=True)], expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="topics: expected 1 to 3, as there are documents, found 4"):
        nn.Topics.from_data(torch.ones(3, WORDS), 4)
    with pytest.raises(ValueError, match="found none in row 1; leave it out"):
        nn.Topics.from_data(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), 1)


def test_a_linear_layer_is_a_product_of_experts():
    model = TopicModel(PRIORS["Dirichlet"](2), torch.nn.Linear(2, WORDS, bias=False), POSTERIORS["Dirichlet"](2))
    weight = model.likelihood.net.weight.detach()
    torch.testing.assert_close(model.words, weight.T.softmax(-1))
    theta = torch.tensor([0.3, 0.7])
    experts = model.words[0] ** 0.3 * model.words[1] ** 0.7
    torch.testing.assert_close(model.likelihood.net(theta).softmax(-1), experts / experts.sum())


@each
def test_words_that_no_document_has_and_no_topic_likes_change_nothing(name):
    model, x = pair(name), documents()
    wide = pair(name)
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), wide.parameters(), strict=True):
            theirs.copy_(ours)
        nothing = torch.full((2, 3), -torch.inf)
        wide.likelihood.net.logits = torch.nn.Parameter(torch.cat([model.likelihood.net.logits, nothing], -1))
    wide.posterior.net.register_forward_pre_hook(lambda _, args: (args[0][..., :WORDS],))
    t = terms(model.model, model.guide, x, 3)
    padded = torch.cat([x, torch.zeros(len(x), 3)], -1)
    other = terms(wide.model, wide.guide, padded, 3, values={"theta": t.guide["theta"].value})
    torch.testing.assert_close(other.log_weight, t.log_weight)


# -- perplexity and coherence -----------------------------------------------------------------------------------------


def test_perplexity_of_the_uniform_model_is_the_size_of_the_vocabulary():
    model, x = pair("Dirichlet", 3), documents(20)
    torch.nn.init.zeros_(model.likelihood.net.logits)
    est = log_marginal(model.model, model.guide, x, num_particles=500, seed=0, progress=False, proposal="guide")
    assert perplexity(est.log_px, x) == pytest.approx(WORDS, rel=0.02)  # the guide is not the prior: weights vary
    theta = priors.Dirichlet(3)().sample((20,))
    exact = likelihoods.Multinomial(model.likelihood.net)(theta, context=x.sum(-1)).log_prob(x)
    assert perplexity(exact, x) == pytest.approx(WORDS, rel=1e-12)


def test_perplexity_is_that_of_words_in_their_order():
    """One topic, by hand: exp(-(2 log .5 + log .3 + log .2) / 4), for documents of 3 words and of 1."""
    x = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    log_px = torch.tensor([3 * 0.5**2 * 0.3, 0.2]).log()
    assert perplexity(log_px, x) == pytest.approx(math.exp(-(2 * math.log(0.5) + math.log(0.3) + math.log(0.2)) / 4))
    with pytest.raises(UsageError, match=r"perplexity: expected log_px \[N\] and x \[N, V\], found \[2\], \[1, 3\]"):
        perplexity(log_px, x[:1])
    with pytest.raises(UsageError, match="expected documents with words"):
        perplexity(log_px, 0 * x)


def test_coherence_by_hand():
    """Four documents: word 0 in three of them, 1 in two, 2 in one; 0 and 1 together in one, 0 and 2 in one, 1 and 2 in
    none."""
    x = torch.tensor([[3.0, 0.0, 1.0, 1.0], [1.0, 2.0, 0.0, 1.0], [2.0, 0.0, 0.0, 1.0], [0.0, 5.0, 0.0, 1.0]])
    a = math.log((1 / 4) / (3 / 4 * 2 / 4)) / math.log(4)
    b = math.log((1 / 4) / (3 / 4 * 1 / 4)) / math.log(4)
    topics = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.1, 0.5, 0.4, 0.0]])
    expected = torch.tensor([(a + b - 1) / 3, (a + b - 1) / 3])
    torch.testing.assert_close(coherence(topics, x, top=3), expected)
    torch.testing.assert_close(coherence(topics, x, top=2), torch.tensor([a, -1.0]))
    everywhere = torch.tensor([[0.6, 0.0, 0.0, 0.4]])  # a word of all documents says nothing of another
    torch.testing.assert_close(coherence(everywhere, x, top=2), torch.zeros(1))
    assert float(coherence(torch.eye(2), torch.ones(3, 2), top=2)[0]) == 1.0
    unseen = torch.tensor([[1.0, 0.0, 1.0]])
    assert float(coherence(torch.tensor([[0.6, 0.4, 0.0]]), unseen, top=2)) == -1.0


@pytest.mark.parametrize("top", [1, 5])
def test_coherence_refuses_other_numbers_of_words(top):
    with pytest.raises(UsageError, match="top: expected 2 to 4 words"):
        coherence(torch.ones(2, 4), torch.ones(3, 4), top=top)
    with pytest.raises(UsageError, match=r"coherence: expected topics \[topics, V\]"):
        coherence(torch.ones(2, 3), torch.ones(3, 4))


# -- what is refused --------------------------------------------------------------------------------------------------

USES = {
    "check": lambda p, x: check(p.model, p.guide, x),
    "fit": lambda p, x: fit(p.model, p.guide, x, epochs=1, batch_size=2, progress=False),
    "log_marginal": lambda p, x: log_marginal(p.model, p.guide, x, num_particles=2, progress=False, proposal="guide"),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("wrong", "message"), [
    (-1.0, r"x: expected counts 0, 1, 2, \.\.\., found -1 at row . of the batch, column 2"),
    (0.5, r"x: expected counts 0, 1, 2, \.\.\., found 0.5 at row . of the batch, column 2"),
    (None, r"x: expected a count in each row, found none at row . of the batch"),
])  # fmt: skip
def test_what_is_no_document_is_refused_by_its_row(use, wrong, message):
    x = documents()
    if wrong is None:
        x[3] = 0.0
    else:
        x[3, 2] = wrong
    with pytest.raises(DataError, match=message):
        USES[use](pair(), x)


def test_what_is_no_bag_is_refused():
    with pytest.raises(DataError, match=r"x: expected rows of counts \[batch, D\], found \[4\]"):
        check(pair().model, pair().guide, torch.ones(4))
