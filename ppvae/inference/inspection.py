"""The contract of a model/guide pair: what is found on one batch, and what is refused, by the site's name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ppvae.errors import ContractError, DataError, PpvaeError, refused
from ppvae.inference.contract.absolute_continuity import check_absolute_continuity, check_families
from ppvae.inference.contract.describe import describe_modules
from ppvae.inference.contract.missing import check_missing, explain_missing_failure, tensors_with_missing
from ppvae.inference.contract.registration import Registration, check_registered
from ppvae.inference.contract.support import (
    base_distribution,
    base_measure,
    check_support,
    event_size,
    is_discrete,
    is_relaxed,
    mask_of,
)
from ppvae.inference.evaluation_mode import eval_mode, fork_param_store
from ppvae.inference.layout_search import find_layout
from ppvae.inference.param_store import bind_program
from ppvae.inference.structure import Structure
from ppvae.inference.tracing import (
    Program,
    as_batch,
    event_dim,
    explain_failure,
    node_log_prob,
    params_of,
    sample_sites,
    trace_pair,
)
from ppvae.rng import fork_rng


def inspect(
    model: Program, guide: Program, batch: Tensor | Sequence[Any], weights: bool = True, particles: bool = True
) -> Structure:
    """Runs the pair once on a batch, checks the contract, and says how its particles can be laid out.

    With `weights=False` a pair that can be trained and has no importance weights (a point mass as guide, a scaled
    model) is described and not refused: `refusal` says why. With `particles=False` their layout is not looked for.

    Raises:
        ContractError: naming the site, what was expected, what was found and the usual cure.
    """
    batch = as_batch(batch)
    with fork_rng(), eval_mode(model, guide), torch.enable_grad():
        structure = _single(model, guide, batch)
        if weights and structure.refusal:
            raise ContractError(structure.refusal)
        if not particles:
            return structure
        with torch.no_grad(), pyro.validation_enabled(False):  # densities are compared, which is the stricter check
            return replace(structure, layout=find_layout(model, guide, batch, structure))


def _single(model: Program, guide: Program, batch: tuple[Any, ...]) -> Structure:
    registration = Registration(create=True)
    sizes = ", ".join(str(list(t.shape)) if isinstance(t, Tensor) else type(t).__name__ for t in batch)
    try:
        with registration:
            try:
                # a missing value is in no support of torch's: `check_missing` and `check_support` look for themselves
                with pyro.validation_enabled(False) if tensors_with_missing(batch) else nullcontext():
                    model_trace, guide_trace = trace_pair(model, guide, batch, Structure(), {})
            except ValueError as error:
                if "nan" not in str(error):
                    raise
                with pyro.validation_enabled(False):  # a datum whose parameters are NaN is flagged, not refused
                    model_trace, guide_trace = trace_pair(model, guide, batch, Structure(), {})
    except DataError:  # what the pair itself says of its data
        raise
    except Exception as error:
        missing = explain_missing_failure(model, guide, batch)
        if missing is None and isinstance(error, PpvaeError):
            raise
        raise missing or explain_failure(error, sizes) from error
    model_nodes, guide_nodes = dict(sample_sites(model_trace)), dict(sample_sites(guide_trace))
    plate, subsample = _data_plate(model_nodes, model_trace, batch)
    model_roles, guide_roles = _roles(model_nodes, guide_nodes)
    check_families(model_nodes, guide_nodes)
    check_missing(model_nodes, guide_nodes, batch)
    for nodes, roles in ((guide_nodes, guide_roles), (model_nodes, model_roles)):
        for name, node in nodes.items():
            _check_shape(name, node)
            if roles[name] == "observed":
                check_support(name, node)
    shared = [
        name for name, role in model_roles.items()
        if role in ("latent", "enumerated") and plate.name not in _frames(model_nodes[name])
    ]  # fmt: skip
    lower, scaled, refusal = False, "", ""
    try:
        for name, node in (*guide_nodes.items(), *model_nodes.items()):
            _check_scale(name, node, plate)
    except ContractError as error:
        scaled = str(error)
    try:
        lower = check_absolute_continuity(model_nodes, guide_nodes, model_roles, guide_roles)
    except ContractError as error:
        refusal = str(error)
    check_registered(model, guide, registration.params, model_nodes, guide_nodes, batch)
    frames = [f for node in (*model_nodes.values(), *guide_nodes.values()) for f in node["cond_indep_stack"]]
    full = int(plate.full_size or plate.size)
    observed = {n: node for n, node in model_nodes.items() if model_roles[n] == "observed"}
    drawn = {n: node for n, node in guide_nodes.items() if guide_roles[n] != "enumerated"}
    structure = Structure(
        plate=plate.name,
        plate_nesting=max(-f.dim for f in frames if f.dim is not None),
        scale=full / plate.size,
        full_size=full,
        draws_subsample=subsample,
        subsample_size=plate.size if subsample else 0,
        has_subsample_size=_asked_size(model_trace, plate) is not None,
        fixed_size=full != plate.size,
        has_global_latents=bool(shared),
        lower_bound_only=lower,
        non_reparameterized=tuple(n for n, node in drawn.items() if not getattr(node["fn"], "has_rsample", False)),
        discrete=tuple(n for n, node in drawn.items() if guide_roles[n] == "latent" and is_discrete(node["fn"])),
        latent_dims=sum(
            event_size(node) for node in drawn.values() if not isinstance(base_distribution(node["fn"]), dist.Delta)
        ),
        relaxed=tuple(n for n, node in model_nodes.items() if model_roles[n] == "latent" and is_relaxed(node["fn"])),
        scaled=scaled,
        refusal=scaled or refusal,
        enumerated=tuple(
            n for n in {**guide_roles, **model_roles} if "enumerated" in (guide_roles.get(n), model_roles.get(n))
        ),
        model_roles=model_roles,
        guide_roles=guide_roles,
        event_dims={n: event_dim(node) for n, node in {**guide_nodes, **model_nodes}.items()},
        observed_dims=sum(event_size(node) for node in observed.values()),
        base_measure=base_measure(observed.values()),
        unmasked=tuple(n for n, node in observed.items() if mask_of(node) is None),
        model_params=params_of(model_trace),
        guide_params=params_of(guide_trace),
    )
    words = tuple(_words(structure, model_nodes, guide_nodes, shared))
    return replace(structure, words=words)


def _frames(node: dict[str, Any]) -> dict[str, Any]:
    return {f.name: f for f in node["cond_indep_stack"]}


def _data_plate(nodes: Mapping[str, Any], trace: Any, batch: tuple[Any, ...]) -> tuple[Any, bool]:
    """The frame of the plate over independent data, and whether it draws its own subsample."""
    observed = {name: node for name, node in nodes.items() if node["is_observed"]}
    if not observed:
        raise ContractError(
            "the model observes nothing: expected a site with obs=, found none among "
            f"{sorted(nodes)}. Condition the data: pyro.sample('x', ..., obs=x)"
        )
    if not batch or not isinstance(batch[0], Tensor) or not batch[0].dim():
        raise DataError(f"a batch: expected a tensor with the data in its first dim, found {type(batch[0]).__name__}")
    count = len(batch[0])
    plate: Any = None
    for name, node in observed.items():
        rightmost = [f for f in node["cond_indep_stack"] if f.dim == -1]
        if not rightmost:
            raise refused(
                name,
                "a vectorised plate over the data, at dim -1",
                f"plates {sorted(_frames(node)) or 'none'}",
                "write `with pyro.plate('data', len(x)):` around the sites of one datum",
            )
        if plate is not None and plate.name != rightmost[0].name:
            raise refused(
                name,
                f"the data plate {plate.name!r}",
                f"plate {rightmost[0].name!r} at dim -1",
                "put all observed sites into one plate over the data",
            )
        plate = rightmost[0]
    full = int(plate.full_size or plate.size)
    subsample = plate.size < full and full == count and _asked_size(trace, plate) is not None
    if plate.size != count and not subsample:
        raise ContractError(
            f"plate {plate.name!r}: expected the rightmost plate to go over the {count} data of the batch, found size "
            f"{plate.size}. Use pyro.plate('data', len(x)), and .to_event(n) or dims left of -1 for everything else"
        )
    return plate, subsample


def _asked_size(trace: Any, plate: Any) -> int | None:
    """The subsample_size that the data plate was given."""
    fn = trace.nodes[plate.name]["fn"] if plate.name in trace.nodes else None
    return getattr(fn, "subsample_size", None)


def _roles(model: Mapping[str, Any], guide: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    def enumerated(node: dict[str, Any]) -> bool:
        return (node["infer"] or {}).get("enumerate") in ("parallel", "sequential")

    guide_roles: dict[str, str] = {}
    for name, node in guide.items():
        if node["is_observed"] and not (node["infer"] or {}).get("is_auxiliary"):
            raise refused(
                name, "a guide that samples latents only", "a site with obs=",
                "move the observation to the model",
            )  # fmt: skip
        if name in model and not model[name]["is_observed"]:
            _check_same_plates(name, model[name], node)
            guide_roles[name] = "enumerated" if enumerated(node) else "latent"
        elif name in model:
            raise refused(
                name, "a latent", "a site that the model observes and the guide samples",
                "remove it from the guide",
            )  # fmt: skip
        elif (node["infer"] or {}).get("is_auxiliary"):
            guide_roles[name] = "auxiliary"
        else:
            raise refused(
                name, f"a latent of the model (one of {sorted(n for n in model if not model[n]['is_observed'])})",
                "a guide site that the model does not have",
                "rename it, or mark a helper with infer={'is_auxiliary': True}",
            )  # fmt: skip
    model_roles: dict[str, str] = {}
    for name, node in model.items():
        if node["is_observed"]:
            model_roles[name] = "observed"
        elif name in guide:
            model_roles[name] = "latent"
        elif enumerated(node):
            _check_same_plates(name, node, node)
            model_roles[name] = "enumerated"
        elif name.endswith("_unobserved") and name.removesuffix("_unobserved") + "_observed" in model:
            model_roles[name] = "cancelled"  # obs_mask's other half: drawn from its prior, so its ratio is one
        else:
            discrete = getattr(node["fn"], "has_enumerate_support", False)
            raise refused(
                name, "a site of the same name in the guide",
                f"a latent ({type(base_distribution(node['fn'])).__name__}) that the guide omits; it samples "
                f"{sorted(guide)}",
                "sample it in the guide" + (
                    ", or mark it infer={'enumerate': 'parallel'} in the model to sum it out" if discrete else ""
                ),
            )  # fmt: skip
    return model_roles, guide_roles


def _check_same_plates(name: str, p: dict[str, Any], q: dict[str, Any]) -> None:
    ours, theirs = ({f.name for f in node["cond_indep_stack"] if f.dim is not None} for node in (p, q))
    if ours != theirs:
        raise refused(
            name,
            f"the model's plates {sorted(ours) or 'none'} in the guide too",
            f"{sorted(theirs) or 'none'}",
            "open the same plates, by the same names, around a latent in model and guide",
        )
    for node in (p, q):
        if (node["infer"] or {}).get("num_samples"):
            raise refused(
                name,
                "a latent that is sampled, or enumerated over its whole support",
                f"enumeration by num_samples={node['infer']['num_samples']}",
                "leave num_samples out",
            )


def _check_scale(name: str, node: dict[str, Any], plate: Any) -> None:
    expected = float(plate.full_size or plate.size) / plate.size if plate.name in _frames(node) else 1.0
    found = float(node["scale"])
    if abs(found - expected) > 1e-6 * expected:
        raise refused(
            name,
            f"scale {expected:g}, the data plate's full size over its batch" if expected != 1 else "scale 1",
            f"scale {found:g}",
            "keep the model a normalised density: leave poutine.scale to the objective (beta), and do not subsample "
            "an inner plate",
        )


def _check_shape(name: str, node: dict[str, Any]) -> None:
    dims = {f.dim for f in node["cond_indep_stack"] if f.dim is not None}
    try:
        shape = node_log_prob(node).shape
    except (ValueError, RuntimeError) as error:
        if node["is_observed"]:
            check_support(name, node)
        fn = node["fn"]
        raise refused(
            name,
            f"a value of shape {list(fn.batch_shape)} + event {list(fn.event_shape)} in its support",
            f"{list(node['value'].shape)}: {' '.join(str(error).split())[:160]}",
            "check that the data fit the network",
        ) from error
    for i, size in enumerate(reversed(shape), 1):
        if size > 1 and -i not in dims:
            raise refused(
                name,
                "one log-density per datum, its other dims declared as an event",
                f"log-density of shape {list(shape)} with plates at dims {sorted(dims)}",
                f"add .to_event(n) to its {type(base_distribution(node['fn'])).__name__}",
            )


def _words(s: Structure, model: Mapping[str, Any], guide: Mapping[str, Any], shared: Sequence[str]) -> Iterator[str]:
    """The pair in words, a line each."""
    how = f"its own subsample of {s.subsample_size} rows" if s.draws_subsample else "the batch"
    scale = f", scale {s.scale:g} (divided out of every weight)" if s.scale != 1 else ""
    yield f"data plate {s.plate!r} over {how}, full size {s.full_size}{scale}"
    for title, nodes, roles in (("model", model, s.model_roles), ("guide", guide, s.guide_roles)):
        for name, node in nodes.items():
            fn = node["fn"]
            plates = [f.name for f in node["cond_indep_stack"] if f.name != s.plate]
            facts = [f"{type(base_distribution(fn)).__name__} over event {list(fn.event_shape)}"]
            if plates:
                facts.append(f"inner plates {plates}")
            if roles[name] in ("latent", "auxiliary") and title == "guide":
                facts.append("reparameterised" if getattr(fn, "has_rsample", False) else "not reparameterised")
            if roles[name] == "enumerated":
                facts.append("summed out exactly")
            if mask_of(node) is not None:
                facts.append("masked")
            if name in shared:
                facts.append("shared by all data")
            yield f"{title} site {name!r}: {roles[name]}, {', '.join(facts)}"
    total = sum(p.numel() for p in {id(p): p for p in s.params.values()}.values())
    yield f"{len(s.params)} registered parameters, {total} numbers"
    if s.has_global_latents:
        yield "a latent is shared by all data: weights are joint, one for the whole data set and not one per datum"
    if s.refusal:
        yield f"can be trained; weights and log p(x) are refused: {s.refusal}"
    if s.lower_bound_only:
        yield "a point mass on a discrete latent: log p(x) estimates are lower bounds only"
    yield from s.remarks


def check(model: Program, guide: Program, batch: Tensor | Sequence[Any]) -> str:
    """Checks a pair against the contract on one batch and says in words what it is.

    The text names the sites with their shapes, plates, what is enumerated and what is reparameterised; the modules that
    the pair calls (of a VAE its parts), by class, with what their docstrings say first, the space of the distributions
    that they return, and how many numbers they learn; and how particles are laid out.

    Raises:
        ContractError, DataError: naming the site, what was expected, what was found and the cure.

    >>> import torch
    >>> from ppvae.models import LinearGaussian
    >>> pair = LinearGaussian(3, 2)
    >>> print(check(pair.model, pair.guide, torch.zeros(4, 3)))
    data plate 'data' over the batch, full size 4
    model site 'z': latent, Normal over event [2]
    ...
    """

    model, guide = bind_program(model), bind_program(guide)
    with fork_param_store(model, guide):
        s = inspect(model, guide, batch, weights=False)
        parts = tuple(describe_modules(model, guide, as_batch(batch), s.params))
    how = {
        "vectorized": "vectorised under a plate",
        "folded": "folded into the batch (the networks do not broadcast)",
        "one by one": "taken one by one (the networks do not broadcast)",
    }
    return "\n".join((*s.words, *parts, f"particles are {how[s.layout]}"))
