"""The data plate of models with global latents."""

from typing import Any

import pyro
from torch import Tensor

from ppvae.errors.ranges import LARGEST, Range

NUM_DATA = Range("the number of training data, at least 1", 1, LARGEST, whole=True)


def data_plate(size: int, x: Tensor) -> Any:
    """The plate of a batch of `size` data, of which the global latents' KL counts once; of held-out data if longer.

    Raises UsageError for fewer than one datum.
    """
    NUM_DATA.check_number("size", size)
    return pyro.plate("data", max(size, len(x)), subsample=x)
