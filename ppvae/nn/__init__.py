"""Networks over any leading dims: [..., *event in] -> [..., *event out]."""

from ppvae.nn.codebook import Codebook, Nearness
from ppvae.nn.context import ConcatContext, Labels, rows_of
from ppvae.nn.conv import Leading, Residual, conv_decoder, conv_encoder, residual_decoder, residual_encoder
from ppvae.nn.dense import Gated, Log1p, Missing, gated_mlp, glorot, mlp, set_output_bias
from ppvae.nn.masked import MADE, MaskedConv2d, MaskedLinear, PixelCNN, sees_only_the_past
from ppvae.nn.multiscale import Added, Pyramid, on_images
from ppvae.nn.sequences import Backward, known_times
from ppvae.nn.topics import Topics

__all__ = [
    "MADE",
    "Added",
    "Backward",
    "Codebook",
    "ConcatContext",
    "Gated",
    "Labels",
    "Leading",
    "Log1p",
    "MaskedConv2d",
    "MaskedLinear",
    "Missing",
    "Nearness",
    "PixelCNN",
    "Pyramid",
    "Residual",
    "Topics",
    "conv_decoder",
    "conv_encoder",
    "gated_mlp",
    "glorot",
    "known_times",
    "mlp",
    "on_images",
    "residual_decoder",
    "residual_encoder",
    "rows_of",
    "sees_only_the_past",
    "set_output_bias",
]
