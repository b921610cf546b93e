"""The error for a pair that raises an exception when it runs on a batch, with a cure that was tried."""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor

from ppvae.errors import ContractError, PpvaeError, site_error
from ppvae.errors.memory import memory_failure
from ppvae.inference.contract.independence import take_batch_rows
from ppvae.inference.contract.row_order import named_tensors
from ppvae.inference.contract.support import check_support
from ppvae.inference.contract.validity import check_parameters
from ppvae.inference.evaluation_mode import reachable_modules
from ppvae.inference.param_store import BoundProgram
from ppvae.inference.structure import Structure
from ppvae.inference.tracing import Program, node_log_prob, sample_sites, trace_pair
from ppvae.rng import fork_rng

LARGE = 10.0  # data below it are of the scale that networks are made for


def explain_shared_weight(model: Program, guide: Program, batch: Sequence[Any]) -> ContractError | None:
    """The error for a random weight of a network that is first read in the data plate, so that each datum has one."""
    modules = [m for m in reachable_modules(model, guide) if isinstance(m, PyroModule)]
    weights = {m._pyro_get_fullname(name) for m in modules for name in m._pyro_samples}
    with poutine.trace() as tracer, suppress(Exception):
        model(*batch)
    for name, node in sample_sites(tracer.trace):
        plates = [f.name for f in node["cond_indep_stack"] if f.dim == -1]
        if name in weights and plates:
            return site_error(
                name,
                "a weight that all data share",
                f"a PyroSample that is sampled for each datum, since it is first read inside the plate {plates[0]!r}",
                "read it before the plate, by its name",
            )
    return None


def explain_failure(
    error: Exception, model: Program, guide: Program, batch: tuple[Any, ...], where: str = "a batch",
    rows: Tensor | None = None,
) -> ContractError:  # fmt: skip
    """The ContractError for an exception of Pyro, torch or the pair itself, with its cause where one is found."""
    sizes = ", ".join(str(list(t.shape)) if isinstance(t, Tensor) else type(t).__name__ for t in batch[:4])
    sizes += f" and {len(batch) - 4} more" if len(batch) > 4 else ""
    text = " ".join(str(error).split())[:300]
    if "must be sampled in trace" in text:
        name = text.removeprefix("site ").split(" must")[0]
        return site_error(
            name, "a guide that samples latents only", "a site with obs=", "move the observation to the model"
        )
    if rows_of := _other_number_of_rows(text, model, guide, batch):
        return ContractError(rows_of)
    if "plate" in text and ("hape mismatch" in text or "invalid shape" in text):
        return ContractError(
            f"{text}. Expected one rightmost plate over the batch {sizes}; declare the dims of one event with "
            f".to_event(n), and size the plate by the batch, as in pyro.plate('data', len(x))"
        )
    cure = (
        find_cure(model, guide, batch, rows)
        or _argument_cure(text, len(batch))
        or ("Check that the networks fit the data and that model(*batch) and guide(*batch) take these arguments")
    )
    return ContractError(f"the pair could not run on {where} of shape {sizes}: {type(error).__name__}: {text}. {cure}")


def _argument_cure(text: str, columns: int) -> str:
    """The cure for a parameter outside its distribution's range, or for a program that takes more columns."""
    if "to satisfy the constraint" in text:
        return (
            "Map the network's output to the range of the parameter: .exp() or softplus for a scale or a rate; "
            "logits= in place of probs=, which takes any real number"
        )
    if columns == 1 and re.search(r"missing \d+ required positional argument", text):
        return (
            "model(*batch) and guide(*batch) get a batch of one tensor here: pass a tuple (x, y), or a dict of columns "
            "by argument, as {name: frame[name] for name in frame}"
        )
    return ""


def _other_number_of_rows(text: str, model: Program, guide: Program, batch: tuple[Any, ...]) -> str:
    """The sentence for a tensor with one row a datum on another number of data, with which it was seen to run."""
    if not batch or not isinstance(batch[0], Tensor) or not batch[0].dim() or runs(model, guide, batch):
        return ""
    sizes = re.search(r"(\d+) vs (\d+)|\((\d+)\) must match the size of tensor b \((\d+)\)", text)
    size, numbers = len(batch[0]), {int(n) for n in sizes.groups() if n} if sizes else set()
    scopes = [f.scope.params for f in (model, guide) if isinstance(f, BoundProgram)]
    store = Structure(guide_params=dict(ChainMap(*scopes, pyro.get_param_store()._params)))
    weights = _layer_weights(model, guide)
    for name, tensor in named_tensors(model, guide, store).items() if size in numbers else ():
        count = len(tensor) if tensor.dim() and id(tensor) not in weights else 0
        if count in numbers - {size} and runs(model, guide, take_batch_rows(batch, torch.arange(count) % size, size)):
            return (
                f"{name} of shape {list(tensor.shape)} has one row for each of {count} data; found a batch of {size}. "
                f"Pass all {count}, in their order; or pass the rows' numbers as a column, data.indexed(x), and take "
                f"tensor[index] in model(x, index) and guide(x, index)"
            )
    return ""


def _layer_weights(model: Program, guide: Program) -> set[int]:
    """The weights of torch's layers, whose number of rows is a number of outputs; embeddings have a row a datum."""
    layers = [m for m in reachable_modules(model, guide) if type(m).__module__.startswith("torch.nn.modules")]
    tables = (torch.nn.Embedding, torch.nn.ParameterList, torch.nn.ParameterDict)
    return {id(p) for m in layers if not isinstance(m, tables) for p in m.parameters(recurse=False)}


@contextmanager
def explain_failures(
    model: Program, guide: Program, batch: tuple[Any, ...], where: str, rows: Tensor | None = None
) -> Iterator[None]:
    """Turns an exception of the pair on a later batch into the error that it would be on the first.

    An exception that the pair alone does not raise on this batch stays what it is.
    """
    try:
        yield
    except PpvaeError:
        raise
    except Exception as error:
        if memory_failure(error):
            raise
        if (invalid := find_invalid(model, guide, batch, rows)) is not None:
            raise invalid from error
        if runs(model, guide, batch):
            raise
        raise explain_failure(error, model, guide, batch, where, rows) from error


def find_invalid(
    model: Program, guide: Program, batch: tuple[Any, ...], rows: Tensor | None = None
) -> PpvaeError | None:
    """The error for a parameter or observed value that its distribution does not take; None where each takes all."""
    try:
        with fork_rng(), torch.no_grad(), pyro.validation_enabled(False):
            model_trace, guide_trace = trace_pair(model, guide, batch, Structure(), {})
    except Exception:
        return None
    try:
        for name, node in (*sample_sites(guide_trace), *sample_sites(model_trace)):
            check_parameters(name, node["fn"], rows)
            if node["is_observed"]:
                check_support(name, node, rows)
    except PpvaeError as error:
        return error
    return None


def runs(model: Program, guide: Program, batch: tuple[Any, ...], finite: bool = False) -> bool:
    """Whether the pair runs on a batch, and with `finite` has finite log-densities there."""
    try:
        with fork_rng(), torch.no_grad(), pyro.validation_enabled(finite):
            traces = trace_pair(model, guide, batch, Structure(), {})
            nodes = [node for trace in traces for _, node in sample_sites(trace)]
            return not finite or all(bool(torch.isfinite(node_log_prob(node)).all()) for node in nodes)
    except Exception:
        return False


def find_cure(model: Program, guide: Program, batch: tuple[Any, ...], rows: Tensor | None = None) -> str:
    """What has to be done for the pair to run on a batch, to finite densities, as a sentence; else an empty string.

    Whatever it says was tried. `rows` are those of the data that the batch holds, where they are known.
    """
    if not all(isinstance(t, Tensor) and t.dim() for t in batch) or runs(model, guide, batch, finite=True):
        return ""
    if not runs(model, guide, batch) and (cure := _cast(model, guide, batch) or _lengthen(model, guide, batch)):
        return cure
    return _leave_out(model, guide, batch, rows) or _scale(model, guide, batch)


def _cast(model: Program, guide: Program, batch: tuple[Tensor, ...]) -> str:
    """Data of another type than the networks' parameters."""
    for dtype in (torch.get_default_dtype(), torch.float32, torch.float64):
        other = [i for i, t in enumerate(batch) if t.dtype != dtype]
        for which in [[i] for i in other] + ([other] if len(other) > 1 else []):
            cast = tuple(t.to(dtype) if i in which else t for i, t in enumerate(batch))
            if runs(model, guide, cast):
                return f"The data are {_kinds(batch, which)}, the networks {_name(dtype)}: pass {_casts(which, dtype)}"
    return ""


def _kinds(batch: tuple[Tensor, ...], which: list[int]) -> str:
    return " and ".join(dict.fromkeys(_name(batch[i].dtype) for i in which))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _casts(which: list[int], dtype: torch.dtype) -> str:
    method = {torch.float32: "float()", torch.float64: "double()"}.get(dtype, f"to({dtype})")
    names = ["x" if i == 0 else f"data[{i}]" for i in which]
    return ", ".join(f"{name}.{method}" for name in names) + f" (of an array, .astype('{_name(dtype)}'))"


def _leave_out(model: Program, guide: Program, batch: tuple[Tensor, ...], rows: Tensor | None) -> str:
    """One datum that is far from all others."""
    x, *context = batch
    if not x.is_floating_point() or len(x) < 3:
        return ""
    peaks = x.detach().reshape(len(x), -1).abs().amax(1)
    (largest, second), (row, other) = peaks.topk(2)
    if not largest > max(LARGE, 100 * float(second)):
        return ""
    without = x.clone()
    without[row] = x[other]
    if not runs(model, guide, (without, *context), finite=True):
        return ""
    name = f"Row {int(row)} of the batch" if rows is None else f"Row {int(rows[int(row)])} of the data"
    return f"{name} reaches {float(largest):.3g}, the others {float(second):.3g}: mend that row, or leave it out"


def _scale(model: Program, guide: Program, batch: tuple[Tensor, ...]) -> str:
    """Data so large that an exponential of the networks is zero or infinite."""
    x, *context = batch
    if not x.is_floating_point():
        return ""
    peak = float(x.abs().max())
    if not peak > LARGE or not runs(model, guide, (x / peak, *context), finite=True):
        return ""
    return f"The data reach {peak:.3g}, where the pair's numbers are no longer finite: scale them, as by x / {peak:.3g}"


def _lengthen(model: Program, guide: Program, batch: tuple[Tensor, ...]) -> str:
    """Networks that cut a batch to its longest sequence."""
    x, steps = batch[0], batch[0].shape[1] if batch[0].dim() > 1 else 0
    for i, t in enumerate(batch[1:], 1):
        whole = t.dim() == 1 and len(t) == len(x) and not t.is_floating_point() and t.dtype != torch.bool
        if not whole or not 0 < (longest := int(t.max())) < steps:
            continue
        longer = t.clone()
        longer[t.argmax()] = steps
        if runs(model, guide, (*batch[:i], longer, *batch[i + 1 :])):
            return (
                f"The longest sequence here has {longest} of {steps} steps, and the pair cuts the batch to it: keep "
                "all steps, as by pad_packed_sequence(..., total_length=x.shape[1])"
            )
    return ""
