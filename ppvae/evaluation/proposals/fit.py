"""Fitting a proposal to each datum: posterior mode, Laplace approximation, full-rank density, and the best of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ppvae.evaluation.proposals.climbing import MODE_STEPS, Target, ascend, elbo, mean_and_scale
from ppvae.evaluation.proposals.densities import D, Density, Elliptical, LowRank, choose
from ppvae.evaluation.proposals.low_rank import fit_low_rank

FAMILIES = ("guide", "Laplace", "full rank", "diagonal", "low rank")
DEGREES = 20.0  # of freedom where the posterior is normal: tails heavier than normal, as a fit has noise of its own
MIN_DEGREES, FEWER_DEGREES = 4.0, 0.5  # of freedom where it is not: from three dims on; less for each dim below
DEGREES_BY_DIMS = 0.02  # in many dims, times dims^2
NORMAL_VARIANCE, MAX_NORMAL_VARIANCE = 0.01, 0.1  # of log-weights, from which on it is not normal: for each dim; in all
MAX_ADDED, HALF_ADDED = 0.9, 0.1  # the largest share of the variance that is added, and the roughness that adds half
ADDED_IN_FEW = 1.5  # divided by dims, where it is more: in few dims a scale that is too large loses little ess
MAX_INFLATION, INFLATION_VARIANCE = 0.2, 0.8  # of a low-rank scale, and the variance of log-weights that takes it
MIN_INFLATED_DIMS = 20  # fewer dims take less of both
GUIDE_SHARE = 0.05  # of the draws of a fitted proposal: weights are at most 20 times those of the guide alone
MOMENT_DRAWS = 100  # of the guide, for the starting point and the scale
SELECTION_DRAWS, VARIANCE_DRAWS = 100, 40  # per source of draws; of the last candidate, for the variance of log-weights
INDIFFERENCE = 0.02  # in log E[w^2], within which candidates are taken to be equal
DIFFERENCE = 0.02  # of a coordinate's scale, for the Hessian by central differences of gradients
MAX_VARIANCE = 16.0  # of a Laplace approximation along any direction, in units of the guide's
WIDENINGS, WIDENING = 5, 6.0  # of a scale that is far too small: at most so many times, by this factor
FLAT = 0.1  # nats, within which two modes are equally high
REGRESSIONS, AVERAGES = 3, 3  # rounds
DRAWS_PER_DIM, MIN_DRAWS = 2, 40  # of a round
RIDGE = 0.3  # of a regression, times dims: of as many pairs of draws as dims the slope alone would be mostly noise
MAX_CHANGE, MAX_GROWTH = 16.0, 2.0  # of a precision and of a variance in one round; a scale far too wide never recovers
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
    latter two as Student's t, see `degrees_of_freedom`, and wider along the directions in which the posterior is not
    normal, see `added_covariance`. Beyond 256 dims they are a diagonal and a low-rank scale, see `fit_low_rank`, wider
    along all. All are scored on common draws, which no estimate uses: E_q[w^2] = int p(x, u)^2 / q(u) du by importance
    sampling from the mixture of all candidates.

    Noise is torch's generator's. Sources: Hjelm et al. 2016 (arXiv 1511.06382) and Cremer et al. 2018 (arXiv
    1801.03558) for fits per datum; Roeder et al. 2017 (arXiv 1703.09194) for the path gradient; Owen and Zhou 2000,
    Safe and effective importance sampling, for the defensive share.
    """
    loc, scale = mean_and_scale(target.sample_start(MOMENT_DRAWS))
    if loc.shape[-1] > MAX_FULL_RANK_DIMS:
        diagonal, low_rank = fit_low_rank(target, loc, scale)
        variance = variance_of_log_weights(target, low_rank)
        df = torch.full_like(variance, DEGREES)
        factor = 1 + MAX_INFLATION * (variance / INFLATION_VARIANCE).clamp(max=1.0)
        return best_of(target, [q.with_tails(df, factor) for q in (diagonal, low_rank)], 2)
    normal = torch.full(loc.shape[:1], math.inf, dtype=loc.dtype, device=loc.device)
    moments = Elliptical(loc, torch.diag_embed(scale), normal)
    mode, covariance = find_mode(target, loc, scale)
    laplace = Elliptical(mode, torch.linalg.cholesky(covariance), normal)
    better = (elbo(target, laplace, 20) > elbo(target, moments, 20)).long()
    full_rank, roughness = maximize_elbo(target, choose(better, [moments, laplace]))
    df = degrees_of_freedom(variance_of_log_weights(target, full_rank), loc.shape[-1])
    added = added_covariance(full_rank, roughness)
    return best_of(target, [q.with_tails(df, added) for q in (laplace, full_rank)])


def best_of(target: Target, candidates: list[D], first_family: int = 0) -> FittedProposal:
    """For each datum the candidate with the smallest second moment."""
    scores = score(target, candidates)
    best = (scores <= scores.amin(0) + INDIFFERENCE).long().argmax(0)  # the first, and simplest, of those as good
    density = choose((best - 1).clamp(min=0), candidates)
    share = torch.where(best == 0, 1.0, GUIDE_SHARE).to(density.loc)
    return FittedProposal(density, share, torch.where(best == 0, 0, first_family + best))


def variance_of_log_weights(target: Target, q: Density) -> Tensor:
    """Of each datum, [batch], from draws of q; infinite where a weight is not finite."""
    u = q.sample(VARIANCE_DRAWS)
    return (target.log_joint(u) - q.log_prob(u)).var(0).nan_to_num(nan=math.inf).to(q.loc)


def degrees_of_freedom(variance: Tensor, dims: int) -> Tensor:
    """Of a datum's candidates, [batch], from the variance of log-weights: at least 20 where q is the posterior.

    Posteriors that are not normal, which the variance shows, have tails that a normal fit misses. In few dims a
    Student's t of few degrees of freedom reaches them at a small loss of ess; in many its radius would vary too much.
    """
    fewest = max(MIN_DEGREES - FEWER_DEGREES * max(0, 3 - dims), DEGREES_BY_DIMS * dims**2)
    most = max(DEGREES, fewest)
    return most + (fewest - most) * (variance / min(MAX_NORMAL_VARIANCE, NORMAL_VARIANCE * dims)).clamp(max=1.0)


def added_covariance(q: Elliptical, roughness: Tensor) -> Tensor:
    """What the covariance of a proposal gains where q is not the posterior, [batch, dims, dims].

    Along a direction of roughness r it is 0.9 r / (r + 0.1) of the variance of q, in fewer than 20 dims less, and up to
    five dims 1.5 / dims in place of 0.9: the ratio of a skewed posterior to a density that fits its bulk is largest in
    the longer tail, where few draws show it; to a wider density it is largest in the bulk. The directions that the
    likelihood does not inform, where the posterior is the prior, gain nothing: a larger scale there would lose ess for
    no tail.

    Args:
        roughness: E_q[g g'] with g the gradient of log p(x, u) - log q(u) in coordinates whitened by q, [batch, dims,
            dims]: the Fisher divergence of q from the posterior by direction, whose eigenvectors are the active
            subspace of the log-weights (Constantine, Dow and Wang 2014, arXiv 1304.2070).
    """
    dims = roughness.shape[-1]
    identity = torch.eye(dims, dtype=roughness.dtype, device=roughness.device)
    share = identity - HALF_ADDED * torch.linalg.inv(roughness + HALF_ADDED * identity)
    scale = q.scale_tril.to(share)
    return max(MAX_ADDED * min(1.0, dims / MIN_INFLATED_DIMS), ADDED_IN_FEW / dims) * (scale @ share @ scale.mT)


def rows_of_fit(dims: int) -> tuple[int, int]:
    """(gradients, log-densities beside them) that the fit of one datum takes, about."""
    rounds = (REGRESSIONS + AVERAGES) * max(MIN_DRAWS, DRAWS_PER_DIM * dims)
    return MODE_STEPS + 2 * dims + rounds, 3 * SELECTION_DRAWS


def find_mode(target: Target, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(mode [batch, dims], covariance there [batch, dims, dims]) by Adam and Newton's method from the guide's moments.

    Adam goes four scales at most, and the Hessian resolves variances up to `MAX_VARIANCE` squared scales. A datum with
    more than half of that along some coordinate has a guide that is far too narrow, or a flat direction: it is tried
    from there with larger scales. What is found counts where log p(x, u) is a nat larger, or no smaller and the
    variance is resolved.
    """
    mode, covariance = newton(target, ascend(target, loc, scale), scale)
    unresolved = _unresolved(covariance, scale)
    height, start = target.log_joint(mode[None])[0], mode
    for _ in range(WIDENINGS):
        if not bool(unresolved.any()):
            break
        scale = torch.where(unresolved[:, None], WIDENING * scale, scale)
        other, wider = newton(target, ascend(target, start, scale), scale)
        other_height, still = target.log_joint(other[None])[0], _unresolved(wider, scale)
        gain = other_height - height
        better = unresolved & ((gain > 1) | (~still & (gain > -FLAT)))
        start = torch.where((unresolved & (gain >= 0))[:, None], other, start)
        mode = torch.where(better[:, None], other, mode)
        covariance = torch.where(better[:, None, None], wider, covariance)
        height, unresolved = torch.where(better, other_height, height), unresolved & still
    return mode, covariance


def _unresolved(covariance: Tensor, scale: Tensor) -> Tensor:
    """Whether some variance is above half of what the Hessian resolves, [batch]."""
    return (covariance.diagonal(dim1=-2, dim2=-1) / scale.square()).amax(-1) > MAX_VARIANCE / 2


def newton(target: Target, u: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(mode [batch, dims] after a step of Newton's, inverse of minus the Hessian before it [batch, dims, dims])."""
    lengths = torch.tensor([0.0, 0.1, 0.3, 1.0], dtype=u.dtype, device=u.device)[:, None, None]
    covariance = inverse_hessian(target, u, scale)
    move = scale * torch.einsum("nde,ne->nd", covariance, target.gradient(u[None])[0] * scale)
    tried = u + lengths * move
    best = target.log_joint(tried).nan_to_num(nan=-math.inf).argmax(0)
    mode = tried[best, torch.arange(len(u), device=u.device)]
    return mode, scale[:, :, None] * covariance * scale[:, None, :]


def inverse_hessian(target: Target, u: Tensor, scale: Tensor) -> Tensor:
    """The inverse of minus the Hessian of log p(x, u) in units of the scale, by central differences of gradients.

    Directions of less curvature than 1 / `MAX_VARIANCE`, none or the wrong sign get that curvature.
    """
    dims = u.shape[-1]
    shift = DIFFERENCE * torch.eye(dims, dtype=u.dtype, device=u.device)[:, None, :] * scale
    gradients = target.gradient(torch.cat([u + shift, u - shift])) * scale
    hessian = (gradients[:dims] - gradients[dims:]).permute(1, 0, 2) / (2 * DIFFERENCE)
    curvature = -(hessian + hessian.mT).double() / 2
    curvature = torch.where(curvature.isfinite(), curvature, torch.zeros_like(curvature))
    factor = scale_of(curvature, MAX_VARIANCE)
    return (factor @ factor.mT).to(u)


def scale_of(precision: Tensor, variance: float, most: float = math.inf) -> Tensor:
    """The lower Cholesky factors of the inverses of symmetric matrices, [batch, dims, dims].

    Where a variance would be larger than `variance`, or a matrix is not positive definite, its eigenvalues are clamped
    to at least 1 / `variance` and at most `most`: an eigendecomposition takes far longer than a factor.
    """
    factor, failed = torch.linalg.cholesky_ex(precision.flip((-2, -1)))  # of the reversed matrix: the inverse is lower
    identity = torch.eye(precision.shape[-1], dtype=precision.dtype, device=precision.device)
    scale = torch.linalg.solve_triangular(factor.flip((-2, -1)).mT, identity.expand_as(precision), upper=False)
    within = (failed == 0) & (scale.square().sum(-1).amax(-1) <= variance)
    within &= precision.diagonal(dim1=-2, dim2=-1).amax(-1) <= most
    if not bool(within.all()):
        values, vectors = torch.linalg.eigh(precision[~within])
        values = values.clamp(1 / variance, most)
        scale[~within] = torch.linalg.cholesky((vectors / values[:, None, :]) @ vectors.mT)
    return scale


def maximize_elbo(target: Target, start: Elliptical) -> tuple[Elliptical, Tensor]:
    """The full-rank normal with the largest ELBO, from `start`, by rounds of linear regression, and its roughness.

    At the maximum E_q[grad log p] = 0, and the precision of q is -E_q[hess log p] (Opper and Archambeau 2009). Both are
    read off draws of q in coordinates whitened by its scale, where that precision is the identity: first by ridge
    regression of its distance from the identity on the draws (Salimans and Knowles 2013, arXiv 1206.6679), then by
    averages along the path, whose noise vanishes where q is exact, over all rounds since. The
    roughness, see `added_covariance`, is that of the last round's draws, and an upper one: they come before its step.
    """
    loc, scale = start.loc, start.scale_tril
    count, dims = loc.shape
    identity = torch.eye(dims, dtype=torch.float64, device=loc.device)
    for number in range(REGRESSIONS + AVERAGES):
        regress = number < REGRESSIONS
        half = max(MIN_DRAWS, DRAWS_PER_DIM * dims) // 2
        weight = 1.0 if regress else 1 / (number - REGRESSIONS + 2)  # of this round among all since the last regression
        eps = torch.randn(half, count, dims, dtype=loc.dtype, device=loc.device)
        eps = torch.cat([eps, -eps])  # skewness then does not disturb the slope, nor curvature the mean
        gradient = target.gradient(loc + torch.einsum("nde,kne->knd", scale, eps)).nan_to_num(0.0, 0.0, 0.0)
        slopes, eps = torch.einsum("nde,knd->kne", scale, gradient).double(), eps.double()
        if regress:
            odd, eps = (slopes[:half] - slopes[half:]) / 2, eps[:half]
            square = _outer(eps, eps) + RIDGE * dims * identity
            precision = identity - torch.linalg.solve(square, _outer(eps, odd + eps))
        else:
            residual = slopes + eps
            precision = identity - _outer(eps, residual) / (2 * half)
        factor = scale_of(identity + weight * ((precision + precision.mT) / 2 - identity), MAX_GROWTH, MAX_CHANGE)
        move = weight * torch.einsum("nde,ne->nd", factor @ factor.mT, slopes.mean(0))
        move = move * (dims**0.5 / move.norm(dim=-1, keepdim=True)).clamp(max=1)
        loc = loc + torch.einsum("nde,ne->nd", scale, move.to(loc))
        scale = scale @ factor.to(loc)
    return Elliptical(loc, scale, start.df), _outer(residual, residual) / (2 * half)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """sum_k a_k b_k' of [draws, batch, dims], [batch, dims, dims]."""
    return a.permute(1, 2, 0) @ b.transpose(0, 1)


def score(target: Target, candidates: Sequence[Density]) -> Tensor:
    """log E_q[w^2] of the guide and of each candidate with its defensive share, [1 + candidates, batch].

    Draws come from all of them.
    """
    u = torch.cat([target.sample_start(SELECTION_DRAWS), *(q.sample(SELECTION_DRAWS) for q in candidates)])
    log_guide, log_joint = (log_density.nan_to_num(nan=-math.inf) for log_density in target.log_densities(u))
    log_pool = torch.stack([log_guide, *(q.log_prob(u) for q in candidates)]).logsumexp(0) - math.log(
        1 + len(candidates)
    )
    fitted = [q.log_prob(u) + math.log1p(-GUIDE_SHARE) for q in candidates]
    log_q = [log_guide, *(torch.logaddexp(log_guide + math.log(GUIDE_SHARE), q) for q in fitted)]
    return torch.stack([(2 * log_joint - q - log_pool).logsumexp(0).nan_to_num(nan=math.inf) for q in log_q])
