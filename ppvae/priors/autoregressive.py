"""Autoregressive priors, p(z) = prod_d p(z_d | z_<d), by a masked network: a density takes one pass."""

from collections.abc import Callable, Sequence
from typing import Any, final

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import constraints

from ppvae import distributions
from ppvae.errors.ranges import check_numbers, check_sequences
from ppvae.priors.discrete_vectors import MAX_JOINT_VALUES, OneHotVector, enumerated_values, joint_values
from ppvae.priors.flows import zuko


@final
class AutoregressiveClasses(distributions.Autoregressive):
    """An autoregressive distribution over vectors of classes, enumerable up to 65536 joint values.

    log p(z) = sum_v log p(z_v | z_<v), see `ppvae.distributions.Autoregressive`; `conditionals` maps classes
    [..., variables] to a factorised distribution over them, whose factor v depends on elements before v only.

    >>> def copying(z):
    ...     same = 50.0 * F.one_hot(F.pad(z, (1, -1)), 3)
    ...     return dist.Categorical(logits=same).to_event(1)
    >>> AutoregressiveClasses(copying, 2, 3).log_prob(torch.tensor([0, 0])).exp()
    tensor(1.)
    """

    def __init__(self, conditionals: Callable[[Tensor], Any], variables: int, classes: int, device: Any = None):
        check_numbers(variables=variables, classes=classes)
        self.classes = classes
        start = torch.zeros(variables, dtype=torch.long, device=device)
        support = constraints.independent(constraints.integer_interval(0, classes - 1), 1)
        super().__init__(conditionals, start, torch.arange(variables), support)

    @property
    def has_enumerate_support(self) -> bool:
        return self.classes ** self.event_shape.numel() <= MAX_JOINT_VALUES

    def enumerate_support(self, expand: bool = True) -> Tensor:
        values = torch.arange(self.classes, device=self.start.device)
        return enumerated_values(joint_values(values, self.event_shape.numel()), self.batch_shape, expand)


class _AutoregressiveMLP(nn.Module):
    """A masked MLP, [..., variables * width] -> [..., variables, outputs]; row d depends on elements before d only."""

    def __init__(self, variables: int, width: int, outputs: int, hidden: Sequence[int]):
        check_numbers(variables=variables, outputs=outputs)
        check_sequences(hidden=hidden)
        super().__init__()
        before = torch.ones(variables, variables).tril(-1).bool().repeat_interleave(width, 1)
        adjacency = torch.cat([torch.ones(variables, 1).bool(), before], 1)  # the first input is a constant one
        self.net = zuko.nn.MaskedMLP(adjacency.repeat_interleave(outputs, 0), hidden_features=hidden, activation=nn.ELU)
        self.variables = variables
        for p in self.net[-1].parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(F.pad(x, (1, 0), value=1.0)).unflatten(-1, (self.variables, -1))


@final
class Autoregressive(nn.Module):
    """A real autoregressive prior whose conditionals are mixtures of normals, by a masked network (MADE).

    log p(z) = sum_d logsumexp_c (log w_dc + log N(z_d; loc_dc, scale_dc)), with w, loc, scale functions of z_<d.
    With one component it starts as the standard normal. Log-scales are bounded to [-7, 7], as a network extrapolates
    without bounds far from the data.

    Args:
        latent: the size of z.
        components: the number of mixture components of each conditional.
        hidden: the widths of the masked network.

    Returns batch shape [], event shape [latent].
    Source: Germain et al. 2015 (arXiv 1502.03509); Uria et al. 2013 (arXiv 1306.0186) for mixtures.

    >>> Autoregressive(4)().log_prob(torch.zeros(5, 4)).shape
    torch.Size([5])
    """

    def __init__(self, latent: int, components: int = 5, hidden: Sequence[int] = (64, 64)):
        check_numbers(latent=latent, components=components)
        check_sequences(hidden=hidden)
        super().__init__()
        self.net = _AutoregressiveMLP(latent, 1, 3 * components, hidden)
        self.loc = nn.Parameter(torch.linspace(-1, 1, components) if components > 1 else torch.zeros(1))
        self.like = nn.Buffer(torch.zeros(latent), persistent=False)

    def forward(self) -> dist.TorchDistribution:
        def conditional(z: Tensor) -> Any:
            logits, loc, log_scale = self.net(z).chunk(3, -1)
            parts = dist.Normal(loc + self.loc, (7 * torch.tanh(log_scale / 7)).exp())
            return dist.MixtureSameFamily(dist.Categorical(logits=logits), parts).to_event(1)

        order = torch.arange(len(self.like))
        return distributions.Autoregressive(conditional, self.like, order, constraints.real_vector)


@final
class AutoregressiveCategorical(nn.Module):
    """An autoregressive prior over a vector of classes, by a masked network; it starts as the uniform distribution.

    log p(z) = sum_v log softmax(l_v(z_<v))_(z_v). Values are integers 0 .. classes - 1 (as `posteriors.Categorical`
    draws them), for a likelihood that embeds them.

    Args:
        classes: values of each variable.
        variables: the length of z.
        hidden: the widths of the masked network.

    Returns batch shape [], event shape [variables]; enumerable up to 65536 joint values.
    Source: Germain et al. 2015 (arXiv 1502.03509); as a prior, van den Oord et al. 2017 (arXiv 1711.00937).

    >>> AutoregressiveCategorical(3, variables=2)().log_prob(torch.tensor([0, 2])).exp()
    tensor(0.1111, grad_fn=<ExpBackward0>)
    """

    def __init__(self, classes: int, variables: int = 1, hidden: Sequence[int] = (64, 64)):
        check_numbers(classes=classes, variables=variables)
        check_sequences(hidden=hidden)
        super().__init__()
        self.classes, self.net = classes, _AutoregressiveMLP(variables, classes, classes, hidden)
        self.like = nn.Buffer(torch.zeros(variables), persistent=False)

    def forward(self) -> dist.TorchDistribution:
        def conditional(z: Tensor) -> Any:
            one_hot = F.one_hot(z, self.classes).to(self.like.dtype).flatten(-2)
            return dist.Categorical(logits=self.net(one_hot)).to_event(1)

        return AutoregressiveClasses(conditional, len(self.like), self.classes, self.like.device)


@final
class AutoregressiveOneHot(nn.Module):
    """`AutoregressiveCategorical` with each class written as a one-hot vector, end to end, as `OneHot` has them.

    Args:
        classes: values of each variable.
        variables: the number of one-hot vectors in z.
        hidden: the widths of the masked network.

    Returns batch shape [], event shape [variables * classes]; values in floating point, which a network takes.
    Source: Germain et al. 2015 (arXiv 1502.03509); Jang et al. 2017 (arXiv 1611.01144) for the one-hot vectors.

    >>> AutoregressiveOneHot(3, variables=2)().shape()
    torch.Size([6])
    """

    def __init__(self, classes: int, variables: int = 1, hidden: Sequence[int] = (64, 64)):
        check_numbers(classes=classes, variables=variables)
        check_sequences(hidden=hidden)
        super().__init__()
        self.classes, self.index = classes, AutoregressiveCategorical(classes, variables, hidden)

    def forward(self) -> dist.TorchDistribution:
        return OneHotVector(self.index(), self.classes, self.index.like.dtype)
