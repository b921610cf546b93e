"""Reliability of estimates of log p(x): a diagnosis per datum from arrays, the reasons, and what to do next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppvae.evaluation.importance.psis import MIN_PARTICLES
from ppvae.inference.structure import Structure

MIN_ESS = 50.0
MAX_K_HAT = 0.6  # whatever the number of particles; of the upper limit, see `k_hat_upper`
Z_95 = 1.645  # the 95 % quantile of a standard normal
MIN_ACCEPTANCE = 0.2  # HMC chains that accept fewer proposals do not follow the tempered densities
FILTER_METHOD = "particle filter"
NUM_FILTERS = 10  # independent ones, whose spread is the standard error
MAX_AFFORDABLE_PARTICLES = 100_000  # per datum; above it another method is recommended
MAX_QUADRATURE_DIMS = 3
MOSTLY_RELIABLE = 0.95  # of the data


@dataclass(frozen=True)
class Reliability:
    """The diagnosis of an estimate of log p(x).

    Attributes:
        reliable: [N] bool.
        reasons: {reason: [N] bool}, disjoint, and together the data that are not reliable; a datum with several has
            the one that more particles do not cure. Empty where no datum can be judged.
        summary: how many data are unreliable, and why.
        recommendation: what to do about them; an empty string where there is nothing to do.
    """

    reliable: Tensor
    reasons: Mapping[str, Tensor]
    summary: str
    recommendation: str


def k_hat_limit(num_particles: int) -> float:
    """The limit that `k_hat_upper` of a reliable estimate stays below, min(0.6, 1 - 1 / log10 K); -inf for K < 25.

    1 - 1 / log10 K is that of Vehtari et al. 2024 (arXiv 1507.02646), whose 0.7 is for k_hat itself; on posteriors
    whose log p(x) is known, 0.6 for the upper limit keeps the share of reliable data that are off by over 5 standard
    errors under 1 %.

    >>> k_hat_limit(5000), k_hat_limit(100), k_hat_limit(20)
    (0.6, 0.5, -inf)
    """
    return min(MAX_K_HAT, 1 - 1 / math.log10(num_particles)) if num_particles >= MIN_PARTICLES else -math.inf


def k_hat_upper(k_hat: Tensor, particles: Tensor) -> Tensor:
    """An upper confidence limit of the Pareto shape of each datum, [N], from the k_hat of all data of a pair.

    k_hat has a standard error of about (1 + k) / sqrt(M) with M tail draws, so that a threshold on k_hat alone picks
    the lucky: of data with k = 0.86 one in six passed. The data of a pair share its guide, and so the law of their k:
    k ~ N(mu, tau^2), of which mu and tau^2 are estimated by moments, shrinks each k_hat towards mu, and the limit is
    the 95 % quantile of the posterior of k. One datum alone keeps its k_hat and standard error. Values that are not
    finite stay as they are, and count for no other datum.

    Source: empirical Bayes for normal means (Efron and Morris 1975); the tail draws as in Vehtari et al. 2024.

    >>> k_hat_upper(torch.tensor([0.3, -torch.inf]), torch.tensor([1000, 1000]))
    tensor([0.5196,   -inf])
    """
    tail = torch.minimum(0.2 * particles.double(), 3 * particles.double().sqrt())
    positive = k_hat.clamp(min=0.0).double()
    variance = (1 + positive).square() / tail
    finite = k_hat.isfinite()
    count = int(finite.sum())
    if count < 2:
        return torch.where(finite, positive + Z_95 * variance.sqrt(), k_hat.double()).to(k_hat)
    mu = positive[finite].mean()
    tau2 = (positive[finite].var() - variance[finite].mean()).clamp(min=0.0)
    weight = tau2 / (tau2 + variance)
    spread = weight * variance + (1 - weight).square() * variance[finite].mean() / count
    return torch.where(finite, mu + weight * (positive - mu) + Z_95 * spread.sqrt(), k_hat.double()).to(k_hat)


def assess_weights(
    *,
    ess: Tensor,
    k_hat: Tensor,
    nonfinite: Tensor,
    particles: Tensor,
    lower_bound_only: bool = False,
    joint: bool = False,
    alternative: str = "",
    reliable: Tensor | None = None,
) -> Reliability:
    """Reliability of importance sampling: no non-finite weight, ess >= 50, and the upper limit of k_hat below its own.

    About K * 50 / ess particles give an ess of 50 where the tail is light; a heavy tail takes another method.

    Args:
        particles: of each datum.
        lower_bound_only: the guide has a point mass on a discrete latent, so that no datum is reliable.
        joint: the one estimate is of the whole data set.
        alternative: the method recommended where more particles do not help.
        reliable: overrides the rule, as in a file that was written under another one.

    >>> ess, k_hat = torch.tensor([400.0, 20.0]), torch.tensor([0.2, 0.2])
    >>> found = assess_weights(ess=ess, k_hat=k_hat, nonfinite=0 * ess, particles=torch.tensor([1000, 1000]))
    >>> print(found.summary)
    50.0 % of the data (1 of 2) are unreliable: 1 with ess below 50; their log p(x) may be far too low
    >>> found.recommendation
    'about K = 2,500 particles for 1 of them'
    """
    most = int(particles.max())
    unique, index = particles.unique(return_inverse=True)
    limit = torch.tensor([k_hat_limit(int(k)) for k in unique], dtype=torch.float64).to(index.device)[index]
    upper = k_hat_upper(k_hat, particles)
    judged = not lower_bound_only and most >= MIN_PARTICLES
    if reliable is None:
        enough = (0.999 * particles.double()).clamp(max=MIN_ESS)  # equal weights are enough however few there are
        reliable = (nonfinite == 0) & (ess >= enough) & (upper < limit) & judged
    if not judged:
        too_few = f"fewer than {MIN_PARTICLES} particles ({most}): too few to judge any datum"
        return Reliability(reliable, {}, too_few if most < MIN_PARTICLES else _summary(reliable, {}, joint), "")
    broken = ~reliable & (nonfinite > 0)
    heavy = ~reliable & ~broken & ~(upper < limit)
    low = ~reliable & ~broken & ~heavy
    limits = sorted({f"{k_hat_limit(k):.2f}" for k in (most, int(particles.min()))})
    reasons = {
        f"a heavy tail (95 % limit of k_hat not below {' to '.join(limits)})": heavy,
        f"ess below {MIN_ESS:g}": low,
        "non-finite weights": broken,
    }
    needed = particles[low] * MIN_ESS / ess[low]
    affordable = needed <= MAX_AFFORDABLE_PARTICLES
    others = int(heavy.sum()) + int((~affordable).sum())
    advice = []
    if bool(affordable.any()):
        count = int(affordable.sum())
        advice.append(f"about K = {_round_up(float(needed[affordable].max()))} particles for {count} of them")
    if others:
        advice.append(f"for {others}: {alternative or 'a better guide'}")
    return Reliability(
        reliable, reasons, _summary(reliable, reasons, joint), "; ".join(advice + _advice_on_nonfinite(broken))
    )


def assess_chains(
    *,
    ess: Tensor,
    nonfinite: Tensor,
    acceptance: Tensor,
    num_chains: int,
    joint: bool = False,
    reliable: Tensor | None = None,
) -> Reliability:
    """Reliability of annealing: finite weights, ess >= min(50, K / 2) of K > 1 chains, acceptance >= 0.2; [N] arrays.

    `joint` and `reliable` are as for `assess_weights`.
    """
    enough = min(MIN_ESS, num_chains / 2)
    if reliable is None:
        reliable = (nonfinite == 0) & (ess >= enough) & (acceptance >= MIN_ACCEPTANCE) & (num_chains > 1)
    broken = ~reliable & (nonfinite > 0)
    stuck = ~reliable & ~broken & (acceptance < MIN_ACCEPTANCE)
    low = ~reliable & ~broken & ~stuck
    reasons = {
        f"an acceptance rate below {MIN_ACCEPTANCE:g}": stuck,
        f"ess below {enough:g} of {num_chains} chains": low,
        "non-finite weights": broken,
    }
    advice = ["more temperatures and more chains"] if bool(low.any()) else []
    if bool(stuck.any()):
        advice.append(f"start='prior' or more temperatures for the {int(stuck.sum())} with a low acceptance rate")
    return Reliability(
        reliable, reasons, _summary(reliable, reasons, joint), "; ".join(advice + _advice_on_nonfinite(broken))
    )


def assess_filters(
    *, ess: Tensor, filter_ess: Tensor, nonfinite: Tensor, particles: Tensor, reliable: Tensor | None = None
) -> Reliability:
    """Reliability of particle filters: finite estimates, an effective number of at least half the filters, ess >= 50.

    The estimates Z of p(x) by the filters are then weights whose relative variance is at most about 1, as log Z has
    when its standard deviation is under 0.8 nats.

    Args:
        ess: the smallest ess of a step, summed over the filters, [N].
        filter_ess: (sum Z)^2 / sum Z^2 over the filters, [N].
    """
    enough = NUM_FILTERS / 2
    if reliable is None:
        reliable = (nonfinite == 0) & (filter_ess >= enough) & (ess >= MIN_ESS)
    broken = ~reliable & (nonfinite > 0)
    spread = ~reliable & ~broken & ~(filter_ess >= enough)
    reasons = {
        f"estimates of {NUM_FILTERS} filters that disagree (effective number below {enough:g})": spread,
        f"ess below {MIN_ESS:g} at a step": ~reliable & ~broken & ~spread,
        "non-finite weights": broken,
    }
    advice = (
        [f"more than {int(particles.max())} particles, or a better guide"] if bool((~reliable & ~broken).any()) else []
    )
    return Reliability(reliable, reasons, _summary(reliable, reasons, False), "; ".join(advice))


def assess_mixed(
    *,
    ess: Tensor,
    k_hat: Tensor,
    nonfinite: Tensor,
    particles: Tensor,
    acceptance: Tensor,
    chains: Tensor,
    joint: bool = False,
    alternative: str = "",
    reliable: Tensor | None = None,
) -> Reliability:
    """Reliability of data of which some, `chains` [N] bool, are annealed: each by the rule of its method.

    k_hat is pooled over the data of importance sampling alone; `particles` counts the chains of the others.

    >>> one = torch.ones(2)
    >>> which = torch.tensor([False, True])
    >>> assess_mixed(ess=90 * one, k_hat=0.1 * one, nonfinite=0 * one, particles=torch.tensor([1000, 100]),
    ...              acceptance=torch.tensor([torch.nan, 0.8]), chains=which).reliable
    tensor([True, True])
    """
    judged = torch.zeros(len(ess), dtype=torch.bool) if reliable is None else reliable
    reasons: dict[str, Tensor] = {}
    advice: list[str] = []
    for which in (~chains, chains):
        if not bool(which.any()):
            continue
        common: dict[str, Any] = {"ess": ess[which], "nonfinite": nonfinite[which], "joint": joint}
        given = None if reliable is None else reliable[which]
        if which is chains:
            count = int(particles[which].max())
            part = assess_chains(**common, acceptance=acceptance[which], num_chains=count, reliable=given)
        else:
            part = assess_weights(
                **common, k_hat=k_hat[which], particles=particles[which], alternative=alternative, reliable=given
            )
        judged = judged.clone()
        judged[which] = part.reliable
        for reason, members in part.reasons.items():
            reasons.setdefault(reason, torch.zeros_like(judged))[which] = members
        advice += [part.recommendation] if part.recommendation else []
    return Reliability(judged, reasons, _summary(judged, reasons, joint), "; ".join(dict.fromkeys(advice)))


def _summary(reliable: Tensor, reasons: Mapping[str, Tensor], joint: bool) -> str:
    count, bad = len(reliable), int((~reliable).sum())
    if not bad:
        return "the estimate is reliable" if joint else all_reliable(count)
    counts = {reason: int(which.sum()) for reason, which in reasons.items() if bool(which.any())}
    if joint or count == 1:
        why, who = " and ".join(counts), f"the {'estimate' if joint else 'datum'} is unreliable"
    else:
        why = ", ".join(f"{number} with {reason}" for reason, number in counts.items())
        who = f"{100 * bad / count:.1f} % of the data ({bad} of {count}) are unreliable"
    whose = "" if joint else "its " if count == 1 else "their "
    return f"{who}{f': {why}' if why else ''}; {whose}log p(x) may be far too low"


def _advice_on_nonfinite(broken: Tensor) -> list[str]:
    count = int(broken.sum())
    if not count:
        return []
    return [
        f"check the densities of the {count} with non-finite weights: one is NaN or infinite, as where a scale "
        f"underflows to 0 (in float32 exp(-104)); float64 data, or a lower limit of the scale, mends that"
    ]


def recommend_alternative(s: Structure) -> str:
    """The method that gives a tighter log p(x) of a pair where importance sampling fails."""
    if s.discrete:
        names = ", ".join(repr(name) for name in s.discrete)
        return (
            f"a better guide, or the discrete latent {names} summed out by infer={{'enumerate': 'parallel'}} if its "
            f"values are few (annealing follows gradients, and cannot)"
        )
    annealing = "annealing (ppvae.evaluation.annealed; ppvae evaluate --method annealed)"
    if 0 < s.latent_dims <= MAX_QUADRATURE_DIMS and not s.has_global_latents:
        return f"quadrature (ppvae.evaluation.quadrature: {s.latent_dims} dims are few enough), or {annealing}"
    return annealing


def verdict_words(reliable: Tensor, joint: bool) -> str:
    """Whether log p(x) of these data, [N] bool, can be relied on.

    >>> verdict_words(torch.tensor([True, False]), joint=False)
    'reliable for 50.0 % of the data only: log p(x) of the other 1 may be far too low, and the mean with it'
    """
    good = float(reliable.double().mean())
    if joint or good in (0.0, 1.0):
        return "reliable" if good else "not reliable: log p(x) may be far too low"
    rest = int((~reliable).sum())
    share = f"reliable for {100 * good:.1f} % of the data"
    if good >= MOSTLY_RELIABLE:
        return f"{share}; log p(x) of the other {rest} may be too low"
    return f"{share} only: log p(x) of the other {rest} may be far too low, and the mean with it"


def all_reliable(count: int) -> str:
    """The words for data all of which are reliable.

    >>> all_reliable(1), all_reliable(3)
    ('the datum is reliable', 'all 3 data are reliable')
    """
    return "the datum is reliable" if count == 1 else f"all {count} data are reliable"


def error_words(mean: float, error: float) -> str:
    """A mean and its standard error as a string, which says so where one number has no standard error.

    >>> error_words(-2.0, 0.5), error_words(-2.0, math.nan), error_words(-1e-9, 1e-9)
    ('-2.000 ± 0.500', '-2.000 (without error)', '0.000 ± 0.000')
    """
    error_text = " (without error)" if math.isnan(error) else f" ± {error:.3f}"
    return f"{mean:z.3f}{error_text}"


def format_particles(particles: Tensor, style: str = "") -> str:
    """The number of particles per datum, or its range, each number in a format's style.

    >>> format_particles(torch.tensor([100, 12800]), ",")
    '100 to 12,800'
    """
    least, most = int(particles.min()), int(particles.max())
    return f"{most:{style}}" if least == most else f"{least:{style}} to {most:{style}}"


def _round_up(count: float) -> str:
    """A number of particles rounded up to two digits.

    >>> _round_up(12345.6)
    '13,000'
    """
    unit = 10 ** max(0, math.floor(math.log10(count)) - 1)
    return f"{math.ceil(count / unit) * unit:,}"
