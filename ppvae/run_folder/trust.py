"""The code that a user trusts: SHA-256 digests of Python files, in a text file in the user's own configuration."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from ppvae.storage import read_bytes

log = logging.getLogger("ppvae")


def trust_file() -> Path:
    """The file of trusted digests, a line "<SHA-256>  <path>" each: below XDG_CONFIG_HOME, else ~/.config."""
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "ppvae" / "trusted_code.txt"


def is_trusted(digest: str) -> bool:
    """Whether the user trusts the file with this SHA-256, wherever it lies."""
    return any(line.partition(" ")[0] == digest for line in _read().splitlines())


def remember(code: Mapping[str, str]) -> None:
    """Adds files {path: SHA-256} to those that the user trusts; where that cannot be written, one line says so."""
    path = trust_file()
    new = {digest: " ".join(file.split()) for file, digest in code.items() if not is_trusted(digest)}
    if not new:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if path.exists() and not path.is_file():
            raise OSError(None, "not a regular file")
        end = "" if _read()[-1:] in ("", "\n") else "\n"  # of a last line that was written by hand
        with open(path, "a", encoding="utf-8") as file:
            file.write(end + "".join(f"{digest}  {name}\n" for digest, name in new.items()))
    except OSError as error:
        log.warning("ppvae: %s: what is trusted could not be remembered (%s)", path, error.strerror)


def _read() -> str:
    try:
        return read_bytes(trust_file()).decode(errors="replace")
    except OSError:
        return ""
