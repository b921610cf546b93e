"""A trained run: the pair bound to its parameters, and its history; a run is loaded from its folder."""

from __future__ import annotations

import copy
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ppvae.errors import CheckpointError, UsageError
from ppvae.inference.contract.registration import CheckRegistration
from ppvae.inference.evaluation_mode import eval_mode, reachable_modules, record_modules
from ppvae.inference.inspection import params_of
from ppvae.inference.param_store import BoundProgram, ParamScope, bind_pair, from_param_store, record_trained, unwrap
from ppvae.inference.structure import Structure
from ppvae.inference.tracing import Program, trace_pair
from ppvae.rng import fork_rng
from ppvae.run_folder.identity import CHECKPOINT, CODE, RUN_ID, check_identity
from ppvae.training import checkpoint
from ppvae.training.checkpoint import PairState
from ppvae.training.example import batch_like
from ppvae.training.folder import read_config

Params = Mapping[str, torch.Tensor]  # of one side, by name


class _DetachedCopies(TorchFunctionMode):
    """Copies a tensor that depends on parameters, as a Pyro guide's record of its model holds them, by its value."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[1].setdefault(id(args[0]), args[0].detach().clone())
        return func(*args, **(kwargs or {}))


@dataclass
class Run:
    """A trained pair.

    Attributes:
        model, guide: the pair bound to this run's parameters; call, evaluate and sample them like the bare pair. Plain
            functions are bound to those of the run that trained them, or else to Pyro's param store as it is now.
        history: a dict of metrics per epoch, nats per datum.
        directory: the run folder, or None.
        config: the resolved configuration.
        stopped: the epoch at which an unfinished run stopped, in words; empty for a finished one.
        checkpoint: the SHA-256 of the checkpoint that a loaded run was read from.
    """

    model: BoundProgram
    guide: BoundProgram
    history: list[dict[str, Any]] = field(repr=False)
    directory: Path | None = None
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    stopped: str = ""
    checkpoint: str = ""

    def __post_init__(self) -> None:
        for name, side in (("model", self.model), ("guide", self.guide)):
            if not callable(side):
                raise UsageError(f"{name}: expected a function with sample statements, found {type(side).__name__}")
        sides = bind_pair(self.model, self.guide)
        of_store = from_param_store(*sides)
        self.model, self.guide = (
            side if isinstance(side, BoundProgram) else other for side, other in zip(sides, of_store, strict=True)
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
        copied = memo[id(self)] = copy.copy(self)
        with _DetachedCopies():
            for program in (self.model, self.guide):  # before the scope, which holds the parameters of their modules
                copy.deepcopy(program.function, memo)
            copied.__dict__.update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return copied

    @property
    def metrics(self) -> dict[str, Any]:
        """The last epoch's metrics."""
        return self.history[-1] if self.history else {}

    @property
    def pair(self) -> Any:
        """The object whose method the model is, with its other methods, such as a `VAE` or `SemiSupervisedVAE`.

        Raises UsageError for a model that is a plain function.
        """
        owner = getattr(self.model.function, "__self__", None)
        if owner is None:
            raise UsageError(f"pair: expected a model that is the method of an object, found {self.model.__name__!r}")
        return owner

    @property
    def origin(self) -> dict[str, str]:
        """The identity of run and checkpoint, as results of the run carry it; empty where there is none."""
        found = {RUN_ID: self.config.get(RUN_ID, ""), CHECKPOINT: self.checkpoint}
        return {name: value for name, value in found.items() if value}


def bind(
    model: Callable[..., Any], guide: Callable[..., Any], scope: ParamScope, of_model: Params, of_guide: Params
) -> tuple[BoundProgram, BoundProgram]:
    """The pair bound to a scope, which the bare functions that have parameters of it then use as well."""
    scope.record_end_of_run()
    scope.forget_weak_references()
    for side, own, others in ((model, of_model, of_guide), (guide, of_guide, of_model)):
        if own or scope.params.keys() - others.keys():
            record_trained(side, scope)
    return BoundProgram(model, scope), BoundProgram(guide, scope)


def versions() -> dict[str, str]:
    """The versions of libraries and machine, on which a result depends besides its settings."""
    import numpy
    import pyro

    return {
        "ppvae": sys.modules["ppvae"].__version__,
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }


def load(
    directory: str | Path,
    model: Program | None = None,
    guide: Program | None = None,
    best: bool | None = None,
    dtype: torch.dtype | None = None,
    trust: bool = False,
) -> Run:
    """Loads a run. One started from a factory rebuilds its pair; otherwise pass the pair. Names and shapes are checked.

    Args:
        directory: the run folder.
        model, guide: the pair, built as the run built it.
        best: take the parameters with the best validation ELBO instead of the last ones; by default what `fit`
            returned: the best where the run had `patience`, else the last.
        dtype: a floating type for parameters, buffers and what a factory makes, instead of the run's own. Tensors that
            the pair makes as it runs are of torch's default dtype: set it, too, where the pair is called.
        trust: run the Python files that the run names, and remember that you trust them. Files that you trained with
            on this machine, and ppvae's own factories, need no trust.

    Results in the folder are not read, so that a run can be evaluated again where one of them is damaged.

    Raises:
        CheckpointError: no run, a damaged checkpoint, or a pair that does not fit; UsageError: a pair is needed, or a
        file that the run names is not trusted.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UsageError(f"dtype: expected a floating type such as torch.float64, found {dtype!r}")
    folder = Path(directory)
    config = read_config(folder)
    digest, saved = checkpoint.read_with_digest(folder / "checkpoints")
    check_identity(folder, config, saved)
    if model is None or guide is None:
        if "pair" not in config:
            raise UsageError(f"{folder}: the run was not started from a factory: call load(directory, model, guide)")
        from ppvae.factories.pairs import rebuild

        with fork_rng(), default_dtype(dtype):
            model, guide = rebuild(config, dtype, folder, trust, saved.get("identity", {}).get(CODE))
    model, guide = unwrap(model), unwrap(guide)
    if best is None:
        best = config["fit"]["patience"] is not None and saved["best"] is not None
    scope = ParamScope()
    batch = tuple(cast_floating(t, dtype) for t in batch_like(config["batch"], saved.get("row")))
    for module in reachable_modules(model, guide) if dtype else ():
        module.to(dtype)
    with (
        scope.entered(), fork_rng(), default_dtype(dtype), torch.no_grad(), record_modules(model, guide) as modules
    ):  # fmt: skip
        with eval_mode(model, guide), CheckRegistration(create=True) as registration:
            of_model, of_guide = map(params_of, trace_pair(model, guide, batch, Structure(), {}))
        registration.store_module_local()
        if dtype is not None:  # parameters and buffers that the pair makes with a type of their own
            for tensor in (*scope.params.values(), *(b for module in modules for b in module.buffers(recurse=False))):
                tensor.data = cast_floating(tensor.data, dtype)
        state = PairState(scope, modules)
        if best and saved["best"] is None:
            raise CheckpointError(
                f"{folder}: no parameters are best: the run had no validation data, or the last ones were kept alone"
            )
        state.restore(saved["best"]["state"] if best else saved["state"])
    bound_model, bound_guide = bind(model, guide, scope, of_model, of_guide)
    finished = saved["stopped"] or saved["epoch"] >= config.get("epochs", 0)
    stopped = "" if finished else f"the run stopped at epoch {saved['epoch']} of {config['epochs']}"
    return Run(bound_model, bound_guide, saved["history"], folder, config, stopped, digest)


@contextmanager
def default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Sets torch's default floating type inside the block; None leaves it as it is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def cast_floating(value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """The tensor in a floating type; integers, and any tensor where the type is None, are returned as they are."""
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value
