"""Splits: what they promise about values, noise, metadata and provenance."""

import copy
import hashlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ppvae import data
from ppvae.data.split import SplitInfo, draw_noise
from ppvae.data.unsplit import permutation_split
from ppvae.errors import DataError, UsageError

SETS = {  # name: (sizes, event shape, labels)
    "digits": ((1257, 180, 360), (1, 8, 8), True),
    "mnist": ((50_000, 10_000, 10_000), (1, 28, 28), True),
    "mnist-59600": ((59_600, 400, 10_000), (1, 28, 28), True),
    "fashion-mnist": ((50_000, 10_000, 10_000), (1, 28, 28), True),
    "omniglot": ((17_352, 1_928, 13_180), (1, 28, 28), True),
    "omniglot-random": ((23_045, 1_345, 8_070), (1, 28, 28), True),
    "freyfaces": ((1375, 197, 393), (1, 28, 20), False),
    "smiles": ((9215, 1317, 2633), (1, 32, 32), True),
}


def shared_data() -> Path:
    root = Path(os.environ.get("PPVAE_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
    if not (root / "MNIST" / "raw").is_dir():
        pytest.skip("needs ../shared/data")
    return root


def root_for(name: str) -> Path | None:
    return None if name == "digits" else shared_data()


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


# Named sets


@pytest.mark.parametrize("name", SETS)
def test_sizes_ranges_and_disjoint_cover(name):
    sizes, event, labelled = SETS[name]
    splits = data.load(name, root_for(name))
    assert [tuple(s.shape) for s in splits] == [(n, int(np.prod(event))) for n in sizes]
    assert [s.name for s in splits] == [f"{name}/{part}" for part in ("train", "valid", "test")]
    for split in splits:
        assert split.dtype == torch.float32
        assert split.event_shape == event
        assert split.min() >= 0.0
        assert split.max() <= 1.0
        assert split.levels == (17 if name == "digits" else 256)
        assert (split.labels is not None) == labelled
        assert not labelled or (split.labels.dtype == torch.long and split.labels.shape == (len(split),))
    top = torch.stack([s.max() for s in splits]).max()
    assert top == torch.tensor(238 / 255 if name == "freyfaces" else 1.0)
    index = torch.cat([s.index for s in splits])
    assert torch.equal(index.sort().values, torch.arange(sum(sizes)))  # disjoint and covering


@pytest.mark.parametrize("name", ["digits", "omniglot", "smiles"])
def test_flat_false_gives_the_same_numbers_as_images(name):
    flat, images = data.load(name, root_for(name)), data.load(name, root_for(name), flat=False)
    for a, b in zip(flat, images, strict=True):
        assert tuple(b.shape[1:]) == SETS[name][1] == b.event_shape
        assert torch.equal(a, b.flatten(1))
        assert a.digest != b.digest  # the shape is part of what was evaluated


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    held = load_digits()
    for split in data.load("digits", flat=False):
        rows = split.index.numpy()
        assert torch.equal(split[:, 0] * 16, torch.from_numpy(held.images[rows].astype(np.float32)))
        assert split.labels.tolist() == held.target[rows].tolist()


def test_mnist_is_in_canonical_order():
    train, valid, test = data.load("mnist", shared_data())
    assert train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert train.index[0] == 0
    assert valid.index[[0, -1]].tolist() == [50_000, 59_999]
    assert test.index[0] == 60_000
    whole = torch.cat([train, valid])
    assert whole.mean().item() == pytest.approx(0.1306604, abs=1e-6)  # the figures everyone normalises by
    assert whole.double().std().item() == pytest.approx(0.3081078, abs=1e-6)


def test_omniglot_keeps_background_and_evaluation_apart():
    train, valid, test = data.load("omniglot", shared_data())
    seen = set(train.attributes["alphabet"].tolist()) | set(valid.attributes["alphabet"].tolist())
    assert len(seen) == 30
    assert len(set(test.attributes["alphabet"].tolist())) == 20
    assert not seen & set(test.attributes["alphabet"].tolist())
    assert set(train.attributes) == {"alphabet", "character", "drawer"}
    assert len(set(test.head(200).attributes["alphabet"].tolist())) > 10  # a head is a fair sample


def test_omniglot_random_has_all_alphabets_in_all_splits():
    for split in data.load("omniglot-random", shared_data()):
        assert len(set(split.attributes["alphabet"].tolist())) == 50


def test_smiles_labels_have_names():
    splits = data.load("smiles", shared_data())
    assert sum(int(s.labels.sum()) for s in splits) == 3690
    assert splits[0].classes == ("not smiling", "smiling")


def test_names_forgive_case_hyphens_and_underscores():
    a = data.load("Fashion_MNIST", shared_data())[2]
    assert a.name == "fashion-mnist/test"
    assert a.digest == data.load("fashionmnist", shared_data())[2].digest


def test_environment_names_the_root_and_an_argument_goes_first(monkeypatch, tmp_path):
    monkeypatch.setenv("PPVAE_DATA", str(shared_data()))
    assert len(data.load("freyfaces")[0]) == 1375
    with pytest.raises(DataError, match=r"freyfaces\.npz not found"):
        data.load("freyfaces", root=tmp_path)


# Options


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (
            {"name": "mnits"},
            "Did you mean 'mnist'.*digits, mnist, mnist-59600, binarized-mnist, fashion-mnist, omniglot, "
            "omniglot-random, celeba, freyfaces, smiles",
        ),
        ({"name": "no such set"}, "Known: digits"),
        ({"name": 3}, "expected a name or a path, found int"),
        ({"name": "digits", "binarize": "static"}, "expected None, 'fixed' or 'dynamic', found 'static'"),
        ({"name": "digits", "binarize": True}, "binarize: expected None"),
        ({"name": "digits", "binarize": "fixed", "dequantize": True}, "exclude each other"),
        ({"name": "digits", "seed": 0.5}, "seed: expected a whole number, found 0.5"),
        ({"name": "digits", "size": 32}, "only celeba"),
        ({"name": "celeba", "size": 0}, "1 to 148"),
    ],
)
def test_options_that_do_not_exist_are_refused(arguments, match):
    with pytest.raises(UsageError, match=match) as caught:
        data.load(**arguments)
    assert str(caught.value).count("\n") < 3


# Noise


@pytest.mark.parametrize("options", [{}, {"binarize": "fixed"}, {"binarize": "dynamic"}, {"dequantize": True}])
def test_loading_twice_gives_identical_digests(options):
    first, second = data.load("digits", **options), data.load("digits", **options)
    assert [s.digest for s in first] == [s.digest for s in second]
    assert len({s.digest for s in first}) == 3


def test_seed_draws_the_noise_and_nothing_else():
    a, b = data.load("digits", binarize="fixed", seed=0), data.load("digits", binarize="fixed", seed=1)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.index, y.index)
        assert x.digest != y.digest
    grey = data.load("digits", seed=0), data.load("digits", seed=1)
    assert [s.digest for s in grey[0]] == [s.digest for s in grey[1]]


def test_splits_do_not_share_their_noise(digits):
    half = [SplitInfo(f"x/{part}", (64,), 100, binarize="dynamic", noise="binarize") for part in ("valid", "test")]
    a, b = (data.Split(torch.full((100, 64), 0.5), facts).fixed(0) for facts in half)
    assert (a == b).float().mean() < 0.6  # 0.5 expected; above 0.6 with probability < 1e-50


def test_fixed_binarisation_is_bernoulli_of_the_pixel(digits):
    for grey, binary in zip(digits, data.load("digits", binarize="fixed"), strict=True):
        assert binary.noise is None
        assert set(binary.unique().tolist()) == {0.0, 1.0}
        assert torch.equal(binary[grey == 0], torch.zeros_like(binary[grey == 0]))
        assert torch.equal(binary[grey == 1], torch.ones_like(binary[grey == 1]))
        z = (binary - grey).sum() / (grey * (1 - grey)).sum().sqrt()
        assert z.abs() < 6  # fails for a right sampler with probability 2e-9; a constant 0.5 threshold is far off
        assert torch.equal(binary.read(), binary.read())
        assert torch.equal(binary[:5], binary[:5])


def test_dynamic_train_is_redrawn_and_its_mean_is_the_grey_level(digits):
    train, valid, test = data.load("digits", binarize="dynamic")
    fixed = data.load("digits", binarize="fixed")
    assert (train.noise, valid.noise, test.noise) == ("binarize", None, None)
    assert (train.binarize, valid.binarize, test.binarize) == ("dynamic", "fixed", "fixed")
    assert [valid.digest, test.digest] == [fixed[1].digest, fixed[2].digest]
    assert train.fixed(0).digest == fixed[0].digest

    rows, reads = torch.arange(50), 500
    torch.manual_seed(0)
    draws = torch.stack([train.read(rows) for _ in range(reads)])
    assert not torch.equal(draws[0], draws[1])
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    grey = digits[0][:50]
    # Hoeffding: 3200 pixels x 2 exp(-2 * 500 * 0.15^2) = 1e-6 is the chance that a right sampler fails
    assert (draws.mean(0) - grey).abs().max() < 0.15
    z = (draws - grey).sum() / (reads * grey * (1 - grey)).sum().sqrt()
    assert z.abs() < 6  # 2e-9


def test_every_way_to_index_a_redrawing_split_draws_afresh():
    train = data.load("digits", binarize="dynamic")[0]
    torch.manual_seed(0)
    keys = [slice(0, 200), list(range(200)), torch.arange(200), torch.arange(1257) < 200, (slice(0, 200), slice(3, 60))]
    for key in keys:
        a, b = train[key], train[key]
        assert type(a) is type(b) is torch.Tensor
        assert not torch.equal(a, b)
        assert set(a.unique().tolist()) == {0.0, 1.0}
    assert set(torch.stack(list(train.head(50))).unique().tolist()) == {0.0, 1.0}
    assert set(train[3].tolist()) <= {0.0, 1.0}
    assert train[3].shape == (64,)


def test_a_generator_makes_a_read_repeatable():
    train = data.load("digits", binarize="dynamic")[0]
    a, b = (train.read(torch.arange(9), torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)
    before = torch.get_rng_state()
    train.read(torch.arange(9), torch.Generator().manual_seed(3))
    train.fixed(0)
    data.load("digits", binarize="fixed")
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is the user's


def test_dequantized_values_keep_their_level(digits):
    train, valid, test = data.load("digits", dequantize=True)
    assert (train.noise, valid.noise, test.noise) == ("dequantize", None, None)
    torch.manual_seed(0)
    for grey, split in zip(digits, (train, valid, test), strict=True):
        x = split.read()
        assert x.min() >= 0
        assert x.max() < 1
        assert torch.equal((x * 17).floor(), grey * 16)
        u = x * 17 - grey * 16
        assert abs(u.mean() - 0.5) < 6 * (1 / 12 / u.numel()) ** 0.5  # 2e-9
        assert abs((u < 0.25).float().mean() - 0.25) < 6 * (0.1875 / u.numel()) ** 0.5  # 2e-9
    assert not torch.equal(train.read(), train.read())
    assert torch.equal(valid.read(), valid.read())


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24])
def test_no_level_is_rounded_into_the_next(levels, u, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, u))
    v = torch.arange(levels, dtype=torch.float32)
    x = draw_noise(v / (levels - 1), "dequantize", levels)
    assert torch.equal((x * levels).floor(), v)
    assert x.max() < 1


def test_the_underlying_values_of_a_redrawing_split_have_their_own_digest():
    grey, dynamic, levels = (data.load("digits", **o)[0] for o in ({}, {"binarize": "dynamic"}, {"dequantize": True}))
    assert len({grey.digest, dynamic.digest, levels.digest}) == 3


# Split as a tensor


def test_digest_is_sha256_of_dtype_shape_and_bytes():
    x = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    expected = hashlib.sha256(b"torch.float32 [2, 3]\n" + x.numpy().tobytes()).hexdigest()
    assert data.digest(x) == expected == data.Split(x, SplitInfo("x", (3,), 2)).digest
    assert data.digest(x.t()) == data.digest(x.t().contiguous()) != expected
    assert data.digest(x.double()) != expected


def test_digest_is_kept_until_the_values_change(monkeypatch, digits):
    split = digits[1].head(5).to(torch.float64)
    first = split.digest
    monkeypatch.setattr("ppvae.data.split.digest", lambda x: pytest.fail("hashed again"))
    assert split.digest == first
    monkeypatch.undo()
    split[0, 0] = 0.25
    assert split.digest != first


def test_every_operation_gives_a_plain_tensor(digits):
    test = digits[2]
    assert isinstance(test, torch.Tensor)
    results = [test + 1, 1 - test, test * test, test.mean(0), test @ test.T, test.view(-1), test.clone(), test.detach()]
    results += [torch.cat([test, test]), torch.stack([test]), test.unsqueeze(0), torch.exp(test), test[0], test[:, 3]]
    results += [test.read(), test.read([0, 1]), test.read(slice(3)), next(iter(test)), test.expand(2, 360, 64)]
    results += [torch.nn.functional.linear(test, torch.zeros(2, 64)), test[test > 0.5], test[None], test.bool()]
    assert {type(r) for r in results} == {torch.Tensor}
    assert not test.requires_grad


@pytest.mark.parametrize("key", [slice(5, 20, 3), [4, 2, 2], torch.tensor([7, -1]), np.array([3, 1])], ids=str)
def test_rows_carry_their_labels(digits, key):
    test = digits[2]
    part = test[key]
    assert isinstance(part, data.Split)
    assert torch.equal(part, test.detach()[key])
    assert torch.equal(part.labels, test.labels[key])
    assert torch.equal(part.index, test.index[key])
    assert part.description == f"digits/test ({len(part)} of 360 rows), 17 levels, not dequantized"


def test_a_mask_carries_labels_and_attributes():
    test = data.load("omniglot", shared_data())[2]
    mask = test.attributes["drawer"] == 3
    part = test[mask]
    assert len(part) == 659
    assert part.attributes["drawer"].unique().tolist() == [3]
    assert torch.equal(part.labels, test.labels[mask])


def test_read_gives_the_rows(digits):
    train = digits[0]
    rows = torch.tensor([5, 5, 1000])
    for index in (rows, rows.tolist(), rows.numpy()):
        assert torch.equal(train.read(index), train.detach()[rows])
    assert torch.equal(train.read(range(4)), train.detach()[:4])
    assert torch.equal(train.read(train.labels == 3), train.detach()[train.labels == 3])
    with pytest.raises(IndexError):
        train.read(torch.tensor([1257]))


@pytest.mark.parametrize("options", [{}, {"binarize": "fixed"}, {"binarize": "dynamic"}, {"dequantize": True}])
def test_head_keeps_kind_and_noise(options):
    for split in data.load("digits", **options):
        head = split.head(7)
        assert isinstance(head, data.Split)
        assert (len(head), len(head.labels), len(head.index)) == (7, 7, 7)
        assert head.info == split.info
        assert torch.equal(head.labels, split.labels[:7])
        assert torch.equal(head.index, split.index[:7])
        assert torch.equal(head.fixed(3), split.fixed(3).detach()[:7])
        assert len(split.head(10**6)) == len(split)
    for n in (0, -1, 2.0, True):
        with pytest.raises(UsageError, match="at least 1"):
            split.head(n)


def test_to_keeps_the_metadata():
    for options in ({}, {"binarize": "dynamic"}):
        train = data.load("digits", **options)[0]
        for moved in (train.to(torch.float64), train.double(), train.to("cpu"), train.cpu()):
            assert isinstance(moved, data.Split)
            assert moved.info == train.info
            assert moved.labels.dtype == torch.long
            assert torch.equal(moved.index, train.index)
        assert train.double().dtype == train.double().read([0]).dtype == torch.float64


def test_inference_mode_changes_nothing():
    with torch.inference_mode():
        train, _, test = data.load("digits", binarize="dynamic")
        digests = train.digest, test.digest
        assert set(train.read([0, 1]).unique().tolist()) == {0.0, 1.0}
    assert digests == tuple(s.digest for s in data.load("digits", binarize="dynamic")[::2])


def test_copies_and_pickles_keep_the_metadata():
    train = data.load("digits", binarize="dynamic")[0]
    for other in (copy.deepcopy(train), pickle.loads(pickle.dumps(train))):
        assert isinstance(other, data.Split)
        assert other.data_ptr() != train.data_ptr()
        assert (other.info, other.digest) == (train.info, train.digest)
        assert torch.equal(other.labels, train.labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_draws_afresh(workers):
    train = data.load("digits", binarize="dynamic")[0].head(64)
    loader = torch.utils.data.DataLoader(train, batch_size=32, num_workers=workers)
    torch.manual_seed(0)
    a, b = (torch.cat(list(loader)) for _ in range(2))
    assert a.shape == (64, 64)
    assert set(a.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "measure", "train", "test", "levels"),
    [
        ({}, "density on [0, 1]", "17 levels, not dequantized", "17 levels, not dequantized", 17),
        ({"binarize": "fixed"}, "binary", "binarized fixed at seed 5", "binarized fixed at seed 5", 2),
        ({"binarize": "dynamic"}, "binary", "binarized anew at every read", "binarized fixed at seed 5", 2),
        (
            {"dequantize": True},
            "17 levels",
            "dequantized from 17 levels anew at every read",
            "dequantized from 17 levels at seed 5",
            17,
        ),
    ],
)
def test_description_and_base_measure(options, measure, train, test, levels):
    splits = data.load("digits", seed=5, **options)
    assert splits[0].description == f"digits/train, {train}"
    assert splits[2].description == f"digits/test, {test}"
    assert repr(splits[2]) == f"Split(digits/test, {test}, shape [360, 64])"
    assert {s.base_measure for s in splits} == {measure}
    assert {s.levels for s in splits} == {levels}
    assert {s.seed for s in splits} == {5}
    assert {s.dequantize for s in splits} == {options.get("dequantize", False)}


def test_fixed_says_its_seed():
    train = data.load("digits", binarize="dynamic")[0]
    once = train.fixed(9)
    assert (once.noise, once.binarize, once.seed) == (None, "fixed", 9)
    assert once.description == "digits/train, binarized fixed at seed 9"
    assert once.fixed(1) is once


# Helpers


@pytest.mark.parametrize("n", [3, 4, 5, 9, 10, 11, 99, 1797])
def test_permutation_splits_cover_and_are_never_empty(n):
    parts = permutation_split(n)
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    assert min(map(len, parts)) >= 1
    assert len(parts[1]) == -(-n // 10)
    assert len(parts[2]) == -(-n // 5)


def test_the_permutation_never_changes():
    assert permutation_split(1797)[2][:5].tolist() == [578, 1469, 1051, 1750, 330]


def test_indexed_numbers_the_rows(digits):
    x, index = data.indexed(digits[1])
    assert x is digits[1]
    assert torch.equal(index, torch.arange(180))
    with pytest.raises(DataError, match="at least one row"):
        data.indexed(torch.zeros(0, 3))


def test_validated_gives_the_tensor_back(digits):
    for x in (torch.zeros(1), torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, 4), digits[0]):
        assert data.validated(x, "x") is x


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (torch.zeros(0, 3), r"train: .*at least one row, found shape \[0, 3\]"),
        (torch.zeros(3, 0), r"at least one row, found shape \[3, 0\]"),
        (torch.tensor(1.0), r"found shape \[\]"),
        (torch.zeros(2, dtype=torch.complex64), "dense real numbers, found torch.complex64"),
        (torch.eye(3).to_sparse(), "layout torch.sparse_coo"),
        (np.zeros((2, 3)), "expected a torch.Tensor, found ndarray"),
        (torch.tensor([0.0, float("inf")]), "train: row 1 is inf"),
    ],
)
def test_validated_refuses(x, match):
    with pytest.raises(DataError, match=match):
        data.validated(x, "train")


def test_validated_names_row_column_and_pixel():
    x = torch.zeros(20, 28, 28)
    x[17, 7, 7] = float("nan")
    with pytest.raises(DataError, match=r"x: row 17, column 203 \(of event shape 28x28: pixel \[7, 7\]\) is nan\. "):
        data.validated(x, "x")
    x[17, 7, 9] = x[18, 0, 0] = float("-inf")
    with pytest.raises(DataError, match=r"row 17, columns 203, 205 \(.*\) is nan, and 1 more rows like it"):
        data.validated(x, "x")


def test_import_stays_light():
    code = (
        "import sys, types; package = sys.modules['ppvae'] = types.ModuleType('ppvae'); package.__path__ = ['ppvae'];"
        "import ppvae.data; heavy = {'torchvision', 'sklearn', 'PIL'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
