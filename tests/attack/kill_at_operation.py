"""`python -m tests.attack.kill_at_operation N COMMAND ...`: the command line, killed by SIGKILL at a file operation.

Operations are those that change a folder, counted from 1; the exit status is that of the command where it ends before.
"""

from __future__ import annotations

import builtins
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

OPERATIONS = ("open", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "symlink")


def count_operations(reached: Callable[[int], None], put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Calls `reached` with the number of each operation before it takes place; `put` sets the wrappers."""
    done = 0

    def next_one() -> None:
        nonlocal done
        done += 1
        reached(done)

    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            next_one()
            return real(*args, **kwargs)

        return call

    real_open = builtins.open

    def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if isinstance(path, str | os.PathLike) and set(mode) & set("wax+"):
            next_one()
        return real_open(path, mode, *args, **kwargs)

    for name in OPERATIONS:
        put(os, name, wrapped(getattr(os, name)))
    put(builtins, "open", opened)


def main() -> int:
    number = int(sys.argv[1])
    from ppvae.cli.main import main as command  # so that operations of imports are not counted

    def reached(count: int) -> None:
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    count_operations(reached)
    return command(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
