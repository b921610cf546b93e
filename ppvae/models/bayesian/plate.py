"""The data plate of models with global latents."""

from typing import Any

import pyro
from torch import Tensor


def data_plate(size: int, x: Tensor) -> Any:
    """The plate of a batch of `size` data, of which the global latents' KL counts once; of held-out data if longer.

    Raises ValueError for fewer than one datum.
    """
    if size < 1:
        raise ValueError(f"size: expected the number of training data, at least 1, found {size}")
    return pyro.plate("data", max(size, len(x)), subsample=x)
