"""The ranges of numbers that arguments and options take, by name: one table for Python calls and the command line."""

import functools
import math
import numbers
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from ppvae.errors import UsageError

LARGEST = 2**63 - 1  # a whole number that torch takes
MOST_DRAWS = 10**9  # for one datum, and steps of one chain; no computation with more ends
BYTES = 4  # of one number, at the least


@final
@dataclass(frozen=True)
class Range:
    """The numbers that an argument takes.

    Attributes:
        words: the range in words, without its kind.
        low, high: the bounds.
        whole: only whole numbers.
        open: the bounds themselves are left out.
        size: memory grows with the number, so that those beyond the memory of this machine are left out.
        names: strings are taken too; the function checks which.
    """

    words: str
    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    open: bool = False
    size: bool = False
    names: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raises UsageError, by the name of the argument, for a number out of the range, or for what is no number.

        Each element of a sequence is checked; a function, such as a schedule, and a tensor are left to their users.
        """
        if isinstance(value, tuple | list):
            for element in value:
                self.check(name, element)
            return
        if (isinstance(value, str) and self.names) or _is_left_to_users(value):
            return
        kind = "a whole number of " if self.whole and not self.words.startswith("a ") else ""
        if self.whole and (isinstance(value, bool) or not hasattr(value, "__index__")):
            raise UsageError(f"{name}: expected {kind}{self.words}, found {value!r}")
        if not self.whole and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
            raise UsageError(f"{name}: expected {self.words}, found {value!r}")
        number = int(value) if self.whole else float(value)
        inside = self.low < number < self.high if self.open else self.low <= number <= self.high
        if not inside or not (self.whole or math.isfinite(number)):
            words = f"at most {self.high}" if self.whole and number > self.high else self.words
            raise UsageError(f"{name}: expected {words}, found {_shown(value)}")
        if self.size and number > (most := memory() // BYTES):
            raise UsageError(
                f"{name}: expected at most {most}, as many numbers as fit into the {memory() / 1e9:.0f} GB of memory "
                f"of this machine, found {_shown(value)}"
            )


def _is_left_to_users(value: Any) -> bool:
    return value is None or callable(value) or getattr(value, "ndim", 0) > 0


def _shown(value: Any) -> str:
    """A number for a message, whatever the number of its digits."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:20]}... ({len(text)} characters)"


@functools.cache
def memory() -> int:
    """The bytes of memory of this machine; a large number where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 1 << 50


COUNT = Range("at least 1", 1, LARGEST, whole=True)
COUNT_OR_NONE = Range("at least 0", 0, LARGEST, whole=True)
SIZE = Range("at least 1", 1, LARGEST, whole=True, size=True)
DRAWS = Range("at least 1", 1, MOST_DRAWS, whole=True)
DRAWS_OR_NONE = Range("at least 0", 0, MOST_DRAWS, whole=True)
FINITE = Range("a finite number")
POSITIVE = Range("a finite positive number", 0, open=True)
POSITIVE_OR_WORD = Range("a finite positive number", 0, open=True, names=True)
AT_LEAST_ZERO = Range("a finite number of at least 0", 0)
SHARE = Range("a share from 0 to 1", 0, 1)

RANGES: Mapping[str, Range] = {
    **dict.fromkeys(("epochs", "batch_size", "rows", "count", "head", "folds", "num_data", "num_labels"), COUNT),
    **dict.fromkeys(("patience", "warmup", "labelled", "gaps", "latents", "checks"), COUNT_OR_NONE),
    **dict.fromkeys(
        (
            "latent",
            "hidden",
            "features",
            "inputs",
            "outputs",
            "components",
            "classes",
            "codes",
            "size",
            "channels",
            "layers",
            "transforms",
            "flows",
            "bins",
            "topics",
            "words",
            "variables",
            "batches",
            "sides",
        ),
        SIZE,
    ),
    "levels": Range("at least 2", 2, LARGEST, whole=True, size=True),
    "rank": Range("at least 0", 0, LARGEST, whole=True, size=True),
    "num_particles": DRAWS,
    **dict.fromkeys(("num_chains", "num_bounds", "num_partitions", "num_draws", "draws", "global_draws"), DRAWS),
    **dict.fromkeys(("local_particles", "max_particles", "beside", "bounds", "num_samples"), DRAWS),
    **dict.fromkeys(("num_temperatures", "num_leapfrog", "num_nodes", "steps", "rounds"), DRAWS),
    **dict.fromkeys(("bracket", "bracket_data"), DRAWS_OR_NONE),
    **dict.fromkeys(("guide_particles", "replications", "posterior_draws"), DRAWS_OR_NONE),
    **dict.fromkeys(("surgery_draws", "gradients"), DRAWS_OR_NONE),
    **dict.fromkeys(("seed", "data_seed"), Range("a whole number of 64 bits", -(2**63), 2**64 - 1, whole=True)),
    "target_std_error": Range("a positive number of nats", 0, open=True),
    **dict.fromkeys(("clip", "temperature", "lengthscale", "max_gigabytes"), POSITIVE),
    **dict.fromkeys(("scale", "df", "concentration"), POSITIVE_OR_WORD),
    **dict.fromkeys(
        ("eps", "weight_decay", "checkpoint_seconds", "tolerance", "free_bits", "gamma", "wake"),
        AT_LEAST_ZERO,
    ),
    **dict.fromkeys(("sleep", "label_weight", "rate", "noise", "floor", "jitter", "beta"), AT_LEAST_ZERO),
    **dict.fromkeys(("alpha", "weight", "capacity", "tail_adaptive_beta"), FINITE),
    "lr": Range("a finite learning rate of at least 0", 0),
    "first": Range("a number in (0, 1)", 0, 1, open=True),
    "target_acceptance": Range("a share between 0 and 1", 0, 1, open=True),
    "resample": SHARE,
}


def check_ranges(**values: Any) -> None:
    """Checks the numbers that are passed by the names of their arguments; None stands for a default.

    Raises:
        UsageError: a number out of the range of its name, in one sentence: name, what was expected, what was found.

    >>> check_ranges(epochs=3, clip=None, hidden=(200, 200))
    >>> check_ranges(epochs=0)
    Traceback (most recent call last):
    ppvae.errors.UsageError: epochs: expected at least 1, found 0
    """
    for name, value in values.items():
        RANGES[name].check(name, value)


def check_known_ranges(values: Mapping[str, Any], prefix: str = "") -> None:
    """`check_ranges` of those numbers that the table knows, strings left out; `prefix` is put before their names."""
    for name, value in values.items():
        is_text = all(isinstance(v, str) for v in (value if isinstance(value, tuple | list) and value else (value,)))
        if name in RANGES and not is_text:
            RANGES[name].check(f"{prefix}{name}", value)
