"""Checks of a pair's structure that several objectives or gradient estimators share.

Each `require_*` function raises ContractError with the site, what was expected, what was found and the cure.
"""

import logging

from ppvae.errors import ContractError, site_error
from ppvae.inference.structure import Role, Structure

log = logging.getLogger("ppvae")


def require_reparameterized_latents(s: Structure, estimator: str) -> None:
    """Every latent of the guide has a reparameterised sample (Pyro's `has_rsample`)."""
    if s.non_reparameterized:
        raise site_error(
            s.non_reparameterized[0], f"a reparameterised latent for a {estimator} gradient", "one without",
            "enumerate it (infer={'enumerate': 'parallel'}), or take an objective with gradient='score' or 'vimco'",
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
    if s.global_guide_reads_rows:
        raise ContractError(
            f"{found}, and the guide's density of the shared latent depends on the rows of the batch: each batch has "
            "another posterior, and a mean over batches is no bound. Give the guide parameters for it, as AutoNormal "
            "does, or train on whole batches"
        )


def require_sampled_latents(s: Structure, consumer: str, cure: str = "take gradient='pathwise'") -> None:
    """The guide enumerates no site: an enumerated site has no log-weight per draw."""
    for name in s.enumerated:
        if name in s.guide_roles:
            raise site_error(
                name, f"a guide that samples all of its sites, for {consumer}", "one that it enumerates", cure
            )


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
