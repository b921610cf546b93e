"""How a pair takes particles: vectorised, folded into the batch, or one by one; found by trying."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ppvae.errors import PpvaeError
from ppvae.inference.structure import Structure
from ppvae.inference.terms import Terms, terms
from ppvae.inference.tracing import Program, explain_failure

log = logging.getLogger("ppvae")


def find_layout(model: Program, guide: Program, batch: tuple[Any, ...], s: Structure) -> str:
    """ "vectorized" if the pair broadcasts over a particle plate, else "folded" into the batch, else "one by one".

    A layout counts only if it gives the densities that single particles give: some networks run on a particle dim
    and silently mean something else by it.
    """
    count = 3
    try:
        singles = terms(model, guide, batch, count, structure=replace(s, layout="one by one"))
    except PpvaeError:
        raise
    except Exception as error:
        shapes = ", ".join(str(list(t.shape)) for t in batch if isinstance(t, Tensor))
        raise explain_failure(error, shapes) from error
    index = {s.plate: first_rows_index(singles)} if s.draws_subsample else {}
    values = {n: site.value for n, site in {**singles.model, **singles.guide}.items() if site.role in _DRAWN}
    values = {n: v for n, v in values.items() if n not in s.enumerated}
    reason = ""
    for layout in ("vectorized",) if s.has_global_latents or s.draws_subsample else ("vectorized", "folded"):
        at = replace(s, layout=layout)
        try:
            same = terms(model, guide, batch, count, values={**values, **index}, structure=at)
            single = singles
            if s.draws_subsample:  # a subsample is drawn at every run: take the same rows on both sides
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


def first_rows_index(t: Terms) -> Tensor:
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
