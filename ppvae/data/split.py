"""`Split`: a tensor of data that knows its labels, its noise, its base measure and its digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from torch import Tensor

from ppvae.data.checks import digest, validated
from ppvae.errors import UsageError

Noise = Literal["binarize", "dequantize"]


@dataclass(frozen=True)
class Facts:
    """What is known of a split besides its values; `noise` says which noise every read draws afresh, if any."""

    name: str
    event_shape: tuple[int, ...]
    rows: int
    levels: int | None = None
    unit: bool = True
    classes: tuple[str, ...] = ()
    binarize: str | None = None
    dequantize: bool = False
    seed: int = 0
    noise: Noise | None = None
    missing: bool = False

    @property
    def kind(self) -> Noise | None:
        """The noise that is part of the values, whether drawn once or at every read."""
        return "binarize" if self.binarize else "dequantize" if self.dequantize else None

    def fixed(self, seed: int) -> Facts:
        """The same, with the noise drawn once at `seed`."""
        binarize = self.binarize and "fixed"
        return replace(self, binarize=binarize, seed=checked_seed(seed), noise=None)


class Described:
    """The properties that `Split` and `LazySplit` share; all come from `facts`."""

    facts: Facts

    name = property(lambda self: self.facts.name, doc="Data set and part, such as 'mnist/test'.")
    event_shape = property(lambda self: self.facts.event_shape, doc="[C, H, W] of images, flat or not; else the event.")
    levels = property(lambda self: self.facts.levels, doc="How many values a number can take, or None.")
    classes = property(lambda self: self.facts.classes, doc="The names of the labels 0, 1, ... where they have names.")
    binarize = property(lambda self: self.facts.binarize, doc="None, 'fixed' or 'dynamic'.")
    dequantize = property(lambda self: self.facts.dequantize, doc="Whether uniform noise fills the gaps of the levels.")
    seed = property(lambda self: self.facts.seed, doc="The seed at which fixed noise was drawn.")
    noise = property(lambda self: self.facts.noise, doc="What every read draws: None, 'binarize' or 'dequantize'.")
    missing = property(lambda self: self.facts.missing, doc="Whether NaN stands for a missing value, or is refused.")

    @property
    def base_measure(self) -> str:
        """What a log-density of these values is relative to; '256 levels' bounds the log-mass of the levels."""
        facts = self.facts
        if facts.dequantize:
            return f"{facts.levels} levels"
        if facts.binarize or facts.levels == 2:
            return "binary"
        return "density on [0, 1]" if facts.unit else "density"

    @property
    def description(self) -> str:
        """Name, number of rows where not all, and noise: the part of a result's name that says which data."""
        facts, rows = self.facts, len(self)  # type: ignore[arg-type]
        name = facts.name if rows == facts.rows else f"{facts.name} ({rows} of {facts.rows} rows)"
        when = "anew at every read" if facts.noise else f"at seed {facts.seed}"
        if facts.binarize:
            return f"{name}, binarized {when if facts.noise else 'fixed ' + when}"
        if facts.dequantize:
            return f"{name}, dequantized from {facts.levels} levels {when}"
        if facts.missing:
            name += ", NaN missing"
        if facts.levels is None:
            return f"{name}, values as given"
        return f"{name}, " + ("binary as given" if facts.levels == 2 else f"{facts.levels} levels, not dequantized")


@final
class Split(Described, Tensor):
    """A data tensor [N, *event] with labels, noise and provenance; every torch operation on it gives a plain tensor.

    Where `noise` is None, the tensor holds the values themselves; a slice, list, index tensor or mask over the rows
    gives a `Split`, and anything else a plain tensor. Where `noise` is set, the tensor holds the values under the noise
    (grey levels, say), and indexing ALWAYS gives a plain tensor of values drawn afresh from torch's global generator;
    torch operations see the values under the noise, so read batches by `read` or by indexing, and evaluate on
    `fixed(seed)`. Labels [N], `attributes` (name -> [N]) and `index` [N] (positions in the source) follow the rows.
    Out-of-range rows raise IndexError. Where `missing` is set, NaN stands for a missing value (`with_missing`).

    >>> from ppvae import data
    >>> train, valid, test = data.load("digits", binarize="dynamic")
    >>> test.description, test[:3].labels.shape, type(test + 1).__name__
    ('digits/test, binarized fixed at seed 0', torch.Size([3]), 'Tensor')
    >>> train.noise, train[:3].unique(), train.fixed(0).noise
    ('binarize', tensor([0., 1.]), None)
    """

    labels: Tensor | None
    attributes: dict[str, Tensor]
    index: Tensor  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(
        cls,
        values: Tensor,
        facts: Facts,
        index: Tensor | None = None,
        labels: Tensor | None = None,
        attributes: dict[str, Tensor] | None = None,
    ) -> Split:
        self = torch.Tensor._make_subclass(cls, values.detach())
        self.facts = facts
        self.index = torch.arange(len(values), device=values.device) if index is None else index
        self.labels = labels
        self.attributes = attributes or {}
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __getitem__(self, key: Any) -> Any:
        values = self.detach()[key]
        if self.noise:
            return drawn(values, self.noise, self.levels)
        by_row = isinstance(key, slice | list) or (hasattr(key, "ndim") and key.ndim == 1)
        return self._like(values, lambda t: t[key]) if by_row else values

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Split({self.description}, shape {list(self.shape)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Split:
        copy = memo[id(self)] = self._like(self.detach().clone(), torch.clone)
        return copy

    def read(self, index: Any = None, generator: torch.Generator | None = None) -> Tensor:
        """A plain tensor of the rows in `index` (all rows by default), with fresh noise where `noise` is set.

        `generator` draws the noise, torch's global one by default; it lives on the split's device.
        """
        values = self.detach()
        if isinstance(index, Tensor) and index.dtype == torch.long and index.ndim == 1:
            values = values.index_select(0, index.to(values.device))
        elif index is not None:
            values = values[index if isinstance(index, slice) else torch.as_tensor(index, device=values.device)]
        return drawn(values, self.noise, self.levels, generator) if self.noise else values

    def fixed(self, seed: int) -> Split:
        """A split whose noise is drawn once, on the CPU, by a generator of `seed` and name; itself without noise."""
        if not self.noise:
            return self
        generator = torch.Generator().manual_seed(stream(seed, self.name))
        values = drawn(self.detach().cpu(), self.noise, self.levels, generator).to(self.device)
        return self._like(values, lambda t: t, self.facts.fixed(seed))

    def head(self, n: int) -> Split:
        """The first `n` rows (all where there are fewer) as a split of the same kind. `UsageError` for n < 1."""
        n = checked_head(n)
        return self._like(self.detach()[:n], lambda t: t[:n])

    def to(self, *args: Any, **kwargs: Any) -> Split:
        """The split on another device or in another dtype; labels, attributes and index keep their dtype."""
        values = self.detach().to(*args, **kwargs)
        return self._like(values, lambda t: t.to(values.device))

    def cpu(self, *args: Any, **kwargs: Any) -> Split:
        """`to("cpu")`."""
        return self.to("cpu")

    def cuda(self, device: Any = None, *args: Any, **kwargs: Any) -> Split:
        """`to("cuda")`."""
        return self.to(
            "cuda" if device is None else torch.device("cuda", device) if isinstance(device, int) else device
        )

    def double(self, *args: Any, **kwargs: Any) -> Split:
        """`to(torch.float64)`."""
        return self.to(torch.float64)

    @property
    def digest(self) -> str:
        """SHA-256 in hex of dtype, shape and bytes; where `noise` is set, of the values under it and its kind."""
        kept: tuple[int, str] | None = getattr(self, "_digest", None)
        version = 0 if self.is_inference() else self._version
        if kept is None or kept[0] != version:  # an in-place change gives a new digest
            of_values = digest(self)
            if self.noise:
                of_values = hashlib.sha256(f"{of_values} {self.noise} {self.levels}".encode()).hexdigest()
            kept = self._digest = version, of_values
        return kept[1]

    def _like(self, values: Tensor, move: Any, facts: Facts | None = None) -> Split:
        labels = None if self.labels is None else move(self.labels)
        attributes = {name: move(t) for name, t in self.attributes.items()}
        return Split(values, facts or self.facts, move(self.index), labels, attributes)


def with_missing(x: Tensor, name: str = "a table") -> Split:
    """The data `x` [N, *event] as a split in which NaN stands for a missing value, for `fit` and `log_marginal`.

    log p(x) is then that of the values observed (Mattei and Frellsen 2019, arXiv 1812.02633), for pairs whose model
    leaves missing values out and whose guide takes them, as `likelihoods.Mixed` and `nn.Missing`. The mark stays with
    slices and copies; a split keeps its facts, and a plain tensor is called `name`. Raises `DataError`, by row, for
    infinity and for a row without any value.

    >>> import torch
    >>> x = with_missing(torch.tensor([[1.0, torch.nan], [2.0, 3.0]]))
    >>> x.missing, x[:1].missing, x.description
    (True, True, 'a table, NaN missing, values as given')
    """
    if not isinstance(x, Tensor) or x.ndim == 0:
        validated(x, name)  # which says what is wrong with it
    split = x if isinstance(x, Split) else Split(x, Facts(name, tuple(x.shape[1:]), len(x), unit=False))
    marked = split._like(split.detach(), lambda t: t, replace(split.facts, missing=True))
    validated(marked, marked.name)
    return marked


def drawn(values: Tensor, noise: Noise, levels: int, generator: torch.Generator | None = None) -> Tensor:
    """Values [*] in [0, 1] under one fresh draw of the noise.

    'binarize': Bernoulli(value). 'dequantize': (v + u) / levels with v = value * (levels - 1) and u uniform; u keeps
    2^-16 away from 0 and 1, so that in float32 no sum is rounded into the next level.
    """
    if noise == "binarize":
        return torch.bernoulli(values, generator=generator)
    u = torch.rand(values.shape, generator=generator, device=values.device, dtype=values.dtype)
    return (values * (levels - 1)).round_().add_(u.mul_(1 - 2**-15).add_(2**-16)).div_(levels)


def stream(seed: int, name: str) -> int:
    """The state of a generator that belongs to `seed` and `name`, so that no two parts share their noise."""
    return int.from_bytes(hashlib.sha256(f"{checked_seed(seed)} {name}".encode()).digest()[:7], "big")


def checked_seed(seed: int) -> int:
    """The seed, if it is a whole number."""
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise UsageError(f"seed: expected a whole number, found {seed!r}.")
    return int(seed)


def checked_head(n: int) -> int:
    """The number of rows asked for, if it is at least one."""
    if isinstance(n, bool) or not hasattr(n, "__index__") or int(n) < 1:
        raise UsageError(f"head: expected a number of rows of at least 1, found {n!r}.")
    return int(n)
