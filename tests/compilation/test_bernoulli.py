"""log p(x) of bits from the function in C++: torch's values in float64, at any logit, and only where it may be used."""

import math
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.autograd import forward_ad

from ppvae import distributions as ours
from ppvae import log_marginal
from ppvae.compilation import bernoulli, cpp_library
from ppvae.compilation.bernoulli import bernoulli_log_prob

KINDS = {"Pyro": dist.Bernoulli, "ours": ours.Bernoulli}
SHAPES = {  # (logits, x, event dims)
    "particles": ((7, 5, 784), (5, 784), 1),
    "folded": ((35, 100), (35, 100), 1),
    "images": ((3, 4, 1, 8, 9), (4, 1, 8, 9), 3),
    "one datum": ((6, 1, 1, 8, 9), (1, 1, 8, 9), 3),
    "plates": ((6, 5, 3, 65), (1, 3, 65), 1),
    "long": ((2, 3, 3001), (3, 3001), 1),
}
INF = math.inf


@pytest.fixture(autouse=True, scope="module")
def library(tmp_path_factory):
    """The function, compiled and kept in a folder of its own, as a later process finds it."""
    before = cpp_library.KEPT
    cpp_library.KEPT = tmp_path_factory.mktemp("kernels")
    bernoulli.keep_library.cache_clear()
    bernoulli._library.cache_clear()
    bernoulli.keep_library()
    if bernoulli._library() is None:
        pytest.skip("no C++ compiler")
    yield
    cpp_library.KEPT = before
    bernoulli.keep_library.cache_clear()
    bernoulli._library.cache_clear()


def event(kind, logits, dims: int = 1):
    return kind(logits=logits, validate_args=False).to_event(dims)


def exact(logits, x, dims: int = 1):
    """In float64, by log sigmoid of the signed logit: no product of zero and infinity, and no difference."""
    signed = torch.where(x.double() == 1, logits.double(), -logits.double())
    return torch.nn.functional.logsigmoid(signed).flatten(-dims).sum(-1)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_values_are_those_of_float64(shapes, kind, threads):
    torch.manual_seed(1)
    logits, x, dims = 8 * torch.randn(shapes[0]), torch.bernoulli(torch.full(shapes[1], 0.4)), shapes[2]
    found = bernoulli_log_prob(event(kind, logits, dims), x)
    expected = exact(logits, x.expand(logits.shape), dims)
    assert found.shape == expected.shape
    assert float(((found - expected) / expected.abs().clamp(min=1)).abs().max()) < 1e-6


def test_bits_that_are_certain_cost_nothing_and_impossible_ones_everything():
    logits = torch.tensor([[60.0], [INF], [-200.0], [-INF], [88.5], [torch.nan]]).repeat(1, 70)
    fn = event(ours.Bernoulli, logits)
    ones, zeros = (bernoulli_log_prob(fn, torch.full((70,), v)) for v in (1.0, 0.0))
    tiny = -70 * math.exp(-60)
    assert ones[1:4].tolist() == [0, -14_000, -INF]
    assert zeros[1:4].tolist() == [-INF, 0, 0]
    assert abs(float(ones[0]) - tiny) < 1e-6
    assert float(ones[4]) == 0
    assert float(zeros[4]) == -6195
    assert ones[5].isnan()
    assert zeros[5].isnan()


def test_grey_values_are_the_cross_entropy_of_pyro():
    torch.manual_seed(2)
    logits, x = 3 * torch.randn(9, 100), torch.rand(100)
    fn = event(dist.Bernoulli, logits)
    expected = event(dist.Bernoulli, logits.double()).log_prob(x.double())
    assert torch.allclose(bernoulli_log_prob(fn, x).double(), expected, rtol=1e-6)


def test_a_number_does_not_depend_on_how_many_rows_there_are():
    torch.manual_seed(3)
    logits, x = torch.randn(300, 784), torch.bernoulli(torch.full((300, 784), 0.3))
    whole = bernoulli_log_prob(event(ours.Bernoulli, logits), x)
    assert bernoulli_log_prob(event(ours.Bernoulli, logits[:1].clone()), x[:1].clone()).equal(whole[:1])


class Tempered(dist.Bernoulli):
    def log_prob(self, value):
        return super().log_prob(value) / 2


class OwnOfOurs(ours.Bernoulli):
    def log_prob(self, value):
        return super().log_prob(value) / 2


LOGITS, ONES = torch.zeros(2, 100), torch.ones(2, 100)
LEFT_TO_TORCH = {
    "validated": lambda: (dist.Bernoulli(logits=LOGITS, validate_args=True).to_event(1), ONES),
    "float64": lambda: (event(dist.Bernoulli, LOGITS.double()), ONES.double()),
    "gradient": lambda: (event(dist.Bernoulli, LOGITS.clone().requires_grad_()), ONES),
    "gradient of x": lambda: (event(dist.Bernoulli, LOGITS), ONES.clone().requires_grad_()),
    "probs": lambda: (dist.Bernoulli(probs=LOGITS + 0.5, validate_args=False).to_event(1), ONES),
    "subclass": lambda: (event(Tempered, LOGITS), ONES),
    "subclass of ours": lambda: (event(OwnOfOurs, LOGITS), ONES),
    "mask": lambda: (event(dist.Bernoulli, LOGITS).mask(torch.tensor([True, False])), ONES),
    "no event": lambda: (dist.Bernoulli(logits=LOGITS, validate_args=False), ONES),
    "strides": lambda: (event(dist.Bernoulli, torch.zeros(100, 2).T), ONES),
    "expanded": lambda: (event(dist.Bernoulli, LOGITS[0]).expand([2]), ONES),
    "broadcast within the event": lambda: (event(dist.Bernoulli, LOGITS), torch.ones(2, 1)),
    "broadcast logits": lambda: (event(dist.Bernoulli, LOGITS), torch.ones(3, 2, 100)),
    "few bits": lambda: (event(dist.Bernoulli, LOGITS[:, :63].clone()), ONES[:, :63].clone()),
    "Normal": lambda: (dist.Normal(LOGITS, 1.0, validate_args=False).to_event(1), ONES),
}


@pytest.mark.parametrize("make", LEFT_TO_TORCH.values(), ids=LEFT_TO_TORCH)
def test_all_else_is_left_to_torch(make):
    assert bernoulli_log_prob(*make()) is None


CODE = """
import sys
from pathlib import Path
from ppvae.compilation import bernoulli, cpp_library
cpp_library.KEPT = Path(sys.argv[1])
print(bernoulli._library() is not None, "torch._inductor.codecache" in sys.modules)
"""


def test_a_later_process_takes_the_kept_function_and_does_not_import_the_compiler():
    run = subprocess.run(
        [sys.executable, "-c", CODE, str(cpp_library.KEPT)], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["True", "False"]


def test_a_function_is_kept_for_one_processor_one_version_and_one_set_of_flags(monkeypatch):
    source, flags = bernoulli.SOURCE, cpp_library.VECTORIZED
    assert cpp_library.kept_library(source, flags) is not None
    assert cpp_library.kept_library(source + " ", flags) is None
    assert cpp_library.kept_library(source, ()) is None
    for name, value in (("torch.__version__", "0.0"), ("ppvae.compilation.cpp_library._processor", lambda: "other")):
        with monkeypatch.context() as patch:
            patch.setattr(name, value)
            assert cpp_library.kept_library(source, flags) is None


def test_a_home_that_cannot_be_written_leaves_all_to_torch(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setattr(cpp_library, "KEPT", blocked / "kernels")
    loaded = cpp_library.load_library('extern "C" int three() { return 3; }', "nothing", keep=True)
    assert loaded.three() == 3
    assert cpp_library.kept_library('extern "C" int three() { return 3; }') is None


def test_nothing_is_hidden_from_transforms_and_modes():
    def log_prob(logits):
        return bernoulli_log_prob(event(dist.Bernoulli, logits), ONES[0])

    found = []

    def record(logits):
        found.append(log_prob(logits))
        return logits

    torch.func.vmap(record)(LOGITS)
    torch.func.jvp(record, (LOGITS,), (LOGITS,))
    with forward_ad.dual_level():
        record(forward_ad.make_dual(LOGITS, ONES))
    torch.fx.experimental.proxy_tensor.make_fx(record)(LOGITS)
    assert found == [None] * 4
    assert log_prob(LOGITS) is not None
    with torch.no_grad():
        assert log_prob(LOGITS.clone().requires_grad_()) is not None


def test_estimates_are_those_without_the_function(monkeypatch):
    torch.manual_seed(4)
    weight, x = torch.randn(3, 100), torch.bernoulli(torch.full((60, 100), 0.5))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z @ weight).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x - 0.5) @ weight.T / 10, 0.3).to_event(1))

    options = {"num_particles": 200, "proposal": "guide", "compile": False, "progress": False}
    calls = []
    original = bernoulli.bernoulli_log_prob
    monkeypatch.setattr(
        "ppvae.inference.second_run.bernoulli_log_prob", lambda *a: calls.append(out := original(*a)) or out
    )
    found = log_marginal(model, guide, x, **options)
    assert any(out is not None for out in calls)
    monkeypatch.setattr("ppvae.inference.second_run.bernoulli_log_prob", lambda *_: None)
    expected = log_marginal(model, guide, x, **options)
    assert torch.allclose(found.log_px, expected.log_px, atol=2e-4)
    assert not found.log_px.equal(expected.log_px)
