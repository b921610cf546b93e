"""log p(x) per datum by importance sampling from one proposal, the guide or a density refined to each datum."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ppvae.data.loader import data_digest
from ppvae.errors import UsageError
from ppvae.errors.calls import explain_call
from ppvae.errors.ranges import check_numbers, check_ranges, check_sequences
from ppvae.evaluation.blocks import DATA_BLOCK, PARTICLE_BLOCK, run_blocks, start_evaluation
from ppvae.evaluation.estimate import MIXED_METHOD, Estimate
from ppvae.evaluation.evidence.escalation import (
    ESCALATION_FIELDS,
    EscalatingSampler,
    Sampler,
    escalation_note,
    refinable_run,
)
from ppvae.evaluation.importance.allocation import make_allocation
from ppvae.evaluation.importance.sampler import ImportanceSampler, choose_precision
from ppvae.evaluation.proposals.fit import FAMILIES
from ppvae.evaluation.proposals.log_weights import compiled_densities, with_larger_blocks
from ppvae.evaluation.reliability import recommend_alternative
from ppvae.inference.contract.support import base_measure_of, count_observed
from ppvae.inference.tracing import Program


@explain_call
def importance_estimate(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_particles: int | Literal["auto"],
    proposal: Literal["guide", "refined"],
    method: Literal["importance", "auto"] = "importance",
    target_std_error: float = 0.05,
    max_particles: int = 20_000,
    seed: int = 0,
    bounds: Sequence[int] = (),
    posterior_draws: int = 0,
    rows: int | None = None,
    precision: str = "float32",
    compile: bool = True,
    directory: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> Estimate:
    """log p(x) by draws from one proposal; arguments and result as of `log_marginal`."""
    allocation = make_allocation(num_particles, target_std_error, max_particles)
    check_importance_numbers(posterior_draws=posterior_draws, seed=seed, bounds=bounds, rows=rows)
    rows = DATA_BLOCK * PARTICLE_BLOCK if rows is None else rows
    if method not in ("importance", "auto"):
        raise UsageError(f"method: expected 'importance' or 'auto', found {method!r}")
    escalates, refused, replaced = method == "auto", "", ""
    with start_evaluation(model, guide, data, seed=seed, device=device) as run:
        precision = choose_precision(run, precision)
        refined = proposal == "refined" or escalates
        if refined:
            refinable, replaced = refinable_run(run)
            if refinable is None and escalates:  # the guide's own draws; proposal="refined" raises the error
                refined, replaced, refused = False, "", replaced
            run = with_larger_blocks(refinable or run) if refined else run
        s, columns = run.structure, run.columns
        sampler = ImportanceSampler(run, allocation, bounds, posterior_draws, rows, precision, refined)
        if compile and refined:
            sampler = replace(sampler, densities=compiled_densities(run, allocation.max_particles))
        compiled = sampler.compile_weights() if compile else None
        compute: Sampler = EscalatingSampler(sampler) if escalates else sampler
        key = sampler.cache_key() | ({"method": method} if escalates else {})
        found = run_blocks(
            run, lambda block: compute(block, compiled), key,
            desc="log p(x)", directory=directory, progress=progress,
            figures={"nll": lambda statistics: -statistics["log_px"]},
        )  # fmt: skip
        precision_note = sampler.precision_note()
    missing = int(found.pop("missing").sum())
    found.pop("over_budget", None)
    escalated: dict[str, Tensor] = {n: found.pop(n) for n in ESCALATION_FIELDS if n in found}
    families: dict[str, Tensor] = {"family": found.pop("family")} if "family" in found else {}
    counts: dict[str, Tensor] = {n: found.pop(n) for n in ("num_particles", "pilot_particles") if n in found}
    posterior = {n.partition("/")[2]: found.pop(n).transpose(0, 1) for n in list(found) if n.startswith("posterior/")}
    recorded = {int(n.removeprefix("bound_")): found.pop(n) for n in list(found) if n.startswith("bound_")}
    base, levels, notes = base_measure_of(columns[0], s)
    notes += s.remarks + precision_note
    if families:
        counts_of = zip(FAMILIES, families["family"].bincount(minlength=len(FAMILIES)).tolist(), strict=True)
        notes += (f"proposals by datum: {', '.join(f'{name} {count}' for name, count in counts_of if count)}",)
    if refined and replaced:
        notes += (replaced,)
    if escalates:
        notes += (escalation_note(escalated, refused),)
    dims, missing_note = count_observed(missing, columns, s)
    notes += missing_note
    if posterior_draws and not posterior:
        notes += ("no posterior draws: latents shared by all data, or beside enumerated sites, are not kept",)
    return Estimate(
        **found,  # type: ignore[arg-type]
        num_particles=int(counts["num_particles"].max()),
        seed=seed,
        dims=dims * (run.num_data if s.has_global_latents else 1),
        base_measure=base,
        levels=levels,
        lower_bound_only=s.lower_bound_only,
        joint=s.has_global_latents,
        data=getattr(columns[0], "description", ""),
        digest=data_digest(columns),
        bounds=recorded,
        posterior=posterior or None,
        notes=notes,
        settings=sampler.settings() | ({"next_rung": "annealing"} if escalates and refined else {}),
        method=MIXED_METHOD if escalates and bool(escalated["method"].any()) else "importance sampling",
        diagnostics=(counts if allocation.adaptive or escalates else {}) | families | escalated,
        remedy=recommend_alternative(s),
    )


def check_importance_numbers(
    posterior_draws: int = 0, seed: int = 0, bounds: Sequence[int] = (), rows: int | None = None, **_: Any
) -> None:
    """Raises UsageError for a number that `importance_estimate` does not take, before any run of the pair."""
    check_numbers(posterior_draws=posterior_draws, seed=seed)
    check_sequences(bounds=bounds)
    check_ranges(rows=rows)
