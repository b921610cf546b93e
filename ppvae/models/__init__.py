"""Models: short programs on the parts, and factories that the command line can call."""

from ppvae.models.counts import CountVAE, TopicModel
from ppvae.models.deep_markov import DeepMarkovModel
from ppvae.models.deep_mixture import DeepMixture, SemiSupervisedVAE
from ppvae.models.factories import conv_vae, factor_analysis, gaussian_mixture, linear_gaussian, vae
from ppvae.models.gaussian_mixture import GaussianMixture
from ppvae.models.gaussian_process import GaussianProcessVAE, smoothed, stepwise
from ppvae.models.hierarchical import HierarchicalVAE, LadderVAE
from ppvae.models.linear_gaussian import LinearGaussian
from ppvae.models.multimodal import MultimodalVAE, mixture_of_experts, product_of_experts
from ppvae.models.quantized import QuantizedVAE
from ppvae.models.tabular import TableVAE
from ppvae.models.top_down import Block, TopDownVAE, very_deep_vae
from ppvae.models.vae import VAE, ConditionalVAE

__all__ = [
    "VAE",
    "Block",
    "ConditionalVAE",
    "CountVAE",
    "DeepMarkovModel",
    "DeepMixture",
    "GaussianMixture",
    "GaussianProcessVAE",
    "HierarchicalVAE",
    "LadderVAE",
    "LinearGaussian",
    "MultimodalVAE",
    "QuantizedVAE",
    "SemiSupervisedVAE",
    "TableVAE",
    "TopDownVAE",
    "TopicModel",
    "conv_vae",
    "factor_analysis",
    "gaussian_mixture",
    "linear_gaussian",
    "mixture_of_experts",
    "product_of_experts",
    "smoothed",
    "stepwise",
    "vae",
    "very_deep_vae",
]
