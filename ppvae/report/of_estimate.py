"""What an estimate of log p(x) says, and which data it cannot be trusted for."""

from __future__ import annotations

import math

import torch

from ppvae import plots
from ppvae.evaluation.estimate import Estimate
from ppvae.evaluation.reliability import MIN_ESS
from ppvae.plots.style import number
from ppvae.report.parts import Drawn, grid
from ppvae.report.subject import LeftOut, Subject

NO_ESTIMATE = "There is no estimate of log p(x); see the top of the page."


def log_px(s: Subject) -> Drawn:
    """The distribution over the data."""
    return Drawn(
        plots.log_px_histogram(_per_datum(s)),
        "Look for a long tail to the left (data that surprise the model), and for where the data lie that are not to "
        "be trusted: their log p(x) may be far too low.",
    )


def bounds(s: Subject) -> Drawn:
    """L_k against k."""
    if s.estimate is None:
        raise LeftOut(NO_ESTIMATE)
    if s.estimate.num_particles < 2:
        raise LeftOut("One particle gives one bound, the ELBO.")
    band = len(s.estimate.log_px) > 1
    return Drawn(
        plots.bound_curve(s.estimate),
        "Look for a curve that still rises at its right end, where more particles would raise the estimate"
        + (
            "; the band is the spread of the data, common to all k: the shape is better known than the height."
            if band
            else "."
        ),
    )


def diagnosis(s: Subject) -> Drawn:
    """Which data can be trusted, and why not."""
    est = _per_datum(s)
    if est.method != "importance sampling":
        raise LeftOut(f"{est.method[:1].upper()}{est.method[1:]} is judged by its chains: {est.reliability.summary}.")
    limit = est.k_hat_limit
    if not math.isfinite(limit):
        raise LeftOut(f"K = {est.num_particles} is too few particles to judge any datum; it takes 25.")
    return Drawn(
        plots.diagnosis(est),
        f"Look for data outside the shaded region (k̂ ≥ {limit:.2f} or an effective sample size below {MIN_ESS:g}): few "
        "particles carry their weight, and more particles or a better guide would change their log p(x).",
    )


def worst_data(s: Subject, count: int = 16) -> Drawn:
    """The data with the largest k_hat, with their numbers."""
    est = _per_datum(s)
    if s.matched:
        raise LeftOut(s.matched)
    rows = worst(est, count if s.event else 8)
    values = s.values(torch.tensor(rows))
    titles = [_numbers(s, est, i) for i in rows]
    bad = int((~est.reliable).sum())
    caption = (
        f"The data that can be trusted least ({bad} of {len(s)} are not to be), worst first, each with its row, "
        "k̂, effective sample size (ESS) and log p(x) in nats: look for what they share, such as a rare style or damage."
    )
    if s.event is not None:
        return Drawn(grid(s, values, cols=8, titles=titles), caption)
    panels = {t.replace("\n", ", ", 1): {"": v} for t, v in zip(titles, values, strict=True)}
    return Drawn(plots.profiles(panels), caption)


def worst(est: Estimate, count: int) -> list[int]:
    """Rows in order of how little they can be trusted: weights not finite, then the largest k_hat, then the least ess.

    A k_hat of NaN (fewer than 25 particles) counts as the largest.
    """
    k_hat, ess, broken = est.k_hat.tolist(), est.ess.tolist(), (est.nonfinite > 0).tolist()

    def trust(i: int) -> tuple[bool, float, float]:
        return not broken[i], -math.inf if math.isnan(k_hat[i]) else -k_hat[i], ess[i] if ess[i] == ess[i] else -1.0

    return sorted(range(len(k_hat)), key=trust)[:count]


def _numbers(s: Subject, est: Estimate, i: int) -> str:
    label = "" if s.labels is None else f", label {s.labels[i].item():g}"
    k, ess, value = (float(t[i]) for t in (est.k_hat, est.ess, est.log_px))
    return f"#{i}{label}\nk̂ {number(k, 2)}\nESS {number(ess, 0)}\nlog p(x) {number(value, 1)}"


def _per_datum(s: Subject) -> Estimate:
    if s.estimate is None:
        raise LeftOut(NO_ESTIMATE)
    if s.estimate.joint:
        raise LeftOut("Weights are joint over the data set, so that no datum has a log p(x) of its own.")
    return s.estimate
