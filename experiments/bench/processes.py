"""Runs contenders in separate processes, in alternating rounds."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterable
from multiprocessing.connection import Connection

import torch

from experiments.bench import Settings
from experiments.bench.contenders import Key, contenders


def rounds(keys: Iterable[Key], s: Settings, threads: int) -> dict[Key, list[float]]:
    """The time of each round of each contender, without the first round, which is a warm-up.

    Contenders of one name, key[1], share a process. While one runs, the other processes wait.
    """
    times: dict[Key, list[float]] = {key: [] for key in keys}
    spawn = multiprocessing.get_context("spawn")
    lines: dict[object, Connection] = {}
    processes = []
    for who in {key[1]: None for key in times}:
        lines[who], theirs = spawn.Pipe()
        process = spawn.Process(target=_serve, args=(theirs, s, threads), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
    for round_ in range(s.rounds + 1):
        for key, seconds in times.items():
            try:
                lines[key[1]].send(key)
                taken = lines[key[1]].recv()
            except (EOFError, OSError):
                taken = "its process has ended"
            if isinstance(taken, str):
                raise RuntimeError(f"{key[1]} cannot be timed for {key[0]}: {taken}")
            if round_:
                seconds.append(taken)
    for line, process in zip(lines.values(), processes, strict=True):
        line.close()  # ends the process
        process.join()
    return times


def _serve(line: Connection, s: Settings, threads: int) -> None:
    """Runs a round of each key received, set up at its first round, until the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles it
    if hasattr(os, "sched_setaffinity"):  # XLA takes all cores that it finds, whatever its flags say
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)
    set_up = contenders(s, threads)
    ready = {}
    while True:
        try:
            key = line.recv()
        except EOFError:
            return
        try:
            if key not in ready:
                ready[key] = set_up[key]()
            taken: float | str = ready[key]()
        except Exception as error:
            taken = f"{type(error).__name__}: {error}"
        line.send(taken)
