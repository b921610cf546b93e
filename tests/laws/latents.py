"""What the laws of priors and posteriors are checked with: spaces to integrate over, and goodness of fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import scipy.stats
import torch
from torch import Tensor

FAILURE = 1e-3  # the probability that a goodness-of-fit test of a file fails by chance, all of its tests together


def perturbed(module: torch.nn.Module, by: float = 0.3, seed: int = 0) -> torch.nn.Module:
    """The module in float64, with noise on every parameter: nothing stays at zero, equal or at identity."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(by * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return module


@dataclass(frozen=True)
class Grid:
    """A regular grid of cells over a space's coordinates t: points z(t), log |dz/dt| and the cells' widths."""

    t: Tensor  # [n, dims]
    z: Tensor  # [n, elements]
    log_weight: Tensor  # [n]
    step: Tensor  # [dims]


def _axes(*axes: Tensor) -> Tensor:
    return torch.cartesian_prod(*axes).reshape(-1, len(axes))


def _line(reach: float, count: int) -> Tensor:
    return torch.linspace(-reach, reach, count, dtype=torch.float64)


def _log_logistic(t: Tensor) -> Tensor:
    return -torch.nn.functional.softplus(t) - torch.nn.functional.softplus(-t)


def real(elements: int) -> Grid:
    """z = sinh(t): fine around zero, and far out in the tails."""
    axis = _line(12.0, 100_001) if elements == 1 else _line(7.0, 501)
    t = _axes(*[axis] * elements)
    step = (axis[1] - axis[0]).expand(elements)
    return Grid(t, t.sinh(), t.cosh().log().sum(-1) + step.log().sum(), step)


def interval(elements: int) -> Grid:
    """z = sigmoid(t)."""
    axis = _line(60.0, 20_001) if elements == 1 else _line(36.0, 401)
    t = _axes(*[axis] * elements)
    step = (axis[1] - axis[0]).expand(elements)
    return Grid(t, t.sigmoid(), _log_logistic(t).sum(-1) + step.log().sum(), step)


def simplex(elements: int) -> Grid:
    """Three elements: z = (s(a), s(-a) s(b), s(-a) s(-b)), s the sigmoid and t = (a, b)."""
    assert elements == 3
    axis = _line(45.0, 601)
    t, step = _axes(axis, axis), (axis[1] - axis[0]).expand(2)
    a, b = t.unbind(-1)
    rest = (-a).sigmoid()
    z = torch.stack([a.sigmoid(), rest * b.sigmoid(), rest * (-b).sigmoid()], -1)
    return Grid(t, z, _log_logistic(t).sum(-1) + rest.log() + step.log().sum(), step)


def sphere(elements: int) -> Grid:
    """The angle around, t_0, and on the sphere the height, t_1, in which area is uniform."""
    assert elements in (2, 3)
    half = 50_000 if elements == 2 else 360  # a density may have a cusp at its far pole
    turn = (torch.arange(2 * half, dtype=torch.float64) - half + 0.5) * (math.pi / half)
    if elements == 2:
        step = torch.tensor([math.pi / half], dtype=torch.float64)
        return Grid(turn[:, None], torch.stack([turn.cos(), turn.sin()], -1), step.log().expand(2 * half), step)
    height = torch.arange(-499.5, 500, dtype=torch.float64) / 500
    t, step = _axes(turn, height), torch.tensor([math.pi / 360, 1 / 500], dtype=torch.float64)
    across = (1 - t[:, 1] ** 2).sqrt()
    z = torch.stack([across * t[:, 0].cos(), across * t[:, 0].sin(), t[:, 1]], -1)
    return Grid(t, z, step.log().sum().expand(len(t)), step)


GRIDS: dict[str, Callable[[int], Grid]] = {"real": real, "interval": interval, "simplex": simplex, "sphere": sphere}
COORDINATES: dict[str, Callable[[Tensor], Tensor]] = {
    "real": torch.asinh,
    "interval": torch.logit,
    "simplex": lambda z: torch.stack([z[..., 0].log() - (-z[..., 0]).log1p(), (z[..., 1] / z[..., 2]).log()], -1),
    "sphere": lambda z: torch.cat([torch.atan2(z[..., 1:2], z[..., :1]), z[..., 2:]], -1),
}
EDGES: dict[str, list[list[float]]] = {  # of the bins that draws are counted in, for each coordinate
    "real": [[-1.5, -0.8, -0.4, 0.0, 0.4, 0.8, 1.5]] * 2,
    "interval": [[-3.0, -1.5, -0.5, 0.5, 1.5, 3.0]] * 2,
    "simplex": [[-3.0, -1.5, -0.5, 0.5, 1.5, 3.0]] * 2,
    "sphere": [[-2.5, -1.5, -0.7, 0.1, 0.9, 1.7, 2.5], [-0.7, -0.4, -0.1, 0.2, 0.5, 0.8]],
}


def densities(fn: Any, kind: str) -> tuple[Grid, Tensor]:
    """The grid of a distribution of batch shape [] over its space, and the mass of each cell."""
    grid = GRIDS[kind](fn.event_shape[0])
    with torch.no_grad():
        log_prob = torch.cat([fn.log_prob(part) for part in grid.z.split(50_000)])
    return grid, (log_prob + grid.log_weight).exp()


def integral(fn: Any, kind: str) -> float:
    """The integral of a density (or the sum of masses) of batch shape [] over its space."""
    if kind == "discrete":
        return fn.log_prob(fn.enumerate_support()).double().exp().sum().item()
    return densities(fn, kind)[1].sum().item()


def _bins(t: Tensor, kind: str, grid: Grid) -> Tensor:
    """Which bin coordinates [..., dims] fall into; edges are moved to the nearest borders of cells."""
    index = torch.zeros(t.shape[:-1], dtype=torch.long)
    for d, edges in enumerate(EDGES[kind][: t.shape[-1]]):
        first, step = grid.t[0, d] - grid.step[d] / 2, grid.step[d]
        borders = first + ((torch.tensor(edges).double() - first) / step).round() * step
        index = index * (len(edges) + 1) + torch.bucketize(t[..., d].contiguous(), borders)
    return index


def fit_of(fn: Any, kind: str, draws: int = 20_000) -> float:
    """The p-value of Pearson's test of draws from a distribution of batch shape [] against its own density."""
    with torch.no_grad():
        z = fn.sample((draws,))
        if kind == "discrete":
            values = fn.enumerate_support()
            counts, masses = (z[:, None] == values[None]).all(-1).sum(0).double(), fn.log_prob(values).double().exp()
            assert int(counts.sum()) == draws
        else:
            grid, cells = densities(fn, kind)
            index = _bins(grid.t, kind, grid)
            masses = torch.zeros(int(index.max()) + 1).double().index_add(0, index, cells)
            counts = _bins(COORDINATES[kind](z), kind, grid).bincount(minlength=len(masses)).double()
    rare = masses * draws < 10  # bins that are expected to hold few are one bin
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([masses[~rare], masses[rare].sum()[None]]) * draws
    if expected[-1] < 10:  # few even together
        counts, expected = counts[:-1], expected[:-1]
    assert len(counts) > 1
    return float(scipy.stats.chi2.sf(((counts - expected) ** 2 / expected).sum().item(), len(counts) - 1))


@dataclass(frozen=True)
class Part:
    """A constructor by the size of the latent, the space its values are in, and a size at which it is integrated."""

    make: Callable[[int], torch.nn.Module]
    kind: str = "real"
    size: int = 2
    context: Tensor | None = None
    tolerance: float = 1e-6
    paths: bool = True  # from parameters to draws, where these are not discrete

    @property
    def reparameterised(self) -> bool:
        return self.paths and self.kind != "discrete"

    def given(self) -> dict[str, Tensor]:
        """The keyword that the part declares, if it does."""
        return {} if self.context is None else {"context": self.context}


def values_of(kind: str, fn: Any, *shape: int, seed: int = 0) -> Tensor:
    """Values in the distribution's space that are not its own draws: [*shape, *event]."""
    generator = torch.Generator().manual_seed(seed)
    size = (*shape, fn.event_shape[0])
    if kind == "discrete":
        values = fn.enumerate_support(False).reshape(-1, fn.event_shape[0])
        return values[torch.randint(len(values), shape, generator=generator)]
    noise = torch.randn(size, generator=generator, dtype=torch.float64)
    if kind == "sphere":
        return noise / noise.norm(dim=-1, keepdim=True)
    return {"real": noise, "interval": noise.sigmoid(), "simplex": noise.softmax(-1)}[kind]
