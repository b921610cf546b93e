"""Factories of the library's own pairs, for the command line: their flags come from their signatures."""

from __future__ import annotations

import torch
from torch import Tensor

from ppvae import likelihoods, nn, posteriors, priors
from ppvae.models.linear_gaussian import LinearGaussian
from ppvae.models.vae import VAE


def _mean_logits(train: Tensor) -> Tensor:
    return torch.logit(train.double().mean(0).clamp(0.001, 0.999)).float()


def vae(train: Tensor, latent: int = 8, hidden: tuple[int, ...] = (200, 200)) -> VAE:
    """A VAE on flat binary data: standard normal prior, Bernoulli likelihood, diagonal normal posterior.

    The decoder mirrors the encoder and starts at the mean image, as in Burda et al. 2016 (arXiv 1509.00519).

    Args:
        train: the training data [N, features].
        latent: the size of z.
        hidden: the widths of the encoder's hidden layers.
    """
    features = train.shape[1:].numel()
    if train.dim() != 2:
        raise ValueError(f"expected flat data [N, features], found {list(train.shape)}; use conv_vae, or load flat")
    decoder = nn.mlp(latent, features, hidden=hidden[::-1])
    nn.set_output_bias(decoder, _mean_logits(train))
    return VAE(
        prior=priors.StandardNormal(latent),
        likelihood=likelihoods.Bernoulli(decoder),
        posterior=posteriors.DiagonalNormal(nn.mlp(features, 2 * latent, hidden=hidden)),
    )


def conv_vae(train: Tensor, latent: int = 16, channels: tuple[int, int] = (32, 64), hidden: int = 256) -> VAE:
    """A convolutional VAE on binary images [N, C, H, W] whose sides divide by 4.

    Args:
        train: the training data.
        latent: the size of z.
        channels: of the encoder's two convolutions; the decoder mirrors them.
        hidden: the width of the dense layer between convolutions and z.
    """
    if train.dim() != 4:
        raise ValueError(f"conv_vae: expected images [N, C, H, W], found {list(train.shape)}; load with flat=False")
    shape = tuple(train.shape[1:])
    decoder = nn.conv_decoder(latent, shape, channels=channels[::-1], hidden=hidden)
    return VAE(
        prior=priors.StandardNormal(latent),
        likelihood=likelihoods.Bernoulli(decoder),
        posterior=posteriors.DiagonalNormal(nn.conv_encoder(shape, 2 * latent, channels=channels, hidden=hidden)),
    )


def linear_gaussian(train: Tensor, latent: int = 2, scale: float = 1.0) -> LinearGaussian:
    """Probabilistic PCA with its exact posterior as guide, on flat real data [N, features].

    Args:
        train: the training data.
        latent: the size of z.
        scale: the starting noise scale.
    """
    if train.dim() != 2:
        raise ValueError(f"linear_gaussian: expected flat data [N, features], found {list(train.shape)}")
    pair = LinearGaussian(train.shape[1], latent, scale)
    with torch.no_grad():
        pair.loc.copy_(train.mean(0))
    return pair
