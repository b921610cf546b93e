"""Convolutional encoders and decoders of images, plain and residual, over any leading dims."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ppvae.errors import UsageError
from ppvae.errors.ranges import check_numbers, check_sequences
from ppvae.nn.dense import glorot

Activation = Callable[[], nn.Module]


class Leading(nn.Module):
    """Flattens leading dims for a network that takes a single batch dim: [..., *event] -> [..., *out].

    >>> import torch
    >>> Leading(nn.Conv2d(1, 4, 3), event_dim=3)(torch.zeros(5, 2, 1, 8, 8)).shape
    torch.Size([5, 2, 4, 6, 6])
    """

    def __init__(self, network: nn.Module, event_dim: int):
        check_numbers(event_dim=event_dim)
        super().__init__()
        self.network, self.event_dim = network, event_dim

    def forward(self, x: Tensor) -> Tensor:
        lead, event = x.shape[: -self.event_dim], x.shape[-self.event_dim :]
        out = self.network(x.reshape(-1, *event))
        return out.reshape(*lead, *out.shape[1:])


class Residual(nn.Module):
    """A residual block [N, C, H, W] -> [N, C, H, W], x + conv(act(conv(act(x)))) with 3x3 convolutions.

    Source: He et al. 2016 (arXiv 1603.05027), without normalisation, whose batch statistics couple the data.

    >>> import torch
    >>> Residual(4, nn.ELU)(torch.zeros(2, 4, 7, 7)).shape
    torch.Size([2, 4, 7, 7])
    """

    def __init__(self, channels: int, activation: Activation):
        check_numbers(channels=channels)
        super().__init__()
        self.change = nn.Sequential(
            activation(),
            nn.Conv2d(channels, channels, 3, padding=1),
            activation(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.change(x)


def _halved_shape(shape: Sequence[int], channels: Sequence[int]) -> tuple[int, int, int]:
    """The channels of an image, and its height and width after one halving for each of `channels`."""
    if not channels:
        raise UsageError("channels: expected at least one number, one a halving of the image, found none")
    by = 2 ** len(channels)
    if len(shape) != 3:
        raise UsageError(f"shape: expected (C, H, W), found {tuple(shape)}")
    image, height, width = shape
    if height % by or width % by:
        raise UsageError(
            f"shape: expected height and width divisible by {by}, for {len(channels)} halvings, found {tuple(shape)}"
        )
    return image, height // by, width // by


def conv_encoder(
    shape: Sequence[int],
    outputs: int,
    channels: Sequence[int] = (32, 64),
    hidden: int = 256,
    activation: Activation = nn.ELU,
    flat: bool = False,
    blocks: int = 0,
) -> nn.Module:
    """A convolutional encoder [..., C, H, W] -> [..., outputs] that halves the image once for each of `channels`.

    With `flat=True` it takes flattened images [..., C * H * W]. `blocks` residual blocks follow each halving.
    Raises ValueError for a size that does not halve.
    Source: Burgess et al. 2018 (arXiv 1804.03599) for 4x4 convolutions of stride 2 before a dense layer.

    >>> import torch
    >>> conv_encoder((1, 28, 28), 16)(torch.zeros(5, 3, 1, 28, 28)).shape
    torch.Size([5, 3, 16])
    >>> conv_encoder((3, 64, 64), 16, channels=(32, 32, 64, 64))(torch.zeros(5, 3, 64, 64)).shape
    torch.Size([5, 16])
    """
    check_numbers(outputs=outputs, hidden=hidden, blocks=blocks)
    check_sequences(shape=shape, channels=channels)
    image, h, w = _halved_shape(shape, channels)
    layers: list[nn.Module] = [nn.Unflatten(-1, tuple(shape))] if flat else []
    for width_in, width_out in zip((image, *channels[:-1]), channels, strict=True):
        layers.append(nn.Conv2d(width_in, width_out, 4, stride=2, padding=1))
        layers += [Residual(width_out, activation) for _ in range(blocks)]
        layers.append(activation())
    layers += [nn.Flatten(), nn.Linear(channels[-1] * h * w, hidden), activation(), nn.Linear(hidden, outputs)]
    return Leading(glorot(nn.Sequential(*layers)), event_dim=1 if flat else 3)


def residual_encoder(
    shape: Sequence[int],
    outputs: int,
    channels: Sequence[int] = (32, 64),
    blocks: int = 1,
    hidden: int = 256,
    activation: Activation = nn.ELU,
    flat: bool = False,
) -> nn.Module:
    """As `conv_encoder`, with `blocks` residual blocks after each halving.

    Source: He et al. 2016 (arXiv 1603.05027).

    >>> import torch
    >>> residual_encoder((3, 32, 32), 16)(torch.zeros(5, 3, 32, 32)).shape
    torch.Size([5, 16])
    """
    check_numbers(outputs=outputs, hidden=hidden, blocks=blocks)
    check_sequences(shape=shape, channels=channels)
    return conv_encoder(shape, outputs, channels, hidden, activation, flat, blocks)


def conv_decoder(
    inputs: int,
    shape: Sequence[int],
    channels: Sequence[int] = (64, 32),
    hidden: int = 256,
    activation: Activation = nn.ELU,
    flat: bool = False,
    blocks: int = 0,
) -> nn.Module:
    """A convolutional decoder [..., inputs] -> [..., C, H, W] that doubles the image once for each of `channels`.

    With `flat=True` it gives flattened images [..., C * H * W]. `blocks` residual blocks precede each doubling. A
    likelihood of several parameters a pixel takes a multiple of the image's C. Raises ValueError for a size that
    does not halve.
    Source: Burgess et al. 2018 (arXiv 1804.03599).

    >>> import torch
    >>> conv_decoder(8, (1, 32, 32))(torch.zeros(5, 3, 8)).shape
    torch.Size([5, 3, 1, 32, 32])
    """
    check_numbers(inputs=inputs, hidden=hidden, blocks=blocks)
    check_sequences(shape=shape, channels=channels)
    image, h, w = _halved_shape(shape, channels)
    first = channels[0]
    layers: list[nn.Module] = [
        nn.Linear(inputs, hidden),
        activation(),
        nn.Linear(hidden, first * h * w),
        activation(),
        nn.Unflatten(-1, (first, h, w)),
    ]
    for i, (width_in, width_out) in enumerate(zip(channels, (*channels[1:], image), strict=True)):
        residual = [Residual(width_in, activation) for _ in range(blocks)]
        layers += [*residual, *([activation()] if residual else [])]
        layers.append(nn.ConvTranspose2d(width_in, width_out, 4, stride=2, padding=1))
        layers += [activation()] if i < len(channels) - 1 and not blocks else []
    layers += [nn.Flatten()] if flat else []
    return Leading(glorot(nn.Sequential(*layers)), event_dim=1)


def residual_decoder(
    inputs: int,
    shape: Sequence[int],
    channels: Sequence[int] = (64, 32),
    blocks: int = 1,
    hidden: int = 256,
    activation: Activation = nn.ELU,
    flat: bool = False,
) -> nn.Module:
    """As `conv_decoder`, with `blocks` residual blocks before each doubling.

    Source: He et al. 2016 (arXiv 1603.05027).

    >>> import torch
    >>> residual_decoder(8, (3, 64, 64), channels=(32, 16, 8))(torch.zeros(5, 8)).shape
    torch.Size([5, 3, 64, 64])
    """
    check_numbers(inputs=inputs, hidden=hidden, blocks=blocks)
    check_sequences(shape=shape, channels=channels)
    return conv_decoder(inputs, shape, channels, hidden, activation, flat, blocks)
