"""Tables in .csv, .tsv and .parquet files: the kind of each column, guessed or given, and its values as numbers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ppvae.data.checks import MAX_GIGABYTES, check_unpacked_size, one_line
from ppvae.data.split import Split
from ppvae.data.unsplit import UnsplitData, check_numbers, permutation_split
from ppvae.errors import DataError, UsageError, count_of, did_you_mean

SUFFIXES = (".csv", ".tsv", ".parquet")
KINDS = ("real", "count", "binary", "categorical", "label", "skip")
LABEL_NAMES = ("label", "labels", "target", "class")
MAX_LEVELS = 50  # of a column of text; one with more is left out, as names and identifiers are
SHOWN = 6  # columns in an error
SEPARATORS = (",", ";", "\t")

ColumnKind = str | tuple[str, int]  # as `ppvae.likelihoods.Mixed` takes them


@dataclass(frozen=True)
class TableColumn:
    """A column of a table: its kind, its values as numbers [N], the names of its levels, and why it is left out."""

    name: str
    kind: str
    values: np.ndarray
    levels: tuple[str, ...] = ()
    reason: str = ""

    @property
    def spec(self) -> ColumnKind:
        return (self.kind, len(self.levels)) if self.kind == "categorical" else self.kind

    @property
    def description(self) -> str:
        """Name and kind, with the names of levels."""
        if self.reason:
            return f"{self.name} left out ({self.reason})"
        shown = ", ".join(self.levels[:6]) + (", ..." if len(self.levels) > 6 else "")
        return f"{self.name} {self.kind}" + (f" ({shown})" if self.levels else "")


def is_table(path: Any) -> bool:
    """Whether a path is that of a table, by its suffix."""
    return Path(path).suffix.lower() in SUFFIXES


def read_table(
    path: Path,
    missing: bool = False,
    columns: Mapping[str, str] | None = None,
    max_gigabytes: float = MAX_GIGABYTES,
) -> UnsplitData:
    """The rows of a table as numbers [N, columns], with the kind of each column.

    Args:
        missing: whether empty cells are missing values; without it they are an error.
        max_gigabytes: the most that a .parquet file may unpack to.
        columns: {name: kind} of those that are not to be guessed: real, count, binary, categorical, label, skip.

    A column of whole numbers of at least 0 is a count, of 0 and 1 binary, of other numbers real; text is categorical,
    or binary for two values, with levels in alphabetical order; a column named label, target or class holds the labels.
    Text with more than 50 values, and columns of one value, are left out.

    Raises:
        DataError: the file is no table, has no rows or columns, or a cell does not fit its kind.
        UsageError: `columns` names a column or a kind that does not exist.
    """
    check_unpacked_size(path, _unpacked_bytes(path), max_gigabytes)
    frame = _read_frame(path)
    for name, kind in (columns or {}).items():
        if name not in frame.columns:
            raise UsageError(f"columns: {path.name} has no column {name!r}{did_you_mean(name, frame.columns)}")
        if kind not in KINDS:
            raise UsageError(f"columns: {name}: expected one of {', '.join(KINDS)}; found {kind!r}")
    given = dict(columns or {})
    found = [_column(str(name), frame[name], given.get(str(name)), str(path)) for name in frame.columns]
    used = [column for column in found if column.kind not in ("label", "skip")]
    labels = [column for column in found if column.kind == "label"]
    if not used:
        shown = "; ".join(c.description for c in found[:SHOWN]) or "none"
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise DataError(f"{path}: expected a column of data, found {shown}{more}")
    if len(labels) > 1:
        raise DataError(f"{path}: expected one column of labels, found {', '.join(c.name for c in labels)}")
    values = np.stack([column.values for column in used], 1).astype(np.float32)
    check_numbers(values, str(path), missing, [column.name for column in used])
    if len(values) < 3:
        raise DataError(f"{path}: expected at least 3 rows, for three splits; found {len(values)}.")
    label = labels[0] if labels else None
    return UnsplitData(
        path.name,
        values,
        permutation_split(len(values)),
        2 if all(column.kind == "binary" for column in used) else None,
        unit=False,
        labels=None if label is None else np.nan_to_num(label.values, nan=-1).astype(np.int64),  # -1 is unknown
        classes=() if label is None else label.levels,
        missing=missing,
        columns=tuple(column.name for column in used),
        kinds=tuple(column.spec for column in used),
        table="; ".join(column.description for column in found),
    )


def columns_of(split: Split) -> dict[str, Split]:
    """The columns of a table's split [N, columns] by name, each a split [N] with the same rows, labels and marks."""
    info, values = split.info, split.detach()
    kinds = info.kinds or (None,) * len(info.columns)
    return {
        name: Split(
            values[:, i].clone(),
            replace(info, event_shape=(), columns=(name,), kinds=(kind,) if kind else ()),
            split.index, split.labels, split.attributes,
        )
        for i, (name, kind) in enumerate(zip(info.columns, kinds, strict=True))
    }  # fmt: skip


@functools.lru_cache(maxsize=1)
def _frame_of(path: Path, modified: int) -> Any:
    import pandas

    if path.suffix.lower() == ".parquet":
        try:
            return pandas.read_parquet(path)
        except ImportError:
            cure = "pip install pyarrow, or save the table as .csv"
            raise DataError(f"{path}: expected pyarrow, which reads .parquet files, found none: {cure}") from None
    with open(path, encoding="utf-8-sig") as file:
        header = file.readline()
    frame = pandas.read_csv(path, sep=max(SEPARATORS, key=header.count), skipinitialspace=True)
    return frame[[name for name in frame.columns if not str(name).startswith("Unnamed:")]]  # an index that was saved


def _unpacked_bytes(path: Path) -> int:
    """The bytes of the numbers of a .parquet file, which may be packed to a few; 0 for other and damaged files."""
    if path.suffix.lower() != ".parquet":
        return 0
    try:
        import pyarrow.parquet

        metadata = pyarrow.parquet.read_metadata(path)
    except Exception:  # no pyarrow, or a damaged file: reading it says so
        return 0
    return 8 * metadata.num_rows * metadata.num_columns


def _read_frame(path: Path) -> Any:
    """The table, read so that no code in it can run."""
    try:
        frame = _frame_of(path, path.stat().st_mtime_ns)
    except DataError:
        raise
    except Exception as error:  # a damaged file raises almost anything
        raise DataError(
            f"{path}: expected a table with a header, found what cannot be read ({one_line(error)})"
        ) from None
    if not len(frame.columns) or not len(frame):
        raise DataError(
            f"{path}: expected a table, found {count_of(len(frame), 'row')} of {count_of(len(frame.columns), 'column')}"
        )
    return frame


def _column(name: str, cells: Any, kind: str | None, where: str) -> TableColumn:
    import pandas

    known = cells.dropna()
    is_text = not (pandas.api.types.is_numeric_dtype(cells) or pandas.api.types.is_bool_dtype(cells))
    levels = tuple(map(str, sorted(known.astype(str).unique()) if is_text else sorted(known.unique())))
    if kind is None:
        kind, reason = _guess(name, known, is_text, len(levels))
    else:
        reason = "as asked for" if kind == "skip" else ""
    if kind == "skip":
        return TableColumn(name, kind, np.empty(0), reason=reason)

    def refuse(expected: str, found: Any) -> DataError:
        return DataError(f"{where}: column {name!r}: expected {expected} in a {kind} column, found {found}")

    if is_text and kind in ("real", "count"):
        raise refuse("numbers", f"text ({levels[0]!r})")
    if is_text or kind in ("categorical", "label"):
        if (kind == "categorical" and len(levels) < 2) or (kind == "binary" and len(levels) > 2):
            raise refuse("two words" if kind == "binary" else "two levels or more", len(levels))
        number = {level: i for i, level in enumerate(levels)}
        words = cells.astype(object)
        return TableColumn(name, kind, np.array([number.get(str(w), np.nan) for w in words], dtype=np.float64), levels)
    values = cells.astype(float).to_numpy(dtype=np.float64, na_value=np.nan)
    seen = values[~np.isnan(values)]
    if kind == "binary" and not np.isin(seen, (0, 1)).all():
        raise refuse("0 and 1", ", ".join(levels[:3]))
    if kind == "count" and len(bad := seen[(seen < 0) | (seen != np.floor(seen))]):
        raise refuse("whole numbers of at least 0", f"{bad[0]:g}")
    return TableColumn(name, kind, values.copy())


def _guess(name: str, known: Any, is_text: bool, levels: int) -> tuple[str, str]:
    """(the kind, why the column is left out or an empty string)."""
    if levels < 2:
        return "skip", "one value" if levels else "no value"
    if name.lower() in LABEL_NAMES and levels <= MAX_LEVELS:
        return "label", ""
    if is_text:
        if levels > MAX_LEVELS:
            return "skip", f"text with {levels} values"
        return ("binary" if levels == 2 else "categorical"), ""
    numbers = known.astype(float).to_numpy()
    if np.isin(numbers, (0, 1)).all():
        return "binary", ""
    whole = bool((numbers >= 0).all() and (numbers == np.floor(numbers)).all())
    return ("count" if whole else "real"), ""
