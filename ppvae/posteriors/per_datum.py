"""Variational parameters of every datum by itself, looked up by its index."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae.errors import DataError
from ppvae.posteriors.normal import DiagonalNormal


@final
class PerDatum(nn.Module):
    """Classical, not amortised inference: datum i has its own variational parameters, row i of a table.

    q(z_i) = family's distribution for table[i]; by default N(z_i; loc_i, diag(exp(log_scale_i))^2). The batch is (x,
    index), as `data.indexed(x)` makes it, and the index arrives as `context`. An index alone cannot tell one data set
    from another: each row remembers a number made of the datum that it was last trained on, a sum over x with fixed
    weights, in a buffer that is saved with the parameters, and other data under the same index are refused. Values that
    are redrawn at every read (binarize="dynamic") are other data each time.

    Args:
        size: the number of data.
        outputs: parameters of each, as the family's network has outputs: 2 * latent for `DiagonalNormal`.
        family: a posterior as a function of its network; the table takes the network's place.

    Returns batch shape [batch], event shape [latent]. Locations and log-scales start near zero.
    Raises DataError for an index that the table does not have or that is no integer, and for data that it was not
    trained on; `fit` refuses validation data by UsageError.
    Source: Hoffman et al. 2013, Stochastic variational inference (arXiv 1206.7051); Cremer et al. 2018 (arXiv
    1801.03558) for what amortisation costs.

    >>> from ppvae import data
    >>> posterior = PerDatum(size=100, outputs=2 * 8)
    >>> x, index = data.indexed(torch.zeros(5, 64))
    >>> posterior(x, context=index).shape()
    torch.Size([5, 8])
    """

    requires_training_data = True  # `fit` asks, before it takes data for validation
    seen: Tensor

    def __init__(self, size: int, outputs: int, family: Callable[[nn.Module], nn.Module] = DiagonalNormal):
        super().__init__()
        table = nn.Embedding(size, outputs)
        nn.init.normal_(table.weight, std=0.01)
        self.posterior = family(table)
        self.size = size
        self.register_buffer("seen", torch.zeros(size, dtype=torch.long))  # a float64's bits, which no cast changes

    def forward(self, x: Tensor, *, context: Tensor) -> dist.TorchDistribution:
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
        self._record_or_verify(x, context, torch.is_grad_enabled())
        return self.posterior(context)

    @torch.no_grad()
    def _record_or_verify(self, x: Tensor, index: Tensor, gradients: bool) -> None:
        """Notes the data in training and refuses others elsewhere; data of zeros stand in for any, and are taken."""
        values = x.reshape(*index.shape, -1).nan_to_num().float().double()  # alike in every precision
        weights = torch.arange(1.0, values.shape[-1] + 1, dtype=values.dtype, device=values.device).square().cos()
        found = (values * weights).sum(-1)
        if self.training and gradients:
            self.seen[index] = found.view(torch.long)
            return
        known, near = self.seen[index].view(torch.float64), 1e-9 * (1 + values.abs().sum(-1))
        other = (known != 0) & (found != 0) & ((known - found).abs() > near)
        if bool(other.any()):
            raise DataError(
                f"PerDatum: expected the data it was trained on, found another datum at index {int(index[other][0])}. "
                f"Its parameters say nothing of new data. Refit: train a new PerDatum of the new data's size with the "
                f"model's parameters held fixed"
            )
