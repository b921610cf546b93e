"""Probabilistic PCA and factor analysis, with log p(x) and the posterior in closed form: a reference for tests."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae.errors import UsageError
from ppvae.errors.ranges import check_numbers, check_ranges
from ppvae.parameter_names import unique_name


class LinearGaussian(nn.Module):
    """z ~ N(0, I), x | z ~ N(weight z + loc, diag(scale^2)), with its exact posterior as guide.

    One scale for all features is probabilistic PCA, one for each is factor analysis.
    log p(x) = log N(x; loc, weight weight^T + diag(scale^2));
    p(z | x) = N(M^-1 weight^T diag(scale^-2) (x - loc), M^-1), M = I + weight^T diag(scale^-2) weight.
    `guide` is the exact posterior of the current parameters, `mean_field` the best guide with independent dims.

    Args:
        features: the size of x.
        latent: the size of z.
        scale: the initial noise scale: a number, or [features] for factor analysis.

    Raises ValueError for scales of another shape.
    Source: Tipping and Bishop 1999, Probabilistic principal component analysis; Rubin and Thayer 1982, EM algorithms
    for ML factor analysis.

    >>> pair = LinearGaussian(3, 2)
    >>> pair.log_px(torch.zeros(4, 3)).shape, pair.posterior(torch.zeros(4, 3)).shape()
    (torch.Size([4]), torch.Size([4, 2]))
    >>> LinearGaussian(3, 2, scale=torch.ones(3)).log_scale.shape
    torch.Size([3])
    """

    def __init__(self, features: int, latent: int, scale: float | Tensor = 1.0):
        check_numbers(features=features, latent=latent)
        if isinstance(scale, Tensor):
            check_ranges(scale=scale)
        else:
            check_numbers(scale=scale)
        super().__init__()
        start = torch.as_tensor(scale, dtype=torch.get_default_dtype())
        if start.shape not in ((), (features,)):
            raise UsageError(f"scale: expected a number or [{features}], found {list(start.shape)}")
        self.weight = nn.Parameter(torch.randn(features, latent) / math.sqrt(latent))
        self.loc = nn.Parameter(torch.zeros(features))
        self.log_scale = nn.Parameter(start.log())
        self._name = unique_name("linear_gaussian")

    def model(self, x: Tensor) -> Tensor:
        """p(x, z)."""
        pyro.module(self._name, self)
        latent = self.weight.shape[1]
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.weight.new_zeros(latent), 1.0).to_event(1))
            mean = z @ self.weight.T + self.loc
            return pyro.sample("x", dist.Normal(mean, self.log_scale.exp()).to_event(1), obs=x)

    def guide(self, x: Tensor) -> Tensor:
        """The exact posterior p(z | x)."""
        pyro.module(self._name, self)
        with pyro.plate("data", len(x)):
            return pyro.sample("z", self.posterior(x))

    def mean_field(self, x: Tensor) -> Tensor:
        """The mean-field optimum of KL(q || p): the mean of p(z | x) and the diagonal of its precision."""
        pyro.module(self._name, self)
        exact = self.posterior(x)
        scale = exact.precision_matrix.diagonal(dim1=-2, dim2=-1).rsqrt()
        with pyro.plate("data", len(x)):
            return pyro.sample("z", dist.Normal(exact.loc, scale).to_event(1))

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        """p(z | x) in closed form, batch shape [batch], event shape [latent]."""
        weighed = self.weight.T * (-2 * self.log_scale).exp()
        m = weighed @ self.weight + torch.eye(self.weight.shape[1]).to(self.weight)
        loc = torch.linalg.solve(m, weighed @ (x - self.loc).T).T
        return dist.MultivariateNormal(loc, precision_matrix=m)

    def log_px(self, x: Tensor) -> Tensor:
        """log p(x) in closed form, [batch] nats."""
        variance = (2 * self.log_scale).exp().expand(len(self.loc))
        return dist.LowRankMultivariateNormal(self.loc, self.weight, variance).log_prob(x)

    @staticmethod
    def maximum_likelihood(x: Tensor, latent: int) -> LinearGaussian:
        """The maximum of the likelihood of probabilistic PCA in closed form, from data [N, features].

        scale^2 is the mean of the discarded eigenvalues of the covariance, and
        weight = U (L - scale^2 I)^(1/2) of the kept ones (Tipping and Bishop 1999, section 3.2).

        >>> x = torch.randn(100, 3)
        >>> best = LinearGaussian.maximum_likelihood(x, 1)
        >>> bool(best.log_px(x).mean() >= LinearGaussian(3, 1).log_px(x).mean())
        True
        """
        check_numbers(latent=latent)
        if not 0 < latent < x.shape[1]:
            raise UsageError(f"latent: expected 1 to {x.shape[1] - 1} for {x.shape[1]} features, found {latent}")
        loc = x.mean(0)
        values, vectors = torch.linalg.eigh((x - loc).T @ (x - loc) / len(x))
        values, vectors = values.flip(0), vectors.flip(1)
        variance = values[latent:].mean()
        pair = LinearGaussian(x.shape[1], latent).to(x)
        with torch.no_grad():
            pair.loc.copy_(loc)
            pair.weight.copy_(vectors[:, :latent] * (values[:latent] - variance).clamp(min=0).sqrt())
            pair.log_scale.copy_(variance.log() / 2)
        return pair
