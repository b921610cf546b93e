"""Laws over a dict of cases: each is a test of every case, and can be asked of any case by its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

import pytest

Check = Callable[..., None]
Applies = Callable[[str], bool]


class Laws:
    """The laws of a dict of cases.

    As a decorator, `@law()` or `@law(applies)`, it parametrizes a test of a case's `name` over the names of the dict
    (those for which `applies(name)`), and over further names of `also`. `hold(name)` asks all laws of one case, which
    may have joined the dict later.
    """

    def __init__(self, cases: Collection[str]):
        self.cases = cases
        self.checks: list[tuple[Check, Applies]] = []

    def __call__(self, applies: Applies = lambda name: True, also: Collection[str] = ()) -> Callable[[Check], Check]:
        def register(check: Check) -> Check:
            self.checks.append((check, applies))
            return pytest.mark.parametrize("name", [*filter(applies, self.cases), *also])(check)

        return register

    def hold(self, name: str, **fixtures: Any) -> list[str]:
        """Asks every law that applies to the case; returns their names. `fixtures` are given to the laws that ask."""
        asked = []
        for check, applies in self.checks:
            skipped = any(m.name == "skipif" and m.args[0] for m in getattr(check, "pytestmark", ()))
            if applies(name) and not skipped:
                wanted = inspect.signature(check).parameters
                check(name, **{k: v for k, v in fixtures.items() if k in wanted})
                asked.append(check.__name__)
        return asked
