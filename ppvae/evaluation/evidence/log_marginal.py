"""log p(x) by importance sampling, per datum, for any pair."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import torch

from ppvae.errors import UsageError
from ppvae.errors.calls import explain_call
from ppvae.errors.ranges import check_numbers
from ppvae.evaluation.estimate import Estimate
from ppvae.evaluation.evidence.importance_estimate import importance_estimate
from ppvae.evaluation.evidence.particle_filter import log_marginal_by_filter, require_filter_options
from ppvae.evaluation.evidence.refined import GUIDE_PARTICLES, refined_log_marginal
from ppvae.evaluation.global_latents.evidence import log_marginal_given_globals, require_guide_importance
from ppvae.evaluation.importance.allocation import make_allocation
from ppvae.inference.tracing import Program


@explain_call
def log_marginal(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_particles: int | Literal["auto"] = 1000,
    proposal: Literal["guide", "refined"] | None = None,
    method: Literal["importance", "auto", "particle_filter"] = "importance",
    target_std_error: float = 0.05,
    max_particles: int = 20_000,
    conditional: bool = False,
    local_particles: int = 1,
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
    """Importance-weighted log p(x) per datum for any model/guide pair, with a diagnosis of its trustworthiness.

    log p(x) is estimated by log (1/K) sum_k p(x, z_k) / q(z_k | x), z_k ~ q(z | x): a lower bound on average
    (Burda et al. 2016, arXiv 1509.00519; with missing values Mattei and Frellsen 2019, arXiv 1812.02633). Modules run
    in evaluation mode; no parameter is created.

    q is a density refined to each datum, with the guide's estimate of as many particles beside it:
    `est.guide_estimate`, whose L_k, the numbers that papers print, are `est.bound(k)`, and whose ELBO is `est.elbo`.
    Where nothing can be refined, as of discrete latents or latents of all data, q is the guide, and the first note says
    why. With `proposal` given, all that is reported is of that proposal alone, and takes its time alone: the guide's
    draws cost a fraction of a fit where K is small.

    With num_particles="auto" the allocation is adaptive: a pilot run plans the particles of each datum, 100, 200, 400,
    ..., so that standard error, ess and k_hat probably suffice, and the estimate uses as many fresh draws. Stopping by
    the estimate's own weights would bias it, since it would stop before the heavy weights occur. The pilot doubles its
    particles until it calls for at most 4 times as many, so that it costs about a fourth of a large estimate.
    `est.particles` are the particles of each datum; `est.on_target` the data that are reliable and within the target by
    their fresh weights. Of the others most have all `max_particles`, and some had an optimistic pilot. The defaults: a
    standard error of 0.05 makes log p(x) too low by about 0.05^2 / 2 = 0.001 nats, the last digit that is usually
    reported; 20,000 particles are four times the usual 5000, and beyond them another method is more efficient.

    With method="auto" the proposal is refined, and the data that it fails on by a pilot run of its own noise, half as
    large, go on to annealing from the refined proposal: 100 chains, 25, 100 or 400 temperatures as a pilot of 16 chains
    calls for, in coordinates whitened by the fit. Neither pilot's draws are used again, so that p(x) stays unbiased.
    `est.diagnostics["method"]` is 0 for data estimated by importance sampling and 1 for annealing, of which log_px,
    std_error, ess, k_hat and posterior draws are then those of the chains; elbo and L_k are always those of the refined
    proposal. What neither sees is a mode that no draw reaches: `ppvae.evaluation.bracket` does.

    With method="particle_filter" the latents of a datum are a sequence, sites z_1 .. z_T with observed sites between,
    or a chain as `models.DeepMarkovModel` has, of which importance sampling has weights whose variance grows
    exponentially with T. Ten independent filters have a tenth of the particles each, which are resampled where less
    than half are effective (`ppvae.inference.sequences`): log p(x) is the log of the mean of their estimates, unbiased
    for p(x), the standard error comes from their spread, ess is the smallest over the steps of `est.ess_by_step`. A
    filter that resamples R times makes 1 + R runs of guide and model, each over the whole sequence, and holds its
    K / 10 trajectories; posterior draws are smoothing draws, by backward sampling (Godsill, Doucet and West 2004).

    With global latents theta, shared by all data, weights are joint, one number for the data set. With
    `local_particles` = K > 1 the local latents of each datum are integrated out inside by K particles at each of
    `num_particles` draws of theta: log w = log p(theta) - log q(theta) + sum_n log (1/K) sum_k w_nk(theta), whose mean
    of weights is unbiased for p(all x) at any K, in memory that does not depend on the number of data. With
    conditional=True the result is the log of the mean of p(x_n | theta) over the guide's draws of theta, or at its
    point (AutoDelta), per datum: the predictive density of new data, [N]; `est.log_likelihood` and `est.posterior`
    have log p(x_n | theta) and theta at the first `posterior_draws` of them.

    Inside an initialised `torch.distributed` group all processes make the same call, share the data, and return the
    whole estimate, which equals that of one process.

    Args:
        model, guide: a Pyro pair that keeps the contract (see `ppvae.check`), or run.model, run.guide.
        data: a tensor [N, *event], a split, or a tuple of them: the pair is called as model(*batch). In data marked by
            `data.with_missing`, NaN is a missing value, and log p(x) that of the values observed.
        num_particles: K; or "auto" for an adaptive allocation.
        proposal: None for both; "guide"; or "refined" for a density fitted to each datum
            (`ppvae.evaluation.proposals`): of the guide, a Laplace approximation and a full-rank density in
            unconstrained coordinates the best, with a defensive share of the guide. The fit uses noise of its own, so
            that the estimate of p(x) stays unbiased. `est.diagnostics["family"]` says which it was per datum.
        method: "importance", or "auto" for annealing where refined importance sampling fails. Where the pair cannot be
            refined the guide is the proposal, and the notes say why. "particle_filter" for sequences.
        target_std_error, max_particles: for "auto": the target of the standard error of each datum, and the largest
            number of particles of its estimate.
        conditional: log p(x_n | theta) averaged over draws of the global latents theta, per datum, in place of the
            joint log p of all data.
        local_particles: of the local latents of each datum at each draw of the global latents.
        seed: of the guide's draws. The result does not depend on `rows`.
        bounds: further k at which to record L_k.
        posterior_draws: draws of each latent per datum, resampled by weight, in `est.posterior`.
        rows: the largest number of (datum, particle) rows in one run of the pair, 5000 by default; memory grows with
            it.
        precision: of the products in linear and convolutional layers, as in `fit`. With "bf16" the estimate is log p(x)
            of the model whose layers multiply in bfloat16; its notes give the difference from float32 on some data.
            "auto" takes bf16 where the pair's layers are faster in it.
        compile: compile the run of the pair where enough computation remains; results agree up to rounding.
        directory: cache of finished blocks of data; the same call resumes from it after an interruption, with the same
            result (up to rounding where runs of the pair are compiled).
        device: where to compute; the parameters' device by default.
        progress: show a progress bar; by default where the output is a terminal.

    Raises:
        ContractError: the pair breaks the contract, by the site's name; UsageError, DataError: bad arguments, data or
            directory; PpvaeError: another process of the group failed.

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2).double(), torch.zeros(4, 3).double()
    >>> est = log_marginal(pair.model, pair.guide, x, num_particles=100)
    >>> bool((est.log_px - pair.log_px(x)).abs().max() < 1e-9), bool(est.reliable.all())
    (True, True)
    """
    if proposal not in (None, "guide", "refined"):
        raise UsageError(f"proposal: expected 'guide' or 'refined', found {proposal!r}")
    if method not in ("importance", "auto", "particle_filter"):
        raise UsageError(f"method: expected 'importance', 'auto' or 'particle_filter', found {method!r}")
    by_guide = (proposal or "guide", "guide")
    if method == "particle_filter":
        require_filter_options(num_particles, {
            "proposal": by_guide, "conditional": (conditional, False), "bounds": (tuple(bounds), ()),
            "local_particles": (local_particles, 1), "rows": (rows, None), "precision": (precision, "float32"),
        })  # fmt: skip
        return log_marginal_by_filter(
            model, guide, data, num_particles=int(num_particles), seed=seed, posterior_draws=posterior_draws,
            directory=directory, device=device, progress=progress,
        )  # fmt: skip
    check_numbers(local_particles=local_particles)
    if conditional or local_particles != 1:
        require_guide_importance({
            "proposal": by_guide, "method": (method, "importance"), "bounds": (tuple(bounds), ()),
            "precision": (precision, "float32"),
        })  # fmt: skip
        return log_marginal_given_globals(
            model, guide, data, conditional=conditional, num_draws=num_particles,
            local_particles=local_particles, seed=seed, posterior_draws=posterior_draws, rows=rows,
            directory=directory, device=device, progress=progress,
        )  # fmt: skip
    options: dict[str, Any] = {
        "num_particles": num_particles, "method": method, "target_std_error": target_std_error,
        "max_particles": max_particles, "seed": seed, "bounds": bounds, "posterior_draws": posterior_draws,
        "rows": rows, "precision": precision, "compile": compile, "directory": directory, "device": device,
        "progress": progress,
    }  # fmt: skip
    if proposal is not None:
        return importance_estimate(model, guide, data, proposal=proposal, **options)
    allocation = make_allocation(num_particles, target_std_error, max_particles)
    count = min(GUIDE_PARTICLES, max_particles) if allocation.adaptive else allocation.max_particles
    return refined_log_marginal(model, guide, data, guide_particles=count, **options)
