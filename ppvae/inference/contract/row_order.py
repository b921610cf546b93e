"""Order of the rows: a pair trained on mini-batches gives a row the same densities at any place of any batch.

A parameter, buffer or closure with one row a datum belongs to data that keep their order. It is found by running the
pair on permuted rows, their latents permuted alike, with noise added to the parameters that could be of this kind; and
by running it on one row fewer.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from types import ModuleType
from typing import Any

import pyro
import torch
from torch import Tensor

from ppvae.inference.contract.independence import (
    close,
    row_log_prob,
    run_at,
    sampled_values,
    take_batch_rows,
    take_value_rows,
)
from ppvae.inference.evaluation_mode import eval_mode, reachable_modules, reachable_objects
from ppvae.inference.structure import Structure
from ppvae.inference.tracing import Program, RecordBaseDraws, node_log_prob, sample_sites, trace_pair
from ppvae.rng import fork_rng


def find_row_order(model: Program, guide: Program, batch: Sequence[Any], s: Structure, full_size: int) -> str:
    """What binds a pair to the order of its rows, in words; empty where nothing does.

    Args:
        batch: some rows of the data.
        full_size: the number of all data.
    """
    size = len(batch[0])
    if s.draws_subsample or size < 2:
        return ""
    with fork_rng(), torch.no_grad(), eval_mode(model, guide), pyro.validation_enabled(False):
        torch.manual_seed(0)
        params = [p for p in s.params.values() if _dim_of_rows(p, size, full_size) is not None]
        with ExitStack() as stack:
            for p in params:
                stack.enter_context(changed(p, p + 0.1 * torch.randn_like(p)))
            found = _differs_when_permuted(model, guide, batch, s, full_size)
        if not found:  # what acts through a coefficient that starts at zero
            with ExitStack() as stack, suppress(ValueError, RuntimeError):
                for p in s.params.values():
                    scale = float(p.detach().abs().mean()) if p.numel() and p.is_floating_point() else 0.0
                    stack.enter_context(changed(p, p + 0.1 * (scale or 1.0) * torch.randn_like(p)))
                found = _differs_when_permuted(model, guide, batch, s, full_size)
        return found or _fails_on_fewer_rows(model, guide, batch, s)


def find_unequal_rows(model: Program, guide: Program, batch: Sequence[Any], s: Structure, full_size: int) -> str:
    """What binds a pair to the order of its rows as its tensors are now; rows that are equal bind nothing."""
    if s.draws_subsample or len(batch[0]) < 2:
        return ""
    with fork_rng(), torch.no_grad(), eval_mode(model, guide), pyro.validation_enabled(False):
        return _differs_when_permuted(model, guide, batch, s, full_size)


def find_bound_rows(model: Program, guide: Program, batch: Sequence[Any], s: Structure) -> str:
    """What binds a pair, as its tensors are now, to these rows at their places; empty where it takes any of them."""
    if s.draws_subsample or len(batch[0]) < 2:
        return ""
    with fork_rng(), torch.no_grad(), eval_mode(model, guide), pyro.validation_enabled(False):
        return _fails_on_fewer_rows(model, guide, batch, s) or _differs_when_permuted(
            model, guide, batch, s, len(batch[0])
        )


def _differs_when_permuted(model: Program, guide: Program, batch: Sequence[Any], s: Structure, full_size: int) -> str:
    size = len(batch[0])
    runs = _Permutation(model, guide, batch, s)
    site = runs.differs()
    if not site or runs.noisy():
        return ""
    for name, tensor in named_tensors(model, guide, s).items():
        dim = _dim_of_rows(tensor, size, full_size)
        if dim is not None and runs.follow(tensor, dim):
            return f"{name} of shape {list(tensor.shape)} has one row a datum"
    if runs.unstable(s.params.values()):
        return ""
    return f"the log-density of a datum at site {site!r} depends on the place of its row in the batch"


def _fails_on_fewer_rows(model: Program, guide: Program, batch: Sequence[Any], s: Structure) -> str:
    size = len(batch[0])
    fewer = take_batch_rows(batch, torch.arange(size - 1), size)
    try:
        for trace in trace_pair(model, guide, fewer, Structure(), {}):
            for name, node in sample_sites(trace):
                if any(frame.name == s.plate and frame.size == size for frame in node["cond_indep_stack"]):
                    raise ValueError(f"site {name!r} is in a plate of {size}")
                node_log_prob(node)
    except (ValueError, RuntimeError, IndexError) as error:
        for name, tensor in named_tensors(model, guide, s).items():
            if tensor.shape[:1] == (size,) and not name.endswith((".weight'", ".bias'")):
                return f"{name} of shape {list(tensor.shape)} has one row a datum"
        return f"the pair takes {size} rows alone (with {size - 1}: {' '.join(str(error).split())[:100]})"
    return ""


def _dim_of_rows(tensor: Tensor, size: int, full_size: int) -> int | None:
    """The dim of a tensor that could go over the rows of a batch, or over all data."""
    if tensor.dim() == 0 or 0 in tensor.stride():
        return None
    return next((i for i, n in enumerate(tensor.shape) if n in (size, full_size)), None)


class _Permutation:
    """Runs of a pair on a batch and on its permuted rows, their latents permuted alike."""

    def __init__(self, model: Program, guide: Program, batch: Sequence[Any], s: Structure):
        self.size, self.batch = len(batch[0]), batch
        self.rows = torch.randperm(self.size, generator=torch.Generator().manual_seed(0))
        if bool((self.rows == torch.arange(self.size)).all()):
            self.rows = self.rows.flip(0)
        record = RecordBaseDraws(s.no_inverse)
        with pyro.validation_enabled(False):
            traces = trace_pair(model, record(guide), batch, Structure(), {})
        self._sides: list[tuple[Program, dict[str, Any], dict[str, Tensor], Structure]] = []
        for program, trace in zip((model, guide), traces, strict=True):
            nodes = dict(sample_sites(trace))
            inside = {n: v for n, v in nodes.items() if any(f.name == s.plate for f in v["cond_indep_stack"])}
            values = sampled_values(nodes)
            if program is guide:
                values |= {name: draws[0] for name, draws in record.draws.items()}
            self._sides.append((program, inside, values, Structure(from_base=s.no_inverse if program is guide else ())))

    def differs(self) -> str:
        """A site whose log-densities do not follow the rows; empty where all do."""
        for program, inside, values, s in self._sides:
            before = _log_probs(program, self.batch, values, s, inside)
            moved = take_value_rows(values, self.rows, self.size, inside)
            after = _log_probs(program, take_batch_rows(self.batch, self.rows, self.size), moved, s, inside)
            for name in inside:
                if not bool(close(before[name][self.rows.to(before[name].device)], after[name]).all()):
                    return name
        return ""

    def follow(self, tensor: Tensor, dim: int) -> bool:
        """Whether the first half of a tensor's rows acts on the densities of the first half of the data alone."""
        half = torch.arange(self.size // 2, device=tensor.device)
        rows = tensor.detach().index_select(dim, half)
        other = rows + 0.1 * torch.randn_like(rows) if tensor.is_floating_point() else rows.roll(1, dim)
        moved = torch.zeros(self.size, dtype=torch.bool)
        for program, inside, values, s in self._sides:
            before = _log_probs(program, self.batch, values, s, inside)
            with changed(tensor, tensor.detach().index_copy(dim, half, other)):
                after = _log_probs(program, self.batch, values, s, inside)
            for name in inside:
                moved |= ~close(before[name], after[name]).cpu()
        return bool(moved.any()) and not bool(moved[len(half) :].any())

    def unstable(self, params: Iterable[Tensor]) -> bool:
        """Whether changes of the size of rounding move the densities, as steps inside a guide may amplify them."""
        before = [_log_probs(program, self.batch, values, s, inside) for program, inside, values, s in self._sides]
        with ExitStack() as stack:
            for p in params:
                eps = 8 * torch.finfo(p.dtype).eps if p.is_floating_point() else 0.0
                stack.enter_context(changed(p, p.detach() * (1 + eps * torch.randn_like(p))))
            after = [_log_probs(program, self.batch, values, s, inside) for program, inside, values, s in self._sides]
        return any(not bool(close(b[name], a[name]).all()) for b, a in zip(before, after, strict=True) for name in b)

    def noisy(self) -> bool:
        """Whether the densities at given latents are random, so that nothing can be told from two runs."""
        for program, inside, values, s in self._sides:
            first, second = (_log_probs(program, self.batch, values, s, inside, seed) for seed in range(2))
            if not all(bool(close(first[name], second[name]).all()) for name in inside):
                return True
        return False


def _log_probs(
    program: Program, batch: Sequence[Any], values: dict[str, Tensor], s: Structure, names: Iterable[str], seed: int = 0
) -> dict[str, Tensor]:
    """The log-density of each row at the sites in the data plate, evaluated now: tensors may change after the run."""
    nodes = run_at(program, batch, values, s, seed)
    return {name: row_log_prob(nodes[name]) for name in names}


def named_tensors(model: Program, guide: Program, s: Structure) -> dict[str, Tensor]:
    """The tensors of a pair by what they are: parameters, buffers, and tensors that its functions close over."""
    found = {f"parameter {name!r}": p for name, p in s.params.items()}
    for module in reachable_modules(model, guide):
        buffers = module.named_buffers(recurse=False)
        found |= {f"buffer {name!r} of {type(module).__name__}": b for name, b in buffers}
    for function in (model, guide):
        for name, thing in reachable_objects(function).items():
            held = {name: thing} if isinstance(thing, Tensor) else {}
            if not isinstance(thing, type | ModuleType):
                held |= {f"{name}.{n}": t for n, t in getattr(thing, "__dict__", {}).items() if isinstance(t, Tensor)}
            found |= {f"tensor {n!r}": t for n, t in held.items()}
    seen: set[int] = set()
    return {n: t for n, t in found.items() if not (id(t) in seen or seen.add(id(t)))}  # type: ignore[func-returns-value]


@contextmanager
def changed(tensor: Tensor, values: Tensor) -> Iterator[None]:
    """Gives a tensor other values for the duration, unnoticed by its version counter."""
    before = tensor.detach().clone()
    tensor.data.copy_(values)
    try:
        yield
    finally:
        tensor.data.copy_(before)
