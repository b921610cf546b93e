"""The inference gap of a trained pair, split into approximation gap and amortisation gap."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ppvae.data.loader import data_digest
from ppvae.errors import UsageError, count_of
from ppvae.errors.calls import explain_call
from ppvae.errors.ranges import check_numbers, check_ranges
from ppvae.evaluation.block_cache import BlockContext
from ppvae.evaluation.blocks import DATA_BLOCK, PARTICLE_BLOCK, Block, run_blocks, start_evaluation
from ppvae.evaluation.estimate import Estimate
from ppvae.evaluation.local.full_rank import JointNormalFamily
from ppvae.evaluation.local.refit import ESTIMATE_FIELDS, LocalRefitter, check_refit
from ppvae.evaluation.results import SaveableResult, mean_words
from ppvae.inference.structure import Structure
from ppvae.inference.tracing import Program


@dataclass(frozen=True)
class Gaps(SaveableResult):
    """The inference gap per datum and its parts; nats per datum, float64, all [N].

    log p(x) - ELBO = (log p(x) - best ELBO) + (best ELBO - ELBO): inference gap = approximation gap + amortisation
    gap, where the best ELBO is the maximum over the guide's family with free parameters for the datum. The refit
    reaches a value at or below the best, and estimates of log p(x) are low in expectation: the amortisation gap is a
    lower bound, and the approximation gap is too large by the suboptimality of the refit and too small by the bias of
    log p(x).

    Attributes:
        log_px, log_px_error: the estimate of log p(x) and its Monte-Carlo standard error (NaN where unknown).
        reliable: `Estimate.reliable` of that estimate (True where log p(x) was given as a tensor).
        elbo: of the amortised guide.
        best_elbo: of the guide refit to the datum.
        richer_elbo: of the richer family fitted to the datum, or None.
        gained: gain of the refit's last round; zero at convergence.
        refit: description of the parameters that were refit.
        richer: name of the richer family.
        log_px_from: source of log p(x).
    """

    log_px: Tensor
    log_px_error: Tensor
    reliable: Tensor
    elbo: Tensor
    best_elbo: Tensor
    richer_elbo: Tensor | None
    gained: Tensor
    refit: str
    richer: str
    log_px_from: str
    num_particles: int
    steps: int
    rounds: int
    seed: int
    data: str = ""
    digest: str = ""
    notes: tuple[str, ...] = ()

    @property
    def inference(self) -> Tensor:
        """log p(x) - ELBO, [N] nats."""
        return self.log_px - self.elbo

    @property
    def approximation(self) -> Tensor:
        """log p(x) - best ELBO in the family, [N] nats."""
        return self.log_px - self.best_elbo

    @property
    def amortisation(self) -> Tensor:
        """Best ELBO in the family - ELBO, [N] nats; from common random numbers."""
        return self.best_elbo - self.elbo

    def table(self) -> dict[str, str]:
        """The means over the data with standard errors (of paired differences for the gaps), as strings."""
        rows = {
            "data": f"{self.data or 'a tensor'}, {count_of(len(self.elbo))}",
            "log p(x)": f"{mean_words(self.log_px)} nats per datum ({self.log_px_from})",
            "best ELBO": f"{mean_words(self.best_elbo)} ({self.refit})",
            "ELBO": mean_words(self.elbo),
            "inference gap": mean_words(self.inference),
            "approximation gap": mean_words(self.approximation),
            "amortisation gap": mean_words(self.amortisation),
        }
        if self.richer_elbo is not None:
            above = mean_words(self.richer_elbo - self.best_elbo)
            rows["richer family"] = f"{mean_words(self.richer_elbo)} ({self.richer}), {above} above the best"
        rows["refit"] = (
            f"{count_of(self.rounds, 'round')} of {count_of(self.steps, 'step')}; the last gained "
            f"{mean_words(self.gained)}"
        )
        return rows | {f"note {i}": note for i, note in enumerate(self.notes, 1)}

    def summary(self) -> str:
        """The decomposition as text, with the direction of its errors."""
        count, bad = len(self.elbo), int((~self.reliable).sum())
        inference, approximation, amortisation = map(
            mean_words, (self.inference, self.approximation, self.amortisation)
        )
        lines = [
            f"inference gap {inference} = approximation gap {approximation} + amortisation gap {amortisation} nats per "
            f"datum over {count_of(count)}",
            f"refit: {self.refit}; the amortisation gap is a lower bound (the last round gained "
            f"{mean_words(self.gained)}), the approximation gap an upper bound up to the looseness of log p(x) "
            f"({self.log_px_from})",
        ]
        if bad:
            lines.append(f"log p(x) of {bad} of {count_of(count)} is unreliable: their approximation gap may be larger")
        return "\n".join([*lines, *self.notes])


@explain_call
def gaps(
    model: Program,
    guide: Program,
    data: Any,
    *,
    log_px: Estimate | Tensor | None = None,
    num_particles: int = 1000,
    steps: int = 300,
    rounds: int = 8,
    richer: Callable[[Tensor, Tensor], JointNormalFamily] | None = JointNormalFamily,
    seed: int = 0,
    rows: int | None = None,
    directory: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> Gaps:
    """Splits log p(x) - ELBO of each datum into the approximation gap of the guide's family and the amortisation gap.

    Where the guide's sites are independent and have distributions with declared arguments, every datum gets free
    arguments, initialised at the guide's (a semi-amortised guide's: after its steps). For any other guide
    (hierarchical, a flow) a copy of its parameters is refit on each datum separately, which is slow.

    Args:
        model, guide: a Pyro pair that keeps the contract, or run.model, run.guide.
        data: a tensor [N, *event], a split, or a tuple of them; about a hundred, since each is fitted separately.
        log_px: the best available estimate for the same data (an `Estimate`, or [N] nats); by default importance
            sampling with `num_particles` draws from the most flexible guide fitted here.
        num_particles: fresh draws per datum for every ELBO after the refit.
        steps, rounds: a refit takes at most `rounds` rounds of `steps` steps of Adam; it ends where a round gains less
            than 0.002 nats on average.
        richer: makes a richer family from locations [N, D] and scales [N, D, D]; None for no richer family.
        seed: of all noise.
        rows: the largest number of (datum, particle) rows in one run of the model.
        directory: cache of finished blocks; the same call resumes from it after an interruption.

    Raises:
        ContractError: the pair breaks the contract, has latents shared by all data, or a latent without a pathwise
            gradient; UsageError, DataError: invalid arguments or data.

    Source: Cremer, Li and Duvenaud 2018, Inference suboptimality in variational autoencoders (arXiv 1801.03558).

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2).double(), torch.zeros(4, 3).double()
    >>> parts = gaps(pair.model, pair.mean_field, x, steps=20, num_particles=100)
    >>> bool((parts.inference - parts.approximation - parts.amortisation).abs().max() < 1e-12)
    True
    """
    check_numbers(num_particles=num_particles, steps=steps, rounds=rounds, seed=seed)
    if steps < 1:
        raise UsageError(f"steps: expected at least 1, found {steps}")
    check_ranges(rows=rows)
    with start_evaluation(model, guide, data, seed=seed, device=device) as run:
        _check_log_px(log_px, run.columns)
        s = run.structure
        check_refit(s)
        settings = (num_particles, steps, rounds, seed, rows or DATA_BLOCK * PARTICLE_BLOCK)
        refit = LocalRefitter(run.model, run.guide, s, run.block_size, richer, *settings).choose_guides(
            run.columns, run.device
        )

        def fit(block: Block, tracker: BlockContext) -> dict[str, Tensor]:
            tracker.bar.set_postfix_str(f"data {block.start} to {block.start + block.size - 1} of {run.num_data}")
            return tracker.part(f"block-{block.number:05d}", lambda: refit.fit_block(block, tracker.advance))

        numbers = {"num_particles": num_particles, "steps": steps, "rounds": rounds}
        words = {"what": "gaps", "refit": refit.description, "richer": refit.richer_name}
        found = run_blocks(
            replace(run, structure=refit.s, block_size=refit.size), fit, words | numbers,
            desc="gaps", directory=directory, progress=progress, parts=True, steps=None, unit="step",
        )  # fmt: skip
    estimate = {name: found.pop(name) for name in ESTIMATE_FIELDS}
    est = _estimate(estimate, num_particles, seed, s) if log_px is None else log_px
    if isinstance(est, Tensor):
        log_px_from, best = "given", est.double().cpu()
        error, reliable = torch.full_like(best, math.nan), torch.ones_like(best, dtype=torch.bool)
    else:
        best, error, reliable = est.log_px, est.std_error, est.reliable
        source = "the richer family" if refit.richer else "the refit guide"
        given = "given, from refined proposals" if est.settings.get("proposal") else "given"
        log_px_from = given if log_px is not None else f"{est.method}, from {source}"
        log_px_from += f", K = {est.num_particles}"
    return Gaps(
        log_px=best,
        log_px_error=error,
        reliable=reliable,
        elbo=found["elbo"],
        best_elbo=found["best_elbo"],
        richer_elbo=found.get("richer_elbo"),
        gained=found["gained"],
        refit=refit.description,
        richer=refit.richer_name,
        log_px_from=log_px_from,
        num_particles=num_particles,
        steps=steps,
        rounds=int(found["rounds"].max()),
        seed=seed,
        data=getattr(run.columns[0], "description", ""),
        digest=data_digest(run.columns),
        notes=(f"no richer family: {refit.why_no_richer}",) if refit.why_no_richer else (),
    )


def _check_log_px(log_px: Estimate | Tensor | None, columns: tuple[Any, ...]) -> None:
    if log_px is None:
        return
    values = log_px.log_px if isinstance(log_px, Estimate) else log_px
    if values.shape != (len(columns[0]),):
        raise UsageError(f"log_px: expected one for each of {len(columns[0])} data, found shape {list(values.shape)}")
    if isinstance(log_px, Estimate) and log_px.digest not in ("", data_digest(columns)):
        raise UsageError("log_px: expected an estimate of these data, found one of others (their digests differ)")


def _estimate(fields: dict[str, Any], num_particles: int, seed: int, s: Structure) -> Estimate:
    return Estimate(
        **fields, elbo=fields["log_px"], num_particles=num_particles, seed=seed, dims=s.observed_dims, base_measure="",
        lower_bound_only=s.lower_bound_only,
    )  # fmt: skip
