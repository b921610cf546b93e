"""Networks over any leading dims, [..., *event in] -> [..., *event out], so that particles need no reshaping.

A new network broadcasts over leading dims (`Leading` wraps one that takes a single batch dim). It joins the laws of
networks by its name in `NETWORKS` of `tests/nn/test_nn.py`, with the event shapes of its input and output:

    class ResidualLayer(torch.nn.Module):
        def __init__(self, features):
            super().__init__()
            self.linear = torch.nn.Linear(features, features)

        def forward(self, x):
            return x + torch.tanh(self.linear(x))

    NETWORKS["ResidualLayer"] = (lambda: ResidualLayer(4), (4,), (4,))
"""

from ppvae.nn.codebook import Codebook, Nearness
from ppvae.nn.context import ConcatContext, Labels, rows_of
from ppvae.nn.conv import Leading, Residual, conv_decoder, conv_encoder, residual_decoder, residual_encoder
from ppvae.nn.dense import Gated, Log1p, Missing, gated_mlp, glorot, mlp, set_output_bias
from ppvae.nn.masked import MADE, MaskedConv2d, MaskedLinear, PixelCNN, sees_only_the_past
from ppvae.nn.multiscale import Added, Pyramid, on_images
from ppvae.nn.sequences import Backward, known_times
from ppvae.nn.topics import Topics

__all__ = [
    "MADE", "Added", "Backward", "Codebook", "ConcatContext", "Gated", "Labels", "Leading", "Log1p", "MaskedConv2d",
    "MaskedLinear", "Missing", "Nearness", "PixelCNN", "Pyramid", "Residual", "Topics", "conv_decoder", "conv_encoder",
    "gated_mlp", "glorot", "known_times", "mlp", "on_images", "residual_decoder", "residual_encoder", "rows_of",
    "sees_only_the_past", "set_output_bias",
]  # fmt: skip
