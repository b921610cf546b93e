"""Code blocks of Markdown pages, run as a reader would run them: in order, in one namespace, in an empty folder.

What becomes of a fenced block:
    ```python                    run; what it prints is compared with a `text title="Output"` block right below it
    ```python title="pairs.py"   written to that file, and run on its own; other titled files are written only
    ```bash                      run line by line, `ppvae` in this process; output as above
    ```console                   not run, for it needs a scheduler, a download or hours; commands and flags must exist
Numbers in outputs may differ by a few percent, as processors round differently, and durations by anything.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyro
import torch

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```[ ]*$", re.M | re.S)
TITLE = re.compile(r'title="([^"]+)"')
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
DURATION = re.compile(r"\b\d[\d.]*\s?(?:ms|s|seconds|minutes)\b")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, title, text, and where text and whole block lie in the page."""

    language: str
    title: str
    text: str
    span: tuple[int, int]  # of the whole block
    indent: str


def pages() -> list[Path]:
    """The pages with code: README and everything in docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def is_slow(page: Path) -> bool:
    """Whether the page's front matter says that it is expensive."""
    return page.read_text().startswith("---\nslow: true\n---\n")


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found = []
    for m in FENCE.finditer(text):
        indent, info, body = m.groups()
        title = TITLE.search(info)
        lines = [line.removeprefix(indent) for line in body.splitlines(keepends=True)]
        language = info.split()[0] if info.split() else ""
        found.append(Block(language, title[1] if title else "", "".join(lines), m.span(), indent))
    return found


def run(page: Path) -> list[tuple[Block, str, Block | None]]:
    """Runs a page in the current folder: (block, what it printed, the output that the page shows) for each block."""
    namespace: dict[str, Any] = {"__name__": "__page__"}
    found = blocks(page.read_text())
    results = []
    for block, after in zip(found, [*found[1:], None], strict=True):
        if block.language == "console":
            check_commands(block.text)
            continue
        if block.title.endswith((".py", ".toml", ".sh", ".csv")):
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(block.text)
        if block.title and block.language == "python":
            execute(block, page, {"__name__": Path(block.title).stem})
        elif block.language == "python":
            printed = execute(block, page, namespace)
            results.append((block, printed, shown(page, block, after)))
        elif block.title:
            continue
        elif block.language == "bash":
            printed = "".join(command(line) for line in commands(block.text))
            results.append((block, printed, shown(page, block, after)))
    return results


def shown(page: Path, block: Block, after: Block | None) -> Block | None:
    """The output block that directly follows a block."""
    if after is None or after.title != "Output" or page.read_text()[block.span[1] : after.span[0]].strip():
        return None
    return after


def execute(block: Block, page: Path, namespace: dict[str, Any]) -> str:
    """Runs Python code and returns what it printed; errors point into the page."""
    first = page.read_text()[: block.span[0]].count("\n") + 1
    code = compile("\n" * first + block.text, str(page), "exec")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, namespace)
    return out.getvalue()


def commands(text: str) -> list[str]:
    """The commands of a shell block, without comments and with continued lines joined."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def command(line: str) -> str:
    """Runs a command and returns its standard output; raises RuntimeError where it fails."""
    words = shlex.split(line)
    if words[0] == "ppvae":
        from ppvae.cli.main import main

        pyro.clear_param_store()
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(words[1:])
        result, errors = out.getvalue(), err.getvalue()
    else:
        line = re.sub(r"^python\b", shlex.quote(sys.executable), line)
        done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
        status, result, errors = done.returncode, done.stdout, done.stderr
    if status:
        raise RuntimeError(f"{line}: exit status {status}\n{result}\n{errors}")
    return result


CHOICES = ("--prior", "--likelihood", "--posterior", "--objective")


def check_commands(text: str) -> None:
    """Raises ValueError where a command that is not run has a target or a flag that does not exist."""
    makefile = (ROOT / "Makefile").read_text()
    for line in commands(text):
        words = shlex.split(line)
        if "make" in words and f"\n{words[words.index('make') + 1]}:" not in makefile:
            raise ValueError(f"{line}: no such target")
        if "ppvae" in words:
            words = words[words.index("ppvae") + 1 :]
            if words[0] not in ("fit", "check") or words[1].startswith("ppvae."):  # another pair has flags of its own
                unknown = unknown_flags(words)
                if unknown:
                    raise ValueError(f"{line}: no such flags: {', '.join(unknown)}")


def unknown_flags(words: list[str]) -> list[str]:
    """The flags of a command line that its help does not list."""
    from ppvae.cli.main import main

    pair = words[1:2] if words[0] in ("fit", "check") else []
    chosen = [word for flag, value in pairwise(words) if flag in CHOICES for word in (flag, value)]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main([words[0], *pair, *chosen, "--help"])
    known = set(re.findall(r"--[\w.-]+", out.getvalue()))
    flags = [w for w in words[1:] if w.startswith("--")]
    return [f for f in flags if f not in known and f.replace("--no-", "--", 1) not in known]


def same(printed: str, expected: str) -> bool:
    """Whether outputs agree: words exactly, numbers nearly, durations always."""
    texts = [" ".join(DURATION.sub("DURATION", t).split()) for t in (printed, expected)]
    words = [NUMBER.sub("#", t) for t in texts]
    if words[0] != words[1]:
        return False
    numbers = [[n.replace(",", "") for n in NUMBER.findall(t)] for t in texts]
    return all(_close(a, b) for a, b in zip(*numbers, strict=True))


def _close(a: str, b: str) -> bool:
    """Whole numbers may differ by one, all by a twentieth."""
    allowance = 1 if a.lstrip("+-").isdigit() and b.lstrip("+-").isdigit() else 0.05
    return abs(float(a) - float(b)) <= max(allowance, 0.05 * max(abs(float(a)), abs(float(b))))


def reset() -> None:
    """A new process's state: Pyro's store, torch's generator and default type."""
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
