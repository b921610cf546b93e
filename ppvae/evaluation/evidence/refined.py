"""log p(x) that can be relied on beside the number that papers print: refined proposals, and L_K of the guide."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from ppvae.data.checks import one_line
from ppvae.errors import ContractError, UsageError
from ppvae.errors.calls import explain_call
from ppvae.errors.ranges import check_numbers
from ppvae.evaluation.blocks import start_evaluation
from ppvae.evaluation.estimate import Estimate
from ppvae.evaluation.evidence.bracket import bracket
from ppvae.evaluation.evidence.escalation import guide_note, refinable_run
from ppvae.evaluation.evidence.importance_estimate import check_importance_numbers, importance_estimate
from ppvae.evaluation.importance.allocation import make_allocation
from ppvae.inference.tracing import Program

REFINED_PARTICLES, GUIDE_PARTICLES = 3000, 5000


@explain_call
def refined_log_marginal(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_particles: int | Literal["auto"] = REFINED_PARTICLES,
    guide_particles: int = GUIDE_PARTICLES,
    method: Literal["importance", "auto"] = "importance",
    bracket_data: int = 0,
    seed: int = 0,
    device: str | torch.device | None = None,
    directory: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Estimate:
    """log p(x) by proposals refined to each datum, with L_K of the guide from the same call beside it, both timed.

    The estimate is that of `log_marginal(..., proposal="refined")`, and `est.guide_estimate` that of
    `log_marginal(..., num_particles=guide_particles, proposal="guide")`: the bound L_K of Burda et al. 2016 (arXiv
    1509.00519), of which are `est.bound(k)` and `est.elbo`. Both are lower bounds of log p(x) on average, in nats per
    datum, [N]. A pair whose latents have no refined proposals (a discrete latent that is sampled, a latent of all data,
    none that is not summed out) is evaluated by draws from its guide alone, `guide_particles` of them, or "auto"; the
    first note then says why.

    Args:
        model, guide, data, seed, device: as `log_marginal` takes them.
        num_particles: K of the refined proposals, or "auto".
        guide_particles: K of the guide; 0 for no estimate beside.
        method: "auto" anneals the data that refined importance sampling fails on, as `log_marginal` does.
        bracket_data: data simulated from the model on which `bracket` certifies the proposal; its width and verdict are
            in `est.settings`, and `est.verdict` follows it. 0 for no bracket.
        directory: cache of finished blocks, in a folder for each of the two.
        options: further arguments of `log_marginal`, for both.

    Raises:
        ContractError, UsageError, DataError: as `log_marginal` does.

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2).double(), torch.zeros(4, 3).double()
    >>> est = refined_log_marginal(pair.model, pair.mean_field, x, num_particles=100, guide_particles=50)
    >>> est.settings["proposal"], est.guide_estimate.num_particles
    ('refined', 50)
    """
    check_numbers(guide_particles=guide_particles, bracket_data=bracket_data)
    make_allocation(num_particles)  # which refuses what is no number of them
    check_importance_numbers(seed=seed, **options)
    common = options | {"seed": seed, "device": device}
    folders = {name: None if directory is None else Path(directory) / name for name in ("refined", "guide")}

    def timed(name: str, count: int | Literal["auto"]) -> Estimate:
        start = time.perf_counter()
        est = importance_estimate(
            model, guide, data, num_particles=count, proposal="refined" if name == "refined" else "guide",
            method=method if name == "refined" else "importance", directory=folders[name], **common,
        )  # fmt: skip
        return replace(est, seconds=time.perf_counter() - start)

    try:
        est = timed("refined", num_particles)
    except (ContractError, UsageError):
        why = why_not_refined(model, guide, data, seed=seed, device=device)
        if not why:
            raise
        est = timed("guide", num_particles if num_particles == "auto" else guide_particles or num_particles)
        note = guide_note("drawn from the guide, as no proposal can be refined", why)
        est = replace(est, notes=(note, *est.notes))
    else:
        if guide_particles:
            common["posterior_draws"] = 0
            beside = timed("guide", guide_particles)
            est = replace(est, guide_estimate=beside, elbo=beside.elbo)
    return with_bracket(est, model, guide, data, bracket_data, device) if bracket_data else est


def with_bracket(
    est: Estimate, model: Program, guide: Program, data: Any, num_data: int, device: str | torch.device | None = None
) -> Estimate:
    """The estimate with the width of a `bracket` of its proposal at its K, on data simulated from the model.

    A pair whose data cannot be simulated gets a note that says why.
    """
    kind: Literal["guide", "refined"] = "refined" if est.settings.get("proposal") == "refined" else "guide"
    count = max(2, min(est.num_particles, REFINED_PARTICLES))
    try:
        found = bracket(
            model, guide, data, num_data=num_data, num_particles=count, proposal=kind, seed=est.seed, device=device
        )
    except (ContractError, UsageError) as error:
        return replace(est, notes=(*est.notes, f"no bracket: {one_line(error, 240)}"))
    facts = {"bracket": found.verdict, "bracket_width": found.width, "bracket_sufficient": found.sufficient}
    return replace(est, settings=dict(est.settings) | facts | {"bracket_data": len(found.lower)})


def why_not_refined(
    model: Program, guide: Program, data: Any, *, seed: int = 0, device: str | torch.device | None = None
) -> str:
    """Why `log_marginal(..., proposal="refined")` refuses a pair, on one line; an empty string where it does not."""
    with start_evaluation(model, guide, data, seed=seed, device=device) as run:
        refinable, why = refinable_run(run)
    return "" if refinable else " ".join(why.split())[:240]
