"""VAEs of tables with real, count, binary and categorical columns, some values missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from ppvae.errors import DataError, UsageError
from ppvae.errors.ranges import check_numbers, check_sequences
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
        check_numbers(latent=latent, floor=floor)
        check_sequences(hidden=hidden)
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
            encoder.match(x)
        return vae


def table_vae(
    train: Tensor,
    latent: int = 4,
    hidden: tuple[int, ...] = (64,),
    floor: float = 1e-3,
    columns: ColumnSpec | None = None,
) -> TableVAE:
    """A `TableVAE` of a .csv or .parquet file, which standardises real columns itself: log p(x) is that of the file.

    Args:
        train: the training data [N, columns].
        latent: the size of z.
        hidden: the widths of the hidden layers of encoder and decoder.
        floor: the smallest scale of a real column, in the units of the column.
        columns: the kind of each column.

    Raises ValueError for data that are no table.

    >>> pair = table_vae(torch.tensor([[3.0e6, 1.0], [torch.nan, 0.0], [5.0e6, 1.0]]), columns=["real", "binary"])
    >>> pair.likelihood(torch.zeros(4)).mean
    tensor([4.0000e+06, 6.0000e-01], grad_fn=<IndexSelectBackward0>)
    """
    check_numbers(latent=latent, floor=floor)
    check_sequences(hidden=hidden)
    if columns is None:
        raise UsageError("table_vae: expected a table, whose columns have kinds: a .csv or .parquet file")
    pair = TableVAE(columns, latent, hidden, floor)
    with torch.no_grad():
        likelihood: Any = pair.likelihood
        encoder: Any = pair.posterior.net
        encoder.match(train)
        start = marginals(columns, train)
        centre, spread = torch.zeros_like(start), torch.ones_like(start)
        kinds = likelihood.columns
        places = [sum(c.outputs for c in kinds[:d]) for d, column in enumerate(kinds) if column.kind == "real"]
        where = [d for d, column in enumerate(kinds) if column.kind == "real"]
        centre[places], spread[places], start[places] = encoder.centre[where], encoder.spread[where], 0.0
        set_output_bias(likelihood.net, start)
        likelihood.net = ScaledOutput(likelihood.net, centre, spread)
        likelihood.log_scale.copy_(encoder.spread[where].log())
    return pair


class ScaledOutput(nn.Module):
    """A network whose outputs are scaled and shifted, centre + spread net(z)."""

    def __init__(self, net: nn.Module, centre: Tensor, spread: Tensor):
        super().__init__()
        self.net = net
        self.centre, self.spread = nn.Buffer(centre), nn.Buffer(spread)

    def forward(self, z: Tensor) -> Tensor:
        return self.centre + self.spread * self.net(z)


class StandardizedInput(nn.Module):
    """A network of standardised inputs, net((x - centre) / spread)."""

    def __init__(self, columns: int, net: nn.Module):
        super().__init__()
        self.net = net
        self.centre = nn.Buffer(torch.zeros(columns))
        self.spread = nn.Buffer(torch.ones(columns))

    def match(self, x: Tensor) -> None:
        """Sets centre and spread to mean and standard deviation of the observed values."""
        self.centre.copy_(x.nanmean(0))
        self.spread.copy_((x - self.centre).square().nanmean(0).sqrt().clamp(min=1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.centre) / self.spread)
