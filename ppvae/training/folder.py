"""The folder of a run: its files, which one process at a time writes, and its configuration."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ppvae.errors import CheckpointError, TrainingError
from ppvae.factories.user_code import recorded_code
from ppvae.run_folder.identity import CHECKPOINT, CODE, RUN_ID, check_identity, identity_of, new_run_id
from ppvae.run_folder.lock import lock_folder
from ppvae.run_folder.trust import remember
from ppvae.storage import json_text, read_json, remove_temporaries, write_bytes, write_json
from ppvae.training import checkpoint
from ppvae.training.metrics import last_good

# of config.json, those that no digest covers, as paths may be edited
ENTRIES = {"epochs": int, "data": dict, "code": dict, "pair": dict, "pair.name": str, "pair.path": list}


class RunFolder:
    """The files of a run, written by the process that holds its lock: config.json, metrics.jsonl (one line an epoch)
    and checkpoints/.

    Args:
        resumed: the digest of the checkpoint that the run goes on from; empty for a new run.
        stack: the lock is held until it ends.

    Raises:
        CheckpointError: another process writes to the folder or has written to it since the checkpoint was read; a file
            cannot be written. The last checkpoint is kept.
    """

    def __init__(
        self, path: Path, config: dict[str, Any], history: Sequence[dict[str, Any]], resumed: str, stack: ExitStack
    ):
        self.path = path
        self._checked = False
        stack.enter_context(lock_folder(path, "fit"))
        if checkpoint.current(path / "checkpoints") != resumed:
            raise CheckpointError(f"{path}: another process has saved a checkpoint in the meantime: start again")
        for folder in (path, path / "checkpoints"):
            remove_temporaries(folder)
        remember(config.get("code", {}))  # what this user trains with is trusted on this machine
        self.write_config(config)
        # metrics of epochs after the last checkpoint are dropped: these epochs run again
        write_bytes(path / "metrics.jsonl", "".join(json_text(m) + "\n" for m in history).encode())

    def write_config(self, config: dict[str, Any]) -> None:
        write_json(self.path / "config.json", config)

    def append_metrics(self, metrics: dict[str, Any]) -> None:
        path = self.path / "metrics.jsonl"
        try:
            with open(path, "a") as file:
                file.write(json_text(metrics) + "\n")
        except OSError as error:
            text = f"{path}: could not be written ({error.strerror}); the last checkpoint is kept"
            raise CheckpointError(text) from error

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Replaces the last checkpoint; the first one is read back before anything is written.

        Raises:
            TrainingError: a parameter, or a number of the optimizer, is NaN; the last checkpoint is kept.
        """
        if where := checkpoint.find_nan(state):
            raise TrainingError(
                f"epoch {state['epoch']}: {where} is NaN, as a callback or a schedule may have set it"
                f"{last_good(self.path / 'checkpoints')}"
            )
        if not self._checked:
            checkpoint.check_loadable(state)
            self._checked = True
        checkpoint.save(self.path / "checkpoints", state)


def read_config(directory: Path) -> dict[str, Any]:
    """The run's config.json.

    Raises:
        CheckpointError: there is no run in the folder, or the file is damaged.
    """
    path = directory / "config.json"
    try:
        config = read_json(path)
    except OSError as error:
        raise CheckpointError(f"{directory}: not a run folder: no config.json ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("fit"), dict):
        raise CheckpointError(f"{path}: expected the configuration of a run, found something else")
    pair = config.get("pair", {})
    entries: dict[str, Any] = {"pair": pair, **{name: config[name] for name in ENTRIES if name in config}}
    if isinstance(pair, dict) and pair:
        entries |= {"pair.name": pair.get("name"), "pair.path": pair.get("path", [])}
    for name, value in entries.items():
        if not isinstance(value, ENTRIES[name]) or (
            isinstance(value, list) and not all(isinstance(p, str) for p in value)
        ):
            raise CheckpointError(
                f"{path}: expected a value of type {ENTRIES[name].__name__} under {name}, found "
                f"{json_text(value)[:80]}. Restore it from a copy"
            )
    return config


def identify(config: dict[str, Any]) -> None:
    """Gives the configuration of a run an identity of its own, and the digests of the Python files that it names."""
    config[RUN_ID] = new_run_id()
    if code := recorded_code(config.get("pair")):
        config["code"] = code


def read_resumed(directory: Path, resume: bool) -> tuple[str, dict[str, Any] | None]:
    """(SHA-256, state) of the checkpoint that a run goes on from; ("", None) where there is none.

    Raises:
        CheckpointError: there is one, and the run is not to be resumed; or it is damaged.
    """
    folder = directory / "checkpoints"
    if not checkpoint.exists(folder):
        return "", None
    if not resume:
        raise CheckpointError(
            f"{directory}: holds a run already; pass resume=True (--resume) to go on, or choose another folder"
        )
    return checkpoint.read_with_digest(folder)


def check_resumable(directory: Path, config: dict[str, Any], saved: dict[str, Any], epochs: int) -> None:
    """Gives the configuration the identity of the run whose checkpoint was read.

    Raises:
        CheckpointError: the folder's config.json or metrics.jsonl is that of another run; the pair has other arguments
            now; or epochs are left to train, and the checkpoint has no state of the optimizer.
    """
    if os.path.exists(directory / "config.json"):
        check_identity(directory, read_config(directory), saved)
    identity = saved.get("identity", {})
    config[RUN_ID] = identity.get(RUN_ID) or config[RUN_ID]
    for name, now in identity_of(config).items():
        before = identity.get(name, now)
        if name == "pair" and isinstance(before, dict) and isinstance(now, dict):
            before = now | before  # an earlier version has less in it
        if name != CODE and json_text(now) != json_text(before):
            raise CheckpointError(
                f"{directory}: cannot resume with {name} = {json_text(now)}: the run was started with "
                f"{json_text(before)}"
            )
    if not saved["optimizer"] and not saved["stopped"] and saved["epoch"] < epochs:
        raise CheckpointError(
            f"{directory}: cannot resume to epoch {epochs}: the checkpoint of epoch {saved['epoch']} holds parameters "
            f"alone, without the state of the optimizer. Load the run, and train its pair in another folder"
        )


def origin_of(directory: Path) -> dict[str, str]:
    """The identity of a run in a folder and of its last checkpoint, as `Run.origin`; empty where there is no run."""
    if not os.path.exists(directory / "config.json"):
        return {}
    found = {RUN_ID: read_config(directory).get(RUN_ID, ""), CHECKPOINT: checkpoint.current(directory / "checkpoints")}
    return {name: str(value) for name, value in found.items() if value}
