"""Normals with full covariance over all latents of a datum in unconstrained coordinates, as local guides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

import pyro.distributions as dist
import torch
from torch import Tensor

from ppvae.errors import ContractError
from ppvae.evaluation.blocks import PARTICLE_BLOCK
from ppvae.evaluation.local.guides import AmortizedGuide
from ppvae.evaluation.local.optimization import ADAM_EPS, LEARNING_RATE
from ppvae.evaluation.local.parameters import WhitenedNormal
from ppvae.evaluation.unconstrained.potential import Potential
from ppvae.inference.second_run import frozen_params
from ppvae.inference.structure import Role
from ppvae.rng import derive_seed, seed_all

MOMENT_DRAWS = 1000  # per datum, for the moments at which a family starts
DIAGONAL_JITTER = 1e-6  # added to a covariance before its Cholesky factor, relative to its diagonal


class JointNormalFamily:
    """Normals with full covariance, [N, D], that start at given moments; D counts all coordinates of a datum's latents.

    A richer family of `gaps` is such an object: constructed from locations [N, D] and lower-triangular scales
    [N, D, D], it returns a distribution of batch shape [N] when called, and lists its parameters, data first, in
    `params`.
    """

    name = "a normal with any covariance over all latents in unconstrained space"

    def __init__(self, loc: Tensor, scale_tril: Tensor):
        self._normal = WhitenedNormal(loc, scale_tril)
        self.params: Sequence[Tensor] = self._normal.params

    def __call__(self) -> Any:
        loc, scale_tril = self._normal.arguments()
        return dist.MultivariateNormal(loc, scale_tril=scale_tril)


@final
class FullRankGuide:
    """A `OptimizableGuide` from a family over all of a datum's latents in unconstrained coordinates.

    Optimisation starts at the moments of draws from another guide.

    Raises:
        ContractError: the guide enumerates a latent, or one cannot be unconstrained.
    """

    learning_rate, adam_eps = LEARNING_RATE, ADAM_EPS

    def __init__(
        self, start: AmortizedGuide, family: Callable[[Tensor, Tensor], JointNormalFamily], seed: int, rows: int
    ):
        block = start.block
        if Role.ENUMERATED in block.s.guide_roles.values():
            raise ContractError("the guide enumerates a latent, so that others are drawn once for each of its values")
        self._size, self._number = block.size, block.number
        seed_all(derive_seed(seed, block.number, "moments"))
        with start.installed():
            self._potential = Potential(start.model, start.guide, block, rows)
            u = self._potential.space.fill_inactive(self._potential.sample_start(MOMENT_DRAWS))
        self._family = family(*_moments(u))
        self.params = self._family.params
        self.data_dims: Sequence[int | None] = [0] * len(self.params)
        self._fixed_params = list(block.s.params.values())

    def _elbo(self, num_particles: int, path_derivative: bool = False) -> Tensor:
        u = self._family().rsample(torch.Size((num_particles,)))
        with frozen_params(self.params if path_derivative else ()):
            log_q = self._family().log_prob(u)
        log_joint = self._potential.log_densities(u)[1] + self._potential.space.inactive_log_density(u)
        return (log_joint - log_q.double())[:, : self._size]

    def elbo(self, num_particles: int) -> Tensor:
        with torch.no_grad():
            return self._elbo(num_particles)

    def backward(self, num_particles: int) -> None:
        with torch.enable_grad(), frozen_params(self._fixed_params):
            (-self._elbo(num_particles, path_derivative=True).mean(0).sum()).backward()

    def log_weights(self, num_particles: int, seed: int, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        for number, first in enumerate(range(0, num_particles, PARTICLE_BLOCK)):
            seed_all(derive_seed(seed, self._number, number))
            log_weight = self.elbo(min(PARTICLE_BLOCK, num_particles - first))
            yield log_weight, log_weight


def _moments(u: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [N, D] and Cholesky factor of the covariance [N, D, D] of draws [draws, N, D]; diagonal where it fails."""
    loc = u.mean(0)
    covariance = torch.einsum("knd,kne->nde", u - loc, u - loc) / (len(u) - 1)
    variance = covariance.diagonal(dim1=-2, dim2=-1) + torch.finfo(u.dtype).tiny
    scale_tril, failed = torch.linalg.cholesky_ex(covariance + torch.diag_embed(DIAGONAL_JITTER * variance))
    return loc, torch.where(failed[:, None, None] > 0, torch.diag_embed(variance.sqrt()), scale_tril)
