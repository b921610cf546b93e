"""Discrete priors, uniform or learned, and their relaxed counterparts (Concrete distributions)."""

from __future__ import annotations

from typing import final

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae import distributions
from ppvae.distributions.constraints import positive
from ppvae.errors.ranges import check_numbers
from ppvae.priors.concrete import BinaryConcrete, Concrete
from ppvae.priors.discrete_vectors import DiscreteVector, OneHotVector
from ppvae.priors.simplex import register_value


@final
class Bernoulli(nn.Module):
    """Independent binary variables, log p(z) = sum_d z_d l_d - softplus(l_d); initially 1/2 each.

    Args:
        latent: the number of variables.
        learned: whether the logits l are trained.

    Returns batch shape [], event shape [latent], values 0 and 1; enumerable up to 16 variables.
    Source: Mnih and Gregor 2014 (arXiv 1402.0030); Maddison et al. 2017 (arXiv 1611.00712), section 5.

    >>> Bernoulli(3)().log_prob(torch.tensor([0.0, 1.0, 1.0])).exp()
    tensor(0.1250)
    """

    logits: Tensor

    def __init__(self, latent: int, learned: bool = False):
        check_numbers(latent=latent)
        super().__init__()
        register_value(self, "logits", torch.zeros(latent), learned)

    def forward(self) -> dist.TorchDistribution:
        return DiscreteVector(distributions.Bernoulli(logits=self.logits), 1)

    def relaxed(self, temperature: float = 0.5) -> RelaxedBernoulli:
        """The relaxed prior with the same logits, whose `discrete` is this one."""
        new = RelaxedBernoulli(len(self.logits), temperature)
        new.discrete = self
        return new


@final
class Categorical(nn.Module):
    """Independent variables with several classes, log p(z) = sum_v log softmax(l_v)_(z_v); uniform at first.

    Values are integers 0 .. classes - 1, for a likelihood that embeds them; `OneHot` gives floating point.

    Args:
        classes: values of each variable.
        variables: the length of z.
        learned: whether the logits l are trained.

    Returns batch shape [], event shape [variables]; enumerable up to 65536 joint values.
    Source: van den Oord et al. 2017 (arXiv 1711.00937); Jang et al. 2017 (arXiv 1611.01144).

    >>> Categorical(4, variables=2)().log_prob(torch.tensor([0, 3])).exp()
    tensor(0.0625)
    """

    logits: Tensor

    def __init__(self, classes: int, variables: int = 1, learned: bool = False):
        check_numbers(classes=classes, variables=variables)
        super().__init__()
        register_value(self, "logits", torch.zeros(variables, classes), learned)

    def forward(self) -> dist.TorchDistribution:
        return DiscreteVector(dist.Categorical(logits=self.logits), 1)


@final
class OneHot(nn.Module):
    """`Categorical` with classes as one-hot vectors, concatenated, so that a network can take z.

    Args:
        classes: values of each variable.
        variables: the number of one-hot vectors in z.
        learned: whether the logits are trained.

    Returns batch shape [], event shape [variables * classes]; enumerable up to 65536 joint values.
    Source: Jang et al. 2017 (arXiv 1611.01144).

    >>> OneHot(4, variables=2)().shape()
    torch.Size([8])
    """

    logits: Tensor

    def __init__(self, classes: int, variables: int = 1, learned: bool = False):
        check_numbers(classes=classes, variables=variables)
        super().__init__()
        register_value(self, "logits", torch.zeros(variables, classes), learned)

    def forward(self) -> dist.TorchDistribution:
        base = DiscreteVector(dist.Categorical(logits=self.logits), 1)
        return OneHotVector(base, self.logits.shape[-1], self.logits.dtype)

    def relaxed(self, temperature: float = 0.5) -> RelaxedOneHot:
        """The relaxed prior with the same logits, whose `discrete` is this one."""
        new = RelaxedOneHot(self.logits.shape[1], len(self.logits), temperature)
        new.discrete = self
        return new


@final
class RelaxedBernoulli(nn.Module):
    """Independent relaxed binary variables on (0, 1), the prior for `posteriors.RelaxedBernoulli`.

    log p(z) = sum_d log BinaryConcrete(z_d; l_d, temperature). `discrete` is the Bernoulli prior with the same logits.

    Args:
        latent: the number of variables.
        temperature: of the prior; that of the posterior may differ.
        learned: whether the logits l are trained.

    Returns batch shape [], event shape [latent]. Raises ValueError for a temperature that is not positive.
    Source: Maddison et al. 2017 (arXiv 1611.00712), section 3.3: the objective relaxes the prior too.

    >>> RelaxedBernoulli(3)().shape(), type(RelaxedBernoulli(3).discrete).__name__
    (torch.Size([3]), 'Bernoulli')
    """

    def __init__(self, latent: int, temperature: float = 0.5, learned: bool = False):
        check_numbers(latent=latent, temperature=temperature)
        super().__init__()
        self.temperature = nn.Buffer(torch.tensor(positive("temperature", temperature)))
        self.discrete = Bernoulli(latent, learned)

    def forward(self) -> dist.TorchDistribution:
        return BinaryConcrete(self.temperature, self.discrete.logits).to_event(1)


@final
class RelaxedOneHot(nn.Module):
    """Independent relaxed one-hot vectors, concatenated, the prior for `posteriors.RelaxedOneHot`.

    log p(z) = sum_v log Concrete(z_v; l_v, temperature). `discrete` is the one-hot prior with the same logits.

    Args:
        classes: values of each variable.
        variables: the number of vectors in z.
        temperature: of the prior; that of the posterior may differ.
        learned: whether the logits l are trained.

    Returns batch shape [], event shape [variables * classes]. Raises ValueError for a temperature that is not positive.
    Source: Maddison et al. 2017 (arXiv 1611.00712), section 3.3: the objective relaxes the prior too.

    >>> RelaxedOneHot(4, variables=2)().shape(), type(RelaxedOneHot(4).discrete).__name__
    (torch.Size([8]), 'OneHot')
    """

    def __init__(self, classes: int, variables: int = 1, temperature: float = 0.5, learned: bool = False):
        check_numbers(classes=classes, variables=variables, temperature=temperature)
        super().__init__()
        self.temperature = nn.Buffer(torch.tensor(positive("temperature", temperature)))
        self.discrete = OneHot(classes, variables, learned)

    def forward(self) -> dist.TorchDistribution:
        return Concrete(self.temperature, self.discrete.logits)
