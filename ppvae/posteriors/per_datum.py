"""Non-amortised inference: variational parameters for each datum, looked up by its index."""

from collections.abc import Callable
from typing import final

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae.errors import DataError
from ppvae.errors.ranges import check_numbers
from ppvae.posteriors.normal import DiagonalNormal


@final
class PerDatum(nn.Module):
    """Non-amortised variational inference: datum i has its own variational parameters, row i of a table.

    q(z_i) = family's distribution for table[i]; by default N(z_i; loc_i, diag(exp(log_scale_i))^2). The batch is (x,
    index), see `data.indexed`, and the index is the `context`. An index does not identify a data set: each row stores a
    checksum of the datum that it was last trained on, a sum over x with fixed weights, in a buffer that is saved with
    the parameters, and other data under the same index are refused. Values redrawn at every read (binarize="dynamic")
    are other data each time.

    Args:
        size: the number of data.
        outputs: the parameters of each datum, the network outputs of the family: 2 * latent for `DiagonalNormal`.
        family: a posterior as a function of its network, which the table replaces.

    Returns batch shape [batch], event shape [latent]. Locations and log-scales start near zero.
    Raises DataError for an index outside the table or not an integer, and for data that it was not trained on; `fit`
    refuses validation data by UsageError.
    Source: Hoffman et al. 2013, Stochastic variational inference (arXiv 1206.7051); Cremer et al. 2018 (arXiv
    1801.03558) for what amortisation costs.

    >>> from ppvae import data
    >>> posterior = PerDatum(size=100, outputs=2 * 8)
    >>> x, index = data.indexed(torch.zeros(5, 64))
    >>> posterior(x, context=index).shape()
    torch.Size([5, 8])
    """

    requires_training_data = True  # `fit` reads it before it accepts validation data

    def __init__(self, size: int, outputs: int, family: Callable[[nn.Module], nn.Module] = DiagonalNormal):
        check_numbers(size=size, outputs=outputs)
        super().__init__()
        table = nn.Embedding(size, outputs)
        nn.init.normal_(table.weight, std=0.01)
        self.posterior = family(table)
        self.size = size
        self.seen = nn.Buffer(torch.zeros(size, dtype=torch.long))  # float64 bits, which casts leave alone

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
        """Records checksums in training, verifies them otherwise; data of zeros are accepted as a stand-in for any."""
        values = x.reshape(*index.shape, -1).nan_to_num().float().double()  # the same in every precision
        weights = torch.arange(1.0, values.shape[-1] + 1, dtype=values.dtype, device=values.device).square().cos()
        checksum = (values * weights).sum(-1)
        if self.training and gradients:
            self.seen[index] = checksum.view(torch.long)
            return
        recorded, tolerance = self.seen[index].view(torch.float64), 1e-9 * (1 + values.abs().sum(-1))
        changed = (recorded != 0) & (checksum != 0) & ((recorded - checksum).abs() > tolerance)
        if bool(changed.any()):
            raise DataError(
                "PerDatum: expected the data it was trained on, found another datum at index "
                f"{int(index[changed][0])}. Its parameters say nothing of new data. Refit: train a new PerDatum of the "
                f"new data's size with the model's parameters held fixed"
            )
