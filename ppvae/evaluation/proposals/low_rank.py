"""Densities with a low-rank scale beside its diagonal, fitted to each datum by climbing the ELBO, for many dims."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ppvae.evaluation.proposals.climbing import Target, adam, ascend, elbo
from ppvae.evaluation.proposals.densities import LowRank, choose

RANK = 16
STEPS, RATE = 250, 0.05
DRAWS = 16  # a step, whatever the dims: time and memory stay bounded
FIRST_FACTOR = 0.05  # of the scale: the climb starts near the diagonal


def fit_low_rank(target: Target, loc: Tensor, scale: Tensor) -> list[LowRank]:
    """[diagonal, low rank]: both climb the ELBO in units of the guide's scale, the second from the first.

    u = loc + s (mu + d eps + F eta) with eps in R^dims and eta in R^16; gradients follow the path of the draws alone.
    The start is the better of the guide's moments [batch, dims] and of the same scale at the mode that Adam finds.
    Memory grows as 16 dims and one step costs 16 evaluations, where a full-rank scale would take dims^2 and a Hessian.

    Source: Ong, Nott and Smith 2018 (arXiv 1701.03208); Roeder et al. 2017 (arXiv 1703.09194).
    """
    normal = torch.full(loc.shape[:1], math.inf, dtype=loc.dtype, device=loc.device)
    none = loc.new_zeros(*loc.shape, 1)
    moments, at_mode = (LowRank(m, none, scale, normal) for m in (loc, ascend(target, loc, scale)))
    start = choose((elbo(target, at_mode, 20) > elbo(target, moments, 20)).long(), [moments, at_mode])
    diagonal = climb(target, start, none)
    factor = FIRST_FACTOR * torch.randn(*loc.shape, RANK, dtype=loc.dtype, device=loc.device)
    low_rank = climb(target, diagonal, factor)
    wide = torch.cat([none, none.expand(*none.shape[:-1], RANK - 1)], -1)  # of one shape, so that one can be chosen
    return [LowRank(diagonal.loc, wide, diagonal.diagonal, normal), low_rank]


def climb(target: Target, start: LowRank, factor: Tensor) -> LowRank:
    """The density with the largest ELBO from a diagonal start, with F from `factor`; F of zeros stays so."""
    loc, scale = start.loc, start.diagonal
    mu, log_diagonal, factor = torch.zeros_like(loc), torch.zeros_like(loc), factor.clone()
    fixed = not bool(factor.any())
    steps = [adam(p, RATE, STEPS) for p in (mu, log_diagonal, factor)]
    draws, count, rank = DRAWS, *factor.shape[::2]
    for _ in range(STEPS):
        q = LowRank(mu, factor, log_diagonal.exp(), start.df)
        eps = torch.randn(draws, *loc.shape, dtype=loc.dtype, device=loc.device)
        eta = torch.randn(draws, count, rank, dtype=loc.dtype, device=loc.device)
        w = mu + q.diagonal * eps + torch.einsum("ndr,knr->knd", factor, eta)
        path = target.gradient(loc + scale * w) * scale - q.grad_log_prob(w)
        steps[0](-path.mean(0))
        steps[1](-(path * eps).mean(0) * q.diagonal)
        if not fixed:
            steps[2](-torch.einsum("knd,knr->ndr", path, eta) / draws)
    return LowRank(loc + scale * mu, scale[..., None] * factor, scale * log_diagonal.exp(), start.df)
