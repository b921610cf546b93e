"""A user's own data: .npz, .npy and .pt files, and folders of images."""

import logging
import math
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np
import torch

from ppvae.data.checks import MAX_GIGABYTES, check_unpacked_size, one_line, wrong_format_clause
from ppvae.data.column_conversion import check_dense_size
from ppvae.data.lazy import CHANNELS, ImageFiles, open_image
from ppvae.data.tables import SUFFIXES as TABLES
from ppvae.data.unsplit import (
    PARTS,
    UnsplitData,
    as_images,
    as_labels,
    check_numbers,
    partition_rows,
    permutation_split,
    scale,
)
from ppvae.errors import DataError, PpvaeError
from ppvae.errors.memory import explain_out_of_memory

SUFFIXES = (".npz", ".npy", ".pt", ".pth")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
MAX_DEPTH, MAX_ENTRIES = 40, 10_000_000  # of a folder of images
DATA_KEYS = ("images", "image", "x", "data", "arr_0", "")
IMAGE_KEYS = ("images", "image")
LABEL_KEYS = ("labels", "label", "y", "targets", "target")
PART_NAMES = {"training": "train", "validation": "valid", "val": "valid"}
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_ROLE = r"(x|images?|data|y|labels?|targets?)"
_NAMES_OF_PARTS = "(train|training|valid|validation|val|test)"
_PART = re.compile(rf"(?:{_ROLE}_)?{_NAMES_OF_PARTS}(?:_{_ROLE})?", re.IGNORECASE)
_PART_OF_COLUMN = re.compile(rf"(?:(\w+)_)?{_NAMES_OF_PARTS}(?:_(\w+))?", re.IGNORECASE)

log = logging.getLogger("ppvae")


def read_path(path: Path, missing: bool = False, max_gigabytes: float = MAX_GIGABYTES) -> UnsplitData:
    """The rows of a file or folder, checked; raises `DataError` for what is no data.

    With `missing`, NaN in a file stands for a missing value. An archive may unpack to `max_gigabytes`.
    """
    if os.path.isdir(path):
        return read_folder(path)
    if not os.path.exists(path):
        raise DataError(f"{path}: no such file or folder.")
    if not os.path.isfile(path):
        raise DataError(f"{path}: expected a regular file, found a pipe, a socket or a device, which may never end.")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{path}: expected {', '.join((*SUFFIXES, *TABLES))} or a folder of images, found {path.suffix!r}."
        )
    arrays = read_arrays(path, max_gigabytes)
    return _presplit_source(path, arrays, missing) or _unsplit_source(path, arrays, missing)


def read_arrays(path: Path, max_gigabytes: float = MAX_GIGABYTES) -> dict[str, np.ndarray]:
    """The arrays of a .npz, .npy or .pt file by key ('' for the only one), read so that no code in the file can run."""
    try:
        check_unpacked_size(path, _unpacked_bytes(path), max_gigabytes)
        with explain_out_of_memory(str(path), "Take a part of the data, or a machine with more memory"):
            arrays = _read_torch(path) if path.suffix.lower() in (".pt", ".pth") else _read_numpy(path)
    except PpvaeError:
        raise
    except Exception as error:  # a damaged or crafted file raises almost anything
        why = wrong_format_clause(path) or f" ({one_line(error)})"
        raise DataError(
            f"{path}: expected plain arrays, found something that cannot be read safely{why}.\n"
            "Save numbers only: numpy.savez(path, images=x) or torch.save(tensor, path)."
        ) from None
    if not arrays:
        raise DataError(f"{path}: expected arrays, found none in it.")
    return arrays


def _unpacked_bytes(path: Path) -> int:
    """The bytes that the compressed members of a zip archive, as .npz and .pt files are, declare to unpack to."""
    if not zipfile.is_zipfile(path):
        return 0
    with zipfile.ZipFile(path) as archive:
        return sum(member.file_size for member in archive.infolist() if member.compress_type != zipfile.ZIP_STORED)


def _check_declared_sizes(path: Path) -> None:
    """Raises DataError for an array whose header declares more bytes than follow: NumPy would allocate them first."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            return _check_declared_size(path, "", file, path.stat().st_size)
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.filename.endswith(".npy"):
                with archive.open(member) as file:
                    _check_declared_size(path, member.filename.removesuffix(".npy"), file, member.file_size)


def _check_declared_size(path: Path, key: str, file: IO[bytes], size: int) -> None:
    read_header = HEADERS.get(np.lib.format.read_magic(file))
    if read_header is not None:
        shape, _, dtype = read_header(file)
        declared = math.prod(shape) * dtype.itemsize
        held = size - file.tell()
        if declared > held and not dtype.hasobject:
            raise DataError(
                f"{path}{_key_clause(key)}: expected plain arrays, found {held} bytes of an array of {declared}."
            )


def _read_numpy(path: Path) -> dict[str, np.ndarray]:
    _check_declared_sizes(path)
    held = np.load(path, mmap_mode="r", allow_pickle=False)  # an array alone is mapped: only what is used is read
    if isinstance(held, np.ndarray):
        return {"": held}
    with held:
        arrays = {key: held[key] for key in held.files}
    if {"format", "shape", "data"} <= arrays.keys():
        return {"": _read_sparse(path, arrays["shape"])}
    return {key: x for key, x in arrays.items() if isinstance(x, np.ndarray)}


def _read_sparse(path: Path, shape: np.ndarray) -> np.ndarray:
    """The dense array of a file that scipy.sparse.save_npz wrote."""
    import scipy.sparse

    check_dense_size(shape.tolist(), 8, str(path))
    return scipy.sparse.load_npz(path).toarray()


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        held = torch.load(path, weights_only=True, map_location="cpu")
    if isinstance(held, torch.Tensor):
        held = {"": held}
    if not isinstance(held, Mapping):
        raise DataError(f"{path}: expected a tensor or a dict of tensors, found {type(held).__name__}.")
    return {str(key): _as_array(x, path, str(key)) for key, x in held.items() if isinstance(x, torch.Tensor)}


def _as_array(x: torch.Tensor, path: Path, key: str) -> np.ndarray:
    if x.layout != torch.strided or x.is_quantized or x.device.type == "meta":
        raise DataError(f"{path}{_key_clause(key)}: expected a dense tensor, found {x.layout} on {x.device}.")
    size, held = x.numel() * x.element_size(), x.untyped_storage().nbytes()
    if size > held:  # an expanded tensor: a file of a few bytes could stand for terabytes
        raise DataError(
            f"{path}{_key_clause(key)}: expected the {list(x.shape)} numbers to take {size} bytes, found {held}."
        )
    x = x.detach().resolve_conj().resolve_neg()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


def _presplit_source(path: Path, arrays: dict[str, np.ndarray], missing: bool) -> UnsplitData | None:
    """The source of a file with keys such as train, test or x_train, y_train; None for a file without them."""
    found: dict[str, dict[str, str]] = {"data": {}, "labels": {}}
    images = False
    for key in arrays:
        if match := _PART.fullmatch(key):
            part = PART_NAMES.get(match[2].lower(), match[2].lower())
            kind = "labels" if (match[1] or match[3] or "x").lower()[0] in "ylt" else "data"
            images |= (match[1] or match[3] or "").lower() in IMAGE_KEYS
            other = found[kind].setdefault(part, key)
            if other != key:
                raise DataError(f"{path}: keys {other!r} and {key!r} both look like the {kind} of {part}. Keep one.")
    data, labels = found["data"], found["labels"]
    if not data:
        return None
    parts = [part for part in PARTS if part in data]
    for part in parts:
        check_numbers(arrays[data[part]], f"{path}{_key_clause(data[part])}", missing)
        _check_same_rows(path, arrays, data[parts[0]], data[part])
    if labels and set(labels) != set(data):
        raise DataError(
            f"{path}: expected labels for all of {', '.join(parts)} or none, found {', '.join(labels.values())}."
        )
    sizes = {part: len(arrays[data[part]]) for part in parts}
    rows = partition_rows(str(path), sizes)
    whole = np.concatenate([arrays[data[part]] for part in parts])
    y = [as_labels(arrays[labels[part]], sizes[part], f"{path}{_key_clause(labels[part])}") for part in parts if labels]
    levels, unit = scale(whole)
    labelled = np.concatenate(y) if y else None
    columns = _columns_in_parts(arrays, sizes)
    used = {*data.values(), *labels.values(), *(key for keys, _ in columns.values() for key in keys)}
    _name_unused(path, arrays, used)
    extra = {name: joined for name, (_, joined) in columns.items()}
    return UnsplitData(path.name, _shaped(whole, images), rows, levels, unit, labelled, extra, missing=missing)


def _columns_in_parts(
    arrays: dict[str, np.ndarray], sizes: Mapping[str, int]
) -> dict[str, tuple[list[str], np.ndarray]]:
    """{name: (keys, the column)} of further arrays that every part has, such as lengths_train and lengths_test."""
    found: dict[str, dict[str, str]] = {}
    for key in arrays:
        match = _PART_OF_COLUMN.fullmatch(key)
        name = match and (match[1] or "") + (match[3] or "")
        if match and name and not (match[1] and match[3]) and not _PART.fullmatch(key):
            part = match[2].lower()
            found.setdefault(name, {})[PART_NAMES.get(part, part)] = key
    columns = {}
    for name, keys in found.items():
        if set(keys) != set(sizes):
            continue
        parts = [arrays[keys[part]] for part in sizes]
        fits = all(_has_rows(x, n) for x, n in zip(parts, sizes.values(), strict=True))
        if fits and len({x.shape[1:] for x in parts}) == 1:
            columns[name] = list(keys.values()), np.concatenate(parts)
    return columns


def _has_rows(x: np.ndarray, n: int) -> bool:
    return x.ndim > 0 and len(x) == n and x.dtype.kind in "biuf"


def _shaped(data: np.ndarray, images: bool) -> np.ndarray:
    """Images with a channel, channels first, where a key asks for them or values are grey levels; else as they are."""
    return as_images(data) if images or data.dtype == np.uint8 else data


def _name_unused(path: Path, arrays: Mapping[str, np.ndarray], used: set[str]) -> None:
    """One line in the log for the arrays of a file that no part of a split holds."""
    unused = [f"{key!r} {x.dtype} {list(x.shape)}" for key, x in arrays.items() if key not in used]
    if unused:
        log.warning("ppvae: %s: not used: %s; a column has a number or more for each row", path, ", ".join(unused))


def _unsplit_source(path: Path, arrays: dict[str, np.ndarray], missing: bool) -> UnsplitData:
    """The source of a file with one array of data, optional labels, and further columns [N, ...]."""
    lower = {key.lower(): key for key in arrays}
    key = next((lower[k] for k in DATA_KEYS if k in lower), None)
    if key is None:
        candidates = [k for k, x in arrays.items() if x.ndim >= 2 and x.dtype.kind in "biuf"]
        if len(candidates) != 1:
            held = ", ".join(f"{k!r} {list(x.shape)}" for k, x in list(arrays.items())[:6])
            raise DataError(f"{path}: expected the data under a key such as 'images', 'x' or 'train', found {held}.")
        key = candidates[0]
    data, n = arrays[key], len(arrays[key]) if arrays[key].ndim else 0
    check_numbers(data, f"{path}{_key_clause(key)}", missing)
    if n < 3:
        raise DataError(f"{path}{_key_clause(key)}: expected at least 3 rows, for three splits; found {n}.")
    label_key = next((lower[k] for k in LABEL_KEYS if k in lower and lower[k] != key), None)
    labels = None if label_key is None else as_labels(arrays[label_key], n, f"{path}{_key_clause(label_key)}")
    extra = {k: x for k, x in arrays.items() if k not in (key, label_key) and _has_rows(x, n)}
    _name_unused(path, arrays, {key, *extra, *([label_key] if label_key is not None else [])})
    levels, unit = scale(data)
    values = _shaped(data, key.lower() in IMAGE_KEYS)
    return UnsplitData(path.name, values, permutation_split(n), levels, unit, labels, extra, missing=missing)


def _check_same_rows(path: Path, arrays: dict[str, np.ndarray], first: str, other: str) -> None:
    a, b = arrays[first], arrays[other]
    if a.shape[1:] != b.shape[1:] or (a.dtype == np.uint8) != (b.dtype == np.uint8):
        raise DataError(
            f"{path}{_key_clause(other)}: expected rows like those of {first!r} ({a.dtype} {list(a.shape[1:])}), "
            f"found {b.dtype} {list(b.shape[1:])}."
        )


def _key_clause(key: str) -> str:
    return f", key {key!r}" if key else ""


def _image_paths(folder: Path) -> Iterator[str]:
    """The images below a folder, relative to it; names that start with a dot and links to folders are left out.

    Raises:
        DataError: the folders go deeper, or hold more, than folders of images do.
    """
    waiting, count = [("", 0)], 0
    while waiting:
        above, depth = waiting.pop()
        try:
            entries = sorted(os.scandir(folder / above), key=lambda entry: entry.name)
        except OSError:  # not readable
            continue
        count += len(entries)
        if depth > MAX_DEPTH or count > MAX_ENTRIES:
            raise DataError(
                f"{folder}: expected a folder of images, found one of more than {MAX_DEPTH} levels, or of more "
                f"than {MAX_ENTRIES} files."
            )
        for entry in entries:
            name = f"{above}{entry.name}"
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                waiting.append((f"{name}/", depth + 1))
            elif Path(entry.name).suffix.lower() in IMAGES and os.path.isfile(entry):
                yield name


def read_folder(folder: Path) -> UnsplitData:
    """The images below a folder, sorted by path, all of one mode and size.

    Where every image lies in a subfolder, the subfolders are the labels; where the first level is train/valid/test
    (train and one more), it gives the splits, and the level below it the labels.
    """
    paths = sorted(_image_paths(folder))
    if len(paths) < 3:
        raise DataError(
            f"{folder}: expected a folder with at least 3 images, found {len(paths)} ({', '.join(IMAGES[:3])}, ...)."
        )
    first = open_image(folder / paths[0])
    mode, size = first.mode, first.size
    if mode not in CHANNELS:
        raise DataError(
            f"{folder / paths[0]}: expected an image of mode L, RGB or 1, found {mode}. Convert the folder."
        )
    for path in paths[1:]:
        image = open_image(folder / path)
        if (image.mode, image.size) != (mode, size):
            raise DataError(
                f"{folder / path}: expected {mode} {size[0]}x{size[1]} like {paths[0]}, found {image.mode} "
                f"{image.size[0]}x{image.size[1]}. Convert the folder to one mode and size."
            )
    levels = [path.split("/")[:-1] for path in paths]
    parts = [PART_NAMES.get(level[0].lower(), level[0].lower()) if level else "" for level in levels]
    rows = permutation_split(len(paths))
    if len(set(parts)) > 1 and set(parts) <= set(PARTS):
        order = sorted(range(len(paths)), key=lambda i: PARTS.index(parts[i]))
        paths, levels = [paths[i] for i in order], [levels[i][1:] for i in order]
        rows = partition_rows(str(folder), {part: parts.count(part) for part in PARTS if part in parts})
    classes = tuple(sorted({level[0] for level in levels})) if all(levels) else ()
    labels = np.array([classes.index(level[0]) for level in levels]) if classes else None
    pictures = ImageFiles(folder, tuple(paths), mode, size)
    return UnsplitData(
        f"folder {folder.resolve().name}", pictures, rows, 2 if mode == "1" else 256, True, labels, classes=classes
    )
