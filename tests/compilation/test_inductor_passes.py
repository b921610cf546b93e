"""What inductor is told: functions taken apart that keep their digits, sums and logarithms in fewer operations."""

from __future__ import annotations

import os
import subprocess
import sys

import pyro.distributions as dist
import pytest
import torch

from ppvae import distributions
from ppvae.compilation import graph as graphs
from ppvae.compilation import inductor_passes as lowering
from ppvae.compilation import process_setup as memory


def test_log1p_by_the_logarithm_alone_keeps_all_digits():
    x = torch.cat([torch.logspace(-30, 10, 4001), -torch.logspace(-30, -0.001, 3001)])
    exact = x.double().log1p()
    assert float(((lowering.log1p_by_log(x) - exact) / exact).abs().max()) < 3e-7  # five units in the last place
    edges = torch.tensor([-1.0, -0.0, 0.0, torch.inf, torch.nan, -2.0])
    assert torch.equal(lowering.log1p_by_log(edges).nan_to_num(7.0), edges.log1p().nan_to_num(7.0))


@pytest.mark.parametrize(("dtype", "digits"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_softplus_and_log_sigmoid_as_they_are_compiled_keep_their_digits(dtype, digits):
    """Every type has them: inductor takes a function apart for all types, or for none."""
    x = torch.cat([torch.linspace(-100, 100, 20001), torch.linspace(-2, 2, 4001)]).to(dtype)
    for mine, exact in (
        (lowering.softplus(x, threshold=40.0), torch.nn.functional.softplus(x.double(), threshold=1000)),
        (lowering.softplus(x, 2.0, 40.0), torch.nn.functional.softplus(x.double(), 2.0, threshold=1000)),
        (lowering.log_sigmoid(x)[0], torch.nn.functional.logsigmoid(x.double())),
    ):
        error = (mine.double() - exact).abs()
        assert float((error / (exact.abs() + 1e-3)).max()) < digits
    edges = torch.tensor([torch.inf, -torch.inf, torch.nan])
    assert torch.equal(lowering.softplus(edges).nan_to_num(7.0), torch.tensor([3.4028234663852886e38, 0.0, 7.0]))
    grad = lowering.softplus_backward(torch.ones_like(x), x, 1.0, 20.0)
    assert torch.allclose(grad, x.sigmoid(), atol=1e-7)  # where x is above the threshold, it is one


@pytest.mark.parametrize(("dtype", "digits"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_biases_of_layers_are_added_after_the_product(dtype, digits):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, dtype=dtype, generator=generator) for shape in ((30, 20), (10, 20), (10,)))
    table = torch.randn(30, 10, dtype=dtype, generator=generator)

    def layers(x):
        out = torch.nn.functional.linear(x, weight, bias)
        scaled = torch.addmm(bias, x, weight.t(), beta=2.0, alpha=0.5)
        return [out, out.tanh(), out @ weight, torch.addmm(table, x, weight.t()), scaled]

    graph = graphs.capture(lambda: layers(x), [weight, bias, table], (x,))
    for a, b in zip(graph.compile((x,), {})(x), layers(x), strict=True):
        torch.testing.assert_close(a, b, rtol=digits, atol=digits)
    lowering._add_biases_after_products(graph.module)
    left = [node for node in graph.module.graph.nodes if node.target is torch.ops.aten.addmm.default]
    assert [node.kwargs for node in left] == [{"beta": 2.0, "alpha": 0.5}]


def test_sums_over_rows_are_the_same_in_any_shape():
    x = torch.randn(7, 619, 80)  # rows that do not divide into parts

    def sums(x):
        wide = x * 2
        return [wide.sum((0, 1)), wide.sum((0, 1), keepdim=True), wide.view(-1, 80).sum(0), wide.sum(0), wide.sum(-1)]

    graph = graphs.capture(lambda: sums(x), [], (x,))
    for a, b in zip(graph.compile((x,), {})(x), sums(x), strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-3)
    lowering._sum_rows_in_blocks(graph.module)
    targets = [node.target for node in graph.module.graph.nodes]
    assert targets.count(lowering._column_sums) == 3
    assert targets.count(torch.ops.aten.sum.dim_IntList) == 2


def test_sums_over_rows_of_what_products_take_in_bfloat16_are_in_float32():
    x = torch.randn(7, 619, 80, generator=torch.Generator().manual_seed(0)) + 0.1
    weight = torch.randn(80, 30).bfloat16()

    def gradients(x):
        return [(wide := x * 2).sum((0, 1)) + 1, wide.bfloat16().view(-1, 80) @ weight]

    total, product = graphs.capture(lambda: gradients(x), [weight], (x,)).compile((x,), {})(x)
    taken = (x * 2).bfloat16()
    assert total.dtype == torch.float32
    errors = [float((total - 1 - of.double().sum((0, 1))).abs().max()) for of in (taken, x * 2)]
    assert min(errors) < 1e-2 < 0.5 < max(errors)  # of what was rounded or of what was not, as inductor sees fit
    assert torch.allclose(product, taken.view(-1, 80) @ weight, rtol=2**-6, atol=0.1)


@pytest.mark.parametrize("use", ["a result", "changed in between"])
def test_sums_over_rows_of_what_has_another_use_are_in_float32(use):
    x = torch.randn(7, 600, 80, generator=torch.Generator().manual_seed(0)) + 0.1
    weight = torch.randn(80, 30).bfloat16()

    def run(x):
        wide = x * 2
        total = wide.sum((0, 1))
        if use == "changed in between":
            wide[..., 0] = 7.0
        copy = wide.bfloat16()
        return [total, copy.view(-1, 80) @ weight, *([copy] if use == "a result" else [])]

    graph = graphs.capture(lambda: run(x), [weight], (x,)).compile((x,), {})
    for a, b in zip(graph(x), run(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4 if a.dtype == torch.float32 else 2**-6, atol=1e-3)


def test_softplus_is_taken_apart_in_every_precision():
    """An operation that inductor has a way for, and that is left whole, fails to compile."""
    aten, table = torch.ops.aten, lowering._decompositions()
    for dtype in (torch.float32, torch.float64):
        x = torch.linspace(-30, 30, 101, dtype=dtype)
        torch.testing.assert_close(table[aten.softplus.default](x), torch.nn.functional.softplus(x))
        torch.testing.assert_close(table[aten.log_sigmoid_forward.default](x)[0], torch.nn.functional.logsigmoid(x))
        slope = table[aten.softplus_backward.default](torch.ones_like(x), x, 1, 20)
        torch.testing.assert_close(slope, x.sigmoid(), rtol=1e-6, atol=1e-8)


def of_bits(kind, logits, bits, dims):
    """log p(bits) as ppvae's Bernoulli writes it, as Pyro's does, and with a sign turned by hand."""
    if kind == "ppvae":
        return distributions.Bernoulli(logits=logits, validate_args=False).to_event(dims).log_prob(bits)
    if kind == "Pyro":
        return dist.Bernoulli(logits=logits, validate_args=False).to_event(dims).log_prob(bits)
    return -torch.nn.functional.softplus((1 - 2 * bits) * logits, threshold=40).flatten(-dims).sum(-1)


EVENTS = [(64,), (1, 8, 8), (7 * 112,), (3, 32, 32), (65,), (48,), (16,)]
KINDS = ["ppvae", "Pyro", "by hand"]


def logits_and_bits(event):
    """Logits [5, 4, *event], bits [4, *event], and log p(bits) [5, 4] in float64."""
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(5, 4, *event, generator=generator)
    bits = torch.bernoulli(torch.full((4, *event), 0.4), generator=generator)
    exact = -torch.nn.functional.softplus(((1 - 2 * bits) * logits).double(), threshold=1000).flatten(2).sum(-1)
    return logits, bits, exact


@pytest.mark.parametrize("event", EVENTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_log_likelihoods_of_bits_take_one_logarithm_for_many(kind, event):
    logits, bits, exact = logits_and_bits(event)
    graph = graphs.capture(lambda: [of_bits(kind, logits, bits, len(event))], [], (logits, bits))
    count = logits[0, 0].numel()
    (found,) = graph(logits, bits)
    assert found.shape == exact.shape
    assert float((found - exact).abs().max()) < 1e-6 * count
    lowering._fuse_logarithms(graph.module)
    rewritten = [n for n in graph.module.graph.nodes if n.target is lowering.sum_of_softplus]
    assert len(rewritten) == (count % 16 == 0 and count > 48)
    (found,) = graph(logits, bits)
    assert float((found - exact).abs().max()) < 1e-6 * count


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_log_likelihoods_of_bits_are_exact(kind):
    """Of every event, by one compilation."""
    cases = [(event, *logits_and_bits(event)) for event in EVENTS]
    inputs = [t for _, logits, bits, _ in cases for t in (logits, bits)]
    graph = graphs.capture(lambda: [of_bits(kind, *pair, len(event)) for event, *pair, _ in cases], [], inputs)
    for found, (event, logits, _, exact) in zip(graph.compile(inputs, {})(*inputs), cases, strict=True):
        assert found.shape == exact.shape, event
        assert float((found - exact).abs().max()) < 1e-6 * logits[0, 0].numel(), event


@pytest.mark.parametrize("kind", ["ppvae", "Pyro"])
def test_gradients_of_log_likelihoods_of_bits_are_as_before(kind):
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(5, 4, 64, generator=generator)
    bits = torch.bernoulli(torch.full((4, 64), 0.4), generator=generator)

    def run():
        x = logits.detach().requires_grad_()
        with torch.enable_grad():
            total = of_bits(kind, x, bits, 1)
            return [total.detach(), *torch.autograd.grad((total**2).sum(), [x])]

    graph = graphs.capture(run, [], (logits, bits))
    for a, b in zip(graph.compile((logits, bits), {})(logits, bits), run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def changed_later(x, bits):
    terms = torch.nn.functional.softplus(x)
    x.view(-1).clamp_(-1, 1)
    return [terms.sum(-1), x.sum(-1)]


def overwritten_view(x, bits):
    base = x * 2
    wrong = base.view(-1, 64)
    torch.ops.aten.softplus.out(wrong, 1, 40, out=wrong)
    return [wrong.neg_().sum(-1), base.sum(-1)]


def coarse_logits(x, bits):
    return [-torch.nn.functional.binary_cross_entropy_with_logits(x.bfloat16(), bits, reduction="none").sum(-1)]


def sum_of_a_layer(x, bits):
    return [torch.nn.functional.linear(x, bits, bits[:, 0]).sum(-1), torch.sum(x * 2, dim=None)]


@pytest.mark.parametrize("run", [changed_later, overwritten_view, coarse_logits, sum_of_a_layer])
def test_rewriting_keeps_the_order_of_changes_and_the_types(run):
    x = 3 * torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    bits = (x > 0).float()
    expected = run(x.clone(), bits)
    work = x.clone()
    graph = graphs.capture(lambda: run(work, bits), [], (work, bits)).compile((x.clone(), bits), {})
    for a, b in zip(graph(x.clone(), bits), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-6 if run is coarse_logits else 1e-5, atol=1e-4)
    lowering._fuse_logarithms(graph.module)
    assert (run is changed_later) == any(n.target is lowering.sum_of_softplus for n in graph.module.graph.nodes)


def test_infinite_logits_are_as_in_torch():
    x = torch.full((2, 64), torch.inf) * torch.tensor([[1.0], [-1.0]])
    for target in (torch.zeros(2, 64), torch.ones(2, 64)):
        exact = torch.nn.functional.binary_cross_entropy_with_logits(x, target, reduction="none").sum(-1)
        found = lowering.sum_of_softplus(x, target, 1)
        assert torch.equal(found.nan_to_num(7.0), exact.nan_to_num(7.0))


@pytest.mark.parametrize("logit", [0.0, 1e-4, 30.0, 1e4, -1e4])
def test_products_of_many_factors_stay_numbers(logit):
    for x in (torch.full((2, 6400), logit), torch.full((2, 3, 40, 40), logit)):
        exact = torch.nn.functional.softplus(x.double()).flatten(1).sum(1)
        assert torch.allclose(lowering.sum_of_softplus(x, None, 1).double(), exact, rtol=1e-6, atol=1e-3)
        exact -= (0.25 * x.double()).flatten(1).sum(1)
        found = lowering.sum_of_softplus(x, torch.full_like(x, 0.25), 1, -1).double()
        assert torch.allclose(found, -exact, rtol=1e-6, atol=1e-3)


def test_terms_that_are_used_twice_or_summed_otherwise_are_left_alone():
    x = torch.randn(5, 64)

    def run(x):
        terms = torch.nn.functional.softplus(x)
        return [
            terms.sum(-1),
            terms,
            torch.nn.functional.softplus(x).sum(0),
            torch.nn.functional.softplus(x, 2.0).sum(-1),
            torch.nn.functional.softplus(x, 1.0, 2.0).sum(-1),
        ]

    for values in (x, x.double()):
        graph = graphs.capture(lambda values=values: run(values), [], (values,))
        lowering._fuse_logarithms(graph.module)
        assert all(n.target is not lowering.sum_of_softplus for n in graph.module.graph.nodes)
        for a, b in zip(graph(values), run(values), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("takes", "asked"), [(2**30, [128, 512]), (2**25, [128, 32, 512]), (0, [128, 32])])
def test_an_older_malloc_is_asked_for_less_and_else_left_alone(takes, asked, monkeypatch):
    calls = []

    class Library:
        @staticmethod
        def mallopt(which, size):
            calls.append(size // 2**20)
            return int(which == memory.TRIM_THRESHOLD or size <= takes)

    for name in memory.MALLOC_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: Library)
    assert memory.keep_freed_memory.__wrapped__() == (len(asked) != 2 or 512 in asked)
    assert calls == asked


FAULTS = """
import resource, torch, ppvae.inference
from ppvae.compilation.process_setup import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(10 * 2**20)  # 40 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), keep_freed_memory(), faults())
"""

WARM = """
import pyro, torch, torch.nn.functional as F
from ppvae.inference.svi import SVI
from ppvae.compilation import process_setup as warm
x = torch.linspace(-30, 30, 10_000)
def found():
    entropy = F.binary_cross_entropy_with_logits(x, x, reduction="none")
    return torch.stack([torch.log1p(x.exp()), F.softplus(x), entropy])
before = found()
SVI(lambda: None, lambda: None, pyro.optim.Adam({}), pyro.infer.Trace_ELBO())
print(warm.prepare_process.cache_info().currsize, torch.equal(before, found()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="another C library")
@pytest.mark.parametrize("own", [False, True])
def test_freed_memory_is_kept_unless_the_user_says_otherwise_and_a_warmed_up_process_computes_the_same(own):
    """Or else a run would not go on from a checkpoint as it began."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    env |= {"MALLOC_MMAP_THRESHOLD_": "1000000"} if own else {}
    done = subprocess.run([sys.executable, "-c", FAULTS + WARM], check=True, capture_output=True, text=True, env=env)
    before, kept, after, warmed, same = done.stdout.split()
    assert kept == str(not own)
    assert int(after) > int(before) / 2 if own else int(after) < int(before) / 5
    assert (warmed, same) == ("1", "True")
