"""log p(x) by annealed importance sampling and sequential Monte Carlo, per datum, for continuous latents."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ppvae.distributed import distributed_context, progress_disabled
from ppvae.evaluation.annealing.hmc import forward
from ppvae.evaluation.annealing.session import Bar, Session, Settings, session
from ppvae.evaluation.block_cache import BlockCache, cache_key
from ppvae.evaluation.blocks import as_columns, data_digest
from ppvae.evaluation.estimate import Estimate, base_measure_of
from ppvae.evaluation.importance.accumulators import LogWeightAccumulator, recorded_bounds
from ppvae.evaluation.reliability import assess_chains
from ppvae.inference.tracing import Program
from ppvae.rng import fork_rng

DIAGNOSTICS = ("acceptance", "step_size", "resampled")


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
    log mean w over the chains: a lower bound on average, and much tighter than importance sampling where guide and
    posterior differ. It cannot see a mode that no chain reaches: `bdmc` certifies settings on simulated data. With one
    temperature it is `log_marginal`. Enumerated sites are summed out exactly, masked latents stay where they are drawn.

    Step sizes are adapted for each datum and temperature on a pilot run of 4 chains and then frozen. Cost:
    num_chains + 4 chains x num_temperatures x num_leapfrog gradients per datum; a guide with several latents, or a
    flow, is run again at each.

    Args:
        model, guide: a Pyro pair that keeps the contract, or run.model, run.guide.
        data: a tensor [N, *event], a split, or a tuple of them: the pair is called as model(*batch).
        num_chains: independent chains per datum.
        num_temperatures: T, the steps from q to p.
        start: "guide", or "prior" for chains that owe nothing to the guide's fit.
        schedule: "sigmoid", "linear", "equal_ess" (measured per datum on the pilot run, so that each step loses the
            same effective sample size), or the T + 1 inverse temperatures themselves, from 0 to 1.
        resample: sequential Monte Carlo: where a datum's effective sample size falls under this share of its chains,
            they are resampled. 0.5 is usual; 0 never does. All chains then run at once.
        num_leapfrog: leapfrog steps per transition.
        target_acceptance: what the pilot run adapts step sizes to.
        seed: of every draw. The same seed gives the same result however memory is cut.
        rows: the most (datum, chain) rows that go through the pair at once, 5000 by default; memory grows with it.
        directory: finished blocks are kept here; the same call goes on from them after an interruption.
        device: where to compute; the parameters' device by default.
        compile: take gradients from a compiled graph where there are 30,000 or more of them. It gives the same up to
            rounding, which chains amplify: the estimate is another one, as good, than without.
        progress: show a progress bar; by default where the output is a terminal.

    Returns:
        An `Estimate` whose K is num_chains; `diagnostics` holds acceptance and the last step size per datum, and how
        often it was resampled. Reliable: all weights finite, ess >= min(50, K / 2), acceptance >= 0.2.

    Raises:
        ContractError: the pair breaks the contract, a latent is discrete and not summed out, or its support has no
            transform to real numbers, by the site's name; UsageError, DataError: bad arguments, data or directory.

    Source: Neal 2001 (arXiv physics/9803008); for deep generative models Wu et al. 2017 (arXiv 1611.04273).

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2).double(), torch.ones(4, 3).double()
    >>> est = annealed(pair.model, pair.mean_field, x, num_temperatures=50)
    >>> bool((est.log_px - pair.log_px(x)).abs().max() < 0.2), est.method
    (True, 'annealed importance sampling')
    """
    settings = Settings(
        num_chains, num_temperatures, start, schedule, num_leapfrog, target_acceptance, seed, rows, resample,
        compile,
    )  # fmt: skip
    with distributed_context() as shares:
        columns = as_columns(data, seed)
        with fork_rng(), session(model, guide, columns, settings, device) as ready:
            s = ready.s
            key = key_of_chains(ready, "annealed")
            store = BlockCache(directory, key)
            parts: dict[int, dict[str, Tensor]] = {}
            mine = shares.mine(ready.blocks)
            with Bar(len(mine), len(settings.chain_blocks), settings, progress_disabled(progress), "log p(x)") as bar:
                for number in mine:
                    parts[number] = _of_block(ready, number, store, bar)
                    bar.say(nll=f"{-torch.cat([r['log_px'] for r in parts.values()]).mean():.3f}")
        results = shares.gathered(parts, key)
    joined = {name: torch.cat([r[name] for r in results]) for name in results[0]}
    base, levels, notes = base_measure_of(columns[0], s)
    diagnostics: dict[str, Tensor] = {name: joined.pop(name) for name in DIAGNOSTICS if name in joined}
    bounds = {int(name.removeprefix("bound_")): joined.pop(name) for name in list(joined) if name.startswith("bound_")}
    reliable = None
    if num_temperatures > 1:
        reliable = assess_chains(
            ess=joined["ess"], nonfinite=joined["nonfinite"], acceptance=diagnostics["acceptance"],
            num_chains=num_chains,
        ).reliable  # fmt: skip
    return Estimate(
        **joined,  # type: ignore[arg-type]
        num_particles=num_chains,
        seed=seed,
        dims=s.observed_dims * (len(columns[0]) if s.has_global_latents else 1),
        base_measure=base,
        levels=levels,
        joint=s.has_global_latents,
        data=getattr(columns[0], "description", ""),
        digest=data_digest(columns),
        bounds=bounds,
        notes=notes,
        method="sequential Monte Carlo" if resample else "annealed importance sampling",
        settings=settings.attributes(),
        diagnostics=diagnostics,
        reliable_override=reliable,
    )


def key_of_chains(ready: Session, what: str) -> dict[str, Any]:
    """What a result of chains is a function of, as strings and numbers."""
    settings = ready.settings
    more = {"what": what, "seed": settings.seed, "betas": settings.betas.tolist()}
    return cache_key(ready.columns, ready.s, ready.modules, settings.attributes() | more)


def _of_block(ready: Session, number: int, store: BlockCache, bar: Bar) -> dict[str, Tensor]:
    """Everything that is reported of one block of data."""
    settings, block = ready.settings, ready.block(number)
    density = ready.density(block)
    plan = ready.plan(density, number, store, bar)
    bounds = [settings.num_chains] if settings.resample else recorded_bounds(settings.num_chains)
    weights = LogWeightAccumulator(settings.num_chains, bounds, block.eps)
    width = 1 if ready.s.has_global_latents else block.size
    acceptance = resampled = torch.zeros(width, dtype=torch.float64)
    for i, count in enumerate(settings.chain_blocks):

        def made(i: int = i, count: int = count) -> dict[str, Tensor]:
            noise = ready.noise(number, i)
            start = density.start(count)
            return {"elbo": density.elbo(start), **vars(forward(plan, start, settings.resample, noise, bar.update))}

        part, there = store.part(f"chains-{number:05d}-{i:05d}", made)
        if there:
            bar.update(settings.num_temperatures - 1)
        part = {name: value.cpu()[..., :width] for name, value in part.items()}
        weights.add(part["log_weight"], part["elbo"])
        acceptance = acceptance + part["acceptance"] * count / settings.num_chains
        resampled = resampled + part["resampled"]
    result = weights.result()
    if settings.num_temperatures > 1:
        result |= {"acceptance": acceptance, "step_size": plan.steps[-2].cpu()[:width]}
    if settings.resample:
        result["resampled"] = resampled
    return result
