"""Which estimates of log p(x) cannot be trusted, why, and what to do next: in words and counts, from one pass."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ppvae.evaluation.importance.psis import MIN_PARTICLES
from ppvae.inference.structure import Structure

if TYPE_CHECKING:
    from ppvae.evaluation.estimate import Estimate

MIN_ESS = 50.0
MAX_K_HAT = 0.7  # whatever the number of particles
MIN_ACCEPTANCE = 0.2  # chains that hardly move have left the tempered densities behind
AFFORDABLE = 100_000  # particles per datum; beyond it the advice is another method, not more of them
MAX_DIMS = 3  # of quadrature


def k_hat_limit(num_particles: int) -> float:
    """The largest k_hat of a reliable estimate, min(0.7, 1 - 1 / log10 K); -inf for K < 25, too few to judge.

    Source: Vehtari et al. 2024 (arXiv 1507.02646).

    >>> k_hat_limit(5000), k_hat_limit(100), k_hat_limit(20)
    (0.7, 0.5, -inf)
    """
    return min(MAX_K_HAT, 1 - 1 / math.log10(num_particles)) if num_particles >= MIN_PARTICLES else -math.inf


def by_weights(est: Estimate) -> Tensor:
    """The rule of importance sampling: no non-finite weight, ess >= 50 and k_hat below its limit; [N] bool."""
    enough = (0.999 * est.particles.double()).clamp(max=MIN_ESS)  # equal weights are enough however few there are
    return (est.nonfinite == 0) & (est.ess >= enough) & (est.k_hat < _limits(est))


def _limits(est: Estimate) -> Tensor:
    """The limit of k_hat for the particles of each datum, [N]."""
    limits = {k: k_hat_limit(k) for k in set(est.particles.tolist())}
    return torch.tensor([limits[k] for k in est.particles.tolist()], dtype=torch.float64)


def reasons(est: Estimate) -> dict[str, Tensor]:
    """Why data are not to be trusted, {reason: [N] bool}; of two a datum has the one that more draws do not mend.

    They add up to the data that are not reliable; empty where there are too few particles to judge, or where the guide
    has a point mass, so that none is.
    """
    bad = ~est.reliable
    broken = bad & (est.nonfinite > 0)
    if _weighted(est):
        if est.lower_bound_only or est.num_particles < MIN_PARTICLES:
            return {}
        heavy = bad & ~broken & ~(est.k_hat < _limits(est))
        below = sorted({f"{k_hat_limit(k):.2f}" for k in (est.num_particles, int(est.particles.min()))})
        return {
            f"heavy tail, k_hat not below {' to '.join(below)}": heavy,
            f"ess below {MIN_ESS:g}": bad & ~broken & ~heavy,
            "broken weights": broken,
        }
    still = bad & ~broken & (est.diagnostics.get("acceptance", torch.ones_like(est.ess)) < MIN_ACCEPTANCE)
    return {
        f"chains that hardly move, acceptance below {MIN_ACCEPTANCE:g}": still,
        f"ess below {min(MIN_ESS, est.num_particles / 2):g} of {est.num_particles} chains": bad & ~broken & ~still,
        "broken weights": broken,
    }


def reliability_verdict(est: Estimate) -> str:
    """How many data are not to be trusted, and of what they suffer."""
    count, bad = len(est.log_px), int((~est.reliable).sum())
    if est.num_particles < MIN_PARTICLES and est.trusted is None:
        return f"fewer than {MIN_PARTICLES} particles ({est.num_particles}): too few to judge any datum"
    if not bad:
        return "the estimate is reliable" if est.joint else f"all {count} data are reliable"
    why = ", ".join(f"{words}: {int(which.sum())}" for words, which in reasons(est).items())
    who = "the estimate is" if est.joint else f"{bad} of {count} data ({100 * bad / count:.1f} %) are"
    return f"{who} not to be trusted{f' ({why})' if why else ''}: log p(x) may be far too low"


def particles_in_words(est: Estimate, style: str = "") -> str:
    """How many particles the data got, each number in a format's style."""
    least, most = int(est.particles.min()), int(est.particles.max())
    return f"{most:{style}}" if least == most else f"{least:{style}} to {most:{style}}"


def target_in_words(est: Estimate) -> str:
    """How many data are within the target standard error and reliable, of an estimate that has one."""
    good, target = int(est.on_target.sum()), est.settings["target_std_error"]
    spent = int((~est.on_target & (est.particles >= est.settings["max_particles"])).sum())
    who = "the estimate is" if est.joint and good else f"{good} of {len(est.log_px)} data are"
    words = f"{who} reliable and within a standard error of {target:g} nats"
    return f"{words}; {spent} of the others had all {est.settings['max_particles']} particles" if spent else words


def advice(est: Estimate) -> str:
    """What to do next about the data that are not to be trusted; an empty string where there are none.

    About K * 50 / ess particles make an ess of 50 where the tail is light; a heavy tail takes another method.
    """
    found = list(reasons(est).values())
    if not any(bool(which.any()) for which in found):
        return ""
    first, low, broken = found
    if _weighted(est):
        need = est.particles[low] * MIN_ESS / est.ess[low]
        within = need <= AFFORDABLE
        rest = int(first.sum()) + int((~within).sum())
        parts = []
        if bool(within.any()):
            parts.append(f"about K = {_rounded(float(need[within].max()))} particles for {int(within.sum())} of them")
        if rest:
            parts.append(f"for {rest}: {est.remedy or 'a better guide'}")
    else:
        parts = ["more temperatures and more chains"] if bool(low.any()) else []
        if bool(first.any()):
            parts.append(f"start='prior' or more temperatures for the {int(first.sum())} whose chains hardly move")
    if bool(broken.any()):
        parts.append(f"look at the {int(broken.sum())} with broken weights: a density is NaN or infinite there")
    return "; ".join(parts)


def remedy(s: Structure) -> str:
    """What makes log p(x) of a pair tighter where importance sampling fails."""
    if s.discrete:
        names = ", ".join(repr(name) for name in s.discrete)
        return (
            f"a better guide, or the discrete latent {names} summed out by infer={{'enumerate': 'parallel'}} if its "
            f"values are few (annealing follows gradients, and cannot)"
        )
    annealing = "annealing (ppvae.evaluation.annealed; ppvae evaluate --method annealed)"
    if 0 < s.latent_dims <= MAX_DIMS and not s.has_global_latents:
        return f"quadrature (ppvae.evaluation.quadrature: {s.latent_dims} dims are few enough), or {annealing}"
    return annealing


def _weighted(est: Estimate) -> bool:
    """Whether the rule of importance sampling judges."""
    return est.trusted is None or est.method == "importance sampling"


def _rounded(need: float) -> str:
    """A number of particles rounded up to two digits.

    >>> _rounded(12345.6)
    '13,000'
    """
    unit = 10 ** max(0, math.floor(math.log10(need)) - 1)
    return f"{math.ceil(need / unit) * unit:,}"
