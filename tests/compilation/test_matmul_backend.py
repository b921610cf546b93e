"""Matrix products of compiled steps: the same by either library, timed once, and kept with the run."""

from __future__ import annotations

import pyro
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ppvae import fit
from ppvae.compilation import matmul_backend as products
from ppvae.compilation.precision import layer_precision
from ppvae.models import LinearGaussian
from ppvae.training import checkpoint

LAYER = {"x": (300, 40), "weight": (90, 40), "bias": (90,), "slope": (300, 90)}


def layer(x, weight, bias, slope):
    """What a linear layer asks for: its output, and the gradients of its input and its weight."""
    return torch.addmm(bias, x, weight.t()), slope @ weight, slope.t() @ x


def traced(dtype=torch.float32):
    torch.manual_seed(0)
    tensors = [torch.randn(shape, dtype=dtype) for shape in LAYER.values()]
    return make_fx(layer)(*tensors), tensors


def operations(module):
    operation = products.onednn_linear()  # defined on first use: it may be this one
    return [n for n in module.graph.nodes if n.target is operation]


@pytest.mark.parametrize("onednn", [True, False])
def test_products_are_the_same_by_either_library(monkeypatch, onednn):
    monkeypatch.setattr(products, "_onednn_is_faster", lambda a, b: onednn)
    module, tensors = traced()
    choices: products.Choices = {}
    products.choose_matmul_backends(module, choices)
    assert len(choices) == 3
    assert set(choices.values()) == {onednn}
    assert len(operations(module)) == (3 if onednn else 0)
    for found, exact in zip(module(*tensors), layer(*(t.double() for t in tensors)), strict=True):
        assert float((found - exact).abs().max()) < 1e-4


def test_what_was_chosen_before_is_not_timed_again(monkeypatch):
    monkeypatch.setattr(products, "_onednn_is_faster", lambda a, b: True)
    choices: products.Choices = {}
    products.choose_matmul_backends(traced()[0], choices)
    settled = {kind: i == 1 for i, kind in enumerate(choices)}
    monkeypatch.setattr(products, "_onednn_is_faster", lambda a, b: pytest.fail("timed again"))
    module, _ = traced()
    products.choose_matmul_backends(module, settled)
    assert len(operations(module)) == 1


def test_double_precision_and_small_products_are_left_alone():
    choices: products.Choices = {}
    products.choose_matmul_backends(traced(torch.float64)[0], choices)
    products.choose_matmul_backends(make_fx(torch.mm)(torch.ones(4, 3), torch.ones(3, 5)), choices)
    assert choices == {}


def test_a_choice_is_a_measurement():
    found = products._onednn_is_faster(torch.ones(300, 40), torch.ones(90, 40).t())
    assert found in (True, False)


@pytest.mark.slow
def test_choices_are_kept_with_a_run_and_used_when_it_goes_on(monkeypatch, tmp_path):
    pyro.clear_param_store()
    monkeypatch.setattr(products, "MIN_MULTIPLICATIONS", 1)
    monkeypatch.setattr(products, "_onednn_is_faster", lambda a, b: True)
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))

    def run(epochs: int, folder, **options):
        torch.manual_seed(0)
        pair = LinearGaussian(5, 2)
        return fit(pair.model, pair.mean_field, x, epochs=epochs, batch_size=16, compile=True, directory=folder,
                   checkpoint_seconds=0, **options)  # fmt: skip

    whole = run(4, tmp_path / "whole")
    assert whole.config["kernels"] == "compiled"
    run(2, tmp_path / "cut")
    assert True in checkpoint.read(tmp_path / "cut" / "checkpoints")["products"].values()
    monkeypatch.setattr(products, "_onednn_is_faster", lambda a, b: pytest.fail("timed again"))
    again = run(4, tmp_path / "cut", resume=True)
    assert again.config["kernels"] == "compiled"
    pairs = zip(whole.model.scope.params.values(), again.model.scope.params.values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the layers that oneDNN has computed, as on a processor on which MKL is slow."""
    met = []
    operation = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(products, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(products, "_by_onednn", lambda *a: met.append(a[0].shape) or operation(*a, "none", [], ""))
    return met


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(300, 40), (3, 100, 40)])
def test_large_layers_of_eager_runs_are_computed_by_onednn(calls, shape, bias):
    torch.manual_seed(0)
    net, x = torch.nn.Linear(40, 100, bias=bias), torch.randn(shape)
    exact = torch.nn.functional.linear(x.double(), net.weight.double(), net.bias.double() if bias else None)
    with torch.no_grad(), products.faster_linear_layers():
        found = net(x)
    assert calls == [x.shape]
    assert found.shape == exact.shape
    assert float((found - exact).detach().abs().max()) < 1e-5


@pytest.mark.parametrize("kind", ["small", "double", "with gradients", "mapped", "captured", "MKL is fast"])
def test_other_layers_are_left_alone(calls, monkeypatch, kind):
    rows, dtype = 3 if kind == "small" else 300, torch.float64 if kind == "double" else torch.float32
    net, x = torch.nn.Linear(40, 100, dtype=dtype), torch.randn(rows, 40, dtype=dtype)
    if kind == "MKL is fast":
        monkeypatch.setattr(products, "mkl_is_slow", lambda: False)
    before = torch.nn.functional.linear
    with torch.set_grad_enabled(kind == "with gradients"), products.faster_linear_layers():
        if kind == "mapped":
            torch.func.vmap(net)(x.expand(2, 300, 40))
        elif kind == "captured":
            graph = make_fx(net)(x).graph
            assert not [n for n in graph.nodes if "onednn" in str(n.target) or "mkldnn" in str(n.target)]
        else:
            net(x)
    assert calls == []
    assert torch.nn.functional.linear is before


def test_reduced_precision_is_kept(calls):
    torch.manual_seed(0)
    net, x = torch.nn.Linear(40, 100), torch.randn(300, 40)
    with torch.no_grad(), products.faster_linear_layers(), layer_precision("bf16"):
        found = net(x)
    with torch.no_grad(), layer_precision("bf16"):
        expected = net(x)
    assert torch.allclose(found, expected, rtol=2**-8, atol=1e-6)  # one rounding step
    assert not torch.allclose(found, net(x), rtol=2**-12, atol=1e-6)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN")
@pytest.mark.parametrize("activation", [torch.sin, lambda y: y], ids=["curved", "linear"])
def test_gradients_of_an_input_are_those_of_the_layer(calls, activation):
    """The gradient, and the product of the Hessian with a vector; backward of a gradient without memory of its own."""
    torch.manual_seed(0)
    weight, bias, v = torch.randn(100, 40), torch.randn(100), torch.randn(300, 40)
    found = []
    for dtype in (torch.float32, torch.float64):
        x = torch.linspace(-1, 1, 300 * 40).view(300, 40).to(dtype).requires_grad_()
        with products.faster_linear_layers():
            y = activation(torch.nn.functional.linear(x, weight.to(dtype), bias.to(dtype)))
            (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            product = torch.zeros_like(x)
            if activation is torch.sin:
                (product,) = torch.autograd.grad((gradient * v.to(dtype)).sum(), x)
        found.append((y.detach(), gradient.detach(), product))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-3)
    assert len(calls) >= 2  # forward and backward of the float32 run
