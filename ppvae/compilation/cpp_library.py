"""Functions in C++, compiled by the compiler that inductor uses."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

log = logging.getLogger("ppvae")
VECTORIZED = ("-ftree-loop-vectorize", "-fno-math-errno", "-ffp-contract=fast")  # flags that inductor turns off


def load_library(source: str, otherwise: str, flags: Sequence[str] = ()) -> Any:
    """The functions of a source, for ctypes; None where it cannot be compiled: the log says what is done `otherwise`.

    >>> load_library('extern "C" int twice(int x) { return 2 * x; }', "numbers are added").twice(3)
    6
    """
    from torch._inductor.codecache import CppCodeCache

    try:
        return CppCodeCache.load(source, extra_flags=tuple(flags))
    except Exception as error:
        log.warning("ppvae: %s: %s", otherwise, " ".join(str(error).split())[:160])
        return None
