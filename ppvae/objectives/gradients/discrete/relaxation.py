"""Relaxed values of discrete draws: the noise of a draw given its value, and what it makes of a relaxed one."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor

from ppvae.objectives.gradients.discrete.bits import family_of, log_probs_of
from ppvae.objectives.gradients.discrete.sites import SiteDraws


def relaxed(site: SiteDraws, temperature: float | Tensor) -> Tensor:
    """A relaxed value whose hard value is the guide's draw, in the shape of the value, with the path of its logits."""
    if family_of(site, "a relaxation") is dist.Bernoulli:
        logits = site.particles(lambda fn, value: fn.logits.expand(value.shape))
        noise = logistic_given(site.value, logits.detach()) - logits.detach()
        return ((logits + noise) / temperature).sigmoid()
    log_probs = log_probs_of(site, dist.OneHotCategorical).movedim(0, -1)  # [K, ..., C]
    pi = log_probs.detach()
    exponential = _exponential(pi)
    top = (exponential * site.value).sum(-1, keepdim=True)  # of the largest of Gumbels of total weight one
    gumbel = -torch.where(site.value > 0, top, exponential / pi.exp() + top).log()
    return ((log_probs + (gumbel - pi)) / temperature).softmax(-1)


def logistic_given(value: Tensor, logits: Tensor) -> Tensor:
    """z = logit + logit(u), u uniform, given z > 0 where `value` is 1 and z < 0 elsewhere, with the path of the logits.

    With v uniform, z = log(1 + v / ((1 - v) (1 - p))) where the value is 1, -log(1 + v / ((1 - v) p)) where it is 0.
    """
    eps = torch.finfo(logits.dtype).eps
    v = torch.empty_like(logits).uniform_().clamp(eps, 1 - eps)
    odds = v.log() - (-v).log1p()
    sign = 2 * value - 1
    return sign * torch.nn.functional.softplus(odds - torch.nn.functional.logsigmoid(-sign * logits))


def _exponential(like: Tensor) -> Tensor:
    return -torch.empty_like(like).uniform_().clamp_min(torch.finfo(like.dtype).tiny).log()
