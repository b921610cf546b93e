"""Multilayer perceptrons over the last dim, initialisation, and layers for counts and missing values."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from ppvae.errors import UsageError
from ppvae.errors.ranges import check_numbers, check_sequences

Network = TypeVar("Network", bound=nn.Module)


def mlp(
    inputs: int, outputs: int, hidden: Sequence[int] = (200, 200), activation: Callable[[], nn.Module] = nn.Tanh
) -> nn.Sequential:
    """A multilayer perceptron [..., inputs] -> [..., outputs], Glorot-initialised.

    Source: Glorot and Bengio 2010, Understanding the difficulty of training deep feedforward neural networks.

    >>> mlp(64, 16, hidden=(200,))(torch.zeros(5, 3, 64)).shape
    torch.Size([5, 3, 16])
    """
    check_numbers(inputs=inputs, outputs=outputs)
    check_sequences(hidden=hidden)
    layers: list[nn.Module] = []
    for width_in, width_out in zip((inputs, *hidden), (*hidden, outputs), strict=True):
        layers += [nn.Linear(width_in, width_out), activation()]
    return glorot(nn.Sequential(*layers[:-1]))


class Gated(nn.Module):
    """A gated dense layer [..., inputs] -> [..., outputs], y = (A x + a) sigmoid(B x + b).

    Source: Dauphin et al. 2017 (arXiv 1612.08083); Tomczak and Welling 2018 (arXiv 1705.07120) in VAEs.

    >>> Gated(4, 5)(torch.zeros(3, 4)).shape
    torch.Size([3, 5])
    """

    def __init__(self, inputs: int, outputs: int):
        check_numbers(inputs=inputs, outputs=outputs)
        super().__init__()
        self.value, self.gate = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.value(x) * torch.sigmoid(self.gate(x))


def gated_mlp(inputs: int, outputs: int, hidden: Sequence[int] = (300, 300)) -> nn.Sequential:
    """A multilayer perceptron [..., inputs] -> [..., outputs] of gated hidden layers and a linear last one.

    Source: Dauphin et al. 2017 (arXiv 1612.08083); in VAEs, Tomczak and Welling 2018 (arXiv 1705.07120).

    >>> gated_mlp(64, 16)(torch.zeros(5, 3, 64)).shape
    torch.Size([5, 3, 16])
    """
    check_numbers(inputs=inputs, outputs=outputs)
    check_sequences(hidden=hidden)
    layers = [Gated(a, b) for a, b in zip((inputs, *hidden[:-1]), hidden, strict=True)] if hidden else []
    return glorot(nn.Sequential(*layers, nn.Linear((inputs, *hidden)[-1], outputs)))


def glorot(network: Network) -> Network:
    """Draws weights uniform within sqrt(6 / (fan in + fan out)), sets biases to zero, and returns the network.

    Source: Glorot and Bengio 2010, Understanding the difficulty of training deep feedforward neural networks.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return network


class Log1p(nn.Module):
    """log(1 + x), which compresses the range of counts for a network.

    Source: Lopez et al. 2018, Deep generative modeling for single-cell transcriptomics.

    >>> Log1p()(torch.tensor([0.0, 99.0])).round()
    tensor([0., 5.])
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.log1p()


class Missing(nn.Module):
    """A network of rows with missing values (NaN), [..., D] -> net([..., 2 D]): values with 0 for NaN, then the mask.

    Source: Nazabal et al. 2020 (arXiv 1807.03653), who impute zeros; Ma et al. 2019 (arXiv 1809.11142), who add the
    mask.

    >>> Missing(torch.nn.Identity())(torch.tensor([3.0, torch.nan]))
    tensor([3., 0., 1., 0.])
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        known = ~x.isnan()
        return self.net(torch.cat([torch.where(known, x, 0.0), known.to(x.dtype)], -1))


def set_output_bias(network: nn.Module, value: Tensor) -> None:
    """Sets the bias of the network's last linear or convolutional layer, for example to the logits of the mean image.

    Raises:
        ValueError: the network has no such layer, or its size differs.

    >>> net = mlp(2, 3, hidden=())
    >>> set_output_bias(net, torch.arange(3.0)); net(torch.zeros(2)).tolist()
    [0.0, 1.0, 2.0]
    """
    layers = [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)]
    bias = layers[-1].bias if layers else None
    if bias is None:
        raise UsageError("network: expected a last linear layer with a bias, found none")
    if bias.numel() != value.numel():
        raise UsageError(f"value: expected {bias.numel()} numbers for the last layer's bias, found {value.numel()}")
    with torch.no_grad():
        bias.copy_(value.reshape(bias.shape))
