"""A pair in words: what `check` returns of its sites and the modules that it calls, and the caveats that `fit` logs."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from ppvae.errors import count_of, support_name
from ppvae.inference.contract.plates_and_roles import global_latents
from ppvae.inference.contract.support import base_distribution, base_support, is_reparameterized, mask_of, same_mask
from ppvae.inference.evaluation_mode import eval_mode
from ppvae.inference.param_store import unwrap
from ppvae.inference.structure import ParticlePlacement, Role, Structure
from ppvae.inference.tracing import Program, support_of, trace_pair
from ppvae.rng import fork_rng

FAR = 10.0  # medians of standardised data, and their distances in standard deviations, are below it
_LAYOUTS = {
    ParticlePlacement.VECTORIZED: "vectorised under a plate",
    ParticlePlacement.FOLDED: "folded into the batch (the networks do not broadcast)",
    ParticlePlacement.ONE_BY_ONE: "taken one by one (the networks do not broadcast)",
}


def describe_structure(s: Structure, model: Mapping[str, Any], guide: Mapping[str, Any]) -> Iterator[str]:
    """Lines on the data plate, each site, the parameters, and what is refused or only bounded."""
    rows = f"its own subsample of {s.subsample_size} rows" if s.draws_subsample else "the batch"
    scale = f", scale {s.scale:g} (divided out of every weight)" if s.scale != 1 else ""
    if s.common_scale != 1:
        scale += f"; every site under one scale of {s.common_scale:g} (divided out of weights and of reported losses)"
    yield f"data plate {s.plate!r} over {rows}, full size {s.full_size}{scale}"
    shared = global_latents(model, s.model_roles, s.plate)
    for side, nodes, roles in (("model", model, s.model_roles), ("guide", guide, s.guide_roles)):
        for name, node in nodes.items():
            facts = [*_site_facts(node, roles[name], s.plate, side == "guide")]
            facts += ["shared by all data"] if name in shared else []
            yield f"{side} site {name!r}: {roles[name]}, {', '.join(facts)}"
    total = sum(p.numel() for p in {id(p): p for p in s.params.values()}.values())
    yield f"{count_of(len(s.params), 'registered parameter', 'registered parameters')}, {count_of(total, 'number')}"
    if s.has_global_latents:
        yield "a latent is shared by all data: weights are joint, one for the whole data set and not one per datum"
        yield from _describe_local_weights(s)
    if s.weights_refusal:
        yield f"can be trained; weights and log p(x) are refused: {s.weights_refusal}"
    if s.lower_bound_only:
        yield "a point mass on a discrete latent: log p(x) estimates are lower bounds only"
    yield from s.remarks


def _describe_local_weights(s: Structure) -> Iterator[str]:
    """Lines on what follows from global latents for mini-batches and for log p(x) of single data."""
    if s.local_refusal:
        yield (
            "given the global latents no datum has a log-weight of its own, bounds want all data in a batch, and "
            f"no datum has a log p(x): {s.local_refusal}"
        )
        return
    yield (
        "given the global latents each datum has a log-weight of its own: log_marginal(..., conditional=True) and loo "
        "give numbers per datum, log_marginal(..., local_particles=K) integrates local latents inside"
    )
    if s.globals_read_rows:
        yield "the density of a global latent depends on the rows of a batch: bounds want all data in a batch"


def _site_facts(node: dict[str, Any], role: Role, data_plate: str, guide: bool) -> Iterator[str]:
    fn = node["fn"]
    if role is Role.FACTOR:
        yield "a term of the loss alone, left out of weights" if guide else "no density: counted, not normalised"
        return
    yield f"{type(base_distribution(fn)).__name__} over event {list(fn.event_shape)}"
    if plates := [f.name for f in node["cond_indep_stack"] if f.name != data_plate]:
        yield f"inner plates {plates}"
    if guide and role in (Role.LATENT, Role.AUXILIARY):
        yield "reparameterised" if is_reparameterized(fn) else "not reparameterised"
    if role is Role.ENUMERATED:
        yield "summed out exactly"
    if mask_of(node) is not None:
        yield "masked"


def describe_layout(s: Structure) -> str:
    """A line on how the pair takes several particles."""
    return f"particles are {_LAYOUTS[s.layout]}"


def mask_caveats(model: Mapping[str, Any], latents: Mapping[str, Any]) -> Iterator[str]:
    """Latents that one side masks alone: the other side's density counts in the loss, which is then no bound."""
    for name, q in latents.items():
        if name in model and not same_mask(mask_of(model[name]), mask_of(q)):
            cure = "mask both sides of a latent alike"
            if name.endswith("_unobserved"):
                cure = "obs_mask masks it in the model where it is observed: put it under poutine.mask(mask=~obs_mask)"
            yield f"site {name!r}: model and guide mask it differently: the loss is no bound on log p(x); {cure}"


def unstandardized_caveats(model: Mapping[str, Any]) -> Iterator[str]:
    """Observed columns of real numbers that are large, and many standard deviations from where the model starts."""
    for name, node in model.items():
        if not node["is_observed"]:
            continue
        fn, value, mask = base_distribution(node["fn"]), node["value"], mask_of(node)
        support = base_support(support_of(fn))
        try:
            real = torch.as_tensor(support.check(torch.full_like(value, -0.5)))
            distance = ((value - fn.mean).abs() / fn.variance.sqrt()).detach()
        except (NotImplementedError, AttributeError, ValueError, RuntimeError):
            continue  # without moments, or a support of no numbers
        if real.shape != value.shape or distance.shape != value.shape:
            continue  # a support of vectors, a value for many distributions
        known = real if mask is None else real & mask
        event = (-1, max(1, node["fn"].event_shape.numel()))
        far, size = (torch.where(known, v, torch.nan).reshape(event).nanmedian(0).values for v in (distance, value))
        found = ((far > FAR) & (size.abs() > FAR)).nonzero()[:, 0].tolist()
        if found:
            worst = max(found, key=lambda d: float(far[d]))
            cure = "standardise the data, (x - x.mean(0)) / x.std(0)"
            if hasattr(support, "cseq"):  # of a table
                cure = "take ppvae.models.table_vae (by the command line ppvae.models:table_vae), which does it itself"
            yield (
                f"site {name!r}: the data of {count_of(len(found), 'column')} are not standardised, such as column "
                f"{worst}, whose median of {float(size[worst]):.4g} is {float(far[worst]):.4g} standard deviations "
                f"from where the model starts: training is slow, and may end at a far worse log p(x); {cure}"
            )


def global_latent_caveat(s: Structure, num_data: int, batch_size: int) -> str:
    """A latent that all data share, beside a plate of another size than the data, as the batch's; empty for none."""
    if not s.has_global_latents or s.draws_subsample or num_data <= batch_size or s.full_size == num_data:
        return ""
    return (
        f"a latent is shared by all data, and the plate {s.plate!r} has size {s.full_size} where there are {num_data} "
        f"data: in each batch the latent's KL counts as if there were {s.full_size}, and its posterior is as wide. "
        f"Write pyro.plate({s.plate!r}, {num_data}, subsample=x) in model and guide, or set batch_size={num_data}"
    )


def describe_modules(
    model: Program, guide: Program, batch: tuple[Any, ...], params: Mapping[str, Tensor]
) -> Iterator[str]:
    """A line per outermost module that the pair calls: the parts of a `VAE`, the networks of a plain pair.

    A line names the part or registered name, the class, the space of the distribution that it returns, the number of
    its parameters, and the first sentence of its docstring.
    """
    parts = _part_names(model, guide)
    calls = _outermost_calls(model, guide, batch)
    inner = {id(m) for module, _ in calls for m in module.modules() if m is not module} - {id(m) for m in parts}
    order = {id(m): i for i, m in enumerate(parts)}
    for module, result in sorted(calls, key=lambda call: order.get(id(call[0]), len(order))):
        if id(module) in inner:
            continue
        facts = [count_of(sum(p.numel() for p in module.parameters()), "parameter")]
        if isinstance(result, torch.distributions.Distribution):
            facts.insert(0, f"a distribution over event {list(result.event_shape)}{_space(result)}")
        cls = type(module)
        name = parts.get(module) or _registered_name(module, params)
        yield f"{name}: {cls.__name__}, {', '.join(facts)}{_first_sentence(cls)}"


def _part_names(model: Program, guide: Program) -> dict[nn.Module, str]:
    """The child modules of the modules whose methods the model and the guide are, with their names."""
    owners = [getattr(unwrap(function), "__self__", None) for function in (model, guide)]
    return {m: name for owner in owners if isinstance(owner, nn.Module) for name, m in owner.named_children()}


def _outermost_calls(model: Program, guide: Program, batch: tuple[Any, ...]) -> list[tuple[nn.Module, Any]]:
    """(module, result) of the first call of each module that no other module calls."""
    calls: dict[int, tuple[nn.Module, Any]] = {}
    stack: list[nn.Module] = []

    def before(module: nn.Module, _: Any) -> None:
        stack.append(module)

    def after(module: nn.Module, _: Any, result: Any) -> None:
        stack.pop()
        if not stack:
            calls.setdefault(id(module), (module, result))

    hooks = nn.modules.module
    with (
        hooks.register_module_forward_pre_hook(before), hooks.register_module_forward_hook(after),
        fork_rng(), torch.no_grad(), eval_mode(model, guide), pyro.validation_enabled(False),
    ):  # fmt: skip
        trace_pair(model, guide, batch, Structure(), {})
    return list(calls.values())


def _space(fn: Any) -> str:
    """The support of a distribution, as " in ..."; empty where it has none."""
    support = support_of(fn)
    return "" if support is None else f" in {support_name(base_support(support))}"


def _registered_name(module: nn.Module, params: Mapping[str, Tensor]) -> str:
    """The name under which a module, or the one that contains it, is registered; "module" where there is none."""
    names = {id(p): name for name, p in module.named_parameters()}
    for full, p in params.items():
        if id(p) in names and "$$$" in full:
            name = full.removesuffix(names[id(p)]).replace("$$$", ".").strip(".")
            return re.sub(r"#[0-9]+", "", name)
    return "module"


def _first_sentence(cls: type) -> str:
    """The first sentence of a class's own docstring, as ". ..."; empty where it has none."""
    text = re.sub(r":\w+:`([^`]*)`", r"\1", " ".join((cls.__dict__.get("__doc__") or "").split()))
    text = re.sub(r"^__init__\([^)]*\) *", "", text)  # torch's recurrent networks begin with their signature
    return f". {re.split(r'(?<=[^. ][.]) ', text)[0]}" if text else ""
