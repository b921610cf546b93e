"""Options that have no meaning beside the others: refused, so that none is ignored in silence."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ppvae.cli.flags import flag
from ppvae.cli.options import Compare, Data, DataSet, Evaluate, Examine
from ppvae.data.tables import SUFFIXES, is_table
from ppvae.errors import UsageError

ADAPTIVE = ("target_std_error", "max_particles")  # options of --num-particles auto
CHAINS = ("num_chains", "num_temperatures", "start", "schedule", "num_leapfrog")
GIVEN_GLOBALS = ("conditional", "local_particles")
REFINED = (*ADAPTIVE, "precision", "guide_particles", "bracket")
METHODS = {  # the options of each
    "importance": (*REFINED, "proposal", "num_particles", *GIVEN_GLOBALS),
    "auto": (*REFINED, "num_particles"),
    "annealed": (*CHAINS, "num_particles", "beside"),
    "smc": (*CHAINS, "num_particles", "resample", "beside"),
    "bdmc": CHAINS,
    "particle_filter": ("num_particles",),
}


def changed(settings: Any) -> list[str]:
    """The options that differ from their defaults, in the order of the settings."""
    return [f.name for f in dataclasses.fields(settings) if getattr(settings, f.name) != _default(f)]


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _refuse(options: Iterable[str], given: Iterable[str], why: str) -> None:
    """Raises UsageError for the first of the options that is given."""
    if found := [name for name in given if name in options]:
        raise UsageError(f"{flag(found[0])}: {why}")


def check_data(settings: Data | DataSet, data: str) -> None:
    """Raises UsageError for options of the data, by their name or path, that have no meaning beside the others."""
    given, table = changed(settings), is_table(data)
    labelled = isinstance(settings, Data) and settings.labelled is not None
    if isinstance(settings, Data) and not settings.labels:
        _refuse(["labelled"], given, "goes with --labels")
    if not table:
        _refuse(["columns"], given, f"expected a table ({', '.join(SUFFIXES)}), found {data}")
    unbinarized = {"--dequantize": settings.dequantize, "--missing": settings.missing, "a table": table}
    for reason in (reason for reason, holds in unbinarized.items() if holds and settings.binarize != "none"):
        _refuse(["binarize"], given, f"does not go with {reason}")
    if settings.missing or table:
        _refuse(["dequantize"], given, f"does not go with {'--missing' if settings.missing else 'a table'}")
    random = settings.dequantize or not (settings.binarize == "none" or settings.missing or table)
    if not random and not labelled:
        _refuse(["data_seed"], given, "goes with what is random: --binarize fixed or dynamic, --dequantize, --labelled")


def check_evaluate(settings: Evaluate) -> None:
    """Raises UsageError for options that the method does not take, alone or together."""
    given = changed(settings)
    ours = {name for names in METHODS.values() for name in names}
    for name in given:
        if name in ours and name not in METHODS[settings.method]:
            methods = ", ".join(method for method, names in METHODS.items() if name in names)
            _refuse([name], given, f"goes with --method {methods}; found {settings.method}")
    if settings.num_particles == "auto" and settings.method not in ("importance", "auto"):
        raise UsageError(f"--num-particles auto: goes with --method importance or auto; found {settings.method}")
    if settings.num_particles != "auto":
        _refuse(ADAPTIVE, given, "goes with --num-particles auto")
    if settings.proposal == "guide":
        _refuse(["guide_particles"], given, "goes with --proposal refined; give --num-particles")
        if settings.bracket:
            _refuse(["bracket"], given, "goes with --proposal refined, which it certifies")
    if globals_given := [name for name in given if name in GIVEN_GLOBALS]:
        others = [name for name in ours if name not in GIVEN_GLOBALS and name != "num_particles"]
        _refuse(others, given, f"does not go with {flag(globals_given[0])}, whose draws are the guide's")
        if settings.num_particles == "auto":
            raise UsageError(f"--num-particles auto: does not go with {flag(globals_given[0])}; give a number of draws")


def check_examine(settings: Examine) -> None:
    """Raises UsageError for options of the gaps where none are asked for."""
    if not settings.gaps:
        _refuse(["num_particles", "steps"], changed(settings), "goes with --gaps above 0")


def check_compare(settings: Compare, runs: Iterable[str]) -> None:
    """Raises UsageError for the name of a result where each run is the file of one."""
    if all(Path(run).suffix == ".json" for run in runs):
        _refuse(["result", "runs"], changed(settings), "goes with run folders; found files of results")
