"""The straight-through Gumbel-softmax gradient, which is biased."""

import warnings
from typing import final

import torch
from torch import Tensor

from ppvae.errors.ranges import check_numbers
from ppvae.objectives.gradients.discrete.bits import family_of
from ppvae.objectives.gradients.discrete.relaxation import RELAXABLE, relaxed
from ppvae.objectives.gradients.discrete.sites import SiteDraws, SiteEstimator
from ppvae.objectives.protocol import LogWeightBound


@final
class StraightThrough(SiteEstimator):
    """sum_k r_k d log w_k / d z_k d relaxed(z_k): the gradient at the discrete value passes to a relaxed one; biased.

    The relaxed value is sigmoid((logit + noise) / t), or a softmax, of the noise whose hard value is the guide's draw.
    No further draw is evaluated. The bias does not vanish with more particles; it falls with the temperature, whose
    inverse raises the variance.

    Args:
        temperature: t.

    Raises:
        ContractError: a site that is neither Bernoulli nor one-hot categorical, by its name.

    Source: Jang et al. 2017 (arXiv 1611.01144); Bengio et al. 2013 (arXiv 1308.3432).
    """

    needs_values = True

    def __init__(self, temperature: float = 0.5):
        check_numbers(temperature=temperature)
        self.temperature = temperature

    def check_objective(self, objective: LogWeightBound) -> None:
        warnings.warn("the straight-through gradient is biased: take gradient='arms' or 'vimco'", stacklevel=4)

    def site_surrogate(self, site: SiteDraws) -> Tensor:
        family_of(site, repr(self), RELAXABLE)
        w = site.log_weight.detach().requires_grad_()
        (r,) = torch.autograd.grad(site.objective.reduce(w).sum(), w)
        soft = relaxed(site, self.temperature)
        gradient = site.value_gradient * site.spread(r, site.value) * site.kept
        return (gradient * soft).sum()

    def __repr__(self) -> str:
        return f"StraightThrough({self.temperature})"
