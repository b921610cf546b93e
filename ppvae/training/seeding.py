"""The random states that training draws from, and leaves as it found them."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from ppvae.inference.structure import undisturbed


@contextmanager
def all_noise_kept() -> Iterator[None]:
    """Restores torch's, numpy's and Python's random state afterwards: training is seeded by itself."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with undisturbed(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered")  # of Pyro's, on NaN: the error says more
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def seed_all(seed: int) -> None:
    """Seeds torch, numpy and Python: a pair may draw from any of them."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
