"""Gaussian-process priors over the latents of a sequence, and their kernels."""

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, final

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from ppvae.distributions.batch_shape import ParametricDistribution
from ppvae.distributions.constraints import positive
from ppvae.errors.ranges import check_numbers


def rbf(r: Tensor) -> Tensor:
    """Squared exponential, exp(-r^2 / 2), of distances in lengthscales."""
    return torch.exp(-(r**2) / 2)


def matern12(r: Tensor) -> Tensor:
    """Ornstein-Uhlenbeck, exp(-r): continuous, rough, Markov in time."""
    return torch.exp(-r)


def matern32(r: Tensor) -> Tensor:
    """Matern with nu = 3/2, (1 + sqrt(3) r) exp(-sqrt(3) r): once differentiable."""
    return (1 + math.sqrt(3) * r) * torch.exp(-math.sqrt(3) * r)


def cauchy(r: Tensor) -> Tensor:
    """Rational quadratic with alpha = 1, 1 / (1 + r^2): a mixture of lengthscales (Fortuin et al. 2020)."""
    return 1 / (1 + r**2)


@final
class GaussianProcessVector(ParametricDistribution):
    """Independent Gaussian vectors over T positions, one for each latent dim, interleaved: z [T * latent], time first.

    log p(z) = sum_l log N(z_l; loc_l, L_l L_l^T), L = `scale_tril` [..., latent, T, T], computed in float64; `loc` is
    [..., latent, T], and 0 where None.

    >>> GaussianProcessVector(torch.eye(4).expand(2, 4, 4), torch.float32).shape()
    torch.Size([8])
    """

    support = constraints.real_vector
    has_rsample = True
    parameter_dims: ClassVar[dict[str, int]] = {"scale_tril": 3, "loc": 2}

    def __init__(
        self, scale_tril: Tensor, dtype: torch.dtype, loc: Tensor | None = None, validate_args: bool | None = None
    ):
        self.scale_tril, self.dtype = scale_tril.double(), dtype
        self.loc = self.scale_tril.new_zeros(scale_tril.shape[:-1]) if loc is None else loc.double()
        event = torch.Size([scale_tril.shape[-3:-1].numel()])
        super().__init__(scale_tril.shape[:-3], event, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """The mean of each position and dim, [..., T * latent]."""
        return self.loc.mT.flatten(-2).to(self.dtype)

    @property
    def mode(self) -> Tensor:
        return self.mean

    def _log_prob(self, value: Tensor) -> Tensor:
        z = value.double().unflatten(-1, self.scale_tril.shape[-2:-4:-1]).mT - self.loc
        lead = torch.broadcast_shapes(z.shape[:-2], self.batch_shape)
        z = z.expand(lead + z.shape[-2:]).unsqueeze(-1)
        noise = torch.linalg.solve_triangular(self.scale_tril, z, upper=False).squeeze(-1)
        log_det = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum((-1, -2))
        constant = value.shape[-1] * math.log(2 * math.pi) / 2
        return (-(noise**2).sum((-1, -2)) / 2 - log_det - constant).to(self.dtype)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.scale_tril.shape[:-1]
        noise = torch.randn(shape, dtype=torch.float64, device=self.scale_tril.device)
        z = self.loc + (self.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
        return z.mT.flatten(-2).to(self.dtype)


def cholesky_or_nan(covariance: Tensor) -> Tensor:
    """The Cholesky factor of a covariance [..., T, T], or NaN where there is none: no value is read on the host.

    >>> cholesky_or_nan(torch.tensor([[[4.0]], [[-1.0]]])).flatten().tolist()
    [2.0, nan]
    """
    factor, info = torch.linalg.cholesky_ex(covariance)
    return torch.where((info == 0)[..., None, None], factor, torch.nan)


@final
class GaussianProcess(nn.Module):
    """Latent dims that are independent Gaussian processes over the positions (times) of a sequence.

    A datum is a sequence: x [batch, ...] are its observations, the batch's second tensor its positions, [batch, T]
    numbers or [batch, T, axes] points, and z is [T * latent], time first: `z.unflatten(-1, (T, latent))`. Sequences are
    independent, so that each has its own weight and log p(x).

    Cov(z_tl, z_t'l) = kernel(|s_t - s_t'| / lengthscale_l) + jitter [t = t'], in nats log N(z_l; 0, K_l) for each dim,
    exactly, by Cholesky decompositions in float64: latent of them for a batch that shares its positions, batch * latent
    otherwise, each T^3. The jitter is white noise, a part of the prior, which keeps the covariance of near positions
    positive definite. Training steps are compiled where the shape shows that positions are shared: [1, T], or one
    expanded row, `times.expand(N, T)`, which `fit` preserves.

    Args:
        latent: the number of dims at each position.
        lengthscale: the initial value of the learned lengthscales, one for each dim, in the unit of the positions.
        kernel: a function of distances in lengthscales that is one at zero: `rbf`, `matern12`, `matern32`, `cauchy`.
        jitter: the variance of the white noise.

    `forward(context=positions)` returns batch shape [batch], or [] where all sequences share their positions, and event
    shape [T * latent]. Raises ValueError for a lengthscale or jitter that is not positive.
    Source: Casale et al. 2018 (arXiv 1810.11738); Fortuin et al. 2020, GP-VAE (arXiv 1907.04155).

    >>> times = torch.linspace(0, 1, 10).expand(5, 10)
    >>> GaussianProcess(2, lengthscale=0.2)(context=times).expand([5]).shape()
    torch.Size([5, 20])
    """

    def __init__(
        self,
        latent: int,
        lengthscale: float = 1.0,
        kernel: Callable[[Tensor], Tensor] = rbf,
        jitter: float = 1e-4,
    ):
        check_numbers(latent=latent, jitter=jitter, lengthscale=lengthscale)
        super().__init__()
        self.log_lengthscale = nn.Parameter(torch.full((latent,), math.log(positive("lengthscale", lengthscale))))
        self.kernel, self.jitter = kernel, positive("jitter", jitter)

    def forward(self, *, context: Tensor) -> dist.TorchDistribution:
        shared = len(context) == 1 or context.stride(0) == 0 or bool((context == context[:1]).all())
        places = (context[0] if shared else context).double()
        if context.dim() == 2:
            places = places.unsqueeze(-1)
        distances = torch.linalg.vector_norm(places.unsqueeze(-2) - places.unsqueeze(-3), dim=-1)
        scaled = distances.unsqueeze(-3) * (-self.log_lengthscale.double()).exp()[:, None, None]
        noise = self.jitter * torch.eye(places.shape[-2], dtype=scaled.dtype, device=scaled.device)
        return GaussianProcessVector(cholesky_or_nan(self.kernel(scaled) + noise), self.log_lengthscale.dtype)
