"""How loose importance sampling is on the same data, by an estimate of log p(x) that is tighter."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ppvae.errors import UsageError
from ppvae.evaluation.estimate import Estimate
from ppvae.evaluation.results import mean_and_error


def looseness(tighter: Estimate, est: Estimate, k: int | None = None) -> Tensor:
    """log p(x) by a tighter estimate minus L_k of importance sampling, per datum, [N] nats.

    Both are lower bounds of log p(x) on average, so that the mean is the least by which L_k is too low, up to its
    standard error; log p(x) itself may lie higher than either.

    Args:
        tighter: what `annealed` said.
        est: what `log_marginal` said of the same data.
        k: one of the recorded bounds of `est`; its K by default.

    Raises:
        UsageError: the estimates are of other data or relative to other measures, or L_k was not recorded.

    >>> import torch
    >>> from ppvae.evaluation import annealed, log_marginal
    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2).double(), torch.ones(4, 3).double()
    >>> tighter = annealed(pair.model, pair.mean_field, x, num_temperatures=20)
    >>> looseness(tighter, log_marginal(pair.model, pair.mean_field, x, num_particles=50), 1).shape
    torch.Size([4])
    """
    if (tighter.digest, len(tighter.log_px)) != (est.digest, len(est.log_px)):
        raise UsageError(
            f"looseness: expected estimates of the same data, found {len(tighter.log_px)} with SHA-256 "
            f"{tighter.digest[:12] or 'unknown'} and {len(est.log_px)} with {est.digest[:12] or 'unknown'}"
        )
    if tighter.base_measure != est.base_measure:
        raise UsageError(
            f"looseness: log p(x) relative to {tighter.base_measure!r} and to {est.base_measure!r} cannot be compared"
        )
    return tighter.log_px - (est.log_px if k in (None, est.num_particles) else est.bound(int(k or 0)))


def looseness_and_error(tighter: Estimate, est: Estimate, k: int | None = None) -> tuple[float, float]:
    """(mean of `looseness`, its paired standard error over the data), in nats.

    For a single datum, or one estimate for the whole data set, the error is that of the two Monte-Carlo averages.
    """
    difference = looseness(tighter, est, k)
    if len(difference) > 1:
        return mean_and_error(difference)
    return float(difference), math.hypot(float(tighter.std_error), float(est.std_error))


def in_words(tighter: Estimate, est: Estimate, beside: Sequence[int] = ()) -> tuple[str, str]:
    """Both estimates on the same data, how loose importance sampling is at its K and `beside`, and what that means."""
    ks = sorted({*beside, est.num_particles})
    means = {k: est.nll if k == est.num_particles else -float(est.bound(k).mean()) for k in ks}
    both = [f"{tighter.nll:.3f} by {tighter.method}", *(f"{means[k]:.3f} by L_{k}" for k in ks)]
    unit = "nats for the whole data set" if tighter.joint else "nats"
    found = [f"{_verdict(*looseness_and_error(tighter, est, k), unit)} at K = {k}" for k in ks]
    return (
        f"NLL of the same {len(tighter.log_px)} data: {', '.join(both)}: importance sampling is {', '.join(found)}",
        "both are lower bounds of log p(x) on average, so that the higher one is the nearer, and the truth may lie "
        "higher still: neither sees a mode that none of its draws reach",
    )


def _verdict(mean: float, error: float, unit: str) -> str:
    if mean > 2 * error:
        return f"{mean:.3f} ± {error:.3f} {unit} loose"
    if mean < -2 * error:
        return f"the tighter one by {-mean:.3f} ± {error:.3f} {unit} (more temperatures or chains would help annealing)"
    return f"not seen to be loose ({mean:.3f} ± {error:.3f} {unit})"
