"""Sections on an estimate of log p(x): its distribution, its bounds, and the data for which it is unreliable."""

import math

import torch

from ppvae import plots
from ppvae.errors.ranges import check_numbers
from ppvae.evaluation.estimate import Estimate
from ppvae.evaluation.reliability import FILTER_METHOD, MIN_ESS
from ppvae.plots.style import number
from ppvae.report.run_data import RunData, SectionUnavailable
from ppvae.report.section import CaptionedFigure, capitalized, image_grid

NO_ESTIMATE = "There is no estimate of log p(x); the top of the page says why."


def log_px(run_data: RunData) -> CaptionedFigure:
    """A histogram of log p(x) over the data."""
    return CaptionedFigure(
        plots.log_px_histogram(_estimate_per_datum(run_data)),
        "Look for a long left tail (data that are unlikely under the model), and for where the unreliable estimates "
        "lie: their log p(x) may be far too low.",
    )


def bounds(run_data: RunData) -> CaptionedFigure:
    """The bound L_k against k."""
    est = run_data.estimate
    if est is None:
        raise SectionUnavailable(NO_ESTIMATE)
    if est.num_particles < 2:
        raise SectionUnavailable("One particle gives one bound, the ELBO.")
    caption = "Look for a curve that still rises at its right end: more particles would raise the estimate."
    if len(est.log_px) > 1:
        caption += (
            " The band is the standard error over the data, which all k have in common: the shape of the curve is "
            "known more precisely than its height."
        )
    return CaptionedFigure(plots.bound_curve(est), caption)


def diagnosis(run_data: RunData) -> CaptionedFigure:
    """k_hat and effective sample size of each datum, with the region of reliable estimates."""
    est = _estimate_per_datum(run_data)
    if est.method != "importance sampling":
        by = "the spread of its filters and its effective sample size" if est.method == FILTER_METHOD else "its chains"
        raise SectionUnavailable(
            f"The reliability of {est.method} is judged by {by}. {capitalized(est.reliability.summary)}."
        )
    limit = est.k_hat_limit
    if not math.isfinite(limit):
        raise SectionUnavailable(
            f"Reliability is judged from 25 particles on; the estimate has K = {est.num_particles}."
        )
    return CaptionedFigure(
        plots.diagnosis(est),
        f"Look for data that are not reliable, and for a cloud that reaches beyond the shaded region (k̂ ≥ {limit:.2f} "
        f"or an effective sample size below {MIN_ESS:g}): there a few particles carry most of the weight, and more "
        "particles or a better guide would change log p(x). k̂ is noisy, so that a datum is judged by its 95 % limit "
        "given the k̂ of all data: single ones beyond may be reliable.",
    )


def least_reliable_data(run_data: RunData, count: int = 16) -> CaptionedFigure:
    """The data with the largest k_hat, and the numbers of each."""
    est = _estimate_per_datum(run_data)
    if run_data.mismatch:
        raise SectionUnavailable(run_data.mismatch)
    rows = least_reliable(est, count if run_data.event else 8)
    values = run_data.values(torch.tensor(rows))
    titles = [_title(run_data, est, i) for i in rows]
    bad = int((~est.reliable).sum())
    caption = (
        "The data with the least reliable estimates, worst first, each with its row, k̂, effective sample size (ESS) "
        f"and log p(x) in nats; {bad} of {len(run_data)} are unreliable. Look for common features, such as a rare "
        "style or damage."
    )
    if run_data.event is not None:
        return CaptionedFigure(image_grid(run_data, values, cols=8, titles=titles), caption)
    panels = {t.replace("\n", ", ", 1): {"": v} for t, v in zip(titles, values, strict=True)}
    return CaptionedFigure(plots.parallel_coordinates(panels), caption)


def least_reliable(est: Estimate, count: int) -> list[int]:
    """Rows of `count` data, least reliable first: non-finite weights, then the largest k_hat, then the smallest ess.

    A k_hat of NaN (fewer than 25 particles) counts as the largest.
    """
    check_numbers(count=count)
    k_hat, ess, nonfinite = est.k_hat.tolist(), est.ess.tolist(), (est.nonfinite > 0).tolist()

    def reliability(i: int) -> tuple[bool, float, float]:
        return (
            not nonfinite[i],
            -math.inf if math.isnan(k_hat[i]) else -k_hat[i],
            -1.0 if math.isnan(ess[i]) else ess[i],
        )

    return sorted(range(len(k_hat)), key=reliability)[:count]


def _title(run_data: RunData, est: Estimate, i: int) -> str:
    label = "" if run_data.labels is None else f", label {run_data.labels[i].item():g}"
    k, ess, value = (float(t[i]) for t in (est.k_hat, est.ess, est.log_px))
    return f"#{i}{label}\nk̂ {number(k, 2)}\nESS {number(ess, 0)}\nlog p(x) {number(value, 1)}"


def _estimate_per_datum(run_data: RunData) -> Estimate:
    if run_data.estimate is None:
        raise SectionUnavailable(NO_ESTIMATE)
    if run_data.estimate.joint:
        raise SectionUnavailable("Weights are joint over the data set, so a single datum has no log p(x).")
    return run_data.estimate
