"""Posteriors q(z | x): modules whose call maps data [..., *event] to a distribution over the latent of each datum.

An amortised posterior reads the outputs of its network `net`: `forward(x)` is `head(net(x))`, and
`posterior.outputs(latent)` is the number of outputs for a latent of that size. `PerDatum` replaces the network by a
table of free parameters, `SemiAmortized` refines the outputs by gradient steps on each datum's ELBO.

A new amortised posterior says how many outputs it reads and which distribution they parametrise. It joins the laws of
`tests/posteriors` by its name in `POSTERIORS` of `tests/laws/parts.py`, with the size at which it is integrated:

    class Laplace(Amortized):
        @staticmethod
        def outputs(latent):
            return 2 * latent

        def head(self, outputs):
            loc, log_scale = outputs.chunk(2, dim=-1)
            return dist.Laplace(loc, log_scale.exp()).to_event(1)

    POSTERIORS["Laplace"] = Part(lambda latent: Laplace(net(Laplace.outputs(latent))), kind="real", size=1)
"""

from ppvae.posteriors.amortized import Delta
from ppvae.posteriors.discrete import Bernoulli, Categorical, OneHot, RelaxedBernoulli, RelaxedOneHot
from ppvae.posteriors.flows import IAF, SplineCoupling
from ppvae.posteriors.mixture import Mixture
from ppvae.posteriors.normal import DiagonalNormal, FullRank, LowRank
from ppvae.posteriors.per_datum import PerDatum
from ppvae.posteriors.semi_amortized import SemiAmortized
from ppvae.posteriors.simplex import Dirichlet, LogisticNormal
from ppvae.posteriors.sphere import PowerSpherical

__all__ = [
    "IAF", "Bernoulli", "Categorical", "Delta", "DiagonalNormal", "Dirichlet", "FullRank", "LogisticNormal", "LowRank",
    "Mixture", "OneHot", "PerDatum", "PowerSpherical", "RelaxedBernoulli", "RelaxedOneHot", "SemiAmortized",
    "SplineCoupling",
]  # fmt: skip
