"""What models made of parts share: each part registers its parameters where it is called."""

from __future__ import annotations

from typing import Any

import pyro
from torch import Tensor, nn

from ppvae.conditional import called
from ppvae.naming import unique


class Composed(nn.Module):
    """A pair made of parts; a part that is called registers its parameters under a name unique to the object."""

    def __init__(self, name: str):
        super().__init__()
        self._name = unique(name)

    def _call(self, part: str, *args: Tensor, context: Tensor | None = None) -> Any:
        """What a part gives, by the name of the attribute; the context too if it declares one."""
        conditional = self.get_submodule(part)
        pyro.module(f"{self._name}.{part}", conditional)
        return called(conditional, *args, context=context)
