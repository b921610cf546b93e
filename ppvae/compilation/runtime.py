"""Memory that the process frees stays with it: fresh pages from the system can cost a step a third of its time."""

from __future__ import annotations

import ctypes
import functools
import os

import torch

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # their numbers in malloc.h
LARGEST, END = (128 * 2**20, 32 * 2**20), 512 * 2**20  # bytes from which a block, or a free end, goes back at once
OWN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


@functools.cache
def keep_freed_memory() -> bool:
    """Has glibc's malloc keep freed blocks of up to 128 MB, and up to 512 MB at its end; whether it does now.

    Its own limits grow to 32 MB and 64 MB: a step that needs more gets it anew from the system, page by page, each
    time. What the user has set by environment variables stays; another C library is left alone.
    """
    if any(name in os.environ for name in OWN):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # the second alone would keep the first from growing, and glibc before 2.35 takes no more than 32 MB
    return any(mallopt(MMAP_THRESHOLD, size) for size in LARGEST) and bool(mallopt(TRIM_THRESHOLD, END))


@functools.cache
def prepare_process() -> None:
    """Has freed memory kept, and torch's vectorised log1p set up: the same numbers as ever, sooner.

    On some processors (AVX-512 of a Zen 4, torch 2.14) log1p, and softplus and cross-entropy with it, take up to ten
    times as long until lgamma, or a kernel of inductor's, has run once in the process.
    """
    keep_freed_memory()
    torch.lgamma(torch.ones(1, device="cpu"))
