"""Posteriors over discrete latents, enumerated or sampled, and their relaxed counterparts."""

from typing import final

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae import distributions
from ppvae.distributions.constraints import positive
from ppvae.errors import UsageError
from ppvae.errors.ranges import check_numbers
from ppvae.posteriors.amortized import Amortized
from ppvae.priors.concrete import BinaryConcrete, Concrete
from ppvae.priors.discrete_vectors import DiscreteVector, OneHotVector


@final
class Bernoulli(Amortized):
    """Independent binary variables, q(z | x) = prod_d Bernoulli(z_d; sigmoid(net(x)_d)).

    Up to 16 variables, `pyro.infer.config_enumerate(vae.guide)` sums z out exactly, in `TraceEnum_ELBO`, `terms` and
    `log_marginal`; without it z is sampled, and `Trace_ELBO` uses the score function.
    `net` maps data [..., *event] to logits [..., latent]. Returns batch shape [...], event shape [latent].
    Source: Mnih and Gregor 2014 (arXiv 1402.0030).

    >>> from ppvae.nn import mlp
    >>> Bernoulli(mlp(64, 8))(torch.zeros(5, 64)).enumerate_support().shape
    torch.Size([256, 5, 8])
    """

    @staticmethod
    def outputs(latent: int) -> int:
        check_numbers(latent=latent)
        return latent

    def head(self, outputs: Tensor) -> dist.TorchDistribution:
        return DiscreteVector(distributions.Bernoulli(logits=outputs), 1)


@final
class Categorical(Amortized):
    """Independent variables with several classes, q(z | x) = prod_v softmax(net(x)_v)_(z_v), as integers.

    Enumerated or sampled, as `Bernoulli`; its prior is `priors.Categorical` or `priors.AutoregressiveCategorical`.

    Args:
        net: maps data [..., *event] to logits [..., variables * classes], variable by variable.
        classes: values of each variable.

    Returns batch shape [...], event shape [variables]. Raises ValueError for outputs that are no multiple of classes.
    Source: Jang et al. 2017 (arXiv 1611.01144).

    >>> from ppvae.nn import mlp
    >>> Categorical(mlp(64, 2 * 3), classes=3)(torch.zeros(5, 64)).enumerate_support().shape
    torch.Size([9, 5, 2])
    """

    def __init__(self, net: nn.Module, classes: int):
        check_numbers(classes=classes)
        super().__init__(net)
        self.classes = classes

    def outputs(self, latent: int) -> int:
        check_numbers(latent=latent)
        return latent * self.classes

    def head(self, outputs: Tensor) -> dist.TorchDistribution:
        return DiscreteVector(dist.Categorical(logits=_split_variables(outputs, self.classes)), 1)


@final
class OneHot(Amortized):
    """`Categorical` with classes as one-hot vectors, concatenated, so that a network can take z.

    Args:
        net: maps data [..., *event] to logits [..., variables * classes], variable by variable.
        classes: values of each variable.

    Returns batch shape [...], event shape [variables * classes]. Raises ValueError as `Categorical` does.
    Source: Jang et al. 2017 (arXiv 1611.01144).

    >>> from ppvae.nn import mlp
    >>> OneHot(mlp(64, 2 * 3), classes=3)(torch.zeros(5, 64)).shape()
    torch.Size([5, 6])
    """

    def __init__(self, net: nn.Module, classes: int):
        check_numbers(classes=classes)
        super().__init__(net)
        self.classes = classes

    def outputs(self, latent: int) -> int:
        check_numbers(latent=latent)
        if latent % self.classes:
            raise UsageError(f"classes: expected a divisor of the latent's size {latent}, found {self.classes}")
        return latent

    def head(self, outputs: Tensor) -> dist.TorchDistribution:
        base = DiscreteVector(dist.Categorical(logits=_split_variables(outputs, self.classes)), 1)
        return OneHotVector(base, self.classes, outputs.dtype)


@final
class RelaxedBernoulli(Amortized):
    """Relaxed binary variables on (0, 1), z_d = sigmoid((net(x)_d + Logistic(0, 1)) / temperature): reparameterised.

    A continuous density, so that its prior must be relaxed too (`priors.RelaxedBernoulli`); with a discrete prior the
    pair is refused. Train the relaxed pair and evaluate the discrete one on the same networks:

        vae = VAE(priors.RelaxedBernoulli(8), likelihood, posteriors.RelaxedBernoulli(net))
        fit(vae.model, vae.guide, train, epochs=50)
        binary = VAE(vae.prior.discrete, vae.likelihood, vae.posterior.discrete)
        log_marginal(binary.model, binary.guide, test)

    Their values of log p(x) belong to two models. `temperature` is a buffer; anneal it in training by
    `posterior.temperature.fill_(0.4)`. At much lower ones, 1 - z of a draw is inexact in float32.

    Args:
        net: maps data [..., *event] to logits [..., latent].
        temperature: of the posterior.

    Returns batch shape [...], event shape [latent]. Raises ValueError for a temperature that is not positive.
    Source: Maddison et al. 2017 (arXiv 1611.00712); Jang et al. 2017 (arXiv 1611.01144).

    >>> from ppvae.nn import mlp
    >>> posterior = RelaxedBernoulli(mlp(64, 8))
    >>> posterior(torch.zeros(5, 64)).shape(), posterior.discrete.net is posterior.net
    (torch.Size([5, 8]), True)
    """

    def __init__(self, net: nn.Module, temperature: float = 2 / 3):
        check_numbers(temperature=temperature)
        super().__init__(net)
        self.temperature = nn.Buffer(torch.tensor(positive("temperature", temperature)))

    @property
    def discrete(self) -> Bernoulli:
        """The discrete posterior with the same network."""
        return Bernoulli(self.net)

    @staticmethod
    def outputs(latent: int) -> int:
        check_numbers(latent=latent)
        return latent

    def head(self, outputs: Tensor) -> dist.TorchDistribution:
        return BinaryConcrete(self.temperature, outputs).to_event(1)


@final
class RelaxedOneHot(Amortized):
    """Relaxed one-hot vectors, concatenated, each z_v = softmax((net(x)_v + Gumbel) / temperature): reparameterised.

    A density on simplices, so that its prior must be relaxed too (`priors.RelaxedOneHot`); with a discrete prior the
    pair is refused. Train the relaxed pair and evaluate the discrete one on the same networks, as `RelaxedBernoulli`
    shows: `VAE(vae.prior.discrete, vae.likelihood, vae.posterior.discrete)`.

    Args:
        net: maps data [..., *event] to logits [..., variables * classes], variable by variable.
        classes: values of each variable.
        temperature: of the posterior.

    Returns batch shape [...], event shape [variables * classes].
    Raises ValueError for a temperature that is not positive, or outputs that are no multiple of classes.
    Source: Maddison et al. 2017 (arXiv 1611.00712); Jang et al. 2017 (arXiv 1611.01144).

    >>> from ppvae.nn import mlp
    >>> RelaxedOneHot(mlp(64, 2 * 3), classes=3)(torch.zeros(5, 64)).shape()
    torch.Size([5, 6])
    """

    def __init__(self, net: nn.Module, classes: int, temperature: float = 2 / 3):
        check_numbers(classes=classes, temperature=temperature)
        super().__init__(net)
        self.classes = classes
        self.temperature = nn.Buffer(torch.tensor(positive("temperature", temperature)))

    @property
    def discrete(self) -> OneHot:
        """The discrete posterior with the same network."""
        return OneHot(self.net, self.classes)

    def outputs(self, latent: int) -> int:
        check_numbers(latent=latent)
        return self.discrete.outputs(latent)

    def head(self, outputs: Tensor) -> dist.TorchDistribution:
        return Concrete(self.temperature, _split_variables(outputs, self.classes))


def _split_variables(outputs: Tensor, classes: int) -> Tensor:
    if outputs.shape[-1] % classes:
        raise ValueError(f"net: expected variables * {classes} outputs, found {outputs.shape[-1]}")
    return outputs.unflatten(-1, (-1, classes))
