"""Identities: the files of a run say which run they are of, and results carry digests of what they are made of."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ppvae.errors import CheckpointError
from ppvae.run_folder.atomic_commit import complete
from ppvae.storage import json_digest, json_text, read_bytes, read_json, sha256, write_bytes

RUN_ID, DIGEST, FILES, CHECKPOINT = "run_id", "sha256", "files", "checkpoint"  # keys in the JSON of runs and results
CODE = "code"  # in config.json {place: digest}; in a checkpoint the digests, which are the ones that count
ORIGIN = (RUN_ID, CHECKPOINT)  # in the JSON of a result
PAIR_ENTRIES = ("arguments", "train", "num_labels", "columns")  # of a pair; its name is a path, which may move

log = logging.getLogger("ppvae")


def new_run_id() -> str:
    """The identity of a new run: 32 random hexadecimal digits."""
    return uuid.uuid4().hex


def identity_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint keeps of its run's configuration, beside the settings of `fit`."""
    pair = config.get("pair")
    return {
        RUN_ID: config.get(RUN_ID, ""),
        "batch": config.get("batch"),
        "pair": {name: pair.get(name) for name in PAIR_ENTRIES} if isinstance(pair, Mapping) else None,
        "test": config.get("test"),
        CODE: sorted(set((config.get(CODE) or {}).values())),
    }


def check_identity(folder: Path, config: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Checks that config.json, the last checkpoint and metrics.jsonl are of one run, and are as they were written.

    Raises:
        CheckpointError: an entry differs, by its name.
    """
    identity = saved.get("identity")
    if identity is None:
        log.warning(
            "ppvae: %s: its checkpoint was written before runs had an identity; it is taken as it is", folder
        )  # fmt: skip
        return
    of_fit = _entries("fit", config["fit"])
    expected = {**_entries("fit", saved["settings"]), **_flat(identity)}
    found = {**of_fit, **_flat(identity_of(config))}
    for name in dict.fromkeys((RUN_ID, *expected, *of_fit)):  # an earlier version has less in its identity
        if name == CODE:
            continue  # a resumed run, whose code may have changed, has not saved a checkpoint yet
        before, now = (json_text(entries.get(name)) for entries in (expected, found))
        if before != now:
            raise CheckpointError(
                f"{folder}: config.json and the checkpoint are not of one run, or were edited: expected {name} "
                f"{before[:80]}, found {now[:80]}. Restore the folder from a copy"
            )
    _check_metrics(folder, saved["history"])


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for key, entry in identity.items()
        for name, value in (_entries(key, entry).items() if isinstance(entry, Mapping) else ((key, entry),))
    }


def _entries(name: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{name}.{key}": json.loads(json_text(value)) for key, value in entries.items()}


def _check_metrics(folder: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Lines of epochs after the checkpoint, and missing ones after a loss of power, are allowed."""
    path = folder / "metrics.jsonl"
    try:
        lines = read_bytes(path).decode(errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    for number, (line, metrics) in enumerate(zip(lines, history, strict=False), 1):
        if line.endswith("\n") and line.strip() != json_text(metrics):
            raise CheckpointError(
                f"{path}: line {number} is not that of the checkpoint: the folder was put together from two runs, or "
                f"edited. Restore it from a copy, or remove this file: the checkpoint holds the metrics, too"
            )


def write_result(
    path: Path, content: Mapping[str, Any], files: Sequence[Path], origin: Mapping[str, str] | None = None
) -> None:
    """Writes the JSON file of a result, with the digests of its other files and of itself.

    Args:
        origin: the run and the checkpoint whose pair was evaluated, `Run.origin`.
    """
    digests = {file.name: sha256(read_bytes(file)) for file in files}
    plain = json.loads(json_text({**content, **(origin or {}), FILES: digests}))
    write_bytes(path, (json_text({**plain, DIGEST: json_digest(plain)}) + "\n").encode())


def read_result(path: Path) -> dict[str, Any]:
    """The content of the JSON file of a result, without the entries of `write_result`; its digests are verified.

    Raises:
        CheckpointError: the file or another one of the result is missing, or is not what was written; ValueError,
            OSError: it is no result.
    """
    complete(path.parent)
    if path.parent.name == "results":
        complete(path.parent.parent)
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError("not an object")
    expected = content.pop(DIGEST, None)
    if expected is None and not {FILES, RUN_ID} & content.keys():
        return content  # written before results had digests
    if (found := json_digest(content)) != expected:
        raise CheckpointError(
            f"{path}: was changed after it was written: expected SHA-256 {str(expected)[:12]}..., found "
            f"{found[:12]}.... Restore it from a copy, or evaluate again"
        )
    for name, digest in content.pop(FILES, {}).items():
        file = path.with_name(Path(name).name)
        try:
            now = sha256(read_bytes(file))
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error.strerror}), and belongs to {path.name}") from error
        if now != digest:
            raise CheckpointError(
                f"{file}: does not belong to {path.name}, or was changed: expected SHA-256 {digest[:12]}..., found "
                f"{now[:12]}.... Restore both from a copy, or evaluate again"
            )
    return content


def check_results(folder: Path, origin: Mapping[str, str], leave_out: str = "") -> None:
    """Checks that the results in a run's folder are whole, and of that run.

    Args:
        origin: `Run.origin`.
        leave_out: the start of the names of results that are about to be replaced.

    Raises:
        CheckpointError: one is damaged, or of another run.
    """
    complete(folder)
    for path in sorted((folder / "results").glob("*.json")):
        if not (leave_out and path.stem.startswith(leave_out)):
            check_result(path, origin)


def check_result(path: Path, origin: Mapping[str, str]) -> None:
    """Checks that a result is whole, and of a run; one line says so where it is of an earlier checkpoint.

    Raises:
        CheckpointError: it is not.
    """
    try:
        content = read_result(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a result ({error}). Remove it, or evaluate again") from error
    ids = content.get(RUN_ID), origin.get(RUN_ID)
    if all(ids) and ids[0] != ids[1]:
        raise CheckpointError(
            f"{path}: is a result of another run: expected {RUN_ID} {ids[1]}, found {ids[0]}. Remove it, or move it to "
            f"its own run"
        )
    checkpoints = content.get(CHECKPOINT), origin.get(CHECKPOINT)
    if all(checkpoints) and checkpoints[0] != checkpoints[1]:
        log.warning("ppvae: %s: is of an earlier checkpoint of the run", path)
