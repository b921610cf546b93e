"""Antithetic draws of discrete sites: DisARM (U2G) and ARMS, and by stick-breaking of categorical sites."""

from typing import final

import torch
from torch import Tensor

from ppvae.errors import UsageError
from ppvae.errors.ranges import check_numbers
from ppvae.objectives.gradients.discrete.bits import bits_of
from ppvae.objectives.gradients.discrete.sites import SiteDraws, SiteEstimator


@final
class ARMS(SiteEstimator):
    """n antithetic draws of every bit, one of which is the guide's own; unbiased.

    sum_i d logit_i p_i (1 - p_i) / (p_i - P_i) / (n - 1) sum_j (R_j - mean R) (b_ij - p_i), where R_j is the bound with
    draw k replaced by its antithetic draw j, and P_i the probability that two draws both have the rarer value of bit i,
    of probability p_i: (2 p_i^(1 / (n - 1)) - 1)_+^(n - 1) under the Dirichlet copula. n = 2 is DisARM, or U2G. A
    categorical site of C values is C - 1 bits by stick-breaking; pairs of draws that both stop before a bit have no
    part in its gradient. A step evaluates n K draws of the pair for one site, and (n - 1) K more for every further one.

    Args:
        draws: n, the antithetic draws of each particle.

    Raises:
        ContractError: a site that is neither Bernoulli nor categorical, by its name.

    Source: Dimitriev and Zhou 2021 (arXiv 2105.14141); for n = 2 Dong, Mnih and Tucker 2020 (arXiv 2006.10680), also
    for bounds of several draws, and Yin et al. 2020; categorical: Dong, Mnih and Tucker 2021 (arXiv 2106.08056).

    >>> from ppvae import VAE, likelihoods, objectives, posteriors, priors
    >>> nets = torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)
    >>> vae = VAE(priors.Bernoulli(2), likelihoods.Bernoulli(nets[0]), posteriors.Bernoulli(nets[1]))
    >>> loss = objectives.ELBO(2, gradient=ARMS(4)).loss_and_grads(vae.model, vae.guide, torch.ones(4, 3))
    >>> nets[1].weight.grad.shape
    torch.Size([2, 3])
    """

    def __init__(self, draws: int = 4):
        check_numbers(draws=draws)
        if draws < 2:
            raise UsageError(f"draws: expected at least 2 antithetic draws, found {draws}")
        self.draws = draws

    def site_surrogate(self, site: SiteDraws) -> Tensor:
        bits, n = bits_of(site, repr(self)), self.draws
        logits = bits.logits.detach()
        b, rare, p = bits.draw(), (logits <= 0).to(logits), (-logits.abs()).sigmoid()
        further = antithetic(b == rare, p, n)
        b = torch.cat([b[None], torch.where(further, rare, 1 - rare)])  # [n, S, ...]
        bound = site.bounds(site.evaluate(bits.values(b[1:])))
        stop = bits.first(b)[:, None]
        at = torch.arange(len(logits), device=b.device).reshape(-1, *(1,) * (logits.dim() - 1))
        total = torch.zeros_like(logits, dtype=torch.float64)
        for i in range(n):
            for j in range(i):
                read = len(logits) == 1 or at <= torch.maximum(stop[i], stop[j])
                total = total + bits.spread((bound[i] - bound[j])[None])[0] * (b[i] - b[j]) * read
        p = p.clamp_min(torch.finfo(p.dtype).tiny)
        both = (2 * p ** (1 / (n - 1)) - 1).clamp_min(0) ** (n - 1)
        scale = (1 - p) / (1 - both / p) / (n * (n - 1))
        return (bits.kept * scale * total * bits.logits).sum()

    def __repr__(self) -> str:
        return "DisARM()" if self.draws == 2 else f"ARMS({self.draws})"


def antithetic(rare: Tensor, p: Tensor, draws: int) -> Tensor:
    """Whether each further draw has the rarer value, of probability `p` <= 1/2, given whether the first one has it.

    u_j = (1 - d_j)^(n - 1) of d ~ Dirichlet(1, ..., 1) are uniform and negatively dependent; a draw is rare if u_j < p.
    Returns [draws - 1, *shape].
    """
    u = torch.empty_like(p).uniform_()
    u = torch.where(rare, u * p, p + u * (1 - p))  # of the first draw, given its value
    left = u ** (1 / (draws - 1))  # 1 - d_1, the sum of the others
    exponential = -torch.rand(draws - 1, *p.shape, dtype=p.dtype, device=p.device).clamp_min(1e-30).log()
    d = left * exponential / exponential.sum(0)
    return (1 - d) ** (draws - 1) < p


def disarm() -> ARMS:
    """DisARM, also U2G: ARMS with two draws."""
    return ARMS(2)
