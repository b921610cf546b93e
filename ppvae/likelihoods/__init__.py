"""Likelihoods p(x | z): modules whose call maps latents [..., latent] to a distribution over one datum.

A likelihood is built around a network: `forward(z)`, or `forward(z, context)`, returns a distribution of batch shape
[...] and the event shape of one datum. Several parameters for each element are blocks along the first event dim of the
network's output: n blocks of D numbers for data [D], n blocks of C channels for data [C, H, W];
`likelihood.output_shape(event)` is the event shape that the network must give.

A new likelihood reads its network's output and counts dims by `event_dim`; `parameters_per_element`, 1 by default, says
how many blocks it reads. It joins the laws of `tests/likelihoods` by its name in `LIKELIHOODS` of
`tests/laws/parts.py`, with the support over which its density is summed or integrated:

    class Cauchy(NetworkLikelihood):
        def forward(self, z):
            loc = self.net(z)
            return dist.Cauchy(loc, torch.ones_like(loc)).to_event(event_dim(loc, z))

    LIKELIHOODS["Cauchy"] = Case(lambda nets: Cauchy(nets(1)), support="real")
"""

from ppvae.likelihoods.autoregressive import Autoregressive
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
from ppvae.likelihoods.unit_interval import Bernoulli, Beta, ContinuousBernoulli

__all__ = [
    "Autoregressive", "Bernoulli", "Beta", "Categorical", "Column", "ContinuousBernoulli", "DiscretizedLogistic",
    "Laplace", "Mixed", "MixtureOfDiscretizedLogistics", "Multinomial", "NegativeBinomial", "Normal", "Poisson",
    "StudentT", "ZeroInflatedNegativeBinomial", "ZeroInflatedPoisson", "marginals", "set_optimal_scale",
    "table_outputs",
]  # fmt: skip
