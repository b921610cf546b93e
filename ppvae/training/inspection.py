"""The inspection of a pair on data, as training and evaluation admit them: `check`, and what a run needs to know."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, TraceEnum_ELBO
from torch import Tensor, nn

from ppvae.data.admission import admit, check_argument_order
from ppvae.data.column_conversion import allow_missing
from ppvae.data.loader import DataLoader, as_single_batch
from ppvae.distributed import DistributedContext
from ppvae.errors import ContractError, UsageError, count_of
from ppvae.errors.calls import explain_call
from ppvae.inference import inspection
from ppvae.inference.contract.describe import global_latent_caveat
from ppvae.inference.contract.registration import CheckRegistration
from ppvae.inference.contract.row_order import find_row_order
from ppvae.inference.device import choose_device, default_device
from ppvae.inference.evaluation_mode import eval_mode, record_modules
from ppvae.inference.inspection import inspect
from ppvae.inference.param_store import BoundProgram, ParamScope, program_device, recorded_scope
from ppvae.inference.structure import Structure
from ppvae.inference.tracing import Program, trace_pair
from ppvae.objectives import Objective
from ppvae.objectives.pyro_losses import LossFunction, check_guide_of_loss
from ppvae.rng import fork_rng

log = logging.getLogger("ppvae")
UNKNOWN = -1  # the label of an unlabelled datum, as in scikit-learn


@explain_call
def check(model: Program, guide: Program, data: Any) -> str:
    """Checks a pair against the contract on data, as one batch, and returns a description of it.

    The text names the sites with their shapes, plates, what is enumerated and what is reparameterised; the modules that
    the pair calls (of a VAE its parts), by class, with the first sentence of their docstrings, the space of the
    distributions that they return, and the number of their parameters; and the particle layout. Data are those that
    `fit` and `log_marginal` take; NaN need not be marked as missing.

    Raises:
        ContractError: naming the site, what was expected, what was found and the cure; UsageError, DataError: of data.

    >>> from ppvae.models import LinearGaussian
    >>> pair = LinearGaussian(3, 2)
    >>> print(check(pair.model, pair.guide, torch.zeros(4, 3)))
    data plate 'data' over the batch, full size 4
    model site 'z': latent, Normal over event [2]
    ...
    """
    check_argument_order(data, model, guide)
    columns = allow_missing(admit(data, "data", model))
    place = choose_device(None, model, guide, columns)
    with default_device(place):
        return inspection.check(model, guide, as_single_batch(columns, 0, place))


def inspect_for_training(
    model: Program, guide: Program, train: DataLoader, batch_size: int, objective: ELBO, move_modules: bool
) -> tuple[Structure, list[nn.Module]]:
    """The structure of the pair on the first batch, and the modules that it calls.

    A pair whose plate draws its own subsample is inspected on all data. With `move_modules` the modules are moved to
    the device of the data.

    Raises:
        ContractError: the pair breaks the contract, or has enumerated sites that the objective does not sum out.
    """
    with fork_rng():
        first = train.read_first(batch_size)
        if move_modules:  # one run, on the device where they are, shows which modules a plain pair calls
            with record_modules(model, guide) as modules, eval_mode(model, guide):
                device = program_device(model, guide, None) if modules else torch.device("cpu")
                trace_pair(model, guide, tuple(t.to(device) for t in first), Structure(), {})
            for module in modules:
                module.to(train.device)
        with record_modules(model, guide) as modules, CheckRegistration(create=True) as registration:
            batch = first
            try:
                structure = inspect(model, guide, first, weights=False)
            except ContractError as error:
                if train.lazy or len(train) <= batch_size:
                    raise
                try:  # a plate that draws its own subsample, or a parameter of one row a datum, needs all data
                    batch = train.read_all()
                    structure = inspect(model, guide, batch, weights=False)
                except ContractError:
                    raise error from error.__cause__
                if not structure.draws_subsample and not find_row_order(model, guide, batch, structure, len(train)):
                    raise
            subsampled = structure.draws_subsample or (structure.has_subsample_size and len(train) > len(first[0]))
            if subsampled and not train.lazy:
                batch = train.read_all()
                structure = inspect(model, guide, batch, weights=False)
            order = find_row_order(model, guide, batch, structure, len(train))
            structure = replace(structure, row_order=order)
            check_mini_batches(structure, len(train), batch_size)
        registration.store_module_local()
    caveats = (*structure.training_caveats, global_latent_caveat(structure, len(train), len(first[0])))
    for caveat in filter(None, (*caveats, *column_caveats(train.columns))):
        log.warning("ppvae: %s", caveat)
    if structure.straight_through and not isinstance(objective, Objective):
        log.warning(
            "ppvae: site %r: gradients of %s are biased, as its draws are discrete with a gradient passed straight "
            "through; take ELBO or IWAE with gradient='arms' or 'vimco'",
            structure.straight_through[0], type(objective).__name__,
        )  # fmt: skip
    check_guide_of_loss(objective, guide, batch, structure)
    if structure.enumerated and not isinstance(objective, TraceEnum_ELBO | Objective | LossFunction):
        raise ContractError(
            f"sites {list(structure.enumerated)} are enumerated: expected an objective that sums them out, found "
            f"{type(objective).__name__}. Pass objective=pyro.infer.TraceEnum_ELBO()"
        )
    return structure, modules


def column_caveats(columns: Sequence[Any]) -> Iterator[str]:
    """Columns of which nothing is observed, and columns after the first that are -1, as where no label is known."""
    for i, column in enumerate(columns):
        if getattr(column, "missing", False) and isinstance(column, Tensor):
            empty = column.detach().isnan().reshape(len(column), -1).all(0).nonzero()[:, 0].tolist()
            names = getattr(column, "columns", ())
            shown = ", ".join(repr(names[d]) if names else str(d) for d in empty[:4]) + (", ..." if empty[4:] else "")
            if empty:
                yield (
                    f"data[{i}] has no value that is not missing in {count_of(len(empty), 'column')} ({shown}): "
                    "nothing is learned of them; see how they were made, or leave them out"
                )
    for i, column in enumerate(columns[1:], 1):
        whole = isinstance(column, Tensor) and column.dim() == 1 and not column.is_floating_point()
        if whole and column.dtype is not torch.bool and bool((column == UNKNOWN).all()):
            yield (
                f"data[{i}] is {UNKNOWN} in every row: if these are labels, none is known, and the classes become a "
                "clustering whose numbers mean nothing; pass known labels in some rows"
            )


def check_mini_batches(structure: Structure, num_data: int, batch_size: int) -> None:
    """Raises ContractError where a pair that is bound to the order of its rows gets them in another order, or in parts.

    Training on one full batch keeps the order.
    """
    if not structure.row_order:
        return
    if num_data > batch_size:
        raise ContractError(
            f"{structure.row_order}, and a mini-batch brings other rows. Pass the rows' numbers as a column, fit(..., "
            f"data.indexed(x)), and take tensor[index] in model(x, index) and guide(x, index); or use "
            f"posteriors.PerDatum; or train on a full batch, batch_size={num_data}, which keeps the order"
        )
    if DistributedContext().size > 1:
        raise ContractError(f"{structure.row_order}, and several processes share a batch. Train in one process")


def check_amortized(modules: Sequence[nn.Module], structure: Structure) -> None:
    """Raises an error where a pair has parameters for each training datum, and so none for validation data."""
    if structure.row_order:
        raise ContractError(
            f"valid: {structure.row_order}, and has none for validation data. Leave valid out, and refit for an ELBO "
            f"of other data"
        )
    for module in modules:
        if getattr(module, "requires_training_data", False):
            raise UsageError(
                f"valid: {type(module).__name__} has parameters for the training data alone; leave valid out, and "
                f"refit for an ELBO of other data"
            )


def check_parameters(scope: ParamScope, model: Program, guide: Program) -> None:
    """Logs which parameters of a run start anew although Pyro's store or an earlier run has others.

    Raises:
        ContractError: the run has no parameters.
    """
    if not scope.params:
        raise ContractError(
            "the pair registers no parameters: expected pyro.module or pyro.param in model or guide, found none; "
            "there is nothing to train"
        )
    if any(isinstance(f, BoundProgram) for f in (model, guide)):
        return
    runs = [s for s in map(recorded_scope, (model, guide)) if s is not None]
    for where, params, cure in (
        ("in Pyro's param store", pyro.get_param_store()._params, "ppvae.inference.from_param_store(model, guide)"),
        ("of an earlier run", {n: p for s in runs for n, p in s.params.items()}, "run.model and run.guide of that run"),
    ):
        names = [n for n, p in scope.params.items() if n in params and not _equal(params[n], p)]
        if names:
            shown = ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
            log.warning(
                "ppvae: fit starts parameter %s anew, and not from the value %s; to go on from there, pass %s",
                shown, where, cure,
            )  # fmt: skip


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.device == b.device and bool(torch.equal(a, b)))
