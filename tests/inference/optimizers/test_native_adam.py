"""Adam by a function in C++: the updates of torch's optimizers up to rounding, in any number of threads."""

from __future__ import annotations

import math

import pyro
import pytest
import torch

from ppvae.inference.optimizers.fused import FusedAdam
from ppvae.inference.optimizers.multi_tensor import MultiTensorSteps
from ppvae.inference.optimizers.native_adam import BLOCK, AdamKernel

SHAPES = [(3, 4), (), (1,), (67,), (2, BLOCK + 33)]  # below, at and above a vector and a block
OPTIMIZERS = {
    "Adam": lambda ps: torch.optim.Adam(ps, lr=0.1, fused=True),
    "settings": lambda ps: torch.optim.Adam(ps, lr=0.1, betas=(0.5, 0.7), eps=0.1, maximize=True, fused=True),
    "decay": lambda ps: torch.optim.Adam(ps, lr=0.1, weight_decay=0.3, fused=True),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.1, weight_decay=0.3, fused=True),
    "groups": lambda ps: torch.optim.Adam([{"params": ps[:2], "lr": 0.3}, {"params": ps[2:]}], lr=0.1, fused=True),
}


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in SHAPES], generator


def draw_gradients(params, generator):
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def run(make, native, scale=0.25, dtype=torch.float64):
    """Parameters and state after six steps by scaled gradients, the first of which makes the state."""
    params, generator = parameters(dtype)
    optimizer = make(params)
    fused = FusedAdam(optimizer)
    for i in range(6):
        draw_gradients(params, generator)
        if native and i:
            assert fused.is_native
            fused.scaled_step(scale)
        else:
            for p in params:
                p.grad.mul_(scale)
            optimizer.step()
    return [p.detach() for p in params], optimizer.state_dict()["state"]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("dtype", "digits"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_updates_and_state_are_those_of_torch(name, dtype, digits):
    expected, found = (run(OPTIMIZERS[name], native, dtype=dtype) for native in (False, True))
    torch.testing.assert_close(found, expected, rtol=digits, atol=digits)


def test_it_does_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    ends = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            ends.append(run(OPTIMIZERS["Adam"], True, dtype=torch.float32))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def ready(make=OPTIMIZERS["Adam"], dtype=torch.float64):
    params, generator = parameters(dtype)
    fused = FusedAdam(make(params))
    draw_gradients(params, generator)
    fused.step()
    return fused, params


def test_the_norm_is_that_of_all_gradients():
    fused, params = ready()
    assert fused.is_native
    assert fused.norm() == pytest.approx(math.sqrt(sum(float((p.grad**2).sum()) for p in params)), rel=1e-14)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", range(len(SHAPES)))
def test_the_norm_of_a_gradient_that_is_not_finite_is_not(bad, which):
    fused, params = ready(dtype=torch.float32)
    params[which].grad.view(-1)[-1] = bad
    assert fused.is_native
    assert not math.isfinite(fused.norm())


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: torch.optim.Adam(ps, lr=0.1),
        lambda ps: torch.optim.Adam(ps, lr=0.1, amsgrad=True, fused=True),
        lambda ps: torch.optim.SGD(ps, lr=0.1),
    ],
)
def test_other_optimizers_take_their_own_steps(make):
    assert not ready(make)[0].is_native


def test_a_parameter_without_a_gradient_leaves_the_steps_to_torch():
    fused, params = ready()
    assert fused.is_native
    params[1].grad = None
    assert not fused.is_native
    fused.step()
    params[1].grad = torch.ones((), dtype=torch.float64)
    assert not fused.is_native  # it has taken fewer steps than the others


def test_a_parameter_that_is_moved_in_memory_is_followed():
    fused, params = ready()
    assert fused.is_native
    params[0].data = params[0].data.clone()
    assert fused.is_native
    before = params[0].detach().clone()
    fused.scaled_step(1.0)
    assert not torch.equal(params[0], before)


def test_a_parameter_out_of_order_in_memory_is_left_to_torch():
    p = torch.randn(3, 4).t().requires_grad_()
    assert not AdamKernel.takes([p])
    assert AdamKernel.takes([torch.randn(3, 4)])


def test_an_update_is_seen_in_the_versions_of_parameters():
    fused, params = ready()
    before = [p._version for p in params]
    assert fused.is_native
    fused.scaled_step(1.0)
    assert all(p._version > old for p, old in zip(params, before, strict=True))


def test_parameters_of_a_pyro_optim_are_updated_together():
    ends = []
    for native in (False, True):
        pyro.clear_param_store()
        generator = torch.Generator().manual_seed(0)
        params = [pyro.param(n, torch.ones(5, dtype=torch.float64)) for n in "abc"]
        optim = pyro.optim.Adam({"lr": 0.1})
        steps = MultiTensorSteps(optim)
        for i in range(4):
            draw_gradients(params, generator)
            kernel = steps.native(params)
            assert (kernel is None) == (i == 0)
            if native and kernel is not None:
                kernel.scaled_step(1.0)
            else:
                optim(params)
        ends.append([p.detach().clone() for p in params])
    torch.testing.assert_close(*ends, rtol=1e-13, atol=1e-13)
    optim = pyro.optim.Adam({"lr": 0.1}, {"clip_norm": 1.0})
    optim(params)
    assert MultiTensorSteps(optim).native(params) is None
    pyro.clear_param_store()
