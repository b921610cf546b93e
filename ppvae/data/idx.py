"""IDX files, MNIST's format: two zero bytes, a type, the number of dimensions, the dimensions, the numbers."""

import gzip
import zlib
from pathlib import Path

import numpy as np

from ppvae.data.checks import one_line, wrong_format_clause
from ppvae.errors import DataError

TYPES = {0x08: "uint8", 0x09: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}


def read_idx(path: Path, shape: tuple[int, ...], classes: int | None = None) -> np.ndarray:
    """The uint8 array in an IDX file, gzipped or not, which must have `shape` and, if given, values below `classes`.

    Nothing beyond the header is read before the header is right, so that a wrong file cannot fill the memory. Raises
    `DataError` for a wrong magic number, type, shape or length, for damaged gzip and for a label out of range.
    """
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            with gzip.GzipFile(fileobj=raw) if packed else raw as file:
                _check_header(path, file.read(4 + 4 * len(shape)), shape)
                wanted = int(np.prod(shape))
                body = file.read(wanted)
                beyond = file.read(1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}: the gzip data are damaged or cut short ({one_line(error)}). Fetch it again."
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)}).") from None
    if len(body) != wanted or beyond:
        found = f"only {len(body)}" if len(body) < wanted else "more"
        raise DataError(f"{path}: its header declares {wanted} bytes of data, found {found}. Fetch it again.")
    array = np.frombuffer(body, np.uint8).reshape(shape)
    if classes is not None and array.max() >= classes:
        row = int((array >= classes).argmax())
        raise DataError(f"{path}: row {row} has label {array[row]}, expected 0 to {classes - 1}. Fetch it again.")
    return array


def _check_header(path: Path, head: bytes, shape: tuple[int, ...]) -> None:
    magic, what = head[:4], " x ".join(map(str, shape))
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in TYPES:
        clause = wrong_format_clause(path)
        raise DataError(f"{path}: expected an IDX file of {what} bytes, found first bytes {magic.hex(' ')!r}{clause}.")
    if magic[2] != 0x08:
        raise DataError(f"{path}: expected IDX data of type uint8, found {TYPES[magic[2]]}.")
    if magic[3] != len(shape):
        raise DataError(f"{path}: expected IDX data of {len(shape)} dimensions ({what}), found {magic[3]}.")
    if len(head) < 4 + 4 * len(shape):
        raise DataError(f"{path}: cut short inside its header, after {len(head)} bytes. Fetch it again.")
    found = tuple(np.frombuffer(head[4:], ">u4").tolist())
    if found != shape:
        raise DataError(f"{path}: expected {what}, found {' x '.join(map(str, found))}.")
