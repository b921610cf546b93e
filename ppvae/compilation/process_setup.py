"""Settings of the process: malloc keeps freed memory, as page faults can cost a step a third of its time."""

import ctypes
import functools
import logging
import os
import time
from pathlib import Path
from typing import NamedTuple

import torch

log = logging.getLogger("ppvae")
MIN_BUSY_SECONDS = 1.0  # of wall time in which the load of other processes is measured
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


class CpuTime(NamedTuple):
    """Seconds since some start: of the wall, of all processes of normal priority on all cores, of this process."""

    wall: float
    machine: float
    own: float


def cpu_time() -> CpuTime | None:
    """The time that has been used so far; None where the system does not report it."""
    try:
        user, _, system, _, _, interrupt, soft, *_ = map(int, Path("/proc/stat").read_text().split()[1:9])
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None
    return CpuTime(time.monotonic(), (user + system + interrupt + soft) / ticks, time.process_time())


_at_import = cpu_time()


def busy_cores_note(before: CpuTime | None, now: CpuTime | None, threads: int, cores: int) -> str:
    """A sentence for a process of more threads than there are idle cores, from its use of time between two moments.

    Threads of one operation wait for each other: one thread without a core of its own stops all of them.
    """
    if before is None or now is None or threads < 2 or now.wall - before.wall < MIN_BUSY_SECONDS:
        return ""
    others = (now.machine - before.machine - (now.own - before.own)) / (now.wall - before.wall)
    idle = cores - others
    if threads < idle + 0.5:
        return ""
    return (
        f"torch runs on {threads} threads, and other processes leave {max(idle, 0):.1f} of {cores} cores idle: threads "
        f"that wait for each other can be slower than one. Set OMP_NUM_THREADS={max(1, int(idle + 0.5))}"
    )


@functools.cache
def warn_of_busy_cores() -> None:
    """Logs `busy_cores_note` once a process, from the time since this module was imported."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if note := busy_cores_note(_at_import, cpu_time(), torch.get_num_threads(), cores):
        log.warning("ppvae: %s", note)
