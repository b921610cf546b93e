"""Multi-scale image networks for hierarchical VAEs; features are vectors, [channels * side^2]."""

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from ppvae.errors import UsageError
from ppvae.errors.ranges import SIZE, check_numbers, check_sequences
from ppvae.nn.conv import Activation, Leading, Residual
from ppvae.nn.dense import glorot


class Added(nn.Module):
    """The residual update of features h by a latent, (h, z) -> then(h + net(z)), over any leading dims.

    Source: Child 2021 (arXiv 2011.10650).

    >>> import torch
    >>> Added(nn.Linear(2, 4))(torch.zeros(5, 4), torch.zeros(3, 5, 2)).shape
    torch.Size([3, 5, 4])
    """

    def __init__(self, net: nn.Module, then: nn.Module | None = None):
        super().__init__()
        self.net, self.then = net, nn.Identity() if then is None else then

    def forward(self, h: Tensor, z: Tensor) -> Tensor:
        return self.then(h + self.net(z))


def on_images(channels: int, side: int, *layers: nn.Module) -> nn.Module:
    """Layers on images [N, channels, side, side] as a network of vectors [..., channels * side^2], Glorot-initialised.

    >>> import torch
    >>> on_images(4, 8, nn.Conv2d(4, 2, 1))(torch.zeros(5, 3, 4 * 64)).shape
    torch.Size([5, 3, 128])
    """
    check_numbers(channels=channels, side=side)
    net = nn.Sequential(nn.Unflatten(-1, (channels, side, side)), *layers, nn.Flatten(1))
    return Leading(glorot(net), event_dim=1)


class Pyramid(nn.Module):
    """A multi-scale encoder of images [..., C, side, side]: features at each size, from the smallest to the largest.

    Each size has `blocks` residual blocks; a strided convolution leads to the next smaller size.

    Args:
        channels: C.
        width: the channels of the features.
        sides: the sides of the features, ascending, the last that of the data.
        times: how often the features of each size are repeated.

    Returns a list of features [..., width * s^2]. Raises ValueError where a side does not divide the next.
    Source: Child 2021 (arXiv 2011.10650).

    >>> import torch
    >>> features = Pyramid(3, width=8, sides=(1, 4, 16), times=(1, 2, 1))(torch.zeros(5, 3, 16, 16))
    >>> [e.shape[-1] for e in features]
    [8, 128, 128, 2048]
    """

    def __init__(
        self, channels: int, width: int, sides: Sequence[int], times: Sequence[int], blocks: int = 1,
        activation: Activation = nn.GELU,
    ):  # fmt: skip
        check_numbers(channels=channels, blocks=blocks)
        SIZE.check_number("width", width)
        check_sequences(sides=sides, times=times)
        if not sides or len(times) != len(sides):
            raise UsageError(f"sides, times: expected as many numbers of both, found {len(sides)} and {len(times)}")
        super().__init__()
        for small, large in itertools.pairwise(sides):
            if large % small:
                raise UsageError(f"sides: expected each to divide the next, found {small} before {large}")
        self.times = tuple(times)
        stages = []
        for side, smaller in zip(sides[::-1], (None, *sides[::-1]), strict=False):
            first = nn.Conv2d(channels, width, 3, padding=1)
            if smaller is not None:
                first = nn.Conv2d(width, width, smaller // side, stride=smaller // side)
            stages.append(glorot(nn.Sequential(first, *(Residual(width, activation) for _ in range(blocks)))))
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        lead, features = x.shape[:-3], []
        h = x.reshape(-1, *x.shape[-3:])
        for stage in self.stages:
            h = stage(h)
            features.append(h.reshape(*lead, -1))
        return [e for e, times in zip(reversed(features), self.times, strict=True) for _ in range(times)]
