"""Objectives of the aggregate posterior q(z) = mean over the data of q(z | x)."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import final

import torch
from torch import Tensor

from ppvae.errors import ContractError, site_error
from ppvae.inference.replay import buffer_copies
from ppvae.inference.structure import Structure
from ppvae.inference.terms import Terms, sample_guide, simulate
from ppvae.objectives.base import Call
from ppvae.objectives.elbo import Rated, apart, parted, rate


class Aggregate(Rated):
    """An ELBO with terms of the batch as a whole, which ask more of the pair than its terms."""

    separate = False

    def refuse(self, s: Structure) -> None:
        super().refuse(s)
        what = type(self).__name__
        apart(s, what)
        parted(s, what)

    @abstractmethod
    def of_batch(self, call: Call, t: Terms) -> Tensor:
        """The objective per datum, [batch] nats."""

    def value(self, call: Call) -> Tensor:
        return self.of_batch(call, call.terms()).sum()

    def surrogate(self, call: Call) -> Tensor:
        return self.value(call)


@final
class TCVAE(Aggregate):
    """beta-TCVAE: E[log p(x | z)] - alpha I(x; z) - beta TC(z) - gamma sum_d KL(q(z_d) || p(z_d)).

    The rate in three parts: mutual information E[log q(z | x) - log q(z)], total correlation
    E[log q(z) - sum_d log q(z_d)], and the rest E[sum_d log q(z_d) - log p(z)], with minibatch-weighted q(z):
    log (1 / (N M)) sum_j q(z | x_j) over a batch of M out of N data. With all weights 1 it is the ELBO.

    Args:
        beta: the weight on the total correlation.
        alpha: the weight on the mutual information.
        gamma: the weight on the dims' own divergences from the prior.
        num_data: N, the size of the whole data set; by default what the data plate says.
        num_particles: draws per datum.

    Raises:
        ContractError: more than one latent, a guide that is no product over the latent's dims, or no known N.

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
        self.alpha, self.beta, self.gamma, self.num_data = alpha, beta, gamma, num_data
        super().__init__(num_particles)

    def refuse(self, s: Structure) -> None:
        super().refuse(s)
        if len(s.guide_roles) != 1 or s.plate_nesting != 1:
            raise ContractError(
                f"TCVAE: expected one latent, in the data plate alone, found {sorted(s.guide_roles)}"
                f"{' in inner plates' if s.plate_nesting != 1 else ''}"
            )
        if s.draws_subsample:
            raise ContractError("TCVAE: expected batches that are handed over, found a plate that draws its subsample")
        if self.num_data is None and not s.has_fixed_full_size:
            raise ContractError(
                f"TCVAE: expected the data set's size, found plate {s.plate!r} as large as the batch; give num_data"
            )

    def of_batch(self, call: Call, t: Terms) -> Tensor:
        (name,) = t.guide
        z, count, size = t.guide[name].value, t.num_particles, t.batch_size
        # every draw is a particle, evaluated under the guide of every datum
        each = z.reshape(count * size, 1, *z.shape[2:]).expand(count * size, size, *z.shape[2:])
        with buffer_copies():
            site = sample_guide(
                call.guide, call.batch, count * size, structure=call.s, values={name: each}, events=True
            )[name]
        events = site.event_log_prob if call.s.event_dims[name] else site.log_prob
        if events is None:
            raise site_error(
                name, "a guide that is a product over the latent's dims",
                type(site.distribution).__name__, "take a guide with independent dims, .to_event(1)",
            )  # fmt: skip
        parts = events.double().reshape(-1, count * size, size)  # [dims, draws, batch]
        weight = math.log((self.num_data or call.s.full_size) * size)
        dims = (parts.logsumexp(-1) - weight).sum(0).reshape(count, size)
        whole = (parts.sum(0).logsumexp(-1) - weight).reshape(count, size)
        rates = self.alpha * (t.log_guide - whole) + self.beta * (whole - dims) + self.gamma * (dims - t.log_prior)
        return (t.log_lik - rates).mean(0)


@final
class InfoVAE(Aggregate):
    """E[log p(x | z)] - (1 - alpha) KL(q(z | x) || p(z)) - (alpha + weight - 1) MMD(q(z), p(z)).

    MMD is the unbiased estimate of the squared maximum mean discrepancy, with kernel exp(-|z - z'|^2 / (2 D width^2)),
    between all draws of the batch and as many from the model's prior; D counts the dims of all latents together.

    Args:
        alpha: 0 leaves the rate as it is in the ELBO, 1 takes it away.
        weight: lambda; at 1 with alpha = 0 it is the ELBO.
        width: of the kernel, in standard deviations of a standard normal prior.
        num_particles: draws per datum.

    Source: Zhao et al. 2019 (arXiv 1706.02262).

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2), torch.zeros(4, 3)
    >>> isinstance(InfoVAE(weight=10.0).loss(pair.model, pair.mean_field, x), float)
    True
    """

    def __init__(self, alpha: float = 0.0, weight: float = 100.0, width: float = 1.0, num_particles: int = 1):
        self.alpha, self.weight, self.width = alpha, weight, width
        super().__init__(num_particles)

    def of_batch(self, call: Call, t: Terms) -> Tensor:
        ours, theirs = [], []
        with buffer_copies():
            prior = [simulate(call.model, call.batch) for _ in range(t.num_particles)]
        for name, site in t.guide.items():
            event = call.s.event_dims[name]
            ours.append(_rows(site.value, event, call.s.plate_nesting))
            theirs.append(torch.cat([_rows(p[name], event, call.s.plate_nesting) for p in prior]))
        discrepancy = mmd(torch.cat(ours, -1).double(), torch.cat(theirs, -1).double(), self.width)
        bound = t.log_lik - (1 - self.alpha) * rate(t)
        return bound.mean(0) - (self.alpha + self.weight - 1) * discrepancy


def _rows(value: Tensor, event: int, plate_nesting: int) -> Tensor:
    """[(particles,) *inner plates, batch, *event] -> [particles * batch, numbers of one datum]."""
    lead = value.dim() - event
    if lead <= plate_nesting:
        value = value.reshape(*(1,) * (plate_nesting + 1 - lead), *value.shape)
    value = value.movedim(plate_nesting, 1)
    return value.reshape(value.shape[0] * value.shape[1], -1)


def mmd(x: Tensor, y: Tensor, width: float) -> Tensor:
    """The unbiased squared maximum mean discrepancy of two samples [draws, dims] of one size."""
    count, dims = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        distance = a.square().sum(-1)[:, None] + b.square().sum(-1) - 2 * a @ b.T
        return (-distance / (2 * dims * width**2)).exp()

    def within(a: Tensor) -> Tensor:
        k = kernel(a, a)
        return (k.sum() - k.diagonal().sum()) / max(1, count * (count - 1))

    return within(x) + within(y) - 2 * kernel(x, y).mean()
