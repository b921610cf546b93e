"""From refined importance sampling to annealing, for the data that a pilot run finds it to fail on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from ppvae.errors import ContractError, UsageError, count_of
from ppvae.evaluation.annealing.fitted_start import NUM_CHAINS, FittedStart, PilotSchedule
from ppvae.evaluation.blocks import PARTICLE_BLOCK, Block, Evaluation
from ppvae.evaluation.importance.accumulators import LogWeightAccumulator
from ppvae.evaluation.importance.allocation import Allocation
from ppvae.evaluation.importance.compiled_weights import CompiledWeights
from ppvae.evaluation.importance.resampling import PosteriorReservoir
from ppvae.evaluation.importance.sampler import ImportanceSampler
from ppvae.evaluation.proposals.log_weights import RefinedProposal, check_refinable
from ppvae.evaluation.reliability import MIN_ESS, k_hat_limit, k_hat_upper
from ppvae.evaluation.unconstrained.coordinates import SUMMED_OUT
from ppvae.evaluation.unconstrained.potential import prior_as_guide
from ppvae.inference.param_store import BoundProgram, unwrap
from ppvae.rng import derive_seed, fork_rng, seed_all

PILOT_SHARE = 0.5  # of the particles of the estimate
ESS_MARGIN = 1.25  # the ess planned in units of the ess that reliable estimates have
K_HAT_MARGIN = 0.1  # below the limit of k_hat: the estimate's varies about the pilot's
ESCALATION_FIELDS = ("method", "num_temperatures", "acceptance")
REPLACED = ("log_px", "std_error", "ess", "k_hat", "nonfinite")


class Sampler(Protocol):
    """A function of one block of data."""

    def __call__(self, block: Block, compiled: CompiledWeights | None = None) -> dict[str, Tensor]:
        """All statistics of the block's data."""


class EscalatingSampler:
    """The function of one block behind `log_marginal(..., method="auto")`.

    All data of the block are sampled by refined importance sampling, whose ELBO and bounds L_k are reported. A pilot
    run with noise of its own names the data that it fails on; their log p(x), its error and diagnosis, and their
    posterior draws come from annealing instead. The pilot's draws are not used again, so that p(x) stays unbiased.
    """

    def __init__(self, sampler: ImportanceSampler):
        self.sampler = sampler

    def __call__(self, block: Block, compiled: CompiledWeights | None = None) -> dict[str, Tensor]:
        """All statistics of a block's data, as the sampler's, with "method", "acceptance", "num_temperatures" [N]."""
        proposal = self.sampler.proposal(block)
        found = self.sampler.sample(proposal)
        width = block.num_weights
        found |= {
            "method": torch.zeros(width, dtype=torch.long), "num_temperatures": torch.zeros(width, dtype=torch.long),
            "acceptance": torch.full((width,), torch.nan, dtype=torch.float64),
        }  # fmt: skip
        if not isinstance(proposal, RefinedProposal):
            return found
        weak = find_weak(proposal, self.sampler.allocation, found).nonzero()[:, 0]
        if len(weak):
            annealed = self._anneal(proposal, weak)
            for name, value in annealed.items():
                found[name] = found[name].index_copy(0, weak, value.to(found[name]))
        return found

    def _anneal(self, proposal: RefinedProposal, weak: Tensor) -> dict[str, Tensor]:
        """The statistics of these rows of the block from annealed chains, by name."""
        block, seed, draws = proposal.block, self.sampler.run.seed, self.sampler.posterior_draws
        chosen, positions = proposal.select(weak)
        seed_all(derive_seed(seed, block.number, "annealing start"))
        path = PilotSchedule.by_pilot(FittedStart(chosen), derive_seed(seed, block.number, "annealing pilot"))
        levels = path.num_temperatures[positions]
        parts, order = [], []
        for level in sorted(set(levels.tolist())):
            rows = (levels == level).nonzero()[:, 0]
            part, at = path.select(positions[rows])
            chains = part.run(level, derive_seed(seed, block.number, "annealing", level))
            weights = LogWeightAccumulator(NUM_CHAINS, (), block.eps)
            log_weight = chains["log_weight"][:, at.to(chains["log_weight"].device)]
            weights.add(log_weight, log_weight)
            result = {name: value for name, value in weights.result().items() if name in REPLACED}
            result |= {
                "acceptance": chains["acceptance"].cpu()[at], "num_temperatures": torch.full((len(rows),), level),
                "method": torch.ones(len(rows), dtype=torch.long),
                "num_particles": torch.full((len(rows),), NUM_CHAINS),
            }  # fmt: skip
            if draws:
                reservoir = PosteriorReservoir(draws, derive_seed(seed, block.number, "posterior", level), block.s)
                reservoir.add(log_weight, part.start.proposal.constrain(chains["u"]), at)
                result |= {f"posterior/{name}": v.transpose(0, 1) for name, v in reservoir.values.items()}
            parts.append(result)
            order.append(rows)
        index = torch.cat(order).argsort()
        return {name: torch.cat([part[name] for part in parts])[index] for name in parts[0]}


def find_weak(proposal: RefinedProposal, allocation: Allocation, allocated: dict[str, Tensor]) -> Tensor:
    """Which data importance sampling probably fails on, [N] bool, by a pilot run with half of the particles.

    An ess of 50 and a k_hat below its limit must be expected of the estimate. An adaptive allocation has had a pilot of
    its own, which says where its budget does not suffice.
    """
    if allocation.adaptive:
        return allocated["over_budget"]
    total, block = allocation.max_particles, proposal.block
    count = min(total, PARTICLE_BLOCK * -(-int(PILOT_SHARE * total) // PARTICLE_BLOCK))
    weights = LogWeightAccumulator(count, (), block.eps)
    for log_weight, elbo, _ in proposal.log_weights(count, noise="escalation pilot"):
        weights.add(log_weight, elbo)
    found = weights.result()
    upper = k_hat_upper(found["k_hat"], torch.full(found["k_hat"].shape, count))
    enough = min(ESS_MARGIN * MIN_ESS, 0.9 * total)
    fine = (
        (found["nonfinite"] == 0)
        & (found["ess"] * total / count >= enough)
        & (upper < k_hat_limit(total) - K_HAT_MARGIN)
    )
    return ~fine


def refinable_run(run: Evaluation) -> tuple[Evaluation | None, str]:
    """(the evaluation whose pair can be refined, or None; why it is not the given one, "" where it is).

    A guide whose density is not available at given points, such as a flow without an inverse, or whose support has no
    unconstrained coordinates gives way to the model's prior: proposals are then fitted from it, and the defensive share
    is the prior's. A pair with momenta, as `models.Annealed`, gives way to its base pair.
    """
    base = base_run(run)
    if base is not None:
        found, why = refinable_run(base)
        note = "the base pair, of the same p(x) without momenta, takes the place of the pair"
        return found, why if found is None else "; ".join(filter(None, (note, why)))
    refused = refinement_refusal(run)
    if not refused:
        return run, ""
    s = run.structure
    if s.enumerated or s.discrete:
        return None, refused
    try:
        by_prior = run.with_pair(run.model, prior_as_guide(run.model, s.guide_roles))
    except (ContractError, UsageError):
        return None, refused
    if refinement_refusal(by_prior):
        return None, refused
    return by_prior, f"the prior takes the place of the guide: {refused}"


def base_run(run: Evaluation) -> Evaluation | None:
    """The evaluation of the pair that both sides have as `base_pair`: of fewer latents, with the same p(x)."""
    sides = run.model, run.guide
    owner, other = (getattr(unwrap(side), "__self__", None) for side in sides)
    base = getattr(owner, "base_pair", None)
    if base is None or owner is not other:
        return None
    scopes = [side.scope if isinstance(side, BoundProgram) else None for side in sides]
    return run.with_pair(*(p if s is None else BoundProgram(p, s) for p, s in zip(base, scopes, strict=True)))


def refinement_refusal(run: Evaluation) -> str:
    """The first sentence of the error that a refined proposal of the first block meets; "" where there is none."""
    try:
        with fork_rng():
            check_refinable(run, run.block(0))
    except (ContractError, UsageError) as error:
        return str(error)
    return ""


def guide_note(what: str, refused: str) -> str:
    """The note on a pair that is weighed by its guide, and why; where it has no latent to draw, that nothing is drawn.

    >>> guide_note("drawn from the guide", f"{SUMMED_OUT}, log_marginal(..., num_particles=1)")
    'every latent of the pair is summed out: log p(x) is exact, and nothing is drawn'
    """
    if refused.startswith(SUMMED_OUT):
        return f"{SUMMED_OUT.removesuffix(' already')}, and nothing is drawn"
    return f"{what}: {refused}"


def escalation_note(escalated: Mapping[str, Tensor], refused: str) -> str:
    """How many data each method estimated."""
    chains = escalated["method"] == 1
    if refused:
        return guide_note("method='auto' kept to the guide's own draws", refused)
    if not bool(chains.any()):
        return "by refined importance sampling: all data"
    levels = escalated["num_temperatures"][chains]
    used = ", ".join(f"{int((levels == t).sum())} with {t} temperatures" for t in levels.unique().tolist())
    return (
        f"by refined importance sampling: {count_of(int((~chains).sum()))}, by annealing from the refined proposal "
        f"({NUM_CHAINS} chains): {int(chains.sum())} ({used})"
    )
