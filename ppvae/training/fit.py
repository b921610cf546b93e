"""Training a pair with stochastic variational inference."""

import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from pyro.infer import ELBO, Trace_ELBO
from pyro.optim import PyroOptim
from torch import Tensor

from ppvae.compilation.precision import check_precision
from ppvae.compilation.process_setup import warn_of_busy_cores
from ppvae.data.admission import admit, check_argument_order, check_batch_size
from ppvae.data.loader import column_digests
from ppvae.errors import UsageError
from ppvae.errors.calls import explain_call
from ppvae.errors.memory import explain_out_of_memory
from ppvae.errors.ranges import check_numbers, check_ranges
from ppvae.inference.device import choose_device, default_device
from ppvae.inference.svi import Optimizer
from ppvae.inference.tracing import Program
from ppvae.objectives.pyro_losses import as_elbo
from ppvae.rng import fork_all_rngs
from ppvae.training.run import Run
from ppvae.training.setting_text import setting_text
from ppvae.training.trainer import Callback, Trainer

_adam = functools.partial(torch.optim.Adam, lr=1e-3)


@explain_call
def fit(
    model: Program,
    guide: Program,
    data: Any,
    *,
    valid: Any = None,
    objective: ELBO | Callable[..., Tensor] | None = None,
    optimizer: Optimizer = _adam,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    epochs: int,
    batch_size: int = 100,
    seed: int = 0,
    device: str | torch.device | None = None,
    directory: str | Path | None = None,
    resume: bool = False,
    compile: bool | None = None,
    precision: str = "float32",
    rows: int = 20_000,
    clip: float | None = None,
    patience: int | None = None,
    checkpoint_seconds: float = 10.0,
    callbacks: Sequence[Callback] = (),
    progress: bool | None = None,
    config: dict[str, Any] | None = None,
) -> Run:
    """Trains a model/guide pair by stochastic variational inference, by default on Pyro's `Trace_ELBO`.

    Loss and gradient are divided by the number of data that they represent, so that learning rate, eps and clipping do
    not depend on the batch; every metric is in nats per datum. In a `torch.distributed` group (`torchrun`) each batch
    is sharded over the ranks, and parameters stay equal on all of them; rank 0 writes the run folder.

    Args:
        data: a tensor [N, *event], a split, or a tuple of them; the pair is called as model(*batch). Arrays, tables,
            sparse matrices, lists, data sets and loaders are taken too, in the precision that they have
            (`ppvae.data`). In data marked by `data.with_missing`, NaN is a missing value.
        valid: held-out data of the same kind. Its ELBO (beta = 1, fixed noise) is reported every epoch; where latents
            are shared by all data, given a draw of these: a lower bound on the predictive log-density of new data.
        objective: any `pyro.infer.ELBO`; `Trace_ELBO()` by default. Or a function of (model, guide, *batch), as Pyro's
            SVI takes: a differentiable loss, minus a bound summed over the batch, times the plate's scale.
        optimizer: a function of parameters that gives a torch optimizer, or a `PyroOptim`.
        scheduler: a function of the torch optimizer that gives a learning-rate schedule, stepped every epoch.
        seed: of the order of the data and of all noise. Initial weights are the caller's `torch.manual_seed`.
        device: the device to train on; by default that of the parameters.
        directory: the run folder; without one nothing is written.
        resume: go on from the folder's last checkpoint, if it has one; the run ends with bit-identical parameters.
        compile: take steps from a captured and compiled graph (see `ppvae.inference.SVI`); by default where the run is
            long enough for that to pay. The choice is kept in run.config["kernels"] and used again by a resumed run. As
            it is measured, two long runs of one seed may differ by rounding; False excludes that.
        precision: of matrix products in linear and convolutional layers and their gradients: "float32"; "bf16", which
            is faster where the processor or GPU has it; "auto", for bf16 where the pair's own layers are faster in it;
            "tf32" on a GPU. Densities, parameters and reported ELBOs stay in float32.
        rows: the largest number of (datum, particle) rows in one run of the pair; a larger batch is cut into
            micro-batches whose gradients are accumulated, so that memory does not grow with the number of particles.
            Not for Pyro's own objectives, those of a batch as a whole (TCVAE, InfoVAE), or batch norm.
        clip: the largest norm of the gradient (per datum).
        patience: stop after so many epochs without a better validation ELBO, and return the best parameters.
        checkpoint_seconds: the least time between two checkpoints, which are saved at the ends of epochs.
        callbacks: called as callback(run, metrics) after every epoch; training stops if one returns True.
        progress: show a progress bar; by default where the output is a terminal.
        config: further entries for the folder's config.json.

    Raises:
        ContractError: the pair breaks the contract; TrainingError: a loss or gradient is not finite (the weights are
        left as they were before the step); OutOfMemoryError: with what to lower; CheckpointError: the folder
        cannot be used; UsageError, DataError.

    >>> from ppvae.models import LinearGaussian
    >>> pair, x = LinearGaussian(3, 2), torch.randn(200, 3)
    >>> run = fit(pair.model, pair.mean_field, x, epochs=2)
    >>> len(run.history), run.metrics["epoch"]
    (2, 2)
    """
    check_numbers(epochs=epochs, batch_size=batch_size, seed=seed, rows=rows, checkpoint_seconds=checkpoint_seconds)
    check_ranges(clip=clip, patience=patience)
    elbo = as_elbo(Trace_ELBO() if objective is None else objective)
    check_numbers(num_particles=elbo.num_particles)  # Pyro's own take any number
    if not (callable(optimizer) or isinstance(optimizer, PyroOptim)):
        raise UsageError(
            f"optimizer: expected a function of parameters, as functools.partial(torch.optim.Adam, lr=1e-3), or a "
            f"PyroOptim; found an object of {type(optimizer).__name__}"
        )
    if scheduler is not None and not callable(scheduler):
        raise UsageError(
            f"scheduler: expected a function of the optimizer, as functools.partial(StepLR, step_size=10); found an "
            f"object of {type(scheduler).__name__}"
        )
    if not isinstance(callbacks, Sequence) or not all(map(_takes_run_and_metrics, callbacks)):
        raise UsageError(f"callbacks: expected a list of functions of (run, metrics), found {callbacks!r}")
    check_precision(precision)
    if patience is not None and valid is None:
        raise UsageError("patience: expected validation data to stop early on, found valid=None")
    check_batch_size(data, batch_size)
    folder = Path(directory) if directory is not None else None
    with ExitStack() as stack:
        stack.enter_context(fork_all_rngs())
        check_argument_order(data, model, guide)
        data = admit(data, "data", model)
        valid = None if valid is None else admit(valid, "valid", model)
        stack.enter_context(default_device(choose_device(device, model, guide, data)))
        with explain_out_of_memory("the first look at the pair", "Lower batch_size, or the sizes of the pair"):
            trainer = Trainer(
                model, guide, data, valid, elbo, optimizer, scheduler, batch_size, seed, device,
                clip, compile, precision, rows,
            )  # fmt: skip
        settings = {
            "objective": setting_text(trainer.objective),
            "optimizer": setting_text(optimizer),
            "scheduler": setting_text(scheduler) if scheduler else None,
            "batch_size": batch_size,
            "seed": seed,
            "clip": clip,
            "precision": precision,
            "rows": rows,
            "patience": patience,
            "num_data": len(trainer.train),
            "data": getattr(trainer.train.columns[0], "description", ""),
            "digest": " ".join(column_digests(trainer.train.columns)),
            "valid": " ".join(column_digests(trainer.valid.columns)) if trainer.valid is not None else None,
        }
        trainer.configure(settings, {"epochs": epochs, **(config or {})})
        trainer.context.check_same_settings(repr(settings))
        if patience is not None and not trainer.monitor.has_elbo:
            raise UsageError("patience: expected a pair with an ELBO per datum to stop early on, found one without")
        if folder is not None:
            trainer.open(folder, resume, epochs, stack)
        trainer.broadcast_parameters()
        warn_of_busy_cores()
        with explain_out_of_memory("training", trainer.step.memory_cure):
            return trainer.run(epochs, patience, checkpoint_seconds, callbacks, progress)


def _takes_run_and_metrics(callback: Any) -> bool:
    """Whether a callback is a function of two arguments, as far as it has a signature."""
    if not callable(callback):
        return False
    try:
        signature = inspect.signature(callback)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(None, None)
    except TypeError:
        return False
    return True
