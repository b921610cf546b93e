"""Bidirectional Monte Carlo: stochastic lower and upper bounds of log p(x) on simulated data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ppvae.errors import count_of, site_error
from ppvae.errors.calls import explain_call
from ppvae.evaluation.annealing.chains import run_forward_chains, run_reverse_chains
from ppvae.evaluation.annealing.setup import AnnealingSession, AnnealingSettings
from ppvae.evaluation.block_cache import BlockCache, BlockContext
from ppvae.evaluation.blocks import Block, run_blocks, start_evaluation
from ppvae.evaluation.importance.accumulators import LogWeightAccumulator, two_sided
from ppvae.evaluation.results import SaveableResult, mean_words
from ppvae.evaluation.simulated_data import Assemble, block_columns, simulate_data
from ppvae.inference.structure import Role, Structure
from ppvae.inference.tracing import Program

HOLDS_FOR = "it certifies these settings on data simulated from the model, and says nothing of other data"

IN_THE_MODEL = "enumerate it in the model if the pair is your own; log p(x) stands without a bracket"


@dataclass(frozen=True)
class Bracket(SaveableResult):
    """Lower and upper bounds of log p(x) on simulated data; nats per datum, float64, all [N].

    Attributes:
        lower: log mean w over forward chains, a lower bound in expectation.
        upper: -log mean 1/w over reverse chains from the simulated latents, an upper bound in expectation.
        lower_std_error, upper_std_error: Monte-Carlo standard errors over the chains.
        acceptance: mean acceptance probability of the forward chains.
        nonfinite: number of non-finite log-weights of forward and reverse chains.
        data: the columns [N, ...] of the simulated batch; not saved to files.
    """

    lower: Tensor
    upper: Tensor
    lower_std_error: Tensor
    upper_std_error: Tensor
    acceptance: Tensor
    nonfinite: Tensor
    seed: int
    joint: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    data: tuple[Tensor, ...] = field(default=(), repr=False, metadata={"saved": False})

    @property
    def gap(self) -> Tensor:
        """upper - lower, [N] nats; on average it bounds the error of either."""
        return self.upper - self.lower

    def summary(self) -> str:
        """The bracket as text.

        >>> one = torch.ones(2).double()
        >>> print(Bracket(-one, -0.9 * one, 0 * one, 0 * one, one, 0 * one, 0).summary())
        log p(x) of 2 simulated data lies between -1.000 and -0.900 nats on average: a gap of 0.100 ± 0.000
        it certifies these settings on data simulated from the model, and says nothing of other data
        """
        lines = [
            f"log p(x) of {len(self.lower)} simulated data lies between {float(self.lower.mean()):.3f} and "
            f"{float(self.upper.mean()):.3f} nats on average: a gap of {mean_words(self.gap)}"
        ]
        if int((self.nonfinite > 0).sum()):
            lines.append(count_of(int((self.nonfinite > 0).sum()), "datum has", "data have") + " non-finite weights")
        lines.append(HOLDS_FOR)
        return "\n".join(lines)

    def table(self) -> dict[str, str]:
        """The means over the data set as strings, for printing."""
        rows = simulated_rows(self.lower, self.upper, self.joint) | {
            "acceptance": f"{float(self.acceptance.mean()):.2f}",
            **{name: str(value) for name, value in self.settings.items()},
            "holds for": HOLDS_FOR,
        }
        broken = int((self.nonfinite > 0).sum())
        return rows | ({"non-finite weights": count_of(broken)} if broken else {})


def simulated_rows(lower: Tensor, upper: Tensor, joint: bool) -> dict[str, str]:
    """Rows of a table of bounds [N] for data simulated from the model."""
    unit = "nats for the whole data set" if joint else "nats per datum"
    return {
        "data": f"{len(lower)} simulated from the model",
        "log p(x) from below": f"{mean_words(lower)} {unit}",
        "log p(x) from above": f"{mean_words(upper)} {unit}",
        "gap": f"{mean_words(upper - lower)}; on average it bounds the error of either",
    }


@explain_call
def bdmc(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_chains: int = 16,
    num_temperatures: int = 1000,
    start: str = "guide",
    schedule: str | Sequence[float] | Tensor = "sigmoid",
    num_leapfrog: int = 10,
    target_acceptance: float = 0.8,
    seed: int = 0,
    rows: int | None = None,
    assemble: Assemble | None = None,
    directory: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    compile: bool = True,
    progress: bool | None = None,
) -> Bracket:
    """Bidirectional Monte Carlo: brackets log p(x) on data simulated from the model, to certify `annealed`'s settings.

    A latent simulated together with x is an exact draw of p(z | x), from which chains run in reverse to the start
    density. Forward chains give E[w] = p(x), a lower bound of log p(x) in expectation; reverse chains give
    E[1 / w] = 1 / p(x), an upper bound. The mean gap bounds the mean error of either, on simulated data only.

    Args:
        model, guide: a Pyro pair with continuous latents, as `annealed` takes it.
        data: gives the shapes and the covariates of the model; its observed values are replaced.
        assemble: (simulated values by site, batch) -> batch that contains them; for a pair whose observed values are
            not columns of the batch.
        num_chains, num_temperatures, start, schedule, num_leapfrog, target_acceptance, rows, directory, device,
            compile, progress: as `annealed` takes them; forward and reverse chains share the pilot's step sizes and
            schedule.
        seed: of the simulated data and of every draw.

    Raises:
        ContractError: the batch cannot take the simulated values, or the pair cannot be annealed, by the site's name;
            UsageError, DataError: invalid arguments or data.

    Source: Grosse, Ghahramani and Adams 2015 (arXiv 1511.02543); Grosse, Ancha and Roy 2016 (arXiv 1606.02275).

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2).double(), torch.zeros(6, 3).double()
    >>> bracket = bdmc(pair.model, pair.mean_field, x, num_temperatures=50)
    >>> exact = pair.log_px(bracket.data[0])
    >>> bool((exact - bracket.lower).abs().max() < 0.2), bool((bracket.upper - exact).abs().max() < 0.2)
    (True, True)
    """
    settings = AnnealingSettings(
        num_chains, num_temperatures, start, schedule, num_leapfrog, target_acceptance, seed, rows,
        compile=compile,
    )  # fmt: skip
    with start_evaluation(model, guide, data, seed=seed, device=device) as run:
        session = AnnealingSession.start(run, settings)
        run = session.run
        check_reversible(run.structure)
        found = run_blocks(
            run, lambda block, tracker: _bracket_simulated_data(session, block, assemble, tracker),
            settings.cache_key("bdmc"), desc="BDMC", directory=directory, progress=progress, parts=True, unit="step",
            steps=settings.progress_steps(2 * len(settings.chain_blocks)),
            figures={"gap": lambda bounds: bounds["upper"] - bounds["lower"]},
        )  # fmt: skip
    simulated = tuple(found.pop(f"data_{i}").cpu() for i in range(len(run.columns)))
    attributes = {k: v for k, v in settings.attributes().items() if k != "resample"}
    return Bracket(**found, seed=seed, joint=run.structure.has_global_latents, settings=attributes, data=simulated)


def check_reversible(s: Structure, cure: str = "use start='prior'") -> None:
    """Refuses a guide with enumerated sites, or auxiliary ones (with the cure): no chain can start at given latents."""
    for name, role in s.guide_roles.items():
        if role in (Role.AUXILIARY, Role.ENUMERATED):
            raise site_error(
                name, "a guide that samples the latents themselves, to start a chain at given ones",
                "a helper" if role is Role.AUXILIARY else "a site enumerated in the guide",
                cure if role is Role.AUXILIARY else IN_THE_MODEL,
            )  # fmt: skip


def _bracket_simulated_data(
    session: AnnealingSession, block: Block, assemble: Assemble | None, progress: BlockContext
) -> dict[str, Tensor]:
    """Both bounds for one block of simulated data, by field, and the columns of its batch."""

    def run() -> dict[str, Tensor]:
        session.noise(block.number, "simulated")
        simulated, latents = simulate_data(session.run.model, block.s, block, assemble)
        bounds = _bracket_block(session, simulated, latents, BlockContext(BlockCache(None, {}), progress.bar))
        return bounds | {f"data_{i}": column for i, column in enumerate(block_columns(simulated))}

    return progress.part(f"block-{block.number:05d}", run)


def _bracket_block(
    session: AnnealingSession, block: Block, latents: Mapping[str, Tensor], progress: BlockContext
) -> dict[str, Tensor]:
    """Both bounds for one block of simulated data, by field."""
    settings, number = session.settings, block.number
    potential = session.potential(block)
    path = session.path(potential, number, progress)
    width = block.num_weights
    weights = LogWeightAccumulator(settings.num_chains, [], block.eps)
    inverse_weights = LogWeightAccumulator(settings.num_chains, [], block.eps)
    acceptance = torch.zeros(width, dtype=torch.float64)
    for i, count in enumerate(settings.chain_blocks):
        noise = session.noise(number, i)
        chains = run_forward_chains(path, potential.sample_start(count), 0.0, noise, progress.advance)
        weights.add(chains.log_weight[:, :width], chains.log_weight[:, :width])
        acceptance = acceptance + chains.acceptance[:width].cpu() * count / settings.num_chains
        posterior_draw = potential.space.expand(latents, count)
        reverse = run_reverse_chains(path, posterior_draw, session.noise(number, i, "reverse"), progress.advance)
        inverse_weights.add(-reverse[:, :width], -reverse[:, :width])
    return two_sided(weights, inverse_weights) | {"acceptance": acceptance}
