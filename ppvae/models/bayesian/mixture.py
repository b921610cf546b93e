"""A mixture of normals with a posterior over its parameters."""

from __future__ import annotations

from typing import final

import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor, nn

from ppvae.errors.ranges import POSITIVE, check_numbers
from ppvae.models.bayesian.plate import NUM_DATA, data_plate
from ppvae.parameter_names import unique_name


@final
class BayesianGaussianMixture(nn.Module):
    """A mixture of diagonal normals whose weights, locations and precisions are global latents; clusters summed out.

    weights ~ Dirichlet(concentration), precision_cd ~ Gamma(shape, rate), loc_cd ~ N(0, 1 / (kappa precision_cd)),
    x_n ~ sum_c weights_c N(loc_c, 1 / precision_c). The priors are conjugate given the clusters and meant for
    standardised data; the guide has the same families, independent over clusters and dims: sites "weights" [clusters],
    "precision" and "loc" [clusters, features], "c" enumerated, "x" [features]. The posterior is the same under every
    permutation of the clusters and the guide covers one of them: where clusters are well apart, log p of all data by
    importance weights is too low by log(clusters!), which predictive densities and `loo` do not see.

    Args:
        size: the number of training data, of which a batch is a part.
        features: the size of x.
        components: the number of clusters.
        concentration, shape, rate, kappa: of the priors.

    Raises ValueError for fewer than one datum or component.
    Source: Bishop 2006, Pattern recognition and machine learning, section 10.2.

    >>> pair = BayesianGaussianMixture.from_data(torch.randn(20, 3), components=2)
    >>> pair.model(torch.zeros(4, 3)).shape, pair.guide(torch.zeros(4, 3))["loc"].shape
    (torch.Size([4, 3]), torch.Size([2, 3]))
    """

    def __init__(
        self, size: int, features: int, components: int, concentration: float = 1.0, shape: float = 2.0,
        rate: float = 1.0, kappa: float = 0.1,
    ):  # fmt: skip
        NUM_DATA.check_number("size", size)
        check_numbers(features=features, components=components, concentration=concentration, kappa=kappa)
        for name, value in (("shape", shape), ("rate", rate)):
            POSITIVE.check_number(name, value)
        super().__init__()
        self.size, self.concentration, self.shape, self.rate, self.kappa = size, concentration, shape, rate, kappa
        self.log_concentration = nn.Parameter(torch.full((components,), size / components).log())
        self.log_shape = nn.Parameter(torch.full((components, features), shape + size / components / 2).log())
        self.log_rate = nn.Parameter(self.log_shape.detach().clone())
        self.loc = nn.Parameter(torch.randn(components, features))
        self.log_kappa = nn.Parameter(torch.full((components, features), kappa + size / components).log())
        self._name = unique_name("bayesian_gaussian_mixture")

    @classmethod
    def from_data(cls, x: Tensor, components: int, seed: int = 0, **options: float) -> BayesianGaussianMixture:
        """A mixture of the size of data [N, features], whose guide starts at rows far from each other (k-means++)."""
        check_numbers(seed=seed)
        pair = cls(len(x), x.shape[1], components, **options).to(x)
        generator = torch.Generator().manual_seed(seed)
        rows = [int(torch.randint(len(x), (), generator=generator))]
        for _ in range(components - 1):
            distance = torch.cdist(x, x[rows]).amin(1).square().cpu()
            rows.append(int(torch.multinomial(distance, 1, generator=generator)))
        with torch.no_grad():
            pair.loc.copy_(x[rows])
        return pair

    def model(self, x: Tensor) -> Tensor:
        """p(weights, precision, loc, c, x)."""
        pyro.module(self._name, self)
        ones = torch.ones_like(self.loc)
        weights = pyro.sample("weights", dist.Dirichlet(self.concentration * ones[:, 0]))
        precision = pyro.sample("precision", dist.Gamma(self.shape * ones, self.rate * ones).to_event(2))
        loc = pyro.sample("loc", dist.Normal(0 * ones, (self.kappa * precision).rsqrt()).to_event(2))
        with data_plate(self.size, x):
            c = pyro.sample("c", dist.Categorical(weights), infer={"enumerate": "parallel"})
            component = dist.Normal(Vindex(loc)[..., c, :], Vindex(precision)[..., c, :].rsqrt())
            return pyro.sample("x", component.to_event(1), obs=x)

    def guide(self, x: Tensor) -> dict[str, Tensor]:
        """q(weights) q(precision) q(loc | precision)."""
        pyro.module(self._name, self)
        weights = pyro.sample("weights", dist.Dirichlet(self.log_concentration.exp()))
        precision = pyro.sample("precision", dist.Gamma(self.log_shape.exp(), self.log_rate.exp()).to_event(2))
        loc = pyro.sample("loc", dist.Normal(self.loc, (self.log_kappa.exp() * precision).rsqrt()).to_event(2))
        return {"weights": weights, "precision": precision, "loc": loc}
