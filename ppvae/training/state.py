"""The tensors of a pair under training, by names that another process gives them too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ppvae.errors import CheckpointError
from ppvae.inference.param_store import Scope
from ppvae.parameter_names import canonical


class PairState:
    """Parameters (unconstrained) and buffers of a pair: read out, put back, compared by name and shape."""

    def __init__(self, scope: Scope, modules: list[nn.Module]):
        self.scope, self.modules = scope, modules

    def params(self) -> dict[str, Tensor]:
        """Unconstrained parameters by canonical name, in order of first use."""
        names = canonical(self.scope.params)
        return {names[name]: p for name, p in self.scope.params.items()}

    def renamed(self, state: Mapping[str, Any], back: bool = False) -> dict[str, Any]:
        """An optimizer's state by parameter, with canonical names; `back` gives this process's names."""
        names = canonical(self.scope.params)
        if back:
            names = {new: old for old, new in names.items()}
        return {names.get(name, name): value for name, value in state.items()}

    def buffers(self) -> dict[str, Tensor]:
        """Persistent buffers (batch norm's running statistics, ...), named by the order in which modules are called."""
        return {
            f"{i}.{type(module).__name__}.{name}": buffer
            for i, module in enumerate(self.modules)
            for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
        }

    def copy(self) -> dict[str, dict[str, Tensor]]:
        """A copy of everything, on the CPU."""
        return {
            "params": {k: v.detach().cpu().clone() for k, v in self.params().items()},
            "buffers": {k: v.detach().cpu().clone() for k, v in self.buffers().items()},
        }

    def put(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Puts saved values back in place.

        Raises:
            CheckpointError: names or shapes differ; the message names the first that does.
        """
        for kind, current in (("params", self.params()), ("buffers", self.buffers())):
            _check(kind.removesuffix("s"), current, saved[kind])
            with torch.no_grad():
                for name, tensor in current.items():
                    tensor.copy_(saved[kind][name])


def _check(kind: str, current: Mapping[str, Tensor], saved: Mapping[str, Any]) -> None:
    missing, extra = sorted(current.keys() - saved.keys()), sorted(saved.keys() - current.keys())
    if missing or extra:
        raise CheckpointError(
            f"the pair does not fit the checkpoint: expected {kind} {(extra or missing)[0]!r} "
            f"{'from the pair' if extra else 'in the checkpoint'}, found none "
            f"({len(missing)} missing, {len(extra)} unknown). Build the pair as the run did"
        )
    for name, tensor in current.items():
        if tuple(saved[name].shape) != tuple(tensor.shape):
            raise CheckpointError(
                f"the pair does not fit the checkpoint: {kind} {name!r} is expected to have shape "
                f"{list(saved[name].shape)}, found {list(tensor.shape)}. Build the pair as the run did"
            )
