"""Priors with independent real dims: standard, learned and conditional normal, Laplace, Student's t."""

from __future__ import annotations

from typing import final

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae import distributions
from ppvae.distributions.constraints import positive
from ppvae.errors.ranges import check_numbers


@final
class StandardNormal(nn.Module):
    """The standard normal prior over a vector, log p(z) = -|z|^2 / 2 - (latent / 2) log(2 pi).

    Returns a distribution of batch shape [] and event shape [latent].
    Source: Kingma and Welling 2014 (arXiv 1312.6114).

    >>> StandardNormal(2)().log_prob(torch.zeros(2))
    tensor(-1.8379)
    """

    def __init__(self, latent: int):
        check_numbers(latent=latent)
        super().__init__()
        self.loc = nn.Buffer(torch.zeros(latent), persistent=False)

    def forward(self) -> dist.TorchDistribution:
        return dist.Normal(self.loc, torch.ones_like(self.loc)).to_event(1)


@final
class Normal(nn.Module):
    """A normal prior whose location and scale are learned, log p(z) = sum_d log N(z_d; loc_d, exp(log_scale_d)).

    Both start at zero, which is the standard normal. Returns batch shape [], event shape [latent].
    Source: Kingma and Welling 2014 (arXiv 1312.6114), with the prior's parameters in the objective.

    >>> Normal(2)().log_prob(torch.zeros(2)).item() == StandardNormal(2)().log_prob(torch.zeros(2)).item()
    True
    """

    def __init__(self, latent: int):
        check_numbers(latent=latent)
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(latent))
        self.log_scale = nn.Parameter(torch.zeros(latent))

    def forward(self) -> dist.TorchDistribution:
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(1)


@final
class ConditionalNormal(nn.Module):
    """A normal prior given the batch's second tensor, log p(z | c) = sum_d log N(z_d; loc_d(c), exp(log_scale_d(c))).

    Args:
        net: maps the context [..., *] to [..., 2 * latent], location and log-scale in this order: an embedding of
            labels [...] (see `of_labels`), or a network of attributes [..., attributes].

    `forward(context=...)` returns the context's batch shape [...] and event shape [latent].
    Source: Sohn et al. 2015, Learning structured output representation using deep conditional generative models.

    >>> prior = ConditionalNormal.of_labels(10, latent=2)
    >>> prior(context=torch.tensor([3, 1, 4])).shape()
    torch.Size([3, 2])
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    @classmethod
    def of_labels(cls, num_labels: int, latent: int) -> ConditionalNormal:
        """One normal for each label 0 .. num_labels - 1: locations start at standard normal draws, scales at one."""
        check_numbers(num_labels=num_labels, latent=latent)
        table = nn.Embedding(num_labels, 2 * latent)
        nn.init.zeros_(table.weight[:, latent:].detach())
        return cls(table)

    def forward(self, *, context: Tensor) -> dist.TorchDistribution:
        loc, log_scale = self.net(context).chunk(2, dim=-1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)


@final
class Laplace(nn.Module):
    """Independent Laplace dims around zero, log p(z) = -sum_d (|z_d| / scale + log(2 scale)).

    Args:
        latent: the size of z.
        scale: of every dim; its standard deviation is sqrt(2) scale.

    Returns batch shape [], event shape [latent]. Raises ValueError for a scale that is not positive.
    Source: Barello et al. 2018, Sparse-coding variational auto-encoders (bioRxiv 399246).

    >>> Laplace(2)().log_prob(torch.zeros(2))
    tensor(-1.3863)
    """

    def __init__(self, latent: int, scale: float = 1.0):
        check_numbers(latent=latent, scale=scale)
        super().__init__()
        self.scale = nn.Buffer(torch.full((latent,), positive("scale", scale)), persistent=False)

    def forward(self) -> dist.TorchDistribution:
        return dist.Laplace(torch.zeros_like(self.scale), self.scale).to_event(1)


@final
class StudentT(nn.Module):
    """Independent Student-t dims around zero, p(z_d) proportional to (1 + z_d^2 / (df scale^2))^(-(df + 1) / 2).

    Args:
        latent: the size of z.
        df: degrees of freedom, the same for every dim: 1 is Cauchy, and as it grows the prior becomes normal.
        scale: of every dim.

    Returns batch shape [], event shape [latent]. Raises ValueError for df or a scale that is not positive.
    Source: Abiri and Ohlsson 2019, Variational auto-encoders with Student's t-prior (arXiv 2004.02581).

    >>> StudentT(1, df=1.0)().log_prob(torch.zeros(1)).exp()
    tensor(0.3183)
    """

    def __init__(self, latent: int, df: float = 5.0, scale: float = 1.0):
        check_numbers(latent=latent, df=df, scale=scale)
        super().__init__()
        self.df = nn.Buffer(torch.tensor(positive("df", df)), persistent=False)
        self.scale = nn.Buffer(torch.full((latent,), positive("scale", scale)), persistent=False)

    def forward(self) -> dist.TorchDistribution:
        return distributions.StudentT(self.df, torch.zeros_like(self.scale), self.scale).to_event(1)
