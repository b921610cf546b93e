"""Data as people hold them: taken by `fit`, `log_marginal`, `check` and `generate` alike, or refused with the cure."""

import math
import re

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse as sp
import torch
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, WeightedRandomSampler

from ppvae import check, data, fit, generate, log_marginal
from ppvae.data.admission import admit
from ppvae.errors import DataError, PpvaeError, UsageError

NOISE = 0.5
X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))


def make_pair():
    """A model of two functions and its exact posterior, with a parameter that is at its best."""
    shift = torch.nn.Parameter(torch.zeros(3))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, NOISE).to_event(1), obs=x)

    def guide(x):
        mean = x / (1 + NOISE**2) + pyro.param("shift", shift)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean, math.sqrt(NOISE**2 / (1 + NOISE**2))).to_event(1))

    return model, guide


def model(x):
    raise NotImplementedError  # known by its arguments


def exact(x):
    return dist.Normal(0.0, math.sqrt(1 + NOISE**2)).log_prob(x).sum(-1)


class Named(Dataset):
    """Samples that are dicts."""

    def __init__(self, **columns):
        self.columns = columns

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, i):
        return {name: column[i] for name, column in self.columns.items()}


class AnnData:
    """What admission knows of AnnData: the module of its type, X, and the names of the variables."""

    __module__ = "anndata._core.anndata"

    def __init__(self, x):
        self.X, self.var_names = x, [f"gene{i}" for i in range(x.shape[1])]


def table(x):
    return pd.DataFrame(x.numpy(), columns=["age", "height", "weight"])


HOLDERS = {
    "numpy": lambda x: x.numpy(),
    "numpy of the other byte order": lambda x: x.numpy().astype(">f4"),
    "reversed numpy": lambda x: x.flip(0).numpy()[::-1],
    "read-only numpy": lambda x: np.frombuffer(x.numpy().tobytes(), np.float32).reshape(x.shape),
    "frame": table,
    "frame of nullable floats": lambda x: table(x).astype("Float32"),
    "series in a tuple": lambda x: (table(x),),
    "lists": lambda x: x.tolist(),
    "list of rows": list,
    "list of rows of numpy": lambda x: list(x.numpy()),
    "csr": lambda x: sp.csr_matrix(x.numpy()),
    "sparse array": lambda x: sp.coo_array(x.numpy()),
    "torch coo": lambda x: x.to_sparse(),
    "torch csr": lambda x: x.to_sparse_csr(),
    "anndata": lambda x: AnnData(x.numpy()),
    "anndata of a sparse matrix": lambda x: AnnData(sp.csr_matrix(x.numpy())),
    "tensor data set": TensorDataset,
    "subset": lambda x: Subset(TensorDataset(x), range(len(x))),
    "dict samples": lambda x: Named(x=x),
    "loader": lambda x: DataLoader(TensorDataset(x), 100, shuffle=True),
    "loader of a tensor": lambda x: DataLoader(x, 100),
    "dict": lambda x: {"x": x},
    "batch of a loader": lambda x: next(iter(DataLoader(TensorDataset(x), len(x)))),
    "inference tensor": lambda x: torch.inference_mode()(lambda: x + 0)(),
}


@pytest.mark.parametrize("name", HOLDERS)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_taken_everywhere_as_the_tensor_is(name):
    (model, guide), held = make_pair(), HOLDERS[name](X)
    est = log_marginal(model, guide, held, num_particles=30)
    assert (est.log_px - exact(X)).abs().max() < 1e-5
    assert torch.equal(est.log_px, log_marginal(model, guide, X, num_particles=30).log_px)
    assert "model site 'z'" in check(model, guide, held)
    assert torch.equal(generate.reconstructions(model, guide, held), generate.reconstructions(model, guide, X))
    runs = [fit(*make_pair(), x, valid=x, epochs=2) for x in (held, X)]
    assert runs[0].metrics["loss"] == runs[1].metrics["loss"]
    assert runs[0].metrics["valid_elbo"] == runs[1].metrics["valid_elbo"]


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint8, np.uint16, np.uint32, np.uint64, np.int64, np.float16])
def test_numbers_keep_their_value_and_precision(dtype):
    a = np.array([[0, 1], [1, 0], [1, 1]], dtype)
    (x,) = admit(a)
    assert torch.equal(x.double(), torch.tensor([[0.0, 1], [1, 0], [1, 1]]).double())
    assert x.dtype.is_floating_point == (np.dtype(dtype).kind == "f")
    assert admit(a.astype(np.float64))[0].dtype is torch.float64
    assert admit(a.astype(np.longdouble))[0].dtype is torch.float64


def test_a_number_beyond_int64_is_refused():
    with pytest.raises(DataError, match=r"a\.astype\(float\)"):
        admit(np.array([2**63], np.uint64))


def test_the_columns_of_a_table_keep_their_names():
    x = table(X)
    (column,) = admit(x)
    assert column.columns == column[:2].columns == ("age", "height", "weight")
    x.loc[7, "height"] = math.nan
    with pytest.raises(DataError, match=r"row 7, column 1 \('height'\) is nan"):
        fit(*make_pair(), x, epochs=1)
    assert data.with_missing(x).missing
    mixed = pd.DataFrame({"a": [1.5, 2.5], "b": [True, False], "c": [1, 2]})
    assert admit(mixed)[0].tolist() == [[1.5, 1.0, 1.0], [2.5, 0.0, 2.0]]
    gaps = pd.DataFrame({"a": pd.array([1, None], "Int64")})
    assert admit(gaps)[0].isnan().tolist() == [[False], [True]]
    with pytest.raises(DataError, match="column 'city' holds"):
        admit(pd.DataFrame({"a": [1.0], "city": ["Riga"]}))


def pair_of_two(x, label):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z + label[:, None], NOISE).to_event(1), obs=x)


def guide_of_two(x, label):
    with pyro.plate("data", len(x)):
        mean = (x - label[:, None]) / (1 + NOISE**2)
        pyro.sample("z", dist.Normal(mean, math.sqrt(NOISE**2 / (1 + NOISE**2))).to_event(1))


LABEL = torch.arange(20.0) % 3


@pytest.mark.parametrize(
    "held",
    [
        (X, LABEL),
        [X, LABEL],
        (X.numpy(), LABEL.tolist()),
        (table(X), pd.Series(LABEL.numpy())),
        TensorDataset(X, LABEL),
        DataLoader(TensorDataset(X, LABEL), 100),
        Named(label=LABEL, x=X),
        {"label": LABEL, "x": X},
    ],
    ids=lambda held: type(held).__name__,
)
def test_columns_go_to_the_arguments_that_they_are_for(held):
    found = log_marginal(pair_of_two, guide_of_two, held, num_particles=30).log_px
    assert (found - exact(X - LABEL[:, None])).abs().max() < 1e-5


def test_a_list_of_two_tensors_is_what_the_model_takes():
    a, b = X[:, 0], X[:, 1]
    assert [c.shape for c in admit([a, b], program=pair_of_two)] == [(20,), (20,)]
    assert [c.shape for c in admit([a, b], program=model)] == [(2, 20)]
    for program in (None, lambda x, lengths=None: None):
        with pytest.raises(DataError, match=r"pass a tuple .*torch\.stack\(x\)"):
            admit([a, b], program=program)


def test_a_collate_function_is_that_of_the_loader():
    rows = [torch.ones(n, 2) for n in (2, 4, 3)]

    class Rows(Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return rows[i]

    with pytest.raises(DataError, match=r"pad_sequence.*\(x, lengths\)"):
        admit(Rows())
    loader = DataLoader(
        Rows(), 2, collate_fn=lambda s: (pad_sequence(s, batch_first=True), torch.tensor([len(r) for r in s]))
    )
    x, lengths = admit(loader)
    assert x.shape == (3, 4, 2)
    assert lengths.tolist() == [2, 4, 3]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(X)


class Jittered(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, i):
        return X[i] + 1e-3 * torch.randn(3)


SEQUENCES = [torch.zeros(n, 3) for n in (5, 9, 7)]
REFUSED = {
    "gradient": (X.clone().requires_grad_(), lambda x: x.detach()),
    "computed with a gradient": (X * torch.ones(3, requires_grad=True), lambda x: x.detach()),
    "complex": (X + 0j, lambda x: torch.view_as_real(x)[..., 0]),
    "quantised": (torch.quantize_per_tensor(X, 0.1, 0, torch.qint8), lambda x: x.dequantize()),
    "another batch size": (DataLoader(TensorDataset(X), 5), lambda x: x.dataset),
    "rows that are chosen": (
        DataLoader(TensorDataset(X), 100, sampler=WeightedRandomSampler(torch.ones(20), 20)),
        lambda x: x.dataset,
    ),
    "rows left out": (DataLoader(TensorDataset(X), 19, drop_last=True), lambda x: x.dataset),
    "no batches": (DataLoader(TensorDataset(X), None), lambda x: x.dataset),
    "a sampler of batches": (
        DataLoader(TensorDataset(X), batch_sampler=[[0, 1], [2]]),
        lambda x: x.dataset,
    ),
    "too many columns": (TensorDataset(X, LABEL), lambda x: torch.stack([sample[0] for sample in x])),
    "a stream": (Stream(), lambda x: torch.stack(list(x))),
    "an iterator": (iter(X), None),
    "random samples": (Jittered(), lambda x: torch.stack([*x])),
    "names that are no arguments": ({"a": X, "b": LABEL}, lambda x: (x["a"],)),
    "a masked array": (
        np.ma.masked_equal(np.ones((20, 3), np.float32), 1),
        None,
    ),
    "nested": (torch.nested.nested_tensor(SEQUENCES), None),
    "sequences": (SEQUENCES, None),
    "sequences in a tuple": ((SEQUENCES,), None),
    "ragged lists": ([[1.0], [1.0, 2.0]], None),
    "packed": (pack_sequence(SEQUENCES, enforce_sorted=False), None),
    "text": ([["a"], ["b"]], None),
    "objects": (np.array([[1.0, None]]), None),
    "dates": (np.array(["2020-01-01"], "datetime64[D]"), None),
    "no numbers": (torch.zeros(20, 3, device="meta"), None),
    "a name": ("digits", None),
    "nothing": (None, None),
    "empty": ([], None),
}


CURE = r"[Pp]ass |Load it|give each value a number|found str in it|an empty list|data\.with_missing"


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:torch.quantize_per_tensor")
def test_refused_in_one_sentence_and_taken_when_it_is_followed(name):
    held, follow = REFUSED[name]
    model, guide = make_pair()
    calls = [lambda x: fit(*make_pair(), x, epochs=1)]
    if name != "another batch size":  # which matters to training alone
        calls += [
            lambda x: log_marginal(model, guide, x, num_particles=10), lambda x: check(model, guide, x),
            lambda x: generate.reconstructions(model, guide, x),
        ]  # fmt: skip
    for call in calls:
        with pytest.raises((DataError, UsageError), match=r"^data") as refused:
            call(held)
        assert len(str(refused.value).splitlines()) == 1
        assert re.search(
            "[Pp]ass |Load |give each value|found str in it|an empty list|data.with_missing", str(refused.value)
        )
    if follow:
        for call in calls:
            call(follow(held))


def test_the_cure_for_sequences_works():
    x, lengths = pad_packed_sequence(pack_sequence(SEQUENCES, enforce_sorted=False), batch_first=True)
    assert [c.shape for c in admit((x, lengths))] == [(3, 9, 3), (3,)]
    padded = torch.nested.to_padded_tensor(torch.nested.nested_tensor(SEQUENCES), 0.0)
    assert torch.equal(padded, x)
    assert torch.equal(pad_sequence(SEQUENCES, batch_first=True), x)


def test_a_sparse_matrix_that_does_not_fit():
    with pytest.raises(DataError, match="GiB"):
        admit(sp.csr_matrix((10**6, 10**5), dtype=np.float32))


# Devices


@pytest.mark.parametrize("device", ["mps", "gpu", "cuda:99", "meta", "", 99])
def test_a_device_that_is_not_there(device):
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has it")
    model, guide = make_pair()
    for call in (
        lambda: fit(model, guide, X, epochs=1, device=device),
        lambda: log_marginal(model, guide, X, num_particles=10, device=device),
    ):
        with pytest.raises(UsageError, match=r"device: expected one of this machine \(cpu"):
            call()


def test_a_default_device_does_not_matter():
    def trained(model, guide):
        torch.manual_seed(0)
        run = fit(model, guide, X, valid=X, epochs=3, batch_size=7)
        est = log_marginal(run.model, run.guide, X, num_particles=200, posterior_draws=3)
        return run.metrics["loss"], est.log_px, est.posterior["z"], generate.samples(run.model, run.guide, X)

    expected, pair, other = trained(*make_pair()), make_pair(), make_pair()
    torch.set_default_device("meta")
    try:
        found, text = trained(*pair), check(*other, X)
    finally:
        torch.set_default_device(None)
    assert found[0] == expected[0]
    assert all(map(torch.equal, found[1:], expected[1:]))
    assert "model site 'z'" in text


def test_errors_are_of_the_library():
    with pytest.raises(PpvaeError):
        admit(object())


class Drawn(Dataset):
    """Samples of two columns that are drawn anew at each read."""

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return torch.randn(2), torch.randn(2)


def test_the_cures_of_samples_names_and_dates_work():
    dataset, two = Drawn(), lambda a, c: None
    with pytest.raises(UsageError, match=r"pass tuple\(torch.utils.data.default_collate\(\[dataset\[i\] for i"):
        admit(dataset, "data", two)
    read = tuple(torch.utils.data.default_collate([dataset[i] for i in range(len(dataset))]))
    assert [c.shape for c in admit(read, "data", two)] == [(6, 2), (6, 2)]
    with pytest.raises(UsageError, match=r"takes a, c by name alone.*leave out the [*]"):
        admit({"a": read[0], "c": read[1]}, "data", lambda *, a, c: None)
    assert torch.equal(admit({"c": read[1], "a": read[0]}, "data", two)[0], read[0])
    for values in (pd.date_range("2020-01-01", periods=3), pd.Index(["a", "b", "a"]), pd.Series(["a", "b", "a"])):
        with pytest.raises(DataError, match=r"its values are .*pandas.factorize\(x\)\[0\]"):
            admit(values)
        assert len(admit(pd.factorize(values)[0])[0]) == 3


def test_missing_values_of_named_columns():
    marked = data.with_missing({"age": np.array([31.0, math.nan]), "visits": np.array([2, 0])})
    assert list(marked) == ["age", "visits"]
    assert all(column.missing for column in marked.values())
    both = data.with_missing((torch.tensor([[1.0, math.nan], [0.0, 1.0]]), torch.tensor([1, 2])))
    assert [column.missing for column in both] == [True, True]


def test_the_cure_for_text_keeps_gaps():
    frame = pd.DataFrame({"sex": ["f", None, "m"], "age": [1.0, 2.0, 3.0]})
    with pytest.raises(DataError, match=r"as by (.*), where NaN is a gap") as raised:
        data.with_missing(frame)
    cure = re.search(r"as by (.*), where", str(raised.value))[1]
    numbers = eval(cure, {"pandas": pd, "x": frame["sex"]})
    marked = data.with_missing(frame.assign(sex=numbers).astype("float32"))
    assert marked[:, 0].isnan().tolist() == [False, True, False]


def test_a_gap_in_a_column_with_a_name_is_placed_by_the_name():
    def model(age, visits):
        with pyro.plate("data", len(age)):
            pyro.sample("age", dist.Normal(0.0, 1.0), obs=age)

    columns = {"visits": torch.ones(5), "age": torch.tensor([1.0, math.nan, 1.0, 1.0, 1.0])}
    with pytest.raises(DataError, match=r"data\['age'\]: row 1 is nan.*with_missing"):
        log_marginal(model, lambda age, visits: None, columns)


@pytest.mark.parametrize(
    ("names", "cure"),
    [
        ("ab", r"the model's arguments are a, b, c: add 'c', or leave out the argument of model and guide$"),
        ("abcd", r"leave 'd' out$"),
        ("uvw", r"pass a tuple of its columns in the order of those arguments$"),
    ],
)
def test_a_dict_that_does_not_fit_the_arguments_names_the_columns(names, cure):
    def model(a, b, c):
        raise AssertionError

    with pytest.raises(UsageError, match=cure):
        admit({name: torch.zeros(3) for name in names}, "data", model)
