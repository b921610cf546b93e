"""Writes the outputs of code blocks, and the pictures that they save, into pages.

    python -m tests.docs.update docs/howto/own_pair.md

Below each block that prints something and is followed by an output block, the output is replaced; a block `text
title="Output"` that is empty is filled.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from tests.docs.blocks import reset, run

LIMIT = 60_000  # bytes of a picture


def update(page: Path) -> None:
    """Runs a page and rewrites its outputs."""
    page, text, here = page.resolve(), page.read_text(), Path.cwd()
    reset()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            results = run(page)
        finally:
            os.chdir(here)
        for path in Path(folder).glob("*.png"):
            if f"({path.name})" in text:
                if path.stat().st_size > LIMIT:
                    raise ValueError(f"{path.name}: expected at most {LIMIT} bytes, found {path.stat().st_size}")
                shutil.copy(path, page.parent / path.name)
    for _, printed, shown in reversed(results):
        if shown is not None:
            start, end = shown.span
            lines = "".join(f"{shown.indent}{line}".rstrip() + "\n" for line in printed.rstrip().splitlines())
            text = text[:start] + f'{shown.indent}```text title="Output"\n{lines}{shown.indent}```' + text[end:]
    page.write_text(text)


if __name__ == "__main__":
    import matplotlib

    matplotlib.use("Agg")
    for name in sys.argv[1:]:
        update(Path(name))
