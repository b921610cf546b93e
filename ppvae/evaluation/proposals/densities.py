"""Multivariate normals and Student's t distributions, one per datum, of many draws at once: full and low rank."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Protocol, Self, TypeVar, final

import torch
from torch import Tensor


@final
@dataclass(frozen=True)
class Elliptical:
    """A multivariate Student's t per datum; a normal where its degrees of freedom are infinite.

    `pyro.distributions.MultivariateStudentT` would expand the scale over the draws; here all draws of a datum share
    one triangular solve.

    Attributes:
        loc: [batch, dims].
        scale_tril: [batch, dims, dims], lower triangular with a positive diagonal.
        df: [batch], degrees of freedom.

    >>> q = Elliptical(torch.zeros(1, 2), torch.eye(2)[None], torch.tensor([5.0]))
    >>> u = torch.ones(3, 1, 2)
    >>> other = torch.distributions.StudentT(5.0)  # the law of each coordinate, but not of both
    >>> q.log_prob(u).shape, q.sample(4).shape
    (torch.Size([3, 1]), torch.Size([4, 1, 2]))
    """

    loc: Tensor
    scale_tril: Tensor
    df: Tensor

    def sample(self, num_particles: int) -> Tensor:
        """Draws [particles, batch, dims] from torch's generator."""
        shape = (num_particles, *self.loc.shape)
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + torch.einsum("nde,kne->knd", self.scale_tril, noise / _radius(self.df, shape[:-1], noise))

    def log_prob(self, u: Tensor) -> Tensor:
        """Log-densities [particles, batch] in float64 of u [particles, batch, dims]."""
        centred = (u - self.loc).permute(1, 2, 0)
        distance = torch.linalg.solve_triangular(self.scale_tril, centred, upper=False).double().square().sum(1).T
        log_det = self.scale_tril.diagonal(dim1=-2, dim2=-1).double().log().sum(-1)
        return _log_density(distance, self.df, self.loc.shape[-1]) - log_det

    def grad_log_prob(self, u: Tensor) -> Tensor:
        """Gradients of `log_prob` with respect to u, [particles, batch, dims]."""
        whitened = torch.linalg.solve_triangular(self.scale_tril, (u - self.loc).permute(1, 2, 0), upper=False)
        direction = torch.linalg.solve_triangular(self.scale_tril.mT, whitened, upper=True).permute(2, 0, 1)
        return -_pull(whitened.square().sum(1).T, self.df, self.loc.shape[-1])[..., None] * direction

    def with_tails(self, df: Tensor, added: Tensor) -> Elliptical:
        """The same location with these degrees of freedom [batch], and a larger scale matrix, by [batch, dims, dims].

        Where the sum is not positive definite, as of values that are not finite, the scale stays as it is.
        """
        scale = self.scale_tril.to(added)
        larger, failed = torch.linalg.cholesky_ex(scale @ scale.mT + added)
        failed |= (~larger.isfinite()).flatten(1).any(1)
        return Elliptical(self.loc, torch.where(failed[:, None, None] > 0, scale, larger).to(self.loc), df)

    def select(self, index: Tensor) -> Elliptical:
        """The densities of some of the data."""
        index = index.to(self.loc.device)
        return Elliptical(self.loc[index], self.scale_tril[index], self.df[index])

    @property
    def scale(self) -> Tensor:
        """What whitens: the triangular scale [batch, dims, dims]."""
        return self.scale_tril


@final
@dataclass(frozen=True)
class LowRank:
    """As `Elliptical`, with the scale matrix F F' + diag(d^2): for dims whose full matrix would be too large.

    `torch.distributions.LowRankMultivariateNormal` has no Student's t, and expands over the draws.

    Attributes:
        loc: [batch, dims].
        factor: F, [batch, dims, rank].
        diagonal: d, [batch, dims], positive.
        df: [batch], degrees of freedom; infinite for a normal.

    >>> q = LowRank(torch.zeros(1, 3), torch.ones(1, 3, 1), torch.ones(1, 3), torch.tensor([torch.inf]))
    >>> law = torch.distributions.LowRankMultivariateNormal(torch.zeros(3), torch.ones(3, 1), torch.ones(3))
    >>> u = torch.randn(4, 1, 3)
    >>> torch.allclose(q.log_prob(u), law.log_prob(u).double(), atol=1e-4)
    True
    """

    loc: Tensor
    factor: Tensor
    diagonal: Tensor
    df: Tensor

    def sample(self, num_particles: int) -> Tensor:
        """Draws [particles, batch, dims] from torch's generator."""
        shape, like = (num_particles, *self.loc.shape), self.loc
        noise = torch.randn(shape, dtype=like.dtype, device=like.device)
        common = torch.randn((*shape[:-1], self.factor.shape[-1]), dtype=like.dtype, device=like.device)
        spread = self.diagonal * noise + torch.einsum("ndr,knr->knd", self.factor, common)
        return self.loc + spread / _radius(self.df, shape[:-1], noise)

    def log_prob(self, u: Tensor) -> Tensor:
        """Log-densities [particles, batch] in float64 of u [particles, batch, dims]."""
        scaled, tril, inner = self._solve(u)
        distance = scaled.double().square().sum(-1) - inner.double().square().sum(-1)
        log_det = self.diagonal.double().log().sum(-1)
        log_det = log_det + tril.diagonal(dim1=-2, dim2=-1).double().log().sum(-1)
        return _log_density(distance.clamp(min=0.0), self.df, self.loc.shape[-1]) - log_det

    def grad_log_prob(self, u: Tensor) -> Tensor:
        """Gradients of `log_prob` with respect to u, [particles, batch, dims]."""
        scaled, tril, inner = self._solve(u)
        back = torch.linalg.solve_triangular(tril.mT, inner.permute(1, 2, 0), upper=True).permute(2, 0, 1)
        direction = (scaled - torch.einsum("ndr,knr->knd", self._scaled_factor, back)) / self.diagonal
        distance = scaled.square().sum(-1) - inner.square().sum(-1)
        return -_pull(distance, self.df, self.loc.shape[-1])[..., None] * direction

    @property
    def _scaled_factor(self) -> Tensor:
        return self.factor / self.diagonal[..., None]

    def _solve(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """((u - loc) / d, L of L L' = I + F' d^-2 F, L^-1 F' d^-2 (u - loc)), the parts of Woodbury's identity."""
        scaled, factor = (u - self.loc) / self.diagonal, self._scaled_factor
        eye = torch.eye(factor.shape[-1], dtype=u.dtype, device=u.device)
        tril = torch.linalg.cholesky(eye + factor.mT @ factor)
        projected = torch.einsum("ndr,knd->nrk", factor, scaled)
        return scaled, tril, torch.linalg.solve_triangular(tril, projected, upper=False).permute(2, 0, 1)

    def with_tails(self, df: Tensor, factor: Tensor) -> LowRank:
        """The same location with these degrees of freedom [batch], and a scale larger by a factor [batch]."""
        return LowRank(self.loc, factor[:, None, None] * self.factor, factor[:, None] * self.diagonal, df)

    def select(self, index: Tensor) -> LowRank:
        """The densities of some of the data."""
        index = index.to(self.loc.device)
        return LowRank(self.loc[index], self.factor[index], self.diagonal[index], self.df[index])

    @property
    def scale(self) -> Tensor:
        """What whitens each coordinate by itself: the standard deviations [batch, dims]."""
        return (self.diagonal.square() + self.factor.square().sum(-1)).sqrt()


def _radius(df: Tensor, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The root of a chi-squared over its degrees of freedom, [particles, batch, 1]; one for a normal."""
    half = torch.where(df.isfinite(), df / 2, torch.ones_like(df)).double()
    radius = (torch._standard_gamma(half.expand(shape).contiguous()) / half).sqrt()
    return torch.where(df.isfinite(), radius, torch.ones_like(radius)).to(like.dtype)[..., None]


def _log_density(distance: Tensor, df: Tensor, dims: int) -> Tensor:
    """Of standardised vectors with these squared lengths, [particles, batch] in float64."""
    normal = -0.5 * (dims * math.log(2 * math.pi) + distance)
    finite = torch.where(df.isfinite(), df, torch.ones_like(df)).double()
    constant = torch.lgamma((finite + dims) / 2) - torch.lgamma(finite / 2) - 0.5 * dims * (finite * math.pi).log()
    student = constant - 0.5 * (finite + dims) * torch.log1p(distance / finite)
    return torch.where(df.isfinite(), student, normal)


def _pull(distance: Tensor, df: Tensor, dims: int) -> Tensor:
    """Minus twice the slope of the log-density in the squared length, [particles, batch]; one for a normal."""
    finite = torch.where(df.isfinite(), df, torch.ones_like(df))
    student = (finite + dims) / (finite + distance)
    return torch.where(df.isfinite(), student, torch.ones_like(student))


class Density(Protocol):
    """A density of u [particles, batch, dims], one per datum."""

    @property
    def loc(self) -> Tensor:
        """[batch, dims]."""

    @property
    def df(self) -> Tensor:
        """Degrees of freedom, [batch]."""

    def sample(self, num_particles: int) -> Tensor:
        """Draws [particles, batch, dims]."""

    def log_prob(self, u: Tensor) -> Tensor:
        """Log-densities [particles, batch] in float64."""

    def grad_log_prob(self, u: Tensor) -> Tensor:
        """Their gradients."""

    def select(self, index: Tensor) -> Self:
        """Some of the data."""

    @property
    def scale(self) -> Tensor:
        """What whitens: a triangular scale [batch, dims, dims], or standard deviations [batch, dims]."""


D = TypeVar("D", Elliptical, LowRank)


def choose(index: Tensor, candidates: list[D]) -> D:
    """For each datum the candidate with this index, [batch]."""
    rows = torch.arange(len(index), device=index.device)

    def pick(name: str) -> Tensor:
        return torch.stack([getattr(candidate, name) for candidate in candidates])[index, rows]

    return type(candidates[0])(**{field.name: pick(field.name) for field in fields(candidates[0])})
