"""Commands run in this process: what other tests left in Pyro's param store is no part of a user's new process."""

from __future__ import annotations

import pyro
import pytest


@pytest.fixture(autouse=True)
def empty_param_store() -> None:
    """Clears Pyro's param store before each test."""
    pyro.clear_param_store()
