"""Tables: each column gets its kind and its numbers, and what does not fit is refused by column and file."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ppvae import data
from ppvae.errors import DataError, UsageError

N = 60


def people() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "key": [f"person {i}" for i in range(N)],
            "age": rng.normal(40, 10, N),
            "visits": rng.integers(0, 9, N),
            "member": rng.integers(0, 2, N).astype(bool),
            "sex": rng.choice(["F", "M"], N),
            "city": rng.choice(["Ulm", "Bonn", "Kiel"], N),
            "country": "DE",
            "target": rng.choice(["buys", "leaves"], N),
        }
    )


def write(frame: pd.DataFrame, path: Path) -> Path:
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


PARQUET = pytest.param(
    ".parquet", marks=pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")
)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", PARQUET])
def test_kinds_are_guessed_and_cells_become_numbers(tmp_path, suffix):
    frame = people()
    split = data.load(write(frame, tmp_path / f"people{suffix}"))[0]
    assert split.columns == ("age", "visits", "member", "sex", "city")
    assert split.kinds == ("real", "count", "binary", "binary", ("categorical", 3))
    rows = frame.iloc[split.index.numpy()]
    cities = {"Bonn": 0, "Kiel": 1, "Ulm": 2}
    expected = [rows.age, rows.visits, rows.member, rows.sex == "M", rows.city.map(cities)]
    assert np.allclose(split.numpy(), np.stack([c.to_numpy(dtype=float) for c in expected], 1), rtol=1e-6)
    assert split.classes == ("buys", "leaves")
    assert torch.equal(split.labels, torch.tensor((rows.target == "leaves").to_numpy(dtype=int)))
    for words in ("key left out (text with 60 values)", "country left out (one value)", "city categorical (Bonn, Kiel"):
        assert words in split.table


def test_kinds_can_be_given(tmp_path):
    path = write(people(), tmp_path / "people.csv")
    split = data.load(path, columns={"visits": "categorical", "age": "skip", "target": "binary"})[0]
    assert split.columns == ("visits", "member", "sex", "city", "target")
    assert split.kinds[0][0] == "categorical"
    assert split.labels is None


def test_empty_cells_are_missing_values_only_where_asked_for(tmp_path):
    frame = people()
    frame.loc[3, ["age", "city"]] = None
    path = write(frame, tmp_path / "people.csv")
    with pytest.raises(DataError, match="missing=True"):
        data.load(path)
    splits = data.load(path, missing=True)
    assert sum(int(s.isnan().sum()) for s in splits) == 2
    assert splits[0].kinds == ("real", "count", "binary", "binary", ("categorical", 3))


def test_semicolons_and_a_saved_index(tmp_path):
    people().to_csv(tmp_path / "people.csv", sep=";")
    assert data.load(tmp_path / "people.csv")[0].columns[0] == "age"


WRONG = {
    "no such column": ({"agee": "real"}, UsageError, "no column 'agee'; did you mean 'age'"),
    "no such kind": ({"age": "normal"}, UsageError, "age: expected one of real, count"),
    "text as numbers": ({"city": "real"}, DataError, "column 'city': expected numbers in a real column, found text"),
    "parts as counts": ({"age": "count"}, DataError, "column 'age': expected whole numbers of at least 0"),
    "many as two": ({"visits": "binary"}, DataError, "column 'visits': expected 0 and 1 in a binary column"),
    "three as two": ({"city": "binary"}, DataError, "column 'city': expected two words in a binary column, found 3"),
    "one level": ({"country": "categorical"}, DataError, "column 'country': expected two levels or more"),
    "two labels": ({"sex": "label"}, DataError, "expected one column of labels, found sex, target"),
    "nothing left": (dict.fromkeys(people().columns, "skip"), DataError, "expected a column of data"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_by_column(tmp_path, name):
    columns, error, words = WRONG[name]
    with pytest.raises(error) as caught:
        data.load(write(people(), tmp_path / "people.csv"), columns=columns)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"a,b\n", b"\x00\xff\x00", b"a,b\n1,2\n1,2,3,4\n"])
def test_files_that_are_no_table(tmp_path, content):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(DataError, match="expected a table"):
        data.load(tmp_path / "x.csv")


def test_an_error_names_a_few_of_many_columns(tmp_path):
    (tmp_path / "x.csv").write_text(",".join(f"c{i}" for i in range(100)) + "\n" + ",".join("1" * 100) + "\n")
    with pytest.raises(DataError, match=r"found c0 left out \(one value\); .*; and 94 more$"):
        data.load(tmp_path / "x.csv")


def test_a_pipe_is_no_table(tmp_path):
    os.mkfifo(tmp_path / "x.csv")
    with pytest.raises(DataError, match=r"x.csv: expected a regular file, found a pipe"):
        data.load(tmp_path / "x.csv")


def test_columns_are_those_of_a_table(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.zeros((9, 2)))
    with pytest.raises(UsageError, match="columns: expected a table"):
        data.load(tmp_path / "x.npz", columns={"a": "real"})


def test_a_parquet_file_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    def unavailable(*_: object) -> None:
        raise ImportError

    monkeypatch.setattr(pd, "read_parquet", unavailable)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="pip install pyarrow"):
        data.load(tmp_path / "x.parquet")


def test_an_empty_cell_is_named_by_its_column(tmp_path):
    path = tmp_path / "people.csv"
    path.write_text("age,visits\n40.5,1\n41.5,\n39.5,2\n38,1\n")
    with pytest.raises(DataError, match=r"row 1, column 1 \('visits'\) is nan"):
        data.load(path)
