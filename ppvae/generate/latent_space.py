"""Posterior means, and the means of p(x | z) along paths through the latent space."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ppvae.data.column_conversion import as_column
from ppvae.errors import UsageError
from ppvae.errors.calls import explain_call
from ppvae.errors.ranges import check_numbers, check_sequences
from ppvae.generate.pair import open_pair
from ppvae.inference.tracing import Program


@explain_call
def posterior_means(model: Program, guide: Program, x: Any, *, seed: int = 0) -> dict[str, Tensor]:
    """The guide's mean of every latent, {site: [N, *event]}; a draw where a distribution has no mean.

    In a hierarchical guide, a site's mean is conditional on the means of the sites before it.

    >>> from ppvae.models import LinearGaussian
    >>> pair = LinearGaussian(3, 2)
    >>> posterior_means(pair.model, pair.guide, torch.zeros(4, 3))["z"].shape
    torch.Size([4, 2])
    """
    check_numbers(seed=seed)
    with open_pair(model, guide, x, seed) as pair:
        return pair.encode(mean=True)


@explain_call
def interpolations(model: Program, guide: Program, start: Any, end: Any, steps: int = 10, *, seed: int = 0) -> Tensor:
    """Means of p(x | z) along straight lines between the posterior means of two sets of data, [steps, N, *event].

    >>> from ppvae.models import LinearGaussian
    >>> pair = LinearGaussian(3, 2)
    >>> interpolations(pair.model, pair.guide, torch.zeros(4, 3), torch.ones(4, 3), steps=7).shape
    torch.Size([7, 4, 3])
    """
    check_numbers(steps=steps, seed=seed)
    if steps < 2:
        raise UsageError(f"steps: expected at least 2, found {steps}")
    with open_pair(model, guide, end, seed) as pair:
        last = pair.encode(mean=True)
    with open_pair(model, guide, start, seed) as pair:
        first = pair.encode(mean=True)
        if any(v.shape != last[n].shape for n, v in first.items()):
            raise UsageError("start, end: expected as many data in both")
        rows = []
        for t in torch.linspace(0, 1, steps).tolist():
            between = {n: torch.lerp(v, last[n], t) if v.is_floating_point() else v for n, v in first.items()}
            rows.append(pair.decode(between, pair.batch, True))
        return torch.stack(rows)


@explain_call
def traversals(
    model: Program,
    guide: Program,
    x: Any,
    *,
    site: str | None = None,
    dims: Sequence[int] | None = None,
    values: Sequence[float] = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0),
    seed: int = 0,
) -> Tensor:
    """Means of p(x | z) with one latent dim at a time set to given values.

    Other dims and latents are at the posterior mean of the first datum. A discrete latent goes through its own values:
    each dim of a vector of binary or categorical variables, all classes of a one-hot vector or a single variable.

    Args:
        site: the latent to traverse; the first continuous one of the guide by default.
        dims: dims of the latent; all by default.
        values: values of each dim of a continuous latent.

    Returns:
        [dims, values, *event]; of a one-hot vector or a single discrete variable [1, classes, *event].

    Raises:
        UsageError: the latent is no vector, or a discrete one with more than 100 values.

    >>> from ppvae.models import LinearGaussian
    >>> pair = LinearGaussian(3, 2)
    >>> traversals(pair.model, pair.guide, torch.zeros(4, 3), values=(-1.0, 1.0)).shape
    torch.Size([2, 2, 3])
    """
    check_sequences(values=values)
    if dims is not None:
        check_sequences(dims=dims)
    check_numbers(seed=seed)
    with open_pair(model, guide, x, seed) as pair:
        means = {n: pair.first_datum(n, v) for n, v in pair.encode(mean=True).items()}
        site = pair.latent_name(means, site)
        grid, by_dim = torch.tensor(list(values)), True
        if pair.s.is_discrete(site):
            grid, by_dim = pair.discrete_values(site)
        else:
            pair.vector_site(means, site)
        start = means[site]
        size = start.shape[-1] if by_dim else 1
        dims = list(range(size)) if dims is None else list(dims)
        if any(not 0 <= d < size for d in dims):
            raise UsageError(f"dims: expected numbers below {size}, found {dims}")
        count = len(dims) * len(grid)
        if by_dim:
            z = start.repeat(count, 1)
            for row, d in enumerate(dims):
                z[row * len(grid) : (row + 1) * len(grid), d] = grid.to(z)
        else:
            z = grid.to(start).repeat(len(dims), *[1] * (grid.dim() - 1))
        latents = {n: pair.first_datum(n, v, count) for n, v in means.items() if n != site} | {site: z}
        out = pair.decode(latents, pair.repeat_rows(count, first=True), True)
        return out.reshape(len(dims), len(grid), *out.shape[1:])


@explain_call
def decode(
    model: Program,
    guide: Program,
    x: Any,
    values: Tensor,
    *,
    rows: Tensor | None = None,
    site: str | None = None,
    seed: int = 0,
) -> Tensor:
    """Means of p(x | z) with a latent at given values [M, D]: [M, *event].

    Other latents, and the other columns of the batch, are those of a datum: latents at its posterior mean.

    Args:
        rows: [M], the datum of each value; the first by default.
        site: the latent; the first continuous one of the guide by default.

    Raises:
        UsageError: values of another size, or rows that are not in the data.

    >>> from ppvae.models import LinearGaussian
    >>> pair = LinearGaussian(3, 2)
    >>> decode(pair.model, pair.guide, torch.zeros(4, 3), torch.eye(2)).shape
    torch.Size([2, 3])
    """
    check_numbers(seed=seed)
    with open_pair(model, guide, x, seed) as pair:
        means = pair.encode(mean=True)
        site = pair.vector_site(means, site)
        if values.dim() != 2 or values.shape[1] != means[site].shape[-1]:
            raise UsageError(f"values: expected [M, {means[site].shape[-1]}], found {list(values.shape)}")
        rows = torch.zeros(len(values), dtype=torch.long) if rows is None else rows
        if rows.shape != values.shape[:1] or not bool(((rows >= 0) & (rows < len(pair.batch[0]))).all()):
            raise UsageError(
                f"rows: expected {len(values)} numbers below {len(pair.batch[0])}, found {list(rows.shape)}"
            )
        latents = {n: pair.rows_of(n, v, rows) for n, v in means.items() if n != site}
        batch = tuple(t[rows.to(t.device)] for t in pair.batch)
        return pair.decode(latents | {site: values.to(means[site])}, batch, True)


@explain_call
def attribute_vector(
    model: Program, guide: Program, x: Any, attribute: Any, *, site: str | None = None, seed: int = 0
) -> Tensor:
    """The slope of a latent's posterior mean on an attribute of the data, [latent]: cov(E_q[z | x], a) / var(a).

    The least-squares slope is in units of z per unit of the attribute; for a binary attribute it is the mean
    of z with it minus the mean without. Vectors of attributes that are correlated in the data are correlated too.

    Args:
        attribute: [N], numbers or bools.
        site: the latent; the first continuous one of the guide by default.

    Raises:
        UsageError: the attribute is not one finite number per datum, or is constant.

    Source: Larsen et al. 2016 (arXiv 1512.09300); White 2016 (arXiv 1609.04468).

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2), torch.eye(4, 3)
    >>> attribute_vector(pair.model, pair.guide, x, x[:, 0] > 0).shape
    torch.Size([2])
    """
    check_numbers(seed=seed)
    with open_pair(model, guide, x, seed) as pair:
        means = pair.encode(mean=True)
        z = means[pair.vector_site(means, site)]
    a = as_column(attribute, "attribute").as_subclass(Tensor).to(z)
    if z.shape[:-1] != a.shape or not bool(torch.isfinite(a).all()):
        raise UsageError(f"attribute: expected {len(z)} finite numbers, one a datum, found shape {list(a.shape)}")
    a = a - a.mean()
    if not bool(a.square().sum() > 0):
        raise UsageError("attribute: expected values that vary over the data, found one value for all")
    return a @ (z - z.mean(0)) / a.square().sum()


@explain_call
def moved(
    model: Program,
    guide: Program,
    x: Any,
    direction: Tensor,
    amounts: Sequence[float] = (-1.0, 0.0, 1.0),
    *,
    site: str | None = None,
    seed: int = 0,
) -> Tensor:
    """Means of p(x | z) at each datum's posterior mean plus multiples of a direction, [N, amounts, *event].

    Args:
        direction: [latent], such as an `attribute_vector`.
        amounts: the multiples.
        site: the latent to move; the first continuous one of the guide by default. Others stay at their posterior
            means.

    >>> from ppvae.models import LinearGaussian
    >>> pair = LinearGaussian(3, 2)
    >>> moved(pair.model, pair.guide, torch.zeros(4, 3), torch.ones(2)).shape
    torch.Size([4, 3, 3])
    """
    check_sequences(amounts=amounts)
    check_numbers(seed=seed)
    with open_pair(model, guide, x, seed) as pair:
        means = pair.encode(mean=True)
        site = pair.vector_site(means, site)
        if direction.shape != means[site].shape[-1:]:
            raise UsageError(f"direction: expected {list(means[site].shape[-1:])}, found {list(direction.shape)}")
        step = direction.to(means[site])
        return torch.stack([pair.decode(means | {site: means[site] + t * step}, pair.batch, True) for t in amounts], 1)
