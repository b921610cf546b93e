"""Settings of the process: malloc keeps freed memory, as page faults can cost a step a third of its time."""

import ctypes
import functools
import os

import torch

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # their numbers in malloc.h
MMAP_BYTES, TRIM_BYTES = (128 * 2**20, 32 * 2**20), 512 * 2**20  # from which memory is returned
MALLOC_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


@functools.cache
def keep_freed_memory() -> bool:
    """Makes glibc's malloc keep freed blocks of up to 128 MB and a free top of up to 512 MB; returns whether it does.

    The default limits grow to 32 MB and 64 MB: a step that needs more faults every page in again. Environment
    variables that the user has set take precedence; other C libraries are left alone.
    """
    if any(name in os.environ for name in MALLOC_VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # a trim threshold alone would stop the mmap threshold from growing; glibc before 2.35 allows 32 MB
    return any(mallopt(MMAP_THRESHOLD, size) for size in MMAP_BYTES) and bool(mallopt(TRIM_THRESHOLD, TRIM_BYTES))


@functools.cache
def prepare_process() -> None:
    """Keeps freed memory and initialises torch's vectorised log1p; no number changes.

    On some processors (AVX-512 of a Zen 4, torch 2.14) log1p, and softplus and cross-entropy with it, take up to ten
    times as long until lgamma, or a kernel of inductor's, has run once in the process.
    """
    keep_freed_memory()
    torch.lgamma(torch.ones(1, device="cpu"))
