"""Data sets as three splits of float32 tensors: named sets, and a user's own files and folders of images.

`load` returns the splits, checked and with fixed noise. `loader` is the reader of columns that training, evaluation and
generation share; this room imports nothing of the library but errors and random seeds.

Wherever data are asked for, `admission` takes what has one meaning: tensors, splits and a tuple of them; NumPy arrays
of any numeric type; pandas DataFrames and AnnData, which keep the names of their columns; SciPy and torch sparse
matrices, made dense; lists of numbers, or of tensors that the model's arguments say are rows, or columns; a dict whose
keys are the model's arguments; a map-style `torch.utils.data.Dataset`, read once; a `DataLoader` that visits every row,
by its data set. All else is refused with the way to pass it: a tensor that requires a gradient, sequences of different
lengths, a loader that chooses rows. Numbers keep their precision: float64 or integer data reach the pair as they are,
and where its networks are float32 the error says `x.float()`; nothing is rounded silently.
"""

import difflib
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from ppvae.data import files, named, tables
from ppvae.data.checks import MAX_GIGABYTES, digest, first_rows, indexed, validated
from ppvae.data.column_conversion import with_missing
from ppvae.data.lazy import ArrayFile, ImageFiles, LazySplit
from ppvae.data.split import Noise, Split, SplitInfo, check_seed
from ppvae.data.unsplit import PARTS, UnsplitData, check_unit
from ppvae.errors import UsageError
from ppvae.errors.ranges import check_numbers

__all__ = ["LazySplit", "Split", "digest", "first_rows", "indexed", "load", "root_folder", "validated", "with_missing"]

MEMORY_LIMIT = 4 << 30  # bytes; image and .npy files that would take more as float32 become a LazySplit


def load(
    name: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    binarize: str | None = None,
    dequantize: bool = False,
    flat: bool = True,
    seed: int = 0,
    *,
    size: int | None = None,
    missing: bool = False,
    columns: Mapping[str, str] | None = None,
    max_gigabytes: float = MAX_GIGABYTES,
    lazy: bool = False,
) -> tuple[Split | LazySplit, Split | LazySplit, Split | LazySplit]:
    """Train, valid and test of a named set or a user's file, as float32 [N, D], or [N, C, H, W] with `flat=False`.

    `name` is digits, mnist, mnist-59600, binarized-mnist, fashion-mnist, omniglot, omniglot-random, celeba, freyfaces,
    smiles or cifar10, or the path of an .npz, .npy, .pt, .csv or .parquet file or of a folder of images. `root` is the
    folder that holds the named sets: the argument, else the environment variable PPVAE_DATA, else ~/.cache/ppvae. Files
    are read in place, and nothing is written, except that MNIST and Fashion-MNIST are downloaded where they are missing
    and the root is writable.

    Grey levels are divided by 255 (digits: 16). uint8 that is 0 or 1 throughout, bool and floats stay as they are. Of
    arrays named `images`, and of uint8, [N, H, W] gets a channel and [N, H, W, C] becomes [N, C, H, W]; any other keep
    their shape, such as sequences [N, T, D]. Labels, attributes (a file's other arrays of N rows, such as lengths) and
    `index` (positions in the source, its parts end to end) are attributes of the split; arrays that are no column are
    named in the log. The source's own partition is used where it has one, else
    one fixed permutation: 70, 10 and 20 percent; no row is in two splits. `seed` is that of the noise alone.

    `binarize="fixed"` draws Bernoulli(pixel) once; `"dynamic"` draws train afresh at every read. `dequantize=True`
    gives (v + u) / levels in [0, 1), u uniform, train afresh at every read; a density of it bounds the log-mass of the
    levels. `size` is the side of CelebA's images, 64 by default. Images and .npy files that need more than 4 GiB are
    read on demand (`LazySplit`), with `lazy=True` smaller ones, too. With `missing=True`, NaN in a file stands for a
    missing value (`with_missing`).

    The columns of a table (.csv, .tsv, .parquet) become numbers by their kind, which `columns` gives, {name: kind}, or
    which is guessed: `real`, `count`, `binary`, `categorical`, `label` (the labels), `skip`. The split has their names
    (`columns`), their kinds (`kinds`, as `models.TableVAE` takes them), and both in words (`table`).

    A compressed file (.npz, .pt, .parquet) may unpack to `max_gigabytes`; one that declares more is refused.

    Raises `UsageError` for an option or a name that does not exist, `DataError` for a file that is missing, damaged, or
    not finite numbers; no code in a file is ever run.

    >>> from ppvae import data
    >>> train, valid, test = data.load("digits", binarize="fixed")
    >>> train.shape, valid.shape, test.shape
    (torch.Size([1257, 64]), torch.Size([180, 64]), torch.Size([360, 64]))
    >>> test.name, test.event_shape, test.base_measure, test.labels[:3]
    ('digits/test', (1, 8, 8), 'binary', tensor([3, 2, 2]))
    """
    if binarize not in (None, "fixed", "dynamic"):
        raise UsageError(f"binarize: expected None, 'fixed' or 'dynamic', found {binarize!r}.")
    if binarize and dequantize:
        raise UsageError(
            "binarize and dequantize exclude each other: binary values have no levels to fill. Choose one."
        )
    if missing and (binarize or dequantize):
        raise UsageError("missing goes with neither binarize nor dequantize: a missing value has no noise. Choose one.")
    check_seed(seed)
    check_numbers(max_gigabytes=max_gigabytes)
    if columns and not tables.is_table(name):
        raise UsageError(f"columns: expected a table ({', '.join(tables.SUFFIXES)}), found {name}.")
    source = _source(name, root, size, missing, columns, max_gigabytes)
    stored = _stored(source)
    if lazy and stored is None:
        raise UsageError(
            f"lazy: expected images, or a .npy file of numbers without missing values, found {name}. Save the data by "
            "numpy.save(path, x), or leave lazy out."
        )
    if binarize and not source.unit and isinstance(source.images, np.ndarray):
        check_unit(source.images, str(name), "binarize")
    if dequantize and source.levels is None:
        raise UsageError(f"{name}: dequantize needs whole grey levels; save them as uint8 0..255, not as floats.")
    kind: Noise | None = "binarize" if binarize else "dequantize" if dequantize else None
    if stored is not None and not lazy and 4 * len(stored) * math.prod(stored.event_shape) <= MEMORY_LIMIT:
        stored = None
    train, valid, test = (_split(source, part, kind, flat, seed, stored) for part in range(3))
    redrawn = binarize == "dynamic" or dequantize
    return train if redrawn else train.fixed(seed), valid.fixed(seed), test.fixed(seed)


def _source(
    name: str | os.PathLike[str],
    root: str | os.PathLike[str] | None,
    size: int | None,
    missing: bool,
    columns: Mapping[str, str] | None,
    max_gigabytes: float,
) -> UnsplitData:
    plain = {_normalized(known): known for known in named.NAMES}
    known = plain.get(_normalized(name)) if isinstance(name, str) else None
    if size is not None and known != "celeba":
        raise UsageError(f"size: expected None, as only celeba is scaled; found {size!r} for {name}.")
    if known:
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= 148):
            raise UsageError(f"size: expected a number of pixels from 1 to 148, found {size!r}.")
        if missing:
            raise UsageError(f"missing: {known} has no missing values; the option is for a user's own file.")
        return named.NAMES[known](root_folder(root), size or 64)
    if not isinstance(name, str | os.PathLike):
        raise UsageError(f"load: expected a name or a path, found {type(name).__name__}.")
    path = Path(name).expanduser()
    if (
        isinstance(name, os.PathLike)
        or os.path.exists(path)
        or path.suffix.lower() in (*files.SUFFIXES, *tables.SUFFIXES)
        or os.sep in name
    ):
        return _read_path(path, missing, columns, max_gigabytes)
    near = difflib.get_close_matches(_normalized(name), plain, n=1, cutoff=0.5)
    hint = f" Did you mean {plain[near[0]]!r}?" if near else ""
    shown = name if len(name) <= 80 else f"{name[:80]}... ({len(name)} characters)"
    raise UsageError(
        f"unknown data set {shown!r}.{hint} Known: {', '.join(named.NAMES)};\n"
        "or the path of a .npz, .npy, .pt, .csv or .parquet file or of a folder of images."
    )


def _read_path(path: Path, missing: bool, columns: Mapping[str, str] | None, max_gigabytes: float) -> UnsplitData:
    if tables.is_table(path) and os.path.isfile(path):
        return tables.read_table(path, missing, columns, max_gigabytes)
    return files.read_path(path, missing, max_gigabytes)


def _normalized(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")


def root_folder(root: str | os.PathLike[str] | None = None) -> Path:
    """The folder that holds the named sets: the argument, else that of PPVAE_DATA, else ~/.cache/ppvae.

    >>> root_folder("~/images").name
    'images'
    """
    given = root or os.environ.get("PPVAE_DATA")
    return Path(given).expanduser() if given else named.CACHE.expanduser()


def _stored(source: UnsplitData) -> ImageFiles | ArrayFile | None:
    """What rows can be read from on demand: image files, or an array that is mapped from a file."""
    if isinstance(source.images, ImageFiles):
        return source.images
    mapped = isinstance(source.images, np.memmap) and not source.missing
    return ArrayFile(source.images, source.levels) if mapped else None


def _split(
    source: UnsplitData, part: int, kind: Noise | None, flat: bool, seed: int, stored: ImageFiles | ArrayFile | None
) -> Split | LazySplit:
    """One part of the source, with noise at every read where there is any; read on demand where it is stored."""
    rows, images = source.rows[part], source.images
    index = torch.from_numpy(rows.astype(np.int64))
    info = SplitInfo(
        name=f"{source.name}/{PARTS[part]}",
        event_shape=images.event_shape if isinstance(images, ImageFiles) else tuple(images.shape[1:]),
        rows=len(rows),
        levels=2 if kind == "binarize" else source.levels,
        unit=source.unit,
        classes=source.classes,
        binarize="dynamic" if kind == "binarize" else None,
        dequantize=kind == "dequantize",
        seed=int(seed),
        noise=kind,
        missing=source.missing,
        columns=source.columns,
        kinds=source.kinds,
        table=source.table,
    )
    labels = None if source.labels is None else torch.from_numpy(source.labels[rows])
    attributes = {key: torch.from_numpy(column[rows]) for key, column in source.attributes.items()}
    if stored is not None:
        return LazySplit(stored, info, index, labels, attributes, flat)
    return Split(source.values(rows, flat), info, index, labels, attributes)
