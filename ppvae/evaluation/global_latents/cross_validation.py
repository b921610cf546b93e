"""Leave-one-out and K-fold cross-validation and WAIC of pairs with global latents, the guide corrected for."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ppvae.data.loader import data_digest, read_rows
from ppvae.errors import UsageError
from ppvae.errors.calls import explain_call
from ppvae.errors.ranges import check_numbers, check_ranges
from ppvae.evaluation.blocks import DATA_BLOCK, PARTICLE_BLOCK, Block, Evaluation, run_blocks, start_evaluation
from ppvae.evaluation.global_latents.elpd import PredictiveAccuracy
from ppvae.evaluation.global_latents.evidence import JointWeights
from ppvae.evaluation.global_latents.likelihood import ConditionalLikelihood
from ppvae.evaluation.importance.accumulators import LogWeightAccumulator
from ppvae.evaluation.importance.psis import smoothed
from ppvae.inference.tracing import Program

Refit = Callable[[Any], Any]  # the data that are left -> a trained pair: (model, guide), or a run that has both


@explain_call
def loo(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_particles: int = 1000,
    local_particles: int = 100,
    refit: Refit | None = None,
    seed: int = 0,
    rows: int | None = None,
    directory: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> PredictiveAccuracy:
    """PSIS leave-one-out cross-validation: log p(x_n | all other data) of each datum, for a pair with global latents.

    With theta_s ~ q(theta), log w_s = log p(theta_s) - log q(theta_s) + sum_n log p(x_n | theta_s), which corrects for
    the guide not being the posterior, and r_sn = w_s / p(x_n | theta_s), Pareto-smoothed over s for each n:
    elpd_n = log sum_s r_sn p(x_n | theta_s) / sum_s r_sn. Local latents are integrated out by `local_particles` draws
    of each datum at each theta_s; where they are summed out, or there are none, p(x_n | theta) is exact. Consistent as
    the number of draws grows, at any number of local particles. Two passes over the data; memory holds log-densities
    [S, 500] of a block of data, and one number for each draw and datum.

    Args:
        model, guide: a Pyro pair with global latents that keeps the contract (see `ppvae.check`).
        data: as `ppvae.log_marginal` takes them: the data that the guide was fitted to.
        num_particles: S, draws of the global latents from the guide.
        local_particles: K, of the local latents at each.
        refit: a function of the data without one row that trains the pair anew and returns (model, guide), or a run;
            called for each datum whose k-hat is above the limit, which the result then has by its new guide.
        seed, rows, directory, device, progress: as of `ppvae.log_marginal`.

    Raises:
        ContractError: given the global latents, no datum has a log-weight of its own, or the guide has a point mass on
            one, by the site's name; UsageError: no latent is global, or bad arguments.

    Source: Vehtari et al. 2017 (arXiv 1507.04544) and 2024 (arXiv 1507.02646); Magnusson et al. 2019 (arXiv 1904.10679)
    for approximate posteriors.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
    >>> def guide(x):
    ...     pyro.sample("mu", dist.Normal(0.0, 0.5))
    >>> result = loo(model, guide, torch.tensor([-0.5, 0.0, 0.3, 0.2]))
    >>> result.elpd.shape, bool(result.reliable.all())
    (torch.Size([4]), True)
    """
    check_numbers(num_particles=num_particles, local_particles=local_particles, seed=seed)
    check_ranges(rows=rows)
    options: dict[str, Any] = {"seed": seed, "rows": rows, "device": device, "progress": progress}
    result = _accuracy(model, guide, data, "loo", num_particles, local_particles, directory=directory, **options)
    if refit is None:
        return result
    columns = _columns(data, seed, device, model, guide)
    for n in (~result.reliable).nonzero()[:, 0].tolist():
        left = torch.arange(len(result.elpd)) == n
        again = _held_out(refit, columns, left, num_particles, local_particles, options)
        result = result.with_data(left, again, refitted=True)
    return result


@explain_call
def kfold(
    model: Program,
    guide: Program,
    data: Any,
    refit: Refit,
    *,
    folds: int = 10,
    num_particles: int = 1000,
    local_particles: int = 100,
    seed: int = 0,
    rows: int | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> PredictiveAccuracy:
    """K-fold cross-validation: log p(x_n | data of the other folds) of each datum, from a pair trained on those.

    Draws of theta come from the guide of each fold, and have the Pareto-smoothed weights p(theta, x of other folds) /
    q(theta), which correct for it. Data are dealt to folds at random by the seed. Arguments and errors as of `loo`.

    Args:
        model, guide: the pair trained on all data, whose log p(x_n | all data) the effective parameters count.
        refit: a function of the data of all other folds that trains the pair and returns (model, guide), or a run.
        folds: their number, from 2 to the number of data.
    """
    check_numbers(folds=folds, num_particles=num_particles, local_particles=local_particles, seed=seed)
    check_ranges(rows=rows)
    options: dict[str, Any] = {"seed": seed, "rows": rows, "device": device, "progress": progress}
    columns = _columns(data, seed, device, model, guide)
    count = len(columns[0])
    if not 2 <= folds <= count:
        raise UsageError(f"folds: expected a number from 2 to the {count} data, found {folds}")
    result = _accuracy(model, guide, columns, "kfold", num_particles, local_particles, **options)
    order, shapes = torch.randperm(count, generator=torch.Generator().manual_seed(seed)), []
    for fold in range(folds):
        left = torch.zeros(count, dtype=torch.bool)
        left[order[fold::folds]] = True
        again = _held_out(refit, columns, left, num_particles, local_particles, options)
        result = result.with_data(left, again, refitted=True)
        shapes.append(again.guide_k_hat)
    return replace(result, guide_k_hat=max(shapes), num_folds=folds)


@explain_call
def waic(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_particles: int = 1000,
    local_particles: int = 100,
    seed: int = 0,
    rows: int | None = None,
    directory: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> PredictiveAccuracy:
    """WAIC: elpd_n = log E[p(x_n | theta)] - Var[log p(x_n | theta)] over the posterior of theta, per datum.

    Moments are of draws from the guide with the Pareto-smoothed weights of `loo`. The noise of local latents adds to
    the variance: take many `local_particles`, or `loo`, which Vehtari et al. (2017) recommend. Arguments and errors as
    of `loo`.

    Source: Watanabe 2010 (JMLR 11); Vehtari et al. 2017 (arXiv 1507.04544).
    """
    check_numbers(seed=seed)
    return _accuracy(
        model, guide, data, "waic", num_particles, local_particles, seed=seed, rows=rows, directory=directory,
        device=device, progress=progress,
    )  # fmt: skip


class HeldOutDensity:
    """Predictive densities of a block's data from draws of the global latents with joint weights: [N] by name.

    Args:
        log_weight: [draws], of the data that the weights count.
        among: [N of all data] bool, which data are among these; None for all.
    """

    def __init__(self, likelihood: ConditionalLikelihood, log_weight: Tensor, among: Tensor | None = None):
        self.likelihood, self.log_weight, self.among = likelihood, log_weight, among
        self.posterior = smoothed(log_weight[:, None])[0]  # normalised

    def __call__(self, block: Block) -> dict[str, Tensor]:
        rows = slice(block.start, block.start + block.size)
        pooled = self.likelihood.pooled(block)
        log_lik, moments = self._draws(block, pooled)
        among = torch.ones(block.size, dtype=torch.bool) if self.among is None else self.among[rows]
        weights, k_hat = smoothed(self.log_weight[:, None] - torch.where(among, log_lik, torch.zeros_like(log_lik)))
        elpd = (weights + log_lik).logsumexp(0)
        weights = weights.exp_()
        found = moments | {
            "elpd": elpd, "k_hat": k_hat, "ess": 1 / weights.square().sum(0),
            "std_error": (weights * ((log_lik - elpd).exp() - 1)).square().sum(0).sqrt(),
        }  # fmt: skip
        return found | ({} if pooled is None else {"local_k_hat": pooled.result()["k_hat"]})

    def _draws(self, block: Block, pooled: LogWeightAccumulator | None) -> tuple[Tensor, dict[str, Tensor]]:
        """log p(x_n | theta) of all draws, [draws, N], and its averages over the posterior, [N] by name."""
        chunks = [(c.log_lik.cpu(), c.log_square.cpu()) for c in self.likelihood.chunks(block, pooled)]
        log_lik, log_again = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        del chunks
        # the weights hold the estimate of p(x_n | theta): its average over them takes one that is independent of it
        log_again -= log_lik
        posterior = self.posterior.exp()
        mean, lpd = (posterior * log_lik).sum(0), (self.posterior + log_again).logsumexp(0)
        deviation = (log_lik - mean).square_()
        variance = (posterior * deviation).sum(0)
        error = (posterior * ((log_again - lpd).exp_() - 1 - deviation + variance)).square().sum(0).sqrt()
        ess = (1 / posterior.square().sum()).expand(block.size)
        return log_lik, {"lpd": lpd, "variance": variance, "waic_error": error, "posterior_ess": ess}


def _accuracy(
    model: Program, guide: Program, data: Any, method: Literal["loo", "kfold", "waic"], num_draws: int,
    local_particles: int, *, seed: int, rows: int | None, device: Any, progress: bool | None,
    directory: str | os.PathLike[str] | None = None, left: Tensor | None = None,
) -> PredictiveAccuracy:  # fmt: skip
    """The predictive accuracy of all data, by weights that count the data which are not `left` out."""
    rows = DATA_BLOCK * PARTICLE_BLOCK if rows is None else rows
    check_numbers(num_particles=num_draws, local_particles=local_particles, rows=rows)
    with start_evaluation(model, guide, data, seed=seed, device=device, given_globals=True) as run:
        require_posterior(run)
        likelihood = ConditionalLikelihood(run, num_draws, local_particles, rows)
        among = None if left is None else ~left
        settings: dict[str, Any] = {"num_particles": num_draws, "local_particles": local_particles}
        settings |= {} if left is None else {"left": left.nonzero()[:, 0].tolist()}
        folders = {name: None if directory is None else Path(directory) / name for name in ("weights", "densities")}
        parts = run_blocks(
            run, JointWeights(likelihood, among), settings | {"what": "joint weights"}, desc="joint weights",
            directory=folders["weights"], progress=progress,
        )  # fmt: skip
        log_weight = parts["log_lik"].sum(0) + parts["log_ratio"][0]
        found = run_blocks(
            run, HeldOutDensity(likelihood, log_weight, among), settings | {"what": "held-out densities"},
            desc="held-out densities", directory=folders["densities"], progress=progress,
        )  # fmt: skip
        digest = data_digest(run.columns)
    guide_k_hat = smoothed(log_weight[:, None])[1]
    numbers: dict[str, Any] = {name: found[name] for name in ("elpd", "std_error", "k_hat", "ess")}
    if method == "waic":
        numbers = {"elpd": found["lpd"] - found["variance"], "std_error": found["waic_error"]}
        numbers |= {"k_hat": guide_k_hat.expand(len(found["lpd"])), "ess": found["posterior_ess"]}
    return PredictiveAccuracy(
        **numbers, lpd=found["lpd"], guide_k_hat=float(guide_k_hat), local_k_hat=found.get("local_k_hat"),
        refitted=torch.zeros(len(found["lpd"]), dtype=torch.bool), method=method, num_draws=num_draws,
        local_particles=likelihood.local_particles, seed=seed, digest=digest,
    )  # fmt: skip


def require_posterior(run: Evaluation) -> None:
    """The guide has a density over the global latents, whose ratio to the posterior corrects for it."""
    s = run.structure
    if s.weights_refusal:
        raise UsageError(
            f"cross-validation averages over the posterior of the global latents: {s.weights_refusal} Of a point, "
            "log_marginal(..., conditional=True) gives log p(x_n | theta) of held-out data"
        )


def _columns(data: Any, seed: int, device: Any, model: Program, guide: Program) -> tuple[Tensor, ...]:
    """The columns of the data as tensors."""
    with start_evaluation(model, guide, data, seed=seed, device=device, given_globals=True) as run:
        return tuple(read_rows(column, None, run.device) for column in run.columns)


def _held_out(
    refit: Refit, columns: tuple[Tensor, ...], left: Tensor, num_draws: int, local_particles: int,
    options: dict[str, Any],
) -> PredictiveAccuracy:  # fmt: skip
    """The accuracy by a pair that is trained on the data which are not `left` out."""
    rest = tuple(column[~left.to(column.device)] for column in columns)
    pair = refit(rest if len(rest) > 1 else rest[0])
    model, guide = pair if isinstance(pair, tuple) else (pair.model, pair.guide)
    return _accuracy(model, guide, columns, "kfold", num_draws, local_particles, left=left, **options)
