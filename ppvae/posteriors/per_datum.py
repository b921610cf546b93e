"""Variational parameters of every datum by itself, looked up by its index."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import pyro.distributions as dist
from torch import Tensor, nn

from ppvae.errors import DataError
from ppvae.posteriors.normal import DiagonalNormal


@final
class PerDatum(nn.Module):
    """Classical, not amortised inference: datum i has its own variational parameters, row i of a table.

    q(z_i) = family's distribution for table[i]; by default N(z_i; loc_i, diag(exp(log_scale_i))^2). The batch is (x,
    index), as `data.indexed(x)` makes it, and the index arrives as `context`; x itself is not read. An index says which
    row, and it is the caller's to pair it with that row's data.

    Args:
        size: the number of data.
        outputs: parameters of each, as the family's network has outputs: 2 * latent for `DiagonalNormal`.
        family: a posterior as a function of its network; the table takes the network's place.

    Returns batch shape [batch], event shape [latent]. Locations and log-scales start near zero.
    Raises DataError for an index that the table does not have, or that is no integer.
    Source: Hoffman et al. 2013, Stochastic variational inference (arXiv 1206.7051); Cremer et al. 2018 (arXiv
    1801.03558) for what amortisation costs.

    >>> import torch
    >>> from ppvae import data
    >>> posterior = PerDatum(size=100, outputs=2 * 8)
    >>> x, index = data.indexed(torch.zeros(5, 64))
    >>> posterior(x, context=index).shape()
    torch.Size([5, 8])
    """

    def __init__(self, size: int, outputs: int, family: Callable[[nn.Module], nn.Module] = DiagonalNormal):
        super().__init__()
        table = nn.Embedding(size, outputs)
        nn.init.normal_(table.weight, std=0.01)
        self.posterior = family(table)
        self.size = size

    def forward(self, x: Any, *, context: Tensor) -> dist.TorchDistribution:
        if context.is_floating_point() or context.is_complex():
            raise DataError(
                f"PerDatum: expected the index of each datum as the batch's second tensor, found {context.dtype}. "
                f"Pass data.indexed(x)"
            )
        outside = (context < 0) | (context >= self.size)
        if bool(outside.any()):
            raise DataError(
                f"PerDatum: expected an index from 0 to {self.size - 1}, of the {self.size} data it has seen, found "
                f"{int(context[outside][0])}. Refit: train a new PerDatum of the new data's size with the model's "
                f"parameters held fixed"
            )
        return self.posterior(context)
