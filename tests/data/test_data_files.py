"""Files: the good ones are read in place, the bad and the hostile ones are refused by name in at most three lines."""

import gzip
import io
import pickle
import stat
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from ppvae import data
from ppvae.data import named
from ppvae.data.idx import read_idx
from ppvae.errors import DataError, UsageError

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b12\nsize 9\n"
HTML = b"\n<!DOCTYPE html>\n<html><head><title>404</title></head></html>"


def refused(*args, **kwargs) -> str:
    """The message of the DataError that `load` raises, which must be short and need no chained traceback."""
    with pytest.raises(DataError) as caught:
        data.load(*args, **kwargs)
    assert str(caught.value).count("\n") < 3
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return str(caught.value)


# IDX


def idx(array: np.ndarray, kind: int = 0x08, shape: tuple[int, ...] | None = None) -> bytes:
    shape = array.shape if shape is None else shape
    return bytes([0, 0, kind, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + array.tobytes()


IMAGES = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
LABELS = np.array([0, 9, 3, 3, 1], dtype=np.uint8)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["raw", "gz"])
def test_idx_is_read_back(tmp_path, pack):
    (tmp_path / "images").write_bytes(pack(idx(IMAGES)))
    (tmp_path / "labels").write_bytes(pack(idx(LABELS)))
    assert np.array_equal(read_idx(tmp_path / "images", (5, 28, 28)), IMAGES)
    assert np.array_equal(read_idx(tmp_path / "labels", (5,), classes=10), LABELS)


BAD_IDX = {
    "truncated": (idx(IMAGES)[:-1], "declares 3920 bytes of data, found only 3919"),
    "overlong": (idx(IMAGES) + b"\0", "declares 3920 bytes of data, found more"),
    "cut header": (idx(IMAGES)[:10], "cut short inside its header, after 10 bytes"),
    "magic": (b"\1" + idx(IMAGES)[1:], "first bytes '01 00 08 03'"),
    "unknown type": (idx(IMAGES, kind=0x07), "first bytes '00 00 07 03'"),
    "other type": (idx(IMAGES, kind=0x0D), "type uint8, found float32"),
    "dimensions": (idx(IMAGES.reshape(5, 784)), "3 dimensions .5 x 28 x 28., found 2"),
    "shape": (idx(IMAGES, shape=(5, 7, 112)), "expected 5 x 28 x 28, found 5 x 7 x 112"),
    "count": (idx(IMAGES[:4]), "expected 5 x 28 x 28, found 4 x 28 x 28"),
    "huge count": (idx(IMAGES, shape=(2**32 - 1, 28, 28)), "found 4294967295 x 28 x 28"),
    "lfs": (LFS, "git-lfs pointer"),
    "html": (HTML, "HTML page"),
    "empty": (b"", "it is empty"),
}


@pytest.mark.parametrize("case", BAD_IDX)
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["raw", "gz"])
def test_bad_idx_is_refused(tmp_path, case, pack):
    content, match = BAD_IDX[case]
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(pack(content))
    if pack is gzip.compress and case in ("lfs", "html", "empty"):
        match = "expected an IDX file"
    with pytest.raises(DataError, match=match) as caught:
        read_idx(path, (5, 28, 28))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_gzip_is_refused(tmp_path):
    path = tmp_path / "images.gz"
    good = gzip.compress(idx(IMAGES))
    crc = bytearray(good)
    crc[-8] ^= 1
    middle = bytearray(good)
    middle[len(good) // 2] ^= 0xFF
    for content in (good[:-1], good[: len(good) // 2], bytes(crc), bytes(middle), good + b"junk"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"images\.gz: the gzip data are damaged or cut short"):
            read_idx(path, (5, 28, 28))


def test_a_label_out_of_range_is_named(tmp_path):
    path = tmp_path / "labels"
    path.write_bytes(idx(np.array([1, 2, 200, 10], dtype=np.uint8)))
    with pytest.raises(DataError, match="row 2 has label 200, expected 0 to 9"):
        read_idx(path, (4,), classes=10)
    path.write_bytes(idx(np.array([1, 2, 3, 10], dtype=np.uint8)))
    with pytest.raises(DataError, match="row 3 has label 10"):
        read_idx(path, (4,), classes=10)


# MNIST's folder


@pytest.fixture(scope="module")
def mnist_files() -> dict[str, bytes]:
    """The four files of an MNIST whose image i is blank but for its first pixel, i % 251, and whose label is i % 10."""
    files = {}
    for part, n in (("train", 60_000), ("t10k", 10_000)):
        images = np.zeros((n, 28, 28), dtype=np.uint8)
        images[:, 0, 0] = np.arange(n) % 251
        labels = (np.arange(n) % 10).astype(np.uint8)
        files[f"{part}-images-idx3-ubyte.gz"] = gzip.compress(idx(images), 1)
        files[f"{part}-labels-idx1-ubyte.gz"] = gzip.compress(idx(labels), 1)
    return files


def mnist_root(root: Path, files: dict[str, bytes], folder: str = "MNIST") -> Path:
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    for name, content in files.items():
        (raw / name).write_bytes(content)
    return raw


def listing(root: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(root)): (p.stat().st_size, p.stat().st_mtime_ns) for p in [root, *root.rglob("*")]}


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_a_read_only_root_is_read_and_left_alone(tmp_path, mnist_files, name, folder):
    raw = mnist_root(tmp_path, mnist_files, folder)
    for path in (raw, raw.parent, tmp_path):
        path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    before = listing(tmp_path)
    try:
        train, valid, test = data.load(name, root=tmp_path)
        assert listing(tmp_path) == before
    finally:
        for path in (tmp_path, raw.parent, raw):
            path.chmod(stat.S_IRWXU)
    for split, first, n in ((train, 0, 50_000), (valid, 50_000, 10_000), (test, 0, 10_000)):
        source = torch.arange(first, first + n)
        assert torch.equal(split[:, 0], (source % 251) / torch.tensor(255.0))
        assert torch.equal(split.labels, source % 10)
        assert not split[:, 1:].any()


def test_an_unpacked_file_is_read_in_place(tmp_path, mnist_files):
    files = dict(mnist_files)
    for name in list(files):
        if name.startswith("t10k"):
            files[name.removesuffix(".gz")] = gzip.decompress(files.pop(name))
    mnist_root(tmp_path, files)
    assert data.load("mnist", root=tmp_path)[2].labels[:3].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        ("train-labels-idx1-ubyte.gz", idx(np.zeros(59_999, np.uint8)), "expected 60000, found 59999"),
        ("t10k-labels-idx1-ubyte.gz", idx(np.full(10_000, 200, np.uint8)), "row 0 has label 200"),
        ("t10k-images-idx3-ubyte.gz", idx(np.zeros((10_000, 7, 112), np.uint8)), "found 10000 x 7 x 112"),
        ("t10k-images-idx3-ubyte.gz", idx(np.zeros((100, 28, 28), np.uint8)), "found 100 x 28 x 28"),
        ("train-images-idx3-ubyte.gz", None, "damaged or cut short"),
        ("train-images-idx3-ubyte.gz", LFS, "git-lfs pointer"),
    ],
)
def test_a_wrong_mnist_file_is_refused_by_name(tmp_path, mnist_files, file, content, match):
    raw = mnist_root(tmp_path, mnist_files)
    short = mnist_files[file][:-100]
    (raw / file).write_bytes(short if content is None else content if content is LFS else gzip.compress(content, 1))
    message = refused("mnist", root=tmp_path)
    assert match in message
    assert str(raw / file) in message


UNREACHABLE = RuntimeError("Error downloading train-images:\nTried a\nTried b\n<urlopen error>")


def no_network(monkeypatch, error=UNREACHABLE):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("torchvision.datasets.MNIST.__init__", fail)
    monkeypatch.setattr("torchvision.datasets.FashionMNIST.__init__", fail)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_missing_files_and_no_network(tmp_path, monkeypatch, name):
    no_network(monkeypatch)
    message = refused(name, root=tmp_path)
    folder = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}[name]
    assert str(tmp_path / folder / "raw" / "train-images-idx3-ubyte") in message
    assert "fetching it failed" in message
    assert "PPVAE_DATA" in message
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_fetched_into_a_root_that_is_missing(tmp_path, monkeypatch):
    no_network(monkeypatch, AssertionError("tried to fetch"))
    message = refused("mnist", root=tmp_path / "nowhere")
    assert "tried to fetch" not in message
    assert "the root is missing or read-only" in message
    assert not (tmp_path / "nowhere").exists()


def test_missing_files_are_fetched_whole_and_yours_are_kept(tmp_path, monkeypatch, mnist_files):
    def fetch(self, root, download):
        assert download
        print("noise that is not for the user")
        mnist_root(
            Path(root), mnist_files | {"train-labels-idx1-ubyte.gz": b"not wanted", "t10k-images-idx3-ubyte": b""}
        )

    monkeypatch.setattr("torchvision.datasets.MNIST.__init__", fetch)
    kept = "train-labels-idx1-ubyte.gz"
    raw = mnist_root(tmp_path, {kept: mnist_files[kept]})
    assert data.load("mnist", root=tmp_path)[0].labels[:3].tolist() == [0, 1, 2]
    assert sorted(p.name for p in raw.iterdir()) == sorted(mnist_files)
    assert [p.name for p in tmp_path.iterdir()] == ["MNIST"]


def test_the_default_root_is_a_cache_folder(tmp_path, monkeypatch):
    no_network(monkeypatch)
    monkeypatch.delenv("PPVAE_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(tmp_path / ".cache" / "ppvae" / "MNIST" / "raw") in refused("mnist")
    assert len(data.load("digits")[0]) == 1257  # needs no root


@pytest.mark.parametrize(
    ("name", "file"), [("omniglot", "omniglot28"), ("freyfaces", "freyfaces"), ("smiles", "smiles32")]
)
def test_named_npz_files(tmp_path, name, file):
    path = tmp_path / f"{file}.npz"
    assert f"{path} not found" in refused(name, root=tmp_path)
    np.savez(path, images=np.zeros((10, 28, 20), np.uint8))
    assert "expected 'images' of uint8 and shape" in refused(name, root=tmp_path)
    np.savez(path, pictures=np.zeros((10, 28, 20), np.uint8))
    assert "expected a key 'images', found only 'pictures'" in refused(name, root=tmp_path)
    for content, match in ((LFS, "git-lfs pointer"), (HTML, "HTML page"), (b"", "it is empty")):
        path.write_bytes(content)
        assert match in refused(name, root=tmp_path)


# A user's own arrays


def save(path: Path, **arrays) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".npy":
        np.save(path, arrays["x"])
    else:
        tensors = {key: torch.from_numpy(x) for key, x in arrays.items()}
        torch.save(tensors["x"] if list(arrays) == ["x"] else tensors, path)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".pt"])
def test_a_table_of_reals(tmp_path, suffix):
    x = np.random.default_rng(0).normal(size=(50, 3))
    for name in (save(tmp_path / f"table{suffix}", x=x), str(tmp_path / f"table{suffix}")):
        splits = data.load(name)
        assert [len(s) for s in splits] == [35, 5, 10]
        for split in splits:
            assert torch.equal(split, torch.from_numpy(x.astype(np.float32))[split.index])
            assert (split.levels, split.base_measure, split.event_shape) == (None, "density", (3,))
            assert split.labels is None
        assert splits[2].description == f"table{suffix}/test, values as given"
    assert sorted(torch.cat([s.index for s in splits]).tolist()) == list(range(50))
    assert "row " in refused(name, binarize="fixed")
    with pytest.raises(UsageError, match="dequantize needs whole grey levels"):
        data.load(name, dequantize=True)


def test_values_outside_0_1_are_named_under_binarize(tmp_path):
    x = np.full((10, 4), 0.5, np.float32)
    assert data.load(save(tmp_path / "a.npy", x=x), binarize="fixed")[0].base_measure == "binary"
    assert data.load(tmp_path / "a.npy")[0].base_measure == "density on [0, 1]"
    x[3, 2] = 1.5
    message = refused(save(tmp_path / "b.npy", x=x), binarize="dynamic")
    assert "row 3, column 2 is 1.5" in message
    assert "binarize needs values in [0, 1]" in message


@pytest.mark.parametrize("key", ["images", "X", "data", "arr_0", "anything"])
def test_one_array_with_labels_and_columns(tmp_path, key):
    images = np.random.default_rng(0).integers(0, 256, (20, 6, 5), dtype=np.uint8)
    y, age = np.arange(20) % 3, np.arange(20) * 0.5
    np.savez(tmp_path / "faces.npz", **{key: images, "label": y, "age": age, "names": np.array(["a"] * 20)})
    for split in data.load(tmp_path / "faces.npz", flat=False):
        assert split.event_shape == tuple(split.shape[1:]) == (1, 6, 5)
        assert torch.equal(split[:, 0] * 255, torch.from_numpy(images)[split.index].float())
        assert split.labels.tolist() == y[split.index].tolist()
        assert list(split.attributes) == ["age"]
        assert split.attributes["age"].tolist() == age[split.index].tolist()
        assert (split.levels, split.name[:10]) == (256, "faces.npz/")


@pytest.mark.parametrize("suffix", [".npz", ".pt"])
@pytest.mark.parametrize(
    "keys",
    [
        ("train", "valid", "test", "train_labels", "valid_labels", "test_labels"),
        ("x_train", "x_val", "x_test", "y_train", "y_val", "y_test"),
        ("X_TRAIN", "x_validation", "images_test", "Y_train", "labels_validation", "test_targets"),
    ],
)
def test_parts_that_the_file_gives(tmp_path, suffix, keys):
    parts = [np.random.default_rng(i).random((n, 4)) for i, n in enumerate((12, 3, 5))]
    labels = [np.arange(len(x)) + 100 * i for i, x in enumerate(parts)]
    path = save(tmp_path / f"parts{suffix}", **dict(zip(keys, parts + labels, strict=True)))
    for split, x, y in zip(data.load(path), parts, labels, strict=True):
        assert torch.equal(split, torch.from_numpy(x.astype(np.float32)))  # in the file's order
        assert split.labels.tolist() == y.tolist()
    assert split.index.tolist() == [15, 16, 17, 18, 19]


def test_a_missing_valid_is_carved_off_train(tmp_path):
    x_train, x_test = np.arange(60.0).reshape(30, 2), -np.arange(1.0, 11.0).reshape(5, 2)
    path = save(tmp_path / "a.npz", x_train=x_train, x_test=x_test, y_train=np.arange(30), y_test=np.arange(5))
    train, valid, test = data.load(path)
    assert torch.equal(test, torch.from_numpy(x_test).float())
    assert (len(train), len(valid)) == (27, 3)
    assert sorted(train.index.tolist() + valid.index.tolist()) == list(range(30))
    for split in (train, valid):
        assert torch.equal(split[:, 0], 2.0 * split.index)
        assert torch.equal(split.labels, split.index)
    assert [len(s) for s in data.load(save(tmp_path / "b.npz", train=x_train))] == [21, 3, 6]


def test_channels_go_first(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (9, 5, 6, 3), dtype=np.uint8)
    train = data.load(save(tmp_path / "rgb.npz", images=x), flat=False)[0]
    assert train.event_shape == (3, 5, 6)
    assert torch.equal(train * 255, torch.from_numpy(x[train.index]).permute(0, 3, 1, 2).float())
    same = data.load(save(tmp_path / "first.npz", images=np.moveaxis(x, 3, 1)), flat=False)[0]
    assert same.digest == train.digest
    assert data.load(tmp_path / "rgb.npz")[0].shape == (train.shape[0], 90)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32, np.float64])
def test_data_that_are_binary_stay_so(tmp_path, dtype):
    x = (np.random.default_rng(0).random((40, 7)) < 0.5).astype(dtype)
    path = save(tmp_path / "binary.npy", x=x)
    for binarize in (None, "fixed", "dynamic"):
        for split in data.load(path, binarize=binarize):
            assert torch.equal(split.read(), torch.from_numpy(x.astype(np.float32))[split.index])
            assert (split.base_measure, split.levels) == ("binary", 2)


def test_dequantizing_256_levels(tmp_path):
    x = np.arange(256, dtype=np.uint8).repeat(40).reshape(40, 256)
    splits = data.load(save(tmp_path / "levels.npy", x=x), dequantize=True)
    assert {s.base_measure for s in splits} == {"256 levels"}
    for split in splits:
        read = split.read()
        assert read.max() < 1
        assert torch.equal((read * 256).floor(), torch.from_numpy(x)[split.index].float())


NAN = np.zeros((20, 28, 28), np.float32)
NAN[17, 7, 7] = np.nan
BIG = np.zeros((20, 4))
BIG[3, 1] = 1e300
BAD_ARRAYS = {
    "nan": ({"x": NAN}, ["row 17, column 203 (of event shape 28x28: pixel [7, 7]) is nan"]),
    "too big for float32": ({"x": BIG}, ["row 3, column 1 is inf"]),
    "nan in a part": (
        {"train": np.zeros((5, 4)), "test": np.full((5, 4), np.nan)},
        ["'test'", "row 0, columns 0, 1, 2"],
    ),
    "empty": ({"x": np.zeros((0, 4))}, ["it is empty"]),
    "no columns": ({"x": np.zeros((4, 0))}, ["it is empty"]),
    "text": ({"x": np.array([["a", "b"]] * 5)}, ["found text"]),
    "complex": ({"x": np.zeros((5, 2), complex)}, ["found complex numbers"]),
    "dates": ({"x": np.zeros((5, 2), "datetime64[s]")}, ["found dates"]),
    "records": ({"x": np.zeros((5, 2), [("a", float)])}, ["found records"]),
    "0-d": ({"x": np.array(3.0)}, ["expected rows of data", "found shape []"]),
    "1-d": ({"x": np.zeros(10)}, ["x[:, None]"]),
    "two rows": ({"x": np.zeros((2, 4))}, ["at least 3 rows", "found 2"]),
    "two train rows": ({"train": np.zeros((2, 4))}, ["no row is left for train"]),
    "which": ({"a": np.zeros((5, 2)), "b": np.ones((5, 3))}, ["such as 'images'", "'a' [5, 2], 'b' [5, 3]"]),
    "no train": ({"test": np.zeros((5, 2))}, ["found a part test, but no 'train'"]),
    "two trains": ({"train": np.zeros((5, 2)), "x_train": np.ones((5, 2))}, ["'train' and 'x_train' both"]),
    "part shape": ({"train": np.zeros((5, 2)), "test": np.ones((5, 3))}, ["'test'", "found float64 [3]"]),
    "part dtype": ({"train": np.zeros((5, 2)), "test": np.ones((5, 2), np.uint8)}, ["found uint8 [2]"]),
    "label count": ({"x": np.zeros((5, 2)), "y": np.zeros(4, int)}, ["'y'", "one label for each of 5 rows", "[4]"]),
    "label part": ({"train": np.ones((5, 2)), "y_train": np.zeros(4, int)}, ["'y_train'", "for each of 5 rows"]),
    "label half": ({"x": np.zeros((5, 2)), "y": np.full(5, 0.5)}, ["labels that are whole numbers"]),
    "some labels": (
        {"train": np.ones((5, 2)), "test": np.ones((5, 2)), "y_train": np.zeros(5, int)},
        ["labels for all of train, test or none, found y_train"],
    ),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_arrays_that_are_not_data_are_refused(tmp_path, case):
    arrays, words = BAD_ARRAYS[case]
    np.savez(tmp_path / "bad.npz", **arrays)
    message = refused(tmp_path / "bad.npz")
    assert "bad.npz" in message
    for word in words:
        assert word in message


def test_nan_is_found_beyond_the_first_block(tmp_path, monkeypatch):
    monkeypatch.setattr("ppvae.data.unsplit.BLOCK", 8)
    x = np.zeros((20, 4), np.float32)
    x[13, 2] = np.inf
    assert "row 13, column 2 is inf" in refused(save(tmp_path / "x.npy", x=x))


# Hostile and damaged files


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_with_code_in_it_has_no_effect(tmp_path):
    trace = tmp_path / "trace"
    objects = np.array([[Bomb(trace)] * 2] * 5, dtype=object)
    torch.save(Bomb(trace), tmp_path / "a.pt")
    torch.save({"x": torch.zeros(5, 2), "y": Bomb(trace)}, tmp_path / "b.pt")
    torch.save({"x": Bomb(trace)}, tmp_path / "c.pth", _use_new_zipfile_serialization=False)
    np.save(tmp_path / "d.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "e.npz", x=objects)
    np.savez(tmp_path / "f.npz", x=np.zeros((5, 2)), extra=objects)
    for name in ("g.npy", "h.npz", "i.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb(trace)))
    files = sorted(p for p in tmp_path.iterdir() if p.suffix)
    assert len(files) == 9
    for path in files:
        message = refused(path)
        assert path.name in message
        assert "cannot be read safely" in message
        assert not trace.exists(), path
    pickle.loads((tmp_path / "g.npy").read_bytes())
    assert trace.exists()  # the bomb is live: only the reader kept it from going off


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".pt"])
def test_files_that_are_something_else_are_named(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    for content, match in ((LFS, "git-lfs pointer"), (HTML, "HTML page"), (b"", "it is empty"), (b"junk" * 99, "x.")):
        path.write_bytes(content)
        message = refused(path)
        assert match in message
        assert "expected plain arrays" in message


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".pt"])
def test_truncated_files_are_refused(tmp_path, suffix):
    path = save(tmp_path / f"x{suffix}", x=np.random.default_rng(0).random((30, 9)))
    whole = path.read_bytes()
    for size in (10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "expected plain arrays" in refused(path)


def test_a_flipped_bit_in_an_npz_is_refused(tmp_path):
    path = save(tmp_path / "x.npz", x=np.random.default_rng(0).random((30, 9)))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))
    assert "CRC" in refused(path)


def test_an_npz_that_declares_too_much_is_refused(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (2**50, 4)})
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        file.writestr("x.npy", header.getvalue() + b"\0" * 64)
    assert "expected plain arrays, found 64 bytes of an array of 36028797018963968" in refused(tmp_path / "x.npz")
    (tmp_path / "x.npy").write_bytes(header.getvalue() + b"\0" * 64)
    assert "expected plain arrays, found" in refused(tmp_path / "x.npy")


def test_torch_files_that_hold_no_dense_numbers(tmp_path):
    path = tmp_path / "x.pt"
    for held, match in (
        ([torch.zeros(5, 2)], "a tensor or a dict of tensors, found list"),
        ({"epoch": 3}, "found none in it"),
        (torch.eye(5).to_sparse(), "expected a dense tensor"),
        (torch.zeros(1).expand(2**40, 4), "take 17592186044416 bytes, found 4"),
    ):
        torch.save(held, path)
        assert match in refused(path)
    torch.save(torch.rand(10, 2, dtype=torch.bfloat16).requires_grad_(), path)
    assert [len(s) for s in data.load(path)] == [7, 1, 2]


def test_paths_that_lead_nowhere(tmp_path):
    assert "no such file or folder" in refused(tmp_path / "x.npz")
    assert "no such file or folder" in refused("nowhere/to/be/found.npz")
    (tmp_path / "x.xls").write_text("1,2\n")
    known = ".npz, .npy, .pt, .pth, .csv, .tsv, .parquet"
    assert f"expected {known} or a folder of images, found '.xls'" in refused(tmp_path / "x.xls")


# Folders of images


def pictures(folder: Path, names: list[str], mode: str = "L", size: tuple[int, int] = (6, 5)) -> list[np.ndarray]:
    """Random images, (width, height) = size, saved below the folder and given back as [C, H, W] uint8."""
    from PIL import Image

    held = []
    for i, name in enumerate(names):
        array = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        image = Image.fromarray(array).convert(mode)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name)
        array = np.asarray(image)
        held.append(array[None] if array.ndim == 2 else np.moveaxis(array, 2, 0))
    return held


NAMES = [f"{i:02}.png" for i in range(20)]


@pytest.mark.parametrize("mode", ["L", "RGB", "1"])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_folder_of_images(tmp_path, monkeypatch, mode, lazy):
    held = np.stack(pictures(tmp_path, NAMES, mode)).astype(np.float32)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_bytes(b"not an image")
    monkeypatch.setattr(data, "MEMORY_LIMIT", 0 if lazy else 1 << 30)
    splits = data.load(tmp_path, flat=False)
    assert {type(s) for s in splits} == {data.LazySplit if lazy else data.Split}
    assert [len(s) for s in splits] == [14, 2, 4]
    assert sorted(torch.cat([s.index for s in splits]).tolist()) == list(range(20))
    for split in splits:
        expected = torch.from_numpy(held[split.index.numpy()]) / (1 if mode == "1" else 255)
        assert torch.equal(split.read(), expected)
        assert split.shape == expected.shape
        assert split.event_shape == tuple(expected.shape[1:])
        assert split.levels == (2 if mode == "1" else 256)
        assert split.labels is None
        assert split.name.startswith(f"folder {tmp_path.name}/")
    assert data.load(str(tmp_path))[0].shape == (14, held[0].size)


def test_subfolders_are_labels(tmp_path):
    pictures(tmp_path, [f"{c}/{n}" for c in ("dog", "cat") for n in NAMES[:5]])
    splits = data.load(tmp_path)
    assert splits[0].classes == ("cat", "dog")
    for split in splits:
        assert split.labels.tolist() == (split.index >= 5).long().tolist()  # sorted by path: the cats come first
    pictures(tmp_path, ["loose.png"])
    assert data.load(tmp_path)[0].labels is None


def test_subfolders_named_like_parts_are_parts(tmp_path):
    names = [f"{part}/{c}/{n}" for part in ("train", "val", "test") for c in "ab" for n in NAMES[:2]]
    held = np.stack(pictures(tmp_path, names))
    for i, split in enumerate(data.load(tmp_path, flat=False)):
        assert torch.equal(split, torch.from_numpy(held[4 * i : 4 * i + 4]).float() / 255)
        assert split.labels.tolist() == [0, 0, 1, 1]


def test_images_that_differ_are_named(tmp_path):
    pictures(tmp_path, NAMES[:5])
    pictures(tmp_path, ["03.png"], size=(7, 5))
    message = refused(tmp_path)
    assert "03.png: expected L 6x5 like 00.png, found L 7x5" in message
    pictures(tmp_path, ["03.png"], mode="RGB")
    assert "found RGB 6x5" in refused(tmp_path)
    (tmp_path / "03.png").write_bytes(HTML)
    assert "03.png: expected an image, found something unreadable; it looks like an HTML page" in refused(tmp_path)
    pictures(tmp_path, NAMES[:5], mode="RGBA")
    assert "00.png: expected an image of mode L, RGB or 1, found RGBA" in refused(tmp_path)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_truncated_image_is_named(tmp_path, monkeypatch, lazy):
    pictures(tmp_path, NAMES[:10], size=(40, 40))
    content = (tmp_path / "03.png").read_bytes()
    (tmp_path / "03.png").write_bytes(content[: len(content) // 2])
    monkeypatch.setattr(data, "MEMORY_LIMIT", 0 if lazy else 1 << 30)
    if not lazy:
        assert "03.png: expected an image" in refused(tmp_path)
        return
    damaged = next(split for split in data.load(tmp_path) if 3 in split.index)
    with pytest.raises(DataError, match=r"03\.png: expected an image"):
        damaged.read()


def test_too_few_images(tmp_path):
    assert "at least 3 images, found 0" in refused(tmp_path)
    pictures(tmp_path, NAMES[:2])
    assert "at least 3 images, found 2" in refused(tmp_path)


# Images that stay on disk


@pytest.fixture
def lazily(tmp_path, monkeypatch):
    pictures(tmp_path, [f"{'ab'[i % 2]}/{name}" for i, name in enumerate(NAMES)])
    monkeypatch.setattr(data, "MEMORY_LIMIT", 0)
    return lambda **options: data.load(tmp_path, **options)


def test_lazy_metadata(lazily):
    train, valid, test = lazily(binarize="dynamic", seed=4)
    assert train.shape == (14, 30)
    assert (train.noise, valid.noise, test.noise) == ("binarize", None, None)
    assert train.description.endswith("/train, binarized anew at every read")
    assert test.description.endswith("/test, binarized fixed at seed 4")
    assert (test.base_measure, test.levels, test.classes) == ("binary", 2, ("a", "b"))
    head = test.head(3)
    assert (len(head), head.shape, len(head.labels), len(head.index)) == (3, (3, 30), 3, 3)
    assert head.description.endswith("/test (3 of 4 rows), binarized fixed at seed 4")
    with pytest.raises(UsageError, match="at least 1"):
        test.head(0)


def test_lazy_reads_agree_with_each_other(lazily):
    grey = lazily()[0]
    assert torch.equal(grey.read([3, 0]), grey.read()[[3, 0]])
    assert torch.equal(grey.read(torch.tensor([3, 0])), grey[[3, 0]])
    assert torch.equal(grey[3], grey.read()[3])
    assert torch.equal(grey[2:5], grey.read(slice(2, 5)))
    assert torch.equal(grey.read(grey.labels == 1), grey.read()[grey.labels == 1])
    with pytest.raises(IndexError):
        grey.read([14])


@pytest.mark.parametrize("options", [{"binarize": "fixed"}, {"dequantize": True}])
def test_lazy_fixed_noise_belongs_to_the_row(lazily, options):
    grey, test = lazily()[2].read(), lazily(**options)[2]
    whole = test.read()
    assert test.noise is None
    assert torch.equal(test.read(), whole)
    assert torch.equal(test.read([3, 1]), whole[[3, 1]])
    assert torch.equal(test.head(2).read(), whole[:2])
    assert not torch.equal(lazily(seed=1, **options)[2].read(), whole)
    if "dequantize" in options:
        assert torch.equal((whole * 256).floor(), (grey * 255).round())
    else:
        assert set(whole.unique().tolist()) == {0.0, 1.0}
        assert (whole - grey).abs().max() < 1  # a white pixel stays white, a black one black


@pytest.mark.parametrize("options", [{"binarize": "fixed"}, {"dequantize": True}])
def test_lazy_rows_do_not_share_their_noise(lazily, tmp_path, options):
    from PIL import Image

    for path in tmp_path.rglob("*.png"):
        Image.new("L", (6, 5), 128).save(path)
    rows = torch.cat([split.read() for split in lazily(**options)[1:]])
    assert len(rows.unique(dim=0)) == 6  # 30 fair bits a row: two rows agree with probability 1.4e-8


def test_an_image_that_was_replaced_is_named(lazily, tmp_path):
    train = lazily()[0]
    pictures(tmp_path, [train.pictures.paths[int(train.index[2])]], mode="RGB")
    with pytest.raises(DataError, match="expected an image of mode L and size 6x5 like the others, found RGB 6x5"):
        train.read([2])
    assert train.read([1]).shape == (1, 30)


def test_lazy_train_is_redrawn(lazily):
    train = lazily(binarize="dynamic")[0]
    assert not torch.equal(train.read(), train.read())
    a, b = (train.read([0, 1], torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(a, b)
    fixed = train.fixed(0)
    assert (fixed.noise, fixed.binarize, fixed.fixed(1) is fixed) == (None, "fixed", True)
    assert torch.equal(fixed.read(), lazily(binarize="fixed")[0].read())


def test_lazy_digests(lazily, tmp_path):
    options = ({}, {"binarize": "fixed"}, {"binarize": "fixed", "seed": 1}, {"dequantize": True})
    digests = [split.digest for option in options for split in lazily(**option)]
    assert digests == [split.digest for option in options for split in lazily(**option)]
    assert len(set(digests)) == 12
    grey = lazily()[0]
    path = tmp_path / grey.pictures.paths[int(grey.index[0])]
    path.write_bytes(path.read_bytes() + b"\0")
    assert lazily()[0].digest != digests[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_lazy_in_a_data_loader(lazily, workers):
    test = lazily(binarize="fixed")[0]
    loader = torch.utils.data.DataLoader(test, batch_size=5, num_workers=workers)
    assert torch.equal(torch.cat(list(loader)), test.read())


# CelebA and torchvision's OMNIGLOT, in small


@pytest.fixture
def celeba_root(tmp_path, monkeypatch):
    """Twelve images, each of one colour inside the central 148x148 pixels and white around it."""
    from PIL import Image

    folder = tmp_path / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{i:06}.jpg" for i in range(1, 13)]
    for i, name in enumerate(names):
        image = Image.new("RGB", (178, 218), "white")
        image.paste((i, 10 + i, 20 + i), (15, 35, 163, 183))
        image.save(folder / "img_align_celeba" / name, format="png")
    rows = {
        "list_attr_celeba.txt": ["12", "Smiling Young "]
        + [f"{n} {'1 -1' if i % 3 else '-1 1'}" for i, n in enumerate(names)],
        "list_bbox_celeba.txt": ["12", "id x y w h"] + [f"{n} 1 2 3 4" for n in names],
        "list_landmarks_align_celeba.txt": ["12", "a b"] + [f"{n} 1 2" for n in names],
        "identity_CelebA.txt": [f"{n} 7" for n in names],
        "list_eval_partition.txt": [f"{n} {0 if i < 7 else 1 if i < 9 else 2}" for i, n in enumerate(names)],
    }
    for name, lines in rows.items():
        (folder / name).write_text("\n".join(lines) + "\n")
    monkeypatch.setattr("torchvision.datasets.CelebA._check_integrity", lambda self: True)
    return tmp_path


@pytest.mark.parametrize("lazy", [False, True])
def test_celeba(celeba_root, monkeypatch, lazy):
    monkeypatch.setattr(data, "MEMORY_LIMIT", 0 if lazy else 1 << 30)
    splits = data.load("CelebA", root=celeba_root, flat=False)
    assert [len(s) for s in splits] == [7, 2, 3]
    assert torch.cat([s.index for s in splits]).tolist() == list(range(12))
    for split in splits:
        assert split.shape == (len(split), 3, 64, 64)
        colours = (split.index[:, None] + torch.tensor([0, 10, 20])) / 255  # nothing of the white rim is left
        assert torch.equal(split.read(), colours[:, :, None, None].expand(split.shape))
        assert list(split.attributes) == ["Smiling", "Young"]
        assert split.attributes["Smiling"].dtype == torch.bool
        assert split.attributes["Smiling"].tolist() == (split.index % 3 != 0).tolist()
    assert data.load("celeba", root=celeba_root, size=32)[0].shape == (7, 3 * 32 * 32)


def test_celeba_that_is_not_complete(tmp_path, celeba_root, monkeypatch):
    monkeypatch.undo()
    message = refused("celeba", root=celeba_root)
    assert "Dataset not found or corrupted" in message
    assert "img_align_celeba" in message
    assert "img_align_celeba not found" in refused("celeba", root=tmp_path / "elsewhere")


@pytest.mark.parametrize("relative", [False, True])
def test_omniglot_of_torchvision(tmp_path, monkeypatch, relative):
    from PIL import Image

    for kind, alphabet, n in (("background", "Greek", 20), ("evaluation", "Tengwar", 4)):
        for i in range(n):
            image = Image.new("1", (105, 105), 1)
            image.paste(0, (0, 0, 15 * (i % 3), 105))  # ink on the left: 4 (i % 3) of 28 columns
            path = (
                tmp_path / "omniglot-py" / f"images_{kind}" / alphabet / f"character{i % 2:02}" / f"0001_{i + 1:02}.png"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    monkeypatch.chdir(tmp_path)
    root = Path() if relative else tmp_path
    assert "is not torchvision's OMNIGLOT" in refused("omniglot", root=root)
    monkeypatch.setattr("torchvision.datasets.Omniglot._check_integrity", lambda self: True)
    splits = data.load("omniglot", root=root, flat=False)
    assert [len(s) for s in splits] == [18, 2, 4]
    assert [s.attributes["alphabet"].unique().tolist() for s in splits] == [[0], [0], [1]]
    assert splits[2].labels.unique().tolist() == [2, 3]
    for split in splits:
        columns = 4 * ((split.attributes["drawer"] - 1) % 3)
        expected = (torch.arange(28) < columns[:, None]).float()[:, None, None].expand(split.shape)
        assert torch.equal(split, expected)


def test_the_known_names():
    assert set(named.NAMES) == {
        "digits",
        "mnist",
        "mnist-59600",
        "binarized-mnist",
        "fashion-mnist",
        "omniglot",
        "omniglot-random",
        "celeba",
        "freyfaces",
        "smiles",
        "cifar10",
    }


def test_binarized_mnist(tmp_path):
    folder = tmp_path / "BinarizedMNIST"
    train = folder / "binarized_mnist_train.amat"
    assert "binarized_mnist_train.amat not found" in refused("binarized-mnist", root=tmp_path)
    folder.mkdir()
    line = " ".join("01"[i % 3 == 0] for i in range(784)) + " \n"
    for text, message in (
        (2 * line, "expected [50000, 784] zeros and ones, found [2, 784]"),
        (line.replace("1", "2"), "expected zeros and ones, found 2"),
        (line + "<html>\n", "expected a line of zeros and ones for each image"),
        (line + "1 0\n", "expected a line of zeros and ones for each image"),
    ):
        train.write_text(text)
        assert message in refused("binarized-mnist", root=tmp_path)
    for part, n in (("train", 50_000), ("valid", 10_000), ("test", 10_000)):
        (folder / f"binarized_mnist_{part}.amat").write_text(n * line)
    splits = data.load("binarized-mnist", root=tmp_path)
    assert [tuple(split.shape) for split in splits] == [(50_000, 784), (10_000, 784), (10_000, 784)]
    assert [(split.levels, split.base_measure) for split in splits] == 3 * [(2, "binary")]
    assert torch.equal(splits[2][7], (torch.arange(784) % 3 == 0).float())


def test_cifar10_is_what_torchvision_reads(tmp_path, monkeypatch):
    assert "cifar-10-batches-py" in refused("cifar10", root=tmp_path)
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert "is not complete" in refused("cifar10", root=tmp_path)  # torchvision misses the files

    class Held:
        base_folder = "cifar-10-batches-py"
        classes = ("airplane", "automobile")

        def __init__(self, root, train, download):
            assert not download
            count = 50_000 if train else 10_000
            self.data = np.zeros((count, 32, 32, 3), dtype=np.uint8)
            self.data[0, 1, 2] = (10, 20, 30) if train else (40, 50, 60)
            self.targets = [1] + [0] * (count - 1)

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Held)
    train, valid, test = data.load("cifar10", root=tmp_path, flat=False)
    assert [tuple(split.shape) for split in (train, valid, test)] == [(n, 3, 32, 32) for n in (45_000, 5_000, 10_000)]
    assert (train.read()[0, :, 1, 2] * 255).round().tolist() == [10, 20, 30]
    assert (test.read()[0, :, 1, 2] * 255).round().tolist() == [40, 50, 60]
    assert (train.labels[0], valid.labels[0], test.labels[0]) == (1, 0, 1)


# Arrays of a file that are no images, and those beside the data


def floats(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(20, 12, 3), (20, 7, 5, 3), (20, 7, 5, 3, 2)])
@pytest.mark.parametrize("key", ["x", "data", "", "anything"])
def test_sequences_keep_their_shape(tmp_path, shape, key):
    x = floats(*shape)
    np.savez(tmp_path / "a.npz", **{key or "arr_0": x})
    for split in data.load(tmp_path / "a.npz", flat=False):
        assert split.event_shape == tuple(split.shape[1:]) == shape[1:]
        assert torch.equal(split, torch.from_numpy(x[split.index]))
    assert data.load(tmp_path / "a.npz")[0].shape[1:] == (int(np.prod(shape[1:])),)


def test_images_are_asked_for_by_name_or_by_grey_levels(tmp_path):
    x = np.random.default_rng(0).random((20, 6, 5)).astype(np.float32)
    assert data.load(save(tmp_path / "a.npz", images=x), flat=False)[0].event_shape == (1, 6, 5)
    assert data.load(save(tmp_path / "b.npz", x=(x * 255).astype(np.uint8)), flat=False)[0].event_shape == (1, 6, 5)
    assert data.load(save(tmp_path / "c.npz", images_train=x, images_test=x), flat=False)[0].event_shape == (1, 6, 5)
    assert data.load(save(tmp_path / "d.npz", x_train=x, x_test=x), flat=False)[0].event_shape == (6, 5)


@pytest.mark.parametrize("suffix", [".npz", ".pt"])
def test_other_arrays_of_as_many_rows_follow_them(tmp_path, suffix, caplog):
    x, lengths, mask = floats(20, 12, 3), np.arange(20) % 12 + 1, np.arange(720).reshape(20, 36) % 2 == 0
    path = save(tmp_path / f"a{suffix}", x=x, lengths=lengths, mask=mask, table=floats(4, 4))
    for split in data.load(path, flat=False):
        assert set(split.attributes) == {"lengths", "mask"}
        assert split.attributes["lengths"].tolist() == lengths[split.index].tolist()
        assert split[:2].attributes["mask"].tolist() == mask[split.index[:2]].tolist()
    assert "not used: 'table' float32 [4, 4]" in caplog.text
    assert "mask" not in caplog.text


def test_columns_of_a_file_with_parts(tmp_path, caplog):
    x = floats(20, 12, 3)
    path = save(
        tmp_path / "a.npz", x_train=x[:12], x_valid=x[12:15], x_test=x[15:], lengths_train=np.arange(12),
        lengths_valid=np.arange(12, 15), lengths_test=np.arange(15, 20), mask_train=np.ones(12), names=np.array(["a"]),
    )  # fmt: skip
    for split in data.load(path):
        assert list(split.attributes) == ["lengths"]
        assert torch.equal(split.attributes["lengths"], split.index)
    assert "'mask_train' float64 [12]" in caplog.text
    assert "'names'" in caplog.text


def test_a_file_without_further_arrays_says_nothing(tmp_path, caplog):
    data.load(save(tmp_path / "a.npz", images=floats(20, 4), label=np.arange(20)))
    data.load(save(tmp_path / "b.npz", train=floats(20, 4), test=floats(20, 4)))
    assert not caplog.text


@pytest.mark.parametrize("layout", ["csr", "csc", "coo"])
def test_a_sparse_matrix_in_a_file(tmp_path, layout):
    m = sp.random(30, 20, 0.1, format=layout, dtype="float32", rng=0)
    sp.save_npz(tmp_path / "counts.npz", m)
    for split in data.load(tmp_path / "counts.npz"):
        assert torch.equal(split, torch.from_numpy(m.toarray()[split.index]))


def test_a_sparse_matrix_that_claims_to_be_huge(tmp_path):
    sp.save_npz(tmp_path / "counts.npz", sp.csr_matrix((10**6, 10**6), dtype=np.float32))
    with pytest.raises(DataError, match="GiB"):
        data.load(tmp_path / "counts.npz")
