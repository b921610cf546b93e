"""Models: pairs of a model and a guide composed of parts, and factories that the command line can call.

A new model derives from `ComposedModel`; `call_part` calls an attribute by its name and registers its parameters. It
joins the laws of every model by its name in `MODELS` of `tests/laws/test_model_laws.py`, with its data and the words
by which `check` describes it:

    class PlainVAE(ComposedModel):
        def __init__(self, prior, likelihood, posterior):
            super().__init__("plain_vae")
            self.prior, self.likelihood, self.posterior = prior, likelihood, posterior

        def model(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", self.call_part("prior"))
                return pyro.sample("x", self.call_part("likelihood", z), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x)):
                return pyro.sample("z", self.call_part("posterior", x))

    MODELS["plain VAE"] = Case(
        lambda: PlainVAE(priors.StandardNormal(2), bits(2), normal(4)), binary, words="site 'z': latent, Normal"
    )
"""

from ppvae.models.bayesian.factor_analysis import BayesianFactorAnalysis
from ppvae.models.bayesian.last_layer import LastLayerVAE
from ppvae.models.bayesian.mixture import BayesianGaussianMixture
from ppvae.models.bayesian.topics import BayesianTopicModel
from ppvae.models.counts import CountVAE, TopicModel
from ppvae.models.deep_markov import DeepMarkovModel
from ppvae.models.deep_mixture import DeepMixture, SemiSupervisedVAE
from ppvae.models.factories import conv_vae, factor_analysis, gaussian_mixture, linear_gaussian, vae
from ppvae.models.gaussian_mixture import GaussianMixture
from ppvae.models.gaussian_process import GaussianProcessVAE, smoothed, stepwise
from ppvae.models.guides.annealed import Annealed
from ppvae.models.guides.joint import JointPosterior
from ppvae.models.hierarchical import HierarchicalVAE, LadderVAE
from ppvae.models.label_factories import conditional_vae, semi_supervised_vae
from ppvae.models.linear_gaussian import LinearGaussian
from ppvae.models.multimodal import MultimodalVAE, mixture_of_experts, product_of_experts
from ppvae.models.tabular import TableVAE, table_vae
from ppvae.models.top_down import Block, TopDownVAE, very_deep_vae
from ppvae.models.vae import VAE, ConditionalVAE, QuantizedVAE

__all__ = [
    "VAE", "Annealed", "BayesianFactorAnalysis", "BayesianGaussianMixture", "BayesianTopicModel", "Block",
    "ConditionalVAE", "CountVAE", "DeepMarkovModel", "DeepMixture", "GaussianMixture", "GaussianProcessVAE",
    "HierarchicalVAE", "JointPosterior", "LadderVAE", "LastLayerVAE", "LinearGaussian", "MultimodalVAE", "QuantizedVAE",
    "SemiSupervisedVAE", "TableVAE", "TopDownVAE", "TopicModel", "conditional_vae", "conv_vae", "factor_analysis",
    "gaussian_mixture", "linear_gaussian", "mixture_of_experts", "product_of_experts", "semi_supervised_vae",
    "smoothed", "stepwise", "table_vae", "vae", "very_deep_vae",
]  # fmt: skip
