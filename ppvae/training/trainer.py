"""The training loop: epochs of steps, validation, checkpoints, early stopping, resumption."""

import copy
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, final

import pyro
import torch
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from torch import Tensor

from ppvae.compilation.precision import check_precision, faster_precision
from ppvae.data.loader import DataLoader
from ppvae.distributed import DistributedContext
from ppvae.errors import CheckpointError, TrainingError, UsageError
from ppvae.inference.device import choose_device
from ppvae.inference.evaluation_mode import eval_mode
from ppvae.inference.param_store import BoundProgram, starting_scope, unwrap
from ppvae.inference.svi import SVI, Optimizer
from ppvae.inference.tracing import Program
from ppvae.objectives import Objective
from ppvae.objectives.pyro_losses import single_loss
from ppvae.rng import derive_seed, fork_rng, seed_all
from ppvae.run_folder.identity import identity_of
from ppvae.training.checkpoint import PairState
from ppvae.training.example import first_row, read_example, shapes_of
from ppvae.training.folder import RunFolder, check_resumable, identify, read_resumed
from ppvae.training.inspection import check_amortized, check_parameters, inspect_for_training
from ppvae.training.metrics import check_metrics, last_good, step_scheduler
from ppvae.training.progress import Progress
from ppvae.training.run import Run, bind, versions
from ppvae.training.setting_text import renamed_since_0_1
from ppvae.training.step import TrainingStep
from ppvae.training.validation import ValidationMetrics

log = logging.getLogger("ppvae")
Callback = Callable[[Run, dict[str, Any]], Any]
WORTH_CAPTURING = 20.0  # seconds of eager steps


@final
class Trainer:
    """One training run: the state that a checkpoint holds, and the loop over epochs."""

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
        compile: bool | None,
        precision: str,
        rows: int,
    ):
        self.scope = starting_scope(model, guide)
        self.model, self.guide = unwrap(model), unwrap(guide)
        self.objective, self.batch_size, self.seed, self.compile = objective, batch_size, seed, compile
        if isinstance(objective, Objective):
            objective.load_state_dict({})  # schedules start at their first step
        self.directory: Path | None = None
        self.folder: RunFolder | None = None  # on rank 0 of a run that writes files
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.epoch, self.finished, self.stopped = 0, False, False
        self.config: dict[str, Any] = {}
        self.context = DistributedContext()
        self.resumed_kernels: str | None = None
        with self.scope.entered():
            place = choose_device(device, self.model, self.guide, data)
            check_precision(precision, place)
            self.train = DataLoader(data, "data", place)
            self.valid = DataLoader(valid, "valid", place) if valid is not None else None
            if self.valid is not None:
                self.valid.check_shapes(self.train)
            self.structure, modules = inspect_for_training(
                self.model, self.guide, self.train, batch_size, objective, move_modules=device is not None
            )
            if self.valid is not None:
                check_amortized(modules, self.structure)
            self.state = PairState(self.scope, modules)
            self.monitor = ValidationMetrics(
                self.model, self.guide, self.structure, self.valid or self.train, self.valid is not None, seed
            )
            self.svi = SVI(self.model, self.guide, optimizer, single_loss(objective))
            self.svi.precision = precision
            self.svi.add_params(self.scope.params.values())
            self.step = TrainingStep(self.svi, self.state, self.structure, clip, rows)
        check_parameters(self.scope, model, guide)
        if scheduler is not None and self.svi.optimizer is None:
            raise UsageError("scheduler: expected a torch optimizer, found a PyroOptim; use pyro.optim's schedulers")
        self.scheduler = scheduler(self.svi.optimizer) if scheduler is not None and self.svi.optimizer else None

    def configure(self, settings: dict[str, Any], entries: dict[str, Any]) -> None:
        """Sets the resolved configuration: versions, settings, shapes of a batch, further entries."""
        example = read_example(self.train, self.structure.draws_subsample, self.seed)
        self.row = first_row(example)
        self.config = {"versions": versions(), "fit": settings, "batch": shapes_of(example), **entries}

    def open(self, directory: Path, resume: bool, epochs: int, stack: ExitStack) -> None:
        """Opens a run folder: a new one or, with `resume`, one whose settings are the same, whose state is restored.

        Its lock is held until the stack ends. A finished run is neither locked nor written to.
        """
        self.directory = directory
        self.step.checkpoints = directory / "checkpoints"
        identify(self.config)
        digest, saved = read_resumed(directory, resume)
        if saved is not None:
            self.load_state_dict(saved)
            check_resumable(directory, self.config, saved, epochs)
            if self.stopped or self.epoch >= epochs:
                return  # finished: no file is changed
        elif resume and self.context.is_rank_zero:
            log.warning("ppvae: no checkpoint in %s: a new run is started", directory)
        self.context.barrier()  # until all ranks have read
        if self.context.is_rank_zero:
            self.folder = RunFolder(directory, self.config, self.history, digest, stack)

    def broadcast_parameters(self) -> None:
        with self.scope.entered():
            tensors = [*self.state.params().values(), *self.state.buffers().values()]
            self.context.broadcast_from_rank_zero(tensors)

    def state_dict(self) -> dict[str, Any]:
        joint, scheduler = self.svi.optimizer, self.scheduler
        schedule = scheduler.state_dict() if scheduler is not None else None
        with self.scope.entered():
            return {
                "state": self.state.snapshot(),
                "epoch": self.epoch,
                "step": self.step.count,
                "history": self.history,
                "best": self.best,
                "finished": self.finished,
                "stopped": self.stopped,
                "optimizer": joint.state_dict() if joint else self.state.to_canonical(self.svi.optim.get_state()),
                "objective": self.objective.state_dict() if isinstance(self.objective, Objective) else None,
                "scheduler": schedule and {k: copy.copy(v) for k, v in schedule.items() if not callable(v)},
                "settings": self.config["fit"],
                "row": self.row,
                "identity": identity_of(self.config),
                **self.svi.computation(),
            }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restores the state of a checkpoint; raises CheckpointError where its settings differ."""
        for key, value in self.config["fit"].items():
            before = renamed_since_0_1(saved["settings"].get(key))
            if before != value:
                raise CheckpointError(
                    f"{self.directory}: cannot resume with {key} = {value!r}: the run was started with {before!r}"
                )
        with self.scope.entered():
            self.state.restore(saved["state"])
            self.epoch, self.step.count, self.history = saved["epoch"], saved["step"], saved["history"]
            self.best, self.stopped = saved["best"], saved["stopped"]
            self.resumed_kernels = self.config["kernels"] = saved.get("kernels", "eager")
            self.svi.restore_computation(saved)
            if not saved["optimizer"]:
                return  # parameters alone, of a finished run
            if self.svi.optimizer is not None:
                self.svi.optimizer.load_state_dict(saved["optimizer"])
            elif isinstance(self.svi.optim, PyroOptim):
                self.svi.optim.set_state(self.state.from_canonical(saved["optimizer"]))
            if self.scheduler is not None:
                self.scheduler.load_state_dict(saved["scheduler"])
            if isinstance(self.objective, Objective):
                self.objective.load_state_dict(saved["objective"])

    def run(
        self,
        epochs: int,
        patience: int | None,
        checkpoint_seconds: float,
        callbacks: Sequence[Callback],
        progress: bool | None,
    ) -> Run:
        """Trains up to the given number of epochs, and returns the run."""
        bound = BoundProgram(self.model, self.scope), BoundProgram(self.guide, self.scope)
        run = Run(*bound, self.history, self.directory, self.config)
        if self.epoch < epochs and not self.stopped:
            first = self.context.is_rank_zero
            bar = Progress(epochs, self.epoch, progress if first else False, self.directory if first else None)
            with self.scope.entered(), bar:
                self._run_epochs(run, bar, epochs, patience, checkpoint_seconds, callbacks)
        if patience is not None and self.best is not None:
            with self.scope.entered():
                self.state.restore(self.best["state"])
        s = self.structure
        run.model, run.guide = bind(self.model, self.guide, self.scope, s.model_params, s.guide_params)
        return run

    def _run_epochs(
        self, run: Run, bar: Progress, epochs: int, patience: int | None, seconds: float, callbacks: Sequence[Callback]
    ) -> None:
        self._warm_up()
        self._choose_kernels(epochs)
        self.step.start = self.state.snapshot()
        saved_at = time.monotonic()
        while self.epoch < epochs and not self.stopped:
            metrics = self._run_epoch()
            self.history.append(metrics)
            bar.show(metrics)
            improved = self._update_best(metrics)
            best_epoch = self.best["epoch"] if self.best is not None else 0
            self.stopped = patience is not None and not improved and self.epoch - best_epoch >= patience
            for callback in callbacks:
                self.stopped = bool(callback(run, metrics)) or self.stopped
                check_metrics(metrics, self.step.checkpoints, " of a callback")
            self.stopped = self.context.any_rank(self.stopped)
            self.finished = self.stopped or self.epoch == epochs
            if self.folder is not None:
                self.folder.append_metrics(metrics)
                if self.finished or time.monotonic() - saved_at >= seconds:
                    self.folder.save_checkpoint(self.state_dict())
                    saved_at = time.monotonic()

    def _run_epoch(self) -> dict[str, Any]:
        start = time.perf_counter()
        seed_all(derive_seed(self.seed, self.epoch, "noise", *self.context.noise_key))
        steps, sizes = [], []
        with pyro.validation_enabled(False), self.svi.uninterrupted():  # each step checks loss and gradient
            for rows, batch in self._batches():
                shard = batch if self.structure.draws_subsample else self.context.shard_batch(batch)
                steps.append(self.step(shard, self.epoch + 1, rows))
                sizes.append(self.structure.batch_size(batch))
        try:
            losses_and_norms = self.step.end_epoch(steps, self.epoch + 1)
        except TrainingError:
            self.state.restore(self.step.start)
            raise
        self.epoch += 1
        self._synchronize_ranks()
        self._record_kernels()
        metrics: dict[str, Any] = {
            "epoch": self.epoch,
            "step": self.step.count,
            "loss": sum(loss * size for (loss, _), size in zip(losses_and_norms, sizes, strict=True)) / sum(sizes),
            "grad_norm": sum(norm for _, norm in losses_and_norms) / len(losses_and_norms),
        }
        if isinstance(self.objective, Objective):
            metrics |= self.objective.scheduled_values()
        metrics |= self._validate()
        if self.svi.optimizer is not None:
            metrics["lr"] = self.svi.optimizer.param_groups[0]["lr"]
        check_metrics(metrics, self.step.checkpoints)
        metric = -metrics[self.monitor.key] if self.monitor.has_elbo else metrics["loss"]
        step_scheduler(self.svi, self.scheduler, metric)
        return metrics | {"seconds": round(time.perf_counter() - start, 4)}

    def _batches(self) -> Iterator[tuple[Tensor | None, tuple[Tensor, ...]]]:
        """The rows of each batch, None where a plate draws them, and the batch."""
        s, size = self.structure, self.context.size
        if s.draws_subsample:
            return itertools.repeat((None, self.train.read_all()), math.ceil(s.full_size / s.subsample_size / size))
        order = self.train.order(self.batch_size, self.seed, self.epoch, size)
        return zip(order, self.train.batches(order), strict=True)

    def _synchronize_ranks(self) -> None:
        """Checks that parameters are equal on all ranks, and copies buffers and the objective's state of rank 0."""
        if self.context.size == 1:
            return
        self.context.check_same_parameters(list(self.state.params().values()))
        self.context.broadcast_from_rank_zero(list(self.state.buffers().values()))
        if isinstance(self.objective, Objective):
            state = self.context.broadcast_state_from_rank_zero(self.objective.state_dict())
            self.objective.load_state_dict(state)

    def _validate(self) -> dict[str, float]:
        """The monitor's metrics; where parameters or metrics are not finite, those of the epoch before are restored."""
        try:
            nonfinite = [n for n, p in self.state.params().items() if not bool(torch.isfinite(p).all())]
            what = f"parameter {nonfinite[0]!r} is not finite after the optimizer's step" if nonfinite else ""
            if not what:
                products = self.svi.products if self.svi.kernels == "compiled" else None
                metrics = self.monitor(self.model, self.guide, products)
                what = next((f"{name} is nan" for name, value in metrics.items() if math.isnan(value)), "")
        except (ValueError, RuntimeError) as error:
            what = f"the ELBO of the {self.monitor.prefix} data failed: {' '.join(str(error).split())[:160]}"
            self.state.restore(self.step.start)
            self.monitor(self.model, self.guide)  # raises again, unless the epoch's steps are why it failed
        if what:
            self.state.restore(self.step.start)
            raise TrainingError(
                f"step {self.step.count} (epoch {self.epoch}): {what}; the parameters are put back to the epoch "
                f"before{last_good(self.step.checkpoints)}. Try a smaller learning rate or clip"
            )
        self.step.start = self.state.snapshot()
        return metrics

    def _update_best(self, metrics: dict[str, Any]) -> bool:
        """Whether the validation ELBO is the best so far; its parameters are then kept."""
        value = metrics.get("valid_elbo")
        if value is None or not math.isfinite(value) or (self.best is not None and value <= self.best["elbo"]):
            return False
        self.best = {"epoch": self.epoch, "elbo": value, "state": self.state.snapshot()}
        return True

    def _warm_up(self) -> None:
        """Evaluates the objective once, so that its own inspection of the pair draws no noise of an epoch."""
        with fork_rng(), eval_mode(self.model, self.guide), torch.no_grad(), pyro.validation_enabled(False):
            self.svi.objective.loss(self.model, self.guide, *self._first_micro_batches()[0])

    def _first_micro_batches(self) -> list[tuple[Tensor, ...]]:
        rows = torch.arange(min(self.batch_size, len(self.train)), device=self.train.device)
        batch = self.train.read_all() if self.structure.draws_subsample else self.train.read(rows)
        return self.step.micro_batches(batch)

    def _choose_kernels(self, epochs: int) -> None:
        """Sets precision and kernels of steps: those of the resumed run, those asked for, or what is faster."""
        if self.svi.precision == "auto":
            self.svi.precision = faster_precision(self._warm_up, True, self.context.any_rank)
        if self.compile is False:
            return
        if self.resumed_kernels is not None:
            self.svi.use(self.resumed_kernels, settled=True)
        elif self.compile:
            self.svi.use("compiled")
        elif (seconds := self._estimate_eager_seconds(epochs)) > WORTH_CAPTURING:
            self.svi.use("compiled", seconds)

    def _estimate_eager_seconds(self, epochs: int) -> float:
        """The time that gradients of all remaining steps would take eagerly: about three times the loss alone."""
        start = time.perf_counter()
        self._warm_up()
        seconds = time.perf_counter() - start
        with fork_rng():
            seconds *= len(self._first_micro_batches())
        rows = self.structure.subsample_size if self.structure.draws_subsample else self.batch_size
        return 3 * seconds * (epochs - self.epoch) * math.ceil(len(self.train) / rows)

    def _record_kernels(self) -> None:
        if self.config.get("kernels") != self.svi.kernels:
            self.config["kernels"] = self.svi.kernels
            if self.folder is not None:
                self.folder.write_config(self.config)
