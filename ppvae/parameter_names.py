"""Names under which objects register their parameters, unique within a process, and their canonical form in files."""

import itertools
import re
from collections.abc import Iterable

_counter = itertools.count()


def unique_name(prefix: str) -> str:
    """A name that no other object in this process has, so that two objects never share a parameter."""
    return f"{prefix}#{next(_counter)}"


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """Maps names to names that do not depend on how many objects this process created before.

    >>> canonical_names(["vae#7.prior$$$loc", "vae#9.prior$$$loc", "scale"])
    {'vae#7.prior$$$loc': 'vae#0.prior$$$loc', 'vae#9.prior$$$loc': 'vae#1.prior$$$loc', 'scale': 'scale'}
    """
    numbers: dict[str, int] = {}

    def renumber(match: re.Match[str]) -> str:
        return f"#{numbers.setdefault(match[1], len(numbers))}"

    return {name: re.sub(r"#(\d+)", renumber, name) for name in names}
