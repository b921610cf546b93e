"""The one place where log-densities are added up: per-site terms of a model/guide pair, [particles, batch]."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.distributions.util import scale_and_mask
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

if TYPE_CHECKING:
    from ppvae.inference.contract import Structure

PARTICLES = "_ppvae_particles"
Pair = Callable[..., Any]


@dataclass(frozen=True)
class Site:
    """One named site of the model or the guide, evaluated for every particle and datum.

    `log_prob` is [particles, batch] (`[particles, 1]` for a site outside the data plate), summed over the site's own
    event and inner plates; enumerated values stand in further dimensions on the left. `role` is "latent", "observed",
    "enumerated", "auxiliary" (a guide's helper that the model lacks) or "cancelled" (proposed from its own prior).
    """

    name: str
    role: str
    value: Tensor
    distribution: Any
    log_prob: Tensor
    traced: Tensor = field(repr=False)  # the value as the distribution takes it

    def per_event(self) -> Tensor:
        """Log-densities before the sum over the event: [..., *event] where the distribution is a product over it."""
        base, reinterpreted = self.distribution, 0
        while isinstance(base, torch.distributions.Independent):
            reinterpreted += base.reinterpreted_batch_ndims
            base = base.base_dist
        if not reinterpreted:
            raise ValueError(f"site {self.name!r}: {type(base).__name__} does not factorise over its event")
        return base.log_prob(self.traced)


@dataclass(frozen=True)
class Terms:
    """Log-densities of a pair on one batch, per site and summed; everything in nats.

    `log_lik`, `log_prior`, `log_guide` and `log_weight` are [particles, batch] in float64 and
    log_weight = log_lik + log_prior - log_guide, with enumerated sites summed out exactly. Where a latent is shared by
    all data, the weight is joint: [particles, 1].
    """

    model: dict[str, Site]
    guide: dict[str, Site]
    num_particles: int
    batch_size: int
    scale: float
    joint: bool
    contracted: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def _sum(self, sites: Iterable[Site], role: str) -> Tensor:
        total: Tensor | None = None
        for site in sites:
            if site.role == role:
                term = site.log_prob.double()
                if self.joint:
                    term = term.sum(-1, keepdim=True)
                total = term if total is None else total + term
        if total is None:
            some = next(iter(self.model.values())).log_prob
            return torch.zeros(self.num_particles, 1 if self.joint else self.batch_size, device=some.device).double()
        return total.expand(*total.shape[:-1], 1 if self.joint else self.batch_size)

    @property
    def log_lik(self) -> Tensor:
        """log p(x | z), [particles, batch]."""
        return self._sum(self.model.values(), "observed")

    @property
    def log_prior(self) -> Tensor:
        """log p(z), [particles, batch]."""
        return self._sum(self.model.values(), "latent") + self._sum(self.model.values(), "enumerated")

    @property
    def log_guide(self) -> Tensor:
        """log q(z | x), [particles, batch]."""
        return (
            self._sum(self.guide.values(), "latent")
            + self._sum(self.guide.values(), "auxiliary")
            + self._sum(self.guide.values(), "enumerated")
        )

    @property
    def log_weight(self) -> Tensor:
        """log p(x, z) - log q(z | x), [particles, batch], enumerated sites summed out."""
        return self.contracted[0] if self.contracted else self.log_lik + self.log_prior - self.log_guide

    @property
    def elbo(self) -> Tensor:
        """One sample of the evidence lower bound per particle and datum; E_q over sites enumerated in the guide."""
        return self.contracted[1] if self.contracted else self.log_weight


class Given(Messenger):
    """Sets latent sites (and a plate's subsample) to given values instead of sampling them."""

    def __init__(self, values: Mapping[str, Tensor]):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        value = self.values.get(msg["name"])
        if value is not None and not msg["is_observed"]:
            msg["value"], msg["done"] = value, True


class _Parallel(Messenger):
    """Enumerates at once what a guide asks to be enumerated one value after another."""

    def _pyro_sample(self, msg: Any) -> None:
        if (msg["infer"] or {}).get("enumerate") == "sequential":
            msg["infer"] = {**msg["infer"], "enumerate": "parallel"}


def sample_nodes(trace: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The sample sites of a trace, without plates and deterministic sites."""
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or isinstance(node["fn"], _Subsample):
            continue
        if not (node["infer"] or {}).get("_deterministic"):
            yield name, node


def event_dim(node: dict[str, Any]) -> int:
    """How many rightmost dims of a site's value are one event."""
    return len(getattr(node["fn"], "event_shape", ()))


def node_log_prob(node: dict[str, Any]) -> Tensor:
    """log-density of a traced site with its mask and without its scale; -inf outside the support."""
    if "ppvae_log_prob" in node:
        return node["ppvae_log_prob"]
    fn, value = node["fn"], node["value"]
    outside = None
    if not node["is_observed"] and isinstance(fn, TorchDistributionMixin) and not isinstance(fn, dist.Delta):
        outside = _outside(fn, value)
    if outside is None:
        log_prob = fn.log_prob(value, *node["args"], **node["kwargs"])
    else:  # a value the other side drew where this side has no mass is legal: its weight is zero
        validate, fn._validate_args = fn._validate_args, False
        try:
            log_prob = fn.log_prob(value, *node["args"], **node["kwargs"])
        finally:
            fn._validate_args = validate
        log_prob = torch.where(outside, torch.full_like(log_prob, -torch.inf), log_prob)
    return scale_and_mask(log_prob, 1.0, node["mask"])


def _outside(fn: Any, value: Tensor) -> Tensor | None:
    """Where a value lies outside the support; None where it lies nowhere outside or cannot."""
    support = fn.support
    base = getattr(support, "base_constraint", support)
    if base is torch.distributions.constraints.real or support is torch.distributions.constraints.real_vector:
        return None
    if fn.has_enumerate_support or getattr(base, "is_discrete", False):
        return None
    inside = support.check(value)
    return None if bool(inside.all()) else ~inside


@contextmanager
def constant(params: Iterable[Tensor]) -> Iterator[None]:
    """Holds parameters constant meanwhile: gradients pass through values, none reaches a parameter."""
    held = [p for p in params if p.requires_grad]
    for p in held:
        p.requires_grad_(False)
    try:
        with warnings.catch_warnings():  # pyro.module remarks on every parameter that takes no gradient
            warnings.filterwarnings("ignore", message=".*was not registered in the param store.*")
            yield
    finally:
        for p in held:
            p.requires_grad_(True)


def one_trace(
    fn: Pair,
    batch: Sequence[Any],
    s: Structure,
    values: Mapping[str, Tensor],
    replayed: Any = None,
    num_particles: int | None = None,
) -> Any:
    """The trace of one run of a model or guide, under a particle plate if `num_particles` says so."""
    with ExitStack() as stack:
        if num_particles is not None:
            stack.enter_context(pyro.plate(PARTICLES, num_particles, dim=-1 - s.nesting))
        tracer = stack.enter_context(poutine.trace())
        if replayed is not None:
            stack.enter_context(poutine.replay(trace=replayed))
        stack.enter_context(Given(values))
        if s.enumerated:  # innermost: it must see a site before a value is put there
            # the model's dims follow the guide's, so that a replayed value means the same on both sides
            first = None if replayed is not None else -1 - s.nesting - (num_particles is not None)
            stack.enter_context(poutine.enum(first_available_dim=first))
            stack.enter_context(_Parallel())
        fn(*batch)
        trace = tracer.get_trace()
    return trace


def traces(
    model: Pair,
    guide: Pair,
    batch: Sequence[Any],
    s: Structure,
    given: Mapping[str, Tensor],
    frozen: Sequence[str] = (),
    num_particles: int | None = None,
) -> tuple[Any, Any]:
    """(model trace, guide trace) of one run of the pair; the model is replayed on the guide's latents.

    `num_particles` is the size of the particle plate, or None for a run without one.
    """

    def run(fn: Pair, values: Mapping[str, Tensor], replayed: Any, held: Mapping[str, Tensor]) -> Any:
        with constant(held.values()):
            trace = one_trace(fn, batch, s, values, replayed, num_particles)
            for _, node in sample_nodes(trace) if held else ():  # some distributions ask their network only now
                node["ppvae_log_prob"] = node_log_prob(node)
            return trace

    guide_trace = run(guide, given, None, {})
    if "guide" in frozen:
        paths = {n: node["value"] for n, node in sample_nodes(guide_trace) if s.guide_roles.get(n) != "enumerated"}
        if s.indexes:
            paths[s.plate] = guide_trace.nodes[s.plate]["value"]
        guide_trace = run(guide, {**given, **paths}, None, s.guide_params)
    unseen = {name: value for name, value in given.items() if name not in guide_trace}
    model_trace = run(model, unseen, guide_trace, s.model_params if "model" in frozen else {})
    return model_trace, guide_trace


def params_of(trace: Any) -> dict[str, Tensor]:
    """The unconstrained parameter tensors that a trace met, by name."""
    found = {}
    for name, node in trace.nodes.items():
        if node["type"] == "param":
            value = node["value"]
            source = getattr(value, "_pyro_unconstrained_param", None)
            found[name] = source if source is not None else value.unconstrained()
    return found


def terms(
    model: Pair,
    guide: Pair,
    batch: Tensor | Sequence[Any],
    num_particles: int = 1,
    *,
    values: Mapping[str, Tensor] | None = None,
    frozen: Sequence[str] = (),
    structure: Structure | None = None,
    index: Tensor | None = None,
) -> Terms:
    """Traces guide and model on one batch under a particle plate and gives their log-densities per site.

    Args:
        batch: the tensors that the pair is called with, `model(*batch)`; a tensor is a batch of one.
        num_particles: K, the number of draws per datum.
        values: latents [particles, (inner plates,) batch, *event] to evaluate at, instead of the guide's draws.
        frozen: "guide" or "model": that side is run again with its parameters held constant, so that sampled values
            keep their gradient paths (sticking the landing: Roeder et al. 2017, arXiv 1703.09194).
        structure: what `inspect` found of this pair, to save finding it again.
        index: for a plate that draws its own subsample of the data: the rows to take, [batch].

    Raises:
        ContractError: the pair breaks the contract; the message names the site.

    >>> import torch
    >>> from ppvae.models import LinearGaussian
    >>> pair = LinearGaussian(3, 2)
    >>> t = terms(pair.model, pair.guide, torch.zeros(4, 3), num_particles=5)
    >>> t.log_weight.shape, sorted(t.model)
    (torch.Size([5, 4]), ['x', 'z'])
    """
    from ppvae.inference.contract import inspect

    batch = as_batch(batch)
    if num_particles < 1:
        raise ValueError(f"num_particles: expected at least 1, found {num_particles}")
    structure = structure or inspect(model, guide, batch)
    given = dict(values or {})
    size = structure.size_of(batch) if index is None else len(index)
    if index is not None:
        given[structure.plate] = index
    if structure.layout == "vectorized":
        given = {name: _with_plates(value, structure, name) for name, value in given.items()}
        pair = traces(model, guide, batch, structure, given, frozen, num_particles)
        return _assemble(*pair, structure, num_particles, size, lambda t: t)
    if structure.layout == "folded":
        folded = [_fold_data(t, num_particles, size) for t in batch]
        given = {name: _fold(value, structure, name) for name, value in given.items()}
        pair = traces(model, guide, folded, structure, given, frozen)
        return _assemble(*pair, structure, num_particles, size, lambda t: _unfold(t, num_particles, size))
    parts = []
    for k in range(num_particles):
        one = {n: v if n == structure.plate else v.select(particle_dim(v, structure, n), k) for n, v in given.items()}
        pair = traces(model, guide, batch, structure, one, frozen)
        parts.append(_assemble(*pair, structure, 1, size, lambda t: t.unsqueeze(-2)))
    return _stacked(parts, structure)


def as_batch(batch: Tensor | Sequence[Any]) -> tuple[Any, ...]:
    """A batch as the tuple of arguments that the pair is called with."""
    return tuple(batch) if isinstance(batch, list | tuple) else (batch,)


def _fold_data(value: Any, num_particles: int, size: int) -> Any:
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == size:
        return value.expand(num_particles, *value.shape).reshape(num_particles * size, *value.shape[1:])
    return value


def particle_dim(value: Tensor, s: Structure, name: str) -> int:
    """Where the particles stand in a latent's value: leftmost, but for dims of sites enumerated in the guide."""
    return max(value.dim() - s.event_dims[name] - s.nesting - 1, 0)


def _enumerated_dims(value: Tensor, s: Structure, name: str) -> int:
    """How many dims on the left of a single particle's value belong to sites enumerated in the guide."""
    return max(value.dim() - s.event_dims[name] - s.nesting, 0)


def _unfold_value(value: Tensor, s: Structure, name: str, num_particles: int, size: int) -> Tensor:
    """[..., *inner, particles * batch, *event] -> [..., particles, *inner, batch, *event]."""
    data = value.dim() - s.event_dims[name] - 1
    split = value.reshape(*value.shape[:data], num_particles, size, *value.shape[data + 1 :])
    return split.movedim(data, _enumerated_dims(value, s, name))


def _fold(value: Tensor, s: Structure, name: str) -> Tensor:
    """[..., particles, *inner, batch, *event] -> [..., *inner, particles * batch, *event]."""
    if name == s.plate:
        return value
    data = value.dim() - s.event_dims[name] - 1
    moved = value.movedim(particle_dim(value, s, name), data - 1)
    return moved.reshape(*moved.shape[: data - 1], -1, *moved.shape[data + 1 :])


def _with_plates(value: Tensor, s: Structure, name: str) -> Tensor:
    """[particles, *some plates, *event] -> the same with every plate dim present, so that particles stay leftmost."""
    if name == s.plate:
        return value
    missing = s.nesting + 1 - (value.dim() - s.event_dims[name])
    return value.reshape(value.shape[0], *(1,) * missing, *value.shape[1:]) if missing > 0 else value


def _unfold(log_prob: Tensor, num_particles: int, size: int) -> Tensor:
    """[..., particles * batch] -> [..., particles, batch]; a shared site's last dim has size one."""
    if log_prob.shape[-1] == num_particles * size:
        return log_prob.reshape(*log_prob.shape[:-1], num_particles, size)
    return log_prob.unsqueeze(-2)


def _reduced(log_prob: Tensor, nesting: int) -> Tensor:
    """Sums over inner plates: dims -nesting .. -2; keeps the data dim and everything left of the plates."""
    while log_prob.dim() < nesting:
        log_prob = log_prob.unsqueeze(0)
    if nesting > 1:
        log_prob = log_prob.sum(tuple(range(-nesting, -1)))
    return log_prob


def _assemble(
    model_trace: Any,
    guide_trace: Any,
    s: Structure,
    num_particles: int,
    size: int,
    unfold: Callable[[Tensor], Tensor],
) -> Terms:
    vectorized = s.layout == "vectorized"
    raw: dict[str, Tensor] = {}

    def site(trace: str, name: str, node: dict[str, Any], role: str) -> Site:
        log_prob = raw[f"{trace}:{name}"] = node_log_prob(node)
        reduced = _reduced(log_prob, s.nesting)
        if vectorized:
            reduced = reduced.unsqueeze(0) if reduced.dim() == 1 else reduced
        else:
            reduced = unfold(reduced)
        if reduced.shape[-2] != num_particles:
            reduced = reduced.expand(*reduced.shape[:-2], num_particles, reduced.shape[-1])
        value = node["value"]
        if s.layout == "folded" and role == "observed":
            value = value[:size] if value.shape[:1] == (num_particles * size,) else value
        elif s.layout == "folded" and value.shape[value.dim() - s.event_dims[name] - 1 :][:1] == (num_particles * size,):
            value = _unfold_value(value, s, name, num_particles, size)
        return Site(name, role, value, node["fn"], reduced, node["value"])

    model_sites = {n: site("model", n, node, s.model_roles[n]) for n, node in sample_nodes(model_trace)}
    guide_sites = {n: site("guide", n, node, s.guide_roles[n]) for n, node in sample_nodes(guide_trace)}
    contracted = None
    if s.enumerated:
        contracted = _contract(model_trace, guide_trace, raw, s, num_particles, size, unfold)
    return Terms(model_sites, guide_sites, num_particles, size, s.scale, s.joint, contracted)


def _over_plates(log_prob: Tensor, node: dict[str, Any]) -> Tensor:
    """The log-density with every plate of its site in its shape: in a contraction the dims tell the plates."""
    shape = list(log_prob.shape)
    for frame in node["cond_indep_stack"]:
        if frame.dim is not None:
            shape = [1] * (-frame.dim - len(shape)) + shape
            shape[frame.dim] = frame.size
    return log_prob.expand(shape)


def _contract(
    model_trace: Any,
    guide_trace: Any,
    raw: dict[str, Tensor],
    s: Structure,
    num_particles: int,
    size: int,
    unfold: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Sums enumerated sites out of the weights exactly: (log_weight, elbo), [particles, batch].

    log w_k = log sum_y p(x, y, z_ky) / q(z_ky | x, y), and for sites enumerated in the guide
    elbo_k = sum_y q(y | x) [log p(x, y, z_ky) - log q(y | x) - log q(z_ky | x, y)].
    """
    for key, log_prob in raw.items():
        side, name = key.split(":", 1)
        node = (model_trace if side == "model" else guide_trace).nodes[name]
        node["log_prob"] = node["unscaled_log_prob"] = _over_plates(log_prob.double(), node)
    guide_trace.pack_tensors()
    model_trace.pack_tensors(guide_trace.plate_to_symbol)

    def packed(trace: Any, roles: Mapping[str, str], wanted: Sequence[str]) -> list[Tensor]:
        return [node["packed"]["log_prob"] for n, node in sample_nodes(trace) if roles[n] in wanted]

    def negative(tensor: Tensor) -> Tensor:
        out = -tensor
        out._pyro_dims = tensor._pyro_dims  # type: ignore[attr-defined]
        return out

    factors = packed(model_trace, s.model_roles, ("latent", "observed", "enumerated"))
    factors += [negative(t) for t in packed(guide_trace, s.guide_roles, ("latent", "auxiliary"))]
    log_q = packed(guide_trace, s.guide_roles, ("enumerated",))
    symbols = model_trace.plate_to_symbol
    kept = "".join(symbols[p] for p in ((PARTICLES,) if s.joint else (PARTICLES, s.plate)) if p in symbols)

    def reduce(tensors: list[Tensor], output: str) -> Tensor:
        """log sum over enumerated dims of the product over plates, of all dims but those of `output`."""
        plates = frozenset(symbols.values()) | frozenset(output)
        tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
        sizes: dict[str, int] = {}
        for t in tensors:
            dims = t._pyro_dims  # type: ignore[attr-defined]
            t = t[...]  # the contraction tells tensors apart by identity
            t._pyro_dims = dims  # type: ignore[attr-defined]
            tree.setdefault(plates.intersection(dims), []).append(t)
            sizes.update(zip(dims, t.shape, strict=True))
        present = frozenset(c for c in output if c in sizes)
        return contract_to_tensor(tree, set(sizes) - plates, present, ring=LogRing(dim_to_size=sizes))

    def with_dims(tensor: Tensor, sizes: Mapping[str, int]) -> Tensor:
        dims = tensor._pyro_dims  # type: ignore[attr-defined]
        new = [c for c in sizes if c not in dims]
        out = tensor.expand(*(sizes[c] for c in new), *tensor.shape)
        out._pyro_dims = "".join(new) + dims  # type: ignore[attr-defined]
        return out

    def arranged(tensor: Tensor, output: str) -> Tensor:
        """A packed tensor with exactly the dims of `output`, in order, absent ones of size one."""
        dims = tensor._pyro_dims  # type: ignore[attr-defined]
        shape = [tensor.shape[dims.index(c)] if c in dims else 1 for c in output]
        return tensor.permute([dims.index(c) for c in output if c in dims]).reshape(shape)

    def per_datum(tensor: Tensor) -> Tensor:
        """[particles, batch] from dims `kept`."""
        tensor = tensor.reshape(tensor.shape[0], -1) if s.layout == "vectorized" else unfold(tensor.reshape(-1))
        return tensor.expand(num_particles, 1 if s.joint else size)

    log_weight = per_datum(arranged(reduce(factors, kept), kept))
    if not log_q:
        return log_weight, log_weight
    enum = "".join(sorted({c for t in log_q for c in t._pyro_dims} - set(symbols.values())))  # type: ignore[attr-defined]
    order = enum + kept
    # given y, whatever the model enumerates is summed out for each y by itself: every factor must show its y
    sizes = {c: n for t in log_q for c, n in zip(t._pyro_dims, t.shape, strict=True) if c in enum}  # type: ignore[attr-defined]
    log_w = arranged(reduce([with_dims(t, sizes) for t in (*factors, *map(negative, log_q))], order), order)
    probability = arranged(reduce(log_q, order), order).exp()
    value = torch.where(probability > 0, probability * log_w, torch.zeros_like(log_w))
    return log_weight, per_datum(value.sum(tuple(range(len(enum)))))


def _stacked(parts: list[Terms], s: Structure) -> Terms:
    """Terms of single particles as the terms of all of them."""
    first = parts[0]

    def join(side: str) -> dict[str, Site]:
        out = {}
        for name, site in getattr(first, side).items():
            own = [getattr(p, side)[name] for p in parts]
            log_prob = torch.cat([o.log_prob for o in own], dim=-2)
            value = site.value
            if site.role != "observed":
                value = torch.stack([o.value for o in own], _enumerated_dims(value, s, name))
            out[name] = Site(name, site.role, value, site.distribution, log_prob, site.traced)
        return out

    contracted = None
    if first.contracted:
        both = [p.contracted for p in parts if p.contracted]
        contracted = (torch.cat([c[0] for c in both]), torch.cat([c[1] for c in both]))
    return Terms(
        join("model"), join("guide"), len(parts), first.batch_size, first.scale, first.joint, contracted
    )  # fmt: skip


def draw(
    guide: Pair,
    batch: tuple[Any, ...],
    num_particles: int,
    *,
    structure: Structure,
    index: Tensor | None = None,
) -> dict[str, Tensor]:
    """The guide's draws alone, {site: value}, as `terms(..., values=...)` takes them."""
    s = structure
    given = {} if index is None else {s.plate: index}
    size = s.size_of(batch) if index is None else len(index)

    def sampled(rows: Sequence[Any], particles: int | None) -> dict[str, Tensor]:
        trace = one_trace(guide, rows, s, given, num_particles=particles)
        return {n: node["value"] for n, node in sample_nodes(trace) if n not in s.enumerated}

    if s.layout == "vectorized":
        return sampled(batch, num_particles)
    if s.layout == "folded":
        values = sampled([_fold_data(t, num_particles, size) for t in batch], None)
        return {n: _unfold_value(v, s, n, num_particles, size) for n, v in values.items()}
    singles = [sampled(batch, None) for _ in range(num_particles)]
    return {n: torch.stack([one[n] for one in singles], _enumerated_dims(v, s, n)) for n, v in singles[0].items()}


def amortised(guide: Pair, batch: tuple[Any, ...], s: Structure, index: Tensor | None = None) -> Pair:
    """The guide with its network already run on this batch, where one latent is all that it samples.

    A guide of several latents may feed one into the next, and is returned as it is.
    """
    if s.layout != "vectorized" or s.enumerated or s.joint or len(s.guide_roles) != 1:
        return guide
    trace = one_trace(guide, batch, s, {} if index is None else {s.plate: index})
    name, node = next(sample_nodes(trace))
    if node["mask"] is not None:
        return guide
    frames = [f for f in node["cond_indep_stack"] if f.dim is not None]

    def cached(*_: Any) -> Tensor:
        with ExitStack() as stack:
            for f in frames:
                rows = trace.nodes[f.name]["value"] if f.name in trace.nodes else None
                stack.enter_context(pyro.plate(f.name, int(f.full_size or f.size), subsample=rows, dim=f.dim))
            return pyro.sample(name, node["fn"])

    return cached


def simulate(
    model: Pair, batch: Tensor | Sequence[Any], values: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Draws every latent and every observed site from the model: {site: value [batch, *event]}.

    The batch gives the shape and whatever the model is conditioned on; its observed values are not used.
    `values` holds some latents fixed.

    >>> import torch
    >>> from ppvae.models import LinearGaussian
    >>> sorted(simulate(LinearGaussian(3, 2).model, torch.zeros(4, 3)).items())[0][1].shape
    torch.Size([4, 3])
    """
    with poutine.trace() as tracer, poutine.uncondition(), Given(values or {}):
        model(*as_batch(batch))
    return {name: node["value"] for name, node in sample_nodes(tracer.get_trace())}
