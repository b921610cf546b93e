"""A command in several processes at once, as torchrun starts them: they share the work and speak with one voice."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from datetime import timedelta

Fail = Callable[[str, int], int]
SHARED = ("evaluate", "fit")  # commands whose work is shared


def world_size() -> int:
    """How many processes were started together; one where none was told."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if "RANK" in os.environ and size.isdigit() else 1


def run_on_all_ranks(command: str, args: list[str], run: Callable[[str, list[str], Fail], int], fail: Fail) -> int:
    """Runs a command as one of several processes; only the first prints, and an error is told once."""
    rank, size = int(os.environ["RANK"]), world_size()
    if command not in SHARED:
        text = (
            f"ppvae {command}: expected one process, found {size}; only ppvae {' and '.join(SHARED)} share their work"
        )
        return fail(text, 2) if rank == 0 else 0  # torchrun would end the first before it has spoken
    import torch
    from torch import distributed as group

    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
    store = next(iter(group.rendezvous("env://")))[0]
    group.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo", store=group.PrefixStore("group", store), rank=rank,
        world_size=size, timeout=timedelta(days=30),  # blocks may take long; where one process fails, torchrun ends all
    )  # fmt: skip
    voice = sys.stderr

    def once(text: str, status: int) -> int:
        try:
            first = store.add("spoken", 1) == 1
        except RuntimeError:  # the process that keeps count has gone
            first = rank == 0
        if first:
            with contextlib.redirect_stderr(voice):
                fail(text, status)
        return status

    with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
        if rank:
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        status = run(command, args, once)
    if group.is_initialized() and not (status and on_cuda):  # NCCL would wait for processes that failed
        group.destroy_process_group()  # or its threads may abort the process as it ends
    return status
