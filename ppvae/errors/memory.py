"""Out of memory, recognised by the cause of an error, and said as that with what to lower."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ppvae.errors import PpvaeError

# of RuntimeErrors: the allocator of the CPU; sizes in bytes that no 64-bit number holds
SIGNS = ("DefaultCPUAllocator", "can't allocate memory", "Storage size calculation overflowed", "CUDA out of memory")


class OutOfMemoryError(PpvaeError):
    """A computation needs more memory than there is; the message says what to lower."""


def memory_failure(error: BaseException) -> BaseException | None:
    """The exception by which an allocation failed: the error itself, or what caused it; None for another error.

    >>> memory_failure(MemoryError()), memory_failure(ValueError("x"))
    (MemoryError(), None)
    """
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, MemoryError | torch.OutOfMemoryError):
            return cause
        if isinstance(cause, RuntimeError) and any(sign in str(cause) for sign in SIGNS):
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


@contextmanager
def explain_out_of_memory(where: str, cure: str) -> Iterator[None]:
    """Turns an error that a failed allocation caused into an `OutOfMemoryError`: where it failed, and what to lower."""
    try:
        yield
    except OutOfMemoryError:
        raise
    except Exception as error:
        if (failure := memory_failure(error)) is None:
            raise
        raise OutOfMemoryError(f"{where}: out of memory{_asked_for(failure)}. {cure}") from error


def _asked_for(failure: BaseException) -> str:
    """The size of the allocation that failed, where its message says it."""
    text = str(failure)
    if found := re.search(r"tried to allocate (\d+) bytes", text):
        return f", {int(found[1]) / 1e9:.3g} GB more were asked for"
    if found := re.search(r"(?:Tried|Unable) to allocate ([\d.]+ \wi?B)", text):
        return f", {found[1]} more were asked for"
    return ""
