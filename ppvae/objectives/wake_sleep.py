"""Reweighted wake-sleep."""

from dataclasses import replace
from typing import final

import torch
from pyro import poutine
from torch import Tensor

from ppvae.errors import ContractError, UsageError, site_error
from ppvae.errors.ranges import check_numbers
from ppvae.inference.contract.scales_and_factors import check_normalized
from ppvae.inference.second_run import buffer_copies
from ppvae.inference.structure import Role, Structure
from ppvae.inference.tracing import node_log_prob, sample_sites, trace_program
from ppvae.objectives.gradients.estimator import gradient_only
from ppvae.objectives.objective import Objective
from ppvae.objectives.protocol import PairCall
from ppvae.objectives.reductions import log_mean_exp
from ppvae.objectives.requirements import require_no_guide_factor, require_sampled_latents


@final
class ReweightedWakeSleep(Objective):
    """The model maximises the IWAE bound, the guide minimises KL(p || q); no latent needs a reparameterised sample.

    wake-theta: sum_k w_k d log p(x, z_k); wake-phi: sum_k w_k d log q(z_k | x), with self-normalised weights w_k,
    consistent for -d KL(p(z | x) || q(z | x)) as K grows; sleep-phi: d log q(z | x) at (x, z) simulated from the
    model. The value is the IWAE bound of the same draws. Global latents get the pathwise gradient of that bound.

    Args:
        num_particles: K, draws per datum.
        wake: the weight on wake-phi.
        sleep: the weight on sleep-phi.

    Raises:
        ContractError: sleep where simulated data cannot replace the batch, by the site's name.
        UsageError: negative weights, or both zero; fewer than two particles in the wake phase.

    Source: Bornschein and Bengio 2015 (arXiv 1406.2751); Le et al. 2019 (arXiv 1805.10469).

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2), torch.zeros(4, 3)
    >>> bool(abs(ReweightedWakeSleep(5).loss(pair.model, pair.guide, x) + pair.log_px(x).sum()) < 1e-4)
    True
    """

    def __init__(self, num_particles: int = 50, wake: float = 1.0, sleep: float = 0.0):
        check_numbers(num_particles=num_particles, wake=wake, sleep=sleep)
        if wake < 0 or sleep < 0 or wake + sleep == 0:
            raise UsageError(f"wake and sleep: expected weights, not both zero, found {wake} and {sleep}")
        self.wake, self.sleep = wake, sleep
        super().__init__(num_particles)
        if num_particles < 2 and wake:
            raise UsageError("num_particles: expected at least 2 for normalised weights in the wake phase, found 1")

    def check_structure(self, s: Structure) -> None:
        require_sampled_latents(s, "reweighted wake-sleep", "take ELBO or CIWAE")
        super().check_structure(s)
        require_no_guide_factor(s, "wake-sleep")
        if self.sleep:
            check_normalized(s, "sleep")
        for name, role in s.guide_roles.items():
            if role is Role.AUXILIARY and self.sleep:
                raise site_error(
                    name, "a guide whose sites the model draws, for sleep", "an auxiliary site that the model lacks",
                    "take sleep = 0",
                )  # fmt: skip
        if self.sleep and s.has_global_latents:
            raise ContractError("sleep: expected independent data, found a latent that is shared by all data")

    def check_gradient(self, s: Structure) -> None:
        """Accepts every guide: draws are held constant."""

    def reduce(self, log_weight: Tensor) -> Tensor:
        return log_mean_exp(log_weight)

    def surrogate(self, call: PairCall) -> Tensor:
        t = call.terms(frozen=("latents", "globals"))
        log_weight, log_q = t.log_weight, t.log_guide
        detached = log_weight.detach()
        weights = detached.softmax(0)
        total = (weights * (log_weight + log_q)).sum() + self.wake * (weights * log_q).sum()
        if self.sleep:
            with buffer_copies():  # batch norm keeps statistics of the data, not of simulated data
                total = total + self.sleep * sleep_log_prob(call)
        return self.reduce(detached).sum() + gradient_only(total)


def sleep_log_prob(call: PairCall) -> Tensor:
    """log q(z | x) at one (x, z) simulated from the model per datum of the batch, summed: a scalar."""
    s, batch = call.structure, list(call.batch)
    with torch.no_grad(), poutine.trace() as tracer, poutine.uncondition():
        call.model(*batch)
    values = {}
    for name, node in sample_sites(tracer.get_trace()):
        if node["infer"].get("was_observed"):
            positions = [i for i, tensor in enumerate(call.batch) if tensor is node["infer"]["obs"]]
            if not positions:
                raise site_error(
                    name, "an observed value that is a tensor of the batch, for sleep",
                    "one computed from it: simulated data cannot be passed to the guide",
                    "observe a tensor of the batch itself, or take sleep = 0",
                )  # fmt: skip
            batch[positions[0]] = node["value"]
        elif name in s.guide_roles:
            values[name] = node["value"]
    trace = trace_program(call.guide, batch, replace(s, enumerated=()), values)
    total = torch.zeros((), dtype=torch.float64, device=call.batch[0].device)
    for _, node in sample_sites(trace):
        total = total + node_log_prob(node).double().sum()
    return total
