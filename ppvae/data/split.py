"""`Split`: a tensor of data with labels, noise, base measure and digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from torch import Tensor

from ppvae.data.checks import digest
from ppvae.errors import UsageError
from ppvae.errors.ranges import COUNT, check_numbers

Noise = Literal["binarize", "dequantize"]


@dataclass(frozen=True)
class SplitInfo:
    """The metadata of a split; `noise` is the noise that every read draws afresh, if any."""

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
    columns: tuple[str, ...] = ()
    kinds: tuple[str | tuple[str, int], ...] = ()
    table: str = ""

    @property
    def kind(self) -> Noise | None:
        """The noise of the values, whether drawn once or at every read."""
        return "binarize" if self.binarize else "dequantize" if self.dequantize else None

    def fixed(self, seed: int) -> SplitInfo:
        """The same, with the noise drawn once at `seed`."""
        binarize = self.binarize and "fixed"
        return replace(self, binarize=binarize, seed=check_seed(seed), noise=None)


class HasSplitInfo:
    """The properties that `Split` and `LazySplit` share, read from `info`."""

    info: SplitInfo

    name = property(lambda self: self.info.name, doc="Data set and part, such as 'mnist/test'.")
    event_shape = property(lambda self: self.info.event_shape, doc="[C, H, W] of images, flat or not; else the event.")
    levels = property(lambda self: self.info.levels, doc="How many values a number can take, or None.")
    classes = property(lambda self: self.info.classes, doc="The names of the labels 0, 1, ... where they have names.")
    binarize = property(lambda self: self.info.binarize, doc="None, 'fixed' or 'dynamic'.")
    dequantize = property(lambda self: self.info.dequantize, doc="Whether uniform noise fills the gaps of the levels.")
    seed = property(lambda self: self.info.seed, doc="The seed at which fixed noise was drawn.")
    noise = property(lambda self: self.info.noise, doc="What every read draws: None, 'binarize' or 'dequantize'.")
    columns = property(lambda self: self.info.columns, doc="The names of the columns of a table, or none.")
    kinds = property(
        lambda self: self.info.kinds, doc="The kind of each column of a table, as `likelihoods.Mixed` takes."
    )
    table = property(lambda self: self.info.table, doc="The columns of a table in words, with the names of levels.")
    missing = property(lambda self: self.info.missing, doc="Whether NaN stands for a missing value, or is refused.")

    @property
    def base_measure(self) -> str:
        """The base measure of log-densities of these values; '256 levels' bounds the log-mass of the levels."""
        info = self.info
        if info.dequantize:
            return f"{info.levels} levels"
        if info.binarize or info.levels == 2:
            return "binary"
        return "density on [0, 1]" if info.unit else "density"

    @property
    def description(self) -> str:
        """Name, number of rows of a subset, and noise: the part of a result's name that identifies the data."""
        info, rows = self.info, len(self)  # type: ignore[arg-type]
        name = info.name if rows == info.rows else f"{info.name} ({rows} of {info.rows} rows)"
        when = "anew at every read" if info.noise else f"at seed {info.seed}"
        if info.binarize:
            return f"{name}, binarized {when if info.noise else 'fixed ' + when}"
        if info.dequantize:
            return f"{name}, dequantized from {info.levels} levels {when}"
        if info.missing:
            name += ", NaN missing"
        if info.levels is None:
            return f"{name}, values as given"
        return f"{name}, " + ("binary as given" if info.levels == 2 else f"{info.levels} levels, not dequantized")


@final
class Split(HasSplitInfo, Tensor):
    """A data tensor [N, *event] with labels, noise and provenance; every torch operation on it gives a plain tensor.

    Where `noise` is None, the tensor holds the values themselves; a slice, list, index tensor or mask over the rows
    gives a `Split`, and anything else a plain tensor. Where `noise` is set, the tensor holds the values under the noise
    (grey levels, say), and indexing ALWAYS gives a plain tensor of values drawn afresh from torch's global generator;
    torch operations see the values under the noise, so read batches by `read` or by indexing, and evaluate on
    `fixed(seed)`. Labels [N], `attributes` (name -> [N, ...]) and `index` [N] (positions in the source) follow
    the rows. Out-of-range rows raise IndexError. Where `missing` is set, NaN stands for a missing value.

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
        info: SplitInfo,
        index: Tensor | None = None,
        labels: Tensor | None = None,
        attributes: dict[str, Tensor] | None = None,
    ) -> Split:
        self = torch.Tensor._make_subclass(cls, values.detach())
        self.info = info
        self.index = torch.arange(len(values), device=values.device) if index is None else index
        self.labels = labels
        self.attributes = attributes or {}
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __getitem__(self, key: Any) -> Any:
        values = self.detach()[key]
        if self.noise:
            return draw_noise(values, self.noise, self.levels)
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
        return draw_noise(values, self.noise, self.levels, generator) if self.noise else values

    def fixed(self, seed: int) -> Split:
        """A split whose noise is drawn once, on the CPU, by a generator of `seed` and name; itself without noise."""
        check_seed(seed)
        if not self.noise:
            return self
        generator = torch.Generator().manual_seed(noise_seed(seed, self.name))
        values = draw_noise(self.detach().cpu(), self.noise, self.levels, generator).to(self.device)
        return self._like(values, lambda t: t, self.info.fixed(seed))

    def head(self, n: int) -> Split:
        """The first `n` rows (all where there are fewer) as a split of the same kind. `UsageError` for n < 1."""
        n = check_head(n)
        return self._like(self.detach()[:n], lambda t: t[:n])

    def to(self, *args: Any, **kwargs: Any) -> Split:
        """The split on another device or in another dtype; labels, attributes and index keep their dtype."""
        values = self.detach().to(*args, **kwargs)
        return self._like(values, lambda t: t.to(values.device))

    def cpu(self, *args: Any, **kwargs: Any) -> Split:
        return self.to("cpu")

    def cuda(self, device: Any = None, *args: Any, **kwargs: Any) -> Split:
        return self.to(
            "cuda" if device is None else torch.device("cuda", device) if isinstance(device, int) else device
        )

    def double(self, *args: Any, **kwargs: Any) -> Split:
        return self.to(torch.float64)

    @property
    def digest(self) -> str:
        """SHA-256 in hex of dtype, shape and bytes; where `noise` is set, of the values under it and its kind."""
        cached: tuple[int, str] | None = getattr(self, "_digest", None)
        version = 0 if self.is_inference() else self._version
        if cached is None or cached[0] != version:  # an in-place change gives a new digest
            value = digest(self)
            if self.noise:
                value = hashlib.sha256(f"{value} {self.noise} {self.levels}".encode()).hexdigest()
            cached = self._digest = version, value
        return cached[1]

    def marked_missing(self) -> Split:
        """The split with NaN declared to stand for missing values."""
        return self._like(self.detach(), lambda t: t, replace(self.info, missing=True))

    def _like(self, values: Tensor, move: Any, info: SplitInfo | None = None) -> Split:
        labels = None if self.labels is None else move(self.labels)
        attributes = {name: move(t) for name, t in self.attributes.items()}
        return Split(values, info or self.info, move(self.index), labels, attributes)


def draw_noise(values: Tensor, noise: Noise, levels: int, generator: torch.Generator | None = None) -> Tensor:
    """Values [*] in [0, 1] under one fresh draw of the noise.

    'binarize': Bernoulli(value). 'dequantize': (v + u) / levels with v = value * (levels - 1) and u uniform; u keeps
    2^-16 away from 0 and 1, so that in float32 no sum is rounded into the next level.
    """
    if noise == "binarize":
        return torch.bernoulli(values, generator=generator)
    u = torch.rand(values.shape, generator=generator, device=values.device, dtype=values.dtype)
    return (values * (levels - 1)).round_().add_(u.mul_(1 - 2**-15).add_(2**-16)).div_(levels)


def noise_seed(seed: int, name: str) -> int:
    """The seed of the noise of a split: a hash of `seed` and `name`, so that splits have independent noise."""
    return int.from_bytes(hashlib.sha256(f"{check_seed(seed)} {name}".encode()).digest()[:7], "big")


def check_seed(seed: int) -> int:
    """The seed; raises UsageError unless it is an integer."""
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise UsageError(f"seed: expected a whole number, found {seed!r}.")
    check_numbers(seed=seed)
    return int(seed)


def check_head(n: int) -> int:
    """The number of rows; raises UsageError unless it is an integer of at least one."""
    COUNT.check_number("head", n)
    return int(n)
