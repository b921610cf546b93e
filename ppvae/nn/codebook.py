"""Vector quantisation: a codebook of learned vectors, and logits of codes by distance."""

import math

import torch
from torch import Tensor, nn

from ppvae.errors import UsageError
from ppvae.errors.ranges import check_numbers


class Codebook(nn.Module):
    """Learned vectors c_1 .. c_V, looked up by one-hot vectors, end to end: [..., M * V] -> [..., M * size].

    A relaxed one-hot vector gives the weighted mean of the vectors.

    Args:
        codes: V, the number of vectors, initialised by standard normal draws.
        size: the size of each vector.

    Raises ValueError for fewer than two codes.
    Source: van den Oord et al. 2017 (arXiv 1711.00937).

    >>> book = Codebook(3, size=2)
    >>> torch.equal(book(torch.tensor([0.0, 0, 1, 1, 0, 0])), book.table[[2, 0]].flatten())
    True
    """

    def __init__(self, codes: int, size: int):
        check_numbers(codes=codes, size=size)
        super().__init__()
        if codes < 2:
            raise UsageError(f"codes: expected at least 2, found {codes}")
        self.table = nn.Parameter(torch.randn(codes, size))

    def forward(self, z: Tensor) -> Tensor:
        return (z.unflatten(-1, (-1, len(self.table))) @ self.table).flatten(-2)


class Nearness(nn.Module):
    """Logits of codes by squared distance to the codebook, [..., M * size] -> [..., M * V], for M vectors e end to end.

    logit_k = -|e - c_k|^2 / (2 s^2) up to the constant |e|^2 / (2 s^2). As s -> 0 the nearest code gets all of the
    probability.

    Args:
        codebook: the vectors c_1 .. c_V.
        scale: the initial value of the learned s.

    Raises ValueError for a scale that is not positive.
    Source: Takida et al. 2022, SQ-VAE (arXiv 2205.07547), section 3.

    >>> Nearness(Codebook(3, size=2))(torch.zeros(5, 4 * 2)).shape
    torch.Size([5, 12])
    """

    def __init__(self, codebook: Codebook, scale: float = 1.0):
        check_numbers(scale=scale)
        super().__init__()
        self.codebook, self.log_scale = codebook, nn.Parameter(torch.tensor(math.log(scale)))

    def forward(self, e: Tensor) -> Tensor:
        table = self.codebook.table
        near = e.unflatten(-1, (-1, table.shape[1])) @ table.T - table.square().sum(-1) / 2
        return (near * (-2 * self.log_scale).exp()).flatten(-2)
