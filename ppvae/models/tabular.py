"""VAEs of tables with real, count, binary and categorical columns, some values missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from ppvae.errors import DataError
from ppvae.likelihoods import Mixed
from ppvae.likelihoods.tabular import ColumnSpec, marginals, table_outputs
from ppvae.models.vae import VAE
from ppvae.nn import Missing, mlp, set_output_bias
from ppvae.posteriors import DiagonalNormal
from ppvae.priors import StandardNormal


@final
class TableVAE(VAE):
    """p(x_o) = int p(z) prod_(d in o) p(x_d | z) dz over the observed values x_o of a row, with guide q(z | x_o).

    The `VAE` of `likelihoods.Mixed` and a normal posterior whose network takes standardised values with 0 for missing
    ones, and the mask (`nn.Missing`). Data are [batch, columns] with NaN for missing values, marked by
    `data.with_missing`; log p(x) is that of the observed values, and `evaluation.impute` imputes the others.

    Args:
        columns: "real", "count", "binary", ("categorical", levels), in the order of the data. Standardise real ones.
        latent: the size of z.
        hidden: the widths of the hidden layers of encoder and decoder.
        floor: the smallest scale of a real column.

    `TableVAE.from_data` initialises at the marginals of the columns. A value outside the support of its column raises
    DataError by row and column, and so does a row without observed values.
    Source: Nazabal et al. 2020 (arXiv 1807.03653); Mattei and Frellsen 2019 (arXiv 1812.02633) for `objectives.IWAE`.

    >>> pair = TableVAE(["real", "count", ("categorical", 3)], latent=2)
    >>> pair.guide(torch.tensor([[0.5, torch.nan, 2.0], [torch.nan, 4.0, torch.nan]])).shape
    torch.Size([2, 2])
    """

    def __init__(self, columns: ColumnSpec, latent: int = 4, hidden: Sequence[int] = (32,), floor: float = 1e-2):
        decoder = mlp(latent, table_outputs(columns), hidden=hidden)
        encoder = StandardizedInput(len(columns), Missing(mlp(2 * len(columns), 2 * latent, hidden=hidden)))
        super().__init__(StandardNormal(latent), Mixed(decoder, columns, floor=floor), DiagonalNormal(encoder))

    @classmethod
    def from_data(cls, x: Tensor, columns: ColumnSpec, **options: Any) -> TableVAE:
        """A VAE whose decoder starts at the marginals of the observed values, and whose encoder standardises them.

        `options` are those of the class. Raises DataError for data of another size, by the column for one without
        observed values, and by row and column for a value outside the support.

        >>> pair = TableVAE.from_data(torch.tensor([[3.0, 1.0], [torch.nan, 0.0], [5.0, 1.0]]), ["count", "binary"])
        >>> pair.posterior.net.centre
        tensor([4.0000, 0.6667])
        """
        vae = cls(columns, **options)
        with torch.no_grad():
            likelihood: Any = vae.likelihood
            start = marginals(columns, x)
            support = likelihood(torch.zeros(len(x), vae.prior().event_shape[0])).support
            wrong = (~support.base_constraint.check(x)).nonzero().tolist()
            if wrong:
                row, column = wrong[0]
                kind = likelihood.columns[column].kind
                raise DataError(
                    f"column {column}: expected values of a {kind} column, found {x[row, column].item():g} at row {row}"
                )
            set_output_bias(likelihood.net, start)
            encoder: Any = vae.posterior.net
            encoder.centre.copy_(x.nanmean(0))
            encoder.spread.copy_((x - encoder.centre).square().nanmean(0).sqrt().clamp(min=1e-6))
        return vae


class StandardizedInput(nn.Module):
    """A network of standardised inputs, net((x - centre) / spread)."""

    def __init__(self, columns: int, net: nn.Module):
        super().__init__()
        self.net = net
        self.centre = nn.Buffer(torch.zeros(columns))
        self.spread = nn.Buffer(torch.ones(columns))

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.centre) / self.spread)
