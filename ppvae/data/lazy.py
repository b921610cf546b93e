"""Image files, arrays on disk, and `LazySplit`: a split whose rows are read from them on demand."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from ppvae.data.checks import BLOCK, digest_of_blocks, one_line, wrong_format_clause
from ppvae.data.split import HasSplitInfo, SplitInfo, check_head, draw_noise, noise_seed
from ppvae.errors import DataError
from ppvae.errors.ranges import check_numbers

CHANNELS = {"1": 1, "L": 1, "RGB": 3}


@dataclass(frozen=True)
class ImageFiles:
    """Image files of one mode (1, L or RGB) and size (width, height); centre crop `crop`, then scaled to `side`."""

    root: Path
    paths: tuple[str, ...]
    mode: str
    size: tuple[int, int]
    crop: int | None = None
    side: int | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def event_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        width, height = (self.side, self.side) if self.side else self.size
        return CHANNELS[self.mode], height, width

    @property
    def levels(self) -> int:
        """2 for bits, 256 for grey levels and colours."""
        return 2 if self.mode == "1" else 256

    def read(self, rows: Any) -> np.ndarray:
        """The rows as [n, C, H, W], uint8 (bool for mode '1'), decoded by a pool of threads."""
        out = np.empty((len(rows), *self.event_shape), bool if self.mode == "1" else np.uint8)
        if len(rows) < 4:
            for i, row in enumerate(rows):
                out[i] = self._read_image(int(row))
            return out
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for i, image in enumerate(pool.map(self._read_image, map(int, rows))):
                out[i] = image
        return out

    def _read_image(self, row: int) -> np.ndarray:
        image = open_image(self.root / self.paths[row], self.mode, self.size)
        if self.crop:
            left, top = (self.size[0] - self.crop) // 2, (self.size[1] - self.crop) // 2
            image = image.crop((left, top, left + self.crop, top + self.crop))
        if self.side:
            image = image.resize((self.side, self.side), 2)  # 2: bilinear, which Pillow antialiases
        array = np.asarray(image)
        return array[None] if array.ndim == 2 else np.moveaxis(array, 2, 0)


@dataclass(frozen=True)
class ArrayFile:
    """An array [N, *event] that a .npy file holds, mapped into memory: the system reads the pages that are used.

    `levels` as in `UnsplitData`. The file must not be made shorter while it is in use.
    """

    array: np.ndarray
    levels: int | None

    def __len__(self) -> int:
        return len(self.array)

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.array.shape[1:]

    def read(self, rows: Any) -> np.ndarray:
        """A copy of the rows."""
        return np.asarray(self.array[np.asarray(rows)])


def open_image(path: Path, mode: str | None = None, size: tuple[int, int] | None = None) -> Any:
    """A Pillow image; with `mode` and `size`, which it must have, it is decoded. `DataError` for a damaged file."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if mode is None:
                return image
            if (image.mode, image.size) == (mode, size):
                image.load()
                return image
            found = f"{image.mode} {image.size[0]}x{image.size[1]}"
    except Exception as error:  # Pillow raises errors of many types for a damaged image
        clause = wrong_format_clause(path) or f" ({one_line(error, 80)})"
        raise DataError(f"{path}: expected an image, found something unreadable{clause}.") from None
    raise DataError(
        f"{path}: expected an image of mode {mode} and size {'x'.join(map(str, size or ()))} like the others, "
        f"found {found}. Convert the folder to one mode and size."
    )


@final
class LazySplit(HasSplitInfo, torch.utils.data.Dataset):
    """A split whose images, or rows of a .npy file, stay on disk; `read` and indexing return plain float32 tensors.

    These are [n, *event], grey levels in [0, 1]. It has the metadata of a `Split` and is a torch `Dataset`. Fixed noise
    is a function of seed, name and row, so that any order of reads gives the same values. A damaged or replaced image
    raises `DataError` with its path.

    >>> from ppvae import data
    >>> train, valid, test = data.load("celeba", size=64)              # doctest: +SKIP
    >>> train.shape, train.read([0, 1]).shape                          # doctest: +SKIP
    (torch.Size([162770, 12288]), torch.Size([2, 12288]))
    """

    def __init__(
        self,
        pictures: ImageFiles | ArrayFile,
        info: SplitInfo,
        index: Tensor,
        labels: Tensor | None = None,
        attributes: dict[str, Tensor] | None = None,
        flat: bool = True,
    ) -> None:
        self.pictures, self.info, self.index, self.labels, self.flat = pictures, info, index, labels, flat
        self.attributes = attributes or {}
        event = pictures.event_shape
        self.shape = torch.Size((len(index), int(np.prod(event)))) if flat else torch.Size((len(index), *event))

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: Any) -> Tensor:
        if hasattr(key, "__index__") and getattr(key, "ndim", 0) == 0:
            return self.read([int(key)])[0]
        return self.read(key)

    def __repr__(self) -> str:
        return f"LazySplit({self.description}, shape {list(self.shape)})"

    def read(self, index: Any = None, generator: torch.Generator | None = None) -> Tensor:
        """A plain tensor of the rows in `index` (all rows by default), with fresh noise where `noise` is set.

        `generator` draws the noise, torch's global one by default; the tensor is then on the generator's device.
        """
        rows = self.index
        if index is not None:
            rows = rows[index if isinstance(index, slice) else torch.as_tensor(index).cpu()]
        values = torch.from_numpy(self.pictures.read(rows.tolist()).astype(np.float32))
        if self.pictures.levels is not None and self.pictures.levels > 2:
            values.div_(self.pictures.levels - 1)
        if self.flat:
            values = values.flatten(1)
        kind, levels, info = self.info.kind, self.info.levels or 2, self.info
        if info.noise:
            return draw_noise(values.to(generator.device) if generator else values, info.noise, levels, generator)
        if kind:
            for value, row in zip(values, rows.tolist(), strict=True):
                generator_of_row = torch.Generator().manual_seed(noise_seed(info.seed, f"{info.name} {row}"))
                value.copy_(draw_noise(value, kind, levels, generator_of_row))
        return values

    def fixed(self, seed: int) -> LazySplit:
        """The same split with noise that is a function of seed and row; itself without noise."""
        check_numbers(seed=seed)
        return self._like(slice(None), self.info.fixed(seed)) if self.noise else self

    def head(self, n: int) -> LazySplit:
        """The first `n` rows (all where there are fewer) as a split of the same kind. `UsageError` for n < 1."""
        return self._like(slice(check_head(n)), self.info)

    @property
    def digest(self) -> str:
        """SHA-256 in hex: of images, of the paths and sizes of the files, the shape and the noise (the values are not
        read); of an array, that of the same rows in memory, a `Split`.
        """
        info, sha = self.info, hashlib.sha256()
        if isinstance(self.pictures, ArrayFile):
            plain = replace(info, noise=None, binarize=None, dequantize=False)
            under = self._like(slice(None), plain) if info.noise else self
            blocks = torch.arange(len(self)).split(max(1, BLOCK // max(1, self.shape[1:].numel())))
            value = digest_of_blocks(self.shape, torch.float32, (under.read(rows) for rows in blocks))
            return hashlib.sha256(f"{value} {info.noise} {info.levels}".encode()).hexdigest() if info.noise else value
        noise = (info.noise, info.kind, None if info.noise else info.seed) if info.kind else None
        sha.update(f"{list(self.shape)} {noise} {self.pictures.crop}\n".encode())
        for row in self.index.tolist():
            path = self.pictures.paths[row]
            sha.update(f"{path} {(self.pictures.root / path).stat().st_size}\n".encode())
        return sha.hexdigest()

    def _like(self, rows: slice, info: SplitInfo) -> LazySplit:
        labels = None if self.labels is None else self.labels[rows]
        attributes = {name: t[rows] for name, t in self.attributes.items()}
        return LazySplit(self.pictures, info, self.index[rows], labels, attributes, self.flat)
