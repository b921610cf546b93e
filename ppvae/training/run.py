"""What training leaves behind: the pair bound to its parameters, its history, and a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppvae.inference.param_store import Bound, Scope, remember


@dataclass
class Run:
    """A trained pair.

    Attributes:
        model, guide: the pair bound to this run's parameters; call, evaluate and sample them like the bare pair.
        history: a dict of metrics per epoch, nats per datum.
        directory: the run folder, or None.
        config: the resolved configuration.
        stopped: where a run that has not finished stopped, in words; empty for a finished one.
    """

    model: Bound
    guide: Bound
    history: list[dict[str, Any]] = field(repr=False)
    directory: Path | None = None
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    stopped: str = ""

    @property
    def metrics(self) -> dict[str, Any]:
        """The last epoch's metrics."""
        return self.history[-1] if self.history else {}


def bind(model: Callable[..., Any], guide: Callable[..., Any], scope: Scope) -> tuple[Bound, Bound]:
    """The pair bound to a scope, which the bare functions then use too."""
    scope.seal()
    remember(model, scope)
    remember(guide, scope)
    return Bound(model, scope), Bound(guide, scope)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON whole or not at all."""
    from ppvae.training.checkpoint import write_atomically

    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
