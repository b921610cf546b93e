"""One kernel for the parameters of a `PyroOptim`."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro.optim import ClippedAdam, ExponentialLR

from ppvae.inference.optimizers.multi_tensor import MultiTensorSteps


@pytest.fixture(autouse=True)
def clean():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def by_name(name):
    return {"lr": 0.1 if name == "a" else 0.02, "betas": (0.5, 0.9)}


OPTIMIZERS = {
    "Adam": lambda: pyro.optim.Adam({"lr": 0.1, "weight_decay": 0.2}),
    "AdamW": lambda: pyro.optim.AdamW({"lr": 0.1, "amsgrad": True}),
    "by parameter": lambda: pyro.optim.Adam(by_name),
    "clipped": lambda: pyro.optim.Adam({"lr": 0.1, "eps": 1.0}, {"clip_norm": 0.5}),
    "schedule": lambda: ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.5}),
    "fused": lambda: pyro.optim.Adam({"lr": 0.1, "fused": True}),
    "foreach": lambda: pyro.optim.Adam({"lr": 0.1, "foreach": True}),
    "SGD": lambda: pyro.optim.SGD({"lr": 0.1, "momentum": 0.9}),
    "ClippedAdam": lambda: ClippedAdam({"lr": 0.1, "clip_norm": 0.5, "lrd": 0.9}),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_grouped_steps_are_those_of_the_optimizers(name, fused):
    """Ten steps, the state taken over after five; parameters without a gradient now and then, and a late one."""
    found = []
    for grouped in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(0)
        params = [pyro.param(n, torch.randn(3)) for n in "abc"]
        optim = OPTIMIZERS[name]()
        for i in range(10):
            if i == 5:
                state, optim = optim.get_state(), OPTIMIZERS[name]()
                optim.set_state(state)
            met = params if i > 2 else params[:2]
            for j, p in enumerate(met):
                p.grad = None if (i, j) in ((4, 1), (7, 0)) else torch.randn(3)
            if grouped:
                MultiTensorSteps(optim)(met, fused=fused)
            else:
                optim(met)
            if name == "schedule":
                optim.step()
        found.append(([p.detach().clone() for p in params], optim.get_state()))
    (expected, state), (values, own) = found
    assert own.keys() == state.keys()
    if fused:
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(own, state, rtol=1e-5, atol=1e-6)
    else:
        torch.testing.assert_close(values, expected, rtol=0, atol=0)
        torch.testing.assert_close(own, state, rtol=0, atol=0)


def test_an_optimizer_with_a_hook_takes_its_own_steps():
    p, optim, seen = pyro.param("a", torch.zeros(2)), pyro.optim.Adam({"lr": 0.1}), []
    p.grad = torch.ones(2)
    steps = MultiTensorSteps(optim)
    steps([p], fused=True)
    optim.optim_objs[p].register_step_post_hook(lambda *_: seen.append(1))
    steps([p], fused=True)
    assert seen == [1]


@pytest.mark.parametrize("fused", [None, True])
def test_one_kernel_updates_all_parameters(fused, monkeypatch):
    params = [pyro.param(n, torch.zeros(2)) for n in "ab"]
    steps, kernel, calls = MultiTensorSteps(pyro.optim.Adam({"lr": 0.1, "fused": fused})), torch._fused_adam_, []
    for p in params:
        p.grad = torch.ones(2)
    steps(params, fused=True)
    monkeypatch.setattr(torch, "_fused_adam_", lambda *args, **kwargs: calls.append(kernel(*args, **kwargs)))
    for _ in range(2):
        steps(params, fused=True)
    assert len(calls) == 2


def set_rate(optim, params, which):
    for p in params[which]:
        optim.optim_objs[p].param_groups[0]["lr"] = 0.01


def set_moments(optim, params):
    state = optim.optim_objs[params[0]].state
    state[params[0]] = state[params[0]] | {"exp_avg": torch.full((3,), 2.0)}


def load_state(optim, params):
    own = optim.optim_objs[params[0]]
    state = own.state_dict()
    state["state"][0]["exp_avg"] = torch.full((3,), 2.0)
    own.load_state_dict(state)


def clip(optim, params):
    optim.grad_clip[params[0]] = lambda p: p.grad.clamp_(-0.1, 0.1)


def hook(optim, params):
    def without_gradient(own, *_):
        own.param_groups[0]["params"][0].grad.zero_()

    optim.optim_objs[params[0]].register_step_pre_hook(without_gradient)


CHANGES = {
    "rate of one": lambda optim, params: set_rate(optim, params, slice(1)),
    "rate of all": lambda optim, params: set_rate(optim, params, slice(None)),
    "moments": set_moments,
    "moments of a state dict": load_state,
    "clip": clip,
    "hook": hook,
    "optimizer": lambda optim, params: optim.optim_objs.update({params[0]: torch.optim.Adam([params[0]], lr=0.3)}),
    "fewer": lambda optim, params: params.pop(),
    "nothing": lambda optim, params: None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_steps_is_seen(change):
    found = []
    for is_native in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(0)
        params = [pyro.param(n, torch.randn(3)) for n in "abc"]
        every, optim, kernels = list(params), pyro.optim.Adam({"lr": 0.1}), 0
        steps = MultiTensorSteps(optim)
        for i in range(8):
            if i == 4:
                CHANGES[change](optim, params)
            for p in params:
                p.grad = torch.randn(3)
            if is_native and (kernel := steps.native(params)) is not None:
                kernels += 1
                kernel.scaled_step(1.0)
            elif is_native:
                steps(params, fused=True)
            else:
                optim(params)
        assert not is_native or kernels >= 3
        found.append([p.detach().clone() for p in every])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
