"""Distributions that torch and Pyro lack, or whose log-density they compute inaccurately or slowly.

Each class says what is wrong elsewhere: clamped probabilities (`ContinuousBernoulli`), cancellation of gamma functions
(`Beta`, `StudentT`, `NegativeBinomial`), underflow of the rate (`Poisson`), NaN at an infinite logit (`ZeroInflated`),
a single total for the whole batch (`Multinomial`), or twice the memory traffic (`Bernoulli`).
"""

from ppvae.distributions.autoregressive import Autoregressive
from ppvae.distributions.continuous import StudentT
from ppvae.distributions.counts import Multinomial, NegativeBinomial, Poisson, ZeroInflated
from ppvae.distributions.discretized import DiscretizedLogistic, Levels, MixtureOfDiscretizedLogistics
from ppvae.distributions.tabular import Columns
from ppvae.distributions.unit_interval import Bernoulli, Beta, ContinuousBernoulli

__all__ = [
    "Autoregressive", "Bernoulli", "Beta", "Columns", "ContinuousBernoulli", "DiscretizedLogistic", "Levels",
    "MixtureOfDiscretizedLogistics", "Multinomial", "NegativeBinomial", "Poisson", "StudentT", "ZeroInflated",
]  # fmt: skip
