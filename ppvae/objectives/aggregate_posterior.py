"""Objectives that regularise the aggregate posterior q(z), the mean of q(z | x) over the data."""

import math
from abc import abstractmethod
from typing import final

import torch
from torch import Tensor

from ppvae.errors import ContractError, site_error
from ppvae.errors.ranges import check_numbers, check_ranges
from ppvae.inference.second_run import buffer_copies
from ppvae.inference.structure import Structure
from ppvae.inference.terms import Terms, sample_guide, simulate
from ppvae.objectives.elbo import RateDistortionObjective, kl_estimate
from ppvae.objectives.protocol import PairCall
from ppvae.objectives.requirements import require_rate_per_latent, require_separable_rate


class AggregatePosteriorObjective(RateDistortionObjective):
    """An objective with terms of the whole batch, which a datum's bound depends on."""

    factorizes_over_data = False

    def check_structure(self, s: Structure) -> None:
        super().check_structure(s)
        require_separable_rate(s, type(self).__name__)
        require_rate_per_latent(s, type(self).__name__)

    @abstractmethod
    def batch_bound(self, call: PairCall, t: Terms) -> Tensor:
        """The objective per datum, [batch] nats."""

    def value(self, call: PairCall) -> Tensor:
        return self.batch_bound(call, call.terms()).sum()

    def surrogate(self, call: PairCall) -> Tensor:
        return self.value(call)


@final
class TCVAE(AggregatePosteriorObjective):
    """beta-TCVAE: E[log p(x | z)] - alpha I(x; z) - beta TC(z) - gamma sum_d KL(q(z_d) || p(z_d)).

    The rate decomposes into the mutual information E[log q(z | x) - log q(z)], the total correlation
    E[log q(z) - sum_d log q(z_d)] and the dimension-wise KL E[sum_d log q(z_d) - log p(z)]. q(z) is estimated by
    minibatch-weighted sampling: log (1 / (N M)) sum_j q(z | x_j) over a batch of M out of N data. With all weights 1
    the objective is the ELBO.

    Args:
        beta: the weight on the total correlation.
        alpha: the weight on the mutual information.
        gamma: the weight on the dimension-wise KL.
        num_data: N, the size of the data set; by default the size of the data plate.
        num_particles: draws per datum.

    Raises:
        ContractError: more than one latent, a guide that does not factorise over the latent's dims, or unknown N.

    Source: Chen et al. 2018 (arXiv 1802.04942).

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2), torch.zeros(4, 3)
    >>> isinstance(TCVAE(6.0, num_data=100).loss(pair.model, pair.mean_field, x), float)
    True
    """

    def __init__(
        self,
        beta: float = 6.0,
        alpha: float = 1.0,
        gamma: float = 1.0,
        num_data: int | None = None,
        num_particles: int = 1,
    ):
        check_numbers(beta=beta, alpha=alpha, gamma=gamma, num_particles=num_particles)
        check_ranges(num_data=num_data)
        self.alpha, self.beta, self.gamma, self.num_data = alpha, beta, gamma, num_data
        super().__init__(num_particles)

    def check_structure(self, s: Structure) -> None:
        super().check_structure(s)
        if len(s.guide_roles) != 1 or s.plate_nesting != 1:
            raise ContractError(
                f"TCVAE: expected one latent, in the data plate alone, found {sorted(s.guide_roles)}"
                f"{' in inner plates' if s.plate_nesting != 1 else ''}"
            )
        if s.draws_subsample:
            raise ContractError(
                "TCVAE: expected a pair that is called with each batch, found a plate that draws its subsample"
            )
        if self.num_data is None and not s.has_fixed_full_size:
            raise ContractError(
                f"TCVAE: expected the data set's size, found plate {s.plate!r} as large as the batch; give num_data"
            )

    def batch_bound(self, call: PairCall, t: Terms) -> Tensor:
        (name,) = t.guide
        z, count, size = t.guide[name].value, t.num_particles, t.batch_size
        # each draw becomes a particle, evaluated under the guide of every datum
        draws = z.reshape(count * size, 1, *z.shape[2:]).expand(count * size, size, *z.shape[2:])
        with buffer_copies():
            site = sample_guide(
                call.guide, call.batch, count * size, structure=call.structure, values={name: draws}, events=True
            )[name]
        events = site.event_log_prob if call.structure.event_dims[name] else site.log_prob
        if events is None:
            raise site_error(
                name, "a guide that factorises over the latent's dims",
                type(site.distribution).__name__, "take a guide with independent dims, .to_event(1)",
            )  # fmt: skip
        log_q = events.double().reshape(-1, count * size, size)  # [dims, draws, batch]
        log_count = math.log((self.num_data or call.structure.full_size) * size)
        log_qz_dims = (log_q.logsumexp(-1) - log_count).sum(0).reshape(count, size)  # sum_d log q(z_d)
        log_qz = (log_q.sum(0).logsumexp(-1) - log_count).reshape(count, size)
        mutual_information, total_correlation = t.log_guide - log_qz, log_qz - log_qz_dims
        rate = (
            self.alpha * mutual_information + self.beta * total_correlation + self.gamma * (log_qz_dims - t.log_prior)
        )
        return (t.log_lik - rate).mean(0)


@final
class InfoVAE(AggregatePosteriorObjective):
    """E[log p(x | z)] - (1 - alpha) KL(q(z | x) || p(z)) - (alpha + weight - 1) MMD(q(z), p(z)).

    MMD is the unbiased estimate of the squared maximum mean discrepancy, with kernel exp(-|z - z'|^2 / (2 D width^2)),
    between all draws of the batch and as many from the model's prior; D is the number of dims of all latents.

    Args:
        alpha: 1 - alpha is the weight on the rate.
        weight: lambda; alpha = 0 and lambda = 1 give the ELBO.
        width: the kernel's width, in standard deviations of a standard normal prior.
        num_particles: draws per datum.

    Source: Zhao et al. 2019 (arXiv 1706.02262).

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2), torch.zeros(4, 3)
    >>> isinstance(InfoVAE(weight=10.0).loss(pair.model, pair.mean_field, x), float)
    True
    """

    def __init__(self, alpha: float = 0.0, weight: float = 100.0, width: float = 1.0, num_particles: int = 1):
        check_numbers(alpha=alpha, weight=weight, width=width, num_particles=num_particles)
        self.alpha, self.weight, self.width = alpha, weight, width
        super().__init__(num_particles)

    def batch_bound(self, call: PairCall, t: Terms) -> Tensor:
        guide_draws, prior_draws = [], []
        with buffer_copies():
            prior = [simulate(call.model, call.batch) for _ in range(t.num_particles)]
        for name, site in t.guide.items():
            event = call.structure.event_dims[name]
            guide_draws.append(_flatten_draws(site.value, event, call.structure.plate_nesting))
            prior_draws.append(torch.cat([_flatten_draws(p[name], event, call.structure.plate_nesting) for p in prior]))
        discrepancy = mmd(torch.cat(guide_draws, -1).double(), torch.cat(prior_draws, -1).double(), self.width)
        bound = t.log_lik - (1 - self.alpha) * kl_estimate(t)
        return bound.mean(0) - (self.alpha + self.weight - 1) * discrepancy


def _flatten_draws(value: Tensor, event: int, plate_nesting: int) -> Tensor:
    """[(particles,) *inner plates, batch, *event] -> [particles * batch, dims of one datum]."""
    lead = value.dim() - event
    if lead <= plate_nesting:
        value = value.reshape(*(1,) * (plate_nesting + 1 - lead), *value.shape)
    value = value.movedim(plate_nesting, 1)
    return value.reshape(value.shape[0] * value.shape[1], -1)


def mmd(x: Tensor, y: Tensor, width: float) -> Tensor:
    """The unbiased estimate of the squared maximum mean discrepancy of two samples [draws, dims] of the same size."""
    count, dims = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        distance = a.square().sum(-1)[:, None] + b.square().sum(-1) - 2 * a @ b.T
        return (-distance / (2 * dims * width**2)).exp()

    def mean_off_diagonal(a: Tensor) -> Tensor:
        k = kernel(a, a)
        return (k.sum() - k.diagonal().sum()) / max(1, count * (count - 1))

    return mean_off_diagonal(x) + mean_off_diagonal(y) - 2 * kernel(x, y).mean()
