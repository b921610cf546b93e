"""Multivariate normals and Student's t distributions, one per datum, of many draws at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

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
        half = torch.where(self.df.isfinite(), self.df / 2, torch.ones_like(self.df)).double()
        radius = (torch._standard_gamma(half.expand(shape[:-1]).contiguous()) / half).sqrt()
        radius = torch.where(self.df.isfinite(), radius, torch.ones_like(radius)).to(noise.dtype)
        return self.loc + torch.einsum("nde,kne->knd", self.scale_tril, noise / radius[..., None])

    def log_prob(self, u: Tensor) -> Tensor:
        """Log-densities [particles, batch] in float64 of u [particles, batch, dims]."""
        dims = self.loc.shape[-1]
        centred = (u - self.loc).permute(1, 2, 0)
        distance = torch.linalg.solve_triangular(self.scale_tril, centred, upper=False).double().square().sum(1).T
        log_det = self.scale_tril.diagonal(dim1=-2, dim2=-1).double().log().sum(-1)
        normal = -0.5 * (dims * math.log(2 * math.pi) + distance)
        df = torch.where(self.df.isfinite(), self.df, torch.ones_like(self.df)).double()
        constant = torch.lgamma((df + dims) / 2) - torch.lgamma(df / 2) - 0.5 * dims * (df * math.pi).log()
        student = constant - 0.5 * (df + dims) * torch.log1p(distance / df)
        return torch.where(self.df.isfinite(), student, normal) - log_det

    def with_df(self, df: float) -> Elliptical:
        """The same location and scale with other tails."""
        return Elliptical(self.loc, self.scale_tril, torch.full_like(self.df, df))

    def select(self, index: Tensor) -> Elliptical:
        """The densities of some of the data."""
        index = index.to(self.loc.device)
        return Elliptical(self.loc[index], self.scale_tril[index], self.df[index])


def choose(index: Tensor, candidates: list[Elliptical]) -> Elliptical:
    """For each datum the candidate with this index, [batch]."""
    rows = torch.arange(len(index), device=index.device)

    def pick(name: str) -> Tensor:
        return torch.stack([getattr(candidate, name) for candidate in candidates])[index, rows]

    return Elliptical(pick("loc"), pick("scale_tril"), pick("df"))
