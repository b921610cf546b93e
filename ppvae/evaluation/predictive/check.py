"""Predictive checks: whether data that the model replicates have the statistics of the data observed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ppvae.data.admission import column_names
from ppvae.data.loader import data_digest
from ppvae.errors import UsageError
from ppvae.errors.calls import explain_call
from ppvae.errors.ranges import PROBABILITY, check_numbers, check_ranges
from ppvae.evaluation.blocks import Block, run_blocks, start_evaluation
from ppvae.evaluation.calibration import p_value, pointwise_p_values
from ppvae.evaluation.predictive.p_values import jittered, predictive_p, random_ranks
from ppvae.evaluation.predictive.replicates import Replicator, Statistic, default_statistics
from ppvae.evaluation.predictive.result import PredictiveCheck, Tensors
from ppvae.evaluation.simulated_data import Assemble, block_columns, sites_of_columns
from ppvae.inference.tracing import Program
from ppvae.rng import derive_seed

OVER: Mapping[str, Callable[[Tensor], Tensor]] = {"mean": torch.mean, "standard deviation": torch.std}


@explain_call
def predictive_check(
    model: Program,
    guide: Program,
    data: Any,
    statistics: Mapping[str, Statistic] | None = None,
    *,
    over: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    num_draws: int = 100,
    num_particles: int = 100,
    replications: int | None = None,
    calibrations: int = 100,
    alpha: float = 0.01,
    keep_data: bool = False,
    seed: int = 0,
    assemble: Assemble | None = None,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> PredictiveCheck:
    """Statistics of data that the model replicates against those of the data, per datum and over the set.

    Posterior predictive p-values are conservative: each datum has chosen its own latent, so that replicates resemble it
    even where the model is wrong. Two others are uniform under the model, exactly: the rank of a datum among replicates
    from the prior p(z), and the rank of its posterior predictive p-value among those of simulated data, whatever the
    guide (Hjort, Dahl and Steinbakk 2006). All take the parameters as given: of the data that they were fitted
    to, p-values are closer to one half; pass other data.

    Args:
        model, guide: a Pyro pair that keeps the contract, or run.model, run.guide.
        data: as `log_marginal` takes them.
        statistics: {name: function of a batch, called as the model is, [N, *event], ..., that gives [N]}; by default
            the mean and the spread of a datum's numbers, and the mean step between neighbours; of a dict of columns
            of one number each, every column, by the name of the site that observes it.
        over: {name: function of the N values of a statistic that gives a number}; by default mean and standard
            deviation.
        num_draws: replicates of each datum at posterior draws of its latents, resampled from `num_particles` of the
            guide by weight.
        replications: replicates from the prior, two times the number of tests over alpha at least; by default that
            number, or 2000 where it is less. Memory grows with replications x N, and calibrations x num_draws x N.
        calibrations: data sets simulated to calibrate posterior predictive p-values; most of the time is theirs; 0 for
            none.
        alpha: the probability that the true model fails, at most.
        keep_data: keep replicated data too, in `replicated`.
        assemble: (simulated values by site, batch) -> batch, where observed sites are not columns of the batch.

    Raises:
        ContractError: the pair breaks the contract, has a latent shared by all data or one that the model sums out, or
            simulated values cannot be put into the batch; UsageError, DataError: bad arguments, statistics or data.

    Source: Gelman, Meng and Stern 1996 (Statistica Sinica 6, 733); Hjort, Dahl and Steinbakk 2006 (JASA 101, 1157).

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2), 9 + torch.randn(50, 3)
    >>> check = predictive_check(pair.model, pair.guide, x, {"largest": lambda x: x.amax(1)}, calibrations=20)
    >>> check.passed, check.posterior["largest"].shape
    (False, torch.Size([100, 50]))
    """
    check_numbers(num_draws=num_draws, num_particles=num_particles, calibrations=calibrations, seed=seed)
    check_ranges(replications=replications)
    PROBABILITY.check_number("alpha", alpha)
    if not isinstance(statistics, Mapping | None):
        raise UsageError(f"statistics: expected a dict of functions by name, as {{'mean': f}}; found {statistics!r}")
    over = OVER if over is None else over
    with start_evaluation(model, guide, data, seed=seed, device=device) as run:
        names = column_names(data, model)
        if statistics is None:
            first = run.block(0)
            sites = sites_of_columns(run.model, run.structure, first) if names else {}
            statistics = default_statistics(first.batch, [sites.get(i, name) for i, name in enumerate(names)])
        if not statistics:
            raise UsageError("statistics: expected one at least, found none")
        least = math.ceil(2 * len(statistics) * (1 + len(over)) / alpha) - 1  # else no p-value is below the level
        replications = max(2000, least) if replications is None else replications
        if replications < least:
            raise UsageError(
                f"replications: expected at least {least}, for {len(statistics)} statistics and alpha = {alpha:g}; "
                f"found {replications}"
            )
        replicator = Replicator(run, statistics, num_draws, num_particles, assemble)
        run = replicator.run
        found = run_blocks(
            run, lambda block: _check_block(replicator, block, replications, calibrations, keep_data),
            {"what": "predictive check"}, desc="predictive check", progress=progress,
        )  # fmt: skip
    parts: dict[str, Tensors] = {}
    for key, values in found.items():
        kind, name = key.split("/", 1)
        parts.setdefault(kind, {})[name] = values if kind in ("observed", "calibration") else values.transpose(0, 1)
    calibration = {n: v.permute(1, 2, 0) for n, v in parts.pop("calibration", {}).items()}  # [calibrations, draws, N]
    return _result(
        parts, calibration, over,
        num_particles=num_particles, seed=seed, alpha=alpha, data=getattr(run.columns[0], "description", ""),
        digest=data_digest(run.columns), site=run.structure.observed_site,
    )  # fmt: skip


def _check_block(
    replicator: Replicator, block: Block, replications: int, calibrations: int, keep_data: bool
) -> dict[str, Tensor]:
    """Statistics of a block by "kind/name", with the data first."""
    block.s = replicator.run.structure
    kept: dict[str, Tensor] = {}
    weights, draws = replicator.posterior(block, "data")
    if keep_data:
        size, x = block.size, block_columns(block)[0].cpu()
        for kind, blocks in (
            ("posterior", replicator.replicated(block, draws, "data")),
            ("prior", replicator.simulated(block, replications, "prior")),
        ):
            made = torch.cat([block_columns(b)[0].cpu().reshape(-1, size, *x.shape[1:]) for b in blocks])
            kept[f"replicated/{kind}"] = made.transpose(0, 1)
        kept["replicated/observed"] = x[:, None]
    found = {
        "observed": replicator.observed(block),
        "prior": replicator.from_prior(block, replications),
        "posterior": replicator.from_posterior(block, draws, "data"),
        "weights": {
            "log_joint": replicator.log_joint(block, draws),
            "log_px": _bootstrap(weights, replicator.num_draws, derive_seed(replicator.run.seed, block.number, "px")),
        },
        "latents": draws,
    }
    out = {
        f"{kind}/{name}": value if kind == "observed" else value.transpose(0, 1)
        for kind, values in found.items()
        for name, value in values.items()
    }
    simulated: dict[str, list[Tensor]] = {}
    for number, wide in enumerate(replicator.simulated(block, calibrations, "calibration")):
        noise = f"calibration {number}"
        own = replicator.observed(wide)
        again = replicator.from_posterior(wide, replicator.posterior(wide, noise)[1], noise)
        for name, value in own.items():  # [1 + draws, copies, N], the simulated data before their replicates
            both = torch.cat([value[None], again[name]]).reshape(1 + replicator.num_draws, -1, block.size)
            simulated.setdefault(name, []).append(both)
    out |= {f"calibration/{name}": torch.cat(v, 1).permute(2, 1, 0) for name, v in simulated.items()}
    return out | kept


def _bootstrap(log_weight: Tensor, count: int, seed: int) -> Tensor:
    """The log of the mean of K weights [K, N], each of `count` times of K drawn with replacement, [count, N]."""
    generator = torch.Generator().manual_seed(seed)
    size = len(log_weight)
    picked = torch.randint(size, (count, size), generator=generator)
    return torch.stack([log_weight[rows].logsumexp(0) for rows in picked]) - torch.tensor(float(size)).log()


def _result(
    parts: Mapping[str, Tensors], calibration: Tensors, over: Mapping[str, Callable[[Tensor], Tensor]], **rest: Any
) -> PredictiveCheck:
    """The p-values of statistics: "observed" [N], "prior" and "posterior" [.., N], and of the calibration."""
    observed, prior, posterior = parts["observed"], parts["prior"], parts["posterior"]
    generator = torch.Generator().manual_seed(derive_seed(rest["seed"], "ties"))
    names = {f"{name}, {how} over data": (name, reduce) for name in observed for how, reduce in over.items()}
    set_observed = {key: _reduced(key, reduce, observed[n][None])[0] for key, (n, reduce) in names.items()}
    set_prior = {key: _reduced(key, reduce, prior[n]) for key, (n, reduce) in names.items()}
    set_posterior = {key: _reduced(key, reduce, posterior[n]) for key, (n, reduce) in names.items()}
    posterior_p = {n: predictive_p(x, posterior[n]) for n, x in observed.items()}
    set_posterior_p = {key: predictive_p(x, set_posterior[key]) for key, x in set_observed.items()}
    ranks = {n: random_ranks(x, prior[n], generator) for n, x in observed.items()}
    set_ranks = {key: random_ranks(x, set_prior[key], generator) for key, x in set_observed.items()}
    bins = 1 + len(next(iter(prior.values())))
    table = pointwise_p_values(len(next(iter(observed.values()))), coarse := min(bins, 100))
    calibrated, set_calibrated = {}, {}
    for name, values in calibration.items():  # [calibrations, 1 + draws, N]
        reference = torch.stack([predictive_p(one[0], one[1:]) for one in values])
        calibrated[name] = jittered(random_ranks(-posterior_p[name], -reference, generator), len(values) + 1, generator)
    for key, (name, reduce) in names.items():
        if name in calibration:
            sets = torch.stack([_reduced(key, reduce, one) for one in calibration[name]])
            reference = torch.stack([predictive_p(one[0], one[1:]) for one in sets])
            rank = random_ranks(-set_posterior_p[key], -reference, generator)
            set_calibrated[key] = jittered(rank, len(sets) + 1, generator)
    prior_p = {n: jittered(rank, bins, generator) for n, rank in ranks.items()}
    return PredictiveCheck(
        observed=observed, prior=prior, posterior=posterior, prior_p=prior_p, posterior_p=posterior_p,
        calibrated_p=calibrated, set_observed=set_observed, set_prior=set_prior, set_posterior=set_posterior,
        set_prior_p={key: jittered(rank, bins, generator) for key, rank in set_ranks.items()},
        set_posterior_p=set_posterior_p, set_calibrated_p=set_calibrated,
        uniformity={
            n: torch.tensor(p_value((p * coarse).long().clamp(max=coarse - 1), coarse, table), dtype=torch.float64)
            for n, p in prior_p.items()
        },
        log_joint=parts["weights"]["log_joint"], log_px=parts["weights"]["log_px"], latents=parts["latents"],
        replicated={n: v[0] if n == "observed" else v for n, v in parts.get("replicated", {}).items()},
        **rest,
    )  # fmt: skip


def _reduced(name: str, reduce: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """A number for each row of values [.., N], [..]."""
    out = torch.stack([torch.as_tensor(reduce(row)).double() for row in values])
    if out.shape != values.shape[:1]:
        raise UsageError(f"over: expected a number, found shape {list(out.shape[1:])} for {name!r}")
    return out
