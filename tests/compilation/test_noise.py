"""Large draws of compiled graphs: the same stream of random numbers as torch's."""

import functools

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ppvae.compilation import noise
from ppvae.compilation.noise import MIN_NUMBERS, fast_normal, fast_uniform, with_fast_draws

SIZES = (16, 17, 31, 623, 624, 625, 1247, 1249, 70_001, 2_000_000)


def drawn(run, *, before: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(draws, further draws) after a seed and some draws of single numbers."""
    torch.manual_seed(7)
    for _ in range(before):
        torch.rand(1)
    return run(), torch.cat([torch.rand(700), torch.randn(3)])


@pytest.mark.parametrize("before", [0, 5, 623, 624])
@pytest.mark.parametrize("size", SIZES)
def test_draws_are_those_of_torch_and_leave_its_state(size, before, threads):
    for fast, usual in ((fast_uniform, torch.rand), (fast_normal, torch.randn)):
        found, after = drawn(functools.partial(fast, [size]), before=before)
        expected, after_usual = drawn(functools.partial(usual, size), before=before)
        assert after.equal(after_usual)
        if fast is fast_uniform:
            assert found.equal(expected)
        else:  # a normal is a radius of up to 5.8 times a sine
            assert float((found - expected).abs().max()) < 4e-6


def test_a_state_that_was_set_is_continued():
    torch.manual_seed(3)
    torch.randn(1)  # half a pair: the other normal is kept in the state
    state = torch.get_rng_state()
    fast_normal([20_000])
    kept = torch.randn(1)
    torch.set_rng_state(state)
    torch.randn(20_000)
    assert torch.randn(1).equal(kept)


def draws(kind: torch.Tensor) -> list[torch.Tensor]:
    n = MIN_NUMBERS
    return [
        torch.randn(n),
        torch.empty(3, n).normal_(),
        torch.rand(2, n),
        torch.empty(n).normal_(1, 2),  # the remaining ones stay torch's
        torch.randn(n, dtype=torch.float64),
        torch.empty_strided((n, 2), (1, n)).normal_(),
        torch.randn(n - 1),
        torch.empty(n).uniform_(2, 3),
        torch.bernoulli(kind),
    ]


def test_a_graph_draws_the_same_with_its_large_draws_replaced():
    kind = torch.full((50,), 0.3)
    usual, module = make_fx(draws)(kind), make_fx(draws)(kind)
    replaced = with_fast_draws(module)
    assert sum(node.target in (fast_normal, fast_uniform) for node in replaced.graph.nodes) == 3
    results = []
    for graph in (usual, replaced):
        torch.manual_seed(1)
        results.append((*graph(kind), torch.get_rng_state()))
    for a, b in zip(*results, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        assert float((a.double() - b.double()).abs().max()) < 4e-6


def test_without_a_compiler_the_draws_stay_those_of_torch(monkeypatch):
    monkeypatch.setattr(noise, "_library", lambda: None)
    kind = torch.full((50,), 0.3)
    module = with_fast_draws(make_fx(draws)(kind))
    assert not any(node.target in (fast_normal, fast_uniform) for node in module.graph.nodes)
