"""Models: short programs on the parts, and factories that the command line can call."""

from ppvae.models.conditional import ConditionalVAE
from ppvae.models.deep_markov import DeepMarkovModel
from ppvae.models.deep_mixture import DeepMixture, SemiSupervisedVAE
from ppvae.models.factories import conv_vae, factor_analysis, gaussian_mixture, linear_gaussian, vae
from ppvae.models.gaussian_mixture import GaussianMixture
from ppvae.models.hierarchical import HierarchicalVAE, LadderVAE
from ppvae.models.linear_gaussian import LinearGaussian
from ppvae.models.multimodal import MultimodalVAE
from ppvae.models.top_down import Block, TopDownVAE, very_deep_vae
from ppvae.models.vae import VAE

__all__ = [
    "VAE", "Block", "ConditionalVAE", "DeepMarkovModel", "DeepMixture", "GaussianMixture", "HierarchicalVAE",
    "LadderVAE", "LinearGaussian", "MultimodalVAE", "SemiSupervisedVAE", "TopDownVAE", "conv_vae", "factor_analysis",
    "gaussian_mixture", "linear_gaussian", "vae", "very_deep_vae",
]  # fmt: skip
