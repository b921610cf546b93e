"""Log-weights of a pair by step of its sequence, in the order of its sites or along the first event dim of a chain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ppvae.errors import ContractError, site_error
from ppvae.inference.particle_layout import ParticleLayout
from ppvae.inference.sites import Site, event_factors
from ppvae.inference.structure import ParticlePlacement, Role, Structure
from ppvae.inference.terms import Terms

COUNTED = (Role.LATENT, Role.OBSERVED, Role.FACTOR, Role.AUXILIARY)


def is_chain(distribution: Any) -> bool:
    """Whether a distribution is a sequence along its first event dim that can be drawn and weighed step by step.

    It has `step_log_prob(value)`, [*batch, T], whose sum over T is `log_prob`, step t a function of value[..., :t + 1]
    alone, and `continue_from(value, kept)`, a draw given the steps of `value` where `kept` [*batch, T] is true.
    """
    return hasattr(distribution, "step_log_prob") and hasattr(distribution, "continue_from")


def require_sequence(s: Structure, consumer: str) -> None:
    """The weights of a pair have steps: no site is summed out, and no latent is shared by all data.

    Raises:
        ContractError: a pair whose weights have none, by the site's name.
    """
    if s.weights_refusal:
        raise ContractError(s.weights_refusal)
    if s.enumerated:
        raise site_error(
            s.enumerated[0], f"latents that the guide samples, for {consumer}", "a site summed out over all steps",
            "sample it in model and guide",
        )  # fmt: skip
    if s.has_global_latents:
        raise ContractError(
            f"{consumer}: expected latents of each datum alone, found latents shared by all data, "
            f"{', '.join(s.global_sites)}. Take a point for them, or importance sampling"
        )


@dataclass(frozen=True)
class Steps:
    """The steps of a sequence: the step of each site of the guide, or, of chains, each site's densities by step.

    Attributes:
        count: T, the number of steps.
        of_model: the step of each site of the model; None where it has all steps, as a chain has.
        of_guide: the step of each site of the guide, likewise.
        chain: the name of the latent that is a chain; None where there is none.
        log_weight: log w_t = log p(z_t, x_t | earlier) - log q(z_t | earlier, x), [T, K, batch] in float64; their sum
            is `Terms.log_weight`.
    """

    count: int
    of_model: Mapping[str, int | None]
    of_guide: Mapping[str, int | None]
    chain: str | None
    log_weight: Tensor


def steps_of(t: Terms) -> Steps:
    """The steps of a pair's terms, and its log-weights by step.

    A step begins with a latent that the model samples after an observed site, and holds all sites up to the next such
    latent: z_1, x_1 | z_2, x_2 | .... Of a chain (`is_chain`), the steps are those along its first event dim; an
    observed site whose density is a product over a first event dim of the same size has a factor in each of them, any
    other counts at the last step, and any other latent at the first.

    Raises:
        ContractError: the guide samples the latents in another order than the model, by the site's name.
    """
    count, of_model = _model_steps(t)
    steps = Steps(count, of_model, _guide_steps(t, count, of_model), _chain(t), torch.zeros(()))
    return replace(steps, log_weight=log_weight_of(t, steps))


def log_weight_of(t: Terms, steps: Steps, window: range | None = None) -> Tensor:
    """log w_t of the steps of a window, [steps, K, batch] in float64, of terms that have their sites; of all steps."""
    return log_joint_of(t, steps, window) - log_guide_of(t, steps, window)


def log_joint_of(t: Terms, steps: Steps, window: range | None = None) -> Tensor:
    """log p(z_t, x_t | earlier steps) of the steps of a window, [steps, K, batch] in float64; of all steps."""
    return _sum_sites(t, t.model, steps, steps.of_model, window)


def log_guide_of(t: Terms, steps: Steps, window: range | None = None) -> Tensor:
    """log q(z_t | earlier steps, x) of the steps of a window, [steps, K, batch] in float64; of all steps."""
    sites = {n: site for n, site in t.guide.items() if site.role is not Role.FACTOR}  # a term of the loss alone
    return _sum_sites(t, sites, steps, dict.fromkeys(sites) if steps.chain else steps.of_guide, window)


def beyond_end(t: Terms, steps: Steps) -> Tensor:
    """Whether a datum has neither latents nor data at a step and after it, as masks hide them all, [T, batch]."""
    hidden = ((log_joint_of(t, steps) == 0) & (log_guide_of(t, steps) == 0)).all(1)
    return hidden.int().flip(0).cummin(0).values.flip(0).bool()


def _model_steps(t: Terms) -> tuple[int, dict[str, int | None]]:
    """(number of steps, the step of each site of the model; None for all steps of a chain)."""
    chain = _chain(t)
    if chain is not None:
        return int(t.guide[chain].distribution.event_shape[0]), dict.fromkeys(t.model)
    of_model: dict[str, int | None] = {}
    step, latent, observed = 0, False, False
    for name, site in t.model.items():
        if site.role is Role.LATENT:
            step, observed, latent = step + observed, False, True
        observed |= latent and site.role in (Role.OBSERVED, Role.FACTOR)
        of_model[name] = step
    return step + 1, of_model


def _chain(t: Terms) -> str | None:
    return next((name for name, site in t.guide.items() if is_chain(site.distribution)), None)


def _guide_steps(t: Terms, count: int, of_model: Mapping[str, int | None]) -> dict[str, int | None]:
    """The step of each site of the guide; None for a chain, which has all steps."""
    if _chain(t) is not None:
        return {name: None if is_chain(site.distribution) else 0 for name, site in t.guide.items()}
    of_guide: dict[str, int | None] = {}
    following = count - 1
    for name, site in reversed(t.guide.items()):
        if site.role is Role.LATENT:
            step = of_model[name]
            assert step is not None
            if step > following:
                raise site_error(
                    name, "latents that the guide samples in the order of the model, for weights by step",
                    "one that the guide samples before those of earlier steps",
                    "let the guide sample them in the model's order, given all data",
                )  # fmt: skip
            following = step
        of_guide[name] = following
    return of_guide


def _sum_sites(
    t: Terms, sites: Mapping[str, Site], steps: Steps, step_of: Mapping[str, int | None], window: range | None
) -> Tensor:
    """Sums of the log-densities of sites, each at its step or by its factors, [steps of the window, K, batch]."""
    device = next(iter(t.model.values())).log_prob.device
    zero = torch.zeros(t.num_particles, t.batch_size, dtype=torch.float64, device=device)
    rows = dict.fromkeys(range(steps.count) if window is None else window, zero)
    for name, site in sites.items():
        if site.role not in COUNTED:
            continue
        step = step_of[name]
        by_step = _by_step(site, t, steps.count) if step is None else None
        if by_step is not None:
            rows = {at: row + by_step[at] for at, row in rows.items()}
            continue
        if name == steps.chain:
            raise site_error(
                name, "a density by step in model and guide, for weights by step", "one of the whole sequence",
                "give it a chain of the same length, as ppvae.distributions.markov_chain.MarkovChain",
            )  # fmt: skip
        if step is None:
            step = steps.count - 1 if site.role in (Role.OBSERVED, Role.FACTOR) else 0
        if step in rows:
            rows[step] = rows[step] + site.log_prob.double()
    return torch.stack(list(rows.values()))


def _by_step(site: Site, t: Terms, count: int) -> Tensor | None:
    """The log-density of a site by step, [T, K, batch]; None where it is no product over steps."""
    one_by_one = t.structure.layout is ParticlePlacement.ONE_BY_ONE
    layout = ParticleLayout(t.structure, 1 if one_by_one else t.num_particles, t.batch_size)
    parts = []
    for part in site.particle_sites or (site,):
        fn, value = part.distribution, part.traced_value
        dims = 1 if is_chain(fn) else event_factors(fn)[1]
        if not dims or tuple(fn.event_shape[:1]) != (count,):
            return None
        factors = fn.step_log_prob(value) if is_chain(fn) else event_factors(fn)[0].log_prob(value)
        if isinstance(part.mask, Tensor):
            mask = part.mask
            for _ in range(len(fn.event_shape) - dims):  # of each factor's own event, of size one
                mask = mask[..., 0]
            factors = torch.where(mask, factors, 0.0)
        if dims > 1:
            factors = factors.sum(tuple(range(1 - dims, 0)))
        parts.append(layout.per_factor(factors, 1, None).double())
    return torch.cat(parts, -2)
