"""Metrics of topic models: perplexity of held-out documents, and coherence of the topics' top words."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ppvae.errors import UsageError
from ppvae.errors.ranges import check_numbers


def perplexity(log_px: Tensor, x: Tensor) -> float:
    """Perplexity per word of documents, exp(-sum_d log p(words of d in their order) / sum_d N_d).

    log p of the words in their order is log p(x | N) of the bag less the logarithm of its number of orders, the
    multinomial coefficient N! / prod_w x_w!, which is taken out here: the uniform model has perplexity V whatever the
    documents. Estimates of log p(x) are below it on average, and so this is above the model's perplexity on average.

    Args:
        log_px: log p(x | N) of each document, [N] nats, with the coefficient: `est.log_px` of `models.TopicModel` or of
            any pair on `likelihoods.Multinomial`.
        x: counts of words, [N, V].

    Raises UsageError for other numbers of documents, or no words.
    Source: Blei et al. 2003, Latent Dirichlet allocation, section 7.1.

    >>> round(perplexity(torch.tensor([3 / 4]).log(), torch.tensor([[2.0, 1.0]])), 4)  # p = 1/4 in each of three orders
    1.5874
    """
    if x.dim() != 2 or log_px.shape != x.shape[:1]:
        raise UsageError(f"perplexity: expected log_px [N] and x [N, V], found {list(log_px.shape)}, {list(x.shape)}")
    x, log_px = x.detach().as_subclass(Tensor).double(), log_px.detach().double().to(x.device)
    if not float(x.sum()) > 0:
        raise UsageError("perplexity: expected documents with words, found none")
    log_orders = torch.lgamma(x.sum(-1) + 1) - torch.lgamma(x + 1).sum(-1)
    return math.exp(-float((log_px - log_orders).sum()) / float(x.sum()))


def coherence(topics: Tensor, x: Tensor, top: int = 10) -> Tensor:
    """Coherence of each topic, the NPMI of its top words averaged over pairs, between -1 and 1; float64 [topics].

    NPMI(a, b) = log(p(a, b) / (p(a) p(b))) / -log p(a, b), where p is the share of the documents that have a word, or
    both; -1 for words that never occur together, 1 for words that are in all documents (its limit).

    Args:
        topics: weights of words, [topics, V]: `TopicModel.words`.
        x: counts of the documents that words are looked for in, [N, V]: held out, or of another corpus.
        top: the number of words of largest weight per topic.

    Raises UsageError for other numbers of words, and unless 2 <= top <= V.
    Source: Bouma 2009, Normalized (pointwise) mutual information in collocation extraction; Lau et al. 2014, Machine
    reading tea leaves.

    >>> x = torch.tensor([[3.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 2.0], [0.0, 0.0, 1.0]])
    >>> coherence(torch.tensor([[0.5, 0.4, 0.1], [0.5, 0.1, 0.4]]), x, top=2)
    tensor([ 1., -1.], dtype=torch.float64)
    """
    if topics.dim() != 2 or x.dim() != 2 or topics.shape[1] != x.shape[1]:
        raise UsageError(
            f"coherence: expected topics [topics, V] and x [N, V], found {list(topics.shape)} and {list(x.shape)}"
        )
    check_numbers(top=top)
    if not 2 <= top <= x.shape[1]:
        raise UsageError(f"top: expected 2 to {x.shape[1]} words, found {top}")
    words = topics.detach().topk(top, -1).indices.cpu()
    present = (x.detach().as_subclass(Tensor).cpu() > 0).double()
    joint = present.T @ present / len(x)
    marginal = joint.diagonal()
    npmi = torch.log(joint / (marginal[:, None] * marginal)) / -joint.log()
    npmi = torch.where(joint == 0, -1.0, torch.where(joint == 1, 1.0, npmi))
    a, b = torch.triu_indices(top, top, 1)
    return npmi[words[:, a], words[:, b]].mean(-1)
