"""log p of all data, and of each datum given the global latents, from draws of these with local latents integrated."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from ppvae.data.loader import data_digest
from ppvae.errors import ContractError, UsageError
from ppvae.errors.ranges import check_numbers, check_ranges
from ppvae.evaluation.blocks import DATA_BLOCK, PARTICLE_BLOCK, Block, Evaluation, run_blocks, start_evaluation
from ppvae.evaluation.estimate import Estimate
from ppvae.evaluation.global_latents.likelihood import ConditionalLikelihood
from ppvae.evaluation.importance.accumulators import LogWeightAccumulator, recorded_bounds
from ppvae.inference.contract.support import base_measure_of, count_observed
from ppvae.inference.tracing import Program

PREDICTIVE_NOTE = (
    "log of the mean of p(x_n | theta) over the guide's draws of the global latents theta: the predictive density of "
    "each datum, whose sum is not log p of the data set"
)


def require_guide_importance(options: dict[str, tuple[Any, Any]]) -> None:
    """Raises UsageError for an argument that weights given the global latents do not take: {name: (value, default)}."""
    for name, (value, default) in options.items():
        if value != default:
            raise UsageError(
                f"{name}: expected {default!r} beside `conditional` or more than one of `local_particles`, found "
                f"{value!r}. Leave it out; or leave these out, for joint weights of global and local latents"
            )


def log_marginal_given_globals(
    model: Program,
    guide: Program,
    data: Any,
    *,
    conditional: bool,
    num_draws: Any,
    local_particles: int,
    seed: int,
    posterior_draws: int,
    rows: int | None,
    directory: str | os.PathLike[str] | None,
    device: str | torch.device | None,
    progress: bool | None,
) -> Estimate:
    """`log_marginal` with `conditional`, or with several `local_particles`; arguments as there.

    Raises:
        UsageError: fewer than one draw or particle, or more `posterior_draws` than draws; as `log_marginal`.
        ContractError: a joint weight is asked for under a point mass on a global latent, by the site's name.
    """
    rows = DATA_BLOCK * PARTICLE_BLOCK if rows is None else rows
    for name, value in {"num_particles": num_draws, "local_particles": local_particles, "rows": rows}.items():
        if not hasattr(value, "__index__") or value < 1:
            raise UsageError(f"{name}: expected a number of at least 1, found {value!r}")
    check_numbers(local_particles=local_particles)
    check_ranges(num_particles=num_draws, rows=rows)
    if posterior_draws > num_draws:
        raise UsageError(f"posterior_draws: expected at most the {num_draws} draws, found {posterior_draws}")
    settings = {"local_particles": local_particles} | ({"conditional": True} if conditional else {})
    key = settings | {"what": "log_marginal", "num_particles": num_draws, "posterior_draws": posterior_draws}
    with start_evaluation(model, guide, data, seed=seed, device=device, given_globals=True) as run:
        if run.structure.weights_refusal and not conditional:  # a point mass on a global latent
            raise ContractError(f"{run.structure.weights_refusal} Or pass conditional=True, for log p(x_n | theta)")
        likelihood = ConditionalLikelihood(run, num_draws, local_particles, rows)
        compute = PredictiveDensity(likelihood, posterior_draws) if conditional else JointWeights(likelihood)
        found = run_blocks(run, compute, key, desc="log p(x)", directory=directory, progress=progress)
        draws = likelihood.draws.latents(posterior_draws) if posterior_draws else {}
    if not conditional:
        found |= reduce_joint_weights(found, num_draws)
    return _estimate(run, found, num_draws, settings, draws, conditional)


class PredictiveDensity:
    """Statistics of p(x_n | theta) over draws of theta, of a block of data: [N] by name."""

    def __init__(self, likelihood: ConditionalLikelihood, kept_draws: int):
        self.likelihood, self.kept_draws = likelihood, kept_draws

    def __call__(self, block: Block) -> dict[str, Tensor]:
        likelihood = self.likelihood
        kept: list[Tensor] = []
        weights = LogWeightAccumulator(likelihood.num_draws, recorded_bounds(likelihood.num_draws), block.eps)
        pooled = likelihood.pooled(block)
        for chunk in likelihood.chunks(block, pooled):
            weights.add(chunk.log_lik, chunk.elbo)
            if sum(len(part) for part in kept) < self.kept_draws:
                kept.append(chunk.log_lik[: self.kept_draws].cpu())
        found = weights.result() | {"missing": torch.tensor(block.num_missing)}
        if pooled is not None:
            found["local_k_hat"] = pooled.result()["k_hat"]
        if kept:
            found["log_likelihood"] = torch.cat(kept)[: self.kept_draws].T
        return found


class JointWeights:
    """A block's part of the joint log-weights, of their ELBO, and of the global latents' ratio: [1, draws] by name.

    `among` [N of all data] bool: which data they count; None for all.
    """

    def __init__(self, likelihood: ConditionalLikelihood, among: Tensor | None = None):
        self.likelihood, self.among = likelihood, among

    def __call__(self, block: Block) -> dict[str, Tensor]:
        pooled = self.likelihood.pooled(block)
        rows = slice(None) if self.among is None else self.among[block.start : block.start + block.size]
        chunks = [
            (c.log_lik[:, rows].sum(1), c.elbo[:, rows].sum(1), c.log_ratio)
            for c in self.likelihood.chunks(block, pooled)
        ]
        log_lik, elbo, log_ratio = (torch.cat(parts).cpu()[None] for parts in zip(*chunks, strict=True))
        found = {"log_lik": log_lik, "elbo": elbo, "log_ratio": log_ratio, "missing": torch.tensor(block.num_missing)}
        if pooled is not None:
            found["local_k_hat"] = pooled.result()["k_hat"].amax()[None]
        return found


def reduce_joint_weights(parts: dict[str, Tensor], num_draws: int) -> dict[str, Tensor]:
    """The statistics of the joint weights and the largest local k-hat, from the parts of all blocks, [1] by name."""
    log_ratio = parts.pop("log_ratio")[0]
    weights = LogWeightAccumulator(num_draws, recorded_bounds(num_draws))
    weights.add((parts.pop("log_lik").sum(0) + log_ratio)[:, None], (parts.pop("elbo").sum(0) + log_ratio)[:, None])
    found = weights.result()
    if "local_k_hat" in parts:
        found["local_k_hat"] = parts.pop("local_k_hat").amax()[None]
    return found


def _estimate(
    run: Evaluation, found: dict[str, Tensor], num_draws: int, settings: dict[str, Any], draws: dict[str, Tensor],
    conditional: bool,
) -> Estimate:  # fmt: skip
    s, missing = run.structure, int(found.pop("missing").sum())
    recorded = {int(n.removeprefix("bound_")): found.pop(n) for n in list(found) if n.startswith("bound_")}
    log_likelihood = found.pop("log_likelihood").T if "log_likelihood" in found else None
    diagnostics = {"local_k_hat": found.pop("local_k_hat")} if "local_k_hat" in found else {}
    base, levels, notes = base_measure_of(run.columns[0], s)
    notes += s.remarks + ((PREDICTIVE_NOTE,) if conditional else ())
    dims, missing_note = count_observed(missing, run.columns, s)
    notes += missing_note
    return Estimate(
        **found,  # type: ignore[arg-type]
        num_particles=num_draws, seed=run.seed, dims=dims * (1 if conditional else run.num_data), base_measure=base,
        levels=levels, lower_bound_only=s.lower_bound_only, joint=not conditional,
        data=getattr(run.columns[0], "description", ""), digest=data_digest(run.columns), bounds=recorded,
        posterior=draws or None, log_likelihood=log_likelihood, notes=notes, settings=settings,
        diagnostics=diagnostics, site=s.observed_site,
        remedy="more of local_particles, or a better guide of the local latents"
        if diagnostics else "a better guide of the global latents",
    )  # fmt: skip
