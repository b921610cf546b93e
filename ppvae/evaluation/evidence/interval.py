"""An interval of log p(x) for given data: a lower bound, and an upper one from chains that sample the posterior."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from ppvae.data.loader import data_digest
from ppvae.errors import UsageError, count_of
from ppvae.errors.calls import explain_call
from ppvae.errors.ranges import check_numbers, check_ranges
from ppvae.evaluation.annealing.fitted_start import NUM_CHAINS, FittedStart, PilotSchedule
from ppvae.evaluation.blocks import DATA_BLOCK, PARTICLE_BLOCK, Block, Evaluation, run_blocks, start_evaluation
from ppvae.evaluation.evidence.escalation import find_weak, refinable_run
from ppvae.evaluation.evidence.two_sided import TwoSidedBounds, bounds_by_annealing, bounds_by_swap
from ppvae.evaluation.importance.allocation import FixedAllocation
from ppvae.evaluation.proposals.log_weights import RefinedProposal
from ppvae.evaluation.results import mean_words
from ppvae.inference.tracing import Program
from ppvae.rng import derive_seed, seed_all

NUM_DRAWS = 4  # posterior draws of a datum that importance sampling suffices for
RESAMPLING_STEPS = 5  # of the chains behind each of them, with 100 draws a step
HMC_STEPS = 10  # at p(z | x), after annealing
ASSUMPTION = "the upper bound assumes that the chains have reached the posterior: a mode that none finds lowers it"


@dataclass(frozen=True)
class Interval(TwoSidedBounds):
    """A lower bound of log p(x) and an approximate upper one, for given data; nats per datum, float64, all [N].

    Attributes:
        lower: a lower bound in expectation, whatever the chains do.
        upper: an upper bound in expectation where the chains have reached the posterior.
        method: 0 where both come from importance sampling, 1 from annealing in both directions.
        acceptance: the share of moves that the chains accept.
    """

    method: Tensor
    acceptance: Tensor
    num_particles: int
    seed: int
    joint: bool = False
    data: str = ""
    digest: str = ""

    @property
    def inverted(self) -> int:
        """The number of data whose upper bound is below the lower one by three standard errors of both.

        Their chains have not reached the posterior.
        """
        error = (self.lower_std_error.square() + self.upper_std_error.square()).sqrt()
        return int((self.gap < -3 * error - 1e-6).sum())

    def summary(self) -> str:
        """The interval as text.

        >>> one = torch.ones(2).double()
        >>> print(Interval(-one, -0.9 * one, 0 * one, 0 * one, 0 * one, 0 * one, one, 100, 0).summary())
        log p(x) of 2 data lies in [-1.000, -0.900] nats on average, three standard errors added on either side
        without these the bounds are 0.100 ± 0.000 nats apart
        the upper bound assumes that the chains have reached the posterior: a mode that none finds lowers it
        """
        unit = "nats for the whole data set" if self.joint else "nats on average"
        lines = [
            f"log p(x) of {count_of(len(self.lower))} lies in [{self.low:.3f}, {self.high:.3f}] {unit}, three "
            f"standard errors added on either side",
            f"without these the bounds are {mean_words(self.gap)} nats apart",
        ]
        if annealed := int((self.method == 1).sum()):
            lines.append(f"{annealed} of them by annealing in both directions")
        if self.inverted:
            lines.append(
                f"the upper bounds of {self.inverted} lie below the lower ones: their chains are not there yet"
            )
        if broken := int((self.nonfinite > 0).sum()):
            lines.append(count_of(broken, "datum has", "data have") + " non-finite weights")
        return "\n".join([*lines, ASSUMPTION])

    def table(self) -> dict[str, str]:
        """The means over the data set as strings, for printing."""
        return {
            "data": f"{self.data or 'a tensor'}, {count_of(len(self.lower))}",
            "log p(x) in": f"[{self.low:.3f}, {self.high:.3f}] nats {'in all' if self.joint else 'per datum'}",
            "from below": mean_words(self.lower),
            "from above": mean_words(self.upper),
            "width": mean_words(self.gap),
            "annealed": count_of(int((self.method == 1).sum())),
            "acceptance": f"{float(self.acceptance.mean()):.2f}",
            "inverted": count_of(self.inverted),
            "assumes": ASSUMPTION,
        }


@explain_call
def interval(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_particles: int = 1000,
    seed: int = 0,
    rows: int | None = None,
    directory: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> Interval:
    """Bounds log p(x) of given data on both sides, [low, high], from chains that start at the refined proposal.

    With K draws of the refined proposal and z* of a chain in place of an exact posterior draw,

        E log (1/K) sum_{k <= K} w(z_k)  <=  log p(x)  <=  E log (1/K) (w(z*) + sum_{k < K} w(z_k)).

    The chains are those of iterated sampling importance resampling: each of 5 steps keeps or replaces z by one of 100
    fresh draws, in proportion to their weights, which leaves p(z | x) invariant. The data that a pilot run finds
    importance sampling to fail on are annealed from the proposal in both directions: forward chains give the lower
    bound, and resampled by weight and moved by 10 steps of HMC they start the reverse chains, with E[1 / w] = 1 / p(x).

    **Assumption.** The lower bound holds whatever happens. The upper one assumes that z* has the law p(z | x), to which
    the chains converge. Where they have not reached it, it is lower than promised: a mode that neither guide nor chains
    find is missing from both sides, and [low, high] then holds log of the mass of the modes that were found. For
    data simulated from the model z* is exact and nothing is assumed: `bracket`, which sees such modes; use it beside
    the interval.

    Args:
        model, guide: a Pyro pair with continuous latents, or ones that are summed out; or run.model, run.guide.
        data: a tensor [N, *event], a split, or a tuple of them: the pair is called as model(*batch).
        num_particles: K.
        seed: of every draw. The result does not depend on `rows`.
        rows: the largest number of (datum, particle) rows in one run of the pair, 5000 by default.
        directory: cache of finished blocks; the same call resumes from it after an interruption.
        device: where to compute; the parameters' device by default.
        progress: show a progress bar; by default where the output is a terminal.

    Raises:
        ContractError: the pair breaks the contract, or has a discrete latent that is sampled, by the site's name;
            UsageError, DataError: invalid arguments, data or directory.

    Source: Sobolev and Vetrov 2019 (arXiv 1905.03290); Grosse, Ancha and Roy 2016 (arXiv 1606.02275); Andrieu, Doucet
    and Holenstein 2010, Particle Markov chain Monte Carlo methods, for iterated resampling.

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2).double().requires_grad_(False), torch.ones(4, 3).double()
    >>> found = interval(pair.model, pair.mean_field, x)
    >>> found.low < float(pair.log_px(x).mean()) < found.high, found.width < 0.01
    (True, True)
    """
    check_numbers(num_particles=num_particles, seed=seed)
    check_ranges(rows=rows)
    if num_particles < PARTICLE_BLOCK:
        raise UsageError(f"num_particles: expected at least {PARTICLE_BLOCK}, found {num_particles}")
    rows = DATA_BLOCK * PARTICLE_BLOCK if rows is None else rows
    settings = {"what": "interval", "num_particles": num_particles}
    with start_evaluation(model, guide, data, seed=seed, device=device) as run:
        run = refinable_run(run)[0] or run
        found = run_blocks(
            run, lambda block: _bound_block(run, block, num_particles, rows), settings, desc="interval",
            directory=directory, progress=progress, figures={"gap": lambda bounds: bounds["upper"] - bounds["lower"]},
        )  # fmt: skip
    return Interval(
        **found, num_particles=num_particles, seed=seed, joint=run.structure.has_global_latents,
        data=getattr(run.columns[0], "description", ""), digest=data_digest(run.columns),
    )  # fmt: skip


def _bound_block(run: Evaluation, block: Block, num_particles: int, rows: int) -> dict[str, Tensor]:
    """Both bounds of a block of data by field."""
    proposal = RefinedProposal(run, block, rows, independent=True)
    width = block.num_weights
    exact, moved = _resampling_chains(proposal, width)
    found = bounds_by_swap(proposal, exact, num_particles, "interval")
    del found["exact_share"]
    found |= {"method": torch.zeros(width, dtype=torch.long), "acceptance": moved}
    weak = find_weak(proposal, FixedAllocation(num_particles), {}).nonzero()[:, 0]
    for name, value in (_bound_by_annealing(proposal, weak) if len(weak) else {}).items():
        found[name] = found[name].index_copy(0, weak, value.to(found[name]))
    return found


def _resampling_chains(proposal: RefinedProposal, width: int) -> tuple[Tensor, Tensor]:
    """(log-weights [M, N] of the last draws of M chains, the share of steps that moved [N])."""
    seed_all(derive_seed(proposal.run.seed, proposal.block.number, "interval chains"))
    step, last = max(1, proposal.rows // proposal.block.size), []
    moved = torch.zeros(width, dtype=torch.float64)
    with torch.no_grad(), pyro.validation_enabled(False):
        for _ in range(NUM_DRAWS):
            current: Tensor | None = None
            for _ in range(RESAMPLING_STEPS):
                draws = proposal.sample(PARTICLE_BLOCK).split(step)
                log_weight = torch.cat([proposal.log_weight(u) for u in draws])[:, :width].nan_to_num(nan=-torch.inf)
                if current is not None:
                    log_weight = torch.cat([current[None], log_weight])
                index = _draw_by_weight(log_weight, 1)
                if current is not None:
                    moved += (index[0] > 0).cpu() / (NUM_DRAWS * (RESAMPLING_STEPS - 1))
                current = log_weight.gather(0, index)[0]
            last.append(current)
    return torch.stack([w for w in last if w is not None]), moved


def _draw_by_weight(log_weight: Tensor, count: int) -> Tensor:
    """Indices [count, N] of draws in proportion to weights [particles, N]; of any where no weight is finite."""
    safe = torch.where(log_weight.amax(0).isfinite(), log_weight, torch.zeros_like(log_weight))
    return torch.multinomial(safe.softmax(0).T, count, replacement=True).T


def _bound_by_annealing(proposal: RefinedProposal, weak: Tensor) -> dict[str, Tensor]:
    """The bounds of these rows of the block by forward and reverse chains."""
    seed, number = proposal.run.seed, proposal.block.number
    chosen, positions = proposal.select(weak)
    seed_all(derive_seed(seed, number, "interval start"))
    path = PilotSchedule.by_pilot(FittedStart(chosen), derive_seed(seed, number, "interval pilot"))
    level = int(path.num_temperatures[positions].max())
    forward = path.run(level, derive_seed(seed, number, "interval forward"))
    log_weight = forward["log_weight"].nan_to_num(nan=-torch.inf)
    seed_all(derive_seed(seed, number, "interval resampling"))
    index = _draw_by_weight(log_weight, NUM_CHAINS)
    u = forward["u"].gather(0, index[..., None].expand_as(forward["u"]))
    u, acceptance = path.move(u, HMC_STEPS, derive_seed(seed, number, "interval moves"))
    reverse = path.run_reverse(level, derive_seed(seed, number, "interval reverse"), u)
    at = positions.to(reverse.device)
    found = bounds_by_annealing(forward["log_weight"][:, at], reverse[:, at], proposal.block.eps)
    return found | {"method": torch.ones(len(weak), dtype=torch.long), "acceptance": acceptance.cpu()[positions]}
