"""Checks of tensors and files before they are used as data, row numbers, and digests."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppvae.errors import DataError
from ppvae.errors.ranges import check_numbers

MAX_GIGABYTES = 8.0  # that a compressed file may unpack to, unless `load` is given another limit
BLOCK = 1 << 20  # the size of the blocks in which a large array is checked
FINITE_CURE = "Every value must be finite: remove the row or fill the gap."


def validated(x: Tensor, name: str) -> Tensor:
    """Checks that the tensor `x` [N, *event] has at least one row and finite numbers only, and returns it.

    `name` is the name of the tensor in error messages. In a split marked by `data.with_missing`, NaN is a missing
    value; a row without observed values is refused. Raises `DataError` for anything but a dense real tensor, for an
    empty one, and for NaN or infinity, with row and column.

    >>> validated(torch.zeros(3, 2), "x").shape
    torch.Size([3, 2])
    >>> validated(torch.tensor([[0.0, 1.0], [0.0, float("nan")]]), "x")
    Traceback (most recent call last):
    ppvae.errors.DataError: x: row 1, column 1 is nan. Every value must be finite: remove the row or fill the gap. ...
    """
    if not isinstance(x, Tensor):
        raise DataError(f"{name}: expected a torch.Tensor, found {type(x).__name__}. Use torch.as_tensor(x).")
    if x.layout != torch.strided or x.is_quantized or x.is_complex():
        raise DataError(f"{name}: expected dense real numbers, found {x.dtype} with layout {x.layout}.")
    if x.ndim == 0 or x.numel() == 0:
        raise DataError(f"{name}: expected [N, *event] with at least one row, found shape {list(x.shape)}.")
    missing, columns = getattr(x, "missing", False), getattr(x, "columns", ())
    check_finite(x.detach(), name, missing, FINITE_CURE, "data.with_missing(x)", columns=columns)
    return x


def check_finite(
    x: Tensor, name: str, missing: bool, finite: str, how: str, offset: int = 0, columns: Sequence[str] = ()
) -> None:
    """Raise a `DataError` for numbers that are not finite; with `missing`, NaN is allowed in rows with other values.

    The message ends with the cure `finite`; on NaN it says `how` to mark it as missing. A vector [N], as of labels, may
    have NaN anywhere.
    """
    if all(bool(torch.isfinite(block).all()) for block in row_blocks(x)):
        return
    is_finite = torch.isfinite(x)
    gaps = x.isnan()
    if not missing:
        cure = f"{finite} If NaN stands for a missing value, say so: {how}." if bool(gaps.any()) else finite
        raise_first_invalid(x, is_finite, name, cure, offset, columns)
    raise_first_invalid(x, is_finite | gaps, name, finite, offset, columns)
    if x.ndim > 1:
        cure = "frame.dropna(how='all')" if columns else "x[~x.isnan().flatten(1).all(1)]"
        _check_not_empty(gaps.reshape(len(x), -1).all(1), name, cure, offset)


def check_rows_of_columns(columns: Sequence[Any], name: str) -> None:
    """Raise a `DataError` for rows of which every column is missing."""
    if all(getattr(column, "missing", False) and isinstance(column, Tensor) for column in columns):
        gaps = [column.detach().isnan().reshape(len(column), -1).all(1).cpu() for column in columns]
        of_frame = "frame.dropna(how='all') before the columns are taken from it"
        _check_not_empty(torch.stack(gaps).all(0), name, of_frame if len(columns) > 1 else "x[~x.isnan()]")


def _check_not_empty(empty: Tensor, name: str, cure: str, offset: int = 0) -> None:
    """Raise a `DataError` for rows without observed values, [N] bool."""
    rows = empty.nonzero()[:, 0]
    if len(rows):
        more = f", nor has it for {len(rows) - 1} more rows" if len(rows) > 1 else ""
        raise DataError(
            f"{name}: row {int(rows[0]) + offset} has no value that is not missing{more}. Nothing observed says "
            f"nothing of the model: remove {'such rows' if len(rows) > 1 else 'the row'}, as by {cure}."
        )


def raise_first_invalid(
    x: Tensor, valid: Tensor, name: str, cure: str, offset: int = 0, names: Sequence[str] = ()
) -> None:
    """Raise a `DataError` with row, column and value where `valid` [N, *event] is false; rows count from `offset`.

    `names` are those of the columns, where they have names.
    """
    if bool(valid.all()):
        return
    event = x.shape[1:]
    invalid = ~valid.reshape(len(x), -1)
    rows = invalid.any(1).nonzero()[:, 0]
    row = int(rows[0])
    columns = invalid[row].nonzero()[:, 0].tolist()
    value = float(x[row].reshape(-1)[columns[0]])
    place = f"row {row + offset}"
    if event:
        shown = ", ".join(f"{c} ({names[c]!r})" if names else str(c) for c in columns[:4])
        shown += ", ..." if len(columns) > 4 else ""
        place += f", column{'s' if len(columns) > 1 else ''} {shown}"
    if len(event) > 1:
        pixel = [int(i) for i in torch.unravel_index(torch.tensor(columns[0]), event)]
        place += f" (of event shape {'x'.join(map(str, event))}: pixel {pixel})"
    more = f", and {len(rows) - 1} more rows like it" if len(rows) > 1 else ""
    raise DataError(f"{name}: {place} is {value:g}{more}. {cure}")


def first_rows(columns: Sequence[Any], count: int) -> Tensor:
    """The rows [count] on which a pair is inspected: one for every column with missing values, then the first ones.

    >>> from ppvae import data
    >>> x = data.with_missing(torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, torch.nan]]))
    >>> first_rows([x], 2), first_rows([x[:2]], 2)
    (tensor([0, 2]), tensor([0, 1]))
    """
    check_numbers(count=count)
    total, rows = len(columns[0]), set()
    for column in columns:
        if getattr(column, "missing", False):
            gaps = column.detach().isnan().reshape(total, -1)
            rows |= set(gaps[:, gaps.any(0)].byte().argmax(0).tolist())
    count = min(count, total)
    return torch.tensor(sorted(list(dict.fromkeys([*sorted(rows), *range(count)]))[:count]))


def indexed(x: Tensor) -> tuple[Tensor, Tensor]:
    """The pair (`x`, its row numbers [N]), for a guide such as `PerDatum` that has parameters for every datum.

    Raises `DataError` where `x` has no rows to number.

    >>> from ppvae import data
    >>> x, index = data.indexed(data.load("digits")[0])
    >>> index[-1]
    tensor(1256)
    """
    if x.ndim == 0 or len(x) == 0:
        raise DataError(f"indexed: expected [N, *event] with at least one row, found shape {list(x.shape)}.")
    return x, torch.arange(len(x), device=x.device)


def digest(x: Tensor) -> str:
    """The SHA-256 in hex of a tensor's dtype, shape and bytes, the same on every device and for every NaN.

    >>> digest(torch.zeros(2, 3)) == digest(torch.zeros(2, 3)), digest(torch.zeros(2, 3)) == digest(torch.zeros(3, 2))
    (True, False)
    """
    return digest_of_blocks(x.shape, x.dtype, row_blocks(x.detach()))


def digest_of_blocks(shape: Sequence[int], dtype: torch.dtype, blocks: Iterable[Tensor]) -> str:
    """The `digest` of a tensor of such a shape and type that consists of blocks of rows."""
    sha = hashlib.sha256(f"{dtype} {list(shape)}\n".encode())
    for block in blocks:
        flat = block.cpu().contiguous().reshape(-1)
        if flat.is_floating_point() and bool(flat.isnan().any()):  # NaN has many bit patterns
            flat = torch.where(flat.isnan(), torch.nan, flat)
        sha.update(flat.view(torch.uint8).numpy().data)
    return sha.hexdigest()


def row_blocks(x: Tensor) -> Sequence[Tensor]:
    """A tensor in blocks of rows of about `BLOCK` numbers each, so that checks use little memory."""
    return x.split(max(1, BLOCK // max(1, x[:1].numel()))) if x.ndim else [x]


def check_unpacked_size(path: Path, size: float, max_gigabytes: float) -> None:
    """Raise a `DataError` for a compressed file that unpacks to more bytes than the limit."""
    if size > 1e9 * max_gigabytes:
        enough = math.ceil(size / 1e9)
        raise DataError(
            f"{path}: expected a file that unpacks to at most {max_gigabytes:g} GB, found one of {size / 1e9:.3g} GB. "
            f"If you trust it, and have the memory: data.load(..., max_gigabytes={enough}) (--max-gigabytes {enough})."
        )


def wrong_format_clause(path: Path) -> str:
    """A clause that names the format of a file whose first bytes are of a known wrong format, else an empty string."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        return f"; it cannot be read ({one_line(error)})"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "; it is empty"
    if text.startswith(b"version https://git-lfs"):
        return "; it looks like a git-lfs pointer, not the file itself (run `git lfs pull`)"
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return "; it looks like an HTML page (a failed download?)"
    if head.startswith(b"\x80"):
        return "; it looks like a Python pickle, which is never unpickled because it can run code"
    return ""


def one_line(error: BaseException, limit: int = 160) -> str:
    """An error's message on one line of at most `limit` characters."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= limit else words[: limit - 3] + "..."
