"""The commands that look into trained runs: `ppvae examine RUN` and `ppvae compare RUN RUN ...`."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from ppvae.cli.commands import _about, _head, _of_run, _with_run
from ppvae.cli.evaluate import report_kept
from ppvae.cli.flags import parse
from ppvae.errors import ContractError, UsageError
from ppvae.training import load as load_run


@dataclasses.dataclass(kw_only=True)
class Examine:
    """Where the nats go in a run: gaps, what the latents carry, calibration. It ends with the report."""

    gaps: int = 100  # so many train and so many test data are refit, each by itself; 0 for none
    num_particles: int = 1000  # for the ELBOs and log p(x) of the gaps
    steps: int = 300  # of a round of the refit; rounds end once one gains nothing
    latents: int = 1000  # test data for rate, active units and ELBO surgery; 0 for none
    replications: int = 2000  # of the calibration on simulated data; 0 for none
    seed: int = 0
    root: str | None = None
    device: str | None = None
    best: bool = False  # the parameters with the best validation ELBO
    runs: str = "runs"
    report: bool = True


@dataclasses.dataclass(kw_only=True)
class Compare:
    """Compare runs by log p(x) of the same data, as `ppvae evaluate` left it: paired differences, and what to mind.

    NAME=RUN,RUN,... takes runs of several seeds together; a result's own file may stand for a run.
    """

    result: str = "log_marginal"  # which estimate, by its file's name in the runs' folders
    directory: str | None = None  # where to write the comparison and its picture
    runs: str = "runs"


def examine(args: list[str]) -> int:
    """`ppvae examine RUN`."""
    from ppvae.evaluation.calibration import calibration
    from ppvae.evaluation.local.gaps import gaps
    from ppvae.evaluation.representation import representation

    settings, directory = _with_run("examine", args, Examine)
    run = load_run(directory, best=settings.best or None)
    pair, common = (run.model, run.guide), {"seed": settings.seed, "device": settings.device}
    test = _of_run(run, settings, "test")
    wanted: list[tuple[str, Any]] = []
    if settings.gaps:
        for split in ("train", "test"):
            few = _head(test if split == "test" else _of_run(run, settings, split), settings.gaps)
            kept = directory / "results" / f"gaps_{split}_blocks"
            words = {"num_particles": settings.num_particles, "steps": settings.steps, "directory": kept, **common}
            wanted.append((f"gaps_{split}", lambda few=few, words=words: gaps(*pair, few, **words)))
    if settings.latents:
        some = _head(test, settings.latents)
        wanted.append(("representation", lambda: representation(*pair, some, **common)))
    if settings.replications:
        count = settings.replications
        wanted.append(("calibration", lambda: calibration(*pair, test, replications=count, **common)))
    for name, make in wanted:
        try:
            found = make()
        except ContractError as error:  # what one pair does not allow must not cost it the rest
            print(f"{name}: {error}")
            continue
        for key, value in found.table().items():
            print(f"{key:24} {value}")
        print(f"results: {found.save(directory / 'results', name)}\n")
        shutil.rmtree(directory / "results" / f"{name}_blocks", ignore_errors=True)
    if settings.report:
        report_kept(run, settings)
    return 0


def compare(args: list[str]) -> int:
    """`ppvae compare RUN RUN ...`."""
    from ppvae.evaluation.compare import compare as compared

    names = []
    while args and not args[0].startswith("-"):
        names.append(args[0])
        args = args[1:]
    settings: Any
    settings, _ = parse(Compare, args, "ppvae compare RUN RUN", _about(Compare))
    if len(names) < 2:
        raise UsageError(f"ppvae compare: expected two runs or more; found {', '.join(names) or 'nothing'}")
    given = {}
    for text in names:
        name, _, several = text.rpartition("=")
        name = name or Path(several).name
        if name in given:
            raise UsageError(f"ppvae compare: two runs with the name {name!r}: call one of them NAME=RUN")
        given[name] = [_result(run, settings) for run in several.split(",")]
    found = compared(given)
    for key, value in found.table().items():
        print(f"{key:24} {value}")
    if settings.directory is not None:
        from ppvae import plots

        folder = Path(settings.directory)
        print(f"results: {found.save(folder)}")
        path = folder / "comparison.png"
        path.write_bytes(plots.to_png(plots.differences(found)))
        print(f"picture: {path}")
    return 0


def _result(name: str, settings: Compare) -> Path:
    folder = Path(name)
    if folder.suffix == ".json":
        return folder
    if not folder.exists() and (Path(settings.runs) / name).exists():
        folder = Path(settings.runs) / name
    path = folder / "results" / f"{settings.result}.json"
    if not path.exists():
        raise UsageError(f"{path}: no such estimate; make it by `ppvae evaluate {name}`")
    return path
