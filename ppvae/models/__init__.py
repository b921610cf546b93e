"""Models: short programs on the parts, and factories that the command line can call."""

from ppvae.models.factories import conv_vae, factor_analysis, gaussian_mixture, linear_gaussian, vae
from ppvae.models.gaussian_mixture import GaussianMixture
from ppvae.models.linear_gaussian import LinearGaussian
from ppvae.models.vae import VAE

__all__ = [
    "VAE", "GaussianMixture", "LinearGaussian", "conv_vae", "factor_analysis", "gaussian_mixture", "linear_gaussian",
    "vae",
]  # fmt: skip
