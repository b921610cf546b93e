"""Functions in C++, compiled by the compiler that inductor uses."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger("ppvae")
VECTORIZED = (  # flags that inductor turns off
    "-ftree-loop-vectorize", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
)  # fmt: skip
KEPT = Path("~/.cache/ppvae/kernels")


def load_library(source: str, otherwise: str, flags: Sequence[str] = (), keep: bool = False) -> Any:
    """The functions of a source, for ctypes; None where it cannot be compiled: the log says what is done `otherwise`.

    `keep` leaves them to later processes, for `kept_library`.

    >>> load_library('extern "C" int twice(int x) { return 2 * x; }', "numbers are added").twice(3)
    6
    """
    from torch._inductor.codecache import CppCodeCache

    try:
        library = CppCodeCache.load(source, extra_flags=tuple(flags))
    except Exception as error:
        log.warning("ppvae: %s: %s", otherwise, " ".join(str(error).split())[:160])
        return None
    if keep:
        _keep(library, source, flags)
    return library


def kept_library(source: str, flags: Sequence[str] = ()) -> Any:
    """A library that an earlier process has compiled and kept, without importing the compiler, which takes a second.

    None if there is none for this processor and this version of torch.
    """
    try:
        path = _kept_path(source, flags)
        return ctypes.CDLL(str(path)) if path.exists() else None
    except (OSError, RuntimeError):  # no home, or one that may not be read
        return None


def _keep(library: Any, source: str, flags: Sequence[str]) -> None:
    try:
        path = _kept_path(source, flags)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        shutil.copy(library._name, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        log.info("ppvae: a compiled library is not kept: %s", error)


def _kept_path(source: str, flags: Sequence[str]) -> Path:
    key = repr((source, tuple(flags), torch.__version__, _processor()))
    return KEPT.expanduser() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.so"


def _processor() -> str:
    """The name of the processor and what it can do: code is compiled for it alone."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return " ".join(os.uname()) if hasattr(os, "uname") else os.environ.get("PROCESSOR_IDENTIFIER", "")
    return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features")))
