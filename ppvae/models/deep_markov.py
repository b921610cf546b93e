"""Deep Markov models of sequences of different lengths."""

from typing import Any, final

import pyro
import torch
from torch import Tensor, nn

from ppvae.distributions.markov_chain import MarkovChain
from ppvae.errors.ranges import check_numbers
from ppvae.models.composed_model import ComposedModel, LearnedTensor
from ppvae.nn.sequences import known_times, require_sequences


@final
class DeepMarkovModel(ComposedModel):
    """p(x, z) = prod_t p(z_t | z_(t-1)) p(x_t | z_t) with guide prod_t q(z_t | z_(t-1), h_t), h_t = encoder(x)_t.

    Data are (x [batch, T, *event], lengths [batch]), shorter sequences padded with zeros, or x alone. The padding is
    ignored: log p(x) is that of the steps of the sequence. Sites "z" [T, latent] and "x" [T, *event]; z_0 is learned,
    separately in the model and in the guide.

    Args:
        latent: the size of z_t.
        transition: p(z_t | z_(t-1)), a part such as `posteriors.DiagonalNormal`; a linear one gives the Kalman filter.
        emission: p(x_t | z_t), any likelihood.
        encoder: a network from x to h [batch, T, hidden] that takes lengths as `context`: `nn.Backward(GRU)`, in which
            h_t depends on x from t on.
        combiner: q(z_t | z_(t-1), h_t), a part of [..., latent + hidden].

    Raises DataError for a sequence of length 0, or one longer than T, by its row.
    Source: Krishnan et al. 2017 (arXiv 1609.09869).

    >>> from ppvae import likelihoods, nn, posteriors
    >>> pair = DeepMarkovModel(
    ...     latent=4,
    ...     transition=posteriors.DiagonalNormal(nn.mlp(4, 2 * 4)),
    ...     emission=likelihoods.Bernoulli(nn.mlp(4, 16)),
    ...     encoder=nn.Backward(torch.nn.GRU(16, 32, batch_first=True)),
    ...     combiner=posteriors.DiagonalNormal(nn.mlp(4 + 32, 2 * 4)),
    ... )
    >>> pair.guide(torch.zeros(5, 7, 16), torch.tensor([7, 3, 1, 2, 7])).shape
    torch.Size([5, 7, 4])
    """

    def __init__(
        self, latent: int, transition: nn.Module, emission: nn.Module, encoder: nn.Module, combiner: nn.Module
    ):
        check_numbers(latent=latent)
        super().__init__("deep_markov")
        self.transition, self.emission, self.encoder, self.combiner = transition, emission, encoder, combiner
        self.start, self.guide_start = LearnedTensor(torch.zeros(latent)), LearnedTensor(torch.zeros(latent))

    def model(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """p(x, z)."""
        known, transition = _observed_steps(x, lengths), self.register_part("transition")
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", MarkovChain(lambda z, at: transition(z), self.call_part("start"), known))
            fn = self.call_part("emission", z)
            return pyro.sample("x", fn.mask(known).to_event(1), obs=x)

    def guide(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """q(z | x)."""
        known, combiner = _observed_steps(x, lengths), self.register_part("combiner")
        h = self.call_part("encoder", x, context=lengths)

        def step(z: Tensor, at: Any) -> Any:
            features = h[:, at].expand(*z.shape[:-1], h.shape[-1])
            return combiner(torch.cat([z, features], -1))

        with pyro.plate("data", len(x)):
            return pyro.sample("z", MarkovChain(step, self.call_part("guide_start"), known))


def _observed_steps(x: Tensor, lengths: Tensor | None) -> Tensor:
    require_sequences(x)
    if lengths is None:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    return known_times(x.shape[1], lengths)
