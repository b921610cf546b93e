"""What a proposal is worth for a model: bounds of log p(x) on both sides, for data simulated from the model."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ppvae.data.loader import read_rows
from ppvae.errors import UsageError, count_of
from ppvae.errors.calls import explain_call
from ppvae.errors.ranges import check_numbers, check_ranges
from ppvae.evaluation.annealing.bdmc import HOLDS_FOR, bdmc, check_reversible, simulated_rows
from ppvae.evaluation.blocks import DATA_BLOCK, PARTICLE_BLOCK, Block, Evaluation, run_blocks, start_evaluation
from ppvae.evaluation.evidence.escalation import refinable_run
from ppvae.evaluation.evidence.two_sided import TwoSidedBounds, annealed_gap, bounds_by_swap
from ppvae.evaluation.importance.guide_proposal import GuideProposal
from ppvae.evaluation.proposals.log_weights import Proposal, RefinedProposal, select_rows
from ppvae.evaluation.results import mean_and_error, mean_words
from ppvae.evaluation.simulated_data import Assemble, block_columns, simulate_data
from ppvae.inference.tracing import Program
from ppvae.rng import derive_seed, seed_all

FURTHER_DATA = 20  # at most, on which the further rungs are tried
PRIOR_CHAINS, PRIOR_TEMPERATURES, PRIOR_LEAPFROG = 16, 200, 5
MISSED_SHARE = 0.5  # of all weight: an exact draw with more of it lies where the proposal does not
FURTHER_RUNGS = {  # fields of a block's result, in the order of cost
    "refined": "a refined proposal",
    "annealed": "annealing from the refined proposal, method='auto'",
    "prior": f"annealing from the prior, annealed(..., start='prior', num_temperatures={PRIOR_TEMPERATURES})",
}


@dataclass(frozen=True)
class ProposalBracket(TwoSidedBounds):
    """Bounds of log p(x) by K draws of a proposal on data simulated from the model; nats per datum, float64, all [N].

    Attributes:
        lower: log mean w over K draws of the proposal, a lower bound in expectation.
        upper: log mean w over K - 1 of them and the exact posterior draw, an upper bound in expectation.
        exact_share: of the exact draw in the weights behind `upper`; above a half it lies where the proposal does not.
        further: {rung: gap of the bounds by a costlier method [n]} on the first data, where the bracket is wide.
        tolerance: the mean width in nats up to which the verdict is that the proposal suffices.
        data: the columns [N, ...] of the simulated batch; not saved to files.
    """

    exact_share: Tensor
    num_particles: int
    proposal: str
    seed: int
    tolerance: float = 0.1
    joint: bool = False
    further: dict[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    data: tuple[Tensor, ...] = field(default=(), repr=False, metadata={"saved": False})

    @property
    def missed(self) -> int:
        """The number of data whose exact posterior draw outweighs all draws of the proposal."""
        return int((self.exact_share > MISSED_SHARE).sum())

    @property
    def sufficient(self) -> bool:
        """Whether the mean width is within the tolerance, and no more than 1 % of the exact draws outweigh the rest."""
        return self.width <= self.tolerance and self.missed <= 0.01 * len(self.lower)

    @property
    def remedy(self) -> str:
        """The first further rung whose mean gap is within the tolerance; "" where none was tried or none is."""
        names = [name for name, gap in self.further.items() if mean_and_error(gap)[0] <= self.tolerance]
        return FURTHER_RUNGS[names[0]] if names else ""

    @property
    def verdict(self) -> str:
        """What the bracket says of the proposal, and which rung closes it where it is wide."""
        error = "" if math.isnan(self.width_std_error) else f" ± {self.width_std_error:.3f}"
        words = f"{self.width:.3f}{error} nats"
        if not math.isfinite(self.width):
            return f"not known: the bounds of {count_of(int((~self.gap.isfinite()).sum()))} are not finite"
        if self.sufficient:
            return (
                f"the {self.proposal} proposal at K = {self.num_particles} suffices: log p(x) is known within {words}"
            )
        text = f"wide: log p(x) is known within {words} only"
        if self.missed:
            text += (
                f", and the exact posterior draw of {self.missed} of {count_of(len(self.lower))} outweighs all "
                f"draws of the proposal, which misses modes or tails that no weight of its own shows"
            )
        if not self.further:
            return text
        tried = ", ".join(f"{mean_words(gap)} by {FURTHER_RUNGS[name]}" for name, gap in self.further.items())
        closes = f"{self.remedy} closes it" if self.remedy else "nothing that was tried closes it: a better guide"
        return f"{text}; {closes} (on {count_of(len(next(iter(self.further.values()))))}: {tried})"

    def summary(self) -> str:
        """The bracket as text.

        >>> one = torch.ones(2).double()
        >>> print(ProposalBracket(-one, -0.9 * one, 0 * one, 0 * one, 0 * one, 0 * one, 100, "refined", 0).summary())
        log p(x) of 2 simulated data lies between -1.000 and -0.900 nats on average
        the refined proposal at K = 100 suffices: log p(x) is known within 0.100 ± 0.000 nats
        it certifies these settings on data simulated from the model, and says nothing of other data
        """
        lines = [
            f"log p(x) of {len(self.lower)} simulated data lies between {float(self.lower.mean()):.3f} and "
            f"{float(self.upper.mean()):.3f} nats on average",
            self.verdict,
        ]
        if broken := int((self.nonfinite > 0).sum()):
            lines.append(count_of(broken, "datum has", "data have") + " non-finite weights")
        return "\n".join([*lines, *self.notes, HOLDS_FOR])

    def table(self) -> dict[str, str]:
        """The means over the data set as strings, for printing."""
        rows = simulated_rows(self.lower, self.upper, self.joint) | {
            "proposal": self.proposal,
            "particles": str(self.num_particles),
            "verdict": self.verdict,
            "holds for": HOLDS_FOR,
        }
        return rows | {f"note {i}": note for i, note in enumerate(self.notes, 1)}


@explain_call
def bracket(
    model: Program,
    guide: Program,
    data_like: Any,
    *,
    num_data: int = 100,
    num_particles: int = 1000,
    proposal: Literal["guide", "refined"] = "refined",
    tolerance: float = 0.1,
    further: bool = True,
    seed: int = 0,
    rows: int | None = None,
    assemble: Assemble | None = None,
    directory: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> ProposalBracket:
    """Bounds log p(x) on both sides for data simulated from the model: what a proposal with K draws is worth for it.

    A latent z* simulated together with x is an exact draw of p(z | x). With w = p(x, z) / q(z | x) and z_k ~ q,

        E log (1/K) sum_{k <= K} w(z_k)  <=  log p(x)  <=  E log (1/K) (w(z*) + sum_{k < K} w(z_k)),

    at the price of one evaluation beyond the K. The mean gap is about 1 / ess where q covers the posterior, and large
    where it misses a mode or a tail: there z* has a weight that no draw of q shows. Where the mean gap is above the
    tolerance, costlier methods bracket the first 20 data in turn, until one closes the gap: a refined proposal,
    annealing from it, annealing from the prior.

    Args:
        model, guide: a Pyro pair that keeps the contract, or run.model, run.guide.
        data_like: gives the shapes and the covariates of the model, row after row; its observed values are replaced.
            Missing values are simulated too.
        num_data: simulated data; a pair whose latents are global, or whose plate draws the rows, takes those of
            `data_like`.
        num_particles: K.
        proposal: as for `log_marginal`. A pair that cannot be refined is bracketed by its guide, and a note says why.
            Draws are independent, where `log_marginal` fixes the share of the guide.
        tolerance: the mean width that suffices, nats per datum.
        further: try costlier methods where the bracket is wide.
        seed: of the simulated data and of every draw.
        rows: the largest number of (datum, particle) rows in one run of the pair, 5000 by default.
        assemble: (simulated values by site, batch) -> batch that contains them; for a pair whose observed values are
            not columns of the batch.
        directory: cache of finished blocks; the same call resumes from it after an interruption.
        device: where to compute; the parameters' device by default.
        progress: show a progress bar; by default where the output is a terminal.

    Raises:
        ContractError: the batch cannot take the simulated values, the model is not normalised, or the guide samples
            helpers or enumerated sites, by the site's name; UsageError, DataError: invalid arguments or data.

    Source: Grosse, Ghahramani and Adams 2015 (arXiv 1511.02543); Sobolev and Vetrov 2019 (arXiv 1905.03290).

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2).double().requires_grad_(False), torch.zeros(6, 3).double()
    >>> found = bracket(pair.model, pair.mean_field, x, num_data=20)
    >>> found.low < float(pair.log_px(found.data[0]).mean()) < found.high, found.sufficient
    (True, True)
    """
    check_numbers(num_data=num_data, num_particles=num_particles, tolerance=tolerance, seed=seed)
    check_ranges(rows=rows)
    if num_particles < 2:
        raise UsageError(f"num_particles: expected at least 2, found {num_particles}")
    if proposal not in ("guide", "refined"):
        raise UsageError(f"proposal: expected 'guide' or 'refined', found {proposal!r}")
    rows = DATA_BLOCK * PARTICLE_BLOCK if rows is None else rows
    settings = {
        "what": "bracket", "num_data": num_data, "num_particles": num_particles, "proposal": proposal,
        "tolerance": tolerance, "further": further,
    }  # fmt: skip
    with start_evaluation(model, guide, data_like, seed=seed, device=device) as run:
        run = replace(run, columns=_columns(run, num_data))
        refinable, refused = refinable_run(run)
        if proposal == "refined" and refinable is not None:
            run = refinable
        has_base = refinable is not None and refinable.model is not run.model
        check_reversible(run.structure, "use proposal='refined'" if has_base else "use bdmc(start='prior')")
        kind = "guide" if refinable is None else proposal
        sampler = _Bracketing(run, kind, num_particles, rows, refinable is run, assemble)
        allowed = tolerance if further else math.inf
        found = run_blocks(
            run, lambda block: sampler(block, allowed), settings, desc="bracket", directory=directory,
            progress=progress, figures={"gap": lambda bounds: bounds["upper"] - bounds["lower"]},
        )  # fmt: skip
        few = tuple(column[:FURTHER_DATA] for column in run.columns)
    simulated = tuple(found.pop(f"data_{i}") for i in range(len(run.columns)))
    tried = {name: found.pop(f"further_{name}") for name in ("refined", "annealed")}
    tried = {name: gap[~gap.isnan()] for name, gap in tried.items() if not bool(gap.isnan().all())}
    notes = (refused if refinable is run else f"the guide's own draws: {refused}",) if refused else ()
    notes = notes if proposal == "refined" else ()
    out = ProposalBracket(
        **found, num_particles=num_particles, proposal=sampler.proposal, seed=seed, tolerance=tolerance,
        joint=run.structure.has_global_latents, further=tried, notes=notes, data=simulated,
    )  # fmt: skip
    if not further or out.sufficient or out.remedy or refinable is not run or run.structure.enumerated:
        return out
    by_prior = bdmc(
        model, guide, few if len(few) > 1 else few[0], num_chains=PRIOR_CHAINS, num_temperatures=PRIOR_TEMPERATURES,
        num_leapfrog=PRIOR_LEAPFROG,
        start="prior", seed=seed, rows=rows, assemble=assemble, device=device, progress=progress,
        directory=None if directory is None else os.path.join(directory, "prior"),
    )  # fmt: skip
    return replace(out, further=out.further | {"prior": by_prior.gap})


def _columns(run: Evaluation, num_data: int) -> tuple[Any, ...]:
    """The rows of the data, repeated until there are `num_data`, without missing values."""
    s = run.structure
    if s.draws_subsample or s.has_global_latents:
        return run.columns
    rows = torch.arange(num_data) % run.num_data
    columns = (read_rows(column, rows, run.device) for column in run.columns)
    return tuple(c.nan_to_num(0.0) if c.is_floating_point() else c for c in columns)


@dataclass(frozen=True)
class _Bracketing:
    """The function of one block behind `bracket`."""

    run: Evaluation
    proposal: str
    num_particles: int
    rows: int
    refinable: bool
    assemble: Assemble | None

    def __call__(self, block: Block, tolerance: float) -> dict[str, Tensor]:
        """Both bounds of a block of simulated data by field, and the columns of its batch."""
        seed_all(derive_seed(self.run.seed, block.number, "simulated"))
        simulated, latents = simulate_data(self.run.model, block.s, block, self.assemble)
        found = self._bounds(self._proposal(simulated, self.proposal), latents)
        found |= {f"data_{i}": column.cpu() for i, column in enumerate(block_columns(simulated))}
        width = len(found["lower"])
        further = {name: torch.full((width,), torch.nan, dtype=torch.float64) for name in ("refined", "annealed")}

        def wide(gap: Tensor) -> bool:
            return not float(gap.mean()) <= tolerance

        if block.number == 0 and self.refinable and wide(found["upper"] - found["lower"]):
            rows = torch.arange(min(FURTHER_DATA, block.size))
            few, at = select_rows(self.run, simulated, rows)
            at = at[: few.num_weights]
            if few is not simulated:
                latents = {n: _select(v, rows, self.run.structure.event_dims[n]) for n, v in latents.items()}
            refined = self._proposal(few, "refined")
            gap = found["upper"] - found["lower"]
            if self.proposal == "guide":
                bounds = self._bounds(refined, latents)
                gap = (bounds["upper"] - bounds["lower"])[at]
                further["refined"][: len(gap)] = gap
            if wide(gap) and isinstance(refined, RefinedProposal):
                gap = annealed_gap(refined, latents)[at]
                further["annealed"][: len(gap)] = gap
        return found | {f"further_{name}": gap for name, gap in further.items()}

    def _proposal(self, block: Block, kind: str) -> Proposal:
        if kind == "guide":
            return GuideProposal(self.run, block, self.rows)
        return RefinedProposal(self.run, block, self.rows, independent=True)

    def _bounds(self, proposal: Proposal, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return bounds_by_swap(proposal, proposal.log_weights_at(latents), self.num_particles, "bracket")


def _select(value: Tensor, rows: Tensor, event_dims: int) -> Tensor:
    """Some rows of a latent [*inner, batch, *event]."""
    axis = value.dim() - event_dims - 1
    return value if axis < 0 or value.shape[axis] == 1 else value.index_select(axis, rows.to(value.device))
