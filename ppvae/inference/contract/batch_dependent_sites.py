"""The structure of a batch that has other sites than the inspected one, as one with a longer sequence has."""

from dataclasses import replace
from typing import Any

from pyro.distributions import Delta

from ppvae.errors import site_error
from ppvae.inference.contract.absolute_continuity import check_each_latent, check_families
from ppvae.inference.contract.plates_and_roles import (
    DataPlate,
    check_event,
    check_is_auxiliary,
    guide_roles,
    model_roles,
)
from ppvae.inference.contract.scales_and_factors import check_scale
from ppvae.inference.contract.support import base_distribution, is_reparameterized, is_straight_through, mask_of
from ppvae.inference.structure import Role, Structure
from ppvae.inference.tracing import Nodes, event_dim
from ppvae.rng import fork_rng


def with_dynamic_structure(s: Structure, model: Nodes, guide: Nodes | None) -> Structure:
    """The structure with the sites that only this batch has; `s` itself where there is none.

    The traces are those of the evaluation itself, so that no further run is made. Each set of further sites is checked
    once, as `inspect` checks the first batch's. `guide` is None where `s` has the guide's sites already.

    Raises:
        ContractError: a site breaks the contract, by its name.
    """
    new = [n for n in model if n not in s.model_roles], [n for n in guide or {} if n not in s.guide_roles]
    if not any(new):
        return s
    key = "pair", *map(tuple, new)
    if key not in s.further:
        s.further[key] = _extend(s, model, guide, *new)
    return s.further[key]


def _extend(s: Structure, model: Nodes, guide: Nodes | None, new_p: list[str], new_q: list[str]) -> Structure:
    p, q = {n: model[n] for n in new_p}, {n: guide[n] for n in new_q} if guide else {}
    if guide is None:
        for name in (n for n, role in s.guide_roles.items() if role is Role.LATENT and n not in s.model_roles):
            if name not in model:
                check_is_auxiliary(name, {"infer": None}, model)
    q_roles = guide_roles(model, q)
    all_roles = model_roles(model, guide or {n: {} for n in s.guide_roles})
    p_roles = {n: all_roles[n] for n in p}
    latents = {n: node for n, node in q.items() if q_roles[n] is not Role.FACTOR}
    check_families(model, latents)
    for name, node in (*latents.items(), *p.items()):
        if not s.enumerated:  # an enumerated site has dims of its own
            check_event(name, node)
        if not s.bound_refusal:
            check_scale(name, node, _plate(s, node), s.common_scale)
    lower_bound_only = s.lower_bound_only
    if not s.weights_refusal:
        with fork_rng():
            lower_bound_only |= check_each_latent(model, latents, {n: q_roles[n] for n in latents})
        for name, node in latents.items():
            check_samples_the_latent(name, node, q_roles[name])
    enumerated = [n for n in {**q_roles, **p_roles} if Role.ENUMERATED in (q_roles.get(n), p_roles.get(n))]
    sampled = {n: node for n, node in latents.items() if q_roles[n] is not Role.ENUMERATED}
    return replace(
        s,
        model_roles={**s.model_roles, **p_roles},
        guide_roles={**s.guide_roles, **q_roles},
        event_dims={**s.event_dims, **{n: event_dim(node) for n, node in {**q, **p}.items()}},
        enumerated=(*s.enumerated, *(n for n in enumerated if n not in s.enumerated)),
        unmasked=(*s.unmasked, *(n for n, r in p_roles.items() if r is Role.OBSERVED and mask_of(p[n]) is None)),
        non_reparameterized=(
            *s.non_reparameterized,
            *(n for n, node in sampled.items() if not is_reparameterized(node["fn"])),
        ),
        straight_through=(
            *s.straight_through,
            *(n for n, node in sampled.items() if is_straight_through(node["fn"])),
        ),
        lower_bound_only=lower_bound_only,
    )


def check_samples_the_latent(name: str, node: dict[str, Any], role: Role) -> None:
    """A further latent has a density of its own: how helpers map to latents is found on the inspected batch alone."""
    if role is Role.AUXILIARY or (role is Role.LATENT and isinstance(base_distribution(node["fn"]), Delta)):
        raise site_error(
            name,
            "latents with a density of their own in a batch that has further sites",
            "a helper or a Delta",
            "order the data so that the batch with most sites, as with the longest sequence, comes first",
        )


def _plate(s: Structure, node: dict[str, Any]) -> DataPlate:
    """The data plate as this batch has it, whose last batch may be smaller."""
    for frame in node["cond_indep_stack"]:
        if frame.name == s.plate:
            return DataPlate(s.plate, frame.size, int(frame.full_size or frame.size), False, False)
    return DataPlate(s.plate, 1, 1, False, False)
