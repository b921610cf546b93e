"""The data sets that `load` knows by name, read in place below a root folder."""

import contextlib
import importlib.util
import io
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ppvae.data.checks import one_line
from ppvae.data.files import read_arrays
from ppvae.data.idx import read_idx
from ppvae.data.lazy import ImageFiles
from ppvae.data.unsplit import UnsplitData, not_found, permutation_split
from ppvae.errors import DataError

CACHE = Path("~/.cache/ppvae")  # the root where neither an argument nor PPVAE_DATA gives one


def digits(root: Path, size: int) -> UnsplitData:
    """scikit-learn's 1,797 handwritten digits, 8x8, 17 levels."""
    pixels, labels = _digits_of_scikit_learn()
    images = pixels.astype(np.uint8).reshape(-1, 1, 8, 8)
    return UnsplitData("digits", images, permutation_split(len(images)), 17, labels=labels.astype(np.int64))


def _digits_of_scikit_learn() -> tuple[np.ndarray, np.ndarray]:
    """(pixels [N, 64], labels [N]) from the file in the package, whose import takes a second."""
    package = importlib.util.find_spec("sklearn")
    path = Path(package.origin if package and package.origin else "").parent / "datasets" / "data" / "digits.csv.gz"
    if path.is_file():
        rows = np.loadtxt(path, delimiter=",")
        return rows[:, :-1], rows[:, -1]
    from sklearn.datasets import load_digits

    held: Any = load_digits()
    return held.data, held.target


def mnist(root: Path, size: int) -> UnsplitData:
    """MNIST, 28x28: 50,000 + 10,000 (the last of the training file) + 10,000."""
    return _mnist("mnist", root / "MNIST" / "raw")


def mnist_59600(root: Path, size: int) -> UnsplitData:
    """MNIST with 59,600 training images, the last 400 of the training file for validation, and 10,000 test images.

    That is the split of the code of Burda et al. 2016 (arXiv 1509.00519).
    """
    return _mnist("mnist-59600", root / "MNIST" / "raw", 59_600)


def binarized_mnist(root: Path, size: int) -> UnsplitData:
    """The fixed binarisation of MNIST by Larochelle, in its three text files: 50,000 + 10,000 + 10,000 images.

    Source: Larochelle and Murray 2011, The neural autoregressive distribution estimator.
    """
    sizes = {"train": 50_000, "valid": 10_000, "test": 10_000}
    folder = root / "BinarizedMNIST"
    parts = [_read_binary(folder / f"binarized_mnist_{part}.amat", (n, 784)) for part, n in sizes.items()]
    rows = np.split(np.arange(70_000), [50_000, 60_000])
    return UnsplitData("binarized-mnist", np.concatenate(parts).reshape(-1, 1, 28, 28), tuple(rows), 2)


def _read_binary(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """uint8 of a text file of zeros and ones, a row a line."""
    if not os.path.isfile(path):
        raise not_found("binarized-mnist", path)
    try:
        values = np.loadtxt(path, dtype=np.float32, ndmin=2)
    except ValueError as error:
        raise DataError(f"{path}: expected a line of zeros and ones for each image ({one_line(error, 100)}).") from None
    other = values[(values != 0) & (values != 1)]
    if len(other):
        raise DataError(f"{path}: expected zeros and ones, found {other[0]:g}.")
    if values.shape != shape:
        raise DataError(f"{path}: expected {list(shape)} zeros and ones, found {list(values.shape)}.")
    return values.astype(np.uint8)


def fashion_mnist(root: Path, size: int) -> UnsplitData:
    """Fashion-MNIST, in MNIST's layout and sizes."""
    return _mnist("fashion-mnist", root / "FashionMNIST" / "raw")


def _mnist(name: str, folder: Path, num_train: int = 50_000) -> UnsplitData:
    counts = {"train": 60_000, "t10k": 10_000}
    stems = [f"{part}-{what}" for part in counts for what in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    missing = [stem for stem in stems if _find_file(folder, stem) is None]
    if missing:
        _download(name, folder, missing[0])
    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for part, n in counts.items():
        for stem, shape, classes in (("images-idx3", (n, 28, 28), None), ("labels-idx1", (n,), 10)):
            path = _find_file(folder, f"{part}-{stem}-ubyte")
            if path is None:
                raise not_found(name, folder / f"{part}-{stem}-ubyte[.gz]")
            (labels if classes else images).append(read_idx(path, shape, classes))
    rows = np.split(np.arange(70_000), [num_train, 60_000])
    return UnsplitData(
        name, np.concatenate(images)[:, None], tuple(rows), labels=np.concatenate(labels).astype(np.int64)
    )


def _find_file(folder: Path, stem: str) -> Path | None:
    return next((path for path in (folder / stem, folder / f"{stem}.gz") if os.path.isfile(path)), None)


def _download(name: str, folder: Path, missing: str) -> None:
    """Downloads the files by torchvision into a temporary folder, then moves them; `DataError` where that fails."""
    from torchvision import datasets

    root, path = folder.parent.parent, folder / f"{missing}[.gz]"
    if root == CACHE.expanduser():
        with contextlib.suppress(OSError):
            root.mkdir(parents=True, exist_ok=True)
    if not os.access(root, os.W_OK):
        raise not_found(name, path, " (and not fetched: the root is missing or read-only)")
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # torchvision sets none, and would wait for a blocked network for ever
    try:
        with tempfile.TemporaryDirectory(dir=root, prefix=".fetch-") as fetched:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                getattr(datasets, folder.parent.name)(fetched, download=True)
            folder.mkdir(parents=True, exist_ok=True)
            for file in (Path(fetched) / folder.parent.name / "raw").glob("*.gz"):
                if _find_file(folder, file.stem) is None:
                    file.replace(folder / file.name)
    except Exception as error:  # no network, no space, a mirror that serves something else
        raise not_found(name, path, f", and fetching it failed ({one_line(error, 100)})") from None
    finally:
        socket.setdefaulttimeout(timeout)


def omniglot(root: Path, size: int) -> UnsplitData:
    """OMNIGLOT at 28x28, ink 1: background (split by permutation) for train and valid, evaluation for test."""
    images, evaluation, attributes = _omniglot(root)
    background, test = np.flatnonzero(~evaluation), np.flatnonzero(evaluation)
    train, valid, _ = permutation_split(len(background), test=False)
    order = permutation_split(len(test), valid=False, test=False)[0]  # the file is sorted by alphabet
    rows = (background[train], background[valid], test[order])
    return UnsplitData("omniglot", images[:, None], rows, labels=attributes["character"], attributes=attributes)


def omniglot_random(root: Path, size: int) -> UnsplitData:
    """OMNIGLOT with all alphabets in all splits, by permutation: 8,070 test images, 1,345 valid, all others train.

    These are the sizes of Burda et al. 2016 (arXiv 1509.00519); their images and their split are in a file of theirs.
    """
    images, _, attributes = _omniglot(root)
    order = permutation_split(len(images), valid=False, test=False)[0]
    rows = np.split(order, [-1345 - 8070, -8070])
    return UnsplitData(
        "omniglot-random", images[:, None], tuple(rows), labels=attributes["character"], attributes=attributes
    )


def _omniglot(root: Path) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """(images, which of them are of the evaluation alphabets, columns)."""
    path = root / "omniglot28.npz"
    columns = ("alphabet", "character", "drawer")
    if os.path.isfile(path):
        n = 32_460
        arrays = _read_npz(path, {"images": (n, 28, 28), "split": (n,)} | dict.fromkeys(columns, (n,)))
        attributes = {column: arrays[column].astype(np.int64) for column in columns}
        return arrays["images"], arrays["split"] == 1, attributes
    if os.path.isdir(root / "omniglot-py"):
        return _omniglot_py(root)
    raise not_found("omniglot", path, " (nor torchvision's folder omniglot-py)")


def _omniglot_py(root: Path) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    from torchvision.datasets import Omniglot

    images, kinds, table = [], [], []
    alphabets: dict[str, int] = {}
    characters: dict[str, int] = {}
    for background in (True, False):
        try:
            part = Omniglot(root, background=background, loader=str)  # gives paths, so that each image is opened once
        except RuntimeError as error:
            raise DataError(
                f"omniglot: {root / 'omniglot-py'} is not torchvision's OMNIGLOT ({one_line(error)})."
            ) from None
        paths = [Path(part[i][0]) for i in range(len(part))]
        pictures = ImageFiles(Path(), tuple(map(str, paths)), "1", (105, 105))
        for path, image in zip(paths, pictures.read(range(len(paths))), strict=True):
            images.append(_ink(image[0]))
            kinds.append(not background)
            alphabet, character = path.parts[-3], "/".join(path.parts[-3:-1])
            ids = alphabets.setdefault(alphabet, len(alphabets)), characters.setdefault(character, len(characters))
            table.append((*ids, int(path.stem.split("_")[-1])))
    columns = np.array(table, dtype=np.int64).T
    return np.stack(images), np.array(kinds), dict(zip(("alphabet", "character", "drawer"), columns, strict=True))


def _ink(paper: np.ndarray) -> np.ndarray:
    """A bool image with paper true, to uint8 28x28 with ink 255, averaged by area."""
    from PIL import Image

    return np.asarray(Image.fromarray((~paper).astype(np.uint8) * 255).resize((28, 28), Image.Resampling.BOX))


def freyfaces(root: Path, size: int) -> UnsplitData:
    """Frey faces, 28x20: frames of one video in random order, so that a test frame has near copies in train."""
    arrays = _read_npz(root / "freyfaces.npz", {"images": (1965, 28, 20)})
    return UnsplitData("freyfaces", arrays["images"][:, None], permutation_split(1965))


def smiles(root: Path, size: int) -> UnsplitData:
    """Faces at 32x32 with label 1 for smiling."""
    n = 13_165
    arrays = _read_npz(root / "smiles32.npz", {"images": (n, 32, 32), "label": (n,)})
    labels, classes = arrays["label"].astype(np.int64), ("not smiling", "smiling")
    return UnsplitData("smiles", arrays["images"][:, None], permutation_split(n), labels=labels, classes=classes)


def _read_npz(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, checked to have these shapes, and dtype uint8 for 'images'."""
    if not os.path.isfile(path):
        raise not_found(path.stem, path)
    arrays = read_arrays(path)
    for key, shape in shapes.items():
        kind = "uint8" if key == "images" else "whole numbers"
        found = arrays.get(key)
        if found is None:
            raise DataError(f"{path}: expected a key {key!r}, found only {', '.join(map(repr, arrays))}.")
        if found.shape != shape or not (found.dtype == np.uint8 or (found.dtype.kind in "biu" and key != "images")):
            what = f"{found.dtype} {list(found.shape)}"
            raise DataError(f"{path}: expected {key!r} of {kind} and shape {list(shape)}, found {what}.")
    return arrays


def celeba(root: Path, size: int) -> UnsplitData:
    """CelebA with its own partition: the central 148x148 pixels, scaled to `size`, and 40 boolean attributes."""
    from torchvision.datasets import CelebA

    folder = root / "celeba"
    if not os.path.isdir(folder):
        raise not_found("celeba", folder / "img_align_celeba")
    try:
        held: Any = CelebA(str(root), split="all", target_type="attr", download=False)
        lines = (folder / "list_eval_partition.txt").read_text().split("\n")
        partition = dict(line.split() for line in lines if line.strip())
        parts = np.array([int(partition[name]) for name in held.filename])
    except Exception as error:  # torchvision: RuntimeError for a missing or altered file, anything for odd lines
        raise DataError(
            f"celeba: {folder} is not complete ({one_line(error, 100)}).\nExpected torchvision's layout: the folder "
            "img_align_celeba and the five .txt lists beside it, unaltered."
        ) from None
    names = [name for name in held.attr_names if name]
    attributes = {name: held.attr[:, i].numpy().astype(bool) for i, name in enumerate(names)}
    pictures = ImageFiles(folder / "img_align_celeba", tuple(held.filename), "RGB", (178, 218), 148, size)
    rows = tuple(np.flatnonzero(parts == part) for part in range(3))
    return UnsplitData("celeba", pictures, rows, attributes=attributes)


def cifar10(root: Path, size: int) -> UnsplitData:
    """CIFAR-10 in colour at 32x32, by torchvision, which checks the hash of every file before it reads it."""
    from torchvision.datasets import CIFAR10

    folder = root / CIFAR10.base_folder
    if not os.path.isdir(folder):
        raise not_found("cifar10", folder)
    try:
        held: list[Any] = [CIFAR10(str(root), train=train, download=False) for train in (True, False)]
    except Exception as error:  # torchvision: RuntimeError for a missing or altered file
        raise DataError(
            f"cifar10: {folder} is not complete ({one_line(error, 100)}).\nExpected torchvision's folder, unaltered."
        ) from None
    images = np.ascontiguousarray(np.concatenate([part.data for part in held]).transpose(0, 3, 1, 2))
    labels = np.concatenate([np.asarray(part.targets, dtype=np.int64) for part in held])
    rows = np.split(np.arange(60_000), [45_000, 50_000])
    return UnsplitData("cifar10", images, tuple(rows), labels=labels, classes=tuple(held[0].classes))


NAMES = {
    "digits": digits,
    "mnist": mnist,
    "mnist-59600": mnist_59600,
    "binarized-mnist": binarized_mnist,
    "fashion-mnist": fashion_mnist,
    "omniglot": omniglot,
    "omniglot-random": omniglot_random,
    "celeba": celeba,
    "freyfaces": freyfaces,
    "smiles": smiles,
    "cifar10": cifar10,
}
