"""A VAE of data given labels or features."""

from __future__ import annotations

from typing import final

from torch import nn

from ppvae.models.vae import VAE
from ppvae.nn import ConcatContext


@final
class ConditionalVAE(VAE):
    """p(x | c) = int p(z | c) p(x | z, c) dz with guide q(z | x, c), given c: labels, or features.

    Likelihood and posterior take c beside their input, as `nn.ConcatContext` puts it there; a prior that declares
    `context` gets c as it is. log p(x) means log p(x | c). Data are (x [batch, *event], c [batch, ...]).

    Args:
        prior: p(z | c), or p(z).
        likelihood: p(x | z, c), a part whose network takes [..., latent + features].
        posterior: q(z | x, c), a part whose network takes [..., event + features].
        of: maps c to features [..., features]: `nn.Labels(classes)`; by default c is features itself.
        event_dim: 1; for images [C, H, W] it is 3, and features are put beside the channels.

    Raises DataError for a label outside the classes; UsageError for data without a second tensor; ContractError for
    parts that do not fit together.
    Source: Sohn et al. 2015, Learning structured output representation using deep conditional generative models.

    >>> import torch
    >>> from ppvae import likelihoods, nn, posteriors, priors
    >>> vae = ConditionalVAE(
    ...     prior=priors.StandardNormal(8),
    ...     likelihood=likelihoods.Bernoulli(nn.mlp(8 + 10, 64)),
    ...     posterior=posteriors.DiagonalNormal(nn.mlp(64 + 10, 2 * 8)),
    ...     of=nn.Labels(10),
    ... )
    >>> vae.guide(torch.zeros(5, 64), torch.arange(5)).shape
    torch.Size([5, 8])
    """

    def __init__(
        self,
        prior: nn.Module,
        likelihood: nn.Module,
        posterior: nn.Module,
        of: nn.Module | None = None,
        event_dim: int = 1,
    ):
        super().__init__(prior, ConcatContext(likelihood, of), ConcatContext(posterior, of, event_dim))
