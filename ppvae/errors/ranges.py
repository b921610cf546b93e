"""The ranges of numbers that arguments and options take, by name: one table for Python calls and the command line."""

import functools
import math
import numbers
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
        many: sequences of such numbers are taken too.
        given: the argument has a number always, so that None is refused.
    """

    words: str
    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    open: bool = False
    size: bool = False
    names: bool = False
    many: bool = False
    given: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raises UsageError, by the name of the argument, for a number out of the range, or for what is no number.

        Each element of a sequence is checked, and the number of a tensor without dims; a function, such as a schedule,
        is left to its users.
        """
        if self.many and getattr(value, "ndim", None):  # a tensor
            value = value.flatten().tolist()
        if isinstance(value, tuple | list) and self.many:
            for element in value:
                self.check(name, element)
            return
        if (value is None and not self.given) or callable(value) or (isinstance(value, str) and self.names):
            return
        self.check_number(name, value)

    def check_number(self, name: str, value: Any) -> None:
        """Raises UsageError, by the name of the argument, for what is not one number of the range."""
        if getattr(value, "ndim", None) == 0:
            value = value.item()
        kind = "a whole number of " if self.whole and self.words.startswith("at ") else ""
        if self.whole and not _is_whole(value):
            raise UsageError(f"{name}: expected {kind}{self.words}, found {_shown(value)}")
        if not self.whole and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
            raise UsageError(f"{name}: expected {self.words}, found {_shown(value)}")
        number = int(value) if self.whole else float(value)
        inside = self.low < number < self.high if self.open else self.low <= number <= self.high
        if not inside or not (self.whole or math.isfinite(number)):
            words = f"at most {self.high}" if number > self.high in (LARGEST, MOST_DRAWS, 2**64 - 1) else self.words
            raise UsageError(f"{name}: expected {words}, found {_shown(value)}")
        if self.size and number > (most := memory() // BYTES):
            raise UsageError(
                f"{name}: expected at most {most}, as many numbers as fit into the {memory() / 1e9:.0f} GB of memory "
                f"of this machine, found {_shown(value)}"
            )


def _is_whole(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def _shown(value: Any) -> str:
    """A value for a message, whatever the number of its digits, on one line."""
    text = str(value) if isinstance(value, numbers.Number) else " ".join(repr(value).split())
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
SIZE = Range("at least 1", 1, LARGEST, whole=True, size=True, many=True)
DRAWS = Range("at least 1", 1, MOST_DRAWS, whole=True)
DRAWS_OR_NONE = Range("at least 0", 0, MOST_DRAWS, whole=True)
FINITE = Range("a finite number")
POSITIVE = Range("a finite positive number", 0, open=True)
AT_LEAST_ZERO = Range("a finite number of at least 0", 0)
PROBABILITY = Range("a probability between 0 and 1", 0, 1, open=True)
SHARE = Range("a share from 0 to 1", 0, 1)
SEED = Range("a whole number of 64 bits", -(2**63), 2**64 - 1, whole=True, given=True)

RANGES: Mapping[str, Range] = {
    **dict.fromkeys(("epochs", "batch_size"), replace(COUNT, given=True)),
    **dict.fromkeys(("rows", "count", "head", "folds", "num_data", "num_labels"), COUNT),
    **dict.fromkeys(("patience", "warmup", "labelled", "gaps", "checks", "step"), COUNT_OR_NONE),
    "latents": replace(COUNT_OR_NONE, many=True),
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
    **dict.fromkeys(("blocks", "times"), replace(SIZE, words="at least 0", low=0)),
    **dict.fromkeys(("shape", "event_shape", "side", "colours", "event_dim"), SIZE),
    **dict.fromkeys(("cols", "period", "n", "k", "top"), COUNT),
    "dims": Range("a whole number", -LARGEST, LARGEST, whole=True),
    "levels": Range("at least 2", 2, LARGEST, whole=True, size=True),
    "rank": Range("at least 0", 0, LARGEST, whole=True, size=True),
    "num_particles": DRAWS,
    **dict.fromkeys(("num_chains", "num_bounds", "num_partitions", "num_draws", "draws", "global_draws"), DRAWS),
    **dict.fromkeys(("local_particles", "num_samples"), DRAWS),
    "max_particles": Range("at least 100", 100, MOST_DRAWS, whole=True),  # a block of particles
    **dict.fromkeys(("num_temperatures", "num_leapfrog", "num_nodes", "rounds"), DRAWS),
    **dict.fromkeys(("beside", "bounds"), replace(DRAWS, many=True)),
    "steps": replace(DRAWS_OR_NONE, many=True),
    **dict.fromkeys(("bracket", "bracket_data"), DRAWS_OR_NONE),
    **dict.fromkeys(("guide_particles", "replications", "posterior_draws"), DRAWS_OR_NONE),
    **dict.fromkeys(("surgery_draws", "gradients", "calibrations"), DRAWS_OR_NONE),
    **dict.fromkeys(("seed", "data_seed"), SEED),
    "target_std_error": Range("a positive number of nats", 0, open=True),
    **dict.fromkeys(("clip", "max_gigabytes", "kappa", "smoothing", "reach"), POSITIVE),
    **dict.fromkeys(("temperature", "lengthscale", "step_size"), replace(POSITIVE, many=True, given=True)),
    **dict.fromkeys(("scale", "df"), replace(POSITIVE, many=True, names=True, given=True)),
    "concentration": replace(POSITIVE, many=True, names=True, given=True),
    **dict.fromkeys(
        ("eps", "weight_decay", "checkpoint_seconds", "tolerance", "free_bits", "gamma", "wake", "threshold"),
        AT_LEAST_ZERO,
    ),
    **dict.fromkeys(("sleep", "label_weight", "rate", "noise", "floor", "jitter"), AT_LEAST_ZERO),
    "beta": replace(AT_LEAST_ZERO, given=True),
    **dict.fromkeys(("alpha", "weight", "width", "tail_adaptive_beta", "values", "amounts", "limits"), FINITE),
    "capacity": replace(FINITE, given=True),
    "lr": Range("a finite learning rate of at least 0", 0),
    "first": Range("a number in (0, 1)", 0, 1, open=True),
    "target_acceptance": Range("a share between 0 and 1", 0, 1, open=True),
    **dict.fromkeys(("resample", "decay", "ramp"), SHARE),
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


def check_numbers(**values: Any) -> None:
    """`check_ranges` of arguments that are one number each: neither None nor a sequence or a function.

    >>> check_numbers(epochs=None)
    Traceback (most recent call last):
    ppvae.errors.UsageError: epochs: expected a whole number of at least 1, found None
    """
    for name, value in values.items():
        RANGES[name].check_number(name, value)


def check_sequences(**values: Any) -> None:
    """`check_ranges` of arguments that are sequences of numbers, such as sizes of layers.

    >>> check_sequences(hidden=3)
    Traceback (most recent call last):
    ppvae.errors.UsageError: hidden: expected a sequence of numbers, found 3
    """
    for name, value in values.items():
        value = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise UsageError(f"{name}: expected a sequence of numbers, found {_shown(value)}")
        for element in value:
            RANGES[name].check_number(name, element)


def check_known_ranges(values: Mapping[str, Any], label: Callable[[str], str] = str) -> None:
    """`check_ranges` of those numbers that the table knows; `label` turns a name into what messages call it.

    Strings are left out, and None, which only an argument whose type allows it has here.
    """
    for name, value in values.items():
        is_text = all(isinstance(v, str) for v in (value if isinstance(value, tuple | list) and value else (value,)))
        if name in RANGES and value is not None and not is_text:
            RANGES[name].check(label(name), value)
