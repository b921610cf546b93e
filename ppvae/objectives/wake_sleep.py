"""Reweighted wake-sleep: the guide learns from the model's posterior, or from its dreams."""

from __future__ import annotations

from dataclasses import replace
from typing import final

import torch
from pyro import poutine
from torch import Tensor

from ppvae.errors import ContractError, UsageError, site_error
from ppvae.inference.replay import buffer_copies
from ppvae.inference.structure import Role, Structure
from ppvae.inference.tracing import node_log_prob, sample_sites, trace_program
from ppvae.objectives.base import Call, Objective
from ppvae.objectives.gradients.estimators import accumulate_gradients, sampled_latents
from ppvae.objectives.reductions import log_mean_exp


@final
class ReweightedWakeSleep(Objective):
    """The model climbs the IWAE bound, the guide falls down KL(p || q): no draw needs a path.

    wake-theta: sum_k w_k d log p(x, z_k); wake-phi: sum_k w_k d log q(z_k | x), with normalised weights w_k, which
    tends to -d KL(p(z | x) || q(z | x)) as K grows; sleep-phi: d log q(z | x) at (x, z) from the model. The value is
    the IWAE bound of the same draws.

    Args:
        num_particles: K, draws per datum.
        wake: the weight on wake-phi.
        sleep: the weight on sleep-phi.

    Raises:
        ContractError: sleep where the model's data cannot be put in the place of the batch, by the site's name.

    Source: Bornschein and Bengio 2015 (arXiv 1406.2751); Le et al. 2019 (arXiv 1805.10469).

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2), torch.zeros(4, 3)
    >>> bool(abs(ReweightedWakeSleep(5).loss(pair.model, pair.guide, x) + pair.log_px(x).sum()) < 1e-4)
    True
    """

    def __init__(self, num_particles: int = 50, wake: float = 1.0, sleep: float = 0.0):
        if wake < 0 or sleep < 0 or wake + sleep == 0:
            raise UsageError(f"wake and sleep: expected weights, not both zero, found {wake} and {sleep}")
        self.wake, self.sleep = wake, sleep
        super().__init__(num_particles)
        if num_particles < 2 and wake:
            raise UsageError("num_particles: expected at least 2 to weigh draws in the wake phase, found 1")

    def refuse(self, s: Structure) -> None:
        super().refuse(s)
        sampled_latents(s, "reweighted wake-sleep", "take ELBO or CIWAE")
        for name, role in s.guide_roles.items():
            if role is Role.AUXILIARY and self.sleep:
                raise site_error(
                    name, "a guide whose sites the model draws, for sleep", "a helper that the model lacks",
                    "take sleep = 0",
                )  # fmt: skip
        if self.sleep and s.has_global_latents:
            raise ContractError("sleep: expected data that are independent, found a latent that all share")

    def refuse_gradient(self, s: Structure) -> None:
        """Draws are held: no latent needs a path."""

    def reduce(self, log_weight: Tensor) -> Tensor:
        return log_mean_exp(log_weight)

    def surrogate(self, call: Call) -> Tensor:
        t = call.terms(frozen=("latents",))
        log_weight, log_q = t.log_weight, t.log_guide
        held = log_weight.detach()
        weights = held.softmax(0)
        total = (weights * (log_weight + log_q)).sum() + self.wake * (weights * log_q).sum()
        if self.sleep:
            with buffer_copies():  # batch norm is to know the data, not dreams
                total = total + self.sleep * dreamt(call)
        return self.reduce(held).sum() + accumulate_gradients(total)


def dreamt(call: Call) -> Tensor:
    """log q(z | x) at one (x, z) drawn from the model for every datum of the batch, summed."""
    s, batch = call.s, list(call.batch)
    with torch.no_grad(), poutine.trace() as tracer, poutine.uncondition():
        call.model(*batch)
    values = {}
    for name, node in sample_sites(tracer.get_trace()):
        if node["infer"].get("was_observed"):
            places = [i for i, given in enumerate(call.batch) if given is node["infer"]["obs"]]
            if not places:
                raise site_error(
                    name, "data observed as they are handed over, for sleep",
                    "something made from them: the model's data cannot be handed to the guide",
                    "observe a tensor of the batch itself, or take sleep = 0",
                )  # fmt: skip
            batch[places[0]] = node["value"]
        elif name in s.guide_roles:
            values[name] = node["value"]
    trace = trace_program(call.guide, batch, replace(s, enumerated=()), values)
    total = torch.zeros((), dtype=torch.float64, device=call.batch[0].device)
    for _, node in sample_sites(trace):
        total = total + node_log_prob(node).double().sum()
    return total
