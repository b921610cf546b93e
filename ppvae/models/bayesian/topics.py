"""Latent Dirichlet allocation with a posterior over topics."""

from __future__ import annotations

from typing import final

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae.errors.ranges import check_numbers
from ppvae.likelihoods import Multinomial
from ppvae.models.bayesian.plate import NUM_DATA, data_plate
from ppvae.models.composed_model import ComposedModel
from ppvae.models.counts import validate_counts


@final
class BayesianTopicModel(ComposedModel):
    """LDA whose topics are global latents: topics_t ~ Dirichlet(smoothing), theta_n ~ prior, x_n | N ~ Multinomial.

    p(word | theta) = sum_t theta_t topics_tw. Data are counts of words [batch, words]; log p(x) is that of the bag
    given its length, as of `TopicModel`. The guide of topics is a Dirichlet for each, that of theta is amortised. Sites
    "topics" [topics, words], "theta" [topics], "x" [words].

    Args:
        size: the number of training documents, of which a batch is a part.
        words: the size of the vocabulary.
        prior: p(theta) over proportions, as `priors.Dirichlet`.
        posterior: q(theta | x), as `posteriors.Dirichlet` or `LogisticNormal`.
        smoothing: of the Dirichlet prior of topics.

    Raises DataError, by its row, for a document without words and for a value that is no count.
    Source: Blei et al. 2003, Latent Dirichlet allocation; Hoffman et al. 2010, Online learning for LDA.

    >>> from ppvae import nn, posteriors, priors
    >>> pair = BayesianTopicModel(
    ...     50, 10, priors.Dirichlet(2), posteriors.Dirichlet(torch.nn.Sequential(nn.Log1p(), nn.mlp(10, 2))),
    ... )
    >>> pair.guide(torch.ones(4, 10)).shape, pair.model(torch.ones(4, 10)).shape
    (torch.Size([4, 2]), torch.Size([4, 10]))
    """

    def __init__(self, size: int, words: int, prior: nn.Module, posterior: nn.Module, smoothing: float = 1.0):
        NUM_DATA.check_number("size", size)
        check_numbers(words=words, smoothing=smoothing)
        super().__init__("bayesian_topic_model")
        self.size, self.smoothing = size, smoothing
        self.prior, self.posterior = prior, posterior
        self.topics = TopicPosterior(len(prior().sample()), words)

    def model(self, x: Tensor) -> Tensor:
        """p(topics, theta, x | N)."""
        length = validate_counts(x).sum(-1)
        smoothing = torch.full_like(self.topics.log_concentration, self.smoothing)
        topics = pyro.sample("topics", dist.Dirichlet(smoothing).to_event(1))
        with data_plate(self.size, x):
            theta = pyro.sample("theta", self.call_part("prior"))
            log_words = (theta.unsqueeze(-2) @ topics).squeeze(-2).log()
            return pyro.sample("x", Multinomial(nn.Identity())(log_words, context=length), obs=x)

    def guide(self, x: Tensor) -> Tensor:
        """q(topics) q(theta | x)."""
        counts = validate_counts(x)
        pyro.sample("topics", self.call_part("topics"))
        with data_plate(self.size, x):
            return pyro.sample("theta", self.call_part("posterior", counts))


class TopicPosterior(nn.Module):
    """q(topics): a Dirichlet for each topic, started at random so that topics differ."""

    def __init__(self, topics: int, words: int):
        super().__init__()
        self.log_concentration = nn.Parameter(torch.rand(topics, words) + 0.5)

    def forward(self) -> dist.TorchDistribution:
        return dist.Dirichlet(self.log_concentration.exp()).to_event(1)
