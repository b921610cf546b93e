"""Likelihoods: modules that take a latent [..., latent] and return a distribution over one datum.

Each is a final module around a network, `forward(z)` or `forward(z, context)` -> distribution of batch shape [...] and
the event shape of one datum. Several parameters a number are blocks along the first event dim of the network's output:
n blocks of D numbers for data [D], n blocks of C channels for data [C, H, W]; `part.output_shape(event)` says how many.
"""

from ppvae.likelihoods.autoregressive import Autoregressive
from ppvae.likelihoods.binary import Bernoulli
from ppvae.likelihoods.continuous import Laplace, Normal, StudentT, set_optimal_scale
from ppvae.likelihoods.counts import (
    Multinomial,
    NegativeBinomial,
    Poisson,
    ZeroInflatedNegativeBinomial,
    ZeroInflatedPoisson,
)
from ppvae.likelihoods.discretized import Categorical, DiscretizedLogistic, MixtureOfDiscretizedLogistics
from ppvae.likelihoods.tabular import Column, Mixed, marginals, table_outputs
from ppvae.likelihoods.unit_interval import Beta, ContinuousBernoulli

__all__ = [
    "Autoregressive",
    "Bernoulli",
    "Beta",
    "Categorical",
    "Column",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "Laplace",
    "Mixed",
    "MixtureOfDiscretizedLogistics",
    "Multinomial",
    "NegativeBinomial",
    "Normal",
    "Poisson",
    "StudentT",
    "ZeroInflatedNegativeBinomial",
    "ZeroInflatedPoisson",
    "marginals",
    "set_optimal_scale",
    "table_outputs",
]
