"""Probabilistic PCA and factor analysis with a posterior over their parameters."""

from __future__ import annotations

import math
from typing import final

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae.errors.ranges import check_numbers
from ppvae.models.bayesian.plate import NUM_DATA, data_plate
from ppvae.parameter_names import unique_name


@final
class BayesianFactorAnalysis(nn.Module):
    """x ~ N(W z + loc, diag(1 / precision)), z ~ N(0, I), with W, loc and precision as global latents.

    alpha_k ~ Gamma(1, 1) is the precision of column k of W ~ N(0, 1 / alpha_k), so that columns without use shrink
    (automatic relevance determination); loc ~ N(0, 1), precision ~ Gamma(2, 1). The guide is log-normal on precisions
    and normal on W and loc, independent; given these, q(z | x) is the exact p(z | x, W, loc, precision). Sites "alpha"
    [latent], "weight" [features, latent], "loc" [features], "precision" [features] or [1], "z" [latent], "x"
    [features]. The posterior is the same under rotations of z, and the guide covers one.

    Args:
        size: the number of training data, of which a batch is a part.
        features, latent: the sizes of x and z; data are meant to be standardised.
        isotropic: one noise precision for all features: Bayesian PCA.

    Raises ValueError for fewer than one datum.
    Source: Bishop 1999, Bayesian PCA; Ghahramani and Beal 2000, Variational inference for Bayesian mixtures of factor
    analysers.

    >>> pair = BayesianFactorAnalysis(100, 3, 2, isotropic=True)
    >>> pair.model(torch.zeros(4, 3)).shape, pair.guide(torch.zeros(4, 3)).shape
    (torch.Size([4, 3]), torch.Size([4, 2]))
    """

    def __init__(self, size: int, features: int, latent: int, isotropic: bool = False):
        NUM_DATA.check_number("size", size)
        check_numbers(features=features, latent=latent)
        super().__init__()
        self.size, start = size, 0.1
        shapes = {"alpha": (latent,), "weight": (features, latent), "loc": (features,)}
        shapes["precision"] = (1 if isotropic else features,)
        self.locations = nn.ParameterDict({name: torch.zeros(shape) for name, shape in shapes.items()})
        self.log_scales = nn.ParameterDict({n: torch.full(shape, math.log(start)) for n, shape in shapes.items()})
        nn.init.normal_(self.locations["weight"], std=latent**-0.5)
        self._name = unique_name("bayesian_factor_analysis")

    def model(self, x: Tensor) -> Tensor:
        """p(alpha, W, loc, precision, z, x)."""
        pyro.module(self._name, self)
        weight, loc, precision = (self.locations[name] for name in ("weight", "loc", "precision"))
        ones = torch.ones_like
        alpha = pyro.sample("alpha", dist.Gamma(ones(weight[0]), ones(weight[0])).to_event(1))
        scale = alpha.rsqrt().unsqueeze(-2).expand(*alpha.shape[:-1], *weight.shape)
        weight = pyro.sample("weight", dist.Normal(torch.zeros_like(scale), scale).to_event(2))
        loc = pyro.sample("loc", dist.Normal(torch.zeros_like(loc), ones(loc)).to_event(1))
        precision = pyro.sample("precision", dist.Gamma(2 * ones(precision), ones(precision)).to_event(1))
        with data_plate(self.size, x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(weight.shape[-1]), 1.0).to_event(1))
            mean = (weight @ z.unsqueeze(-1)).squeeze(-1) + loc
            return pyro.sample("x", dist.Normal(mean, precision.rsqrt()).to_event(1), obs=x)

    def guide(self, x: Tensor) -> Tensor:
        """q(alpha) q(W) q(loc) q(precision) p(z | x, W, loc, precision)."""
        pyro.module(self._name, self)
        drawn = {}
        for name, family in {
            "alpha": dist.LogNormal, "weight": dist.Normal, "loc": dist.Normal, "precision": dist.LogNormal
        }.items():  # fmt: skip
            factor = family(self.locations[name], self.log_scales[name].exp())
            drawn[name] = pyro.sample(name, factor.to_event(self.locations[name].dim()))
        weight, precision = drawn["weight"], drawn["precision"]
        weighed = weight.mT * precision.unsqueeze(-2)
        m = weighed @ weight + torch.eye(weight.shape[-1]).to(weight)
        loc = torch.linalg.solve(m, weighed @ (x - drawn["loc"]).unsqueeze(-1)).squeeze(-1)
        with data_plate(self.size, x):
            return pyro.sample("z", dist.MultivariateNormal(loc, precision_matrix=m))
