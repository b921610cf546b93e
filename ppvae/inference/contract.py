"""The contract of a model/guide pair: what is found on one batch, and what is refused, by the site's name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ppvae.errors import ContractError, DataError
from ppvae.inference.scope import Registration, bound, eval_mode, unbound
from ppvae.inference.weights import (
    Pair,
    Terms,
    as_batch,
    event_dim,
    node_log_prob,
    params_of,
    sample_nodes,
    terms,
    traces,
)

log = logging.getLogger("ppvae")


@dataclass(frozen=True)
class Structure:
    """What a pair is: its data plate, its sites' roles, its parameters, and how particles can be laid out."""

    plate: str = ""
    nesting: int = 1
    scale: float = 1.0
    full_size: int = 0
    indexes: bool = False  # the plate draws its own subsample of the data, which the pair gets whole
    subsample_size: int = 0
    fixed_size: bool = False  # the plate's full size is a number, not the batch's
    layout: str = "one by one"  # or "vectorized", "folded"
    joint: bool = False  # a latent is shared by all data
    lower_bound_only: bool = False  # a point mass on a discrete latent
    enumerated: tuple[str, ...] = ()
    model_roles: Mapping[str, str] = field(default_factory=dict)
    guide_roles: Mapping[str, str] = field(default_factory=dict)
    event_dims: Mapping[str, int] = field(default_factory=dict)
    observed_dims: int = 0  # numbers observed per datum
    observed_support: str = ""  # "boolean", "discrete" or "continuous"
    unmasked: tuple[str, ...] = ()  # observed sites without a mask
    model_params: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    guide_params: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    score_only: tuple[str, ...] = ()  # latents that the guide does not reparameterise
    refusal: str = ""  # why weights and log p(x) are refused, where the pair can only be trained
    words: tuple[str, ...] = field(default=(), repr=False)

    @property
    def params(self) -> dict[str, Tensor]:
        """Every registered parameter, unconstrained, by name."""
        return {**self.model_params, **self.guide_params}

    def size_of(self, batch: Sequence[Any]) -> int:
        """How many data one call of the pair represents by itself."""
        return self.subsample_size if self.indexes else len(batch[0])

    def represented(self, rows: int) -> int:
        """How many data the loss of a batch of so many rows stands for."""
        return self.full_size if self.fixed_size else rows


def refuse(site: str, expected: str, found: str, cure: str) -> ContractError:
    """The error for a site that breaks the contract."""
    return ContractError(f"site {site!r}: expected {expected}; found {found}. {cure[:1].upper()}{cure[1:]}.")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Restores the random state afterwards, so that looking at a pair does not change what it draws next."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


def inspect(model: Pair, guide: Pair, batch: Tensor | Sequence[Any], weights: bool = True) -> Structure:
    """Runs the pair once on a batch, checks the contract, and says how its particles can be laid out.

    With `weights=False` a pair that can be trained and has no importance weights (a point mass as guide, a scaled
    model) is described and not refused: `refusal` says why.

    Raises:
        ContractError: naming the site, what was expected, what was found and the usual cure.
    """
    batch = as_batch(batch)
    with undisturbed(), eval_mode(model, guide), torch.enable_grad():
        structure = _single(model, guide, batch)
        if weights and structure.refusal:
            raise ContractError(structure.refusal)
        with torch.no_grad():
            return replace(structure, layout=_layout(model, guide, batch, structure))


def _single(model: Pair, guide: Pair, batch: tuple[Any, ...]) -> Structure:
    registration = Registration(create=True)
    sizes = ", ".join(str(list(t.shape)) if isinstance(t, Tensor) else type(t).__name__ for t in batch)
    try:
        with registration:
            model_trace, guide_trace = traces(model, guide, batch, Structure(), {})
    except ContractError:
        raise
    except Exception as error:
        raise _explained(error, sizes) from error
    model_nodes, guide_nodes = dict(sample_nodes(model_trace)), dict(sample_nodes(guide_trace))
    plate, subsample = _data_plate(model_nodes, model_trace, batch)
    model_roles, guide_roles = _roles(model_nodes, guide_nodes)
    _check_families(model_nodes, guide_nodes)
    for nodes, roles in ((guide_nodes, guide_roles), (model_nodes, model_roles)):
        for name, node in nodes.items():
            _check_shape(name, node)
            if roles[name] == "observed":
                check_support(name, node)
    shared = [
        name for name, role in model_roles.items()
        if role in ("latent", "enumerated") and plate.name not in _frames(model_nodes[name])
    ]  # fmt: skip
    lower, refusal = False, ""
    try:
        for name, node in (*guide_nodes.items(), *model_nodes.items()):
            _check_scale(name, node, plate)
        lower = _check_continuity(model_nodes, guide_nodes, model_roles, guide_roles)
    except ContractError as error:
        refusal = str(error)
    _check_registered(model, guide, registration.params, model_nodes, guide_nodes, batch)
    frames = [f for node in (*model_nodes.values(), *guide_nodes.values()) for f in node["cond_indep_stack"]]
    full = int(plate.full_size or plate.size)
    observed = {n: node for n, node in model_nodes.items() if model_roles[n] == "observed"}
    structure = Structure(
        plate=plate.name,
        nesting=max(-f.dim for f in frames if f.dim is not None),
        scale=full / plate.size,
        full_size=full,
        indexes=subsample,
        subsample_size=plate.size if subsample else 0,
        fixed_size=full != plate.size,
        joint=bool(shared),
        lower_bound_only=lower,
        score_only=tuple(
            n
            for n, node in guide_nodes.items()
            if guide_roles[n] != "enumerated" and not getattr(node["fn"], "has_rsample", False)
        ),
        refusal=refusal,
        enumerated=tuple(
            n for n in {**guide_roles, **model_roles} if "enumerated" in (guide_roles.get(n), model_roles.get(n))
        ),
        model_roles=model_roles,
        guide_roles=guide_roles,
        event_dims={n: event_dim(node) for n, node in {**guide_nodes, **model_nodes}.items()},
        observed_dims=sum(_event_size(node) for node in observed.values()),
        observed_support=_support_kind(observed.values()),
        unmasked=tuple(n for n, node in observed.items() if _mask(node) is None),
        model_params=params_of(model_trace),
        guide_params=params_of(guide_trace),
    )
    words = tuple(_words(structure, model_nodes, guide_nodes, shared))
    return replace(structure, words=words)


def _explained(error: Exception, sizes: str) -> ContractError:
    text = " ".join(str(error).split())[:300]
    if "must be sampled in trace" in text:
        name = text.removeprefix("site ").split(" must")[0]
        return refuse(name, "a guide that samples latents only", "a site with obs=", "move the observation to the model")
    if "plate" in text and ("hape mismatch" in text or "invalid shape" in text):
        return ContractError(
            f"{text}. Expected one rightmost plate over the batch {sizes}; declare the dims of one event with "
            f".to_event(n), and size the plate by the batch, as in pyro.plate('data', len(x))"
        )
    return ContractError(
        f"the pair could not run on a batch of shape {sizes}: {type(error).__name__}: {text}. "
        f"Check that the networks fit the data and that model(*batch) and guide(*batch) take these arguments"
    )


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
            raise refuse(
                name,
                "a vectorised plate over the data, at dim -1",
                f"plates {sorted(_frames(node)) or 'none'}",
                "write `with pyro.plate('data', len(x)):` around the sites of one datum",
            )
        if plate is not None and plate.name != rightmost[0].name:
            raise refuse(
                name,
                f"the data plate {plate.name!r}",
                f"plate {rightmost[0].name!r} at dim -1",
                "put all observed sites into one plate over the data",
            )
        plate = rightmost[0]
    fn = trace.nodes[plate.name]["fn"] if plate.name in trace.nodes else None
    full = int(plate.full_size or plate.size)
    subsample = plate.size < full and full == count and getattr(fn, "subsample_size", None) is not None
    if plate.size != count and not subsample:
        raise ContractError(
            f"plate {plate.name!r}: expected the rightmost plate to go over the {count} data of the batch, found size "
            f"{plate.size}. Use pyro.plate('data', len(x)), and .to_event(n) or dims left of -1 for everything else"
        )
    return plate, subsample


def _roles(model: Mapping[str, Any], guide: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    def enumerated(node: dict[str, Any]) -> bool:
        return (node["infer"] or {}).get("enumerate") in ("parallel", "sequential")

    guide_roles: dict[str, str] = {}
    for name, node in guide.items():
        if node["is_observed"] and not (node["infer"] or {}).get("is_auxiliary"):
            raise refuse(
                name, "a guide that samples latents only", "a site with obs=",
                "move the observation to the model",
            )  # fmt: skip
        if name in model and not model[name]["is_observed"]:
            _check_same_plates(name, model[name], node)
            guide_roles[name] = "enumerated" if enumerated(node) else "latent"
        elif name in model:
            raise refuse(
                name, "a latent", "a site that the model observes and the guide samples",
                "remove it from the guide",
            )  # fmt: skip
        elif (node["infer"] or {}).get("is_auxiliary"):
            guide_roles[name] = "auxiliary"
        else:
            raise refuse(
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
            raise refuse(
                name, "a site of the same name in the guide",
                f"a latent ({type(_base(node['fn'])).__name__}) that the guide omits; it samples {sorted(guide)}",
                "sample it in the guide" + (
                    ", or mark it infer={'enumerate': 'parallel'} in the model to sum it out" if discrete else ""
                ),
            )  # fmt: skip
    return model_roles, guide_roles


def _check_same_plates(name: str, p: dict[str, Any], q: dict[str, Any]) -> None:
    ours, theirs = ({f.name for f in node["cond_indep_stack"] if f.dim is not None} for node in (p, q))
    if ours != theirs:
        raise refuse(
            name,
            f"the model's plates {sorted(ours) or 'none'} in the guide too",
            f"{sorted(theirs) or 'none'}",
            "open the same plates, by the same names, around a latent in model and guide",
        )
    for node in (p, q):
        if (node["infer"] or {}).get("num_samples"):
            raise refuse(
                name,
                "a latent that is sampled, or enumerated over its whole support",
                f"enumeration by num_samples={node['infer']['num_samples']}",
                "leave num_samples out",
            )


def _check_scale(name: str, node: dict[str, Any], plate: Any) -> None:
    expected = float(plate.full_size or plate.size) / plate.size if plate.name in _frames(node) else 1.0
    found = float(node["scale"])
    if abs(found - expected) > 1e-6 * expected:
        raise refuse(
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
        raise refuse(
            name,
            f"a value of shape {list(fn.batch_shape)} + event {list(fn.event_shape)} in its support",
            f"{list(node['value'].shape)}: {' '.join(str(error).split())[:160]}",
            "check that the data fit the network",
        ) from error
    for i, size in enumerate(reversed(shape), 1):
        if size > 1 and -i not in dims:
            raise refuse(
                name,
                "one log-density per datum, its other dims declared as an event",
                f"log-density of shape {list(shape)} with plates at dims {sorted(dims)}",
                f"add .to_event(n) to its {type(_base(node['fn'])).__name__}",
            )


def check_support(name: str, node: dict[str, Any], first_row: int = 0) -> None:
    """Raises DataError where an observed value lies outside its distribution's support, naming value and place."""
    fn, value = node["fn"], node["value"]
    support = getattr(fn, "support", None)
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is None or value is None or support in (constraints.real, constraints.real_vector):
        return
    try:
        inside = support.check(value)
    except (NotImplementedError, RuntimeError, ValueError):
        return
    if node["mask"] is not None and not isinstance(node["mask"], bool):
        mask = node["mask"]
        inside = inside | ~mask.reshape(*mask.shape, *(1,) * max(inside.dim() - mask.dim(), 0)).bool()
    if not bool(inside.all()):
        at = (~inside).nonzero()[0].tolist()
        where = f"row {at[0] + first_row}" + (f", position {at[1:]}" if len(at) > 1 else "")
        raise DataError(
            f"site {name!r}: {type(_base(fn)).__name__} takes values in {_support_words(support)}; found "
            f"{value[tuple(at)].flatten()[0].item():g} at {where}. {_cure(fn)}"
        )


def _support_words(support: Any) -> str:
    if support is constraints.boolean:
        return "{0, 1}"
    return str(support).removeprefix("<").removesuffix(">").lower()


def _cure(fn: Any) -> str:
    support = getattr(fn, "support", None)
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    cure = getattr(support, "cure", None)  # a support of the library's own says what to do
    if isinstance(cure, str):
        return cure
    if support is constraints.boolean:
        return (
            "Load with binarize='fixed' or 'dynamic', or use a likelihood for grey values: of ppvae.likelihoods, "
            "ContinuousBernoulli, Beta, DiscretizedLogistic, Categorical or Normal"
        )
    holds = "Choose a likelihood whose support holds the data: of ppvae.likelihoods, "
    if support is constraints.nonnegative_integer:
        return f"{holds}Normal, Laplace and StudentT take negative and fractional numbers"
    if isinstance(support, constraints.interval):
        return f"{holds}Normal, Laplace and StudentT take any real number; or scale the data into it"
    return "Choose a likelihood whose support holds the data"


def _base(fn: Any) -> Any:
    while isinstance(fn, torch.distributions.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    return fn


def _mask(node: dict[str, Any]) -> Any:
    fn, mask = node["fn"], node["mask"]
    while isinstance(fn, torch.distributions.Independent | dist.MaskedDistribution):
        if isinstance(fn, dist.MaskedDistribution):
            mask = fn._mask if mask is None else mask & fn._mask
        fn = fn.base_dist
    return mask


def _check_continuity(
    model: Mapping[str, Any], guide: Mapping[str, Any], model_roles: Mapping[str, str], guide_roles: Mapping[str, str]
) -> bool:
    """Refuses a guide that is not absolutely continuous with its prior; True where it gives a lower bound only."""
    lower = False
    points: dict[str, int] = {}
    for name, role in guide_roles.items():
        if role == "auxiliary":
            continue
        p, q = model[name], guide[name]
        if not _same_mask(_mask(p), _mask(q)):
            raise refuse(
                name, "the same mask in model and guide", "a mask that differs between the two",
                "mask both sides of a latent alike",
            )  # fmt: skip
        prior, posterior = _base(p["fn"]), _base(q["fn"])
        discrete = getattr(p["fn"], "has_enumerate_support", False) or _is_discrete(prior)
        if isinstance(posterior, dist.Delta):
            if discrete:
                lower = True
            elif isinstance(prior, dist.Delta):
                continue
            else:
                points[name] = _event_size(q)
        elif not discrete:
            _check_support_covers(name, p, q)
    helpers = {n: _event_size(guide[n]) for n, role in guide_roles.items() if role == "auxiliary"}
    if sum(points.values()) != sum(helpers.values()) and (points or helpers):
        if points:
            name = next(iter(points))
            raise refuse(
                name, f"a guide absolutely continuous with its prior {type(_base(model[name]['fn'])).__name__}",
                "a Delta (point mass), under which importance weights look perfect and are wrong",
                "use a guide with a density to estimate log p(x); Delta can still be trained (MAP)",
            )  # fmt: skip
        name = next(iter(helpers))
        raise refuse(
            name, "a helper that a Delta site turns into a latent, dim for dim",
            f"{helpers[name]} dims per datum that the model has no density for",
            "give the latent a density of its own in the guide",
        )  # fmt: skip
    return lower


def _is_discrete(fn: Any) -> bool:
    try:
        return bool(fn.support.is_discrete)
    except (NotImplementedError, AttributeError):
        return False


def _support_kind(nodes: Iterable[dict[str, Any]]) -> str:
    fns = [_base(node["fn"]) for node in nodes]
    if all(isinstance(fn, torch.distributions.Bernoulli) for fn in fns):
        return "boolean"
    return "discrete" if all(_is_discrete(fn) for fn in fns) else "continuous"


def _event_size(node: dict[str, Any]) -> int:
    plates = {f.dim: f.size for f in node["cond_indep_stack"] if f.dim is not None and f.dim != -1}
    inner = 1
    for size in plates.values():
        inner *= size
    return getattr(node["fn"], "event_shape", torch.Size()).numel() * inner


def _check_families(model: Mapping[str, Any], guide: Mapping[str, Any]) -> None:
    """Refuses a continuous guide of a discrete latent, and the other way round."""
    for name, q in guide.items():
        if name not in model or isinstance(_base(q["fn"]), dist.Delta):
            continue
        prior, posterior = _base(model[name]["fn"]), _base(q["fn"])
        if _is_discrete(prior) != _is_discrete(posterior):
            kind = "discrete" if _is_discrete(prior) else "continuous"
            raise refuse(
                name,
                f"a {kind} guide, as its prior {type(prior).__name__} is",
                type(posterior).__name__,
                "choose a guide that is absolutely continuous with the prior",
            )


def _same_mask(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        a, b = torch.broadcast_tensors(a, b)
        return bool((a == b).all())
    return (a is None or a is True) == (b is None or b is True) and isinstance(a, Tensor) == isinstance(b, Tensor)


def _check_support_covers(name: str, p: dict[str, Any], q: dict[str, Any]) -> None:
    prior, posterior = p["fn"].support, q["fn"].support
    while isinstance(prior, constraints.independent):
        prior = prior.base_constraint
    while isinstance(posterior, constraints.independent):
        posterior = posterior.base_constraint
    if posterior in (constraints.real, constraints.real_vector):
        return
    if type(prior) is type(posterior) and not vars(prior):
        return
    inner, outer = _bounds(prior), _bounds(posterior)
    if inner is not None and outer is not None:
        if bool((outer[0] <= inner[0]).all()) and bool((inner[1] <= outer[1]).all()):
            return
    else:  # no interval: ask the guide about draws of the prior
        with torch.no_grad():
            draws = p["fn"].sample(torch.Size((64,)))
            if bool(q["fn"].support.check(draws).all()):
                return
    raise refuse(
        name,
        f"a guide whose support holds the prior's ({_support_words(prior)})",
        f"{type(_base(q['fn'])).__name__} on {_support_words(posterior)}",
        "choose a guide, or transform it, so that it reaches wherever the prior has mass",
    )


def _bounds(support: Any) -> tuple[Tensor, Tensor] | None:
    """Lower and upper end of an interval; None for a support that is none."""
    if support is constraints.real or support is constraints.real_vector:
        return torch.tensor(-torch.inf), torch.tensor(torch.inf)
    intervals = (
        constraints.interval, constraints.half_open_interval, constraints.greater_than, constraints.greater_than_eq,
        constraints.less_than,
    )  # fmt: skip
    if not isinstance(support, intervals):
        return None
    low, high = getattr(support, "lower_bound", -torch.inf), getattr(support, "upper_bound", torch.inf)
    return torch.as_tensor(low), torch.as_tensor(high)


def _check_registered(
    model: Pair,
    guide: Pair,
    registered: Mapping[str, Tensor],
    model_nodes: Mapping[str, Any],
    guide_nodes: Mapping[str, Any],
    batch: tuple[Any, ...],
) -> None:
    """Refuses a module that the pair uses and never registers: SVI would leave it untrained without a word."""
    known = {id(p) for p in registered.values()} | {id(t) for t in batch}
    roots = [
        node_log_prob(node).sum() for node in (*model_nodes.values(), *guide_nodes.values())
    ]  # fmt: skip
    stack = [r.grad_fn for r in roots if r.grad_fn is not None]
    seen = set(stack)
    while stack:
        fn = stack.pop()
        variable = getattr(fn, "variable", None)
        if variable is not None and id(variable) not in known:
            where = _named(variable, model, guide)
            raise ContractError(
                f"a parameter of shape {list(variable.shape)}{where}: expected every parameter that the pair uses to "
                f"be registered; found it in none of pyro.param, pyro.module. SVI would never train it: call "
                f"pyro.module('name', network) in the function that uses it"
            )
        for parent, _ in fn.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)


def _named(variable: Tensor, *functions: Callable[..., Any]) -> str:
    """Where a stray parameter lives, as far as closures and globals tell."""
    for function in functions:
        fn = unbound(function)
        code = getattr(fn, "__code__", None)
        if code is None:
            continue
        cells = dict(zip(code.co_freevars, (c.cell_contents for c in fn.__closure__ or ()), strict=False))
        places = cells | {n: fn.__globals__[n] for n in code.co_names if n in fn.__globals__}
        for place, thing in places.items():
            if isinstance(thing, nn.Module):
                for name, p in thing.named_parameters():
                    if p is variable:
                        return f" ({place}.{name})"
    return ""


def _layout(model: Pair, guide: Pair, batch: tuple[Any, ...], s: Structure) -> str:
    """ "vectorized" if the pair broadcasts over a particle plate, else "folded" into the batch, else "one by one".

    A layout counts only if it gives the densities that single particles give: some networks run on a particle dim
    and silently mean something else by it.
    """
    count = 3
    try:
        singles = terms(model, guide, batch, count, structure=replace(s, layout="one by one"))
    except ContractError:
        raise
    except Exception as error:
        shapes = ", ".join(str(list(t.shape)) for t in batch if isinstance(t, Tensor))
        raise _explained(error, shapes) from error
    index = {s.plate: singles_index(singles)} if s.indexes else {}
    values = {n: site.value for n, site in {**singles.model, **singles.guide}.items() if site.role in _DRAWN}
    values = {n: v for n, v in values.items() if n not in s.enumerated}
    reason = ""
    for layout in ("vectorized",) if s.joint or s.indexes else ("vectorized", "folded"):
        at = replace(s, layout=layout)
        try:
            same = terms(model, guide, batch, count, values={**values, **index}, structure=at)
            single = singles
            if s.indexes:  # a subsample is drawn at every run: take the same rows on both sides
                single = terms(
                    model, guide, batch, count, values={**values, **index}, structure=replace(s, layout="one by one")
                )
            if _agree(single, same):
                terms(model, guide, batch, count, structure=at)  # sampling, too, must run
                if layout != "vectorized":
                    log.warning("ppvae: the pair does not broadcast over particles (%s): folded into the batch", reason)
                return layout
            reason = "it gives other densities with a particle dim"
        except Exception as error:
            reason = reason or f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
    log.warning("ppvae: the pair does not broadcast over particles (%s): taken one by one", reason)
    return "one by one"


_DRAWN = ("latent", "auxiliary", "cancelled")


def singles_index(t: Terms) -> Tensor:
    """The first rows of the data, as many as the batch holds."""
    return torch.arange(t.batch_size)


def _agree(a: Terms, b: Terms) -> bool:
    for x, y in ((a.log_weight, b.log_weight), *_pairs(a, b)):
        if x.shape[-2:] != y.shape[-2:] and x.numel() != y.numel():
            return False
        exact = a.log_weight.new_tensor(1e-8 if _dtype(a) is torch.float64 else 1e-3)
        near = (x - y).abs() <= exact * (1 + x.abs())
        if not bool((near | (x == y) | (x.isnan() & y.isnan())).all()):
            return False
    return True


def _pairs(a: Terms, b: Terms) -> Iterator[tuple[Tensor, Tensor]]:
    if not a.contracted:
        for side in ("model", "guide"):
            for name, site in getattr(a, side).items():
                if site.role != "cancelled":
                    yield site.log_prob, getattr(b, side)[name].log_prob


def _dtype(t: Terms) -> torch.dtype:
    return next(iter(t.model.values())).log_prob.dtype


def _words(s: Structure, model: Mapping[str, Any], guide: Mapping[str, Any], shared: Sequence[str]) -> Iterator[str]:
    """The pair in words, a line each."""
    how = f"its own subsample of {s.subsample_size} rows" if s.indexes else "the batch"
    scale = f", scale {s.scale:g} (divided out of every weight)" if s.scale != 1 else ""
    yield f"data plate {s.plate!r} over {how}, full size {s.full_size}{scale}"
    for title, nodes, roles in (("model", model, s.model_roles), ("guide", guide, s.guide_roles)):
        for name, node in nodes.items():
            fn = node["fn"]
            plates = [f.name for f in node["cond_indep_stack"] if f.name != s.plate]
            facts = [f"{type(_base(fn)).__name__} over event {list(fn.event_shape)}"]
            if plates:
                facts.append(f"inner plates {plates}")
            if roles[name] in ("latent", "auxiliary") and title == "guide":
                facts.append("reparameterised" if getattr(fn, "has_rsample", False) else "not reparameterised")
            if roles[name] == "enumerated":
                facts.append("summed out exactly")
            if _mask(node) is not None:
                facts.append("masked")
            if name in shared:
                facts.append("shared by all data")
            yield f"{title} site {name!r}: {roles[name]}, {', '.join(facts)}"
    total = sum(p.numel() for p in {id(p): p for p in s.params.values()}.values())
    yield f"{len(s.params)} registered parameters, {total} numbers"
    if s.joint:
        yield "a latent is shared by all data: weights are joint, one for the whole data set and not one per datum"
    if s.refusal:
        yield f"can be trained; weights and log p(x) are refused: {s.refusal}"
    if s.lower_bound_only:
        yield "a point mass on a discrete latent: log p(x) estimates are lower bounds only"


def check(model: Pair, guide: Pair, batch: Tensor | Sequence[Any]) -> str:
    """Checks a pair against the contract on one batch and says in words what it is.

    The text names the sites with their shapes, plates, what is enumerated and what is reparameterised, and how
    particles are laid out.

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
    from ppvae.inference.scope import ambient

    model, guide = bound(model), bound(guide)
    with ambient(model, guide):
        s = inspect(model, guide, batch, weights=False)
    how = {
        "vectorized": "vectorised under a plate",
        "folded": "folded into the batch (the networks do not broadcast)",
        "one by one": "taken one by one (the networks do not broadcast)",
    }
    return "\n".join((*s.words, f"particles are {how[s.layout]}"))
