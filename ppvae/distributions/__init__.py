"""Distributions that Pyro lacks, or whose log-density it computes in a way that is slow or wrong."""

from ppvae.distributions.autoregressive import Autoregressive
from ppvae.distributions.continuous import StudentT
from ppvae.distributions.counts import Multinomial, NegativeBinomial, Poisson, ZeroInflated
from ppvae.distributions.discretized import DiscretizedLogistic, Levels, MixtureOfDiscretizedLogistics
from ppvae.distributions.tabular import Columns
from ppvae.distributions.unit_interval import Bernoulli, Beta, ContinuousBernoulli

__all__ = [
    "Autoregressive",
    "Bernoulli",
    "Beta",
    "Columns",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "Levels",
    "MixtureOfDiscretizedLogistics",
    "Multinomial",
    "NegativeBinomial",
    "Poisson",
    "StudentT",
    "ZeroInflated",
]
