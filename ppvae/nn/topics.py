"""The decoder of topic models: from topic proportions to word probabilities."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ppvae.errors import UsageError
from ppvae.errors.ranges import check_numbers


class Topics(nn.Module):
    """A mixture of topics, each a distribution over words: proportions [..., topics] -> log p(word) [..., words].

    log p(w | theta) = log sum_k theta_k beta_kw, with beta_k = softmax(logits_k). The sum is scaled by the largest
    beta_kw over k, so that it is finite wherever that topic has a positive proportion. Logits start at standard normal
    draws.

    Args:
        topics: the number of topics.
        words: the size of the vocabulary.

    Source: Blei et al. 2003, Latent Dirichlet allocation. Without the mixture, softmax(theta @ logits), it is the
    product of experts of ProdLDA (Srivastava and Sutton 2017, arXiv 1703.01488): `torch.nn.Linear(topics, words)`.

    >>> Topics(2, 3)(torch.tensor([[0.5, 0.5], [1.0, 0.0]])).exp().sum(-1).detach().round(decimals=4)
    tensor([1., 1.])
    """

    def __init__(self, topics: int, words: int):
        check_numbers(topics=topics, words=words)
        super().__init__()
        self.logits = nn.Parameter(torch.randn(topics, words))

    @classmethod
    def from_data(cls, x: Tensor, topics: int, seed: int = 0) -> Topics:
        """Topics that start at 0.9 c_k + 0.1 f: c_k the k-means centres of documents' word frequencies, f their mean.

        Args:
            x: counts of words [N, words].
            topics: the number of topics.
            seed: of the k-means, of which scikit-learn takes the best of three.

        Raises ValueError where there are fewer documents than topics, or a document without words.

        >>> Topics.from_data(torch.tensor([[4.0, 0.0], [0.0, 4.0]]), 2).logits.softmax(-1).amax(-1).detach()
        tensor([0.9500, 0.9500])
        """
        from sklearn.cluster import KMeans

        check_numbers(topics=topics, seed=seed)
        if len(x) < topics:
            raise UsageError(f"topics: expected 1 to {len(x)}, as there are documents, found {topics}")
        if (empty := (x.sum(-1) == 0).nonzero()).numel():
            raise UsageError(f"x: expected documents with words, found none in row {int(empty[0])}; leave it out")
        frequencies = (x / x.sum(-1, keepdim=True)).cpu()
        centres = KMeans(topics, n_init=3, random_state=seed % 2**32).fit(frequencies.numpy()).cluster_centers_
        start = 0.9 * torch.from_numpy(centres).clamp(min=0) + 0.1 * frequencies.mean(0)
        made = cls(topics, x.shape[1])
        made.logits.data.copy_(start.clamp(min=1e-6).log())
        return made.to(x.device)

    def forward(self, theta: Tensor) -> Tensor:
        log_beta = self.logits.log_softmax(-1)
        best = log_beta.detach().amax(0).clamp(min=torch.finfo(log_beta.dtype).min)
        return (theta @ (log_beta - best).exp()).log() + best
