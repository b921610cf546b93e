"""One training run: the state that a checkpoint holds, and the loop over it."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, final

import pyro
import torch
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor

from ppvae.compilation.precision import check_precision
from ppvae.data.loader import Columns
from ppvae.errors import CheckpointError, ContractError, PpvaeError, TrainingError, UsageError
from ppvae.inference.evaluation_mode import eval_mode
from ppvae.inference.param_store import BoundProgram, ParamScope, unwrap
from ppvae.inference.svi import SVI, Optimizer
from ppvae.inference.tracing import Program
from ppvae.objectives import Objective
from ppvae.rng import derive_seed, fork_rng, seed_all
from ppvae.storage import write_bytes, write_json
from ppvae.training import checkpoint
from ppvae.training.checkpoint import PairState
from ppvae.training.data_parallel import DataParallel
from ppvae.training.inspection import inspect_for_training, parameter_device
from ppvae.training.progress import Progress
from ppvae.training.run import Run, bind
from ppvae.training.step import Number, TrainingStep
from ppvae.training.validation import ValidationMonitor

Callback = Callable[[Run, dict[str, Any]], Any]
WORTH_CAPTURING = 20.0  # seconds of eager steps


@final
class Trainer:
    """One training run: the state that a checkpoint holds, and the loop over it."""

    def __init__(
        self,
        model: Program,
        guide: Program,
        data: Any,
        valid: Any,
        objective: ELBO,
        optimizer: Optimizer,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None,
        batch_size: int,
        seed: int,
        device: str | torch.device | None,
        clip: float | None,
        precision: str,
        rows: int,
    ):
        start = model.scope if isinstance(model, BoundProgram) else None
        self.model, self.guide = unwrap(model), unwrap(guide)
        self.scope = ParamScope(start)
        self.objective, self.batch_size, self.seed = objective, batch_size, seed
        if isinstance(objective, Objective):
            objective.load_state_dict({})  # a run begins with its schedules' first step
        self.folder: Path | None = None
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.epoch = 0
        self.finished = self.stopped = self._saved = False
        self.config: dict[str, Any] = {}
        self.processes = DataParallel()
        self.compile: bool | None = None
        self.kernels: str | None = None  # of the run that is resumed
        with self.scope.activate():
            place = torch.device(device) if device is not None else parameter_device(self.model, self.guide, data)
            check_precision(precision, place)
            self.train = Columns(data, "data", place)
            self.valid = Columns(valid, "valid", place) if valid is not None else None
            if self.valid is not None:
                self.valid.check_like(self.train)
            self.structure, modules = inspect_for_training(
                self.model, self.guide, self.train, batch_size, objective, place, move=device is not None
            )
            for module in modules if self.valid is not None else ():
                if getattr(module, "of_its_data_alone", False):
                    raise UsageError(
                        f"valid: {type(module).__name__} has parameters for the training data alone; leave valid "
                        f"out, and refit for an ELBO of other data"
                    )
            self.state = PairState(self.scope, modules)
            self.monitor = ValidationMonitor(
                self.model, self.guide, self.structure, self.valid or self.train, self.valid is not None, seed
            )
            self.svi = SVI(self.model, self.guide, optimizer, objective)
            self.svi.precision = precision
            self.svi.take_up(self.scope.params.values())
            self.take_step = TrainingStep(self.svi, self.state, self.structure, clip, rows)
        if not self.scope.params:
            raise ContractError(
                "the pair registers no parameters: expected pyro.module or pyro.param in model or guide, found none; "
                "there is nothing to train"
            )
        if scheduler is not None and self.svi.optimizer is None:
            raise UsageError("scheduler: expected a torch optimizer, found a PyroOptim; use pyro.optim's schedulers")
        self.scheduler = scheduler(self.svi.optimizer) if scheduler is not None and self.svi.optimizer else None

    def describe(self, settings: dict[str, Any], extra: dict[str, Any]) -> None:
        """Notes the resolved configuration."""
        from ppvae.training.run import versions

        first = (
            self.train.whole() if self.structure.draws_subsample else self.train.read(torch.arange(2) % len(self.train))
        )
        batch = [[list(t.shape), str(t.dtype).removeprefix("torch.")] for t in first]
        self.config = {"versions": versions(), "fit": settings, "batch": batch, **extra}

    def open(self, folder: Path, resume: bool, epochs: int) -> None:
        """Takes a run folder: a new one, or, to resume, one whose settings are the same."""
        self.folder = folder
        self.take_step.checkpoints = checkpoints = folder / "checkpoints"
        if checkpoint.exists(checkpoints):
            if not resume:
                raise CheckpointError(
                    f"{folder}: holds a run already; pass resume=True (--resume) to go on, or choose another folder"
                )
            self._restore(checkpoint.read(checkpoints), self.config["fit"])
            if self.stopped or self.epoch >= epochs:
                return  # finished: there is nothing to do, and nothing is touched
        self.processes.wait()  # until all have read
        if not self.processes.first:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{folder}: could not be made ({error.strerror})") from error
        write_json(folder / "config.json", self.config)
        self._rewrite_metrics()

    def join(self) -> None:
        """Begins with the same parameters in every process that trains together with this one."""
        with self.scope.activate():
            tensors = [*self.state.params().values(), *self.state.buffers().values()]
            self.processes.start_from_the_first(tensors)

    def _restore(self, saved: dict[str, Any], settings: dict[str, Any]) -> None:
        for key, value in settings.items():
            before = saved["settings"].get(key)
            if before != value:
                raise CheckpointError(
                    f"{self.folder}: cannot resume with {key} = {value!r}: the run was started with {before!r}"
                )
        with self.scope.activate():
            self.state.put(saved["state"])
            self.epoch, self.take_step.taken, self.history = saved["epoch"], saved["step"], saved["history"]
            self.best, self.stopped = saved["best"], saved["stopped"]
            self.kernels = self.config["kernels"] = saved.get("kernels", "eager")
            self.svi.products = saved.get("products", {})
            if self.svi.optimizer is not None:
                self.svi.optimizer.load_state_dict(saved["optimizer"])
            elif isinstance(self.svi.optim, PyroOptim):
                self.svi.optim.set_state(self.state.renamed(saved["optimizer"], back=True))
            if self.scheduler is not None:
                self.scheduler.load_state_dict(saved["scheduler"])
            if isinstance(self.objective, Objective):
                self.objective.load_state_dict(saved["objective"])

    def _checkpoint(self) -> None:
        assert self.folder is not None
        optim = self.svi.optimizer
        with self.scope.activate():
            saved_optim = optim.state_dict() if optim is not None else self.state.renamed(self.svi.optim.get_state())
        state = {
            "state": self.state.copy(),
            "epoch": self.epoch,
            "step": self.take_step.taken,
            "history": self.history,
            "best": self.best,
            "finished": self.finished,
            "stopped": self.stopped,
            "optimizer": saved_optim,
            "objective": self.objective.state_dict() if isinstance(self.objective, Objective) else None,
            "scheduler": _plain(self.scheduler.state_dict()) if self.scheduler is not None else None,
            "settings": self.config["fit"],
            "kernels": self.svi.kernels,
            "products": self.svi.products,
        }
        if not self._saved:
            checkpoint.check(state)
            self._saved = True
        checkpoint.save(self.folder / "checkpoints", state)

    def run(
        self,
        epochs: int,
        patience: int | None,
        checkpoint_seconds: float,
        callbacks: Sequence[Callback],
        progress: bool | None,
    ) -> Run:
        """Trains up to the given number of epochs, and returns the run."""
        run = Run(
            BoundProgram(self.model, self.scope),
            BoundProgram(self.guide, self.scope),
            self.history,
            self.folder,
            self.config,
        )
        if self.epoch < epochs and not self.stopped:
            first = self.processes.first
            shown = Progress(epochs, self.epoch, progress if first else False, self.folder if first else None)
            with self.scope.activate(), shown as bar:
                self._train(run, bar, epochs, patience, checkpoint_seconds, callbacks)
        if patience is not None and self.best is not None:
            with self.scope.activate():
                self.state.put(self.best["state"])
        run.model, run.guide = bind(self.model, self.guide, self.scope)
        return run

    def _train(
        self, run: Run, bar: Any, epochs: int, patience: int | None, seconds: float, callbacks: Sequence[Callback]
    ) -> None:
        self._warm_up()
        self._choose_kernels(epochs)
        self._good = self.state.copy()
        saved_at = time.monotonic()
        while self.epoch < epochs and not self.stopped:
            metrics = self._epoch()
            self.history.append(metrics)
            bar.show(metrics)
            improved = self._note_best(metrics)
            self.stopped = patience is not None and not improved and self.epoch - self._best_epoch() >= patience
            for callback in callbacks:
                self.stopped = bool(callback(run, metrics)) or self.stopped
            (stopped,) = self.processes.added([float(self.stopped)], [], failed=False)
            self.stopped = stopped > 0
            self.finished = self.stopped or self.epoch == epochs
            if self.folder is not None and self.processes.first:
                self._append_metrics(metrics)
                if self.finished or time.monotonic() - saved_at >= seconds:
                    self._checkpoint()
                    saved_at = time.monotonic()

    def _warm_up(self) -> None:
        """Lets the objective look at the pair now: what it does only once must not fall into the noise of an epoch."""
        quiet = pyro.validation_enabled(False)  # as in an epoch
        with fork_rng(), eval_mode(self.model, self.guide), torch.no_grad(), quiet:
            self.objective.loss(self.model, self.guide, *self._first_parts()[0])

    def _first_parts(self) -> list[tuple[Tensor, ...]]:
        """A batch, as a step cuts it."""
        rows = torch.arange(min(self.batch_size, len(self.train))).to(self.train.device)
        return self.take_step.parts(self.train.whole() if self.structure.draws_subsample else self.train.read(rows))

    def _choose_kernels(self, epochs: int) -> None:
        """Says how steps are computed: as in the run that is resumed, as asked for, or as pays for what is left."""
        if self.compile is False:
            return
        if self.kernels is not None:
            self.svi.use(self.kernels, settled=True)
        elif self.compile:
            self.svi.use("compiled")
        elif (seconds := self._eager_seconds(epochs)) > WORTH_CAPTURING:
            self.svi.use("compiled", seconds)

    def _note_kernels(self, kernels: str) -> None:
        if self.config.get("kernels") != kernels:
            self.config["kernels"] = kernels
            if self.folder is not None and self.processes.first:
                write_json(self.folder / "config.json", self.config)

    def _eager_seconds(self, epochs: int) -> float:
        """About how long the gradients of the steps to come would take as things are: thrice the loss alone."""
        start = time.perf_counter()
        self._warm_up()
        seconds = time.perf_counter() - start
        with fork_rng():
            seconds *= len(self._first_parts())
        rows = self.structure.subsample_size if self.structure.draws_subsample else self.batch_size
        return 3 * seconds * (epochs - self.epoch) * math.ceil(len(self.train) / rows)

    def _batches(self) -> Iterator[tuple[Tensor, ...]]:
        if not self.structure.draws_subsample:
            yield from self.train.batches(self.batch_size, self.seed, self.epoch, self.processes.size)
            return
        whole = self.train.whole()
        for _ in range(math.ceil(self.structure.full_size / self.structure.subsample_size / self.processes.size)):
            yield whole

    def _epoch(self) -> dict[str, Any]:
        start = time.perf_counter()
        seed_all(derive_seed(self.seed, self.epoch, "noise", *self.processes.key))
        steps, counts = [], []
        with pyro.validation_enabled(False):  # the contract was checked; the NaN policy looks at every step
            for batch in self._batches():
                rows = self.structure.batch_size(batch)
                part = batch if self.structure.draws_subsample else self.processes.part(batch)
                steps.append(self.take_step(part, self.epoch + 1))
                counts.append(rows)
        found = self._looked_at(steps)
        self.epoch += 1
        self._stay_together()
        self._note_kernels(self.svi.kernels)
        rate = self.svi.optimizer.param_groups[0]["lr"] if self.svi.optimizer is not None else None
        loss = sum(loss * rows for (loss, _), rows in zip(found, counts, strict=True)) / sum(counts)
        norm = sum(norm for _, norm in found) / len(found)
        metrics = {"epoch": self.epoch, "step": self.take_step.taken, "loss": loss, "grad_norm": norm}
        if isinstance(self.objective, Objective):
            metrics |= self.objective.scheduled()
        metrics |= self._watched()
        self._schedule(-metrics[self.monitor.key] if self.monitor.has_elbo else metrics["loss"])
        if rate is not None:
            metrics["lr"] = rate
        metrics["seconds"] = round(time.perf_counter() - start, 4)
        return metrics

    def _looked_at(self, steps: Sequence[tuple[Number, Number]]) -> list[tuple[float, float]]:
        """The losses and norms of an epoch; parameters that a step has broken unseen are put back as they were."""
        try:
            return self.take_step.looked_at(steps, self.epoch + 1)
        except TrainingError:
            self.state.put(self._good)
            raise

    def _stay_together(self) -> None:
        """Makes sure that the processes have the same parameters, and gives all what the first has gathered besides."""
        if self.processes.size == 1:
            return
        self.processes.check_same(list(self.state.params().values()))
        self.processes.start_from_the_first(list(self.state.buffers().values()))
        if isinstance(self.objective, Objective):
            self.objective.load_state_dict(self.processes.of_the_first(self.objective.state_dict()))

    def _watched(self) -> dict[str, float]:
        """The monitor's metrics; parameters that an update or the data has broken are put back as they were."""
        try:
            broken = [n for n, p in self.state.params().items() if not bool(torch.isfinite(p).all())]
            what = f"parameter {broken[0]!r} is not finite after the optimizer's step" if broken else ""
            if not what:
                products = self.svi.products if self.svi.kernels == "compiled" else None
                metrics = self.monitor(self.model, self.guide, products)
        except PpvaeError:
            raise
        except (ValueError, RuntimeError) as error:
            what = f"the ELBO of the {self.monitor.prefix} data failed: {' '.join(str(error).split())[:160]}"
        if what:
            self.state.put(self._good)
            raise TrainingError(
                f"step {self.take_step.taken} (epoch {self.epoch}): {what}; the parameters are put back to the epoch "
                f"before. Try a smaller learning rate or clip"
            )
        self._good = self.state.copy()
        return metrics

    def _schedule(self, metric: float) -> None:
        """Takes a step of whatever schedule there is; one that waits for a plateau looks at the metric."""
        if isinstance(self.svi.optim, PyroLRScheduler):
            waits = self.svi.optim.pt_scheduler_constructor is torch.optim.lr_scheduler.ReduceLROnPlateau
            self.svi.optim.step(*([metric] if waits else []))
        elif isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(metric)
        elif self.scheduler is not None:
            self.scheduler.step()

    def _note_best(self, metrics: dict[str, Any]) -> bool:
        value = metrics.get("valid_elbo")
        if value is None or not math.isfinite(value) or (self.best is not None and value <= self.best["elbo"]):
            return False
        self.best = {"epoch": self.epoch, "elbo": value, "state": self.state.copy()}
        return True

    def _best_epoch(self) -> int:
        return self.best["epoch"] if self.best is not None else 0

    def _append_metrics(self, metrics: dict[str, Any]) -> None:
        assert self.folder is not None
        path = self.folder / "metrics.jsonl"
        try:
            with open(path, "a") as file:
                file.write(json.dumps(metrics) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"{path}: could not be written ({error.strerror}); the last checkpoint is kept"
            ) from error

    def _rewrite_metrics(self) -> None:
        """The file holds what the checkpoint knows: epochs after it will be run again."""
        assert self.folder is not None
        text = "".join(json.dumps(m) + "\n" for m in self.history)
        write_bytes(self.folder / "metrics.jsonl", text.encode())


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's state without the functions it may hold."""
    return {k: copy.copy(v) for k, v in state.items() if not callable(v)}
