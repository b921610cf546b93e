"""What there is to know of a pair before it is trained: where it lives, what it is, which modules it calls."""

from __future__ import annotations

from typing import Any

import torch
from pyro.infer import ELBO, TraceEnum_ELBO
from torch import nn

from ppvae.data.loader import Columns
from ppvae.errors import ContractError
from ppvae.inference.contract.registration import Registration
from ppvae.inference.evaluation_mode import eval_mode, record_modules
from ppvae.inference.inspection import inspect
from ppvae.inference.structure import Structure
from ppvae.inference.tracing import Program, trace_pair
from ppvae.objectives import Objective
from ppvae.rng import fork_rng


def parameter_device(model: Program, guide: Program, data: Any) -> torch.device:
    """The device of the pair's parameters, or else of the data."""
    first = data[0] if isinstance(data, list | tuple) and len(data) else data
    for function in (model, guide):
        owner = getattr(function, "__self__", function)
        if isinstance(owner, nn.Module):
            for p in owner.parameters():
                return p.device
    return getattr(first, "device", torch.device("cpu"))


def inspect_for_training(
    model: Program, guide: Program, train: Columns, batch_size: int, objective: ELBO, place: torch.device, move: bool
) -> tuple[Structure, list[nn.Module]]:
    """Checks the contract on the first batch, and finds the modules that the pair calls; `move` puts them in place."""
    rows = torch.arange(min(batch_size, len(train)))
    with fork_rng():
        first = train.first(batch_size)
        if move:  # the modules of a plain pair are known once it has run, which it does where they are
            with record_modules(model, guide) as modules, eval_mode(model, guide):
                here = parameter_device(model, guide, None) if modules else torch.device("cpu")
                trace_pair(model, guide, tuple(t.to(here) for t in first), Structure(), {})
            for module in modules:
                module.to(place)
        with record_modules(model, guide) as modules, Registration(create=True):
            try:
                structure = inspect(model, guide, first, weights=False)
            except ContractError as error:
                if train.lazy or len(train) <= batch_size:
                    raise
                try:  # a plate that draws its own subsample wants all data
                    structure = inspect(model, guide, train.whole(), weights=False)
                except ContractError:
                    raise error from None
                if not structure.draws_subsample:
                    raise
        if not train.lazy and (structure.draws_subsample or (structure.has_subsample_size and len(train) > len(rows))):
            structure = inspect(model, guide, train.whole(), weights=False)
    if structure.enumerated and not isinstance(objective, TraceEnum_ELBO | Objective):
        raise ContractError(
            f"sites {list(structure.enumerated)} are enumerated: expected an objective that sums them out, found "
            f"{type(objective).__name__}. Pass objective=pyro.infer.TraceEnum_ELBO()"
        )
    return structure, modules
