"""Leave-one-out score function with two control variates from the gradient in the latent's value."""

from typing import Any, final

import pyro.distributions as dist
import torch
from torch import Tensor

from ppvae.errors import UsageError
from ppvae.errors.ranges import check_numbers
from ppvae.objectives.gradients.control_variates import ExponentialMovingAverage
from ppvae.objectives.gradients.discrete.bits import family_of
from ppvae.objectives.gradients.discrete.sites import SiteDraws, SiteEstimator
from ppvae.objectives.protocol import LogWeightBound
from ppvae.objectives.reductions import leave_one_out_sum


@final
class DoubleCV(SiteEstimator):
    """The leave-one-out score function with first-order models of log w in both places; unbiased.

    With g_k = d log w_k / d z_k at the discrete value, mu = E_q[z] and h_k the mean of the others' g_j: the baseline
    takes log w_j - b g_j^T (z_j - mu), a model of log w(mu), in place of log w_j; and a h_k^T (z_k - mu) / K is
    subtracted from the signal of draw k, whose expectation with the score, a h_k^T d mu / K, is added. g_j^T (z_j - mu)
    has a mean, as g_j depends on z_j: a constant c / K is subtracted, too. The coefficients a, b, c are those of the
    regression of the signal on the three, by moving averages of their moments over past batches.

    Raises:
        ContractError: a site that is neither Bernoulli nor one-hot categorical, by its name.

    Source: Titsias and Shi 2022 (arXiv 2111.05300), with a = b, which follows the gradient of the variance, and c = 0.

    >>> from ppvae import VAE, likelihoods, objectives, posteriors, priors
    >>> nets = torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)
    >>> vae = VAE(priors.Bernoulli(2), likelihoods.Bernoulli(nets[0]), posteriors.Bernoulli(nets[1]))
    >>> loss = objectives.ELBO(2, gradient=DoubleCV()).loss_and_grads(vae.model, vae.guide, torch.ones(4, 3))
    >>> nets[1].weight.grad.shape
    torch.Size([2, 3])
    """

    needs_values = True

    def __init__(self, decay: float = 0.9):
        check_numbers(decay=decay)
        self.decay = decay
        self._moments: dict[str, ExponentialMovingAverage] = {}

    def check_objective(self, objective: LogWeightBound) -> None:
        if objective.draws < 2:
            raise UsageError("num_particles: expected at least 2 for a leave-one-out baseline (double_cv), found 1")

    def site_surrogate(self, site: SiteDraws) -> Tensor:
        family_of(site, "double_cv", (dist.Bernoulli, dist.OneHotCategorical))
        objective, w = site.objective, site.log_weight
        count, kept = len(w), site.kept
        mean = site.particles(lambda fn, value: fn.mean.expand(value.shape)).double() * kept
        gradient, away = site.value_gradient.double() * kept, site.value.double() * kept - mean.detach()
        others = leave_one_out_sum(gradient) / (count - 1)
        first = _per_datum(gradient * away, site)
        first_of_others = leave_one_out_sum(first) / (count - 1)
        model = _per_datum(others * away, site)
        mean_of_others = leave_one_out_sum(w) / (count - 1)
        bound = objective.reduce(w)
        plain = bound - objective.leave_one_out_bound(w, mean_of_others)
        one = torch.ones_like(w)
        columns = torch.stack([model / count, -first_of_others / count, one / count, plain]).flatten(1)
        moments = self._moments.setdefault(site.name, ExponentialMovingAverage(3, 4))
        a, b, c = _regression(moments(columns[:3] @ columns.T / columns.shape[1], self.decay))
        share = bound - objective.leave_one_out_bound(w, mean_of_others - b * first_of_others)
        signal = share - (a * model + c) / count
        return (signal * site.log_prob).sum() + a / count * (others * mean).sum()

    def state_dict(self) -> dict[str, Any]:
        return {name: average.value.cpu().clone() for name, average in self._moments.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._moments = {}
        for name, value in state.items():
            self._moments[name] = ExponentialMovingAverage(3, 4)
            self._moments[name].value.copy_(value)

    def __repr__(self) -> str:
        return f"DoubleCV({self.decay})"


def _regression(moments: Tensor) -> Tensor:
    """The coefficients [3] of a regression, of the second moments of its columns with all and the target, [3, 4]."""
    scale = moments.diagonal().clamp_min(torch.finfo(moments.dtype).tiny).sqrt()
    matrix = moments[:, :3] / scale / scale[:, None] + 1e-6 * torch.eye(3, dtype=scale.dtype, device=scale.device)
    return torch.linalg.solve_ex(matrix, moments[:, 3] / scale)[0] / scale


def _per_datum(terms: Tensor, site: SiteDraws) -> Tensor:
    """Summed over inner plates and event: [K, *inner plates, batch, *event] -> [K, batch]."""
    data = terms.dim() - site.event_dims - 1
    dims = [d for d in range(1, terms.dim()) if d != data]
    return terms.sum(dims) if dims else terms
