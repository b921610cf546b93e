"""A particle filter over the steps of a pair, with the guide as the proposal."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppvae.errors import ContractError
from ppvae.errors.calls import explain_call
from ppvae.inference.particle_layout import with_sampled_sites
from ppvae.inference.sequences.backward import FilterHistory
from ppvae.inference.sequences.partial_replay import continue_guide, select_particles
from ppvae.inference.sequences.resampling import effective_sample_size, systematic_ancestors
from ppvae.inference.sequences.steps import steps_of
from ppvae.inference.sites import Site
from ppvae.inference.structure import Structure
from ppvae.inference.terms import Terms, evaluate_terms, sample_guide
from ppvae.inference.tracing import Program

TOLERANCE = 1e-3  # relative and absolute: of log-weights of the same latents in two runs of a pair


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
        first: the terms of the draws before any resampling: those of importance sampling.
        last: the terms of the particles at the end, whose weights are log_weight, [K, batch].
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
) -> FilterResult:
    """p(x) = prod_t E[w_t | earlier steps] by K particles, resampled at a step whose ess is under threshold * K.

    The steps are those of `steps_of`. A program can be run from its beginning alone: each round runs guide and model
    over the whole sequence with the latents kept up to the last resampling step of each datum and drawn anew after it.
    A filter that resamples R times makes 1 + R runs of the pair, R at most T - 1 and the largest of the batch, in
    memory for K sequences of latents of each datum. Kept steps must have the same weights in the next round, which is
    checked.

    Args:
        threshold: of the share of effective particles; 0 is importance sampling, 1 resamples at every step.
        ancestors: indices [K, batch] drawn in proportion to the weights of log-weights [K, batch].
        keep_history: for `sample_backward`; as much memory again.

    Raises:
        ContractError: the weight of a step depends on later latents; the guide's order of latents is not the model's.

    Source: Gordon et al. 1993; Del Moral et al. 2012 (arXiv 1202.2945) for resampling by ess.
    """
    s = structure

    def weigh(sites: dict[str, Site]) -> Terms:
        at = with_sampled_sites(s, sites)
        return evaluate_terms(model, guide, batch, num_particles, structure=at, index=index, guide_sites=sites)

    sites = sample_guide(guide, batch, num_particles, structure=s, index=index)
    t = first = weigh(sites)
    steps = steps_of(t)
    shape, device = steps.log_weight.shape, steps.log_weight.device
    times = torch.arange(shape[0], device=device)[:, None]
    own = torch.arange(shape[1], device=device)[:, None]
    last = torch.full(shape[2:], -1, device=device)
    log_px = torch.zeros(shape[2:], dtype=torch.float64, device=device)
    ess, resampled = torch.zeros(shape[0], shape[2], dtype=torch.float64, device=device), torch.zeros_like(last)
    scores: list[tuple[Tensor, Tensor]] = []
    history = FilterHistory.start(sites, steps) if keep_history else None
    final = torch.zeros_like(steps.log_weight[0])
    while True:
        after = times > last
        log_weight = torch.where(after[:, None], steps.log_weight, 0.0).cumsum(0)
        now = effective_sample_size(log_weight.detach().movedim(1, 0))
        ess = torch.where(after, now, ess)
        low = after & (now < threshold * num_particles) & (times < shape[0] - 1)
        low &= log_weight.detach().logsumexp(1).isfinite()
        some = low.any(0)
        at = torch.where(some, low.int().argmax(0), shape[0] - 1)
        reached = log_weight.gather(0, at.expand(1, *shape[1:]))[0]
        log_px = log_px + reached.logsumexp(0) - math.log(num_particles)
        final = torch.where(last < shape[0] - 1, reached, final)
        drawn = torch.where(some, ancestors(reached), own) if bool(some.any()) else own.expand(shape[1:])
        if history is not None:
            history = history.extend(sites, last, at, reached.detach(), drawn, s)
        if not bool(some.any()):
            break
        chosen = torch.where(some, reached.log_softmax(0).gather(0, drawn).sum(0), 0.0)
        scores.append((chosen, log_px.detach()))
        last, resampled = torch.where(some, at, shape[0] - 1), resampled + some
        values = select_particles(sites, drawn.expand(shape), steps, s)
        sites = continue_guide(guide, batch, values, last, steps, structure=with_sampled_sites(s, sites), index=index)
        before, t = steps, weigh(sites)
        steps = steps_of(t)
        _check_causal(before.log_weight, steps.log_weight, drawn, times <= last)
    score = torch.zeros_like(log_px)
    for chosen, so_far in scores:
        score = score + chosen * (log_px.detach() - so_far)
    return FilterResult(log_px, score, ess, resampled, first, t, final, history)


def _check_causal(before: Tensor, now: Tensor, drawn: Tensor, kept: Tensor) -> None:
    """Log-weights of kept steps, [T, K, batch], are those of their ancestors."""
    expected = before.detach().gather(1, drawn.expand(before.shape))
    same = torch.isclose(now.detach(), expected, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True) | ~kept[:, None]
    if not bool(same.all()):
        step = int((~same).flatten(1).any(1).int().argmax())
        raise ContractError(
            f"step {step + 1} of the sequence: expected a log-weight that is a function of the data and of the latents "
            f"up to this step, found one that changes with later latents, or from one run to the next. Let guide and "
            f"model compute a step from earlier latents alone, without dropout; or take importance sampling"
        )
