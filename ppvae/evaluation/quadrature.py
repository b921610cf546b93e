"""log p(x) by quadrature for latents of up to three dims, a reference for the Monte-Carlo estimates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppvae.errors import UsageError, count_of, site_error
from ppvae.errors.calls import explain_call
from ppvae.errors.ranges import check_ranges
from ppvae.evaluation.annealing.setup import AnnealingSession, AnnealingSettings
from ppvae.evaluation.blocks import Block, run_blocks, start_evaluation
from ppvae.evaluation.estimate import JOINT_UNIT, UNIT
from ppvae.evaluation.reliability import MAX_QUADRATURE_DIMS, all_reliable, error_words
from ppvae.evaluation.unconstrained.potential import SCALE_DRAWS, Potential
from ppvae.inference.tracing import Program

T_MAX = 6.0  # nodes lie at center + scale * sinh(t), |t| <= 6: up to 200 scales from the center
ADAPTATION_ROUNDS = 4  # of centring and scaling
MAX_ERROR = 0.01  # nats, of a reliable result
COARSE_NODES = 33  # per dim, while centring and scaling
DEFAULT_NODES = {1: 257, 2: 129, 3: 49}  # per dim, by the number of dims


@dataclass(frozen=True)
class Quadrature:
    """log p(x) per datum by quadrature; float64, all [N].

    Attributes:
        log_px: nats per datum.
        error: an error estimate in nats: the difference from the rule on every other node, plus the share of the
            integrand at the edge of the grid.
        num_nodes: evaluations per datum.
        joint: a latent is shared by all data: log_px is that of the whole data set, [1].
    """

    log_px: Tensor
    error: Tensor
    num_nodes: int
    joint: bool = False

    @property
    def reliable(self) -> Tensor:
        """Which data have an error below 0.01 nats, [N] bool. A mode of the posterior between nodes is not seen."""
        return self.error < MAX_ERROR

    @property
    def nll(self) -> float:
        """Negative log-likelihood, -mean(log_px), nats per datum (per data set where a latent is shared)."""
        return -float(self.log_px.mean())

    @property
    def nll_std_error(self) -> float:
        """Standard error of `nll` over the data, from the spread of log_px; NaN for one datum."""
        return float(self.log_px.std() / math.sqrt(len(self.log_px))) if len(self.log_px) > 1 else math.nan

    def __str__(self) -> str:
        return self.summary()

    def summary(self) -> str:
        """The result in words: the mean, the error, and how many data have a large one.

        >>> print(Quadrature(torch.tensor([-1.0, -3.0]), torch.tensor([1e-6, 0.5]), 129).summary())
        NLL 2.000 ± 1.000 nats per datum over 2 data (quadrature, 129 nodes)
        error of log p(x): 0.25 nats on average, 0.5 at most
        an error of 0.01 nats or more: 1 of 2 data; raise num_nodes
        """
        count, bad = len(self.log_px), int((~self.reliable).sum())
        unit = JOINT_UNIT if self.joint else UNIT
        more = f"an error of {MAX_ERROR} nats or more: {bad} of {count_of(count)}; raise num_nodes"
        return "\n".join((
            f"NLL {error_words(self.nll, self.nll_std_error)} {unit} over {count_of(count)} (quadrature, "
            f"{count_of(self.num_nodes, 'node', 'nodes')})",
            f"error of log p(x): {float(self.error.mean()):.2g} nats on average, {float(self.error.max()):.2g} at most",
            more if bad else all_reliable(count),
        ))  # fmt: skip


@explain_call
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

    The trapezoid rule in t, with u = center + L sinh(t) and z = T(u): u are unconstrained coordinates of the latents,
    center and L the mean and the Cholesky factor of the posterior covariance, computed on coarser grids that start at
    the guide. For smooth densities the error falls exponentially with the number of nodes. Enumerated sites are summed
    out.

    Where all latents are enumerated, `log_marginal` is exact with one particle. A linear-Gaussian model has a closed
    form, `ppvae.models.LinearGaussian(...).log_px(x)`.

    Args:
        model, guide: a Pyro pair with continuous latents; the guide gives the first grid.
        data: a tensor [N, *event], a split, or a tuple of them.
        num_nodes: nodes per dim, odd; by default 257 for one dim, 129 for two, 49 for three. `error` uses every other
            node.
        rows: the largest number of (datum, node) rows in one run of the model.

    Raises:
        UsageError: more than 3 dims, or an even or too small number of nodes; ContractError: as `annealed`.

    Source: Takahasi and Mori 1973 (sinh substitution); Naylor and Smith 1982 (centring and scaling).

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2).double(), torch.ones(4, 3).double()
    >>> exact = quadrature(pair.model, pair.mean_field, x)
    >>> bool((exact.log_px - pair.log_px(x)).abs().max() < 1e-8), bool(exact.error.max() < 1e-8)
    (True, True)
    """
    check_ranges(num_nodes=num_nodes, rows=rows)
    if num_nodes is not None and (num_nodes < 9 or num_nodes % 2 == 0):
        raise UsageError(f"num_nodes: expected an odd number of at least 9, found {num_nodes}")
    settings = AnnealingSettings(1, 1, "guide", "linear", 1, 0.5, 0, rows)
    with start_evaluation(model, guide, data, seed=0, device=device) as run:
        session = AnnealingSession.start(run, settings)
        found = run_blocks(
            run, lambda block: _integrate_block(session, block, num_nodes), {"what": "quadrature", "nodes": num_nodes},
            desc="quadrature", progress=False,
        )  # fmt: skip
    joint = run.structure.has_global_latents
    return Quadrature(found["log_px"], found["error"], int(found["num_nodes"][0]), joint)


def _integrate_block(session: AnnealingSession, block: Block, num_nodes: int | None) -> dict[str, Tensor]:
    """log p(x) of a block of data, its error, and the number of nodes."""
    session.noise(block.number)
    potential = session.potential(block)
    space = potential.space
    if space.dims > MAX_QUADRATURE_DIMS:
        names = ", ".join(repr(latent.name) for latent in space.latents)
        raise UsageError(
            f"quadrature: expected latents of at most {MAX_QUADRATURE_DIMS} dims in total, found {space.dims} "
            f"({names}). Use annealed"
        )
    if space.active is not None:
        raise site_error(
            space.latents[0].name, "latents that every datum has", "masked ones among them",
            "use annealed or log_marginal",
        )  # fmt: skip
    nodes = num_nodes or DEFAULT_NODES[space.dims]
    log_px, error = (values[: block.num_weights].cpu() for values in _integrate(potential, nodes))
    return {"log_px": log_px, "error": error, "num_nodes": torch.tensor(nodes**space.dims)}


def _integrate(potential: Potential, num_nodes: int) -> tuple[Tensor, Tensor]:
    """(log p(x), its error), [N]."""
    u = potential.sample_start(SCALE_DRAWS).double()
    center, factor = u.nanmedian(0).values, torch.diag_embed(potential.start_scale().double())
    for _ in range(ADAPTATION_ROUNDS):
        center, factor = QuadratureGrid(potential, center, factor, COARSE_NODES).posterior_moments()
    return QuadratureGrid(potential, center, factor, num_nodes).log_integral()


class QuadratureGrid:
    """Nodes t in [-T_MAX, T_MAX]^dims at which the integrand is taken, u = center + factor sinh(t), for each datum."""

    def __init__(self, potential: Potential, center: Tensor, factor: Tensor, num_nodes: int):
        self.potential, self.center, self.factor = potential, center, factor
        self.num_nodes, self.dims = num_nodes, potential.space.dims
        self.spacing = 2 * T_MAX / (num_nodes - 1)
        per_dim = torch.arange(num_nodes, device=center.device)
        self.nodes = torch.cartesian_prod(*[per_dim] * self.dims).reshape(-1, self.dims)

    def _log_masses(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Some nodes at a time: (node indices, sinh(t), log of integrand times cell volume, is it an edge [nodes, N]).

        No integrand is infinite: where floating-point numbers overflow, the grid ends.
        """
        log_scale = self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) + self.dims * math.log(self.spacing)
        with torch.no_grad():
            for node in self.nodes.split(max(1, self.potential.rows // self.potential.size)):
                t = self.spacing * node.double() - T_MAX
                offset = t.sinh()
                u = self.center + torch.einsum("nij,kj->kni", self.factor, offset)
                log_joint = self.potential.log_densities(u.to(self.potential.space.dtype))[1]
                lost = log_joint.isnan() | log_joint.isposinf()
                beside = lost.clone()
                beside[1:] |= lost[:-1]
                beside[:-1] |= lost[1:]
                faces = ((node == 0) | (node == self.num_nodes - 1)).sum(-1)
                log_mass = torch.where(lost, -torch.inf, log_joint) + t.cosh().log().sum(-1, keepdim=True) + log_scale
                yield node, offset, log_mass, faces[:, None] + beside

    def posterior_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and Cholesky factor of the posterior covariance, which the spacing of the nodes bounds from below."""
        parts = list(self._log_masses())
        offset, weight = torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts]).softmax(0)
        mean = torch.einsum("kn,kj->nj", weight, offset)
        square = torch.einsum("kn,ki,kj->nij", weight, offset, offset)
        covariance = square - mean[:, :, None] * mean[:, None, :]
        spacing = self.spacing * (1 + mean.square()).sqrt()
        covariance = covariance + torch.diag_embed((0.3 * spacing).square())
        inner, failed = torch.linalg.cholesky_ex(covariance)
        valid = (failed == 0) & mean.isfinite().all(-1) & inner.isfinite().all((-2, -1))
        center = self.center + torch.einsum("nij,nj->ni", self.factor, mean)
        factor = self.factor @ inner
        return (
            torch.where(valid[:, None], center, self.center),
            torch.where(valid[:, None, None], factor, self.factor),
        )

    def log_integral(self) -> tuple[Tensor, Tensor]:
        """(log of the integral, its error in nats), [N]."""
        fine = coarse = edge = torch.full_like(self.center[:, 0], -torch.inf)
        for node, _, log_mass, faces in self._log_masses():
            every_other = (node % 2 == 0).all(-1)
            fine = torch.logaddexp(fine, log_mass.logsumexp(0))
            coarse = torch.logaddexp(coarse, log_mass[every_other].logsumexp(0))
            edge = torch.logaddexp(edge, (log_mass + faces.log()).logsumexp(0))
        coarse = coarse + self.dims * math.log(2)
        # the mass beyond the grid is estimated by that of the outermost nodes over one unit of t
        return fine, (fine - coarse).abs() + (edge - fine).exp() / self.spacing
