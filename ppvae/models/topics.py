"""Topic models: documents as bags of words, mixtures of topics in proportions of their own."""

from __future__ import annotations

from typing import final

import pyro
import torch
from torch import Tensor, nn

from ppvae.likelihoods import Multinomial
from ppvae.models.composed import Composed, checked_counts


@final
class TopicModel(Composed):
    """p(x | N) = int p(theta) Multinomial(x; N, softmax(topics(theta))) dtheta with guide q(theta | x).

    Data are counts of words x [batch, words]; N is a document's own length, on which all is conditioned: log p(x) means
    log p(x | N), of the bag, with the multinomial coefficient. `evaluation.perplexity` takes the coefficient out. Sites
    "theta" [topics] and "x" [words].

    Args:
        prior: p(theta) over proportions: `priors.Dirichlet` (LDA) or `priors.LogisticNormal`.
        topics: a network of proportions [..., topics] that gives logits of words [..., words]: `nn.Topics`, of which a
            document is a mixture, or `torch.nn.Linear`, which makes it a product of experts (ProdLDA).
        posterior: q(theta | x): `posteriors.LogisticNormal` or `Dirichlet`.

    Raises DataError, by its row, for a document without words and for what is no count.
    Source: Blei et al. 2003, Latent Dirichlet allocation; Srivastava and Sutton 2017 (arXiv 1703.01488).

    >>> from ppvae import nn, posteriors, priors
    >>> pair = TopicModel(
    ...     prior=priors.LogisticNormal.like_dirichlet(5, 0.1),
    ...     topics=nn.Topics(5, 100),
    ...     posterior=posteriors.LogisticNormal(torch.nn.Sequential(nn.Log1p(), nn.mlp(100, 2 * 5))),
    ... )
    >>> pair.guide(torch.ones(4, 100)).shape, pair.words.shape
    (torch.Size([4, 5]), torch.Size([5, 100]))
    """

    def __init__(self, prior: nn.Module, topics: nn.Module, posterior: nn.Module):
        super().__init__("topic_model")
        self.prior, self.likelihood, self.posterior = prior, Multinomial(topics), posterior

    def model(self, x: Tensor) -> Tensor:
        """p(theta, x | N)."""
        length = checked_counts(x).sum(-1)
        with pyro.plate("data", len(x)):
            theta = pyro.sample("theta", self._call("prior"))
            return pyro.sample("x", self._call("likelihood", theta, context=length), obs=x)

    def guide(self, x: Tensor) -> Tensor:
        """q(theta | x)."""
        counts = checked_counts(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("theta", self._call("posterior", counts))

    @property
    def words(self) -> Tensor:
        """p(word | topic), [topics, words]: what a document of one topic alone is made of."""
        with torch.no_grad():
            theta = self.prior().sample()
            return self.likelihood.net(torch.eye(len(theta)).to(theta)).softmax(-1)
