"""log p(x) by quadrature, for latents of up to three dims: a check on every other estimate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppvae.errors import UsageError, refused
from ppvae.evaluation.annealing.potential import SCALE_DRAWS, Potential
from ppvae.evaluation.annealing.session import Settings, session
from ppvae.evaluation.blocks import as_columns
from ppvae.evaluation.reliability import MAX_QUADRATURE_DIMS
from ppvae.inference.tracing import Program
from ppvae.rng import fork_rng

REACH = 6.0  # nodes lie at center + scale * sinh(t), |t| <= 6: up to 200 scales out
ROUNDS = 4  # of centring and scaling
COARSE = 33
NODES = {1: 257, 2: 129, 3: 49}  # by default


@dataclass(frozen=True)
class Quadrature:
    """log p(x) per datum by quadrature; float64, all [N].

    Attributes:
        log_px: nats per datum.
        error: how far it is from the value on every other node, and how much of the integrand lies at the grid's edge:
            an estimate of its own error, in nats.
        num_nodes: how many evaluations each took.
    """

    log_px: Tensor
    error: Tensor
    num_nodes: int


def quadrature(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_nodes: int | None = None,
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
        num_nodes: nodes per dim, odd; by default 257 for one dim, 129 for two, 49 for three. Every other gives `error`.
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
    if num_nodes is not None and (num_nodes < 9 or num_nodes % 2 == 0):
        raise UsageError(f"num_nodes: expected an odd number of at least 9, found {num_nodes}")
    columns = as_columns(data, 0)
    settings = Settings(1, 1, "guide", "linear", 1, 0.5, 0, rows)
    results = []
    with fork_rng(), session(model, guide, columns, settings, device) as ready:
        for number in range(ready.blocks):
            ready.noise(number)
            block = ready.block(number)
            density = ready.density(block)
            if density.dims > MAX_QUADRATURE_DIMS:
                names = ", ".join(repr(c.name) for c in density.coordinates)
                raise UsageError(
                    f"quadrature: expected latents of at most {MAX_QUADRATURE_DIMS} dims in total, found "
                    f"{density.dims} ({names}). Use annealed"
                )
            if density.active is not None:
                raise refused(
                    density.coordinates[0].name, "latents that every datum has", "masked ones among them",
                    "use annealed or log_marginal",
                )  # fmt: skip
            width = 1 if ready.s.has_global_latents else block.size
            log_px, error = _of_block(density, num_nodes)
            nodes = (num_nodes or NODES[density.dims]) ** density.dims
            results.append((log_px[:width].cpu(), error[:width].cpu()))
    return Quadrature(torch.cat([r[0] for r in results]), torch.cat([r[1] for r in results]), nodes)


def _of_block(density: Potential, num_nodes: int | None) -> tuple[Tensor, Tensor]:
    """(log p(x), its error), [N]."""
    u = density.start(SCALE_DRAWS).double()
    center, factor = u.nanmedian(0).values, torch.diag_embed(density.spread().double())
    for _ in range(ROUNDS):
        center, factor = Grid(density, center, factor, COARSE).moments()
    return Grid(density, center, factor, num_nodes or NODES[density.dims]).total()


class Grid:
    """The integrand on a grid of nodes t in [-reach, reach]^dims, u = center + factor sinh(t), for each datum."""

    def __init__(self, density: Potential, center: Tensor, factor: Tensor, num_nodes: int):
        self.density, self.center, self.factor = density, center, factor
        self.num_nodes, self.dims = num_nodes, density.dims
        self.width = 2 * REACH / (num_nodes - 1)
        place = torch.arange(num_nodes, device=center.device)
        self.places = torch.cartesian_prod(*[place] * self.dims).reshape(-1, self.dims)

    def parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """A few nodes at a time: (places, sinh(t), log of a cell's share of the integral [nodes, N])."""
        log_scale = self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) + self.dims * math.log(self.width)
        with torch.no_grad():
            for place in self.places.split(max(1, self.density.rows // self.density.size)):
                t = self.width * place.double() - REACH
                offset = t.sinh()
                u = self.center + torch.einsum("nij,kj->kni", self.factor, offset)
                log_joint = self.density.densities(u.to(self.density.dtype))[1]
                log_joint = log_joint.nan_to_num(-torch.inf, torch.inf, -torch.inf)
                yield place, offset, log_joint + t.cosh().log().sum(-1, keepdim=True) + log_scale

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and Cholesky factor of the posterior's covariance, which is no narrower than nodes are apart."""
        parts = list(self.parts())
        offset, weight = torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts]).softmax(0)
        mean = torch.einsum("kn,kj->nj", weight, offset)
        square = torch.einsum("kn,ki,kj->nij", weight, offset, offset)
        covariance = square - mean[:, :, None] * mean[:, None, :]
        spacing = self.width * (1 + mean.square()).sqrt()
        covariance = covariance + torch.diag_embed((0.3 * spacing).square())
        inner, failed = torch.linalg.cholesky_ex(covariance)
        fine = (failed == 0) & mean.isfinite().all(-1) & inner.isfinite().all((-2, -1))
        center = self.center + torch.einsum("nij,nj->ni", self.factor, mean)
        factor = self.factor @ inner
        return (
            torch.where(fine[:, None], center, self.center),
            torch.where(fine[:, None, None], factor, self.factor),
        )

    def total(self) -> tuple[Tensor, Tensor]:
        """(log of the integral, its error in nats), [N]."""
        whole = coarse = edge = torch.full_like(self.center[:, 0], -torch.inf)
        for place, _, log_mass in self.parts():
            faces = ((place == 0) | (place == self.num_nodes - 1)).sum(-1)
            every_other = (place % 2 == 0).all(-1)
            whole = torch.logaddexp(whole, log_mass.logsumexp(0))
            coarse = torch.logaddexp(coarse, log_mass[every_other].logsumexp(0))
            edge = torch.logaddexp(edge, (log_mass + faces[:, None].log()).logsumexp(0))
        coarse = coarse + self.dims * math.log(2)
        # what lies beyond is taken to be as much as the outermost nodes, one unit of t deep
        return whole, (whole - coarse).abs() + (edge - whole).exp() / self.width
