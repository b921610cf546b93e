"""Subnormal numbers, below 1e-38 in float32, as zeros while compiled kernels run on a processor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ppvae.compilation.cpp_library import load_library

SOURCE = r"""
#if defined(__SSE2__)
#include <immintrin.h>
constexpr unsigned FLUSH = 0x8040;  // subnormal results become zeros, and subnormal operands count as zeros

extern "C" int flush_subnormals(int threads, int on) {
    const bool before = (_mm_getcsr() & FLUSH) == FLUSH;
    _Pragma("omp parallel num_threads(threads) if(threads > 1)")
    _mm_setcsr(on ? _mm_getcsr() | FLUSH : _mm_getcsr() & ~FLUSH);
    return before;
}
#else
extern "C" int flush_subnormals(int threads, int on) { return 0; }
#endif
"""


@functools.cache
def _library() -> Any:
    """The function of `SOURCE`, compiled once by inductor's compiler; None where that fails, which the log says."""
    return load_library(SOURCE, "subnormal numbers are not flushed to zero")


def without_subnormals(function: Callable[[Any], Any], argument: Any) -> Any:
    """`function(argument)`, where all of torch's threads compute with zeros for subnormal numbers meanwhile.

    Gradients of particles with small weights underflow, and a matrix product of subnormal numbers takes up to ten times
    as long on some processors. `torch.set_flush_denormal` would set the calling thread alone.

    >>> without_subnormals(lambda x: (x * 1e-10).item(), torch.full((), 1e-30))
    0.0
    """
    library = _library()
    if library is None:
        return function(argument)
    threads = torch.get_num_threads()
    before = library.flush_subnormals(threads, 1)
    try:
        return function(argument)
    finally:
        library.flush_subnormals(threads, before)
