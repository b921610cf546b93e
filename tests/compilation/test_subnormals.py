"""Subnormal numbers count as zeros in compiled kernels, in all threads, and as themselves before and after."""

import pytest
import torch

from ppvae.compilation.graph import capture
from ppvae.compilation.subnormals import without_subnormals

X = torch.full((200_000,), 1e-30)  # enough for a share of each thread
TINY = torch.tensor(1e-10)


@pytest.fixture(autouse=True)
def subnormals(threads):
    """Subnormal numbers are kept before each test and after it, with one thread and with two."""
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor does not flush subnormal numbers")
    yield
    torch.set_flush_denormal(False)


def product(x):
    return x * TINY


def test_all_threads_flush_meanwhile_and_none_of_them_later():
    assert bool((product(X) > 0).all())
    assert not without_subnormals(product, X).any()
    assert bool((product(X) > 0).all())


def test_operands_count_as_zeros_too():
    assert not without_subnormals(lambda x: x * 1e30, product(X)).any()
    assert bool((product(X) * 1e30 > 0).all())


def test_an_error_meanwhile_restores_the_threads():
    with pytest.raises(ZeroDivisionError):
        without_subnormals(lambda x: 1 // 0, X)
    assert bool((product(X) > 0).all())


def test_who_flushes_already_goes_on():
    torch.set_flush_denormal(True)
    without_subnormals(product, X)
    assert not product(torch.tensor(1e-30)).any()


def test_compiled_kernels_flush_and_the_graph_that_is_not_compiled_gives_what_an_eager_run_does():
    graph = capture(lambda: [product(X)], [TINY], (X,))
    assert torch.equal(graph(X)[0], product(X))
    assert not graph.compile((X,), {})(X)[0].any()
    assert bool((product(X) > 0).all())
