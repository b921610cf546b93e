"""Vector-quantised VAEs with a stochastic quantisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

from torch import nn

from ppvae import posteriors
from ppvae.models.vae import VAE
from ppvae.nn import Codebook, Nearness


@final
class QuantizedVAE(VAE):
    """p(x) = sum_k p(k) p(x | c_k1 .. c_kM), its guide prod_m q(k_m | x), q(k | x) ~ exp(-|e_m(x) - c_k|^2 / (2 s^2)).

    A VQ-VAE with stochastic quantisation: M codes of V values, distributed by distance to the encoder output. The
    nearest code of the original is the limit s -> 0, a point mass, which gives only a lower bound on log p(x) and needs
    a straight-through gradient. s and p(k) are learned jointly with the networks, and log p(x) includes p(k). Site "z":
    the codes as concatenated one-hot vectors, [M * V].

    `IWAE(10, gradient="vimco")` trains it; ELBO() on `pyro.infer.config_enumerate(vae.guide)` while there are few
    joint values (65536, all of which are summed out of log p(x), too); ELBO() where `posterior` is relaxed, and then
    `vae.discrete` is the pair to evaluate.

    Args:
        prior: p(k), `priors.AutoregressiveOneHot(V, M)`, or `priors.OneHot(V, M, learned=True)` for independent codes.
        likelihood: p(x | c_k1 .. c_kM), a part whose network takes [..., M * size].
        encoder: e(x), a network [..., *event] -> [..., M * size].
        codebook: c_1 .. c_V, `nn.Codebook(V, size)`, shared by encoder and decoder.
        scale: the initial s.
        posterior: `posteriors.OneHot`, or `posteriors.RelaxedOneHot`, for a prior that has a relaxed counterpart.

    Raises ContractError at the first data for parts that do not fit together, naming them.
    Source: van den Oord et al. 2017 (arXiv 1711.00937); Takida et al. 2022, SQ-VAE (arXiv 2205.07547).

    >>> import torch
    >>> from ppvae import likelihoods, nn, priors
    >>> vae = QuantizedVAE(
    ...     prior=priors.AutoregressiveOneHot(16, variables=4),
    ...     likelihood=likelihoods.Bernoulli(nn.mlp(4 * 8, 64)),
    ...     encoder=nn.mlp(64, 4 * 8),
    ...     codebook=nn.Codebook(16, size=8),
    ... )
    >>> vae.guide(torch.zeros(5, 64)).shape
    torch.Size([5, 64])
    """

    def __init__(
        self,
        prior: nn.Module,
        likelihood: nn.Module,
        encoder: nn.Module,
        codebook: Codebook,
        scale: float = 1.0,
        posterior: Callable[[nn.Module, int], nn.Module] = posteriors.OneHot,
    ):
        net = nn.Sequential(encoder, Nearness(codebook, scale))
        super().__init__(prior, nn.Sequential(codebook, likelihood), posterior(net, len(codebook.table)))
