"""Why a step of training cannot be taken: the site and the rows, the cause, and what helps against it."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ppvae.errors import DataError, PpvaeError
from ppvae.inference.contract.missing import LEAVE_OUT, tensors_with_missing
from ppvae.inference.contract.run_failure import find_cure
from ppvae.inference.contract.support import boundary_note
from ppvae.inference.evaluation_mode import eval_mode
from ppvae.inference.structure import Structure
from ppvae.inference.tracing import Program, node_log_prob, sample_sites, trace_pair

SLOWER = "Try a smaller learning rate, clip, or a bounded scale"
FROM_THE_START = "No learning rate is the cause: the first parameters give it on these data"
BOUND = "scale the data, or bound the scale of the distribution, as by softplus(s) + 1e-3"


def cure_for_step(
    model: Program, guide: Program, batch: tuple[Any, ...], rows: Tensor | None,
    gradients: Callable[[], list[Tensor]], failed: bool, invalid: PpvaeError | None = None,
) -> str:  # fmt: skip
    """What helps where a batch has no finite loss and gradient, as a sentence.

    A smaller learning rate only where the parameters that the run, or the epoch, started from have them.

    Args:
        gradients: gives loss and gradients of the batch under those parameters, in the pair's present state.
        failed: the pair raised an exception.
        invalid: the error for a parameter or observed value that its distribution does not take.
    """
    if isinstance(invalid, DataError):
        return str(invalid)
    what = f"{invalid} " if invalid else ""
    if tensors_with_missing(batch):
        return f"{SLOWER}; as values are missing (NaN), whose gradient is NaN even under a mask, {LEAVE_OUT}"
    if _is_finite(gradients):
        return what + SLOWER
    cure = find_cure(model, guide, batch, rows) or _boundary_cure(model, guide, batch)
    if cure or what:
        return (what + cure).rstrip()
    return "Check that the networks fit the data" if failed else f"{FROM_THE_START}: {BOUND}"


def _boundary_cure(model: Program, guide: Program, batch: tuple[Any, ...]) -> str:
    """The cure for data at the end of a support, where their density is zero or infinite; empty for others."""
    with suppress(Exception), torch.no_grad(), eval_mode(model, guide):
        for name, node in sample_sites(trace_pair(model, guide, batch, Structure(), {})[0]):
            if node["is_observed"] and (cure := boundary_note(name, node)):
                return cure[0].upper() + cure[1:]
    return ""


def _is_finite(gradients: Callable[[], list[Tensor]]) -> bool:
    try:
        return all(bool(torch.isfinite(g).all()) for g in gradients())
    except Exception:
        return False


def find_nonfinite(
    model: Program, guide: Program, batch: tuple[Any, ...], rows: Tensor | None, params: Mapping[str, Tensor],
    structure: Structure,
) -> str:  # fmt: skip
    """The first parameter, site or gradient that is not finite, in words; a site with the rows of the data."""
    for name, p in params.items():
        if not bool(torch.isfinite(p).all()):
            return f" (parameter {name!r} is not finite)"
    try:
        with torch.no_grad(), eval_mode(model, guide):
            model_trace, guide_trace = trace_pair(model, guide, batch, structure, {})
            for side, trace in (("guide", guide_trace), ("model", model_trace)):
                for name, node in sample_sites(trace):
                    finite = torch.isfinite(node_log_prob(node))
                    if not bool(finite.all()):
                        where = _rows_in_words(finite, batch[0], rows)
                        return f" (site {name!r} of the {side} has a log-density that is not finite{where})"
    except Exception as error:
        return f" ({' '.join(str(error).split())[:120]})"
    for name, p in params.items():
        if p.grad is not None and not bool(torch.isfinite(p.grad).all()):
            return f" (in parameter {name!r})"
    return ""


def _rows_in_words(finite: Tensor, x: Tensor, rows: Tensor | None) -> str:
    """The rows of the data that are not finite, and how large their values are; empty where all of them are."""
    if rows is None or not finite.dim() or finite.shape[-1] != len(rows) or len(x) != len(rows):
        return ""
    bad = (~finite).reshape(-1, len(rows)).any(0).cpu()
    if bool(bad.all()):
        return ""
    first = int(bad.nonzero()[0])
    peak = float(x[first].detach().abs().max()) if x[first].numel() else math.nan
    more = f", and {int(bad.sum()) - 1} more rows" if int(bad.sum()) > 1 else ""
    return f" at row {int(rows[first])} of the data, whose largest value is {peak:.3g}{more}"
