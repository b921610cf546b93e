"""Networks over any leading dims: [..., *event in] -> [..., *event out]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def mlp(
    inputs: int, outputs: int, hidden: Sequence[int] = (200, 200), activation: Callable[[], nn.Module] = nn.Tanh
) -> nn.Sequential:
    """A multilayer perceptron [..., inputs] -> [..., outputs], Glorot-initialised (Glorot and Bengio 2010).

    >>> mlp(64, 16, hidden=(200,))(torch.zeros(5, 3, 64)).shape
    torch.Size([5, 3, 16])
    """
    layers: list[nn.Module] = []
    for width_in, width_out in zip((inputs, *hidden), (*hidden, outputs), strict=True):
        layers += [nn.Linear(width_in, width_out), activation()]
    return glorot(nn.Sequential(*layers[:-1]))


def glorot(network: Network) -> Network:
    """Draws weights uniform within sqrt(6 / (fan in + fan out)), sets biases to zero, and returns the network."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return network


class Leading(nn.Module):
    """Lets a network that takes one batch dim take any number of leading dims: [..., *event] -> [..., *out].

    >>> Leading(nn.Conv2d(1, 4, 3), event_dim=3)(torch.zeros(5, 2, 1, 8, 8)).shape
    torch.Size([5, 2, 4, 6, 6])
    """

    def __init__(self, network: nn.Module, event_dim: int):
        super().__init__()
        self.network, self.event_dim = network, event_dim

    def forward(self, x: Tensor) -> Tensor:
        lead, event = x.shape[: -self.event_dim], x.shape[-self.event_dim :]
        out = self.network(x.reshape(-1, *event))
        return out.reshape(*lead, *out.shape[1:])


def _sizes(shape: Sequence[int]) -> tuple[int, int, int]:
    channels, height, width = shape
    if height % 4 or width % 4:
        raise ValueError(f"shape: expected height and width divisible by 4 (28x28, 32x32), found {tuple(shape)}")
    return channels, height // 4, width // 4


def conv_encoder(
    shape: Sequence[int],
    outputs: int,
    channels: Sequence[int] = (32, 64),
    hidden: int = 256,
    activation: Callable[[], nn.Module] = nn.ELU,
    flat: bool = False,
) -> nn.Module:
    """A convolutional encoder [..., C, H, W] -> [..., outputs] that halves the image twice.

    With `flat=True` it takes flattened images [..., C * H * W].

    >>> conv_encoder((1, 28, 28), 16)(torch.zeros(5, 3, 1, 28, 28)).shape
    torch.Size([5, 3, 16])
    """
    c, h, w = _sizes(shape)
    first, second = channels
    layers = [
        *([nn.Unflatten(-1, tuple(shape))] if flat else []),
        nn.Conv2d(c, first, 4, stride=2, padding=1),
        activation(),
        nn.Conv2d(first, second, 4, stride=2, padding=1),
        activation(),
        nn.Flatten(),
        nn.Linear(second * h * w, hidden),
        activation(),
        nn.Linear(hidden, outputs),
    ]
    return Leading(glorot(nn.Sequential(*layers)), event_dim=1 if flat else 3)


def conv_decoder(
    inputs: int,
    shape: Sequence[int],
    channels: Sequence[int] = (64, 32),
    hidden: int = 256,
    activation: Callable[[], nn.Module] = nn.ELU,
    flat: bool = False,
) -> nn.Module:
    """A convolutional decoder [..., inputs] -> [..., C, H, W] that doubles the image twice.

    With `flat=True` it gives flattened images [..., C * H * W].

    >>> conv_decoder(8, (1, 32, 32))(torch.zeros(5, 3, 8)).shape
    torch.Size([5, 3, 1, 32, 32])
    """
    c, h, w = _sizes(shape)
    first, second = channels
    layers = [
        nn.Linear(inputs, hidden),
        activation(),
        nn.Linear(hidden, first * h * w),
        activation(),
        nn.Unflatten(-1, (first, h, w)),
        nn.ConvTranspose2d(first, second, 4, stride=2, padding=1),
        activation(),
        nn.ConvTranspose2d(second, c, 4, stride=2, padding=1),
        *([nn.Flatten()] if flat else []),
    ]
    return Leading(glorot(nn.Sequential(*layers)), event_dim=1)


def set_output_bias(network: nn.Module, value: Tensor) -> None:
    """Sets the bias of the network's last linear layer, for example to the logits of the mean image.

    Raises:
        ValueError: the network has no such layer, or its size differs.

    >>> net = mlp(2, 3, hidden=())
    >>> set_output_bias(net, torch.arange(3.0)); net(torch.zeros(2)).tolist()
    [0.0, 1.0, 2.0]
    """
    layers = [m for m in network.modules() if isinstance(m, nn.Linear | nn.ConvTranspose2d)]
    bias = layers[-1].bias if layers else None
    if bias is None:
        raise ValueError("network: expected a last linear layer with a bias, found none")
    if bias.numel() != value.numel():
        raise ValueError(f"value: expected {bias.numel()} numbers for the last layer's bias, found {value.numel()}")
    with torch.no_grad():
        bias.copy_(value.reshape(bias.shape))
