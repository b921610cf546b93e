"""A particle filter over the steps of a pair, with the guide as the proposal."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ppvae.errors import ContractError
from ppvae.errors.calls import explain_call
from ppvae.inference.particle_layout import with_sampled_sites
from ppvae.inference.second_run import buffer_copies
from ppvae.inference.sequences.backward import FilterHistory
from ppvae.inference.sequences.partial_replay import continue_guide
from ppvae.inference.sequences.resampling import effective_sample_size, systematic_ancestors
from ppvae.inference.sequences.steps import Steps, log_weight_of, steps_of
from ppvae.inference.sequences.windows import Dependence, HeldLatents, find_dependence, limit_to_window
from ppvae.inference.sites import Site
from ppvae.inference.structure import Role, Structure
from ppvae.inference.terms import Terms, evaluate_terms, sample_guide
from ppvae.inference.tracing import Program

TOLERANCE = 1e-3  # relative and absolute: of log-weights of the same latents in two runs of a pair
LONGEST_WINDOW = 16  # steps


@dataclass(frozen=True)
class FilterResult:
    """A particle filter's estimate of p(x) of each datum, and what it was made of.

    Attributes:
        log_px: [batch] nats, the log of an unbiased estimate of p(x).
        ancestor_score: sum over resampling steps of log P(ancestors) times what log_px gains after them, held
            constant, [batch]: its gradient is the resampling term of the gradient of E[log_px], for multinomial
            ancestors.
        ess: of the weights at each step, before resampling, [T, batch].
        resampled: the number of resampling steps of each datum, [batch].
        first: the terms of the first run of the pair; without windows those of importance sampling.
        last: the terms of the last run; without windows those of the particles at the end.
        log_weight: of the particles at the end, [K, batch], since the last resampling step.
        history: the particles before they were resampled; None where it was not asked for.
    """

    log_px: Tensor
    ancestor_score: Tensor
    ess: Tensor
    resampled: Tensor
    first: Terms
    last: Terms
    log_weight: Tensor
    history: FilterHistory | None


@explain_call
def particle_filter(
    model: Program,
    guide: Program,
    batch: tuple[Any, ...],
    num_particles: int,
    *,
    structure: Structure,
    threshold: float = 0.5,
    ancestors: Callable[[Tensor], Tensor] = systematic_ancestors,
    index: Tensor | None = None,
    keep_history: bool = False,
    dependence: Dependence | None = None,
) -> FilterResult:
    """p(x) = prod_t E[w_t | earlier steps] by K particles, resampled at a step whose ess is under threshold * K.

    The steps are those of `steps_of`. A program can be run from its beginning alone: each round runs guide and model
    with the latents kept up to the last resampling step of each datum and drawn anew after it. A filter that resamples
    R times makes 1 + R runs of the pair, R at most T - 1 and the largest of the batch. Kept steps must have the same
    weights in the next round, which is checked.

    Without a `dependence` a run is over the whole sequence, and K sequences of latents of each datum are held. With one
    of a finite lag, a run is over a window of up to 16 steps: earlier latents are those of one particle, but for the
    first step and the `lag` steps before the window, and the run ends after the window. Memory then does not grow with
    T times K. A chain in one site is run for fewer particles at a time instead.

    Args:
        threshold: of the share of effective particles; 0 is importance sampling, 1 resamples at every step.
        ancestors: indices [K, batch] drawn in proportion to the weights of log-weights [K, batch].
        keep_history: for `sample_backward`; as much memory as K sequences again, and no windows.
        dependence: of `find_dependence`, or, with gradients, of `find_windows`.

    Raises:
        ContractError: the weight of a step depends on later latents; the guide's order of latents is not the model's.

    Source: Gordon et al. 1993; Del Moral et al. 2012 (arXiv 1202.2945) for resampling by ess.
    """
    known = None if keep_history or dependence is None or dependence.lag is None else dependence
    s = structure if known is None else known.structure
    runs = _Runs(model, guide, batch, num_particles, s, index, known)
    try:
        return _filter(runs, threshold, ancestors, keep_history)
    except _WeightsDiffer as found:
        if known is None:
            raise ContractError(
                f"step {found.args[0] + 1} of the sequence: expected a log-weight that is a function of the data and "
                f"of the latents up to this step, found one that changes with later latents, or from one run to the "
                f"next. Let guide and model compute a step from earlier latents alone, without dropout; or take "
                f"importance sampling"
            ) from None
    return _filter(replace(runs, dependence=None), threshold, ancestors, keep_history)


def find_windows(
    model: Program, guide: Program, batch: tuple[Any, ...], *, structure: Structure, index: Tensor | None = None
) -> Dependence | None:
    """The `dependence` of a pair that a filter with gradients runs in windows; None where it runs whole sequences.

    Of 1 + R runs of the whole sequence, autograd holds (1 + R) K T steps. In windows it holds those of the windows, at
    most 16 K steps for each run. A chain in one site is run whole each time, and has none; nor has a pair of fewer
    latents than a window has steps.
    """
    if sum(role is Role.LATENT for role in structure.guide_roles.values()) <= LONGEST_WINDOW:
        return None
    with buffer_copies():
        found = find_dependence(model, guide, batch, structure=structure, index=index)
    return found if found.lag is not None and found.steps.chain is None else None


class _WeightsDiffer(Exception):
    """A kept step has another weight than in the run before: (step,)."""


@dataclass(frozen=True)
class _Runs:
    """Runs of a pair over windows of its steps."""

    model: Program
    guide: Program
    batch: tuple[Any, ...]
    num_particles: int
    structure: Structure
    index: Tensor | None
    dependence: Dependence | None

    def first(self) -> tuple[dict[str, Site], Terms, Steps]:
        """Sites of the guide, terms and steps of a run over the whole sequence."""
        sites = sample_guide(self.guide, self.batch, self.num_particles, structure=self.structure, index=self.index)
        t = self._weigh(self.model, sites)
        return sites, t, steps_of(t)

    def window(self, window: range, held: HeldLatents, last: Tensor) -> tuple[dict[str, Site], Terms, Tensor]:
        """Sites, terms and log-weights [steps of the window, K, batch] given the latents up to step `last`, [batch].

        `held` takes over the latents; sites and terms are those of the last particles that run together.
        """
        steps, s, count = held.steps, held.s, self.num_particles
        before = steps.count if self.dependence is None else self.dependence.lag or 0
        sites_in = range(window.start - before, window.stop)
        together = count
        if self.dependence is not None and steps.chain:
            together = min(count, max(1, count * LONGEST_WINDOW // steps.count))
        found, log_weights = [], []
        for start in range(0, count, together):
            size = min(together, count - start)
            values = held.particles(sites_in, start, size)
            model, guide = self.model, self.guide
            if self.dependence is not None:
                one = held.of_one()
                model = limit_to_window(model, steps.of_model, sites_in, one, s, size)
                guide = limit_to_window(guide, steps.of_guide, sites_in, one, s, size)
            if values:
                sites = continue_guide(
                    guide, self.batch, values, last, steps, structure=s, index=self.index, end=window.stop
                )
            else:
                sites = sample_guide(guide, self.batch, size, structure=s, index=self.index)
            t = self._weigh(model, sites)
            found.append(held.slices(sites, window))
            log_weights.append(log_weight_of(t, steps, window))
        held.update(found)
        return sites, t, log_weights[0] if len(log_weights) == 1 else torch.cat(log_weights, 1)

    def _weigh(self, model: Program, sites: dict[str, Site]) -> Terms:
        s, count = with_sampled_sites(self.structure, sites), next(iter(sites.values())).log_prob.shape[-2]
        return evaluate_terms(model, self.guide, self.batch, count, structure=s, index=self.index, guide_sites=sites)


def _filter(runs: _Runs, threshold: float, ancestors: Callable[[Tensor], Tensor], keep_history: bool) -> FilterResult:
    """The filter of `particle_filter`; raises _WeightsDiffer."""
    num_particles, known, s = runs.num_particles, runs.dependence, runs.structure
    if known is None:
        sites, t, steps = runs.first()
        held = HeldLatents(steps, with_sampled_sites(s, sites))
        held.update([held.slices(sites, range(steps.count))])
        log_weight, window, size = steps.log_weight, range(steps.count), t.batch_size
    else:
        steps, size = known.steps, s.batch_size(runs.batch) if runs.index is None else len(runs.index)
        held, window = HeldLatents(steps, s), range(min(4, steps.count))
        start = torch.full((size,), -1, device=steps.log_weight.device)
        sites, t, log_weight = runs.window(window, held, start)
    first, count, device = t, steps.count, log_weight.device
    own = torch.arange(num_particles, device=device)[:, None]
    last = torch.full((size,), -1, device=device)
    log_px = torch.zeros(size, dtype=torch.float64, device=device)
    ess, resampled = torch.zeros(count, size, dtype=torch.float64, device=device), torch.zeros_like(last)
    scores: list[tuple[Tensor, Tensor]] = []
    history = FilterHistory.start(sites, steps) if keep_history else None
    so_far = final = torch.zeros_like(log_weight[0])
    while True:
        times = torch.arange(window.start, window.stop, device=device)[:, None]
        after = times > last
        total = so_far + torch.where(after[:, None], log_weight, 0.0).cumsum(0)
        now = effective_sample_size(total.detach().movedim(1, 0))
        ess[window.start : window.stop] = torch.where(after, now, ess[window.start : window.stop])
        low = after & (now < threshold * num_particles) & (times < count - 1)
        low &= total.detach().logsumexp(1).isfinite()
        some = low.any(0)
        at = torch.where(some, low.int().argmax(0), len(window) - 1)
        reached = total.gather(0, at.expand(1, *so_far.shape))[0]
        at = torch.where(some, at + window.start, last.clamp(min=window.stop - 1))
        ends = some if window.stop < count else torch.ones_like(some)
        log_px = log_px + torch.where(ends, reached.logsumexp(0) - math.log(num_particles), 0.0)
        final = torch.where(last < count - 1, reached, final)
        drawn = torch.where(some, ancestors(reached), own) if bool(some.any()) else own.expand(so_far.shape)
        if history is not None:
            history = history.extend(sites, last, at, reached.detach(), drawn, held.s)
        if bool(some.any()):
            chosen = torch.where(some, reached.log_softmax(0).gather(0, drawn).sum(0), 0.0)
            scores.append((chosen, log_px.detach()))
            held.select(drawn)
        elif window.stop == count:
            break
        so_far, resampled = torch.where(ends, 0.0, reached), resampled + some
        last, seen = at, log_weight.detach().gather(1, drawn.expand(log_weight.shape))
        if known is None:
            following = window
        else:
            reach, lag = int(last.min()), known.lag or 0
            ahead = min(LONGEST_WINDOW, 2 * max(1, reach - window.start))
            following = range(max(reach, 0), min(count, reach + 1 + ahead))
            held.forget(following.start - lag)
        sites, t, log_weight = runs.window(following, held, last)
        _check_causal(seen, log_weight, window, following, last)
        window = following
    score = torch.zeros_like(log_px)
    for chosen, before in scores:
        score = score + chosen * (log_px.detach() - before)
    return FilterResult(log_px, score, ess, resampled, first, t, final, history)


def _check_causal(before: Tensor, now: Tensor, window: range, following: range, last: Tensor) -> None:
    """Log-weights of kept steps, [steps of the window, K, batch], are those of the run before, of their ancestors."""
    both = range(following.start, min(window.stop, following.stop))
    before, now = before[both.start - window.start :][: len(both)], now.detach()[: len(both)]
    kept = torch.arange(both.start, both.stop, device=last.device)[:, None] <= last
    same = torch.isclose(now, before, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True) | ~kept[:, None]
    if not bool(same.all()):
        raise _WeightsDiffer(both[int((~same).flatten(1).any(1).int().argmax())])
