"""Priors: modules that return a distribution over one datum's latent; one that declares `context` is given it."""

from ppvae.priors.autoregressive import Autoregressive, AutoregressiveCategorical, AutoregressiveOneHot
from ppvae.priors.conditional import ConditionalNormal
from ppvae.priors.discrete import Bernoulli, Categorical, OneHot, RelaxedBernoulli, RelaxedOneHot
from ppvae.priors.flows import MAF, NeuralSpline, RealNVP
from ppvae.priors.gaussian_process import GaussianProcess
from ppvae.priors.mixture import MixtureOfNormals, VampPrior
from ppvae.priors.normal import Laplace, Normal, StandardNormal, StudentT
from ppvae.priors.simplex import Dirichlet, LogisticNormal
from ppvae.priors.sphere import UniformOnSphere

__all__ = [
    "MAF",
    "Autoregressive",
    "AutoregressiveCategorical",
    "AutoregressiveOneHot",
    "Bernoulli",
    "Categorical",
    "ConditionalNormal",
    "Dirichlet",
    "GaussianProcess",
    "Laplace",
    "LogisticNormal",
    "MixtureOfNormals",
    "NeuralSpline",
    "Normal",
    "OneHot",
    "RealNVP",
    "RelaxedBernoulli",
    "RelaxedOneHot",
    "StandardNormal",
    "StudentT",
    "UniformOnSphere",
    "VampPrior",
]
