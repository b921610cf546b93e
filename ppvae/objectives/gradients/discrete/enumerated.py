"""The exact gradient of a bound, by a sum over all joint draws of discrete latents."""

from __future__ import annotations

import itertools
import math
from typing import final

import pyro.distributions as dist
import torch
from torch import Tensor

from ppvae.errors import ContractError, site_error
from ppvae.inference.structure import Role, Structure
from ppvae.inference.terms import Terms
from ppvae.objectives.gradients.discrete.bits import count_of, family_of, value_of_index
from ppvae.objectives.gradients.discrete.sites import SiteDraws, check_sites
from ppvae.objectives.gradients.estimator import GradientEstimator, gradient_only
from ppvae.objectives.protocol import LogWeightBound, PairCall

MAX_DRAWS = 2**16  # joint draws of all particles of a datum


@final
class Enumerated(GradientEstimator):
    """The exact gradient of the expectation of a bound, a sum over all joint values of all latents of all particles.

    d sum_{z_1, ..., z_K} q(z_1) ... q(z_K) R(log w_1, ..., log w_K); K = 1 is enough for a mean of log-weights. It has
    no variance, and is the reference of `evaluation.gradients`. The value is the bound at the guide's own draws.

    Raises:
        ContractError: a latent that is neither Bernoulli nor categorical, or has a mask, by its name; more than 65536
            joint draws.

    >>> from ppvae import VAE, likelihoods, objectives, posteriors, priors
    >>> nets = torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)
    >>> vae = VAE(priors.Bernoulli(2), likelihoods.Bernoulli(nets[0]), posteriors.Bernoulli(nets[1]))
    >>> loss = objectives.ELBO(2, gradient=Enumerated()).loss_and_grads(vae.model, vae.guide, torch.ones(4, 3))
    >>> nets[1].weight.grad.shape
    torch.Size([2, 3])
    """

    holds_latents = False

    def check_structure(self, objective: LogWeightBound, s: Structure) -> None:
        check_sites(self, s, "enumerated")
        for name, role in s.guide_roles.items():
            if name not in s.non_reparameterized or role is not Role.LATENT:
                raise site_error(
                    name, "discrete latents alone, for the enumerated gradient", "another one",
                    "compare with an unbiased estimator, as 'vimco'",
                )  # fmt: skip

    def surrogate(self, objective: LogWeightBound, call: PairCall) -> Tensor:
        with torch.no_grad():
            own = call.terms()
            bound = objective.bound(own).sum()
            values = _joint_values(objective, call, own)
        particles = 1 if objective.stl_unbiased else objective.draws
        count = len(next(iter(values.values())))
        if count**particles > MAX_DRAWS:
            raise ContractError(
                f"enumerated: expected at most {MAX_DRAWS} joint draws of a datum, found {count} values of each of "
                f"{particles} particles. Take fewer particles or latents, or compare with an unbiased estimator"
            )
        t = call.again(count, values)
        log_q, log_weight = t.log_guide, objective.log_weights(t)  # [values, batch]
        log_weight = torch.where(log_q > -math.inf, log_weight, 0.0)
        draws = torch.tensor(list(itertools.product(range(count), repeat=particles)), device=log_q.device).T
        probability = log_q[draws].sum(0).exp()  # [joint draws, batch]
        reduced = objective.reduce(log_weight[draws].movedim(1, -1))  # [batch, joint draws]
        return bound + gradient_only((probability * reduced.T).sum())


def _joint_values(objective: LogWeightBound, call: PairCall, own: Terms) -> dict[str, Tensor]:
    """All joint values of the latents of a datum, {site: [values, *inner plates, batch, *event]}."""
    sites = [SiteDraws(name, objective, call, own, own.log_weight, None, None) for name in own.guide]
    sizes: list[int] = []
    numbers = []
    for site in sites:
        family = family_of(site, "the enumerated gradient")
        count = count_of(site, family)
        shape = site.value.shape[1:-1] if family is dist.OneHotCategorical else site.value.shape[1:]
        if site.site.mask is not None:
            raise site_error(
                site.name, "a latent without a mask, for the enumerated gradient", "one", "take gradient='arms'"
            )
        elements = math.prod(shape) // own.batch_size
        if math.prod(sizes) * count**elements > MAX_DRAWS:
            raise ContractError(
                f"enumerated: expected at most {MAX_DRAWS} joint values of the latents of a datum, found {count}^"
                f"{elements} of {site.name!r} and those before it. Take fewer latents, or compare with 'vimco'"
            )
        sizes += [count] * elements
        numbers.append((family, count, shape, elements))
    table = torch.tensor(list(itertools.product(*map(range, sizes))), device=own.log_weight.device)
    values, at = {}, 0
    for site, (family, count, shape, elements) in zip(sites, numbers, strict=True):
        event = site.event_dims - (family is dist.OneHotCategorical)
        data = len(shape) - event - 1
        per_datum = [*shape[:data], 1, *shape[data + 1 :]]
        index = table[:, at : at + elements].reshape(len(table), *per_datum).expand(len(table), *shape)
        values[site.name] = value_of_index(index, family, count).to(site.value)
        at += elements
    return values
