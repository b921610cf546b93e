"""log p(x) per datum by annealed importance sampling and sequential Monte Carlo, for continuous latents."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ppvae.data.loader import data_digest
from ppvae.errors.calls import explain_call
from ppvae.evaluation.annealing.chains import run_forward_chains
from ppvae.evaluation.annealing.setup import AnnealingSession, AnnealingSettings
from ppvae.evaluation.block_cache import BlockContext
from ppvae.evaluation.blocks import Block, run_blocks, start_evaluation
from ppvae.evaluation.estimate import Estimate
from ppvae.evaluation.importance.accumulators import LogWeightAccumulator, recorded_bounds
from ppvae.evaluation.reliability import assess_chains
from ppvae.inference.contract.support import base_measure_of, count_observed
from ppvae.inference.tracing import Program

DIAGNOSTICS = ("acceptance", "step_size", "resampled")


@explain_call
def annealed(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_chains: int = 16,
    num_temperatures: int = 1000,
    start: str = "guide",
    schedule: str | Sequence[float] | Tensor = "sigmoid",
    resample: float = 0.0,
    num_leapfrog: int = 10,
    target_acceptance: float = 0.8,
    seed: int = 0,
    rows: int | None = None,
    directory: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    compile: bool = True,
    progress: bool | None = None,
) -> Estimate:
    """Annealed importance sampling of log p(x) per datum, for any pair with continuous latents.

    Chains go from q(z | x) to p(x, z) along (1 - beta) log q + beta log p, one HMC transition at each of the inverse
    temperatures between; log w = sum_t (beta_t - beta_{t-1}) (log p(x, z_{t-1}) - log q(z_{t-1} | x)), and log_px is
    log mean w over the chains: a stochastic lower bound, and much tighter than importance sampling where guide and
    posterior differ. It misses a mode that no chain reaches: `bdmc` certifies settings on simulated data. With one
    temperature it is `log_marginal`. Enumerated sites are summed out exactly, masked latents stay at their first draw.

    Step sizes are adapted per datum and temperature on a pilot run of 4 chains and then frozen. Cost:
    (num_chains + 4) x num_temperatures x num_leapfrog gradients per datum; a guide with several latents, or a flow,
    runs again at each.

    Args:
        model, guide: a Pyro pair that keeps the contract, or run.model, run.guide.
        data: a tensor [N, *event], a split, or a tuple of them: the pair is called as model(*batch).
        num_chains: independent chains per datum.
        num_temperatures: T, the steps from q to p.
        start: the start density q, "guide", or "prior" for chains that do not depend on the guide's fit.
        schedule: "sigmoid", "linear", "equal_ess" (set per datum from the pilot run, so that each step loses the same
            effective sample size), or the T + 1 inverse temperatures, from 0 to 1.
        resample: sequential Monte Carlo: where a datum's effective sample size falls under this share of its chains,
            they are resampled. 0.5 is usual; 0 turns it off. All chains then run at once.
        num_leapfrog: leapfrog steps per transition.
        target_acceptance: the acceptance probability that the pilot run adapts step sizes to.
        seed: of every draw. The result does not depend on `rows`.
        rows: the largest number of (datum, chain) rows in one run of the pair, 5000 by default; memory grows with it.
        directory: cache of finished blocks; the same call resumes from it after an interruption.
        device: where to compute; the parameters' device by default.
        compile: take gradients from a compiled graph where the run needs 30,000 or more. The graph agrees with the pair
            up to rounding, which chains amplify: the estimate differs from the uncompiled one within its error.
        progress: show a progress bar; by default where the output is a terminal.

    Returns:
        An `Estimate` whose K is num_chains; `diagnostics` holds acceptance, the last step size and the number of
        resampling steps per datum. Reliable: all weights finite, ess >= min(50, K / 2), acceptance >= 0.2.

    Raises:
        ContractError: the pair breaks the contract, a latent is discrete and not summed out, or its support has no
            transform to real numbers, by the site's name; UsageError, DataError: invalid arguments, data or directory.

    Source: Neal 2001 (arXiv physics/9803008); for deep generative models Wu et al. 2017 (arXiv 1611.04273).

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2).double(), torch.ones(4, 3).double()
    >>> est = annealed(pair.model, pair.mean_field, x, num_temperatures=50)
    >>> bool((est.log_px - pair.log_px(x)).abs().max() < 0.2), est.method
    (True, 'annealed importance sampling')
    """
    settings = AnnealingSettings(
        num_chains, num_temperatures, start, schedule, num_leapfrog, target_acceptance, seed, rows, resample,
        compile,
    )  # fmt: skip
    with start_evaluation(model, guide, data, seed=seed, device=device) as run:
        session = AnnealingSession.start(run, settings)
        run, s = session.run, session.run.structure
        found = run_blocks(
            run, lambda block, tracker: _anneal_block(session, block, tracker), settings.cache_key("annealed"),
            desc="log p(x)", directory=directory, progress=progress, parts=True, unit="step",
            steps=settings.progress_steps(len(settings.chain_blocks)),
            figures={"nll": lambda statistics: -statistics["log_px"]},
        )  # fmt: skip
    base, levels, notes = base_measure_of(run.columns[0], s)
    dims, missing_note = count_observed(int(found.pop("missing").sum()), run.columns, s)
    diagnostics: dict[str, Tensor] = {name: found.pop(name) for name in DIAGNOSTICS if name in found}
    bounds = {int(name.removeprefix("bound_")): found.pop(name) for name in list(found) if name.startswith("bound_")}
    reliable = None
    if num_temperatures > 1:
        reliable = assess_chains(
            ess=found["ess"], nonfinite=found["nonfinite"], acceptance=diagnostics["acceptance"],
            num_chains=num_chains,
        ).reliable  # fmt: skip
    return Estimate(
        **found,  # type: ignore[arg-type]
        num_particles=num_chains,
        seed=seed,
        dims=dims * (run.num_data if s.has_global_latents else 1),
        base_measure=base,
        levels=levels,
        joint=s.has_global_latents,
        data=getattr(run.columns[0], "description", ""),
        digest=data_digest(run.columns),
        bounds=bounds,
        notes=notes + missing_note,
        method="sequential Monte Carlo" if resample else "annealed importance sampling",
        settings=settings.attributes(),
        diagnostics=diagnostics,
        reliable_override=reliable,
    )


def _anneal_block(session: AnnealingSession, block: Block, progress: BlockContext) -> dict[str, Tensor]:
    """The estimate and the diagnostics of one block of data, by field."""
    settings, number = session.settings, block.number
    potential = session.potential(block)
    path = session.path(potential, number, progress)
    bounds = [settings.num_chains] if settings.resample else recorded_bounds(settings.num_chains)
    weights = LogWeightAccumulator(settings.num_chains, bounds, block.eps)
    width = block.num_weights
    acceptance = resampled = torch.zeros(width, dtype=torch.float64)
    for i, count in enumerate(settings.chain_blocks):

        def run(i: int = i, count: int = count) -> dict[str, Tensor]:
            noise = session.noise(number, i)
            start = potential.sample_start(count)
            elbo = potential.elbo(start)
            chains = run_forward_chains(path, start, settings.resample, noise, progress.advance)
            return {"elbo": elbo, **vars(chains)}

        part = progress.part(f"chains-{number:05d}-{i:05d}", run)
        part = {name: value.cpu()[..., :width] for name, value in part.items()}
        weights.add(part["log_weight"], part["elbo"])
        acceptance = acceptance + part["acceptance"] * count / settings.num_chains
        resampled = resampled + part["resampled"]
    result = weights.result() | {"missing": torch.tensor(block.num_missing)}
    if settings.num_temperatures > 1:
        result |= {"acceptance": acceptance, "step_size": path.step_sizes[-2].cpu()[:width]}
    if settings.resample:
        result["resampled"] = resampled
    return result
