"""Fitting a proposal to each datum: posterior mode, Laplace approximation, full-rank density, and the best of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ppvae.evaluation.proposals.climbing import Target, adam, ascend, elbo
from ppvae.evaluation.proposals.densities import D, Density, Elliptical, LowRank, choose
from ppvae.evaluation.proposals.low_rank import fit_low_rank

FAMILIES = ("guide", "Laplace", "full rank", "diagonal", "low rank")
HEAVY_TAILS = 20.0  # degrees of freedom of a candidate beside the normal one
TAILS = (math.inf, HEAVY_TAILS)
GUIDE_SHARE = 0.05  # of the draws of a fitted proposal: weights are at most 20 times those of the guide alone
MOMENT_DRAWS = 100  # of the guide, for the starting point and the scale
SELECTION_DRAWS = 100  # per source of draws
INDIFFERENCE = 0.02  # in log E[w^2], within which candidates are taken to be equal
NEWTON_STEPS = 3
DIFFERENCE = 0.02  # of a coordinate's scale, for the Hessian by central differences of gradients
MAX_VARIANCE = 16.0  # of a Laplace approximation along any direction, in units of the guide's
FULL_RANK_STEPS, FULL_RANK_RATE = 250, 0.05
MAX_FULL_RANK_DIMS = 256  # beyond, the scale has a low rank beside its diagonal, and there is no Hessian


@dataclass(frozen=True)
class FittedProposal:
    """A mixture per datum of a fitted density and a defensive share of the guide (Owen and Zhou 2000).

    Attributes:
        density: fitted to each datum.
        guide_share: [batch], of the draws; 1 where the guide is the best candidate.
        family: [batch], an index into `FAMILIES`.
    """

    density: Elliptical | LowRank
    guide_share: Tensor
    family: Tensor

    def select(self, index: Tensor) -> FittedProposal:
        """The proposals of some of the data."""
        index = index.to(self.family.device)
        return FittedProposal(self.density.select(index), self.guide_share[index], self.family[index])

    def log_prob(self, u: Tensor, log_guide: Tensor) -> Tensor:
        """Log-densities [particles, batch] of the mixture, given those of the guide."""
        share = self.guide_share.double()
        fitted = self.density.log_prob(u) + torch.log1p(-share)
        return torch.logaddexp(log_guide.nan_to_num(nan=-math.inf) + share.log(), fitted)

    def grad_log_prob(self, u: Tensor, log_guide: Tensor, grad_guide: Tensor) -> Tensor:
        """Gradients of `log_prob` with respect to u, [particles, batch, dims], given those of the guide."""
        of_guide = log_guide.nan_to_num(nan=-math.inf) + self.guide_share.double().log()
        share = (of_guide - self.log_prob(u, log_guide)).exp().clamp(max=1.0).to(u.dtype)[..., None]
        guide = torch.where(share > 0, share * grad_guide, torch.zeros_like(grad_guide))
        return guide + (1 - share) * self.density.grad_log_prob(u)


def fit_proposal(target: Target) -> FittedProposal:
    """The candidate with the smallest second moment of the weights, for each datum.

    Candidates are the guide, a Laplace approximation at the mode that Adam and Newton's method find, and a full-rank
    density that climbs the ELBO in coordinates whitened by the better of Laplace approximation and guide moments; the
    latter two with normal and with Student's t tails (20 degrees of freedom). Beyond 256 dims they are a diagonal and a
    low-rank scale, see `fit_low_rank`. All are scored on common draws, which no
    estimate uses: E_q[w^2] = int p(x, u)^2 / q(u) du by importance sampling from the mixture of all candidates.

    Noise is torch's generator's. Sources: Hjelm et al. 2016 (arXiv 1511.06382) and Cremer et al. 2018 (arXiv
    1801.03558) for fits per datum; Roeder et al. 2017 (arXiv 1703.09194) for the path gradient; Owen and Zhou 2000,
    Safe and effective importance sampling, for the defensive share.
    """
    u = target.sample_start(MOMENT_DRAWS)
    loc, scale = u.mean(0), u.std(0)
    loc = torch.where(loc.isfinite(), loc, torch.zeros_like(loc))
    scale = torch.where(scale.isfinite() & (scale > 0), scale, torch.ones_like(scale))
    if loc.shape[-1] > MAX_FULL_RANK_DIMS:
        return best_of(target, [q.with_df(df) for q in fit_low_rank(target, loc, scale) for df in TAILS], 2)
    normal = torch.full(loc.shape[:1], math.inf, dtype=loc.dtype, device=loc.device)
    moments = Elliptical(loc, torch.diag_embed(scale), normal)
    mode, covariance = newton(target, ascend(target, loc, scale), scale)
    laplace = Elliptical(mode, torch.linalg.cholesky(covariance), normal)
    better = (elbo(target, laplace, 20) > elbo(target, moments, 20)).long()
    full_rank = maximize_elbo(target, choose(better, [moments, laplace]))
    return best_of(target, [q.with_df(df) for q in (laplace, full_rank) for df in TAILS])


def best_of(target: Target, candidates: list[D], first_family: int = 0) -> FittedProposal:
    """For each datum the candidate with the smallest second moment; each family has normal and t tails."""
    scores = score(target, candidates)
    best = (scores <= scores.amin(0) + INDIFFERENCE).long().argmax(0)  # the first, and simplest, of those as good
    density = choose((best - 1).clamp(min=0), candidates)
    share = torch.where(best == 0, 1.0, GUIDE_SHARE).to(density.loc)
    return FittedProposal(density, share, torch.where(best == 0, 0, first_family + (best + 1) // 2))


def newton(target: Target, u: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(mode [batch, dims], inverse of minus the Hessian there [batch, dims, dims], its eigenvalues bounded)."""
    lengths = torch.tensor([0.0, 0.1, 0.3, 1.0], dtype=u.dtype, device=u.device)[:, None, None]
    for _ in range(NEWTON_STEPS):
        covariance = inverse_hessian(target, u, scale)
        gradient = target(u[None]).grad_joint[0] * scale
        move = scale * torch.einsum("nde,ne->nd", covariance, gradient)
        tried = u + lengths * move
        best = target(tried).log_joint.nan_to_num(nan=-math.inf).argmax(0)
        u = tried[best, torch.arange(len(u), device=u.device)]
    covariance = inverse_hessian(target, u, scale)
    return u, scale[:, :, None] * covariance * scale[:, None, :]


def inverse_hessian(target: Target, u: Tensor, scale: Tensor) -> Tensor:
    """The inverse of minus the Hessian of log p(x, u) in units of the scale, by central differences of gradients.

    Directions of less curvature than 1 / `MAX_VARIANCE`, none or the wrong sign get that curvature.
    """
    dims = u.shape[-1]
    shift = DIFFERENCE * torch.eye(dims, dtype=u.dtype, device=u.device)[:, None, :] * scale
    gradients = target(torch.cat([u + shift, u - shift])).grad_joint * scale
    hessian = (gradients[:dims] - gradients[dims:]).permute(1, 0, 2) / (2 * DIFFERENCE)
    curvature = -(hessian + hessian.mT).double() / 2
    curvature = torch.where(curvature.isfinite(), curvature, torch.zeros_like(curvature))
    values, vectors = torch.linalg.eigh(curvature)
    values = values.clamp(min=1 / MAX_VARIANCE)
    return ((vectors / values[:, None, :]) @ vectors.mT).to(u)


def maximize_elbo(target: Target, start: Elliptical) -> Elliptical:
    """The full-rank normal with the largest ELBO, from `start` and in coordinates whitened by its scale.

    u = loc + T (mu + L eps) with T the scale of `start`; gradients follow the path of the draws alone, whose noise
    vanishes where q is exact. Draws per step grow with the dims: too few diverge.
    """
    loc, outer = start.loc, start.scale_tril
    count, dims = loc.shape
    mu, log_diagonal, lower = torch.zeros_like(loc), torch.zeros_like(loc), torch.zeros_like(outer)
    steps = [adam(p, FULL_RANK_RATE, FULL_RANK_STEPS) for p in (mu, log_diagonal, lower)]
    draws = max(4, dims // 12)
    for _ in range(FULL_RANK_STEPS):
        inner = lower.tril(-1) + torch.diag_embed(log_diagonal.exp())
        eps = torch.randn(draws, count, dims, dtype=loc.dtype, device=loc.device)
        w = mu + torch.einsum("nde,kne->knd", inner, eps)
        gradient = target(loc + torch.einsum("nde,kne->knd", outer, w)).grad_joint
        # d/dw of log p - log q along the path: T' grad log p + L^-T eps
        score = torch.linalg.solve_triangular(inner.mT, eps.permute(1, 2, 0), upper=True).permute(2, 0, 1)
        path = torch.einsum("nde,knd->kne", outer, gradient) + score
        by_scale = torch.einsum("knd,kne->nde", path, eps) / draws
        steps[0](-path.mean(0))
        steps[1](-by_scale.diagonal(dim1=-2, dim2=-1) * log_diagonal.exp())
        steps[2](-by_scale.tril(-1))
    inner = lower.tril(-1) + torch.diag_embed(log_diagonal.exp())
    moved = loc + torch.einsum("nde,ne->nd", outer, mu)
    return Elliptical(moved, outer @ inner, start.df)


def score(target: Target, candidates: Sequence[Density]) -> Tensor:
    """log E_q[w^2] of the guide and of each candidate with its defensive share, [1 + candidates, batch].

    Draws come from the guide and from the candidates with heavy tails, which cover those without.
    """
    sources = [q for q in candidates if bool(q.df.isfinite().all())]
    u = torch.cat([target.sample_start(SELECTION_DRAWS), *(q.sample(SELECTION_DRAWS) for q in sources)])
    state = target(u)
    log_guide = state.log_start.nan_to_num(nan=-math.inf)
    log_joint = state.log_joint.nan_to_num(nan=-math.inf)
    log_pool = torch.stack([log_guide, *(q.log_prob(u) for q in sources)]).logsumexp(0) - math.log(1 + len(sources))
    fitted = [q.log_prob(u) + math.log1p(-GUIDE_SHARE) for q in candidates]
    log_q = [log_guide, *(torch.logaddexp(log_guide + math.log(GUIDE_SHARE), q) for q in fitted)]
    return torch.stack([(2 * log_joint - q - log_pool).logsumexp(0).nan_to_num(nan=math.inf) for q in log_q])
