"""Masked networks for autoregressive likelihoods: outputs for an element depend on earlier elements and on z only."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppvae.errors import UsageError
from ppvae.errors.ranges import check_numbers, check_sequences
from ppvae.nn.dense import glorot

Activation = Callable[[], nn.Module]


class MaskedLinear(nn.Linear):
    """A dense layer with masked weights, y = (mask * W) x + b, [..., inputs] -> [..., outputs].

    Source: Germain et al. 2015 (arXiv 1502.03509).

    >>> MaskedLinear(torch.tensor([[1.0, 0.0]]))(torch.ones(5, 2)).shape
    torch.Size([5, 1])
    """

    def __init__(self, mask: Tensor):
        super().__init__(mask.shape[1], mask.shape[0])
        self.mask = nn.Buffer(mask.to(self.weight.dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class MADE(nn.Module):
    """A conditional masked autoencoder, (x [..., D], z [..., latent]) -> [..., outputs * D]; output d depends on x_<d.

    The output is `outputs` blocks of D. z enters every layer by an unmasked linear map, so that the first layer of x is
    computed once for all particles of z (zuko's MaskedMLP and Pyro's ConditionalAutoRegressiveNN concatenate z to x in
    the first layer only). `order` [D] lists positions from the first to the last, ascending by default; `event_shape`
    is (D,).

    Source: Germain et al. 2015 (arXiv 1502.03509), equations 8 and 9.

    >>> MADE(6, latent=2)(torch.zeros(5, 6), torch.zeros(3, 5, 2)).shape
    torch.Size([3, 5, 6])
    """

    def __init__(
        self,
        features: int,
        latent: int,
        outputs: int = 1,
        hidden: Sequence[int] = (200,),
        activation: Activation = nn.Tanh,
        order: Tensor | None = None,
    ):
        check_numbers(features=features, latent=latent, outputs=outputs)
        check_sequences(hidden=hidden)
        super().__init__()
        order = torch.arange(features) if order is None else torch.as_tensor(order)
        if sorted(order.tolist()) != list(range(features)):
            raise UsageError(f"order: expected the positions 0..{features - 1}, each once, found {order.tolist()[:8]}")
        self.event_shape = (features,)
        self.order = nn.Buffer(order, persistent=False)
        rank = order.argsort()  # the position of each element in the order
        # a hidden unit of degree k depends on the first k elements, and feeds the outputs of all later ones
        degrees = [rank + 1, *(torch.arange(width) * features // width for width in hidden), rank.repeat(outputs)]
        masks = [b[:, None] >= a[None, :] for a, b in pairwise(degrees)]
        self.layers = nn.ModuleList(MaskedLinear(mask) for mask in masks)
        self.given = nn.ModuleList(nn.Linear(latent, len(mask), bias=False) for mask in masks)
        self.activation = activation()
        glorot(self)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        for i, (layer, given) in enumerate(zip(self.layers, self.given, strict=True)):
            x = layer(self.activation(x) if i else x) + given(z)
        return x


class MaskedConv2d(nn.Conv2d):
    """A convolution [N, inputs, H, W] -> [N, outputs, H, W] masked to the pixels above and to the left.

    Channel c has colour c modulo the number of `colours`: at the same pixel, an output depends on inputs of earlier
    colours, and with `itself=True` on those of its own colour.

    Source: van den Oord et al. 2016 (arXiv 1601.06759), masks A (`itself=False`) and B.

    >>> MaskedConv2d(1, 4, 3, colours=1, itself=False)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 4, 8, 8])
    """

    def __init__(self, inputs: int, outputs: int, size: int, colours: int, itself: bool):
        check_numbers(inputs=inputs, outputs=outputs, size=size, colours=colours)
        if size % 2 == 0:
            raise UsageError(f"size: expected an odd number, found {size}")
        super().__init__(inputs, outputs, size, padding=size // 2)
        middle = size // 2
        mask = torch.zeros_like(self.weight)
        mask[:, :, :middle] = 1
        mask[:, :, middle, :middle] = 1
        colour_in, colour_out = torch.arange(inputs) % colours, torch.arange(outputs) % colours
        before = colour_in[None, :] <= colour_out[:, None] if itself else colour_in[None, :] < colour_out[:, None]
        mask[:, :, middle, middle] = before.to(mask.dtype)
        self.mask = nn.Buffer(mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


class PixelCNN(nn.Module):
    """A conditional PixelCNN, (x [..., C, H, W], z [..., latent]) -> [..., outputs * C, H, W].

    A colour of a pixel depends on the pixels above and to the left, on earlier colours of the pixel, and on features
    that `decoder` computes from z for the whole image, as in a PixelVAE. `layers` residual convolutions follow the
    first; the receptive field has the blind spot of the first PixelCNN, to the upper right. With `flat=True`, x is
    [..., C * H * W] and the result [..., outputs * C * H * W]. `event_shape` is that of x; `order` is raster order.

    Args:
        shape: (C, H, W).
        decoder: maps z to features [..., features, H, W], such as `nn.conv_decoder(latent, (features, H, W))`.
        features: the number of features.
        outputs: parameters for each element, as blocks of C channels.

    Source: Gulrajani et al. 2016 (arXiv 1611.05013); van den Oord et al. 2016 (arXiv 1601.06759).

    >>> from ppvae.nn import conv_decoder
    >>> net = PixelCNN((1, 8, 8), conv_decoder(2, (4, 8, 8), channels=(8,), hidden=16), features=4, channels=8)
    >>> net(torch.zeros(5, 1, 8, 8), torch.zeros(3, 5, 2)).shape
    torch.Size([3, 5, 1, 8, 8])
    """

    def __init__(
        self,
        shape: Sequence[int],
        decoder: nn.Module,
        features: int,
        outputs: int = 1,
        channels: int = 32,
        layers: int = 3,
        size: int = 5,
        activation: Activation = nn.ELU,
        flat: bool = False,
    ):
        check_numbers(features=features, outputs=outputs, channels=channels, layers=layers, size=size)
        check_sequences(shape=shape)
        if len(shape) != 3:
            raise UsageError(f"shape: expected (C, H, W), found {tuple(shape)}")
        super().__init__()
        colours, height, width = self.shape = tuple(shape)
        self.event_shape = (colours * height * width,) if flat else self.shape
        positions = torch.arange(colours * height * width).reshape(colours, -1)
        self.order = nn.Buffer(positions.T.flatten(), persistent=False)
        inner = channels * colours
        self.first = MaskedConv2d(colours, inner, size, colours, itself=False)
        self.given = nn.Conv2d(features, inner, 1)
        self.middle = nn.ModuleList(MaskedConv2d(inner, inner, size, colours, itself=True) for _ in range(layers))
        self.last = MaskedConv2d(inner, outputs * colours, 1, colours, itself=True)
        self.activation = activation()
        glorot(self)
        self.decoder = decoder

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        lead = torch.broadcast_shapes(x.shape[: x.dim() - len(self.event_shape)], z.shape[:-1])
        features = self.decoder(z)
        features = features.expand(*lead, *features.shape[-3:]).reshape(-1, *features.shape[-3:])
        h = self.first(x.expand(*lead, *self.event_shape).reshape(-1, *self.shape)) + self.given(features)
        for layer in self.middle:
            h = h + layer(self.activation(h))
        out = self.last(self.activation(h))
        return out.reshape(*lead, -1, *self.event_shape[1:])


def sees_only_the_past(net: Callable[[Tensor, Tensor], Tensor], order: Tensor, x: Tensor, z: Tensor) -> bool:
    """Whether a network (x, z) -> [..., outputs * first, *rest] is autoregressive: outputs depend on earlier x only.

    Tested by the Jacobian at one x [*event] and z [latent]; `order` lists the positions of the flattened event.

    >>> net = MADE(4, latent=2)
    >>> sees_only_the_past(net, net.order, torch.rand(4), torch.rand(2))
    True
    >>> sees_only_the_past(net, net.order.flip(0), torch.rand(4), torch.rand(2))
    False
    """
    jacobian = torch.autograd.functional.jacobian(lambda value: net(value, z), x)
    of = jacobian.reshape(-1, x.numel(), x.numel()).abs().sum(0)[order][:, order]  # [output, input]
    return not bool(of.triu().any())
