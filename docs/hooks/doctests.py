"""Doctests in docstrings as code blocks: Markdown would read `>>>` as quotations."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"(?:^(?: *)>>> .*\n?)(?:^(?! *$).*\n?)*", re.M)


class Doctests(griffe.Extension):
    """Puts every example of a docstring into a fenced block."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites the docstring of an object that was loaded."""
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(_fenced, obj.docstring.value)


def _fenced(example: re.Match[str]) -> str:
    text = example[0].rstrip("\n")
    indent = text[: len(text) - len(text.lstrip(" "))]
    return f"{indent}```pycon\n{text}\n{indent}```\n"
