"""`UnsplitData`: the rows of a data set before they become splits, and the fixed permutation that splits them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ppvae.data.checks import BLOCK, FINITE_CURE, check_finite, raise_first_invalid
from ppvae.data.lazy import ImageFiles
from ppvae.errors import DataError

PARTS = ("train", "valid", "test")
PERMUTATION = 20131220  # the seed of every permutation split; every result on such data depends on it


@dataclass(frozen=True)
class UnsplitData:
    """All rows of a data set, and the row numbers of train, valid and test.

    `images` [N, *event] is an array, or image files. `levels` L means whole numbers 0..L-1, to be divided by L - 1;
    None means numbers that are used as they are. `labels` is [N]; `attributes` name -> [N, ...]. Where `missing`, NaN
    stands for a missing value.
    """

    name: str
    images: np.ndarray | ImageFiles
    rows: tuple[np.ndarray, ...]
    levels: int | None = 256
    unit: bool = True
    labels: np.ndarray | None = None
    attributes: dict[str, np.ndarray] = field(default_factory=dict)  # name -> [N, ...]
    classes: tuple[str, ...] = ()
    missing: bool = False
    columns: tuple[str, ...] = ()  # of a table: the names,
    kinds: tuple[str | tuple[str, int], ...] = ()  # the kinds,
    table: str = ""  # and both in words, with the levels and what is left out

    def __post_init__(self) -> None:
        for part, rows in zip(PARTS, self.rows, strict=True):
            if len(rows) == 0:
                raise DataError(f"{self.name}: no row is left for {part}; at least 3 rows are needed for three splits.")

    def values(self, rows: np.ndarray, flat: bool) -> torch.Tensor:
        """The rows as float32 [n, *event] or [n, D]."""
        picked = self.images.read(rows) if isinstance(self.images, ImageFiles) else self.images[rows]
        values = torch.from_numpy(picked.astype(np.float32))
        if self.levels is not None and self.levels > 2:
            values.div_(self.levels - 1)
        return values.flatten(1) if flat else values


def permutation_split(n: int, valid: bool = True, test: bool = True) -> tuple[np.ndarray, ...]:
    """Rows 0..n-1 in a fixed random order, cut into 70, 10 and 20 percent; a part left out goes to train."""
    order = np.random.default_rng(PERMUTATION).permutation(n)
    n_valid, n_test = valid * -(-n // 10), test * -(-n // 5)
    n_train = n - n_valid - n_test
    return order[:n_train], order[n_train : n_train + n_valid], order[n_train + n_valid :]


def partition_rows(name: str, sizes: dict[str, int]) -> tuple[np.ndarray, ...]:
    """Row numbers of parts that are concatenated in the order train, valid, test; train is split for a missing part."""
    if "train" not in sizes:
        raise DataError(f"{name}: found a part {', '.join(sizes)}, but no 'train' to go with it.")
    n, valid, test = sizes["train"], "valid" not in sizes, "test" not in sizes
    of_train = permutation_split(n, valid, test) if valid or test else (np.arange(n), np.arange(0), np.arange(0))
    rows, start = [of_train[0]], n
    for part, rows_of_train in zip(PARTS[1:], of_train[1:], strict=True):
        size = sizes.get(part, 0)
        rows.append(np.arange(start, start + size) if part in sizes else rows_of_train)
        start += size
    return tuple(rows)


def check_numbers(array: np.ndarray, where: str, missing: bool = False, columns: Sequence[str] = ()) -> None:
    """Raise a `DataError` unless the array is [N, *event], N and event not empty, of finite real numbers.

    With `missing`, some of the values of a row may be NaN, and not all. `columns` are the names of a table's.
    """
    kinds = {"O": "Python objects", "U": "text", "S": "text", "c": "complex numbers", "V": "records"}
    if array.dtype.kind not in "biuf":
        found = kinds.get(array.dtype.kind, "dates")
        raise DataError(f"{where}: expected real numbers, found {found} (dtype {array.dtype}).")
    shape = list(array.shape)
    if array.ndim < 2:
        raise DataError(
            f"{where}: expected rows of data [N, *event], found shape {shape}. Use x[:, None] for N numbers."
        )
    if array.size == 0:
        raise DataError(f"{where}: it is empty (shape {shape}); expected [N, *event] with data in it.")
    if array.dtype.kind == "f":
        for start, block in row_blocks(array):
            x = torch.from_numpy(as_float32(block))
            finite = FINITE_CURE.replace("finite", "finite in float32")
            check_finite(x, where, missing, finite, "load with missing=True (--missing)", start, columns)


def check_unit(array: np.ndarray, where: str, option: str) -> None:
    """Raise a `DataError` unless every number lies in [0, 1], as `option` needs."""
    for start, block in row_blocks(array):
        x = torch.from_numpy(as_float32(block))
        cure = f"{option} needs values in [0, 1]: rescale them, or save grey levels 0..255 as uint8."
        raise_first_invalid(x, (x >= 0) & (x <= 1), where, cure, start)


def scale(array: np.ndarray) -> tuple[int | None, bool]:
    """(levels, unit): 256 for uint8, 2 for numbers that are all 0 or 1, else None; and whether all lie in [0, 1].

    NaN is ignored.
    """
    if all(bool(((x == 0) | (x == 1) | (x != x)).all()) for _, x in row_blocks(array)):
        return 2, True
    if array.dtype == np.uint8:
        return 256, True
    return None, all(bool(((x >= 0) & (x <= 1) | (x != x)).all()) for _, x in row_blocks(array))


def as_images(array: np.ndarray) -> np.ndarray:
    """Images [N, H, W] get a channel, and [N, H, W, C] with C of 1, 3 or 4 becomes [N, C, H, W]; other shapes stay."""
    if array.ndim == 3:
        return array[:, None]
    channels = (1, 3, 4)
    if array.ndim == 4 and array.shape[3] in channels and array.shape[1] not in channels:
        return np.moveaxis(array, 3, 1)
    return array


def as_labels(array: np.ndarray, n: int, where: str) -> np.ndarray:
    """Labels as int64 [n], from whole numbers [n] or [n, 1]."""
    if array.shape not in ((n,), (n, 1)):
        raise DataError(f"{where}: expected one label for each of {n} rows, found shape {list(array.shape)}.")
    whole = array.dtype.kind in "biu" or (array.dtype.kind == "f" and bool((np.mod(array, 1) == 0).all()))
    if not whole:
        raise DataError(f"{where}: expected labels that are whole numbers, found {array.dtype}.")
    return array.reshape(n).astype(np.int64)


def as_float32(array: np.ndarray) -> np.ndarray:
    """A contiguous float32 copy; numbers beyond its range become infinite, without a warning."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.array(array, dtype=np.float32, order="C")


def row_blocks(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) of about `BLOCK` numbers each, so that checks use little memory."""
    step = max(1, BLOCK // max(1, array[0].size))
    for start in range(0, len(array), step):
        yield start, array[start : start + step]


def not_found(name: str, path: Path, why: str = "") -> DataError:
    """The error for a data set that is not under the root."""
    return DataError(
        f"{name}: {path} not found{why}.\nPass root=, or set PPVAE_DATA, to the folder that holds it "
        "(default ~/.cache/ppvae)."
    )
