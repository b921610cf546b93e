"""What each command of the command line does; `ppvae.cli` turns its errors into lines."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from pathlib import Path
from typing import Annotated, Any

import torch

from ppvae import data as datasets
from ppvae.cli.flags import parse
from ppvae.cli.options import Data, Evaluate, Fit, Generate, Optimizer, Show
from ppvae.distributed import leave_process_group
from ppvae.errors import DataError, PpvaeError, UsageError
from ppvae.factories import pairs
from ppvae.factories.choices import Argument, ClassChoice, class_choice
from ppvae.training import fit as train_pair
from ppvae.training import load as load_run
from ppvae.training.data_parallel import DataParallel
from ppvae.training.run import Run

PARTS = ("train", "valid", "test")


def fit(args: list[str]) -> int:
    """`ppvae fit PAIR`."""
    text, factory, settings, arguments = _with_pair("fit", args, Fit, {"objective": _objectives()})
    objective = arguments.pop("objective")
    splits = _load(settings)
    torch.manual_seed(settings.seed)
    columns = [_columns(s, settings.labels) for s in splits]
    num_labels = _num_labels(splits[0], settings.labels)
    model, guide = pairs.build(factory, arguments, splits[0], num_labels)
    directory = _directory(settings, text)
    DataParallel().wait()  # until all have found the same name free
    steps = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=settings.epochs)
    run = train_pair(
        model,
        guide,
        columns[0],
        valid=columns[1],
        objective=_objective(objective),
        optimizer=_optimizer(settings.optimizer),
        scheduler=steps if settings.optimizer.schedule == "cosine" else None,
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
                "name": _lasting(text),
                "arguments": arguments,
                "train": [[list(splits[0].shape), "float32"]],
                "num_labels": num_labels,
            },
            "data": {f.name: getattr(settings, f.name) for f in dataclasses.fields(Data)} | _places(settings),
            "test": _digest(columns[2]),
        },
    )
    if not leave_process_group():
        return 0
    _print_metrics(run)
    if settings.report:
        _report(run, columns[2], None, settings.seed)
    print(f"run: {directory}")
    return 0


def evaluate(args: list[str]) -> int:
    """`ppvae evaluate RUN`."""
    from ppvae.cli.evaluate import estimate

    return estimate(*_with_run("evaluate", args, Evaluate))


def generate(args: list[str]) -> int:
    """`ppvae generate RUN`."""
    from ppvae import report

    settings, directory = _with_run("generate", args, Generate)
    run = load_run(directory, best=settings.best or None)
    columns = _of_run(run, settings, "test")
    for path in report.write_generated(run, columns, directory, count=settings.count, seed=settings.seed):
        print(path)
    return 0


def check(args: list[str]) -> int:
    """`ppvae check PAIR`."""
    from ppvae.inference import check as describe

    _, factory, settings, arguments = _with_pair("check", args, Data)
    splits = _load(settings)
    torch.manual_seed(0)
    columns = _columns(splits[0], settings.labels)
    model, guide = pairs.build(factory, arguments, splits[0], _num_labels(splits[0], settings.labels))
    first = torch.arange(min(100, len(columns[0])))
    batch = tuple(c.read(first) if hasattr(c, "read") else c[first] for c in columns)
    try:
        print(describe(model, guide, batch))
    except PpvaeError:
        whole = tuple(c.read() if hasattr(c, "read") else c for c in columns)
        if len(whole[0]) == len(batch[0]):
            raise
        try:  # a pair whose plate draws its own subsample wants all data
            print(describe(model, guide, whole))
        except PpvaeError:
            whole = ()
        if not whole:
            raise
    return 0


def data(args: list[str]) -> int:
    """`ppvae data NAME`."""
    if not args or args[0].startswith("-"):
        args = ["digits", *args]
    name, rest = args[0], args[1:]
    settings, _ = parse(Show, rest, f"ppvae data {name}", "Load a data set and say what it is.")
    for split in _load(Data(data=name, **dataclasses.asdict(settings))):
        labels = "" if split.labels is None else f", {len(split.labels.unique())} labels"
        shapes = f"{list(split.shape)}, event {list(split.event_shape)}"
        print(f"{split.description}: {shapes}{labels}, sha256 {split.digest[:16]}")
    return 0


def _with_pair(
    command: str, args: list[str], base: type, more: dict[str, Argument] | None = None
) -> tuple[str, Any, Any, dict[str, Any]]:
    """(pair's name, factory, settings, the factory's arguments, and more of the command's own)."""
    name = _first(command, "PAIR", "a pair, as in `ppvae.models:vae`", args, base)
    factory = pairs.resolve(name)
    settings: Any
    taken = pairs.parameters(factory)
    for clash in taken.keys() & (more or {}).keys():
        raise UsageError(f"{name}: its argument {clash!r} is an option of ppvae {command}; give it another name")
    settings, arguments = parse(base, args[1:], f"ppvae {command} {name}", _about(base), taken | (more or {}))
    return name, factory, settings, arguments


def _with_run(command: str, args: list[str], cls: type) -> tuple[Any, Path]:
    name = _first(command, "RUN", "a run folder, as in `runs/NAME`", args, cls)
    settings: Any
    settings, _ = parse(cls, args[1:], f"ppvae {command} {name}", _about(cls))
    directory = Path(name)
    if not directory.exists() and (Path(settings.runs) / name).exists():
        directory = Path(settings.runs) / name
    return settings, directory


def _about(cls: type) -> str:
    return inspect.getdoc(cls) or ""


def _first(command: str, what: str, expected: str, args: list[str], cls: type) -> str:
    if args and not args[0].startswith("-"):
        return args[0]
    if {"-h", "--help"} & set(args):
        more = {"objective": _objectives()} if cls is Fit else {}
        parse(cls, args, f"ppvae {command} {what}", _about(cls), more)
    raise UsageError(f"ppvae {command}: expected {expected}; found {args[0] if args else 'nothing'}")


def _load(settings: Any) -> Any:
    kind = None if settings.binarize == "none" or settings.dequantize or settings.missing else settings.binarize
    return datasets.load(
        settings.data, root=settings.root, binarize=kind, dequantize=settings.dequantize, flat=settings.flat,
        seed=settings.data_seed, missing=settings.missing,
    )  # fmt: skip


def _columns(split: Any, labels: bool) -> tuple[Any, ...]:
    if not labels:
        return (split,)
    if split.labels is None:
        raise UsageError(f"--labels: {split.description} has no labels")
    return (split, split.labels)


def _of_run(run: Run, settings: Any, split: str) -> tuple[Any, ...]:
    if "data" not in run.config:
        raise UsageError(f"{run.directory}: the run was not started from the command line; evaluate it in Python")
    known = {**run.config["data"]}
    if settings.root is not None:
        known["root"] = settings.root
    chosen = Data(**known)
    splits = {name: _columns(s, chosen.labels) for name, s in zip(PARTS, _load(chosen), strict=True)}
    fit = run.config["fit"]
    for name, digest in zip(PARTS, (fit.get("digest"), fit.get("valid"), run.config.get("test")), strict=True):
        if digest is not None and name in {"train", split} and (now := _digest(splits[name])) != digest:
            raise DataError(
                f"{run.directory}: its {name} data are not what they were: expected SHA-256 {digest}, found {now}"
            )
    return splits[split]


def _digest(columns: tuple[Any, ...]) -> str:
    """The SHA-256 of each column, as a run keeps it of its data."""
    return " ".join(c.digest if hasattr(c, "digest") else datasets.digest(c) for c in columns)


def _places(settings: Data) -> dict[str, Any]:
    """Where the data lie, so that they are found from another working directory."""
    root = None if settings.root is None else str(Path(settings.root).resolve())
    data = str(Path(settings.data).resolve()) if Path(settings.data).exists() else settings.data
    return {"root": root, "data": data}


def _lasting(text: str) -> str:
    """A pair's name that can be found from another working directory."""
    place, colon, name = text.partition(":")
    return f"{Path(place).resolve()}{colon}{name}" if Path(place).is_file() else text


def _directory(settings: Fit, text: str) -> Path:
    runs = Path(settings.runs)
    if settings.name is not None:
        if Path(settings.name).name != settings.name or settings.name in ("", ".", ".."):
            raise UsageError(f"--name: expected a plain name for a folder below {runs}, found {settings.name!r}")
        return runs / settings.name
    place, _, factory = text.partition(":")
    stem = f"{factory or Path(place).stem}-{Path(settings.data).stem}".lower()
    if settings.resume:
        return runs / stem
    names = (stem if i == 1 else f"{stem}-{i}" for i in range(1, 10_000))
    return next(runs / n for n in names if not (runs / n).exists())


def _head(columns: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """The first data."""
    return tuple(c.head(count) if hasattr(c, "head") else c[:count] for c in columns)


def _num_labels(split: Any, wanted: bool) -> int | None:
    """How many labels the data have, where they are wanted."""
    if not wanted or split.labels is None:
        return None
    return len(split.classes) or int(split.labels.max()) + 1


def _objectives() -> Argument:
    """The option that chooses an objective."""
    from pyro.infer import ELBO, Trace_ELBO

    kind = Annotated[ELBO, ClassChoice(("ppvae.objectives", "pyro.infer"), ELBO)]
    return kind, Trace_ELBO, "what is maximised."


def _objective(chosen: dict[str, Any]) -> Any:
    choice = class_choice(_objectives()[0])
    assert choice is not None
    try:
        return choice.chosen(chosen, "objective")()
    except (ValueError, TypeError) as error:
        raise UsageError(f"--objective {chosen['name']}: {error}") from error


def _optimizer(settings: Optimizer) -> Any:
    import difflib

    known = [n for n, v in vars(torch.optim).items() if isinstance(v, type) and n != "Optimizer"]
    if settings.name not in known:
        near = difflib.get_close_matches(settings.name, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"--optimizer.name: expected a class of torch.optim, found {settings.name!r}{hint}")
    cls = getattr(torch.optim, settings.name)
    chosen = {k: getattr(settings, k) for k in ("lr", "eps", "weight_decay") if getattr(settings, k) is not None}
    taken = inspect.signature(cls).parameters
    for key in chosen:
        if key not in taken:
            raise UsageError(f"--optimizer.{key}: {settings.name} does not take it")
    tried = torch.nn.Parameter(torch.zeros(2))
    tried.grad = torch.zeros(2)
    try:  # some want a closure, sparse gradients, matrices
        cls([tried], **chosen).step()
    except Exception as error:
        raise UsageError(f"--optimizer.name: {settings.name} cannot train a pair: {error}") from error
    return functools.partial(cls, **chosen)


def _print_metrics(run: Run) -> None:
    m = run.metrics
    names = {"loss": "train loss", "valid_elbo": "valid ELBO", "valid_rate": "rate", "valid_distortion": "distortion"}
    shown = ", ".join(f"{text} {m[name]:.3f}" for name, text in names.items() if name in m)
    print(f"epoch {m['epoch']}: {shown} nats per datum")


def _report(run: Run, columns: tuple[Any, ...], estimate: Any, seed: int) -> None:
    from ppvae import report

    path = report.write(run, data=columns, estimate=estimate, directory=run.directory, seed=seed)
    print(f"report: {os.fspath(path)}")
