"""Enumerated sites summed out of the weights exactly, by tensor variable elimination."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from torch import Tensor

from ppvae.inference.contract.support import mask_of
from ppvae.inference.structure import Structure
from ppvae.inference.tracing import PARTICLES, node_log_prob, sample_sites


def _over_plates(log_prob: Tensor, node: dict[str, Any]) -> Tensor:
    """The log-density with every plate of its site in its shape: in a contraction the dims tell the plates."""
    shape = list(log_prob.shape)
    for frame in node["cond_indep_stack"]:
        if frame.dim is not None:
            shape = [1] * (-frame.dim - len(shape)) + shape
            shape[frame.dim] = frame.size
    return log_prob.expand(shape)


def _log_values(node: dict[str, Any]) -> Tensor | float:
    """The log of how many values an enumerated site has, where it is masked out; 0 where it is not."""
    mask = mask_of(node)
    if mask is None or mask is True:
        return 0.0
    count = math.log(len(node["fn"].enumerate_support(expand=False)))
    return torch.where(mask, 0.0, count) if isinstance(mask, Tensor) else count


def sum_out_enumerated(
    model_trace: Any,
    guide_trace: Any,
    s: Structure,
    num_particles: int,
    size: int,
    unfold: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Sums enumerated sites out of the weights exactly: (log_weight, elbo), [particles, batch].

    log w_k = log sum_y p(x, y, z_ky) / q(z_ky | x, y), and for sites enumerated in the guide
    elbo_k = sum_y q(y | x) [log p(x, y, z_ky) - log q(y | x) - log q(z_ky | x, y)]; NaN where the guide enumerates
    inside an inner plate and the model has further enumerated sites of its own. Where a mask takes an
    enumerated site out, its values are equally likely on both sides: a sum over them is then one, and so is the ratio.
    """
    for trace, roles in ((guide_trace, s.guide_roles), (model_trace, s.model_roles)):
        for name, node in sample_sites(trace):
            summed = "enumerated" in (roles.get(name), s.guide_roles.get(name))
            log_prob = node_log_prob(node) - _log_values(node) if summed else node_log_prob(node)
            node["log_prob"] = node["unscaled_log_prob"] = _over_plates(log_prob.double(), node)
    guide_trace.pack_tensors()
    model_trace.pack_tensors(guide_trace.plate_to_symbol)

    def packed(trace: Any, roles: Mapping[str, str], wanted: Sequence[str]) -> list[Tensor]:
        return [node["packed"]["log_prob"] for n, node in sample_sites(trace) if roles[n] in wanted]

    def negative(tensor: Tensor) -> Tensor:
        out = -tensor
        out._pyro_dims = tensor._pyro_dims  # type: ignore[attr-defined]
        return out

    factors = packed(model_trace, s.model_roles, ("latent", "observed", "enumerated"))
    factors += [negative(t) for t in packed(guide_trace, s.guide_roles, ("latent", "auxiliary"))]
    log_q = packed(guide_trace, s.guide_roles, ("enumerated",))
    symbols = model_trace.plate_to_symbol
    kept = "".join(symbols[p] for p in ((PARTICLES,) if s.has_global_latents else (PARTICLES, s.plate)) if p in symbols)

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
        return tensor.expand(num_particles, 1 if s.has_global_latents else size)

    def expected(factor: Tensor) -> Tensor:
        """E under q of one log-factor, over the enumerated sites that it depends on, summed over its inner plates."""
        dims = factor._pyro_dims  # type: ignore[attr-defined]
        probability = arranged(reduce(log_q, dims), dims).exp()
        value = torch.where(probability > 0, probability * factor, torch.zeros_like(factor))
        inner = [i for i, c in enumerate(dims) if c not in kept]
        value = value.sum(inner) if inner else value.clone()  # torch takes an empty list for all dims
        value._pyro_dims = "".join(c for c in dims if c in kept)  # type: ignore[attr-defined]
        return arranged(value, kept)

    log_weight = per_datum(arranged(reduce(factors, kept), kept))
    if not log_q:
        return log_weight, log_weight
    enum = "".join(sorted({c for t in log_q for c in t._pyro_dims} - set(symbols.values())))  # type: ignore[attr-defined]
    if not any(role == "enumerated" and name not in s.guide_roles for name, role in s.model_roles.items()):
        return log_weight, per_datum(sum(expected(f) for f in (*factors, *map(negative, log_q))))  # type: ignore[arg-type]
    if any(c not in kept + enum for t in log_q for c in t._pyro_dims):  # type: ignore[attr-defined]
        # what the model sums out may tie the parts of an inner plate together: no sum over parts is the expectation
        return log_weight, torch.full_like(log_weight, torch.nan)
    order = enum + kept
    # given y, whatever the model enumerates is summed out for each y by itself: every factor must show its y
    sizes = {c: n for t in log_q for c, n in zip(t._pyro_dims, t.shape, strict=True) if c in enum}  # type: ignore[attr-defined]
    log_w = arranged(reduce([with_dims(t, sizes) for t in (*factors, *map(negative, log_q))], order), order)
    probability = arranged(reduce(log_q, order), order).exp()
    value = torch.where(probability > 0, probability * log_w, torch.zeros_like(log_w))
    return log_weight, per_datum(value.sum(tuple(range(len(enum)))))
