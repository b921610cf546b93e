"""log p(x) by quadrature, for latents of up to three dims: a check on every other estimate."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppvae.errors import UsageError, refused
from ppvae.evaluation.annealing_setup import Settings, session
from ppvae.evaluation.marginal import _columns
from ppvae.evaluation.unconstrained import SCALE_DRAWS, Unconstrained
from ppvae.inference.structure import undisturbed
from ppvae.inference.tracing import Pair

MAX_DIMS = 3
REACH = 6.0  # nodes lie at center + scale * sinh(t), |t| <= 6: up to 200 scales out
ROUNDS = 4  # of centring and scaling
COARSE = 33


@dataclass(frozen=True)
class Quadrature:
    """log p(x) per datum by quadrature; float64, all [N].

    Attributes:
        log_px: nats per datum.
        error: how far it is from the value on every other node, and how much of the integrand lies at the grid's edge:
            an estimate of its own error, in nats.
        num_nodes: nodes per dim.
    """

    log_px: Tensor
    error: Tensor
    num_nodes: int


def quadrature(
    model: Pair,
    guide: Pair,
    data: Any,
    *,
    num_nodes: int = 129,
    rows: int | None = None,
    device: torch.device | str | None = None,
) -> Quadrature:
    """log p(x) = log of the integral of p(x, z) by quadrature, for latents of up to 3 dims per datum in total.

    The trapezoid rule in t, u = center + L sinh(t), z = T(u): u are real coordinates of the latents, and center and L
    the mean and the Cholesky factor of the posterior's covariance, found on coarser grids that start at the guide. For
    smooth densities the error falls exponentially with the number of nodes. Enumerated sites are summed out.

    Latents that are all enumerated need no quadrature: `log_marginal` is exact with one particle. A linear-Gaussian
    model has its closed form, `ppvae.models.LinearGaussian(...).log_px(x)`.

    Args:
        model, guide: a Pyro pair with continuous latents; the guide says where to look first.
        data: a tensor [N, *event], a split, or a tuple of them.
        num_nodes: nodes per dim, odd; num_nodes ** dims evaluations per datum. Half of them give `error`.
        rows: the most (datum, node) rows that go through the model at once.

    Raises:
        UsageError: more than 3 dims, or a number of nodes that is even or under 9; ContractError: as `annealed`.

    Source: Takahasi and Mori 1973 (sinh substitution); Naylor and Smith 1982 (centring and scaling).

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2).double(), torch.ones(4, 3).double()
    >>> exact = quadrature(pair.model, pair.mean_field, x)
    >>> bool((exact.log_px - pair.log_px(x)).abs().max() < 1e-8), bool(exact.error.max() < 1e-8)
    (True, True)
    """
    if num_nodes < 9 or num_nodes % 2 == 0:
        raise UsageError(f"num_nodes: expected an odd number of at least 9, found {num_nodes}")
    columns = _columns(data, 0)
    settings = Settings(1, 1, "guide", "linear", 1, 0.5, 0, rows)
    results = []
    with undisturbed(), session(model, guide, columns, settings, device) as ready:
        for number in range(ready.blocks):
            ready.noise(number)
            block = ready.block(number)
            density = ready.density(block)
            if density.dims > MAX_DIMS:
                names = ", ".join(repr(c.name) for c in density.coordinates)
                raise UsageError(
                    f"quadrature: expected latents of at most {MAX_DIMS} dims in total, found {density.dims} "
                    f"({names}). Use annealed"
                )
            if density.active is not None:
                raise refused(
                    density.coordinates[0].name, "latents that every datum has", "masked ones among them",
                    "use annealed or log_marginal",
                )  # fmt: skip
            width = 1 if ready.s.joint else block.size
            log_px, error = _of_block(density, num_nodes)
            results.append((log_px[:width].cpu(), error[:width].cpu()))
    return Quadrature(torch.cat([r[0] for r in results]), torch.cat([r[1] for r in results]), num_nodes)


def _of_block(density: Unconstrained, num_nodes: int) -> tuple[Tensor, Tensor]:
    """(log p(x), its error), [N]."""
    u = density.start(SCALE_DRAWS).double()
    center, factor = u.nanmedian(0).values, torch.diag_embed(density.spread().double())
    for _ in range(ROUNDS):
        grid = Grid(density, center, factor, COARSE)
        center, factor = grid.moments(center, factor)
    return Grid(density, center, factor, num_nodes).total()


class Grid:
    """The integrand on a grid of nodes t in [-reach, reach]^dims, u = center + factor sinh(t), [nodes, N].

    `log_mass` is the integrand in t, without the width of a cell.
    """

    def __init__(self, density: Unconstrained, center: Tensor, factor: Tensor, num_nodes: int):
        self.num_nodes, self.dims = num_nodes, density.dims
        axis = torch.linspace(-REACH, REACH, num_nodes, dtype=torch.float64, device=center.device)
        self.t = torch.cartesian_prod(*[axis] * self.dims).reshape(-1, self.dims)
        self.offset = self.t.sinh()
        stretch = self.t.cosh().log().sum(-1, keepdim=True) + factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        self.log_cell = self.dims * math.log(2 * REACH / (num_nodes - 1))
        parts = []
        with torch.no_grad():
            for offset in self.offset.split(max(1, density.rows // density.size)):
                u = center + torch.einsum("nij,kj->kni", factor, offset)
                parts.append(density.densities(u.to(density.dtype))[1])
        self.log_mass = torch.cat(parts).nan_to_num(-torch.inf, torch.inf, -torch.inf) + stretch

    def moments(self, center: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and Cholesky factor of the covariance, which is no narrower than nodes are apart."""
        weight = self.log_mass.softmax(0)
        mean = torch.einsum("kn,kj->nj", weight, self.offset)
        square = torch.einsum("kn,ki,kj->nij", weight, self.offset, self.offset)
        covariance = square - mean[:, :, None] * mean[:, None, :]
        spacing = 2 * REACH / (self.num_nodes - 1) * (1 + mean.square()).sqrt()
        covariance = covariance + torch.diag_embed((0.3 * spacing).square())
        inner, failed = torch.linalg.cholesky_ex(covariance)
        fine = (failed == 0) & mean.isfinite().all(-1) & inner.isfinite().all((-2, -1))
        new = center + torch.einsum("nij,nj->ni", factor, mean), factor @ inner
        return torch.where(fine[:, None], new[0], center), torch.where(fine[:, None, None], new[1], factor)

    def total(self) -> tuple[Tensor, Tensor]:
        """(log of the integral, its error in nats), [N]."""
        log_px = self.log_mass.logsumexp(0) + self.log_cell
        cube = self.log_mass.reshape(*[self.num_nodes] * self.dims, -1)
        every_other = cube[(slice(None, None, 2),) * self.dims].flatten(0, -2)
        coarse = every_other.logsumexp(0) + self.log_cell + self.dims * math.log(2)
        edge = torch.zeros_like(log_px)
        for dim, place in itertools.product(range(self.dims), (0, -1)):
            face = cube.select(dim, place).reshape(-1, cube.shape[-1])
            # what lies beyond is taken to be as much as the face, one unit of t deep
            edge = edge + (face.logsumexp(0) + self.log_cell - log_px).exp() * (self.num_nodes - 1) / (2 * REACH)
        return log_px, (log_px - coarse).abs() + edge
