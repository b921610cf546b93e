"""Priors over proportions (the simplex), for topic models: Dirichlet and logistic-normal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, final

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions import biject_to, transforms

from ppvae.distributions.batch_shape import ParametricDistribution
from ppvae.distributions.constraints import positive
from ppvae.errors.ranges import check_numbers


class SimplexBlocksConstraint(constraints.Constraint):
    """Concatenated simplices of the same size; `size` None is a single simplex of any size.

    torch's simplex requires a sum within 1e-6 of one, which rounding in float32 can violate: such a draw would have no
    density. Here the tolerance scales with the size and the precision of the dtype.
    """

    is_discrete = False
    event_dim = 1

    def __init__(self, size: int | None = None):
        if size is not None:
            self.size = size
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        blocks = value.unflatten(-1, (-1, getattr(self, "size", value.shape[-1])))
        near = 10 * torch.finfo(value.dtype).eps * math.sqrt(blocks.shape[-1])
        return ((blocks >= 0).all(-1) & ((blocks.sum(-1) - 1).abs() <= near)).all(-1)

    def __repr__(self) -> str:
        return "Simplex"


simplex = SimplexBlocksConstraint()


@biject_to.register(SimplexBlocksConstraint)
def _biject_to_simplex(support: SimplexBlocksConstraint) -> transforms.Transform:
    """The stick-breaking transform of torch's simplex, for quadrature and annealing; for a single simplex only."""
    if hasattr(support, "size"):
        raise NotImplementedError
    return transforms.StickBreakingTransform()


@final
class DirichletDistribution(dist.Dirichlet):
    """Pyro's Dirichlet with a support that tolerates rounding, and draws without zeros."""

    support = simplex

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        value = super().rsample(sample_shape)
        return value.clamp(min=torch.finfo(value.dtype).tiny)


@final
class LogisticNormalDistribution(ParametricDistribution):
    """z = softmax(y), y ~ N(loc, diag(scale)^2), a density on the simplex of as many elements as y has.

    With w = 1 / scale^2, W = sum w, a = log z - loc and m = sum w a / W (softmax is invariant to a shift of y, over
    which the density integrates),
    log p(z) = -sum w (a - m)^2 / 2 - sum log(sqrt(2 pi) scale) + log(2 pi / W) / 2 - sum log z,
    with respect to all elements but one. Aitchison and Shen 1980, Logistic-normal distributions.
    Elements of a draw are at least the smallest normal number of the dtype.

    >>> LogisticNormalDistribution(torch.zeros(3), torch.ones(3)).rsample().sum() - 1 < 1e-6
    tensor(True)
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
    }
    support = simplex
    has_rsample = True
    parameter_dims: ClassVar[dict[str, int]] = {"loc": 1, "scale": 1}

    def __init__(self, loc: Tensor, scale: Tensor, validate_args: bool | None = None):
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        super().__init__(self.loc.shape[:-1], self.loc.shape[-1:], validate_args=validate_args)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        value = (self.loc + self.scale * noise).softmax(-1)
        return value.clamp(min=torch.finfo(value.dtype).tiny)

    def _log_prob(self, value: Tensor) -> Tensor:
        log_z = value.clamp(min=torch.finfo(value.dtype).tiny).log()
        log_w = -2 * self.scale.log()
        log_total = log_w.logsumexp(-1, keepdim=True)
        a = log_z - self.loc
        a = a - ((log_w - log_total).exp() * a).sum(-1, keepdim=True)
        terms = -((a / self.scale) ** 2) / 2 - self.scale.log() - math.log(2 * math.pi) / 2 - log_z
        return terms.sum(-1) + (math.log(2 * math.pi) - log_total.squeeze(-1)) / 2


@final
class Dirichlet(nn.Module):
    """A Dirichlet prior over proportions, log p(z) = sum_k (a_k - 1) log z_k + lgamma(sum a) - sum lgamma(a_k).

    Args:
        latent: the number of proportions (topics).
        concentration: the initial a of every element; below one, proportions are sparse.
        learned: whether the log-concentrations are trained.

    Returns batch shape [], event shape [latent]. Raises ValueError for a concentration that is not positive.
    Source: Blei et al. 2003, Latent Dirichlet allocation; in a VAE, Joo et al. 2019 (arXiv 1901.02739).

    >>> Dirichlet(3, concentration=1.0)().log_prob(torch.ones(3) / 3)
    tensor(0.6931)
    """

    log_concentration: Tensor

    def __init__(self, latent: int, concentration: float = 1.0, learned: bool = False):
        check_numbers(latent=latent, concentration=concentration)
        super().__init__()
        start = torch.full((latent,), math.log(positive("concentration", concentration)))
        register_value(self, "log_concentration", start, learned)

    def forward(self) -> dist.TorchDistribution:
        return DirichletDistribution(self.log_concentration.exp())


@final
class LogisticNormal(nn.Module):
    """A logistic-normal prior over proportions, z = softmax(y), y ~ N(loc, diag(exp(log_scale))^2).

    The density on the simplex is that of `LogisticNormalDistribution`. Location and log-scale are learned and start at
    zero; `LogisticNormal.like_dirichlet` approximates a symmetric Dirichlet, fixed by default.

    Args:
        latent: the number of proportions (topics).
        learned: whether location and log-scale are trained.

    Returns batch shape [], event shape [latent].
    Source: Blei and Lafferty 2007, A correlated topic model; Srivastava and Sutton 2017 (arXiv 1703.01488).

    >>> LogisticNormal(3)().shape(), LogisticNormal.like_dirichlet(3, 0.5).log_scale.exp()
    (torch.Size([3]), tensor([1.1547, 1.1547, 1.1547]))
    """

    loc: Tensor
    log_scale: Tensor

    def __init__(self, latent: int, learned: bool = True):
        check_numbers(latent=latent)
        super().__init__()
        for name in ("loc", "log_scale"):
            register_value(self, name, torch.zeros(latent), learned, persistent=True)

    @classmethod
    def like_dirichlet(cls, latent: int, concentration: float, learned: bool = False) -> LogisticNormal:
        """Laplace's approximation of Dirichlet(concentration) in the softmax basis (arXiv 1703.01488).

        loc = 0 and scale^2 = (1 - 1 / latent) / concentration, by symmetry. Raises ValueError as `Dirichlet` does.
        """
        check_numbers(latent=latent, concentration=concentration)
        log_scale = math.log((1 - 1 / latent) / positive("concentration", concentration)) / 2
        prior = cls(latent, learned)
        with torch.no_grad():
            prior.log_scale.fill_(log_scale)
        return prior

    def forward(self) -> dist.TorchDistribution:
        return LogisticNormalDistribution(self.loc, self.log_scale.exp())


def register_value(module: nn.Module, name: str, value: Tensor, learned: bool, persistent: bool = False) -> None:
    """Registers a value of a module, as a parameter where it is learned, else as a buffer."""
    if learned:
        module.register_parameter(name, nn.Parameter(value))
    else:
        module.register_buffer(name, value, persistent=persistent)
