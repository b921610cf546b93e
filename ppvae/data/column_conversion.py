"""One column of data from what people hold it in: tensors of any layout, arrays, tables, sparse matrices, lists.

Packages that are no dependency (pandas, SciPy, AnnData) are recognised by the module of a type, and never imported.
"""

import math
import mmap
from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from ppvae.data.checks import validated
from ppvae.data.lazy import LazySplit
from ppvae.data.split import Split, SplitInfo
from ppvae.errors import DataError, UsageError

DENSE_LIMIT = 4 << 30  # bytes that a sparse matrix may take once it is dense
PAD = "pad them to one length, as by torch.nn.utils.rnn.pad_sequence(x, batch_first=True), and pass (x, lengths)"


def as_column(value: Any, place: str) -> Any:
    """The data of one column as a tensor or a split [N, *event], with the values and the precision that they have.

    Taken are tensors (sparse ones are made dense), splits, NumPy arrays and whatever NumPy takes for one, pandas
    DataFrames and AnnData (splits with the names of their columns), SciPy sparse matrices, and lists of numbers.

    Raises:
        UsageError: another type, with the way to convert it; DataError: values that are no numbers or not of one shape.
    """
    if isinstance(value, LazySplit):
        return value
    if isinstance(value, Tensor):
        return _from_tensor(value, place)
    if is_of(value, "pandas") and hasattr(value, "columns"):
        return _from_frame(value, place)
    if is_of(value, "pandas") and hasattr(value, "dtype"):
        return from_array(_numbers_of_series(value, place), place)
    if is_of(value, "anndata") and hasattr(value, "var_names"):
        return _named(as_column(value.X, f"{place}.X"), value.var_names)
    if is_of(value, "scipy") and hasattr(value, "toarray"):
        check_dense_size(value.shape, value.dtype.itemsize, place)
        return from_array(value.toarray(), place)
    if isinstance(value, list):
        return _from_list(value, place)
    if hasattr(value, "__array__"):
        return from_array(np.asanyarray(value), place)
    raise UsageError(f"{place}: expected a tensor or a split, found {type(value).__name__}. {_cure(value)}")


def is_of(value: Any, package: str) -> bool:
    """Whether a value's type, or a base of it, is defined in a package."""
    return any(base.__module__.split(".")[0] == package for base in type(value).__mro__)


def _cure(value: Any) -> str:
    if isinstance(value, str):
        return f"Load it: data.load({value!r}) gives three splits"
    if isinstance(value, int | float):
        return "A number is no data: pass rows, [N, *event]"
    if hasattr(value, "__next__"):
        return "Pass torch.stack(list(x))"
    return "Pass torch.as_tensor(x), [N, *event]"


def _from_tensor(x: Tensor, place: str) -> Tensor:
    check_no_gradient(x, place)
    _check_holds_numbers(x, place)
    if isinstance(x, Split):
        return x
    if x.layout is not torch.strided:
        check_dense_size(x.shape, x.element_size(), place)
        x = x.to_dense()
    if x.is_inference() and not torch.is_inference_mode_enabled():
        x = x.clone()
    return x if type(x) is Tensor else x.as_subclass(Tensor)


def check_no_gradient(x: Tensor, place: str) -> None:
    """Data require no gradient."""
    if x.requires_grad:
        raise DataError(
            f"{place}: the data require a gradient, which would lead every step back to whatever computed them: pass "
            "x.detach(). To train that network too, call it in model or guide, under pyro.module"
        )


def _check_holds_numbers(x: Tensor, place: str) -> None:
    if x.is_nested:
        raise DataError(
            f"{place}: a nested tensor, whose rows differ in length: pad them, as by torch.nested.to_padded_tensor(x, "
            "0.0), and pass (x, lengths)"
        )
    if x.device.type == "meta":
        raise DataError(f"{place}: a tensor on the device 'meta' holds no numbers. Pass one on the CPU or a GPU")
    if x.is_quantized:
        raise DataError(f"{place}: expected dense real numbers, found quantised ones: pass x.dequantize()")
    if x.is_complex():
        raise DataError(f"{place}: expected dense real numbers, found {x.dtype}: pass torch.view_as_real(x)")


def check_dense_size(shape: Sequence[int], itemsize: int, place: str) -> None:
    """A sparse matrix fits into memory as a dense one."""
    size = itemsize * math.prod(map(int, shape))
    if size > DENSE_LIMIT:
        raise DataError(
            f"{place}: a sparse matrix of shape {list(shape)} takes {size / 2**30:.1f} GiB once it is dense, more than "
            f"{DENSE_LIMIT >> 30}. Pass fewer columns or rows"
        )


def from_array(a: np.ndarray, place: str) -> Tensor:
    """An array of numbers as a tensor: of the same type where torch has it, else of the next wider one."""
    if isinstance(a, np.ma.MaskedArray) and np.ma.is_masked(a):
        raise DataError(
            f"{place}: a masked array: mark its gaps as missing, data.with_missing(a.astype(float).filled(numpy.nan))"
        )
    a = np.asarray(_copied_on_write(a))
    if a.dtype.kind not in "biuf":
        raise DataError(f"{place}: expected real numbers, found {_kind_of(a)}")
    wide_unsigned = a.dtype.kind == "u" and a.dtype.itemsize > 1  # torch has the type, and no arithmetic for it
    wider = {"u": np.int64, "f": np.float64}.get(a.dtype.kind) if a.dtype.itemsize > 8 or wide_unsigned else None
    dtype = np.dtype(wider) if wider else a.dtype.newbyteorder("=")
    if a.dtype == np.uint64 and a.size and int(a.max()) > np.iinfo(np.int64).max:
        raise DataError(f"{place}: a number beyond 2^63 - 1, which no tensor holds: pass a.astype(float)")
    borrow = dtype == a.dtype and a.flags.writeable and all(stride >= 0 for stride in a.strides)
    return torch.from_numpy(a if borrow else np.array(a, dtype=dtype, order="C"))


def _copied_on_write(a: np.ndarray) -> np.ndarray:
    """An array that a file holds, open for reading, mapped so that a page is copied where it is written to."""
    if isinstance(a, np.memmap) and a.mode == "r" and isinstance(a.base, mmap.mmap) and a.flags.c_contiguous:
        return np.memmap(a.filename, a.dtype, "c", a.offset, a.shape)
    return a


def _kind_of(a: np.ndarray) -> str:
    if a.dtype.names:
        return "records: pass numpy.lib.recfunctions.structured_to_unstructured(a)"
    if a.dtype.kind == "c":
        return f"{a.dtype}: pass numpy.stack((a.real, a.imag), -1)"
    if a.dtype.kind == "O" and any(isinstance(value, str) for value in a.flat):
        return "text: give each value a number, as by pandas.factorize(x)[0], where -1 is a gap or an unknown label"
    if a.dtype.kind == "O":
        sized = a.size and all(hasattr(row, "__len__") and not isinstance(row, str) for row in a.flat)
        return f"an array of sequences: {PAD}" if sized else "Python objects: pass a.astype(float)"
    kind = "text" if a.dtype.kind in "SUT" else "dates"
    return f"{kind} (dtype {a.dtype}): give each value a number, as by pandas.factorize(x)[0]"


def _from_list(values: Sequence[Any], place: str) -> Tensor:
    """Rows in a list: numbers, however nested, or tensors and arrays of one shape."""
    if values and all(isinstance(v, Tensor) or hasattr(v, "__array__") for v in values):
        rows = [as_column(row, f"{place}, row {i}") for i, row in enumerate(values)]
        if len({row.shape for row in rows}) > 1:
            raise DataError(f"{place}: a list of rows of shapes {_shapes(rows)}: {PAD}")
        return torch.stack(rows)
    try:
        return torch.tensor(values, device="cpu")
    except (ValueError, TypeError, RuntimeError) as error:
        if "expected sequence of length" in str(error):
            raise DataError(f"{place}: a list of rows of different lengths: {PAD}") from None
        found = _first_other(values)
        cure = ": pass numpy.array(x, dtype=float), where None is NaN" if found == "NoneType" else ""
        if any(isinstance(value, str) for value in values):
            cure = ": give each value a number, as by pandas.factorize(pandas.Series(x))[0], where -1 is a gap"
        raise DataError(f"{place}: expected a list of numbers, found {found} in it{cure}") from None


def _shapes(rows: Sequence[Any]) -> str:
    shown = ", ".join(str(list(row.shape)) for row in rows[:4])
    return shown + (", ..." if len(rows) > 4 else "")


def _first_other(values: Any) -> str:
    """The type of the first value in nested lists that is no number."""
    for value in values:
        if isinstance(value, list | tuple):
            if found := _first_other(value):
                return found
        elif not isinstance(value, int | float | np.number | np.bool_):
            return type(value).__name__
    return ""


def _from_frame(frame: Any, place: str) -> Split:
    columns = [_numbers_of_series(frame.iloc[:, i], place, in_frame=True) for i in range(frame.shape[1])]
    if not columns:
        raise DataError(f"{place}: expected a table with columns, found shape {list(frame.shape)}")
    return _named(from_array(np.stack(columns, 1), place), frame.columns)


def _numbers_of_series(series: Any, place: str, in_frame: bool = False) -> np.ndarray:
    """The numbers of a column of a table; a gap in a column of integers or bools is NaN, as pandas has it elsewhere."""
    kind = getattr(series.dtype, "kind", "O")
    if kind not in "biuf":
        gaps = ".replace(-1, float('nan'))" if bool(series.isna().any()) else ""
        codes = f"pandas.Series(x).astype('category').cat.codes.astype('float32'){gaps}"
        if in_frame:
            raise DataError(
                f"{place}: column {str(series.name)!r} holds {series.dtype}, not numbers: leave it out, or give each "
                f"value x a number, as by {codes}{', where NaN is a gap' if gaps else ''}"
            )
        raise DataError(
            f"{place}: its values are {series.dtype}, not numbers: leave them out, or give each value a number, as by "
            f"pandas.factorize(x)[0]"
            + (f", where -1 is an unknown label; a gap in a column of data is NaN, as by {codes}" if gaps else "")
        )
    if isinstance(series.dtype, np.dtype):
        return series.to_numpy()
    if bool(series.isna().any()):  # pandas' nullable types
        return series.to_numpy(dtype=np.float64, na_value=np.nan)
    return series.to_numpy(dtype=getattr(series.dtype, "numpy_dtype", None))


def _named(values: Any, names: Any) -> Split:
    columns = tuple(map(str, names))
    return Split(values, SplitInfo("a table", tuple(values.shape[1:]), len(values), unit=False, columns=columns))


def allow_missing(columns: Sequence[Any]) -> tuple[Any, ...]:
    """The columns, those with NaN marked as having missing values."""
    gaps = [isinstance(c, Tensor) and c.is_floating_point() and bool(c.detach().isnan().any()) for c in columns]
    return tuple(with_missing(c) if gap else c for c, gap in zip(columns, gaps, strict=True))


@overload
def with_missing(x: Mapping[str, Any], name: str = "a table") -> dict[str, Split]: ...
@overload
def with_missing(x: tuple[Any, ...], name: str = "a table") -> tuple[Split, ...]: ...
@overload
def with_missing(x: Any, name: str = "a table") -> Split: ...
def with_missing(x: Any, name: str = "a table") -> Any:
    """The data `x` [N, *event] as a split in which NaN stands for a missing value, for `fit` and `log_marginal`.

    Of a dict or a tuple of columns, a dict or a tuple of splits.

    log p(x) is then that of the observed values (Mattei and Frellsen 2019, arXiv 1812.02633), for pairs whose model
    leaves missing values out and whose guide accepts them, such as `likelihoods.Mixed` and `nn.Missing`. Slices and
    copies keep the mark; a split keeps its metadata, a DataFrame the names of its columns, and plain numbers are named
    `name`. Raises `DataError` with the row for infinity and for a row without observed values.

    >>> x = with_missing(torch.tensor([[1.0, torch.nan], [2.0, 3.0]]))
    >>> x.missing, x[:1].missing, x.description
    (True, True, 'a table, NaN missing, values as given')
    >>> with_missing({"age": torch.tensor([31.0, torch.nan]), "visits": torch.tensor([2, 0])})["age"].missing
    True
    """
    if isinstance(x, Mapping):
        return {key: with_missing(column, name) for key, column in x.items()}
    if isinstance(x, tuple):
        return tuple(with_missing(column, name) for column in x)
    x = x if isinstance(x, Tensor | list) else as_column(x, name)
    if not isinstance(x, Tensor) or x.ndim == 0:
        validated(x, name)  # raises
    split = x if isinstance(x, Split) else Split(x, SplitInfo(name, tuple(x.shape[1:]), len(x), unit=False))
    marked = split.marked_missing()
    validated(marked, marked.name)
    return marked
