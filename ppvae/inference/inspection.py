"""Inspection of a pair, and the public functions that inspect the pair they are given: `inspect`, `check`, `terms`."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ppvae.errors import ContractError, DataError, PpvaeError
from ppvae.errors.calls import explain_call
from ppvae.errors.memory import memory_failure
from ppvae.errors.ranges import check_numbers, check_ranges
from ppvae.inference.contract.absolute_continuity import check_absolute_continuity, check_families
from ppvae.inference.contract.change_of_variables import find_learned_maps
from ppvae.inference.contract.describe import (
    describe_layout,
    describe_modules,
    describe_structure,
    mask_caveats,
    unstandardized_caveats,
)
from ppvae.inference.contract.independence import (
    check_globals_first,
    check_globals_sampled,
    check_images_of_globals,
    check_independence,
    globals_read_rows,
    has_full_size_of_its_own,
)
from ppvae.inference.contract.missing import check_missing, explain_missing_failure, tensors_with_missing
from ppvae.inference.contract.plates_and_roles import (
    DataPlate,
    check_event,
    find_data_plate,
    global_latents,
    guide_roles,
    model_roles,
    plates_of,
)
from ppvae.inference.contract.registration import CheckRegistration, check_registered
from ppvae.inference.contract.run_failure import explain_failure, explain_shared_weight
from ppvae.inference.contract.scales_and_factors import check_factor, find_common_scale
from ppvae.inference.contract.support import (
    base_distribution,
    base_measure,
    check_support,
    event_size,
    is_discrete,
    is_improper,
    is_relaxed,
    is_reparameterized,
    is_straight_through,
    mask_of,
)
from ppvae.inference.evaluation_mode import eval_mode, fork_param_store
from ppvae.inference.param_store import bind_pair, unconstrained
from ppvae.inference.placement_search import find_particle_placement, guide_draws_noise
from ppvae.inference.sites import Site
from ppvae.inference.structure import Role, Structure
from ppvae.inference.terms import LatentHook, Terms, evaluate_terms
from ppvae.inference.tracing import (
    Nodes,
    Program,
    as_batch,
    event_dim,
    find_subsample,
    has_inverse,
    sample_sites,
    trace_pair,
)
from ppvae.rng import fork_rng


@explain_call
def inspect(
    model: Program, guide: Program, batch: Tensor | Sequence[Any], weights: bool = True, particles: bool = True
) -> Structure:
    """Runs a pair on a batch, checks it against the contract, and finds its structure and particle layout.

    Args:
        weights: refuse a pair that can be trained and has no importance weights (a point mass as guide, a scaled
            model); if false, `weights_refusal` of the result says why it would be refused.
        particles: search for the particle layout.

    Raises:
        ContractError: naming the site, what was expected, what was found and the usual cure.
        DataError: an observed value that the pair cannot take, naming its place.
    """
    batch = as_batch(batch)
    with fork_rng(), eval_mode(model, guide), torch.enable_grad():
        structure = _inspect_single_particle(model, guide, batch)
        if weights and structure.weights_refusal:
            raise ContractError(structure.weights_refusal)
        if not particles:
            return structure
        with torch.no_grad(), pyro.validation_enabled(False):  # densities are compared, which is the stricter check
            noise = bool(structure.enumerated) and guide_draws_noise(model, guide, batch, structure)
            return replace(structure, layout=find_particle_placement(model, guide, batch, structure), draws_noise=noise)


@explain_call
def check(model: Program, guide: Program, batch: Tensor | Sequence[Any]) -> str:
    """`ppvae.check` of the tensors of one batch: the pair against the contract, and a description of it.

    Raises:
        ContractError, DataError: naming the site, what was expected, what was found and the cure.

    >>> from ppvae.models import LinearGaussian
    >>> pair = LinearGaussian(3, 2)
    >>> print(check(pair.model, pair.guide, torch.zeros(4, 3)))
    data plate 'data' over the batch, full size 4
    model site 'z': latent, Normal over event [2]
    ...
    """
    model, guide = bind_pair(model, guide)
    with fork_param_store(model, guide):
        s = inspect(model, guide, batch, weights=False)
        modules = tuple(describe_modules(model, guide, as_batch(batch), s.params))
    return "\n".join((*s.description, *modules, describe_layout(s)))


@explain_call
def terms(
    model: Program,
    guide: Program,
    batch: Tensor | Sequence[Any],
    num_particles: int = 1,
    *,
    values: Mapping[str, Tensor] | None = None,
    frozen: Sequence[str] = (),
    structure: Structure | None = None,
    index: Tensor | None = None,
    drawn: Mapping[str, Site] | None = None,
    entry: LatentHook | None = None,
    events: bool = False,
    kl: bool = False,
    global_draws: int | None = None,
) -> Terms:
    """Traces guide and model on one batch under a particle plate and returns their log-densities per site.

    Args:
        batch: the tensors that the pair is called with, `model(*batch)`; a tensor is a batch of one.
        num_particles: K, the number of draws per datum, for each of `global_draws`.
        values: latents [particles, (inner plates,) batch, *event] to evaluate at, instead of the guide's draws; the
            guide samples the others given them. Coupled draws, as antithetic ones, are given in this way.
        frozen: "guide" or "model": that side is run again with its parameters held constant, so that sampled values
            keep their gradient paths (sticking the landing: Roeder et al. 2017, arXiv 1703.09194). "latents": the
            guide's draws are held constant.
        structure: the result of `inspect` for this pair; by default the pair is inspected.
        index: for a plate that draws its own subsample of the data: the rows to take, [batch].
        drawn: the guide's sites from `sample_guide`; the guide is not run again. Not for pairs with enumerated sites.
        entry: a function of (site name, sampled value, layout) that returns the value which the densities of a local
            latent are evaluated at; the guide is run twice.
        events: also log-densities of latents per factor of their event, where they factorise over it.
        kl: also KL divergences in closed form, where torch or Pyro has one for the two distributions.
        global_draws: S, the number of draws of the global latents, each shared by K particles of the local ones;
            particles are then S K, `local_log_weight` is [S, K, batch] and `global_log_ratio` [S]. By default every
            particle has a draw of its own.

    Raises:
        ContractError: the pair breaks the contract; the message names the site.

    >>> from ppvae.models import LinearGaussian
    >>> pair = LinearGaussian(3, 2)
    >>> t = terms(pair.model, pair.guide, torch.zeros(4, 3), num_particles=5)
    >>> t.log_weight.shape, sorted(t.model)
    (torch.Size([5, 4]), ['x', 'z'])
    """
    check_numbers(num_particles=num_particles)
    check_ranges(global_draws=global_draws)
    return evaluate_terms(
        model, guide, batch, num_particles, structure=structure or inspect(model, guide, batch), values=values,
        frozen=frozen, index=index, guide_sites=drawn, latent_hook=entry, events=events, kl=kl,
        global_draws=global_draws,
    )  # fmt: skip


def _inspect_single_particle(model: Program, guide: Program, batch: tuple[Any, ...]) -> Structure:
    """The structure of a pair from one run without a particle plate, all checks made, without a layout."""
    registration = CheckRegistration(create=True)
    model_trace, guide_trace = _trace_and_explain(model, guide, batch, registration)
    p, q = dict(sample_sites(model_trace)), dict(sample_sites(guide_trace))
    plate = find_data_plate(model, p, (model_trace, guide_trace), batch)
    q_roles = guide_roles(p, q)
    p_roles = model_roles(p, q)
    latents = {n: node for n, node in q.items() if q_roles[n] is not Role.FACTOR}
    check_families(p, latents)
    check_missing(p, q, batch)
    _check_sites(q, q_roles)
    _check_sites(p, p_roles)
    check_registered(model, guide, registration.params, p, q, batch)
    structure = replace(
        _structure(plate, p, q, p_roles, q_roles),
        has_fixed_full_size=plate.full_size != plate.size
        or (not plate.has_subsample_size and has_full_size_of_its_own(model, batch, plate.name)),
        model_params=params_of(model_trace),
        guide_params=params_of(guide_trace),
    )
    rows = find_subsample(model_trace, plate.name)["value"] if plate.draws_subsample else None
    structure = replace(structure, **_find_weights(structure, plate, model, guide, batch, p, latents, rows))
    return replace(structure, description=tuple(describe_structure(structure, p, q)))


def _find_weights(
    s: Structure, plate: DataPlate, model: Program, guide: Program, batch: tuple[Any, ...], p: Nodes, latents: Nodes,
    rows: Tensor | None,
) -> dict[str, Any]:  # fmt: skip
    """What the densities of a pair add up to, as fields of its structure: its common scale, or why it has no weights.

    `latents` are the guide's sites that have a density there, `rows` those that the plate has drawn.
    """
    found: dict[str, Any] = {"bound_refusal": "", "weights_refusal": ""}
    joint, roles = s.has_global_latents, {n: s.guide_roles[n] for n in latents}
    try:
        found["common_scale"] = find_common_scale((*latents.items(), *p.items()), plate)
        for name in (n for n, role in s.model_roles.items() if role is Role.FACTOR):
            check_factor(name, p[name], plate, joint)
    except ContractError as error:
        found["bound_refusal"] = found["weights_refusal"] = str(error)
    try:
        found["lower_bound_only"] = check_absolute_continuity(guide, batch, p, latents, roles, plate.name, joint)
        auxiliary = [n for n, role in roles.items() if role is Role.AUXILIARY]
        found["learned_maps"] = find_learned_maps(guide, batch, p, latents, auxiliary, plate.name)
        coupled = joint and plate.size == plate.full_size  # a joint weight may couple all data
        if not found["bound_refusal"] and not coupled:
            check_independence(model, batch, p, plate.name, rows)
    except ContractError as error:
        found["weights_refusal"] = found["bound_refusal"] or str(error)
    found["training_caveats"] = (*mask_caveats(p, latents), *unstandardized_caveats(p))
    if joint:
        found |= _find_local_weights(s, plate, model, guide, batch, p, latents, rows)
        found["local_refusal"] = found["bound_refusal"] or found["local_refusal"]
    return found


def _find_local_weights(
    s: Structure, plate: DataPlate, model: Program, guide: Program, batch: tuple[Any, ...], p: Nodes, latents: Nodes,
    rows: Tensor | None,
) -> dict[str, Any]:  # fmt: skip
    """Whether each datum has a weight of its own given the global latents, as fields of a pair's structure."""
    local = {n: node for n, node in latents.items() if n not in s.global_sites}
    roles = {n: s.guide_roles[n] for n in local}
    found: dict[str, Any] = {"local_refusal": "", "globals_read_rows": False}
    try:
        check_globals_sampled(p, s)
        check_images_of_globals(p, guide, batch, s, rows)
        check_absolute_continuity(guide, batch, p, local, roles, plate.name, False)
        check_globals_first(model, guide, batch, s, rows)
        check_independence(model, batch, p, plate.name, rows)
        found["globals_read_rows"] = globals_read_rows(model, guide, batch, s, rows)
    except ContractError as error:
        found["local_refusal"] = str(error)
    return found


def _trace_and_explain(
    model: Program, guide: Program, batch: tuple[Any, ...], registration: CheckRegistration
) -> tuple[Any, Any]:
    """(model trace, guide trace) of one run; an exception becomes an error that names the cause and the cure."""
    try:
        with registration:
            return _trace_validated(model, guide, batch)
    except DataError:  # raised by the pair itself
        raise
    except Exception as error:
        if memory_failure(error):
            raise
        missing = explain_missing_failure(model, guide, batch)
        if missing is None and isinstance(error, PpvaeError):
            raise
        weight = missing or explain_shared_weight(model, guide, batch)
        raise weight or explain_failure(error, model, guide, batch) from error


def _trace_validated(model: Program, guide: Program, batch: tuple[Any, ...]) -> tuple[Any, Any]:
    """One run under Pyro's validation, as far as NaN allows."""
    try:
        # no support of torch contains a missing value: `check_missing` and `check_support` validate in its place
        with pyro.validation_enabled(False) if tensors_with_missing(batch) else nullcontext():
            return trace_pair(model, guide, batch, Structure(), {})
    except ValueError as error:
        if "nan" not in str(error):
            raise
        with pyro.validation_enabled(False):  # a datum whose parameters are NaN is flagged in results, not refused
            return trace_pair(model, guide, batch, Structure(), {})


def _check_sites(nodes: Nodes, roles: Mapping[str, Role]) -> None:
    for name, node in nodes.items():
        check_event(name, node)
        if roles[name] is Role.OBSERVED:
            check_support(name, node)


def _has_absent_values(node: dict[str, Any]) -> bool:
    """Whether some data have no value of a latent: a masked one, or an event of which not all is counted."""
    return mask_of(node) is not None or getattr(base_distribution(node["fn"]), "counted", None) is not None


def _structure(
    plate: DataPlate, p: Nodes, q: Nodes, p_roles: Mapping[str, Role], q_roles: Mapping[str, Role]
) -> Structure:
    """The structure as far as the sites of model and guide show it."""
    frames = [f for node in (*p.values(), *q.values()) for f in node["cond_indep_stack"]]
    observed = {n: node for n, node in p.items() if p_roles[n] is Role.OBSERVED}
    labels = [n for n, node in observed.items() if (node["infer"] or {}).get("is_label")]
    sampled = {n: node for n, node in q.items() if q_roles[n] not in (Role.ENUMERATED, Role.FACTOR)}
    with_density = [n for n in sampled.values() if not isinstance(base_distribution(n["fn"]), dist.Delta)]
    enumerated = [n for n in {**q_roles, **p_roles} if Role.ENUMERATED in (q_roles.get(n), p_roles.get(n))]
    shared = bool(global_latents(p, p_roles, plate.name))
    # a datum has each latent once: not one for each value of an enumerated site, and none that is masked
    once = Role.ENUMERATED not in q_roles.values() and not any(map(_has_absent_values, with_density))
    return Structure(
        plate=plate.name,
        plate_nesting=max(-f.dim for f in frames if f.dim is not None),
        scale=plate.scale,
        full_size=plate.full_size,
        draws_subsample=plate.draws_subsample,
        subsample_size=plate.size if plate.draws_subsample else 0,
        has_subsample_size=plate.has_subsample_size,
        has_global_latents=shared,
        global_sites=tuple(n for n, node in {**q, **p}.items() if shared and plate.name not in plates_of(node)),
        enumerated=tuple(enumerated),
        model_roles=p_roles,
        guide_roles=q_roles,
        event_dims={n: event_dim(node) for n, node in {**q, **p}.items()},
        labels=tuple(labels),
        observed_dims=sum(event_size(node) for n, node in observed.items() if n not in labels),
        base_measure=base_measure(observed.values()),
        unmasked=tuple(n for n, node in observed.items() if mask_of(node) is None),
        non_reparameterized=tuple(n for n, node in sampled.items() if not is_reparameterized(node["fn"])),
        straight_through=tuple(n for n, node in sampled.items() if is_straight_through(node["fn"])),
        no_inverse=tuple(n for n, node in sampled.items() if not has_inverse(node)),
        discrete=tuple(n for n, node in sampled.items() if q_roles[n] is Role.LATENT and is_discrete(node["fn"])),
        latent_dims=sum(map(event_size, with_density)),
        quadrature_dims=sum(map(event_size, with_density)) if once else 0,
        relaxed=tuple(n for n, node in p.items() if p_roles[n] is Role.LATENT and is_relaxed(node["fn"])),
        unnormalized=tuple(n for n, node in p.items() if p_roles[n] is Role.FACTOR or is_improper(node)),
    )


def params_of(trace: Any) -> dict[str, Tensor]:
    """The unconstrained tensors of a trace's param sites, by name."""
    return {name: unconstrained(node["value"]) for name, node in trace.nodes.items() if node["type"] == "param"}
