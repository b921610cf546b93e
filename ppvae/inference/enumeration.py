"""Enumerated sites summed out of the weights exactly, by tensor variable elimination (Obermeyer et al. 2019).

Source: arXiv 1902.03210, as in Pyro's `TraceEnum_ELBO`. Packed tensors carry a string `_pyro_dims` of one symbol per
dim, as in an einsum.
"""

from collections import OrderedDict
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from torch import Tensor

from ppvae.inference.contract.support import mask_of, without_masks
from ppvae.inference.particle_layout import ParticleLayout
from ppvae.inference.structure import ParticlePlacement, Role, Structure
from ppvae.inference.tracing import PARTICLES, event_dim, node_log_prob, sample_sites


def sum_out_enumerated(model_trace: Any, guide_trace: Any, layout: ParticleLayout) -> tuple[Tensor, Tensor]:
    """Sums enumerated sites out of the weights exactly: (log_weight, elbo), [particles, batch].

    log w_k = log sum_y p(x, y, z_ky) / q(z_ky | x, y), and for sites enumerated in the guide
    elbo_k = sum_y q(y | x) [log p(x, y, z_ky) - log q(y | x) - log q(z_ky | x, y)]; NaN where the guide enumerates
    inside an inner plate and the model has further enumerated sites of its own. Masks are those of `TraceEnum_ELBO`:
    where a mask removes an enumerated site, its values keep their probabilities, those of its own prior, or of the
    guide that enumerates it, under which its density ratio is one.

    With global latents both are of the sites inside the data plate, given the global latents; where one of these is
    enumerated, both are of all sites, [particles, 1].
    """
    s = layout.s
    joint = s.has_global_latents and any(name in s.global_sites for name in s.enumerated)
    outside = () if joint else s.global_sites  # given the global latents, a datum's sum is of the sites in its plate
    _attach_log_probs(guide_trace, s)
    _attach_log_probs(model_trace, s, guide_trace)
    guide_trace.pack_tensors()
    model_trace.pack_tensors(guide_trace.plate_to_symbol)
    wanted = (Role.LATENT, Role.OBSERVED, Role.ENUMERATED, Role.FACTOR)
    factors = _packed(model_trace, s.model_roles, wanted, outside)
    factors += [packed.neg(t) for t in _packed(guide_trace, s.guide_roles, (Role.LATENT, Role.AUXILIARY), outside)]
    log_q = _packed(guide_trace, s.guide_roles, (Role.ENUMERATED,), outside)
    symbols = model_trace.plate_to_symbol
    output_plates = (PARTICLES,) if joint else (PARTICLES, s.plate)
    output, plates = "".join(symbols[p] for p in output_plates if p in symbols), frozenset(symbols.values())

    width = 1 if joint else layout.size
    log_weight = _per_datum(_arrange(_log_sum_product(factors, output, plates), output), layout, width)
    if not log_q:
        return log_weight, log_weight
    ratios = [*factors, *map(packed.neg, log_q)]
    if not any(role is Role.ENUMERATED and name not in s.guide_roles for name, role in s.model_roles.items()):
        elbo: Any = sum(_expectation(factor, log_q, output, plates) for factor in ratios)
        return log_weight, _per_datum(elbo, layout, width)
    enumerated = "".join(sorted({c for t in log_q for c in _dims(t)} - plates))
    if any(c not in output + enumerated for t in log_q for c in _dims(t)):
        # sites that the model sums out may couple the elements of an inner plate: no sum over them is the expectation
        return log_weight, torch.full_like(log_weight, torch.nan)
    return log_weight, _per_datum(_joint_expectation(ratios, log_q, enumerated, output, plates), layout, width)


def _attach_log_probs(trace: Any, s: Structure, guide_trace: Any = None) -> None:
    """Sets the log-densities that Pyro packs: float64, in the shape of all plates of a site."""
    for name, node in sample_sites(trace):
        log_prob = _log_probability(name, node, guide_trace) if name in s.enumerated else node_log_prob(node)
        node["log_prob"] = node["unscaled_log_prob"] = _expand_plates(log_prob.double(), node)


def _log_probability(name: str, node: dict[str, Any], guide_trace: Any) -> Tensor:
    """The log-probabilities of an enumerated site's values; in the model those of the guide where a mask removes it."""
    mask = mask_of(node)
    if mask is None:
        return node_log_prob(node)
    log_prob = _without_mask(node)
    if guide_trace is None or name not in guide_trace:
        return log_prob
    return torch.where(_over_plates(mask, node), log_prob, _without_mask(guide_trace.nodes[name]))


def _without_mask(node: dict[str, Any]) -> Tensor:
    return node_log_prob({**node, "fn": without_masks(node["fn"]), "mask": None})


def _over_plates(mask: Any, node: dict[str, Any]) -> Tensor:
    """A mask without event dims: an enumerated site is masked as a whole."""
    mask = torch.as_tensor(mask, device=node["value"].device)
    for _ in range(min(event_dim(node), mask.dim())):
        mask = mask.all(-1)
    return mask


def _expand_plates(log_prob: Tensor, node: dict[str, Any]) -> Tensor:
    """A log-density with every plate of its site in its shape: the contraction reads plates off the dims."""
    shape = list(log_prob.shape)
    for frame in node["cond_indep_stack"]:
        if frame.dim is not None and frame.size > 0:
            shape = [1] * (-frame.dim - len(shape)) + shape
            shape[frame.dim] = frame.size
    return log_prob.expand(shape)


def _packed(trace: Any, roles: Mapping[str, Role], wanted: Container[Role], outside: Container[str]) -> list[Tensor]:
    nodes = [node for name, node in sample_sites(trace) if roles[name] in wanted and name not in outside]
    return [node["packed"]["log_prob"] for node in nodes]


def _dims(tensor: Any) -> str:
    return tensor._pyro_dims


def _with_dims(tensor: Any, dims: str) -> Tensor:
    tensor._pyro_dims = dims
    return tensor


def _log_sum_product(tensors: Sequence[Tensor], output: str, plates: frozenset[str]) -> Tensor:
    """log of the sum over enumerated dims of the product over plates; the dims of `output` stay."""
    plates = plates | frozenset(output)
    tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    sizes: dict[str, int] = {}
    for t in tensors:
        dims = _dims(t)
        t = _with_dims(t[...], dims)  # a new tensor: the contraction identifies tensors by id
        tree.setdefault(plates.intersection(dims), []).append(t)
        sizes.update(zip(dims, t.shape, strict=True))
    present = frozenset(c for c in output if c in sizes)
    return contract_to_tensor(tree, set(sizes) - plates, present, ring=LogRing(dim_to_size=sizes))


def _arrange(tensor: Tensor, output: str) -> Tensor:
    """A packed tensor with exactly the dims of `output`, in order, absent ones of size one."""
    dims = _dims(tensor)
    shape = [tensor.shape[dims.index(c)] if c in dims else 1 for c in output]
    return tensor.permute([dims.index(c) for c in output if c in dims]).reshape(shape)


def _expand_dims(tensor: Tensor, sizes: Mapping[str, int]) -> Tensor:
    """A packed tensor that has every dim of `sizes`."""
    dims = _dims(tensor)
    new = [c for c in sizes if c not in dims]
    return _with_dims(tensor.expand(*(sizes[c] for c in new), *tensor.shape), "".join(new) + dims)


def _expectation(factor: Tensor, log_q: Sequence[Tensor], output: str, plates: frozenset[str]) -> Tensor:
    """E_q of one log-factor over the enumerated sites that it depends on, summed over its inner plates."""
    dims = _dims(factor)
    probability = _arrange(_log_sum_product(log_q, dims, plates), dims).exp()
    value = torch.where(probability > 0, probability * factor, torch.zeros_like(factor))
    inner = [i for i, c in enumerate(dims) if c not in output]
    value = value.sum(inner) if inner else value.clone()  # torch takes an empty list for all dims
    return _arrange(_with_dims(value, "".join(c for c in dims if c in output)), output)


def _joint_expectation(
    ratios: Sequence[Tensor], log_q: Sequence[Tensor], enumerated: str, output: str, plates: frozenset[str]
) -> Tensor:
    """E_q[log sum_c p(x, y, c, z) / q(y, z)], where c is enumerated in the model alone: summed out for each y."""
    order = enumerated + output
    # every factor is expanded over y, so that the sum over c is taken for each y by itself
    sizes = {c: n for t in log_q for c, n in zip(_dims(t), t.shape, strict=True) if c in enumerated}
    log_w = _arrange(_log_sum_product([_expand_dims(t, sizes) for t in ratios], order, plates), order)
    probability = _arrange(_log_sum_product(log_q, order, plates), order).exp()
    value = torch.where(probability > 0, probability * log_w, torch.zeros_like(log_w))
    return value.sum(tuple(range(len(enumerated))))


def _per_datum(tensor: Tensor, layout: ParticleLayout, width: int) -> Tensor:
    """[particles, width] from the dims of the output plates."""
    s = layout.s
    vectorized = s.layout is ParticlePlacement.VECTORIZED
    tensor = tensor.reshape(tensor.shape[0], -1) if vectorized else layout.unfold(tensor.reshape(-1))
    return tensor.expand(layout.num_particles, width)
