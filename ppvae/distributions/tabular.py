"""Rows of a table: columns with different distributions, some values missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from ppvae.distributions.batch_shape import ParametricDistribution, expand_parameters
from ppvae.distributions.discretized import Levels

ColumnGroup = tuple[Tensor, TorchDistribution]  # positions [n] of columns, their distribution of batch [*batch, n]


class Columns(ParametricDistribution):
    """Independent columns of different kinds, log p(x) = sum of log p_d(x_d) over the columns d that are not NaN.

    NaN marks a missing value. As columns are independent, omitting its term marginalises it exactly. Samples are
    complete. Raises ValueError for a value outside the support of its column, where validation is on.

    Args:
        groups: (positions [n], distribution of batch shape [*batch, n] and event shape []), one for each kind of
            column.

    >>> from pyro.distributions import Normal
    >>> reals, labels = Normal(torch.zeros(2), 1.0), Levels(torch.zeros(1, 4), top=3)
    >>> fn = Columns([(torch.tensor([0, 2]), reals), (torch.tensor([1]), labels)])
    >>> fn.log_prob(torch.tensor([[0.0, 2.0, 0.0], [0.0, torch.nan, torch.nan]]))
    tensor([-3.2242, -0.9189])
    """

    def __init__(self, groups: Sequence[ColumnGroup], validate_args: bool | None = None):
        self.groups = list(groups)
        shape = torch.broadcast_shapes(*(fn.batch_shape[:-1] for _, fn in self.groups))
        super().__init__(shape, torch.Size([sum(len(i) for i, _ in self.groups)]), validate_args=validate_args)

    @constraints.dependent_property(event_dim=1)
    def support(self) -> Any:
        return constraints.independent(_ColumnSupports(self.groups), 1)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Columns:
        new = expand_parameters(self, batch_shape)
        new.groups = [(i, fn.expand(torch.Size((*batch_shape, len(i))))) for i, fn in self.groups]
        return new

    @property
    def mean(self) -> Tensor:
        """The mean of each column; NaN for category codes, as for torch's Categorical."""
        nan = torch.tensor(torch.nan)
        return self._merge_columns([
            nan.to(fn.logits).expand(fn.batch_shape) if isinstance(fn, Levels) else fn.mean for _, fn in self.groups
        ])  # fmt: skip

    @property
    def variance(self) -> Tensor:
        """The variance of each column; NaN for category codes."""
        nan = torch.tensor(torch.nan)
        return self._merge_columns([
            nan.to(fn.logits).expand(fn.batch_shape) if isinstance(fn, Levels) else fn.variance for _, fn in self.groups
        ])  # fmt: skip

    @property
    def mode(self) -> Tensor:
        """The mode of each column."""
        return self._merge_columns([fn.mode for _, fn in self.groups])

    @property
    def probs(self) -> Tensor:
        """The masses of the codes of each column, [*batch, D, levels of the largest], NaN in other columns."""
        most = max((fn.logits.shape[-1] for _, fn in self.groups if isinstance(fn, Levels)), default=0)
        dtype = next(p.dtype for _, fn in self.groups for p in vars(fn).values() if isinstance(p, Tensor))
        device = self.groups[0][0].device
        out = torch.full((*self.batch_shape, *self.event_shape, most), torch.nan, dtype=dtype, device=device)
        for index, fn in self.groups:
            if isinstance(fn, Levels):
                more = most - fn.logits.shape[-1]
                out[..., index, :] = torch.nn.functional.pad(fn.probs, (0, more)).expand(*self.batch_shape, -1, -1)
        return out

    def _log_prob(self, value: Tensor) -> Tensor:
        missing = value.isnan()
        filled = torch.where(missing, 0.0, value)  # 0 is in the support of every kind of column
        total: Tensor | None = None
        for index, fn in self.groups:
            log_prob = fn.log_prob(filled.index_select(-1, index))
            part = torch.where(missing.index_select(-1, index), 0.0, log_prob).sum(-1)
            total = part if total is None else total + part
        assert total is not None
        return total

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return self._merge_columns([fn.sample(torch.Size(sample_shape)) for _, fn in self.groups])

    def _merge_columns(self, parts: Sequence[Tensor]) -> Tensor:
        """Concatenates values of the groups [..., n] in the order of the columns."""
        order = torch.cat([index for index, _ in self.groups]).argsort()
        lead = torch.broadcast_shapes(*(p.shape[:-1] for p in parts))
        return torch.cat([p.expand(*lead, p.shape[-1]) for p in parts], -1).index_select(-1, order)


class _ColumnSupports(Constraint):
    """Elements of a row [..., D] that are NaN or in the support of their column."""

    cure = "Leave NaN where a value is missing, or give the column another kind"

    def __init__(self, groups: Sequence[ColumnGroup]):
        self.groups = groups
        super().__init__()

    @property
    def cseq(self) -> list[Any]:
        """The supports of the groups; the attribute has the name that torch's `constraints.cat` uses."""
        return [fn.support for _, fn in self.groups]

    @property
    def is_discrete(self) -> bool:  # type: ignore[override]
        return all(support.is_discrete for support in self.cseq)

    def check(self, value: Tensor) -> Tensor:
        inside = torch.ones_like(value, dtype=torch.bool)
        for index, fn in self.groups:
            column = value.index_select(-1, index)
            inside[..., index] = column.isnan() | fn.support.check(column)
        return inside

    def __repr__(self) -> str:
        kinds = [(int(i), fn.support) for index, fn in self.groups for i in index]
        shown = ", ".join(f"{i}: {str(s).removesuffix('()')}" for i, s in sorted(kinds, key=lambda k: k[0])[:8])
        return f"its columns ({shown}{', ...' if len(kinds) > 8 else ''}), or NaN"
