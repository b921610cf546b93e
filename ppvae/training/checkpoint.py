"""Checkpoints: files named by their SHA-256 with a pointer to the last one, and the state of a pair in them."""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from ppvae.errors import CheckpointError
from ppvae.errors.memory import memory_failure
from ppvae.inference.param_store import ParamScope
from ppvae.parameter_names import canonical_names
from ppvae.storage import read_bytes, sha256, write_bytes

POINTER = "last"  # the file that holds the name of the last checkpoint
ENTRIES: Mapping[str, tuple[type, ...]] = {
    "state": (dict,), "epoch": (int,), "step": (int,), "history": (list,), "best": (dict, NoneType),
    "finished": (bool,), "stopped": (bool,), "optimizer": (dict,), "scheduler": (dict, NoneType), "settings": (dict,),
}  # fmt: skip


def save(folder: Path, state: dict[str, Any]) -> Path:
    """Saves tensors and plain Python values.

    The pointer is replaced after the new file is on disk, and older checkpoints are removed last, so that a process
    killed at any moment leaves a complete checkpoint.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    name = f"{sha256(content)}.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: could not be made ({error.strerror})") from error
    path = folder / name
    write_bytes(path, content)
    write_bytes(folder / POINTER, name.encode())
    for old in (*folder.glob("*.pt"), *folder.glob("*.tmp")):
        if old.name != name:
            old.unlink(missing_ok=True)
    return path


def check_loadable(state: dict[str, Any]) -> None:
    """Raises CheckpointError for a state that could not be read back without running code from the file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    _unpickle_tensors(buffer.getvalue(), Path("state"))


def exists(folder: Path) -> bool:
    """Whether the folder holds a complete checkpoint."""
    return os.path.exists(folder / POINTER)


def current(folder: Path) -> str:
    """The SHA-256 that the pointer names, of the last checkpoint; empty where there is no pointer.

    Raises:
        CheckpointError: the pointer cannot be read, or is none.
    """
    try:
        name = read_bytes(folder / POINTER).decode(errors="replace").strip()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise CheckpointError(f"{folder / POINTER}: cannot be read ({error.strerror})") from error
    digest = name.removesuffix(".pt")
    if len(digest) != 64 or not all(c in "0123456789abcdef" for c in digest):
        raise CheckpointError(f"{folder / POINTER}: expected a checkpoint's name, found {name[:40]!r}")
    return digest


def read(folder: Path) -> dict[str, Any]:
    """The state in the last checkpoint; see `read_with_digest`."""
    return read_with_digest(folder)[1]


def read_with_digest(folder: Path) -> tuple[str, dict[str, Any]]:
    """(SHA-256 of the last checkpoint, its state); the digest is verified, and no code in the file is ever run.

    Raises:
        CheckpointError: there is none, it is damaged, holds more than tensors and plain values, or a NaN.
    """
    digest = current(folder)
    if not digest:
        raise CheckpointError(f"{folder}: holds no checkpoint (No such file or directory)")
    path = folder / f"{digest}.pt"
    try:
        content = read_bytes(path)
    except OSError as error:
        if current(folder) != digest:  # a run that goes on has replaced it
            return read_with_digest(folder)
        raise CheckpointError(f"{path}: the checkpoint cannot be read ({error.strerror})") from error
    found = sha256(content)
    if found != digest:
        raise CheckpointError(
            f"{path}: the checkpoint is damaged: expected SHA-256 {digest[:12]}..., found {found[:12]}... "
            f"({len(content)} bytes). Restore the file from a copy, or train again"
        )
    state = _unpickle_tensors(content, path)
    if what := _wrong_entry(state):
        raise CheckpointError(f"{path}: not the checkpoint of a run: it has no {what}")
    if where := find_nan(state):
        raise CheckpointError(f"{path}: {where} is NaN. Train again, with a smaller learning rate, or restore a copy")
    return digest, state


def parameters_alone(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a finished run with the parameters that `fit` returned, without what further training needs.

    It is saved, loaded and evaluated as any other; `fit(resume=True)` returns the run, and refuses more epochs. The
    first row of the data, on which `load` runs the pair, stays.

    Raises:
        CheckpointError: the run is not finished.
    """
    if not state["finished"]:
        raise CheckpointError(
            f"the run stopped at epoch {state['epoch']}: expected a finished one, whose parameters are kept alone"
        )
    best = state["best"] if state["settings"].get("patience") is not None else None
    returned = best["state"] if best else state["state"]  # one copy of them in the file
    nothing: dict[str, Any] = {"optimizer": {}, "scheduler": None, "objective": None}
    return {**state, **nothing, "state": returned, "best": best and {**best, "state": returned}}


def _wrong_entry(state: Any) -> str:
    """The first entry that a state lacks, or that is not of its type, in words; else empty."""
    if not isinstance(state, dict):
        return repr(min(ENTRIES))
    for name, kinds in sorted(ENTRIES.items()):
        if name not in state or not isinstance(state[name], kinds):
            return repr(name)
    if not isinstance(state.get("identity"), dict | NoneType):
        return "'identity' of a run"
    if not all(isinstance(metrics, dict) for metrics in state["history"]):
        return "'history' of metrics"
    row = state.get("row")
    if not (row is None or (isinstance(row, list) and all(map(_is_dense, row)))):
        return "'row' of data"
    best = state["best"]
    for pair in (state["state"], *([] if best is None else [best.get("state")])):
        for kind in ("params", "buffers"):
            tensors = pair.get(kind) if isinstance(pair, dict) else None
            if not isinstance(tensors, dict) or not all(map(_is_dense, tensors.values())):
                return f"{kind!r} of tensors"
    return ""


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type != "meta"


def find_nan(state: Mapping[str, Any]) -> str:
    """The first parameter or number of an optimizer in a checkpoint's state that is NaN, in words; else empty."""
    return _first_nan({name: state[name] for name in ("state", "best", "optimizer")})


def _first_nan(content: Any, place: str = "", buffers: bool = False) -> str:
    """The first parameter or number of an optimizer that is NaN, in words; buffers may hold NaN as what it is."""
    if isinstance(content, Tensor) and content.is_floating_point() and not buffers:
        count = int(content.isnan().sum())
        return f"{place}, of shape {list(content.shape)}, in {count} numbers," if count else ""
    if isinstance(content, Mapping):
        found = (_first_nan(v, f"{place} {k!r}".strip(), buffers or k == "buffers") for k, v in content.items())
        return next(filter(None, found), "")
    return ""


def _unpickle_tensors(content: bytes, path: Path) -> Any:
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        if memory_failure(error):
            raise
        text = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path}: not a checkpoint of tensors and plain values ({text})") from error


class PairState:
    """Unconstrained parameters and persistent buffers of a pair, under names that are the same in another process."""

    def __init__(self, scope: ParamScope, modules: list[nn.Module]):
        self.scope, self.modules = scope, modules

    def params(self) -> dict[str, Tensor]:
        """Unconstrained parameters by canonical name, in order of first use."""
        names = canonical_names(self.scope.params)
        return {names[name]: p for name, p in self.scope.params.items()}

    def buffers(self) -> dict[str, Tensor]:
        """Persistent buffers (batch norm's running statistics, ...), named by the order in which modules are called."""
        return {
            f"{i}.{type(module).__name__}.{name}": buffer
            for i, module in enumerate(self.modules)
            for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
        }

    def to_canonical(self, optimizer_state: Mapping[str, Any]) -> dict[str, Any]:
        """A PyroOptim's state, keyed by parameter name, with canonical names."""
        names = canonical_names(self.scope.params)
        return {names.get(name, name): value for name, value in optimizer_state.items()}

    def from_canonical(self, optimizer_state: Mapping[str, Any]) -> dict[str, Any]:
        """The same with the names of this process."""
        names = {canonical: name for name, canonical in canonical_names(self.scope.params).items()}
        return {names.get(name, name): value for name, value in optimizer_state.items()}

    def snapshot(self) -> dict[str, dict[str, Tensor]]:
        """A copy of parameters and buffers, on the CPU."""
        return {
            "params": {k: v.detach().cpu().clone() for k, v in self.params().items()},
            "buffers": {k: v.detach().cpu().clone() for k, v in self.buffers().items()},
        }

    def restore(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copies saved values into parameters and buffers, in place.

        Raises:
            CheckpointError: names or shapes differ; the message names the first that does.
        """
        for kind, current in (("params", self.params()), ("buffers", self.buffers())):
            _check_names_and_shapes(kind.removesuffix("s"), current, saved[kind])
            with torch.no_grad():
                for name, tensor in current.items():
                    tensor.copy_(saved[kind][name])


def _check_names_and_shapes(kind: str, current: Mapping[str, Tensor], saved: Mapping[str, Any]) -> None:
    missing, extra = sorted(current.keys() - saved.keys()), sorted(saved.keys() - current.keys())
    if missing or extra:
        raise CheckpointError(
            f"the pair does not fit the checkpoint: expected {kind} {(extra or missing)[0]!r} "
            f"{'from the pair' if extra else 'in the checkpoint'}, found none "
            f"({len(missing)} missing, {len(extra)} unknown). Build the pair as the run did"
        )
    for name, tensor in current.items():
        if tuple(saved[name].shape) != tuple(tensor.shape):
            raise CheckpointError(
                f"the pair does not fit the checkpoint: {kind} {name!r} is expected to have shape "
                f"{list(saved[name].shape)}, found {list(tensor.shape)}. Build the pair as the run did"
            )
