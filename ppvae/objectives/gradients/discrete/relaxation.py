"""Relaxed values of discrete draws: the noise of a draw given its value, and densities at relaxed values."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import MaskedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ppvae.objectives.gradients.discrete.bits import family_of, finite, logits_of
from ppvae.objectives.gradients.discrete.sites import SiteDraws

RELAXABLE = (dist.Bernoulli, dist.OneHotCategorical)  # whose values have relaxed ones, in (0, 1)


def relaxed(site: SiteDraws, temperature: float) -> Tensor:
    """A relaxed value whose hard value is the guide's draw, in the shape of the value, with the path of its logits."""
    family, logits = family_of(site, "a relaxation", RELAXABLE), logits_of(site)
    noise = perturbed_given(site.value, logits.detach(), family) - logits.detach()
    return soft(logits + noise, temperature, family)


def soft(perturbed: Tensor, temperature: float | Tensor, family: type) -> Tensor:
    """The relaxed value of perturbed logits: a sigmoid, or a softmax over the values of a one-hot site."""
    scaled = perturbed / temperature
    return scaled.sigmoid() if family is dist.Bernoulli else scaled.softmax(-1)


def perturbed_given(value: Tensor, logits: Tensor, family: type) -> Tensor:
    """Logits plus the noise of a draw, given the value of the draw, with the path of the logits."""
    return logistic_given(value, logits) if family is dist.Bernoulli else gumbel_given(value, logits)


def logistic_given(value: Tensor, logits: Tensor) -> Tensor:
    """z = logit + logit(u), u uniform, given z > 0 where `value` is 1 and z < 0 elsewhere, with the path of the logits.

    With v uniform, z = log(1 + v / ((1 - v) (1 - p))) where the value is 1, -log(1 + v / ((1 - v) p)) where it is 0.
    """
    eps = torch.finfo(logits.dtype).eps
    v = torch.empty_like(logits).uniform_().clamp(eps, 1 - eps)
    odds = v.log() - (-v).log1p()
    sign = 2 * value - 1
    return sign * torch.nn.functional.softplus(odds - torch.nn.functional.logsigmoid(-sign * logits))


def gumbel_given(value: Tensor, logits: Tensor) -> Tensor:
    """z = logits + Gumbel noise, given that the largest is where the one-hot `value` is 1, with the path of the logits.

    With exponentials e and Z = sum_c exp(logit_c), z is -log(e_b / Z) at the value b, and elsewhere
    -log(e_c / exp(logit_c) + e_b / Z) (Maddison et al. 2014, arXiv 1411.0030).
    """
    log_e = (-torch.empty_like(logits).uniform_().clamp_min(torch.finfo(logits.dtype).tiny).log()).log()
    top = (log_e * value).sum(-1, keepdim=True) - logits.logsumexp(-1, keepdim=True)
    return -torch.where(value > 0, top, torch.logaddexp(log_e - logits, top))


class RelaxedDensities(Messenger):
    """Makes the density of a one-hot site linear in its value, sum_c z_c log pi_c, as relaxed values need it.

    The density of Pyro's is that of the largest entry, which jumps between relaxed values. They agree at one-hot ones.
    """

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.name:
            msg["fn"] = _relaxable(msg["fn"])


class _LinearOneHotCategorical(dist.OneHotCategorical):
    def log_prob(self, value: Tensor) -> Tensor:
        return (value * finite(self.logits)).sum(-1)


def _relaxable(fn: Any) -> Any:
    if isinstance(fn, torch.distributions.Independent):
        return dist.Independent(_relaxable(fn.base_dist), fn.reinterpreted_batch_ndims)
    if isinstance(fn, MaskedDistribution):
        return _relaxable(fn.base_dist).mask(fn._mask)
    if isinstance(fn, torch.distributions.OneHotCategorical):
        return _LinearOneHotCategorical(logits=fn.logits, validate_args=False)
    return fn
