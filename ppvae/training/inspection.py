"""What there is to know of a pair before it is trained: where it lives, what it is, which modules it calls."""

from __future__ import annotations

from typing import Any

import torch
from pyro.infer import ELBO, TraceEnum_ELBO
from torch import nn

from ppvae.data.loader import Columns
from ppvae.errors import ContractError
from ppvae.inference.contract.registration import Registration
from ppvae.inference.evaluation_mode import eval_mode, modules_called
from ppvae.inference.inspection import inspect
from ppvae.inference.structure import Structure
from ppvae.inference.tracing import Pair, traces
from ppvae.objectives import Objective
from ppvae.rng import fork_rng


def place_of(model: Pair, guide: Pair, data: Any) -> torch.device:
    """The device of the pair's parameters, or else of the data."""
    first = data[0] if isinstance(data, list | tuple) and len(data) else data
    for function in (model, guide):
        owner = getattr(function, "__self__", function)
        if isinstance(owner, nn.Module):
            for p in owner.parameters():
                return p.device
    return getattr(first, "device", torch.device("cpu"))


def look(
    model: Pair, guide: Pair, train: Columns, batch_size: int, objective: ELBO, place: torch.device, move: bool
) -> tuple[Structure, list[nn.Module]]:
    """Checks the contract on the first batch, and finds the modules that the pair calls; `move` puts them in place."""
    rows = torch.arange(min(batch_size, len(train)))
    with fork_rng():
        first = train.first(batch_size)
        if move:  # the modules of a plain pair are known once it has run, which it does where they are
            with modules_called(model, guide) as modules, eval_mode(model, guide):
                here = place_of(model, guide, None) if modules else torch.device("cpu")
                traces(model, guide, tuple(t.to(here) for t in first), Structure(), {})
            for module in modules:
                module.to(place)
        with modules_called(model, guide) as modules, Registration(create=True):
            try:
                structure = inspect(model, guide, first, weights=False)
            except ContractError as error:
                if train.lazy or len(train) <= batch_size:
                    raise
                try:  # a plate that draws its own subsample wants all data
                    structure = inspect(model, guide, train.whole(), weights=False)
                except ContractError:
                    raise error from None
                if not structure.indexes:
                    raise
        if not train.lazy and (structure.indexes or (structure.sized and len(train) > len(rows))):
            structure = inspect(model, guide, train.whole(), weights=False)
    if structure.enumerated and not isinstance(objective, TraceEnum_ELBO | Objective):
        raise ContractError(
            f"sites {list(structure.enumerated)} are enumerated: expected an objective that sums them out, found "
            f"{type(objective).__name__}. Pass objective=pyro.infer.TraceEnum_ELBO()"
        )
    return structure, modules
