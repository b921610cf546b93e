"""Models: short programs on the parts, and factories that the command line can call."""

from ppvae.models.factories import conv_vae, linear_gaussian, vae
from ppvae.models.linear_gaussian import LinearGaussian
from ppvae.models.vae import VAE

__all__ = ["VAE", "LinearGaussian", "conv_vae", "linear_gaussian", "vae"]
