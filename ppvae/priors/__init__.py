"""Priors p(z): modules whose call returns a distribution over the latent of one datum, of event shape [latent].

A prior that declares `context`, `forward(*, context)`, is given the batch's second tensor, p(z | context).

A new prior is a module without inputs. It joins the laws of `tests/priors` by its name in `PRIORS` of
`tests/laws/parts.py`, with the space of its values and the size at which its density is integrated:

    class LearnedLaplace(torch.nn.Module):
        def __init__(self, latent):
            super().__init__()
            self.log_scale = torch.nn.Parameter(torch.zeros(latent))

        def forward(self):
            return dist.Laplace(torch.zeros_like(self.log_scale), self.log_scale.exp()).to_event(1)

    PRIORS["LearnedLaplace"] = Part(LearnedLaplace, kind="real", size=1)
"""

from ppvae.priors.autoregressive import Autoregressive, AutoregressiveCategorical, AutoregressiveOneHot
from ppvae.priors.discrete import Bernoulli, Categorical, OneHot, RelaxedBernoulli, RelaxedOneHot
from ppvae.priors.flows import MAF, NeuralSpline, RealNVP
from ppvae.priors.gaussian_process import GaussianProcess
from ppvae.priors.mixture import MixtureOfNormals, VampPrior
from ppvae.priors.normal import ConditionalNormal, Laplace, Normal, StandardNormal, StudentT
from ppvae.priors.simplex import Dirichlet, LogisticNormal
from ppvae.priors.sphere import UniformOnSphere

__all__ = [
    "MAF", "Autoregressive", "AutoregressiveCategorical", "AutoregressiveOneHot", "Bernoulli", "Categorical",
    "ConditionalNormal", "Dirichlet", "GaussianProcess", "Laplace", "LogisticNormal", "MixtureOfNormals",
    "NeuralSpline", "Normal", "OneHot", "RealNVP", "RelaxedBernoulli", "RelaxedOneHot", "StandardNormal", "StudentT",
    "UniformOnSphere", "VampPrior",
]  # fmt: skip
