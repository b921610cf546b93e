"""Checks of a pair's structure that several objectives or gradient estimators share.

Each `require_*` function raises ContractError with the site, what was expected, what was found and the cure.
"""

import logging
from typing import Any

import torch

from ppvae.errors import ContractError, UsageError, site_error
from ppvae.inference.structure import Role, Structure
from ppvae.objectives.protocol import LogWeightBound

log = logging.getLogger("ppvae")


def check_reduce(objective: LogWeightBound, device: torch.device | None = None) -> None:
    """`reduce` gives one number per datum, and follows the rules of the objective's `homogeneity`.

    Raises UsageError, by the objective's class.
    """
    name, k, h = type(objective).__name__, objective.draws, objective.homogeneity
    log_weight = torch.linspace(-1.0, 1.0, 2 * k, dtype=torch.float64, device=device).reshape(k, 2).sin()
    with torch.no_grad():
        bound: Any = objective.reduce(log_weight)
        if not isinstance(bound, torch.Tensor) or bound.shape != (2,):
            found = f"shape {list(bound.shape)}" if isinstance(bound, torch.Tensor) else type(bound).__name__
            raise UsageError(
                f"{name}.reduce: expected a bound per datum, [batch] = [2], for log-weights [K, batch] = [{k}, 2]; "
                f"found {found}. Reduce the first dim alone, as log_weight.mean(0) does"
            )
        if h is None:
            return
        shifted, equal = objective.reduce(log_weight + 1), objective.reduce(torch.ones_like(log_weight))
    other = "A bound of another kind sets homogeneity: -1 for minus an upper bound, None where no such rule holds"
    if not torch.allclose(shifted - bound, torch.full_like(bound, h), rtol=0, atol=1e-5):
        raise UsageError(
            f"{name}.reduce: expected that 1 nat added to all log-weights adds {h:g} to the bound (homogeneity {h:g}); "
            f"found {float((shifted - bound)[0]):.4g}. {other}"
        )
    if not torch.allclose(equal, torch.full_like(equal, h), rtol=0, atol=1e-5):
        raise UsageError(
            f"{name}.reduce: expected {h:g} for {k} log-weights that all equal 1; found {float(equal[0]):.4g}. Divide "
            f"sums over the draws by their number. {other}"
        )


def require_reparameterized_latents(s: Structure, estimator: str) -> None:
    """Every latent of the guide has a reparameterised sample (Pyro's `has_rsample`, of a continuous one)."""
    if s.non_reparameterized:
        name = s.non_reparameterized[0]
        biased = " (or 'straight_through', which is biased)" if name in s.straight_through else ""
        raise site_error(
            name, f"a reparameterised latent for a {estimator} gradient",
            "straight-through draws of a discrete one" if biased else "one without",
            f"enumerate it (infer={{'enumerate': 'parallel'}}), or take an objective with gradient='arms', 'vimco' or "
            f"'score'{biased}",
        )  # fmt: skip


def require_reparameterized_globals(s: Structure, bound: str) -> None:
    """A global latent that all particles share has a reparameterised sample: its score would have no baseline."""
    for name in s.non_reparameterized:
        if name in s.global_sites and not s.local_refusal:
            raise site_error(
                name, f"a reparameterised global latent for {bound}, whose particles share it", "one without",
                "take ELBO with gradient='score' or 'vimco'",
            )  # fmt: skip


def require_bound_of_batches(s: Structure, rows: int) -> None:
    """A pair with global latents has a bound on log p of all data from `rows` of them."""
    if not s.has_global_latents:
        return
    found = f"a latent is shared by all data: expected all {s.full_size} of them in the batch, found {rows}"
    if s.local_refusal:
        raise ContractError(f"{found}, and no datum has a weight of its own: {s.local_refusal}")
    if s.globals_read_rows:
        raise ContractError(
            f"{found}, and a density of the shared latent, in model or guide, depends on the rows of the batch: each "
            "batch has another prior or posterior, and a mean over batches is no bound. Give the guide parameters for "
            "it, as AutoNormal does, and the prior statistics of all data; or train on whole batches"
        )


def require_sampled_latents(s: Structure, consumer: str, cure: str = "take gradient='pathwise'") -> None:
    """The guide enumerates no site: an enumerated site has no log-weight per draw."""
    for name in s.enumerated:
        if name in s.guide_roles:
            raise site_error(
                name, f"a guide that samples all of its sites, for {consumer}", "one that it enumerates", cure
            )


def require_fixed_maps(s: Structure, consumer: str) -> None:
    """No latent is mapped from an auxiliary site by parameters, which a guide held constant leaves untrained."""
    for name in s.learned_maps:
        raise site_error(
            name, f"a guide whose parameters are those of its densities, for {consumer}",
            "a latent that parameters map an auxiliary site to", "take gradient='pathwise'",
        )  # fmt: skip


def require_separable_rate(s: Structure, consumer: str) -> None:
    """log-likelihood and rate are separate terms: no site is summed out across both."""
    if s.enumerated:
        raise site_error(
            s.enumerated[0], f"a pair without enumerated sites, whose rate is a term of its own, for {consumer}",
            "a site summed out", "take ELBO with its default beta, free_bits and analytic_kl",
        )  # fmt: skip


def require_rate_per_latent(s: Structure, consumer: str) -> None:
    """Each term of the rate belongs to one latent and one datum."""
    for name, role in s.guide_roles.items():
        if role is Role.AUXILIARY:
            raise site_error(
                name, f"latents with a density of their own in the guide, for {consumer}",
                "an auxiliary site that latents are computed from", "give the latent its density in the guide",
            )  # fmt: skip
    if s.has_global_latents:
        raise ContractError(f"{consumer}: expected a rate per datum, found a latent that is shared by all data")


def require_no_guide_factor(s: Structure, consumer: str) -> None:
    """The guide adds nothing to the loss beside its density."""
    for name, role in s.guide_roles.items():
        if role is Role.FACTOR:
            raise site_error(
                name, f"a guide without a term of the loss alone, for {consumer}", "a factor, or an observed site",
                "take an ELBO of Pyro's, or ELBO or IWAE with gradient='pathwise'",
            )  # fmt: skip


def warn_enumerated_guide(s: Structure) -> None:
    """Warns that a bound on the summed-out weights gives the guide's probabilities of enumerated sites no gradient."""
    enumerated = [name for name in s.enumerated if name in s.guide_roles]
    if enumerated:
        log.warning(
            "ppvae: %s: the guide enumerates these sites, so the bound sums them out and their probabilities in the "
            "guide get no gradient; train them with ELBO or CIWAE", ", ".join(enumerated)
        )  # fmt: skip
