"""The decoder of topic models: from topic proportions to word probabilities."""

import torch
from torch import Tensor, nn

from ppvae.errors.ranges import check_ranges


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
        check_ranges(topics=topics, words=words)
        super().__init__()
        self.logits = nn.Parameter(torch.randn(topics, words))

    def forward(self, theta: Tensor) -> Tensor:
        log_beta = self.logits.log_softmax(-1)
        best = log_beta.detach().amax(0).clamp(min=torch.finfo(log_beta.dtype).min)
        return (theta @ (log_beta - best).exp()).log() + best
