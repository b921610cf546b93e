"""Seeds derived from keys, and blocks that restore the random state of their caller."""

import hashlib
import random
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch


def derive_seed(*key: Any) -> int:
    """A 63-bit seed that is a hash of a key; two keys give independent noise.

    >>> derive_seed(0, 1) == derive_seed(0, 1), derive_seed(0, 1) == derive_seed(0, 2)
    (True, False)
    """
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def fork_rng() -> AbstractContextManager[None]:
    """Restores torch's random state, on the CPU and on every GPU, when the block ends."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))


@contextmanager
def fork_all_rngs() -> Iterator[None]:
    """Restores the random states of torch, NumPy and Python when the block ends."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered")  # Pyro's warning on NaN; our error says more
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def seed_all(seed: int) -> None:
    """Seeds torch, NumPy and Python, because a pair may draw from any of them."""
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # torch would write down the call stack for each kind of device that is not there, for a millisecond
        torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
