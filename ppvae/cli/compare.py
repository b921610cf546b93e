"""`ppvae compare RUN RUN ...`: paired differences of log p(x) between runs."""

import os
from pathlib import Path

from ppvae.cli.common import description, find_run, print_table
from ppvae.cli.flags import parse
from ppvae.cli.option_checks import check_compare
from ppvae.cli.options import Compare
from ppvae.errors import UsageError
from ppvae.evaluation.compare import compare
from ppvae.evaluation.results import estimate_file
from ppvae.run_folder.atomic_commit import complete
from ppvae.run_folder.identity import check_result
from ppvae.storage import write_bytes
from ppvae.training.folder import origin_of


def run(args: list[str]) -> int:
    """Prints the comparison, and writes it where a folder is given; returns the exit status."""
    names = []
    while args and not args[0].startswith("-"):
        names.append(args[0])
        args = args[1:]
    settings, _ = parse(Compare, args, "ppvae compare RUN RUN", description(Compare))
    if len(names) < 2:
        raise UsageError(f"ppvae compare: expected two runs or more; found {', '.join(names) or 'nothing'}")
    check_compare(settings, [run for text in names for run in text.rpartition("=")[2].split(",")])
    results: dict[str, list[Path]] = {}
    for text in names:
        name, _, runs = text.rpartition("=")
        name = name or Path(runs).name
        if name in results:
            raise UsageError(f"ppvae compare: two runs with the name {name!r}: call one of them NAME=RUN")
        results[name] = [_result_file(run, settings) for run in runs.split(",")]
    comparison = compare(results)
    print_table(comparison.table(), 24)
    if settings.directory is not None:
        from ppvae import plots

        folder = Path(settings.directory)
        print(f"results: {comparison.save(folder)}")
        path = folder / "comparison.png"
        write_bytes(path, plots.to_png(plots.differences(comparison)))
        print(f"picture: {path}")
    return 0


def _result_file(name: str, settings: Compare) -> Path:
    """The file of an estimate: of a run, of a folder that `save` wrote, or the file itself."""
    if Path(name).suffix == ".json":
        return Path(name)
    folder = find_run(name, settings.runs)
    complete(folder)
    path = estimate_file(folder, settings.result)
    if not os.path.exists(path):
        raise UsageError(f"{path}: no such estimate; make it by `ppvae evaluate {name}`")
    check_result(path, origin_of(folder))
    return path
