"""Posteriors: modules that take data and return a distribution over its latent, amortised by a network or per datum.

The amortised ones read the outputs of one network, `net`, and say what these stand for in `head`: `forward(x)` is
`head(net(x))`; `part.outputs(latent)` says how many outputs a latent of that size takes. `PerDatum` puts a
table of free parameters in the place of the network.
"""

from ppvae.posteriors.delta import Delta
from ppvae.posteriors.discrete import Bernoulli, Categorical, OneHot, RelaxedBernoulli, RelaxedOneHot
from ppvae.posteriors.flows import IAF, SplineCoupling
from ppvae.posteriors.normal import DiagonalNormal, FullRank, LowRank
from ppvae.posteriors.per_datum import PerDatum
from ppvae.posteriors.semi_amortized import SemiAmortized
from ppvae.posteriors.simplex import Dirichlet, LogisticNormal
from ppvae.posteriors.sphere import PowerSpherical

__all__ = [
    "IAF",
    "Bernoulli",
    "Categorical",
    "Delta",
    "DiagonalNormal",
    "Dirichlet",
    "FullRank",
    "LogisticNormal",
    "LowRank",
    "OneHot",
    "PerDatum",
    "PowerSpherical",
    "RelaxedBernoulli",
    "RelaxedOneHot",
    "SemiAmortized",
    "SplineCoupling",
]
