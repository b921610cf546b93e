"""`ppvae fit PAIR`: trains a pair and writes its run folder and report."""

import dataclasses
import functools
import inspect
import os
from pathlib import Path
from typing import Annotated, Any

import torch
from pyro.infer import ELBO, Trace_ELBO

from ppvae.cli.common import (
    by_argument,
    joined_digest,
    load_splits,
    num_labels,
    parse_pair,
    print_columns,
    print_report,
    results_of,
    with_columns,
    write_report,
)
from ppvae.cli.options import Data, Fit, Optimizer
from ppvae.distributed import DistributedContext, leave_process_group
from ppvae.errors import UsageError, did_you_mean
from ppvae.factories import pairs
from ppvae.factories.constructor_flags import Argument, ClassChoice
from ppvae.factories.imports import portable_name, working_folder_of
from ppvae.objectives.auxiliary import AuxiliaryLoss
from ppvae.training import fit
from ppvae.training.run import Run

# without those that need a kernel, or report no loss
OBJECTIVES = ClassChoice(("ppvae.objectives", "pyro.infer"), ELBO, leave_out=("Trace_MMD", "TraceTailAdaptive_ELBO"))
MAX_NAME = 200  # bytes of the name of a run folder; file systems take 255
OBJECTIVE: Argument = (Annotated[ELBO, OBJECTIVES], Trace_ELBO, "the objective that is maximised.")


def run(args: list[str]) -> int:
    """Trains a pair as the command line says; returns the exit status."""
    name, factory, settings, arguments = parse_pair("fit", args, Fit, {"objective": OBJECTIVE})
    objective = arguments.pop("objective")
    directory = _run_folder(settings, name)
    splits = load_splits(settings)
    print_columns(splits[0])
    torch.manual_seed(settings.seed)
    train, valid, test = (with_columns(s, settings) for s in splits)
    labels = num_labels(splits[0], settings.labels)
    model, guide = pairs.build(factory, arguments, splits[0], labels, splits[0].kinds)
    train, valid, test = (by_argument(columns, model, guide) for columns in (train, valid, test))
    DistributedContext().barrier()  # until all ranks have found the same name free
    cosine = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=settings.epochs)
    trained = fit(
        model,
        guide,
        train,
        valid=valid,
        objective=_with_label_loss(_build_objective(objective), model),
        optimizer=_build_optimizer(settings.optimizer),
        scheduler=cosine if settings.optimizer.schedule == "cosine" else None,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        seed=settings.seed,
        device=settings.device,
        directory=directory,
        resume=settings.resume,
        clip=settings.clip,
        compile={"auto": None, "yes": True, "no": False}[settings.compile],
        precision=settings.precision,
        rows=settings.rows,
        patience=settings.patience,
        config={
            "pair": {
                "name": portable_name(name),
                "arguments": _portable(arguments),
                "path": working_folder_of([name, *_class_names(arguments)]),
                "train": [[list(splits[0].shape), "float32"]],
                "num_labels": labels,
                "columns": splits[0].kinds or None,
            },
            "data": {f.name: getattr(settings, f.name) for f in dataclasses.fields(Data)} | _absolute_paths(settings),
            "test": joined_digest(test),
        },
    )
    if not leave_process_group():
        return 0
    _print_metrics(trained)
    if settings.report:
        with results_of(trained, "report") as staged:
            write_report(staged, test, None, settings.seed)
        print_report(trained)
    print(f"run: {directory}")
    return 0


def _run_folder(settings: Fit, name: str) -> Path:
    """The folder of the run: below `--runs`, by `--name`, else by pair and data with the first free number."""
    runs = Path(settings.runs)
    if (given := settings.name) is not None:
        plain = Path(given).name == given and given not in ("", ".", "..") and given.isprintable()
        if not plain or len(os.fsencode(given)) > MAX_NAME:
            shown = given if len(given) <= 80 else f"{given[:80]}... ({len(given)} characters)"
            raise UsageError(f"--name: expected a plain name for a folder below {runs}, found {shown!r}")
        return runs / given
    place, _, factory = name.partition(":")
    stem = f"{factory or Path(place).stem}-{Path(settings.data).stem}".lower()[:MAX_NAME]
    if settings.resume:
        return runs / stem
    names = (stem if i == 1 else f"{stem}-{i}" for i in range(1, 10_000))
    return next(runs / n for n in names if not os.path.exists(runs / n))


def _class_names(arguments: dict[str, Any]) -> list[str]:
    """The classes that were chosen by name."""
    return [value["name"] for value in arguments.values() if isinstance(value, dict)]


def _portable(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with names of classes that are valid in another working directory."""
    return {
        key: value | {"name": portable_name(value["name"])} if isinstance(value, dict) else value
        for key, value in arguments.items()
    }


def _absolute_paths(settings: Data) -> dict[str, Any]:
    """The paths of the data, valid in another working directory."""
    root = None if settings.root is None else str(Path(settings.root).resolve())
    data = str(Path(settings.data).resolve()) if Path(settings.data).exists() else settings.data
    return {"root": root, "data": data}


def _build_objective(chosen: dict[str, Any]) -> ELBO:
    try:
        return OBJECTIVES.build(chosen, "objective")()
    except (ValueError, TypeError) as error:
        raise UsageError(f"--objective {chosen['name']}: {error}") from error


def _with_label_loss(objective: ELBO, model: Any) -> ELBO:
    """The objective, plus the classification loss of a pair that asks for one by its attribute `label_weight`."""
    pair: Any = getattr(model, "__self__", None)
    weight = getattr(pair, "label_weight", 0.0)
    return AuxiliaryLoss(objective, pair.log_label, weight) if weight else objective


def _build_optimizer(settings: Optimizer) -> functools.partial[torch.optim.Optimizer]:
    """The optimizer with its options, after a step on a parameter of its own.

    Raises:
        UsageError: torch has no such optimizer, it does not take an option, or it cannot train a pair.
    """
    known = [n for n, v in vars(torch.optim).items() if isinstance(v, type) and n != "Optimizer"]
    if settings.name not in known:
        hint = did_you_mean(settings.name, known)
        raise UsageError(f"--optimizer.name: expected a class of torch.optim, found {settings.name!r}{hint}")
    cls = getattr(torch.optim, settings.name)
    options = {k: getattr(settings, k) for k in ("lr", "eps", "weight_decay") if getattr(settings, k) is not None}
    accepted = inspect.signature(cls).parameters
    for key in options:
        if key not in accepted:
            raise UsageError(f"--optimizer.{key}: {settings.name} does not take it")
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.zeros(2)
    try:  # some optimizers need a closure, sparse gradients, matrices
        cls([parameter], **options).step()
    except Exception as error:
        raise UsageError(f"--optimizer.name: {settings.name} cannot train a pair: {error}") from error
    return functools.partial(cls, **options)


def _print_metrics(run: Run) -> None:
    m = run.metrics
    names = {"loss": "train loss", "valid_elbo": "valid ELBO", "valid_rate": "rate", "valid_distortion": "distortion"}
    shown = ", ".join(f"{text} {m[name]:.3f}" for name, text in names.items() if name in m)
    print(f"epoch {m['epoch']}: {shown} nats per datum")
