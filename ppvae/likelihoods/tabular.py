"""A likelihood of rows of a table: real, count, binary and categorical columns, some values missing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae import distributions
from ppvae.errors import DataError, UsageError, count_of
from ppvae.errors.ranges import check_numbers

Kind = Literal["real", "count", "binary", "categorical"]


@dataclass(frozen=True)
class Column:
    """A column of a table: its kind, and the number of levels of a categorical one (values 0 ... levels - 1).

    Raises ValueError for another kind, or for a categorical column without levels.

    >>> Column("categorical", 5).outputs
    5
    """

    kind: Kind
    levels: int = 0

    def __post_init__(self) -> None:
        kinds = ("real", "count", "binary", "categorical")
        if self.kind not in kinds:
            raise UsageError(f"column: expected one of {', '.join(kinds)}, found {self.kind!r}")
        if self.kind == "categorical":
            check_numbers(levels=self.levels)
        elif self.levels != 0:
            raise UsageError(f"levels: expected 0 for a column that is not categorical, found {self.levels!r}")

    @property
    def outputs(self) -> int:
        return self.levels if self.kind == "categorical" else 1


ColumnSpec = Sequence[Column | Kind | tuple[Kind, int]]


def parse_columns(columns: ColumnSpec) -> tuple[Column, ...]:
    """Columns from the short forms "real", ("categorical", 5).

    >>> parse_columns(["real", ("categorical", 5)])
    (Column(kind='real', levels=0), Column(kind='categorical', levels=5))
    """
    if isinstance(columns, str) or not isinstance(columns, Sequence) or not columns:
        raise UsageError(f"columns: expected a sequence of kinds, as ['real', ('categorical', 5)], found {columns!r}")
    return tuple(
        c if isinstance(c, Column) else Column(*c) if isinstance(c, tuple) else Column(c) for c in columns
    )  # fmt: skip


def table_outputs(columns: ColumnSpec) -> int:
    """The number of network outputs that `Mixed` reads for these columns.

    >>> table_outputs(["real", "count", ("categorical", 5)])
    7
    """
    return sum(c.outputs for c in parse_columns(columns))


def marginals(columns: ColumnSpec, x: Tensor) -> Tensor:
    """The outputs at which `Mixed` matches the marginals of observed values [N, columns], to initialise the bias.

    The mean of a real column, the log-mean of a count, log-odds and log-frequencies of codes (add-one smoothed),
    [table_outputs]. Raises DataError for data of another size, and for a column without observed values.

    >>> marginals(["real", ("categorical", 2)], torch.tensor([[1.0, 0.0], [3.0, torch.nan]])).exp()
    tensor([7.3891, 2.0000, 1.0000])
    """
    kinds = parse_columns(columns)
    if x.dim() != 2 or x.shape[1] != len(kinds):
        raise DataError(
            f"x: expected rows [N, {len(kinds)}] of {count_of(len(kinds), 'column')}, found {list(x.shape)}"
        )
    out: list[Tensor] = []
    for d, (column, values) in enumerate(zip(kinds, x.T, strict=True)):
        values = values[~values.isnan()]
        if not len(values):
            raise DataError(f"column {d}: expected observed values, found none")
        if column.kind == "real":
            out.append(values.mean()[None])
        elif column.kind == "count":
            out.append(values.mean()[None].clamp(min=1 / len(values)).log())
        elif column.kind == "binary":
            out.append(((values.sum()[None] + 1) / (len(values) + 2)).logit())
        else:
            out.append(torch.stack([(values == k).sum() + 1 for k in range(column.levels)]).log().to(values))
    return torch.cat(out)


class Mixed(nn.Module):
    """Independent columns of different kinds, log p(x | z) = sum of log p(x_d | z) over the columns that are not NaN.

    Real columns are normal with a learned scale each, counts Poisson, binary columns Bernoulli, categorical ones have a
    logit for each level. NaN marks a missing value, which is marginalised exactly: log p(x) is that of the observed
    values, assuming values missing at random. The network of the posterior must take NaN, as `nn.Missing` does.

    Args:
        net: maps [..., latent] to [..., table_outputs(columns)], column after column: location of a real one, log-rate
            of a count, logit of a binary one, `levels` logits of a categorical one.
        columns: "real", "count", "binary", ("categorical", levels), or `Column`s, in the order of the data.
        floor: the smallest scale of a real column, see `Normal`; standardise real columns.

    Returns batch shape [...], event shape [columns]; in nats, relative to lengths times counts. Raises ValueError for
    an unknown column, or an output of the wrong size.
    Source: Nazabal et al. 2020 (arXiv 1807.03653).

    >>> from ppvae.nn import mlp
    >>> columns = ["real", "count", "binary", ("categorical", 5)]
    >>> fn = Mixed(mlp(8, table_outputs(columns)), columns)(torch.zeros(3, 8))
    >>> fn.log_prob(torch.tensor([torch.nan, torch.nan, 1.0, 4.0]).expand(3, 4)).shape
    torch.Size([3])
    """

    def __init__(self, net: nn.Module, columns: ColumnSpec, floor: float = 1e-3):
        check_numbers(floor=floor)
        super().__init__()
        self.net, self.columns, self.floor = net, parse_columns(columns), floor
        start = [0]
        for column in self.columns:
            start.append(start[-1] + column.outputs)
        self.outputs = start.pop()
        self._kinds = sorted(set(self.columns), key=self.columns.index)
        for i, kind in enumerate(self._kinds):
            where = [d for d, c in enumerate(self.columns) if c == kind]
            places = [[start[d] + k for k in range(kind.outputs)] for d in where]
            self.register_buffer(f"_where{i}", torch.tensor(where), persistent=False)
            self.register_buffer(f"_places{i}", torch.tensor(places).flatten(), persistent=False)
        self.log_scale = nn.Parameter(torch.zeros(sum(c.kind == "real" for c in self.columns)))

    @property
    def at_floor(self) -> Tensor:
        """Which scales of real columns have reached the floor, [real columns]."""
        return self.log_scale.exp() <= 1.01 * self.floor

    def output_shape(self, event: Sequence[int]) -> tuple[int, ...]:
        return (self.outputs,)

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        out = self.net(z)
        if out.shape != (*z.shape[:-1], self.outputs):
            raise ValueError(
                f"net: expected [..., {self.outputs}] for {count_of(len(self.columns), 'column')}, found {out.shape}"
            )
        groups = []
        for i, kind in enumerate(self._kinds):
            value = out.index_select(-1, getattr(self, f"_places{i}"))
            groups.append((getattr(self, f"_where{i}"), self._column_distribution(kind, value)))
        return distributions.Columns(groups)

    def _column_distribution(self, column: Column, value: Tensor) -> dist.TorchDistribution:
        if column.kind == "real":
            return dist.Normal(value, (self.log_scale.exp() + self.floor).expand(value.shape))
        if column.kind == "count":
            return distributions.Poisson(value)
        if column.kind == "binary":
            return distributions.Bernoulli(logits=value)
        return distributions.Levels(value.unflatten(-1, (-1, column.levels)), top=column.levels - 1)
